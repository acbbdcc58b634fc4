"""How weights may lie in pinned host memory and travel, where that is not as they are used: the interface of all codecs.

A codec looks at one run of bytes after the other (`Piece`) and offers a `Recipe`: how many bytes it becomes, how to write
them, and the descriptor by which the device turns them back. What it offers none for travels raw, in the same unit. The
engine knows units of encoded bytes only (`encoded.py`), so another codec is another subclass of `Codec`, here or in a program.

Nothing here holds a second copy of more than one tensor: tensors are encoded in chunks, straight into their slab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from prefetch_offload_kernels import Descriptor
from torch import nn

from .config import Way
from .masters import Master

# Elements converted at a time: 4 MiB of fp32, in a core's cache with what it becomes.
CHUNK = 1 << 20
# Where encoded tensors begin in their slab: packed weights need 16, and the kernel's wide accesses do, too.
SLAB_ALIGNMENT = 16
# Less is not worth a scale per row, nor what it may cost the image.
SMALLEST = 1024
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of bytes of a unit that travels together.

    Attributes:
        name: of its first tensor, within the component.
        offset, nbytes: where it lies in the unit as it is used.
        tensor: the one tensor that it is, filled without gaps; None: several that overlap, or one with gaps.
        trained: a parameter, not a buffer.
    """

    name: str
    offset: int
    nbytes: int
    tensor: torch.Tensor | None
    trained: bool

    @classmethod
    def of(cls, offset: int, nbytes: int, members: list[Master]) -> Piece:
        """`nbytes` at `offset` of a unit, which `members` share; their data lie in their slab."""
        tensor = members[0].home if len(members) == 1 else None
        if tensor is not None and not dense(tensor):
            tensor = None
        return cls(members[0].name, offset, nbytes, tensor, isinstance(members[0].tensor, nn.Parameter))

    @property
    def flat(self) -> torch.Tensor:
        """The tensor's elements in memory order."""
        assert self.tensor is not None
        t = self.tensor.detach()
        return t.as_strided((t.numel(),), (1,))

    @property
    def rows(self) -> int:
        """Size of the dimension that is outermost in memory: that of output channels."""
        assert self.tensor is not None
        sizes = [size for _, size in sorted(zip(self.tensor.stride(), self.tensor.shape, strict=True)) if size > 1]
        return sizes[-1] if len(sizes) > 1 else 1


class Recipe(Protocol):
    """What one piece becomes. Any object with these three will do."""

    @property
    def nbytes(self) -> int:
        """Encoded bytes."""
        ...

    def write(self, out: torch.Tensor) -> None:
        """Fill `out`, uint8 [nbytes], in host memory."""
        ...

    def descriptor(self, source: int, target: int) -> Descriptor:
        """How the device turns the bytes at `source` of what travelled into those at `target` of the unit."""
        ...


class Codec(Way):
    """A way for weights to travel: the base class of those that are built in, and of a program's own.

    An instance is a `transport`, or one component's in a mapping of them. The engine asks it about each piece of a unit, a
    tensor in memory order most of the time, and takes three things of the recipe that it gives for one:

    - ``nbytes``, the packed size: bytes in pinned host memory and over the link.
    - ``write(out)``, packing: fill ``out`` (uint8, that many bytes, on the host). Called again whenever the weights were
      written. The same weights give the same bytes.
    - ``descriptor(source, target)``, unpacking: a `prefetch_offload_kernels.Descriptor` that makes of the bytes at offset
      ``source`` of what travelled those at offset ``target`` of the unit as it is used. So the ways to unpack are the kinds of
      that table: copy; convert float32, float16, bfloat16, float8 and int8; multiply fp8 and int8 by scales; unpack bfloat16.

    What the device works with is what these make of the weights; the program goes on seeing the weights themselves.

    Attributes:
        name: for messages.
        lossless: what arrives is the weights, bit for bit.
    """

    name = "a codec"

    def on(self, module: nn.Module, device: torch.device) -> Codec:
        """The codec for a component that will run on `device`. By default the codec itself, which then serves several."""
        return self

    def recipe(self, piece: Piece) -> Recipe | None:
        """For one piece; None: it travels raw, as one does whose ``piece.tensor`` is None."""
        raise NotImplementedError

    def least_nbytes(self, piece: Piece) -> int:
        """It becomes no fewer bytes than that, whatever its values are. For refusing budgets early; they are not to be read."""
        return piece.nbytes

    def workspace_nbytes(self, piece: Piece) -> int:
        """Device bytes that encoding it takes meanwhile, at most. The budget keeps them free. None on the host."""
        return 0

    def overflows(self, piece: Piece) -> int:
        """How many finite elements would arrive as infinities, or cut to the largest number. If any, it is refused."""
        return 0


@dataclasses.dataclass(frozen=True)
class Raw:
    """The bytes as they are."""

    source: torch.Tensor  # uint8 [nbytes]
    name: str

    @property
    def nbytes(self) -> int:
        return self.source.numel()

    def write(self, out: torch.Tensor) -> None:
        out.copy_(self.source)

    def descriptor(self, source: int, target: int) -> Descriptor:
        return Descriptor(source, target, self.nbytes, torch.uint8, torch.uint8, name=self.name)


@dataclasses.dataclass(frozen=True)
class Cast:
    """The elements as another dtype. What is too large for one without infinities becomes the largest that it has."""

    piece: Piece
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.piece.flat.numel() * self.dtype.itemsize

    def write(self, out: torch.Tensor) -> None:
        flat, elements = self.piece.flat, out.view(self.dtype)
        largest = torch.finfo(self.dtype).max
        for begin in range(0, flat.numel(), CHUNK):
            values = flat[begin : begin + CHUNK]
            if not has_infinities(self.dtype):
                values = values.clamp(-largest, largest)
            elements[begin : begin + CHUNK] = values.to(self.dtype)

    def descriptor(self, source: int, target: int) -> Descriptor:
        flat = self.piece.flat
        return Descriptor(source, target, flat.numel(), self.dtype, flat.dtype, name=self.piece.name)


def holds(narrow: torch.dtype | torch.Tensor, flat: torch.Tensor) -> bool:
    """`narrow`, made float32, is `flat` bit for bit: a tensor with as many elements, or for a type what `flat` is as that."""
    for begin in range(0, flat.numel(), CHUNK):  # a checkpoint that needs its 32 bits is told by its first chunk
        values = flat[begin : begin + CHUNK]
        cast = values.to(narrow) if isinstance(narrow, torch.dtype) else narrow[begin : begin + CHUNK]
        if not torch.equal(cast.to(torch.float32).view(torch.int32), values.view(torch.int32)):
            return False
    return True


def has_infinities(dtype: torch.dtype) -> bool:
    """float8_e4m3fn has none: casts cut infinities and what is too large to the largest number, or make them NaN."""
    return dtype is not torch.float8_e4m3fn


def dense(tensor: torch.Tensor) -> bool:
    """Its elements fill a run of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def tiles(values: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, columns and elements [rows, columns] of runs of rows of `values`, or of parts of one."""
    step = max(1, CHUNK // values.shape[1])
    for row in range(0, values.shape[0], step):
        for column in range(0, values.shape[1], CHUNK):
            rows, columns = slice(row, row + step), slice(column, column + CHUNK)
            yield rows, columns, values[rows, columns]
