"""Units that travel encoded: what lies in pinned memory and crosses the link is not what the device works with.

# [Note: encoded units]
The masters stay what they are ([Note: host masters]), in a slab that is not pinned; a second, pinned slab holds the unit as
a codec encoded it. On the device the unit's bytes and twins are those of any other unit: the copy stream copies encoded bytes
into the staging buffer, casts or unpacks them from there, and records the ready event behind that. A unit is encoded anew
before it travels when its masters were written since: their versions, a fingerprint, or what was written back say so.
"""

from __future__ import annotations

import torch
from prefetch_offload_kernels import Descriptor, Table, build_table

from .codecs import SLAB_ALIGNMENT, Codec, Piece, Raw, Recipe
from .host import Pins, Slab
from .masters import DEVICE_GRAIN, Master, SlabUnit, version_of
from .units import align


class EncodedUnit(SlabUnit):
    """Masters in a slab, and in a pinned one what travels in their place.

    Attributes:
        encoded: that one.
        descriptors: how the device turns it into the unit.
        table: the same on the device, in memory of the copy stream; None: not there.
        dirty: masters differ from what was encoded.
        encodings: how often it was encoded.
    """

    travels_encoded = True

    def __init__(self, key: str, slab: Slab, masters: list[Master], pieces: list[Piece], codec: Codec, pins: Pins) -> None:
        super().__init__(key, slab, masters)
        self._pieces, self._codec, self._pins = pieces, codec, pins
        self.encoded = slab  # until it has been encoded
        self.descriptors: tuple[Descriptor, ...] = ()
        self.table: Table | None = None
        self.dirty = True
        self.encodings = 0
        self._versions: list[int] = []
        self._index: torch.Tensor | None = None  # of the fingerprint's words, on the device
        self._arrived: torch.Tensor | None = None  # those words as the device has them, unwritten

    @property
    def source(self) -> Slab:
        return self.encoded

    @property
    def overhead_nbytes(self) -> int:
        """Device bytes that it takes whether it is resident or not."""
        table = self.table
        if table is None or self._sample_index is None:
            return 0
        sizes = (table.rows.nbytes, table.blocks.nbytes, self._sample_index.nbytes, self._sample_index.nbytes)
        return sum(align(n, DEVICE_GRAIN) for n in sizes)

    # ---------------------------------------------------------------- encoding
    def encode(self, recipes: list[Recipe | None] | None = None) -> None:
        """Encode the masters, and pin what comes of it. Nothing is being copied out of what was encoded before.

        Args:
            recipes: of the pieces, as the codec has just offered them.
        """
        if recipes is None:
            recipes = [self._codec.recipe(piece) for piece in self._pieces]
        placed: list[tuple[int, Piece, Recipe]] = []
        end = 0
        for piece, offered in zip(self._pieces, recipes, strict=True):
            recipe = offered or Raw(self.slab.bytes[piece.offset : piece.offset + piece.nbytes], piece.name)
            placed.append((end, piece, recipe))
            end += align(recipe.nbytes, SLAB_ALIGNMENT)
        slab = Slab(end)
        for begin, _, recipe in placed:
            recipe.write(slab.bytes[begin : begin + recipe.nbytes])
        before, self.encoded = self.encoded, slab
        if before is not self.slab:
            before.unpin()
        self.descriptors = tuple(recipe.descriptor(begin, piece.offset) for begin, piece, recipe in placed)
        self.table = self._arrived = None
        self.payload_nbytes = slab.nbytes
        self._versions = [version_of(m.tensor) for m in self.masters]
        self.dirty = False
        self.encodings += 1
        self._pins.pin(slab)

    def outdated(self, look: bool) -> bool:
        """The masters were written since they were encoded.

        Args:
            look: compare fingerprints, too.
        """
        return (
            self.dirty
            or any(version_of(m.tensor) != v for m, v in zip(self.masters, self._versions, strict=True))
            or (look and self.stale())
        )

    def changed(self) -> None:
        self.dirty = True
        if self.bytes is not None and self.present and self._sample_index is not None:
            # The device has what was written back. On the caller's stream, so with memory of that stream only.
            self._remember(self._sample_index.to(self.bytes.device))

    # -------------------------------------------------------- on the device
    def lay_table(self, device: torch.device) -> Table:
        """Put what the device needs to know there, in memory of the current stream."""
        assert self._sample_index is not None
        self._index = self._sample_index.to(device)
        self.table = build_table(self.descriptors, device)  # last: no memory for either of them, and there is no table
        return self.table

    def remember(self) -> None:
        """Fingerprint the device bytes, on the stream of the table. What a lossy codec leaves is not what the masters have."""
        assert self._index is not None
        self._remember(self._index)

    def _remember(self, index: torch.Tensor) -> None:
        assert self.bytes is not None
        self._arrived = self.bytes.view(torch.int64)[index]

    @property
    def remembered(self) -> bool:
        return self._arrived is not None

    def rewritten(self) -> list[Master]:
        return self._differing(self._arrived.cpu()) if self._arrived is not None else []

    def abandon(self) -> None:
        super().abandon()
        self._arrived = None

    def retire(self) -> None:
        super().retire()
        self.encoded.unpin()
        self.table = self._index = self._arrived = None
