"""Carrying out instructions: how a unit's bytes get to the device, and how they leave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from prefetch_offload_kernels import cast_unit, prepare, workspace_nbytes

from .addresses import mapping_of
from .config import MIB
from .device import (
    CAST_AFTER_COPY,
    COPY_AFTER_ALLOCATION,
    FREE_AFTER_LAST_USE,
    FREE_AFTER_UNUSED_COPY,
    OUT_OF_MEMORY,
    RETIRE_AFTER_COPY,
    STAGE_AFTER_CAST,
    STAGE_AFTER_COPY,
    USE_AFTER_COPY,
    WRITE_BACK_AFTER_USE,
    Lanes,
    is_out_of_memory,
)
from .encoded import EncodedUnit
from .host import Pins
from .loading import SlabUnit, Unit
from .units import device_nbytes

# The second staging buffer has no more: a unit beyond the default `unit_max` is one large tensor, of which there are few.
_SECOND = 256 * MIB


@dataclass(slots=True)
class Flight:
    """A unit's device bytes together with the events that order them.

    Attributes:
        home: the stream whose order the memory belongs to.
        start, ready: before the copy, on the copy stream, and when the unit can be read (for carried units: on the compute
            stream).
        arrived: for encoded units, behind the copy, before what turns it into the unit on the cast stream.
        kept: others hold on to the memory; dropping the unit leaves it to them.
        readers: streams that waited for `ready`, by id; each may read until the unit is dropped.
    """

    unit: Unit
    home: torch.Stream
    start: torch.Event
    ready: torch.Event
    readers: dict[int, torch.Stream] = field(default_factory=dict)
    kept: bool = False
    arrived: torch.Event | None = None


@dataclass(slots=True)
class _Staging:
    """What encoded units arrive in: memory of the cast stream.

    Attributes:
        name: for the checker.
        bytes: uint8 on the device.
        left: on the cast stream, behind the last cast out of it.
    """

    name: str
    bytes: torch.Tensor
    left: torch.Event


class Transport:
    """Moves units between the host and one device, ordered by events only ([Note: stream order]).

    Encoded units arrive in a *staging* buffer first, and are cast out of it on a stream of its own. There are two that take
    turns, so that the link goes on while a unit is cast: one for the largest unit there is, and one for most of the others
    (`staging_nbytes`). They are allocated on the cast stream, and so are the tables: nothing else ever orders them.
    """

    def __init__(self, lanes: Lanes, pins: Pins) -> None:
        self.lanes, self.pins = lanes, pins
        self.flights: dict[str, Flight] = {}
        self._staged: list[torch.Event | None] = [None, None]
        self._encoded: dict[str, EncodedUnit] = {}
        self._staging: list[_Staging | None] = [None, None]
        self._last = 1  # which of them was used last

    def load(self, unit: Unit, sample: bool = True) -> Flight:
        """Take device memory and enqueue the copy.

        Args:
            sample: remember a fingerprint of the bytes that are copied.

        Raises:
            torch.OutOfMemoryError: nothing has changed.
        """
        lanes = self.lanes
        compute = lanes.compute()
        staging = self._ready_to_travel(unit, sample) if isinstance(unit, EncodedUnit) else None
        if sample:
            unit.sample()  # before the copy: a write during it is then seen as a change
        if not isinstance(unit, SlabUnit):
            start = lanes.record(compute)
            unit.allocate(lanes.device)  # the copies are part of it, on the compute stream
            flight = Flight(unit, compute, start, lanes.record(compute))
            self.flights[unit.key] = flight
            return flight
        unit.allocate(lanes.device)
        assert unit.bytes is not None
        lanes.note("alloc", compute, unit.key)
        lanes.wait(lanes.copy, lanes.record(compute), COPY_AFTER_ALLOCATION)
        start = lanes.record(lanes.copy)
        # Known before the copy is enqueued, so that an interrupt in between cannot lose it.
        flight = self.flights[unit.key] = Flight(unit, compute, start, start)
        try:
            # No graph comes of it: neither side requires gradients, and twins have version counters of their own.
            with lanes.copy:
                self._copy(unit, unit.bytes if staging is None else staging.bytes[: unit.payload_nbytes])
            writer = lanes.copy
            if staging is not None:
                assert isinstance(unit, EncodedUnit)
                writer, flight.arrived = lanes.cast, self._cast(unit, staging)
            lanes.note("write", writer, unit.key)
            if unit.addresses is not None:
                lanes.note("write", writer, mapping_of(unit.key))
            unit.copied = flight.ready = lanes.record(writer)
            if staging is not None:
                staging.left = flight.ready
        except BaseException as error:
            lanes.synchronize()  # the copy may be under way
            del self.flights[unit.key]
            lanes.note("free", compute, unit.key)
            unit.free()
            if is_out_of_memory(error) and not isinstance(error, OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(str(error)) from error  # Triton's, when it loads a kernel
            raise
        return flight

    def _copy(self, unit: SlabUnit, target: torch.Tensor) -> None:
        """What travels of `unit`, on the current stream, which is the copy stream."""
        if unit.source.pinned:
            target.copy_(unit.source.bytes, non_blocking=True)
            self.lanes.note("read", self.lanes.copy, _on_host(unit))
        else:
            self._copy_pageable(unit.source.bytes, target)

    # ----------------------------------------------------------- encoded units
    def admit(self, unit: Unit) -> None:
        """A unit that will travel. For encoded ones, the kernel that they need is compiled now. Nothing is moved."""
        if isinstance(unit, EncodedUnit):
            self._encoded[unit.key] = unit
            try:
                self._lay_table(unit)
            except OUT_OF_MEMORY:
                pass  # its load tries again, where others make room

    @property
    def overhead_nbytes(self) -> int:
        """Device bytes that encoded units need besides their own."""
        units = self._encoded.values()
        workspace = max((workspace_nbytes(u.table) for u in units if u.table is not None), default=0)
        workspace += max((u.workspace_nbytes for u in units), default=0)  # the caller's stream packs while the other casts
        return sum(self._staging_nbytes) + workspace + sum(u.overhead_nbytes for u in units)

    @property
    def overhead_held_nbytes(self) -> int:
        """Those that are allocated now."""
        staging = sum(s.bytes.numel() for s in self._staging if s is not None)
        return staging + sum(u.overhead_nbytes for u in self._encoded.values())

    @property
    def _staging_nbytes(self) -> tuple[int, int]:
        units = self._encoded.values()
        first = max((u.payload_nbytes for u in units), default=0)
        # Those of one call are a few that come once, beside a decoder's activations: not worth the memory.
        _, second = staging_nbytes(u.payload_nbytes for u in units if not u.transient)
        return device_nbytes(first), device_nbytes(second)

    def release_staging(self) -> None:
        """Give the staging buffers back; the next encoded units take them again."""
        self._give_back(0)
        self._give_back(1)

    def _give_back(self, number: int) -> None:
        staging = self._staging[number]
        if staging is not None:
            self.lanes.note("free", self.lanes.cast, staging.name)
            self._staging[number] = None

    def _fit_staging(self) -> None:
        """Hold no larger ones than are counted: what their size came from is gone, or has become smaller."""
        for number, nbytes in enumerate(self._staging_nbytes):
            staging = self._staging[number]
            if staging is not None and staging.bytes.numel() > nbytes:
                self._give_back(number)

    def _next_staging(self, payload_nbytes: int) -> _Staging:
        """A buffer for so many bytes: not the one that was used last, where there is room for two.

        Raises:
            torch.OutOfMemoryError: there is none for one.
        """
        sizes = self._staging_nbytes
        number = 1 - self._last if payload_nbytes <= sizes[1 - self._last] else self._last
        try:
            staging = self._staging_of(number, sizes[number], payload_nbytes)
        except OUT_OF_MEMORY:
            number = 1 - number
            if payload_nbytes > sizes[number]:
                raise
            staging = self._staging_of(number, sizes[number], payload_nbytes)
        self._last = number
        return staging

    def _staging_of(self, number: int, nbytes: int, least_nbytes: int) -> _Staging:
        """Buffer `number`, made with `nbytes` where there is none of `least_nbytes`."""
        staging = self._staging[number]
        if staging is None or staging.bytes.numel() < least_nbytes:
            self._give_back(number)
            lanes = self.lanes
            with torch.inference_mode(False), lanes.cast:
                memory = torch.empty(nbytes, dtype=torch.uint8, device=lanes.device)
            staging = self._staging[number] = _Staging(f"staging/{number}", memory, lanes.record(lanes.cast))
            lanes.note("alloc", lanes.cast, staging.name)  # behind: an interrupt in between leaves no name that is taken
            staging.left = lanes.record(lanes.cast)
        return staging

    def _lay_table(self, unit: EncodedUnit) -> None:
        with torch.inference_mode(False), self.lanes.cast:
            prepare(unit.lay_table(self.lanes.device))

    def _ready_to_travel(self, unit: EncodedUnit, look: bool) -> _Staging:
        """It is encoded as its masters are now, and there is a buffer to arrive in: that one, which may be written to."""
        if unit.outdated(look):
            if unit.copied is not None:
                self.lanes.host_wait(unit.copied, RETIRE_AFTER_COPY)
                self.lanes.note_host("free", _on_host(unit))
                self.lanes.note_host("alloc", _on_host(unit))  # pinned or not: that may change with what it becomes
                unit.copied = None
            unit.encode()
            unit.sample()
            self._fit_staging()
        if unit.table is None:
            self._lay_table(unit)
        staging = self._next_staging(unit.payload_nbytes)
        self.lanes.wait(self.lanes.copy, staging.left, STAGE_AFTER_CAST)
        return staging

    def _cast(self, unit: EncodedUnit, staging: _Staging) -> torch.Event:
        """Turn what is on its way into `staging` into the unit. Returns an event behind the copy."""
        assert unit.table is not None and unit.bytes is not None
        lanes = self.lanes
        lanes.note("write", lanes.copy, staging.name)
        arrived = lanes.record(lanes.copy)
        lanes.wait(lanes.cast, arrived, CAST_AFTER_COPY)
        with torch.inference_mode(False), torch.no_grad(), lanes.cast:
            cast_unit(unit.table, staging.bytes[: unit.payload_nbytes], unit.bytes)
            lanes.note("read", lanes.cast, staging.name)
            if not unit.remembered:
                unit.remember()
        return arrived

    def _copy_pageable(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Through the two halves of the pinned ring: one is filled by the host while the other is copied out."""
        ring = self.pins.ring()
        if ring is None:
            target.copy_(source)
            return
        for number, offset in enumerate(range(0, source.numel(), ring.chunk)):
            half = number % 2
            nbytes = min(ring.chunk, source.numel() - offset)
            staged = self._staged[half]
            if staged is not None:
                self.lanes.host_wait(staged, STAGE_AFTER_COPY)
            ring.slots[half][:nbytes].copy_(source[offset : offset + nbytes])
            self.lanes.note_host("write", f"ring/{half}")
            target[offset : offset + nbytes].copy_(ring.slots[half][:nbytes], non_blocking=True)
            self.lanes.note("read", self.lanes.copy, f"ring/{half}")
            self._staged[half] = self.lanes.record(self.lanes.copy)

    def wait(self, unit: Unit) -> None:
        """Let the caller's stream read the unit after its copy. Waiting again is free."""
        flight = self.flights[unit.key]
        compute = self.lanes.compute()
        if compute.stream_id in flight.readers:
            return
        if isinstance(unit, SlabUnit) or compute != flight.home:
            self.lanes.wait(compute, flight.ready, USE_AFTER_COPY)
        flight.readers[compute.stream_id] = compute
        if isinstance(unit, SlabUnit):
            self.lanes.note("read", compute, unit.key)

    def read_back(self, unit: Unit) -> None:
        """The caller's stream may read what any stream did to the unit up to now."""
        compute = self.lanes.compute()
        for stream in self.flights[unit.key].readers.values():
            if isinstance(unit, SlabUnit):
                self.lanes.note("read", stream, unit.key)
            if stream != compute:
                self.lanes.wait(compute, self.lanes.record(stream), WRITE_BACK_AFTER_USE)

    def keep(self, unit: Unit) -> None:
        """Something else may hold on to the unit's device memory (autograd's saved tensors): dropping the unit leaves it to
        them."""
        self.flights[unit.key].kept = True

    def drop(self, unit: Unit) -> None:
        """Free the unit's device memory behind its copy and its last use, without waiting on the host."""
        flight = self.flights.pop(unit.key)
        lanes = self.lanes
        if not flight.readers:
            lanes.wait(flight.home, flight.ready, FREE_AFTER_UNUSED_COPY)
        for stream in flight.readers.values():
            if stream != flight.home:
                lanes.wait(flight.home, lanes.record(stream), FREE_AFTER_LAST_USE)
        if isinstance(unit, SlabUnit):
            lanes.note("free", flight.home, unit.key)
        if flight.kept:
            self._leave(unit, flight)
        elif isinstance(unit, SlabUnit) and unit.addresses is not None:
            lanes.note("read", flight.home, mapping_of(unit.key))  # as every stream that it has just waited for
            unit.free(lanes.record(flight.home))
        else:
            unit.free()

    def reset(self, units: list[Unit]) -> None:
        """Hold nothing, whatever state `units` were left in. The device is idle."""
        for unit in units:
            flight = self.flights.pop(unit.key, None)
            if flight is not None and isinstance(unit, SlabUnit):
                self.lanes.note("free", flight.home, unit.key)
            unit.free()

    def abandon(self, unit: Unit) -> None:
        """Forget the unit and leave its device memory to those who show it. They have waited for its copy."""
        flight = self.flights.pop(unit.key)
        if isinstance(unit, SlabUnit):
            self.lanes.note("free", flight.home, unit.key)  # as far as we are concerned
        self._leave(unit, flight)

    def _leave(self, unit: Unit, flight: Flight) -> None:
        # A backward pass reads on the stream of its forward pass. `home` waits for that one as it is now, and the memory
        # goes back to `home` when the graph does.
        for stream in flight.readers.values():
            if stream != flight.home:
                unit.lend(stream)
        unit.abandon()

    def finish_copies(self, unit: Unit) -> None:
        """The host waits until nothing is being copied from the unit's host memory, which is about to go."""
        copied, unit.copied = unit.copied, None
        if copied is not None:
            self.lanes.host_wait(copied, RETIRE_AFTER_COPY)
            if isinstance(unit, SlabUnit) and unit.source.pinned:
                self.lanes.note_host("free", _on_host(unit))

    def retire(self, unit: Unit) -> None:
        """Give up the unit's host memory, once nothing is being copied from it. The unit is not on the device."""
        self.finish_copies(unit)
        if isinstance(unit, EncodedUnit):
            self._encoded.pop(unit.key, None)
            self._fit_staging()
        unit.retire()


def staging_nbytes(payloads: Iterable[int]) -> tuple[int, int]:
    """Sizes of the buffers that units of so many travelling bytes arrive in: one is for the largest, the other for the rest of
    them up to `_SECOND`; 0 where there is nothing for it."""
    first, *others = sorted(payloads, reverse=True) or (0,)
    return first, next((nbytes for nbytes in others if nbytes <= _SECOND), 0)


def _on_host(unit: Unit) -> str:
    return f"{unit.key} (host)"
