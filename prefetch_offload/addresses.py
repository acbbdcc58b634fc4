"""Units that keep their device address for life, as CUDA graphs need: a graph replays the addresses it was recorded with.

# [Note: stable addresses]
`VirtualAddresses` (in `virtual.py`) reserves a range of addresses per unit and puts memory behind it while the unit is on
the device, so that what a dropped unit gives back is free for anyone. `Arena` does without the driver: it gives every unit
of a component memory for good, and all of that counts in the budget, whether the unit is there or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .device import COPY_AFTER_REUSE, FREE_AFTER_LAST_USE, Lanes
from .units import device_nbytes

if TYPE_CHECKING:
    from .loading import SlabUnit


NO_ARENA = (
    "On CUDA with cuda-bindings installed (the extra `cuda-graphs`: pip install '.[cuda-graphs]' in the checkout) units keep "
    "their addresses without keeping memory. Or give more memory, or do without: stable_addresses=False."
)


class Addresses:
    """Where units lie on the device.

    Attributes:
        pool_nbytes: device bytes that it holds, for units that are on the device and for others.
        idle_nbytes: those of units that are not.
        permanent: a unit that leaves gives no memory back.
        limit_nbytes: `pool_nbytes` is not to be above this when there is something to give back; None: no limit.
    """

    permanent = False
    pool_nbytes = 0
    idle_nbytes = 0

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.limit_nbytes: int | None = None

    def rounded(self, nbytes: int) -> int:
        """Device bytes that a unit of `nbytes` takes."""
        raise NotImplementedError

    def place(self, unit: SlabUnit) -> None:
        """Give the unit an address, its until `forget` or `hand_over`. Again is a no-op.

        Raises:
            torch.OutOfMemoryError: nothing has changed.
        """
        raise NotImplementedError

    def placed(self, unit: SlabUnit) -> bool:
        """The unit has an address."""
        raise NotImplementedError

    def map(self, unit: SlabUnit) -> torch.Tensor:
        """The unit's bytes, [nbytes] uint8, at its address, with memory behind them. The copy stream may write to them.

        Raises:
            torch.OutOfMemoryError: nothing has changed.
        """
        raise NotImplementedError

    def unmap(self, unit: SlabUnit, after: torch.Event | None) -> None:
        """The unit's memory is free once `after` has happened; None: the device is idle."""
        raise NotImplementedError

    def holds(self, unit: SlabUnit) -> bool:
        """There is memory behind the unit's address, and it is the unit's."""
        raise NotImplementedError

    def hand_over(self, unit: SlabUnit) -> None:
        """Leave the unit's memory and address to the tensors that show it. The unit gets another when next placed."""
        raise NotImplementedError

    def forget(self, unit: SlabUnit) -> None:
        """Give up the unit's address, and its memory as `unmap` would."""
        raise NotImplementedError

    def trim(self) -> None:
        """Give back what is no longer read; where `limit_nbytes` demands it, the host waits for that."""

    def give_back(self) -> None:
        """Give back all that units have left. The host waits until it is no longer read."""

    def idle_of_others(self, units: Iterable[str]) -> int:
        """Device bytes that units besides these take for good without being on the device."""
        return 0

    def kept(self) -> frozenset[str]:
        """Units on the device that would free nothing by leaving it."""
        return frozenset()


class Arena(Addresses):
    """Memory for every unit, from PyTorch's allocator, for good."""

    permanent = True

    def __init__(self, lanes: Lanes) -> None:
        super().__init__(lanes)
        self._homes: dict[str, tuple[torch.Tensor, torch.Stream]] = {}  # by unit: its bytes, the stream they are ordered by
        self._there: set[str] = set()
        self._left: dict[str, torch.Event] = {}  # by unit: after the last reader of its memory

    def rounded(self, nbytes: int) -> int:
        return device_nbytes(nbytes)

    def _count(self) -> None:
        sizes = {key: self.rounded(home.numel()) for key, (home, _) in self._homes.items()}
        self.pool_nbytes = sum(sizes.values())
        self.idle_nbytes = sum(n for key, n in sizes.items() if key not in self._there)
        self.lanes.counts_besides(0, self.idle_nbytes)

    def place(self, unit: SlabUnit) -> None:
        if unit.key in self._homes:
            return
        with torch.inference_mode(False):
            made = torch.empty(self.rounded(unit.slab.nbytes), dtype=torch.uint8, device=self.lanes.device)[: unit.slab.nbytes]
        compute = self.lanes.compute()
        self._homes[unit.key] = made, compute
        # The stream may still read what lay there; and the unit may be loaded from another one, which knows nothing of it.
        self._left[unit.key] = self.lanes.record(compute)
        self._count()

    def placed(self, unit: SlabUnit) -> bool:
        return unit.key in self._homes

    def map(self, unit: SlabUnit) -> torch.Tensor:
        self.place(unit)
        left = self._left.pop(unit.key, None)
        if left is not None:
            self.lanes.wait(self.lanes.copy, left, COPY_AFTER_REUSE)
        self._there.add(unit.key)
        self._count()
        return self._homes[unit.key][0]

    def unmap(self, unit: SlabUnit, after: torch.Event | None) -> None:
        self._there.discard(unit.key)
        self._left.pop(unit.key, None)
        if after is not None:
            self._left[unit.key] = after
        self._count()

    def holds(self, unit: SlabUnit) -> bool:
        return unit.key in self._there

    def hand_over(self, unit: SlabUnit) -> None:
        self._homes.pop(unit.key, None)
        self._there.discard(unit.key)
        self._left.pop(unit.key, None)
        self._count()

    def forget(self, unit: SlabUnit) -> None:
        home, left = self._homes.get(unit.key), self._left.get(unit.key)
        self.hand_over(unit)
        if home is not None:
            tensor, stream = home
            if left is not None:
                self.lanes.wait(stream, left, FREE_AFTER_LAST_USE)
            tensor.untyped_storage().resize_(0)  # whoever holds on to a twin keeps no memory with it

    def idle_of_others(self, units: Iterable[str]) -> int:
        others = self._homes.keys() - self._there - set(units)
        return sum(self.rounded(self._homes[key][0].numel()) for key in others)

    def kept(self) -> frozenset[str]:
        return frozenset(self._there)


def mapping_of(unit: str) -> str:
    """What stands behind a unit's address, as a buffer of the checker's: the host changes it at once."""
    return f"{unit} (mapping)"


def addresses_for(lanes: Lanes) -> Addresses:
    """Ranges of addresses where the driver gives them, else an arena."""
    from .virtual import VirtualAddresses, driver_for

    driver = driver_for(lanes.device)
    return VirtualAddresses(lanes, driver) if driver is not None else Arena(lanes)


