"""Device addresses for life, with memory behind them only while it is wanted: the CUDA driver's virtual memory management.

# [Note: unmapping]
Mapping and unmapping happen at once, whatever streams are still doing. So memory behind a unit that leaves is kept until an
event behind its last reader has happened. Meanwhile it can be put behind another unit's address as well, whose copy waits
for that event on the device: a streamed component passes its units through the same memory, and the host waits for nothing.
Only where the memory is wanted for something else does the host wait, for the unit that left first.

# [Note: interrupts here]
What the driver has made is known from its answers ([Note: interrupts at the driver]); a unit's range is known before anything
is made for it, and until nothing is left of it. After an interrupt the engine waits for the device and unmaps every unit that
is not in use: `unmap` with no event takes a range in whatever state it was left, and the sums are made anew.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from .addresses import Addresses, mapping_of
from .device import COPY_AFTER_REUSE, UNMAP_AFTER_USE, Lanes
from .driver import Driver, Memory, Range, driver_for, show

if TYPE_CHECKING:
    from .loading import SlabUnit

__all__ = ["Driver", "VirtualAddresses", "driver_for"]


class VirtualAddresses(Addresses):
    """See the module."""

    def __init__(self, lanes: Lanes, driver: Driver) -> None:
        super().__init__(lanes)
        self.driver = driver
        self._ranges: dict[str, Range] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._pending: dict[str, Range] = {}  # left, and mapped still; in the order in which they did
        self._leaving: set[str] = set()  # to be forgotten

    def rounded(self, nbytes: int) -> int:
        grain = self.driver.granularity
        return -(-nbytes // grain) * grain

    def _grew(self, nbytes: int, idle_nbytes: int = 0) -> None:
        self.pool_nbytes += nbytes
        self.idle_nbytes += idle_nbytes
        self.lanes.counts_besides(self.pool_nbytes, self.idle_nbytes)

    def _recount(self) -> None:
        """The sums, whatever was left out of them by an interrupt."""
        held = {id(r.memory): r for r in self._ranges.values() if r.memory is not None and r.memory.there}
        self.pool_nbytes = sum(r.nbytes for r in held.values())
        self.idle_nbytes = sum(r.nbytes for r in held.values() if r.left is not None)
        self._grew(0)

    # ----------------------------------------------------------------- addresses
    def place(self, unit: SlabUnit) -> None:
        self._tidy()
        if unit.key in self._tensors:
            return
        found = self._ranges.get(unit.key)
        if found is None:
            found = self._ranges[unit.key] = Range(self.rounded(unit.slab.nbytes))
        self.driver.reserve(found)
        where, ended = int(found.space.value()), functools.partial(self._freed, found)
        self._tensors[unit.key] = show(where, unit.slab.nbytes, self.lanes.device, ended)

    def placed(self, unit: SlabUnit) -> bool:
        return unit.key in self._tensors

    def holds(self, unit: SlabUnit) -> bool:
        found = self._ranges.get(unit.key)
        return found is not None and found.backed and found.left is None

    def hand_over(self, unit: SlabUnit) -> None:
        self.lanes.forget(mapping_of(unit.key))
        found = self._ranges.pop(unit.key, None)
        if found is not None and found.memory is not None:
            self._grew(-found.nbytes)  # no longer ours to count
        self._tensors.pop(unit.key, None)

    def forget(self, unit: SlabUnit) -> None:
        self._leaving.add(unit.key)
        self._tidy()

    def _tidy(self) -> None:
        """Forget what is to be forgotten. Usually nothing is left to do."""
        for key in list(self._leaving):
            found = self._ranges.get(key)
            if found is not None:
                if found.left is not None:
                    self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
                elif found.mapping.there:  # interrupted
                    self.lanes.synchronize()
                self._unmap(key, found)
                if key not in self._tensors:
                    self.driver.free(found)  # else the last tensor's end does
            self._ranges.pop(key, None)
            self._tensors.pop(key, None)
            self._leaving.discard(key)

    def _freed(self, found: Range) -> None:
        """The last tensor that showed it is gone."""
        if found.mapping.there:  # handed over: whatever used it may be running
            torch.accelerator.synchronize(self.lanes.device)
            self.driver.unmap(found)
        if found.memory is not None:
            self.driver.release(found.memory)
        self.driver.free(found)

    # -------------------------------------------------------------------- memory
    def map(self, unit: SlabUnit) -> torch.Tensor:
        self.place(unit)
        found = self._ranges[unit.key]
        self._poll()
        if found.mapping.there:  # it has left, and has not been unmapped
            assert found.left is not None
            if found.memory is not None:
                self.lanes.wait(self.lanes.copy, found.left, COPY_AFTER_REUSE)
                self._pending.pop(unit.key, None)
                found.left = None
                self._grew(0, -found.nbytes)
                return self._tensors[unit.key]
            self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
            self._unmap(unit.key, found)
        free = self._take(found)
        try:
            self.driver.map(found)
        except Exception:
            if free is not None:
                self.lanes.host_wait(free, UNMAP_AFTER_USE)
            self._unmap(unit.key, found)
            raise
        found.backed = self.lanes.note_host("alloc", mapping_of(unit.key))
        return self._tensors[unit.key]

    def _take(self, found: Range) -> torch.Event | None:
        """Memory for a range, counted: what another leaves once the event has happened, or new."""
        for other in self._pending.values():
            if other.memory is not None and other.nbytes == found.nbytes:
                assert other.left is not None
                self.lanes.wait(self.lanes.copy, other.left, COPY_AFTER_REUSE)
                found.memory = other.memory  # before the other lets go of it
                other.memory = None
                self._grew(0, -found.nbytes)
                return other.left
        limit, nbytes = self.limit_nbytes, found.nbytes
        while limit is not None and self.pool_nbytes + nbytes > limit and self._reclaim():
            pass
        found.memory = Memory(nbytes)
        while True:
            try:
                self.driver.create(found.memory)
                break
            except torch.OutOfMemoryError:
                # PyTorch's allocator keeps what it has cached from the driver.
                if not self._reclaim() and not self._uncache():
                    raise
        self._grew(nbytes)
        return None

    def _uncache(self) -> bool:
        """Let PyTorch's allocator give back what it has cached. False: nothing."""
        before = self.lanes.reserved_nbytes()
        self.lanes.empty_cache()
        return self.lanes.reserved_nbytes() < before

    def unmap(self, unit: SlabUnit, after: torch.Event | None) -> None:
        found = self._ranges.get(unit.key)
        if after is None:  # also after an interrupt
            if found is not None:
                self._unmap(unit.key, found)
            else:
                self._tensors.pop(unit.key, None)  # it was being handed over
            self._recount()
        elif found is None:
            return
        elif found.backed and found.left is None:
            found.left = after
            self._pending[unit.key] = found
            self._grew(0, found.nbytes)

    def _unmap(self, key: str, found: Range) -> None:
        """Nothing reads it any more."""
        if found.backed:
            found.backed = self.lanes.note_host("free", mapping_of(key))
        self.driver.unmap(found)
        memory = found.memory
        if memory is not None and memory.there:
            self.driver.release(memory)
            self._grew(-found.nbytes, -found.nbytes if found.left is not None else 0)
        found.memory = found.left = None
        self._pending.pop(key, None)

    def _poll(self) -> None:
        """Unmap what is no longer read."""
        for key, found in list(self._pending.items()):
            assert found.left is not None
            if self.lanes.happened(found.left, UNMAP_AFTER_USE):
                self._unmap(key, found)

    def _reclaim(self) -> bool:
        """Wait for the first that left to be read no more, and give its memory back. False: there is none."""
        for key, found in self._pending.items():
            if found.memory is not None:
                assert found.left is not None
                self.lanes.host_wait(found.left, UNMAP_AFTER_USE)
                self._unmap(key, found)
                self._poll()  # one that had the memory before may still be mapped to it, and so keep it
                return True
        return False

    def give_back(self) -> None:
        self._tidy()
        while self._reclaim():
            pass
        self._poll()

    def trim(self) -> None:
        self._tidy()
        self._poll()
        while self.limit_nbytes is not None and self.pool_nbytes > self.limit_nbytes and self._reclaim():
            pass
