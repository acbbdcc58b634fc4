"""Components that are cast up within a call, as pipelines do with a VAE that overflows in float16.

The values are those that lie in pinned memory already, in half of the bytes or, encoded, in fewer: these travel, and are cast
on arrival. Casting back later gives what was there, so that nothing has to come back from the device either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from prefetch_offload_kernels import PACKED_BF16, Descriptor

from .config import MIB
from .encoded import EncodedUnit
from .encoding import SLAB_ALIGNMENT, dense, holds
from .host import Pins, Slab
from .loading import SlabUnit
from .masters import Master, span_nbytes, version_of
from .units import align

# What one of them brings over the link. They share staging buffers, which stay allocated while the component runs.
_PAYLOAD = 32 * MIB
# Where what travels of a tensor begins and ends in what its donor has on the host, and how it was encoded, if it was.
_Travelling = tuple[int, int, Descriptor | None]


class _Stretch:
    """Part of a slab, or one of no memory at all: as much of a `Slab` as a unit looks at."""

    def __init__(self, nbytes: int, of: Slab | None = None, begin: int = 0) -> None:
        self.nbytes, self._of = nbytes, of
        self.bytes = of.bytes[begin : begin + nbytes] if of is not None else torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def pinned(self) -> bool:
        return self._of is not None and self._of.pinned


class UpcastUnit(EncodedUnit):
    """Masters that were cast up. What travels is what another unit has of them in its slab, or what it had encoded.

    Attributes:
        donor: that unit, which is suspended meanwhile.
    """

    transient = True

    def __init__(
        self, key: str, donor: SlabUnit, masters: list[Master], travelling: Mapping[int, _Travelling], pins: Pins
    ) -> None:
        self.donor = donor
        offsets, end = [], 0
        for master in masters:
            offsets.append(end)
            end += align(span_nbytes(master.tensor))
        parts = [(o, span_nbytes(m.tensor), [m]) for o, m in zip(offsets, masters, strict=True)]
        slab: Any = _Stretch(align(end, 8))
        super().__init__(key, slab, masters, parts, None, pins)  # type: ignore[arg-type]
        self.place(offsets)
        homes = [travelling[id(m)] for m in masters]
        begin = min(first for first, _, _ in homes) // SLAB_ALIGNMENT * SLAB_ALIGNMENT
        source: Any = _Stretch(max(end for _, end, _ in homes) - begin, donor.source, begin)
        self.descriptors = tuple(
            _descriptor(m, first - begin, offset, encoded)
            for m, (first, _, encoded), offset in zip(masters, homes, offsets, strict=True)
        )
        self.encoded, self.payload_nbytes = source, source.nbytes
        self._versions = [version_of(m.tensor) for m in masters]
        self.dirty, self.encodings = False, 1

    @property
    def copied(self) -> torch.Event | None:  # type: ignore[override]
        """Of the donor: it is its memory that is copied from."""
        return self.donor.copied

    @copied.setter
    def copied(self, event: torch.Event | None) -> None:
        if event is not None:
            self.donor.copied = event

    @property
    def host_nbytes(self) -> int:
        return sum(m.tensor.nbytes for m in self.masters if not m.in_place)

    def encode(self, recipes: Any = None) -> None:
        """They were written since they were cast up: from now on they travel as they are."""
        self.dirty = True
        versions = [version_of(m.tensor) for m in self.masters]
        slab = Slab(self.slab.nbytes)
        for master, (offset, nbytes, _) in zip(self.masters, self._parts, strict=True):
            source = master.tensor.detach()
            slab.view(offset, nbytes).view(source.dtype).as_strided(source.shape, source.stride()).copy_(source)
        self.descriptors = (Descriptor(0, 0, slab.nbytes, torch.uint8, torch.uint8, name=self.key),)
        self.table = self._arrived = None
        self.encoded, self.payload_nbytes, self._versions = slab, slab.nbytes, versions
        self.encodings += 1
        self.dirty = False

    def pin(self, pins: Pins) -> None:
        """The memory is that of the donor."""

    def sample(self) -> None:
        """It lasts for one call, in which masters are written with a mark."""

    def stale(self) -> bool:
        return False

    def changed(self) -> None:
        super().changed()
        if isinstance(self.donor, EncodedUnit):
            self.donor.dirty = True  # what is written back lies in its slab

    def unwritten(self) -> list[Master]:
        """Those that are on the device as they arrived there. The host waits."""
        arrived = self.shown and self.present and self.remembered  # one that is not shown may be on its way
        if not arrived or self.dirty or self.encodings > 1:
            return []
        rewritten = set(map(id, self.rewritten()))
        return [
            m
            for m in self.masters
            if m.twin is not None and m.twin._version == m.twin_version and id(m) not in rewritten
        ]

    def _make_twin(self, master: Master, offset: int) -> None:
        home, master.home = master.home, None  # that of the donor, in another type
        try:
            super()._make_twin(master, offset)
        finally:
            master.home = home

    def retire(self) -> None:
        self.settle_at(None)
        self.table = self._index = self._device_mask = self._arrived = None


def _travelling(donor: SlabUnit) -> dict[int, _Travelling]:
    """By identities of masters. Those that cannot become another type than the one they were encoded from are left out."""
    base = donor.slab.bytes.data_ptr()
    homes = [(m, m.home.data_ptr() - base, span_nbytes(m.home)) for m in donor.masters if m.home is not None]
    if not isinstance(donor, EncodedUnit):
        return {id(m): (at, at + nbytes, None) for m, at, nbytes in homes}
    found: dict[int, _Travelling] = {}
    pieces = donor.encoded_pieces()
    for master, at, nbytes in homes:
        piece, end, descriptor = next(p for p in pieces if p[0] <= at < p[0] + p[2].target_nbytes)
        if descriptor.source == descriptor.target:
            first = descriptor.source_offset + at - piece
            found[id(master)] = (first, first + nbytes, None)
        elif descriptor.source != PACKED_BF16 or master.in_place:
            found[id(master)] = (descriptor.source_offset, end, descriptor)
    return found


def _descriptor(master: Master, source: int, target: int, encoded: Descriptor | None) -> Descriptor:
    home, tensor = master.home, master.tensor
    assert home is not None
    if encoded is not None:
        scale = encoded.scale_offset
        return dataclasses.replace(
            encoded,
            source_offset=source,
            target_offset=target,
            target=tensor.dtype,
            scale_offset=None if scale is None else source + scale - encoded.source_offset,
        )
    if master.in_place:
        return Descriptor(source, target, span_nbytes(tensor), torch.uint8, torch.uint8, name=master.name)
    return Descriptor(source, target, tensor.numel(), home.dtype, tensor.dtype, name=master.name)


def upcast_units(prefix: str, suspended: list[SlabUnit], fresh: list[Master], pins: Pins) -> list[UpcastUnit]:
    """Units for those masters that are an exact upcast of what a suspended unit has; keys are ``{prefix}/{n}/transient``."""
    present = set(map(id, fresh))
    made: list[UpcastUnit] = []
    for donor in suspended:
        masters = [m for m in donor.masters if m.tensor.numel()]
        if type(donor) not in (SlabUnit, EncodedUnit) or any(id(m) not in present for m in donor.masters):
            continue
        if not any(_wider(m) for m in masters) or not all(_lies_in(m, donor) for m in masters):
            continue
        if _overlap(masters) or not all(m.in_place or _is_upcast(m) for m in masters):
            continue
        if isinstance(donor, EncodedUnit) and donor.outdated(look=True):
            if donor.copied is not None:
                donor.copied.synchronize()
                donor.copied = None
            donor.encode()
        travelling = _travelling(donor)
        if not all(id(m) in travelling for m in masters):
            continue
        run: list[Master] = []
        nbytes = 0
        for master in [*sorted(masters, key=_address), None]:
            grown = nbytes + (span_nbytes(master.home) if master is not None and master.home is not None else 0)
            if run and (master is None or grown > _PAYLOAD):
                made.append(UpcastUnit(f"{prefix}/{len(made)}/transient", donor, run, travelling, pins))
                run, grown = [], grown - nbytes
            if master is not None:
                run.append(master)
                nbytes = grown
    return made


def _address(master: Master) -> int:
    assert master.home is not None
    return master.home.data_ptr()


def _lies_in(master: Master, donor: SlabUnit) -> bool:
    base = donor.slab.bytes.data_ptr()
    return master.home is not None and base <= master.home.data_ptr() < base + donor.slab.nbytes


def _overlap(masters: list[Master]) -> bool:
    ordered = sorted(masters, key=_address)
    ends = [_address(m) + span_nbytes(m.home) for m in ordered if m.home is not None]
    return any(end > _address(m) for end, m in zip(ends, ordered[1:], strict=False))


def _wider(master: Master) -> bool:
    home, tensor = master.home, master.tensor
    return home is not None and home.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == torch.float32


def _is_upcast(master: Master) -> bool:
    """Every element is what its home has, in more bits."""
    home, tensor = master.home, master.tensor
    if home is None or not _wider(master) or home.shape != tensor.shape or home.stride() != tensor.stride() or not dense(home):
        return False
    narrow, wide = (t.detach().as_strided((home.numel(),), (1,)) for t in (home, tensor))
    return holds(narrow, wide)
