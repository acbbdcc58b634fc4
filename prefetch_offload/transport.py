"""Carrying out instructions: how a unit's bytes get to the device, and how they leave it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from prefetch_offload_kernels import cast_unit

from .addresses import mapping_of
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
from .staging import Buffer, Staging


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


class Transport:
    """Moves units between the host and one device, ordered by events only ([Note: stream order]).

    Encoded units arrive in a *staging* buffer first, and are cast out of it on a stream of its own.

    Attributes:
        flights: units that have device memory, by key.
        staging: what encoded units arrive in.
    """

    def __init__(self, lanes: Lanes, pins: Pins) -> None:
        self.lanes, self.pins = lanes, pins
        self.flights: dict[str, Flight] = {}
        self._staged: list[torch.Event | None] = [None, None]
        self.staging = Staging(lanes)

    def load(self, unit: Unit, sample: bool = True) -> Flight:
        """Take device memory and enqueue the copy.

        Args:
            sample: remember a fingerprint of the bytes that are copied.

        Raises:
            torch.OutOfMemoryError: nothing has changed.
        """
        lanes = self.lanes
        compute = lanes.compute()
        buffer = self._ready_to_travel(unit, sample) if isinstance(unit, EncodedUnit) else None
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
                self._copy(unit, unit.bytes if buffer is None else buffer.bytes[: unit.payload_nbytes])
            writer = lanes.copy
            if buffer is not None:
                assert isinstance(unit, EncodedUnit)
                writer, flight.arrived = lanes.cast, self._cast(unit, buffer)
            lanes.note("write", writer, unit.key)
            if unit.addresses is not None:
                lanes.note("write", writer, mapping_of(unit.key))
            unit.copied = flight.ready = lanes.record(writer)
            if buffer is not None:
                buffer.left = flight.ready
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
            self.staging.admit(unit)

    def _ready_to_travel(self, unit: EncodedUnit, look: bool) -> Buffer:
        """It is encoded as its masters are now, and there is a buffer to arrive in: that one, which may be written to."""
        if unit.outdated(look):
            if unit.copied is not None:
                self.lanes.host_wait(unit.copied, RETIRE_AFTER_COPY)
                self.lanes.note_host("free", _on_host(unit))
                self.lanes.note_host("alloc", _on_host(unit))  # pinned or not: that may change with what it becomes
                unit.copied = None
            unit.encode()
            unit.sample()
            self.staging.fit()
        if unit.table is None:
            self.staging.lay_table(unit)
        buffer = self.staging.take(unit.payload_nbytes)
        self.lanes.wait(self.lanes.copy, buffer.left, STAGE_AFTER_CAST)
        return buffer

    def _cast(self, unit: EncodedUnit, buffer: Buffer) -> torch.Event:
        """Turn what is on its way into `buffer` into the unit. Returns an event behind the copy."""
        assert unit.table is not None and unit.bytes is not None
        lanes = self.lanes
        lanes.note("write", lanes.copy, buffer.name)
        arrived = lanes.record(lanes.copy)
        lanes.wait(lanes.cast, arrived, CAST_AFTER_COPY)
        with torch.inference_mode(False), torch.no_grad(), lanes.cast:
            cast_unit(unit.table, buffer.bytes[: unit.payload_nbytes], unit.bytes)
            lanes.note("read", lanes.cast, buffer.name)
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
            self.staging.forget(unit)
        unit.retire()


def _on_host(unit: Unit) -> str:
    return f"{unit.key} (host)"
