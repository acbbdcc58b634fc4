"""Device addresses for life, with memory behind them only while it is wanted: the CUDA driver's virtual memory management.

# [Note: unmapping]
Mapping and unmapping happen at once, whatever streams are still doing. So memory behind a unit that leaves is kept until an
event behind its last reader has happened. Meanwhile it can be put behind another unit's address as well, whose copy waits
for that event on the device: a streamed component passes its units through the same memory, and the host waits for nothing.
Only where the memory is wanted for something else does the host wait, for the unit that left first.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from .addresses import Addresses, mapping_of
from .device import COPY_AFTER_REUSE, UNMAP_AFTER_USE, Lanes
from .errors import OffloadError

if TYPE_CHECKING:
    from .masters import SlabUnit

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Driver:
    """The driver's calls for one device, with errors as exceptions. `cuda` is ``cuda.bindings.driver``, or stands for it."""

    def __init__(self, cuda: Any, index: int) -> None:
        self.cuda = cuda
        self.location = cuda.CUmemLocation()
        self.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.location.id = index
        self._memory = cuda.CUmemAllocationProp()
        self._memory.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._memory.location = self.location
        self._access = cuda.CUmemAccessDesc()
        self._access.location = self.location
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        flag = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._memory, flag))

    def _call(self, name: str, *args: Any) -> Any:
        error, *values = getattr(self.cuda, name)(*args)
        if int(error) == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"prefetch_offload: the device is out of memory ({name})")
        if int(error):
            raise OffloadError(f"the CUDA driver refused {name}: {error}. Enable with stable_addresses=False to do without it.")
        return values[0] if values else None

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> Any:
        return self._call("cuMemCreate", nbytes, self._memory, 0)

    def map(self, address: int, nbytes: int, memory: Any) -> None:
        """Put `memory` behind `address`, for the device to read and write. All of it, or nothing."""
        self._call("cuMemMap", address, nbytes, 0, memory, 0)
        try:
            self._call("cuMemSetAccess", address, nbytes, [self._access], 1)
        except BaseException:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def release(self, memory: Any) -> None:
        self._call("cuMemRelease", memory)


def driver_for(device: torch.device) -> Driver | None:
    """The driver, where the device is CUDA's, cuda-bindings is installed and the device can do it."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        from cuda.bindings import driver as cuda
    except ImportError:
        return None
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    index = device.index or 0
    error, supported = cuda.cuDeviceGetAttribute(attribute, index)
    return Driver(cuda, index) if not int(error) and supported else None


class Range:
    """A reserved range of addresses. It lasts as long as any tensor shows it.

    Attributes:
        address, nbytes: of the range; `nbytes` is a multiple of the driver's granularity.
        memory: the driver's handle of what is behind it, if that is its own; None: nothing, or what another has by now.
        mapped: something is behind it.
        left: the unit has left; what is behind it is not to be touched before this event.
        handed_over: what is behind it goes with the last tensor.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self.memory: Any = None
        self.mapped = False
        self.left: torch.Event | None = None
        self.handed_over = False


class VirtualAddresses(Addresses):
    """See the module."""

    def __init__(self, lanes: Lanes, driver: Driver) -> None:
        super().__init__(lanes)
        self.driver = driver
        self._ranges: dict[str, Range] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._pending: deque[tuple[str, Range]] = deque()  # left, and mapped still; in the order in which they did

    def rounded(self, nbytes: int) -> int:
        grain = self.driver.granularity
        return -(-nbytes // grain) * grain

    def _grew(self, nbytes: int, idle_nbytes: int = 0) -> None:
        self.pool_nbytes += nbytes
        self.idle_nbytes += idle_nbytes
        self.lanes.counts_besides(self.pool_nbytes, self.idle_nbytes)

    # ----------------------------------------------------------------- addresses
    def place(self, unit: SlabUnit) -> None:
        if unit.key in self._ranges:
            return
        nbytes = self.rounded(unit.slab.nbytes)
        made = Range(self.driver.reserve(nbytes), nbytes)
        try:
            tensor = show(made.address, unit.slab.nbytes, self.lanes.device, lambda: self._freed(made))
        except BaseException:
            self.driver.free(made.address, nbytes)
            raise
        self._ranges[unit.key], self._tensors[unit.key] = made, tensor

    def placed(self, unit: SlabUnit) -> bool:
        return unit.key in self._ranges

    def holds(self, unit: SlabUnit) -> bool:
        found = self._ranges.get(unit.key)
        return found is not None and found.mapped and found.left is None

    def hand_over(self, unit: SlabUnit) -> None:
        found = self._ranges.pop(unit.key, None)
        if found is not None:
            found.handed_over = True
            if found.memory is not None:
                self._grew(-found.nbytes)  # no longer ours to count
            self._tensors.pop(unit.key)

    def forget(self, unit: SlabUnit) -> None:
        found = self._ranges.pop(unit.key, None)
        if found is None:
            return
        if found.mapped:
            if found.left is not None:
                self._pending.remove((unit.key, found))
                self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
            self._unmap(unit.key, found)
        self._tensors.pop(unit.key)

    def _freed(self, found: Range) -> None:
        """The last tensor that showed it is gone."""
        if found.mapped:  # handed over: whatever used it may be running
            torch.accelerator.synchronize(self.lanes.device)
            self.driver.unmap(found.address, found.nbytes)
            self.driver.release(found.memory)
        self.driver.free(found.address, found.nbytes)

    # -------------------------------------------------------------------- memory
    def map(self, unit: SlabUnit) -> torch.Tensor:
        self.place(unit)
        found = self._ranges[unit.key]
        self._poll()
        if found.mapped:  # it has left, and has not been unmapped
            assert found.left is not None
            self._pending.remove((unit.key, found))
            if found.memory is not None:
                self.lanes.wait(self.lanes.copy, found.left, COPY_AFTER_REUSE)
                found.left = None
                self._grew(0, -found.nbytes)
                return self._tensors[unit.key]
            self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
            self._unmap(unit.key, found)
        memory, free = self._take(found.nbytes)
        try:
            self.driver.map(found.address, found.nbytes, memory)
        except BaseException:
            if free is not None:
                self.lanes.host_wait(free, UNMAP_AFTER_USE)
            self.driver.release(memory)
            self._grew(-found.nbytes)
            raise
        found.memory, found.mapped = memory, True
        self.lanes.note_host("alloc", mapping_of(unit.key))
        return self._tensors[unit.key]

    def _take(self, nbytes: int) -> tuple[Any, torch.Event | None]:
        """Memory for a range, counted: what another leaves once the event has happened, or new."""
        for _, other in self._pending:
            if other.memory is not None and other.nbytes == nbytes:
                assert other.left is not None
                self.lanes.wait(self.lanes.copy, other.left, COPY_AFTER_REUSE)
                memory, other.memory = other.memory, None
                self._grew(0, -nbytes)
                return memory, other.left
        while self.limit_nbytes is not None and self.pool_nbytes + nbytes > self.limit_nbytes and self._reclaim():
            pass
        while True:
            try:
                memory = self.driver.create(nbytes)
                break
            except torch.OutOfMemoryError:
                # PyTorch's allocator keeps what it has cached from the driver.
                if not self._reclaim() and not self._uncache():
                    raise
        self._grew(nbytes)
        return memory, None

    def _uncache(self) -> bool:
        """Let PyTorch's allocator give back what it has cached. False: nothing."""
        before = self.lanes.reserved_nbytes()
        self.lanes.empty_cache()
        return self.lanes.reserved_nbytes() < before

    def unmap(self, unit: SlabUnit, after: torch.Event | None) -> None:
        found = self._ranges.get(unit.key)
        if found is None or not found.mapped:
            return
        if after is None:
            if found.left is not None:
                self._pending.remove((unit.key, found))
            self._unmap(unit.key, found)
        elif found.left is None:
            found.left = after
            self._pending.append((unit.key, found))
            self._grew(0, found.nbytes)

    def _unmap(self, key: str, found: Range) -> None:
        """Nothing reads it any more."""
        self.lanes.note_host("free", mapping_of(key))
        self.driver.unmap(found.address, found.nbytes)
        found.mapped = False
        if found.memory is not None:
            memory, found.memory = found.memory, None
            self._grew(-found.nbytes, -found.nbytes if found.left is not None else 0)
            self.driver.release(memory)
        found.left = None

    def _poll(self) -> None:
        """Unmap what is no longer read."""
        for entry in list(self._pending):
            key, found = entry
            assert found.left is not None
            if self.lanes.happened(found.left, UNMAP_AFTER_USE):
                self._pending.remove(entry)
                self._unmap(key, found)

    def _reclaim(self) -> bool:
        """Wait for the first that left to be read no more, and give its memory back. False: there is none."""
        for entry in self._pending:
            key, found = entry
            if found.memory is not None:
                assert found.left is not None
                self._pending.remove(entry)
                self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
                self._unmap(key, found)
                return True
        return False

    def give_back(self) -> None:
        while self._reclaim():
            pass
        self._poll()

    def trim(self) -> None:
        self._poll()
        while self.limit_nbytes is not None and self.pool_nbytes > self.limit_nbytes and self._reclaim():
            pass


# ------------------------------------------------------------------------------ showing memory as a tensor
class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_KINDS = {"cuda": 2, "privateuseone": 12}  # DLPack's
_shown: dict[int, tuple[Any, Any, Any]] = {}  # by address of its record: what must outlive a tensor, and what to do then


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(record: int) -> None:
    _, _, freed = _shown.pop(record)
    freed()


def show(address: int, nbytes: int, device: torch.device, freed: Any) -> torch.Tensor:
    """Device memory as a tensor [nbytes] uint8, which owns nothing. `freed` is called with its last view's end.

    By DLPack rather than ``__cuda_array_interface__``: the latter asks the driver about memory that is not there yet.
    """
    kind = torch._C._get_privateuse1_backend_name() if device.type != "cuda" else "cuda"
    assert device.type in ("cuda", kind), f"no tensor of {device} can be made of an address"
    shape = (ctypes.c_int64 * 1)(nbytes)
    strides = (ctypes.c_int64 * 1)(1)
    record = _DLManagedTensor()
    tensor = record.tensor
    tensor.data, tensor.device_id, tensor.ndim = address, device.index or 0, 1
    tensor.device_type = _KINDS["cuda" if device.type == "cuda" else "privateuseone"]
    tensor.code, tensor.bits, tensor.lanes = 1, 8, 1  # unsigned bytes
    tensor.shape, tensor.strides, tensor.byte_offset = shape, strides, 0
    record.deleter = ctypes.cast(_delete, ctypes.c_void_p)
    where = ctypes.addressof(record)
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    _shown[where] = record, (shape, strides), freed
    try:
        with torch.inference_mode(False):
            return torch.utils.dlpack.from_dlpack(make(where, b"dltensor", None))  # type: ignore[no-any-return,attr-defined]
    except BaseException:
        _shown.pop(where, None)
        raise
