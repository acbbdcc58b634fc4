"""The CUDA driver's calls for virtual memory, and memory of its as a tensor.

# [Note: interrupts at the driver]
An interrupt comes between two steps of the interpreter. Between the driver's answer and the statement that keeps it, it would
lose the answer: memory that nobody knows of, or a range that nobody knows to be empty. So the call and keeping its answer
are one step: a list is extended by an iterator that calls the driver. What is there follows from the answers alone, and
making what is made, or unmaking what is not, does nothing: after an interrupt everything can be done again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import starmap
from typing import Any

import numpy as np
import torch

from .errors import OffloadError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class Turns:
    """Something that the driver makes and unmakes in turns.

    Attributes:
        answers: what it said to each call, since it was last not there. There after an odd number of calls that succeeded.
    """

    def __init__(self) -> None:
        self.answers: list[tuple[Any, ...]] = []

    @property
    def there(self) -> bool:
        there = False
        for answer in self.answers:
            if not int(answer[0]):
                there = not there
        return there

    def value(self) -> Any:
        """What the call that made it returned."""
        return [answer for answer in self.answers if not int(answer[0])][-1][1]

    def settle(self) -> None:
        """Forget the past of what is not there."""
        if not self.there:
            self.answers.clear()


class Memory(Turns):
    """Physical memory of the device. It exists until it is released, and for as long as it is mapped."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes


class Range:
    """A range of addresses. Once reserved it lasts as long as any tensor shows it.

    Attributes:
        nbytes: of the range, a multiple of the driver's granularity.
        space: the reserved addresses.
        mapping: something is behind them.
        memory: what is, if that is its own; None: nothing, or what another has by now. After an interrupt two may have the
            same for a while; releasing it again does nothing.
        left: the unit has left; what is behind it is not to be touched before this event.
        backed: the device may read and write what is behind it, and the checker knows.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.space, self.mapping = Turns(), Turns()
        self.memory: Memory | None = None
        self.left: torch.Event | None = None
        self.backed = False


class Driver:
    """The driver's calls for one device, with errors as exceptions. `cuda` is ``cuda.bindings.driver``, or stands for it.

    Every call that makes or unmakes something does nothing if that is done ([Note: interrupts at the driver]).
    """

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
        said: list[tuple[Any, ...]] = []
        self._call(said, "cuMemGetAllocationGranularity", self._memory, flag)
        self.granularity = int(said[0][1])

    def _call(self, answers: list[tuple[Any, ...]], name: str, *args: Any) -> None:
        """Call the driver, and keep its answer in `answers`, in one step."""
        answers.extend(starmap(getattr(self.cuda, name), (args,)))
        error = answers[-1][0]
        if not int(error):
            return
        if int(error) == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"prefetch_offload: the device is out of memory ({name})")
        raise OffloadError(f"the CUDA driver refused {name}: {error}. Enable with stable_addresses=False to do without it.")

    def reserve(self, found: Range) -> None:
        if not found.space.there:
            found.space.settle()
            self._call(found.space.answers, "cuMemAddressReserve", found.nbytes, 0, 0, 0)

    def free(self, found: Range) -> None:
        """Give the addresses back. Nothing is behind them."""
        if found.space.there:
            self._call(found.space.answers, "cuMemAddressFree", int(found.space.value()), found.nbytes)
            found.space.settle()

    def create(self, memory: Memory) -> None:
        if not memory.there:
            memory.settle()
            self._call(memory.answers, "cuMemCreate", memory.nbytes, self._memory, 0)

    def release(self, memory: Memory) -> None:
        if memory.there:
            self._call(memory.answers, "cuMemRelease", memory.value())
            memory.settle()

    def map(self, found: Range) -> None:
        """Put the range's memory behind it, for the device to read and write. All of it, or nothing."""
        assert found.memory is not None and not found.mapping.there
        found.mapping.settle()
        address = int(found.space.value())
        self._call(found.mapping.answers, "cuMemMap", address, found.nbytes, 0, found.memory.value(), 0)
        try:
            self._call([], "cuMemSetAccess", address, found.nbytes, [self._access], 1)
        except BaseException:
            self.unmap(found)
            raise

    def unmap(self, found: Range) -> None:
        if found.mapping.there:
            self._call(found.mapping.answers, "cuMemUnmap", int(found.space.value()), found.nbytes)
            found.mapping.settle()


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


# ------------------------------------------------------------------------------ showing memory as a tensor
class _DLTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))  # and more


_KINDS = {"cuda": 2, "privateuseone": 12}  # DLPack's


class _Shown:
    """Memory, as NumPy takes it. It ends with the last view."""

    def __init__(self, address: int, nbytes: int, ended: Callable[[], None]) -> None:
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        self._ended = ended

    def __del__(self) -> None:
        try:
            self._ended()
        except KeyboardInterrupt:  # Python reports it and goes on, as in every __del__; what it cut short is still to be done
            self._ended()
            raise


def show(address: int, nbytes: int, device: torch.device, ended: Callable[[], None]) -> torch.Tensor:
    """Device memory as a tensor [nbytes] uint8, which owns nothing. `ended` is called with its last view's end.

    By DLPack rather than ``__cuda_array_interface__``: the latter asks the driver about memory that is not there yet. By
    NumPy's, with another device written into it: a tensor may end while an exception is on its way, which a Python function
    called by ctypes would lose and crash for; NumPy lets go of an object, whose `__del__` may be called at any time.
    """
    kind = torch._C._get_privateuse1_backend_name() if device.type != "cuda" else "cuda"
    assert device.type in ("cuda", kind), f"no tensor of {device} can be made of an address"
    capsule = np.asarray(_Shown(address, nbytes, ended)).__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    tensor.device_type = _KINDS["cuda" if device.type == "cuda" else "privateuseone"]
    tensor.device_id = device.index or 0
    with torch.inference_mode(False):
        return torch.utils.dlpack.from_dlpack(capsule)  # type: ignore[no-any-return,attr-defined]
