"""The CUDA driver's virtual memory management, of host memory, for the simulated accelerator: ranges of addresses, memory that
is put behind them, twice if asked for, and poison where there is none."""

from __future__ import annotations

import ctypes
import mmap
import os
from types import SimpleNamespace
from typing import Any

GRAIN = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED = 0x10


def _map(address: int | None, nbytes: int, flags: int, fd: int = -1) -> int:
    found = _libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags | (_FIXED if address else 0), fd, 0)
    assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(found)


class FakeCuda:
    """Stands for ``cuda.bindings.driver``. Every call is checked as the driver would, and more.

    Attributes:
        calls: name and arguments of each.
        ranges: reserved addresses and their sizes.
        behind: what is mapped at which of them, and whether it may be accessed.
        memories: by handle, file descriptor and size; those released stay while they are mapped.
        used, peak: bytes of memory that exist.
        capacity: creating more is out of memory.
        fail: by name: how many calls from now on succeed, and the error of the one after them.
    """

    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemLocation = CUmemAllocationProp = CUmemAccessDesc = SimpleNamespace

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.ranges: dict[int, int] = {}
        self.behind: dict[int, tuple[int, bool]] = {}
        self.memories: dict[int, tuple[int, int]] = {}
        self.released: set[int] = set()
        self.used = self.peak = 0
        self.capacity = 1 << 50
        self.fail: dict[str, tuple[int, int]] = {}
        self._handles = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(type(self), f"_{name}", None)
        if not name.startswith("cu") or call is None:
            raise AttributeError(name)

        def checked(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, args))
            left, error = self.fail.get(name, (-1, 0))
            if left >= 0:
                self.fail[name] = left - 1, error
                if left == 0:
                    return (error, None)
            result = call(self, *args)
            return result if isinstance(result, tuple) else (0, result)

        return checked

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def _cuMemGetAllocationGranularity(self, memory: Any, flag: int) -> int:
        assert memory.type == 1 and memory.location.type == 1 and memory.location.id == 0
        return GRAIN

    def _cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> int:
        assert nbytes and not nbytes % GRAIN and (alignment, address, flags) == (0, 0, 0)
        made = _map(None, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.ranges[made] = nbytes
        return made

    def _cuMemAddressFree(self, address: int, nbytes: int) -> tuple[int]:
        assert self.ranges.pop(address) == nbytes and address not in self.behind
        _libc.munmap(address, nbytes)
        return (0,)

    def _cuMemCreate(self, nbytes: int, memory: Any, flags: int) -> tuple[int, int | None]:
        assert nbytes and not nbytes % GRAIN and not flags
        if self.used + nbytes > self.capacity:
            return 2, None
        self._handles += 1
        fd = os.memfd_create("device memory")
        os.ftruncate(fd, nbytes)
        os.pwrite(fd, b"\xff" * nbytes, 0)
        self.memories[self._handles] = fd, nbytes
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return 0, self._handles

    def _cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> tuple[int]:
        assert self.ranges[address] == nbytes == self.memories[handle][1] and (offset, flags) == (0, 0)
        assert address not in self.behind and handle not in self.released
        _map(address, nbytes, mmap.MAP_SHARED, self.memories[handle][0])
        self.behind[address] = handle, False
        return (0,)

    def _cuMemSetAccess(self, address: int, nbytes: int, access: Any, count: int) -> tuple[int]:
        assert self.ranges[address] == nbytes and count == len(access) == 1
        assert access[0].flags == 3 and access[0].location.id == 0
        handle, accessible = self.behind[address]
        assert not accessible
        self.behind[address] = handle, True
        return (0,)

    def _cuMemUnmap(self, address: int, nbytes: int) -> tuple[int]:
        assert self.ranges[address] == nbytes
        handle, _ = self.behind.pop(address)
        _map(address, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        ctypes.memset(address, 0xFF, nbytes)  # whoever reads it gets what no weight is
        self._gone(handle)
        return (0,)

    def _cuMemRelease(self, handle: int) -> tuple[int]:
        assert handle in self.memories and handle not in self.released
        self.released.add(handle)
        self._gone(handle)
        return (0,)

    def _gone(self, handle: int) -> None:
        if handle in self.released and all(h != handle for h, _ in self.behind.values()):
            fd, nbytes = self.memories.pop(handle)
            os.close(fd)
            self.used -= nbytes
