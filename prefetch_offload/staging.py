"""Where encoded units arrive: buffers on the device that they are cast out of. See [Note: encoded units] in encoded.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from prefetch_offload_kernels import prepare, workspace_nbytes

from .config import MIB
from .device import OUT_OF_MEMORY, Lanes
from .encoded import EncodedUnit
from .units import device_nbytes

# The second buffer has no more: a unit beyond the default `unit_max` is one large tensor, of which there are few.
_SECOND = 256 * MIB


@dataclass(slots=True)
class Buffer:
    """What a unit arrives in: memory of the cast stream.

    Attributes:
        name: for the checker; none is given twice, so that an interrupt leaves no name that is taken.
        bytes: uint8 on the device.
        left: on the cast stream, behind the last cast out of it.
    """

    name: str
    bytes: torch.Tensor
    left: torch.Event


class Staging:
    """Two buffers that take turns, so that the link goes on while a unit is cast: one for the largest unit there is, and one
    for most of the others (`staging_nbytes`). They are allocated on the cast stream, and so are the units' tables: nothing
    else ever orders them.

    Attributes:
        buffers: those that there are.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.buffers: list[Buffer | None] = [None, None]
        self._units: dict[str, EncodedUnit] = {}
        self._last = 1  # which of them was used last
        self._numbers = itertools.count()

    # -------------------------------------------------------------------- units
    def admit(self, unit: EncodedUnit) -> None:
        """It will arrive here. The kernel that it needs is compiled now."""
        self._units[unit.key] = unit
        try:
            self.lay_table(unit)
        except OUT_OF_MEMORY:
            pass  # its load tries again, where others make room

    def forget(self, unit: EncodedUnit) -> None:
        """It will not arrive any more."""
        self._units.pop(unit.key, None)
        self.fit()

    def lay_table(self, unit: EncodedUnit) -> None:
        """Put what the kernel has to know of the unit on the device. Raises torch.OutOfMemoryError."""
        with torch.inference_mode(False), self.lanes.cast:
            prepare(unit.lay_table(self.lanes.device))

    # ------------------------------------------------------------------- memory
    @property
    def overhead_nbytes(self) -> int:
        """Device bytes that encoded units need besides their own."""
        units = self._units.values()
        workspace = max((workspace_nbytes(u.table) for u in units if u.table is not None), default=0)
        workspace += max((u.workspace_nbytes for u in units), default=0)  # the caller's stream packs while the other casts
        return sum(self.sizes) + workspace + sum(u.overhead_nbytes for u in units)

    @property
    def held_nbytes(self) -> int:
        """Those that are allocated now."""
        buffers = sum(b.bytes.numel() for b in self.buffers if b is not None)
        return buffers + sum(u.overhead_nbytes for u in self._units.values())

    @property
    def sizes(self) -> tuple[int, int]:
        """Device bytes of the two buffers."""
        units = self._units.values()
        first = max((u.payload_nbytes for u in units), default=0)
        # Those of one call are a few that come once, beside a decoder's activations: not worth the memory.
        _, second = staging_nbytes(u.payload_nbytes for u in units if not u.transient)
        return device_nbytes(first), device_nbytes(second)

    def release(self) -> None:
        """Give the buffers back; the next units take them again."""
        self._give_back(0)
        self._give_back(1)

    def fit(self) -> None:
        """Hold no larger ones than are counted: what their size came from is gone, or has become smaller."""
        for number, nbytes in enumerate(self.sizes):
            buffer = self.buffers[number]
            if buffer is not None and buffer.bytes.numel() > nbytes:
                self._give_back(number)

    def take(self, payload_nbytes: int) -> Buffer:
        """A buffer for so many bytes: not the one that was used last, where there is room for two.

        Raises:
            torch.OutOfMemoryError: there is none for one.
        """
        sizes = self.sizes
        number = 1 - self._last if payload_nbytes <= sizes[1 - self._last] else self._last
        try:
            buffer = self._buffer(number, sizes[number], payload_nbytes)
        except OUT_OF_MEMORY:
            number = 1 - number
            if payload_nbytes > sizes[number]:
                raise
            buffer = self._buffer(number, sizes[number], payload_nbytes)
        self._last = number
        return buffer

    def _buffer(self, number: int, nbytes: int, least_nbytes: int) -> Buffer:
        """Buffer `number`, made with `nbytes` where there is none of `least_nbytes`."""
        buffer = self.buffers[number]
        if buffer is None or buffer.bytes.numel() < least_nbytes:
            self._give_back(number)
            lanes = self.lanes
            with torch.inference_mode(False), lanes.cast:
                memory = torch.empty(nbytes, dtype=torch.uint8, device=lanes.device)
            name = f"staging/{number}/{next(self._numbers)}"
            lanes.note("alloc", lanes.cast, name)
            buffer = self.buffers[number] = Buffer(name, memory, lanes.record(lanes.cast))
        return buffer

    def _give_back(self, number: int) -> None:
        buffer = self.buffers[number]
        if buffer is not None:
            self.buffers[number] = None  # first: interrupted behind it, nothing is freed twice
            self.lanes.note("free", self.lanes.cast, buffer.name)


def staging_nbytes(payloads: Iterable[int]) -> tuple[int, int]:
    """Sizes of the buffers that units of so many travelling bytes arrive in: one is for the largest, the other for the rest of
    them up to `_SECOND`; 0 where there is nothing for it."""
    first, *others = sorted(payloads, reverse=True) or (0,)
    return first, next((nbytes for nbytes in others if nbytes <= _SECOND), 0)
