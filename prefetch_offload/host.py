"""Slabs: the host memory that masters live in, pinned where the host allows it.

# [Note: slabs]
One anonymous mapping per unit. It is filled before it is pinned, so that pages come into being one tensor at a time while
the tensors they replace go away, and it is pinned by registering its exact range (``cudaHostRegister``): PyTorch's pinned
allocator rounds up to powers of two, which costs up to twice the model. Unpinning leaves the memory, and every tensor in
it, in place. Where the backend cannot register memory, its pinned allocator is used and its rounding accepted.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from .config import MIB, told
from .errors import OffloadWarning
from .memory import pinnable_nbytes

_PAGE = mmap.PAGESIZE


def trim() -> None:
    """Give freed heap memory back to the system: a model's small tensors otherwise stay in the allocator's arenas."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):  # not glibc
            pass


def clear_last_error(cudart: Any) -> None:
    """Forget the runtime's last error: a refused registration would otherwise surface in the next kernel launch."""
    if hasattr(cudart, "cudaGetLastError"):
        cudart.cudaGetLastError()
        return
    # PyTorch's binding lacks it; the library is loaded, so ask it directly. There may be several in one process.
    try:
        for path in _runtimes():
            ctypes.CDLL(path).cudaGetLastError()
    except (OSError, AttributeError):
        pass


def _runtimes() -> Iterable[str]:
    """The CUDA runtimes that this process has loaded. Raises OSError where that cannot be told."""
    if sys.platform == "win32":
        major = (torch.version.cuda or "").split(".")[0]
        return [f"cudart64_{110 if major == '11' else major}.dll"]
    with open("/proc/self/maps") as maps:  # the path is the sixth field, and may have blanks
        return {line.rstrip("\n").split(maxsplit=5)[-1] for line in maps if "libcudart" in line}


def _mapping(nbytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= 32 * MIB and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass
    return memory


def tensor_over(memory: Any, nbytes: int, offset: int = 0) -> torch.Tensor:
    """Tensor [nbytes] uint8 over `memory`; one that can be written to later, though it is made under inference mode."""
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)


def _pinned_tensor(nbytes: int) -> torch.Tensor:
    """Likewise, in memory of the backend's pinned allocator. Raises RuntimeError."""
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class Slab:
    """`nbytes` of host memory for one unit.

    Attributes:
        nbytes: usable bytes, a multiple of 8.
        bytes: Tensor [nbytes] uint8 over all of it; what is copied to the device.
        pinned: copies from it are asynchronous.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._memory: Any = _mapping(-(-nbytes // _PAGE) * _PAGE)
        self.bytes = tensor_over(self._memory, nbytes)
        self.pinned = False
        self._unpin: weakref.finalize | None = None

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """Tensor [nbytes] uint8 at `offset`, with a storage of its own: copying or saving it does not take the slab along."""
        return tensor_over(self._memory, nbytes, offset)

    def unpin(self) -> None:
        """Release the pin. No copy from the slab may be in flight.

        Registered memory stays where it is; what the backend's pinned allocator gave moves to ordinary memory, and `bytes`
        and all views have to be made anew.
        """
        if self._unpin is not None:
            if not isinstance(self._memory, mmap.mmap):
                memory = _mapping(-(-self.nbytes // _PAGE) * _PAGE)
                self._memory, self.bytes = memory, tensor_over(memory, self.nbytes).copy_(self.bytes)
            alive = self._unpin.peek()
            if alive is not None:
                _, release, args, _ = alive
                release(*args)  # before it counts as done: interrupted in it, the slab's end or another try does it again
                self._unpin.detach()
            self._unpin = None
        self.pinned = False


class Ring:
    """Two pinned halves through which pageable masters are copied, chunk by chunk.

    Attributes:
        chunk: bytes of one half.
        slots: the two halves, Tensor [chunk] uint8.
    """

    def __init__(self, nbytes: int) -> None:
        self.chunk = max(nbytes // 2 // _PAGE, 1) * _PAGE
        self.slots = [_pinned_tensor(self.chunk) for _ in range(2)]

    @property
    def nbytes(self) -> int:
        return 2 * self.chunk


class Pins:
    """The pinned host memory of one device.

    What goes beyond the limit is refused by counting. What the host itself refuses is not known to be possible until others
    have given up as much: it is not asked again for more than that.

    Attributes:
        limit: no more than this is pinned, the ring aside.
    """

    def __init__(self, device: torch.device, limit: int | None = None, staging: int = 64 * MIB, enabled: bool = True):
        self._device = device
        self._staging = staging
        self._enabled = enabled
        self.limit = pinnable_nbytes() if limit is None else limit
        self._pinned: dict[int, int] = {}  # address -> bytes
        self._lock = threading.Lock()
        self._ring: Ring | None = None
        self._warned = False
        self._given_up: int | None = None  # bytes unpinned since the host refused; None: it has not
        self._ring_refused = False
        module = torch.get_device_module(device)
        self._cudart = module.cudart() if hasattr(module, "cudart") else None

    @property
    def nbytes(self) -> int:
        """Bytes pinned now, the ring's included."""
        return sum(self._pinned.values()) + (self._ring.nbytes if self._ring is not None else 0)

    def pin(self, slab: Slab) -> bool:
        """Pin a filled slab. False, with one warning for all, when the host refuses; the slab is as it was."""
        if not self._enabled or slab.pinned:
            return slab.pinned
        if self._given_up is not None and slab.nbytes > self._given_up:
            return False
        # The ring does not count: it comes with the first refusal, and what was pinned before that fits beside it.
        if sum(self._pinned.values()) + slab.nbytes > self.limit:
            way = "give more with `pinned_limit` or to the container"
            return self._refuse(slab, f"the limit of {told(self.limit)} for pinned memory is reached", way)
        if self._cudart is None:
            return self._pin_by_copy(slab)
        address = slab.bytes.data_ptr()
        # First what undoes it: an interrupt arrives as soon as a registration, which takes its time, returns.
        slab._unpin = weakref.finalize(slab, self._unregister, address)
        slab._unpin.atexit = False
        self._pinned[address] = slab.nbytes
        with torch.accelerator.device_index(self._device.index):
            code = int(self._cudart.cudaHostRegister(address, slab.nbytes, 0))
            if code:
                clear_last_error(self._cudart)
                slab._unpin.detach()
                slab._unpin = None
                del self._pinned[address]
                self._given_up = 0
                return self._refuse(slab, f"registering memory failed with code {code}")
        self._take(slab)
        return True

    def _unregister(self, address: int) -> None:
        with torch.accelerator.device_index(self._device.index):
            if int(self._cudart.cudaHostUnregister(address)):
                clear_last_error(self._cudart)  # interrupted before it was registered
        self._give_up(address)

    def _take(self, slab: Slab) -> None:
        slab.pinned = True
        if self._given_up is not None:
            self._given_up -= slab.nbytes

    def _give_up(self, address: int) -> None:
        nbytes = self._pinned.pop(address, 0)
        if self._given_up is not None:
            self._given_up += nbytes

    def _pin_by_copy(self, slab: Slab) -> bool:
        """Move the slab into memory of the backend's pinned allocator."""
        try:
            pinned = _pinned_tensor(slab.nbytes)
        except RuntimeError as error:
            self._given_up = 0
            return self._refuse(slab, str(error).splitlines()[0])
        pinned.copy_(slab.bytes)
        buffer = (ctypes.c_char * slab.nbytes).from_address(pinned.data_ptr())
        buffer.owner = pinned  # type: ignore[attr-defined]
        slab._memory, slab.bytes = buffer, pinned
        self._pinned[pinned.data_ptr()] = slab.nbytes
        slab._unpin = weakref.finalize(slab, self._give_up, pinned.data_ptr())
        slab._unpin.atexit = False
        self._take(slab)
        return True

    def _refuse(self, slab: Slab, why: str, way_out: str = "raise `ulimit -l` or the container's memory limit") -> bool:
        if self._warned:
            return False
        self._warned = True
        warnings.warn(
            f"prefetch_offload could not pin {told(slab.nbytes)} of host memory: {why} "
            f"({told(self.nbytes)} are pinned). What is not pinned stays in ordinary memory and travels through a "
            "small pinned ring when they are needed, without prefetch: correct, but each unit of it is waited for. "
            f"To avoid it, {way_out}, or use smaller or quantised weights.",
            OffloadWarning,
            stacklevel=2,
        )
        return False

    def ring(self) -> Ring | None:
        """The staging ring, made at its first use; None when not even that can be pinned."""
        with self._lock:
            if self._ring is None and not self._ring_refused:
                try:
                    self._ring = Ring(self._staging)
                except RuntimeError:
                    self._ring_refused = True
            return self._ring

    def start_over(self) -> None:
        """Nothing is offloaded any more: give the ring back, and let the host be asked again. No copy may be in flight."""
        with self._lock:
            self._ring = None
            self._given_up = None
            self._warned = self._ring_refused = False
