"""The simulated accelerator: how it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefetch_offload import testing
from prefetch_offload.testing import SimulatorUnavailable, simgpu

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


def test_load_is_idempotent(bare: Any) -> None:
    assert testing.load() is bare
    assert testing.simulated_device() == torch.device("simgpu", 0)
    assert torch.get_device_module("simgpu").ext is bare


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import sys, torch, prefetch_offload.testing; assert not hasattr(torch, 'simgpu'), 'loaded'"
    done = python(code, XDG_CACHE_HOME=str(tmp_path), CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path: Path) -> None:
    code = """
from prefetch_offload.testing import SimulatorUnavailable, load
try: load()
except SimulatorUnavailable as error: print(error)
"""
    done = python(code, XDG_CACHE_HOME=str(tmp_path), CXX="/nowhere/c++ -m64")
    assert "compiler '/nowhere/c++' was not found" in done.stdout, done.stderr
    assert "apt install g++" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(SimulatorUnavailable, match="pip install ninja"):
        simgpu._toolchain()


def test_no_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's extension builder imports it."""
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.delattr("torch.utils.cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)
    with pytest.raises(SimulatorUnavailable, match="pip install setuptools"):
        simgpu._toolchain()


def test_what_does_not_compile_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "simgpu.cpp"
    broken.write_text("#error no such accelerator\n")
    monkeypatch.setattr(simgpu, "_sources", lambda: [broken])
    with pytest.raises(SimulatorUnavailable, match="no such accelerator"):
        simgpu._compile(tmp_path / "simgpu_ext.so")
    assert list(tmp_path.iterdir()) == [broken]


def test_an_edited_source_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {path.name for path in simgpu._sources()}
    assert names == {"simgpu.cpp", "simgpu_device.h", "simgpu_order.h"}
    copies = [tmp_path / name for name in sorted(names)]
    for path in copies:
        path.write_bytes((simgpu._HERE / path.name).read_bytes())
    here = simgpu._build_key()
    monkeypatch.setattr(simgpu, "_HERE", tmp_path)
    assert simgpu._build_key() == here, "the same source at another place"
    for path in copies:
        path.write_text(path.read_text() + "\n")
        assert simgpu._build_key() != here
        here = simgpu._build_key()


def test_where_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    temporary, home, cache, shared = (tmp_path / name for name in ("temporary", "home", "cache", "shared"))
    for path in (temporary, shared):
        path.mkdir()
    (shared / "prefetch_offload").mkdir()
    (shared / "prefetch_offload").chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    key = simgpu._build_key()

    def built(**environment: str) -> Path:
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, environment.get(name, ""))
        directory = simgpu._build_directory()
        assert directory.is_dir() and directory.stat().st_mode & 0o077 == 0
        return directory

    fallback = temporary / f"prefetch_offload-{os.getuid()}" / key
    assert built(HOME=str(home)) == home / ".cache" / "prefetch_offload" / key
    assert built(HOME=str(home), XDG_CACHE_HOME=str(cache)) == cache / "prefetch_offload" / key
    assert built() == fallback
    assert built(HOME="relative") == fallback
    assert built(HOME="/dev/null") == fallback, "a home that cannot be written to"
    assert built(XDG_CACHE_HOME=str(shared)) == fallback, "others could put their code there"
    fallback.parent.chmod(0o777)
    assert built().parent == temporary and built() != fallback


def test_two_processes_build_once(bare: Any, tmp_path: Path) -> None:
    """The second waits for the first. Compiling is replaced by a slow copy of the build at hand."""
    library = simgpu._build_directory() / "simgpu_ext.so"
    code = f"""
import shutil, time, torch
from prefetch_offload.testing import simgpu
def compile(library):
    open({str(tmp_path / "log")!r}, "a").write("compiled;")
    time.sleep(2)
    shutil.copy({str(library)!r}, library)
    return simgpu._import(library)
simgpu._compile = compile
assert torch.ones(2, device=simgpu.simulated_device()).sum() == 2
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    builders = [subprocess.Popen([sys.executable, "-c", code], env=environ) for _ in range(2)]
    assert [builder.wait(120) for builder in builders] == [0, 0]
    assert (tmp_path / "log").read_text() == "compiled;"
