"""Units that travel encoded: what lies in pinned memory and crosses the link is not what the device works with.

# [Note: encoded units]
The masters stay what they are ([Note: host masters]), in a slab that is not pinned, and in a file where there can be one
([Note: originals]); a second, pinned slab holds the unit as a codec encoded it. On the device the unit's bytes and twins are
those of any other unit: the copy stream copies encoded bytes into a staging buffer, and the cast stream casts or unpacks them
from there, with the ready event behind that. A unit is encoded anew before it travels when its masters were written since:
their versions, their file or a fingerprint, or what was written back say so.
"""

from __future__ import annotations

import torch
from prefetch_offload_kernels import Descriptor, Table, build_table

from .encoding import SLAB_ALIGNMENT, Codec, Piece, Raw, Recipe
from .host import Pins, Slab
from .loading import SlabUnit
from .masters import Master, version_of
from .originals import FileSlab, file_slab
from .units import align, device_nbytes

# How many small tensors an encoded unit has on the device besides its own: see `overhead_nbytes`.
TENSORS_BESIDE = 5


class EncodedUnit(SlabUnit):
    """Masters in a slab, and in a pinned one what travels in their place.

    Attributes:
        encoded: that one.
        descriptors: how the device turns it into the unit.
        table: the same on the device, in memory of the cast stream; None: not there.
        transient: it is there for one call only.
        dirty: masters differ from what was encoded, or encoding them has not been finished.
        encodings: how often it was encoded.
        workspace_nbytes: device bytes that encoding it anew takes meanwhile.
    """

    travels_encoded = True
    transient = False

    def __init__(
        self,
        key: str,
        slab: Slab,
        masters: list[Master],
        parts: list[tuple[int, int, list[Master]]],
        codec: Codec,
        pins: Pins,
    ) -> None:
        """`parts`: offset and bytes of each run that travels together, and the masters in it."""
        super().__init__(key, slab, masters)
        self._parts, self._codec, self._pins = parts, codec, pins
        self.encoded = slab  # until it has been encoded
        self.descriptors: tuple[Descriptor, ...] = ()
        self.table: Table | None = None
        self.dirty = True
        self.encodings = self.workspace_nbytes = 0
        self._versions: list[int] = []
        self._mask: torch.Tensor | None = None  # of the fingerprint's words: the bytes that belong to a piece
        self._index: torch.Tensor | None = None  # of the fingerprint's words, on the device
        self._device_mask: torch.Tensor | None = None
        self._arrived: torch.Tensor | None = None  # those words as the device has them, unwritten; there, or on the host
        self._outlived = False

    @property
    def source(self) -> Slab:
        return self.encoded

    @property
    def host_nbytes(self) -> int:
        return self.encoded.nbytes + (0 if isinstance(self.slab, FileSlab) else self.slab.nbytes)

    @property
    def filed_nbytes(self) -> int:
        return self.slab.nbytes if isinstance(self.slab, FileSlab) else 0

    @property
    def overhead_nbytes(self) -> int:
        """Device bytes that it takes whether it is resident or not."""
        table, index = self.table, self._sample_index
        if table is None or index is None:
            return 0
        sizes = (table.rows.nbytes, table.blocks.nbytes, index.nbytes, index.nbytes, index.nbytes)
        return sum(map(device_nbytes, sizes))

    def place(self, offsets: list[int]) -> None:
        super().place(offsets)
        assert self._sample_index is not None
        # Between pieces a unit's device bytes are whatever was there before: nothing that travels covers them.
        inside = torch.zeros(self.slab.nbytes, dtype=torch.uint8, device="cpu")
        for offset, nbytes, _ in self._parts:
            inside[offset : offset + nbytes] = 255
        self._mask = inside.view(torch.int64)[self._sample_index]

    # ---------------------------------------------------------------- encoding
    def pieces(self) -> list[Piece]:
        """What is offered to the codec, where it lies now."""
        return [Piece.of(offset, nbytes, members) for offset, nbytes, members in self._parts]

    def encode(self, recipes: list[Recipe | None] | None = None) -> None:
        """Encode the masters, and pin what comes of it. Nothing is being copied out of what was encoded before.

        Args:
            recipes: of the pieces, as the codec has just offered them.
        """
        self.dirty = True  # until all of it has been done: an interrupt leaves what the next load does again
        if self._tells:
            self._file.mark()
        else:
            super().sample()
        versions = [version_of(m.tensor) for m in self.masters]
        pieces = self.pieces()
        self.workspace_nbytes = max(map(self._codec.workspace_nbytes, pieces), default=0)
        if recipes is None:
            recipes = [self._codec.recipe(piece) for piece in pieces]
        placed: list[tuple[int, Piece, Recipe]] = []
        end = 0
        for piece, offered in zip(pieces, recipes, strict=True):
            recipe = offered or Raw(self.slab.bytes[piece.offset : piece.offset + piece.nbytes], piece.name)
            placed.append((end, piece, recipe))
            end += align(recipe.nbytes, SLAB_ALIGNMENT)
        slab = Slab(end)
        for begin, _, recipe in placed:
            recipe.write(slab.bytes[begin : begin + recipe.nbytes])
        if isinstance(self.slab, FileSlab):
            self.slab.let_go()
        self.descriptors = tuple(recipe.descriptor(begin, piece.offset) for begin, piece, recipe in placed)
        self.table = self._arrived = None
        before, self.encoded = self.encoded, slab
        self.payload_nbytes = slab.nbytes
        self._versions = versions
        self.encodings += 1
        if before is not self.slab:
            before.unpin()
        self._pins.pin(slab)
        self.dirty = False

    def encoded_pieces(self) -> list[tuple[int, int, Descriptor]]:
        """Of each piece: where it lies in the unit, where what it became ends in what travels, and the descriptor."""
        ends = [*(d.source_offset for d in self.descriptors[1:]), self.encoded.nbytes]
        offsets = [offset for offset, _, _ in self._parts]
        return list(zip(offsets, ends, self.descriptors, strict=True))

    def outdated(self, look: bool) -> bool:
        """The masters were written since they were encoded.

        Args:
            look: compare fingerprints, too, where their file does not tell.
        """
        return (
            self.dirty
            or any(version_of(m.tensor) != v for m, v in zip(self.masters, self._versions, strict=True))
            or ((look or self._tells) and self.stale())
        )

    def changed(self) -> None:
        self.dirty = True
        if self.bytes is not None and self.present and self._sample_index is not None:
            # The device has what was written back. The host waits, as it did for that: nothing else orders the caller's
            # stream before the memory is given back.
            self._arrived = self._on_device()

    # -------------------------------------------------------- what masters lie in
    @property
    def _file(self) -> FileSlab:
        assert isinstance(self.slab, FileSlab)
        return self.slab

    @property
    def _tells(self) -> bool:
        """The masters lie in a file, which tells whether they were written."""
        return isinstance(self.slab, FileSlab) and self.slab.touched is not None

    def put_away(self, where: str) -> None:
        """Let the masters lie in a file, as the setting `originals` says. They have been encoded, and nothing else."""
        slab = file_slab(self.slab.nbytes, where)
        if slab is None:
            return
        slab.bytes.copy_(self.slab.bytes)
        slab.mark()
        if self.encoded is self.slab:
            self.encoded = slab
        for master, offset in zip(self.masters, self._offsets, strict=True):
            master.settle(slab, offset)
        self.slab = slab
        if self._tells:
            self._sample = None

    def sample(self) -> None:
        if not self._tells:
            super().sample()
            return
        if self.dirty:  # it is encoded anew whatever the file says; what was written back is no change by hand
            self._file.mark()
        self._file.let_go()

    def stale(self) -> bool:
        return bool(self._file.touched) if self._tells else super().stale()

    # -------------------------------------------------------- on the device
    def lay_table(self, device: torch.device) -> Table:
        """Put what the device needs to know there, in memory of the current stream."""
        assert self._sample_index is not None and self._mask is not None
        self._index, self._device_mask = self._sample_index.to(device), self._mask.to(device)
        self.table = build_table(self.descriptors, device)  # last: it stands for all of them
        return self.table

    def remember(self) -> None:
        """Fingerprint the device bytes, on the stream of the table. What a lossy codec leaves is not what the masters have."""
        assert self.bytes is not None and self._index is not None and self._device_mask is not None
        self._arrived = self.bytes.view(torch.int64)[self._index] & self._device_mask

    @property
    def remembered(self) -> bool:
        return self._arrived is not None

    def rewritten(self) -> list[Master]:
        return self._differing(self._arrived.cpu()) if self._arrived is not None else []

    def _on_device(self) -> torch.Tensor:
        assert self._mask is not None
        return super()._on_device() & self._mask

    def abandon(self) -> None:
        super().abandon()
        self._arrived = None

    # ------------------------------------------------------------------ the end
    def outlived(self) -> None:
        self._outlived = True

    def retire(self) -> None:
        super().retire()
        self.encoded.unpin()
        self.encoded = self.slab  # its memory goes before that of the masters is taken
        self.table = self._index = self._device_mask = self._arrived = None
        if isinstance(self.slab, FileSlab) and not self._outlived:
            left = self._own(self.slab.bytes.data_ptr())
            if left:
                memory = Slab(self.slab.nbytes)
                memory.bytes.copy_(self.slab.bytes)
                for master, offset in left:
                    master.settle(memory, offset)
                self.encoded = self.slab = memory
