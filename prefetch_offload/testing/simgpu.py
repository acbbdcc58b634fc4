"""Build, load and register the simulated accelerator (`simgpu*.h`, `simgpu.cpp`) as a PyTorch device.

The first `load()` on a machine compiles it; the result is cached per user, keyed by everything
that it depends on, so an edited source is never served by an old build. What is real and what is simulated: see the
head of `simgpu.cpp`.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_MODULE = "simgpu_ext"
_CFLAGS = ["-O1", "-g0"]  # compile time matters more than speed here


class SimulatorUnavailable(RuntimeError):
    """The simulated accelerator cannot be built here; the message says what to install."""


@functools.cache
def load(name: str = "simgpu") -> types.ModuleType:
    """Build the simulated accelerator if no cached build fits, and register it as device type `name`.

    Idempotent: later calls return the same extension. PyTorch holds one such device per process, so another `name`
    raises RuntimeError (from PyTorch).

    Returns the extension, whose functions configure the simulation and read its counters (`help(ext)` lists them).
    Mutates the process: renames PyTorch's PrivateUse1 backend and adds `torch.<name>`.
    Raises SimulatorUnavailable when a build is needed and it fails, or there is no C++ compiler or no ninja for it.
    """
    torch.utils.rename_privateuse1_backend(name)  # type: ignore[attr-defined]
    ext = _build_or_reuse()
    ext.register()
    torch._register_device_module(name, _device_module(name, ext))  # type: ignore[no-untyped-call]
    torch.utils.generate_methods_for_privateuse1_backend()  # type: ignore[attr-defined]
    return ext


def simulated_device() -> torch.device:
    """Load the simulator under its usual name and return its device. Raises SimulatorUnavailable, as `load` does."""
    load()
    return torch.device("simgpu", 0)


# -------------------------------------------------------------------------------------------------------- building


def _sources() -> list[Path]:
    return sorted([*_HERE.glob("simgpu*.cpp"), *_HERE.glob("simgpu*.h")])


def _build_key() -> str:
    """Directory name of a build: everything that a compiled extension depends on."""
    digest = hashlib.sha256()
    for part in [*(p.name.encode() + b"\0" + p.read_bytes() for p in _sources()), " ".join(_CFLAGS).encode()]:
        digest.update(len(part).to_bytes(8, "little") + part)
    platform_tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
    return f"simgpu-torch{torch.__version__}-{platform_tag}-{digest.hexdigest()[:16]}"


def _usable(directory: Path) -> bool:
    """Create `directory` if need be; True if it is ours alone to write (what lies in it will be executed)."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError:
        return False
    return info.st_uid == os.getuid() and not info.st_mode & 0o022 and os.access(directory, os.W_OK | os.X_OK)


def _build_directory() -> Path:
    """The per-user cache directory of this build; a temporary one where HOME is empty, missing or not writable."""
    roots = []
    for variable, below in (("XDG_CACHE_HOME", ""), ("HOME", ".cache")):
        value = os.environ.get(variable, "")
        if os.path.isabs(value):
            roots.append(Path(value) / below / "prefetch_offload")
    roots.append(Path(tempfile.gettempdir()) / f"prefetch_offload-{os.getuid()}")
    for root in roots:
        if _usable(root) and _usable(root / _build_key()):
            return root / _build_key()
    return Path(tempfile.mkdtemp(prefix="prefetch_offload-"))


def _toolchain() -> types.ModuleType:
    """PyTorch's extension builder. Raises SimulatorUnavailable unless a compiler ($CXX, else c++) and ninja can run."""
    needed = "the simulated accelerator is compiled on first use, and"
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SimulatorUnavailable(f"{needed} {error.name} is missing. Install it: pip install {error.name}") from error
    compiler = (shlex.split(cpp_extension.get_cxx_compiler()) or [""])[0]  # type: ignore[no-untyped-call]
    if not shutil.which(compiler):
        raise SimulatorUnavailable(
            f"{needed} the C++ compiler {compiler!r} was not found. Install one (Debian, Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++), or set CXX to the one you have."
        )
    if not cpp_extension.is_ninja_available():
        raise SimulatorUnavailable(f"{needed} ninja was not found on PATH. Install it: pip install ninja")
    return cpp_extension


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Put this interpreter's script directory last on PATH: `venv/bin/python` alone then finds the venv's ninja."""
    old = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([*([old] if old else []), str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        if old is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = old


def _build_or_reuse() -> types.ModuleType:
    directory = _build_directory()
    library = directory / f"{_MODULE}.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time; the system releases it even when a builder is killed
        if not library.exists():
            return _compile(library)
    return _import(library)


def _import(library: Path) -> types.ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(library))
    spec = importlib.util.spec_from_file_location(_MODULE, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(library: Path) -> types.ModuleType:
    """Compile in a fresh directory, load, and move the finished `library` into place: a broken build leaves nothing."""
    with _scripts_on_path(), tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        cpp_extension = _toolchain()
        sources = [str(path) for path in _sources() if path.suffix == ".cpp"]
        try:
            ext: types.ModuleType = cpp_extension.load(_MODULE, sources, extra_cflags=_CFLAGS, build_directory=scratch)
        except Exception as error:
            message = f"the simulated accelerator did not compile with PyTorch {torch.__version__}: {error}"
            raise SimulatorUnavailable(message) from error
        assert ext.__file__ is not None
        os.replace(ext.__file__, library)
        return ext


# --------------------------------------------------------------------------------------------- the device's module


class _Cudart:
    """The part of `torch.cuda.cudart()` that registers host memory. Functions return an error code, 0 for success."""

    def __init__(self, ext: types.ModuleType) -> None:
        self._ext = ext

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int = 0) -> int:
        """Page-lock `nbytes` at `pointer`. `flags` is ignored. A refusal is also the next cudaGetLastError."""
        return int(self._ext.host_register(pointer, nbytes))

    def cudaHostUnregister(self, pointer: int) -> int:
        """Undo cudaHostRegister. A copy still pending on the range is a violation."""
        return int(self._ext.host_unregister(pointer))

    def cudaGetLastError(self) -> int:
        """The error that a call on this thread left behind; clears it. (torch.cuda.cudart() does not bind it.)"""
        return int(self._ext.last_error())


def _device_module(name: str, ext: types.ModuleType) -> types.ModuleType:
    """The module `torch.<name>`, shaped like `torch.cuda`. Device arguments are ignored: there is one device."""
    module: Any = types.ModuleType(f"torch.{name}")
    generator: torch.Generator = ext.default_generator()
    cudart = _Cudart(ext)

    module.ext = ext
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.get_device_name = lambda device=None: name
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.cudart = lambda: cudart

    module.Stream = functools.partial(torch.Stream, device=name)
    module.Event = functools.partial(torch.Event, device=name)
    module.stream = lambda stream: contextlib.nullcontext() if stream is None else stream
    module.current_stream = lambda device=None: torch.accelerator.current_stream()
    module.set_stream = torch.accelerator.set_stream
    module.synchronize = lambda device=None: ext.drain()

    module.default_generators = (generator,)
    module.manual_seed = generator.manual_seed
    module.manual_seed_all = module.manual_seed
    module.initial_seed = generator.initial_seed
    module.get_rng_state = lambda device=None: generator.get_state()
    module.set_rng_state = lambda state, device=None: generator.set_state(state)

    module.empty_cache = lambda: None  # nothing is cached: freed memory is free
    module.mem_get_info = _memory_of(ext)  # torch.accelerator's own is younger than the oldest PyTorch that is supported
    module.memory_allocated = lambda device=None: ext.counters()["allocated"]
    module.memory_reserved = module.memory_allocated
    module.max_memory_allocated = lambda device=None: ext.counters()["peak"]
    module.max_memory_reserved = module.max_memory_allocated
    module.reset_peak_memory_stats = lambda device=None: torch.accelerator.reset_peak_memory_stats()
    return module  # type: ignore[no-any-return]


def _memory_of(ext: types.ModuleType) -> Callable[..., tuple[int, int]]:
    def mem_get_info(device: object = None) -> tuple[int, int]:
        counters = ext.counters()
        return max(0, counters["capacity"] - counters["allocated"]), counters["capacity"]

    return mem_get_info
