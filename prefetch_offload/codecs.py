"""How weights lie in pinned host memory and travel, where that is not as they are used.

A codec looks at one run of bytes after the other (`Piece`) and offers a `Recipe`: how many bytes it becomes, how to write
them, and the descriptor by which the device turns them back. What it offers none for travels raw, in the same unit. The
engine knows units of encoded bytes only (`encoded.py`), so another codec is another class in this file.

Nothing here holds a second copy of more than one tensor: tensors are encoded in chunks, straight into their slab.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from prefetch_offload_kernels import PACKED_BF16, Descriptor, Survey, pack_bf16, survey_bf16
from torch import nn

from .config import Settings
from .errors import SettingError
from .masters import Master, is_plain, span_nbytes

# Elements converted at a time: 4 MiB of fp32, in a core's cache with what it becomes.
_CHUNK = 1 << 20
# Where encoded tensors begin in their slab: packed weights need 16, and the kernel's wide accesses do, too.
SLAB_ALIGNMENT = 16
# Less is not worth a scale per row, nor what it may cost the image.
SMALLEST = 1024
# Of a tensor's bytes: what does not become smaller than this travels raw.
WORTH_PACKING = 0.95
# As diffusers' layerwise casting skips (DEFAULT_SKIP_MODULES_PATTERN), and all embeddings. What fine-tuning adds is small.
SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", "embed", r"(^|\.)shared$", "lora_")
# Kinds of devices on which "auto" packs, and goes by what events say about it. The others' operators are slower than a link.
MEASURED_ON = ("cuda",)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    """What one piece becomes."""

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


class Codec(Protocol):
    """A way to encode. `name` is the setting's."""

    name: str

    def recipe(self, piece: Piece) -> Recipe | None:
        """For one piece; None: it travels raw."""
        ...

    def least_nbytes(self, piece: Piece) -> int:
        """It becomes no fewer bytes than that, whatever its values are."""
        ...


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


class Packed:
    """bfloat16 in about 12 bits, and float32 as a 16-bit type that holds all of a tensor's values, both without loss.

    Attributes:
        device: where packing is computed; None: on the host.
    """

    name = "packed"

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def fits(self, piece: Piece) -> bool:
        """It would travel packed, if its values allow it."""
        known = piece.tensor is not None and piece.tensor.dtype in (torch.bfloat16, torch.float32)
        return known and piece.flat.numel() >= SMALLEST

    def recipe(self, piece: Piece) -> Recipe | None:
        if not self.fits(piece):
            return None
        if piece.flat.dtype == torch.float32:
            narrow = next((d for d in (torch.bfloat16, torch.float16) if holds(d, piece.flat)), None)
            return _Cast(piece, narrow) if narrow is not None else None
        survey = survey_bf16(piece.flat, self.device)
        return _Packing(piece, survey, self.device) if survey.ratio <= WORTH_PACKING else None

    def least_nbytes(self, piece: Piece) -> int:
        if not self.fits(piece):
            return piece.nbytes
        return piece.nbytes // 2 if piece.flat.dtype == torch.float32 else piece.nbytes * 3 // 4


@dataclasses.dataclass(frozen=True)
class _Packing:
    piece: Piece
    survey: Survey
    device: torch.device | None

    @property
    def nbytes(self) -> int:
        return self.survey.nbytes

    def write(self, out: torch.Tensor) -> None:
        pack_bf16(self.piece.flat, limit=WORTH_PACKING, device=self.device, survey=self.survey, out=out)

    def descriptor(self, source: int, target: int) -> Descriptor:
        elements, packed = self.survey.elements, self.survey.nbytes
        return Descriptor(
            source, target, elements, PACKED_BF16, torch.bfloat16, packed_nbytes=packed, name=self.piece.name
        )


class Fp8:
    """float8 e4m3 with a float32 scale per row, by which a row's largest weight becomes the largest number there is."""

    name = "fp8"

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.skips = skipping(patterns)

    def fits(self, piece: Piece) -> bool:
        """It would travel as fp8, if its values allow it."""
        return _is_float(piece) and not self.skips(piece)

    def least_nbytes(self, piece: Piece) -> int:
        return piece.flat.numel() + 4 * piece.rows if self.fits(piece) else piece.nbytes

    def recipe(self, piece: Piece) -> Recipe | None:
        if not self.fits(piece):
            return None
        scales = torch.zeros(piece.rows, dtype=torch.float32)
        for rows, _, values in _tiles(piece):
            scales[rows] = torch.maximum(scales[rows], values.abs().amax(1).to(torch.float32))
        scales /= torch.finfo(torch.float8_e4m3fn).max
        if not scales.isfinite().all():  # infinities and NaN have no scale
            return None
        return _Scaled(piece, scales.clamp_(min=torch.finfo(torch.float32).tiny))


@dataclasses.dataclass(frozen=True)
class _Scaled:
    piece: Piece
    scales: torch.Tensor  # [rows] float32

    @property
    def elements(self) -> int:
        return self.piece.flat.numel()

    @property
    def begin(self) -> int:
        """Where the scales lie, behind the elements."""
        return -(-self.elements // 4) * 4

    @property
    def nbytes(self) -> int:
        return self.begin + self.scales.nbytes

    def write(self, out: torch.Tensor) -> None:
        largest = torch.finfo(torch.float8_e4m3fn).max
        elements = out[: self.elements].view(torch.float8_e4m3fn).view(len(self.scales), -1)
        for rows, columns, values in _tiles(self.piece):
            scaled = values.to(torch.float32) / self.scales[rows, None]
            elements[rows, columns] = scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn)
        out[self.elements : self.begin] = 0
        out[self.begin :].view(torch.float32).copy_(self.scales)

    def descriptor(self, source: int, target: int) -> Descriptor:
        assert self.piece.tensor is not None
        return Descriptor(
            source,
            target,
            self.elements,
            torch.float8_e4m3fn,
            self.piece.tensor.dtype,
            scale_offset=source + self.begin,
            channel=self.elements // len(self.scales),
            name=self.piece.name,
        )


class Narrowed:
    """Wider parameters as another dtype. One that would overflow stays raw, unless that is allowed."""

    def __init__(self, dtype: torch.dtype, overflow: bool = False, patterns: Iterable[str] = ()) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.dtype, self.overflow = dtype, overflow
        self.skips = skipping(patterns) if dtype.itemsize == 1 else lambda piece: False

    def fits(self, piece: Piece) -> bool:
        """It would travel as the dtype, if its values allow it."""
        return _is_float(piece) and piece.flat.dtype.itemsize > self.dtype.itemsize and not self.skips(piece)

    def least_nbytes(self, piece: Piece) -> int:
        return piece.flat.numel() * self.dtype.itemsize if self.fits(piece) else piece.nbytes

    def recipe(self, piece: Piece) -> Recipe | None:
        if not self.fits(piece) or (not self.overflow and overflows(piece.flat, self.dtype)):
            return None
        return _Cast(piece, self.dtype)


@dataclasses.dataclass(frozen=True)
class _Cast:
    piece: Piece
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.piece.flat.numel() * self.dtype.itemsize

    def write(self, out: torch.Tensor) -> None:
        flat, elements = self.piece.flat, out.view(self.dtype)
        for begin in range(0, flat.numel(), _CHUNK):
            elements[begin : begin + _CHUNK] = flat[begin : begin + _CHUNK].to(self.dtype)

    def descriptor(self, source: int, target: int) -> Descriptor:
        flat = self.piece.flat
        return Descriptor(source, target, flat.numel(), self.dtype, flat.dtype, name=self.piece.name)


def overflows(flat: torch.Tensor, dtype: torch.dtype) -> int:
    """How many finite elements of `flat` are infinite, or NaN, as `dtype`."""
    found = 0
    for begin in range(0, flat.numel(), _CHUNK):
        values = flat[begin : begin + _CHUNK]
        found += int((values.isfinite() & ~values.to(dtype).to(torch.float32).isfinite()).sum())
    return found


def holds(narrow: torch.dtype | torch.Tensor, flat: torch.Tensor) -> bool:
    """`narrow`, made float32, is `flat` bit for bit: a tensor with as many elements, or for a type what `flat` is as that."""
    for begin in range(0, flat.numel(), _CHUNK):  # a checkpoint that needs its 32 bits is told by its first chunk
        values = flat[begin : begin + _CHUNK]
        cast = values.to(narrow) if isinstance(narrow, torch.dtype) else narrow[begin : begin + _CHUNK]
        if not torch.equal(cast.to(torch.float32).view(torch.int32), values.view(torch.int32)):
            return False
    return True


def skipping(patterns: Iterable[str]) -> Callable[[Piece], bool]:
    """Whether a piece is left as it is: by its module's name, or since it is a vector, or small."""
    found = [re.compile(p) for p in (*SKIPPED, *patterns)]

    def skips(piece: Piece) -> bool:
        assert piece.tensor is not None
        module = piece.name.rpartition(".")[0]
        return piece.tensor.dim() < 2 or piece.tensor.numel() < SMALLEST or any(p.search(module) for p in found)

    return skips


def dense(tensor: torch.Tensor) -> bool:
    """Its elements fill a run of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _is_float(piece: Piece) -> bool:
    return piece.trained and piece.tensor is not None and piece.tensor.dtype in _FLOATS


def _tiles(piece: Piece) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, columns and elements [rows, columns] of runs of rows, or of parts of one."""
    values = piece.flat.view(piece.rows, -1)
    step = max(1, _CHUNK // values.shape[1])
    for row in range(0, values.shape[0], step):
        for column in range(0, values.shape[1], _CHUNK):
            rows, columns = slice(row, row + step), slice(column, column + _CHUNK)
            yield rows, columns, values[rows, columns]


def codec_for(settings: Settings, name: str, module: nn.Module, device: torch.device) -> Codec | None:
    """How the component `name` travels; None: raw."""
    way = settings.transport_of(name)
    patterns = (
        *(getattr(module, "_skip_layerwise_casting_patterns", None) or ()),
        *(rf"(^|\.){re.escape(n)}(\.|$)" for n in getattr(module, "_keep_in_fp32_modules", None) or ()),
    )
    if way == "packed" or (way == "auto" and device.type in MEASURED_ON):
        return Packed(device if device.type == "cuda" else None)
    if way == "fp8":
        return Fp8(patterns)
    if way in ("raw", "auto"):
        return None
    return Narrowed(getattr(torch, way), settings.transport_overflow, patterns)


def check_transport(name: str, module: nn.Module, settings: Settings) -> None:
    """Refuse a dtype that cannot hold a component's weights, before anything has been changed.

    Raises:
        SettingError: with how many weights would become infinite.
    """
    codec = codec_for(settings, name, module, torch.device("cpu"))
    if not isinstance(codec, Narrowed) or codec.overflow:
        return
    found: dict[str, int] = {}
    for key, tensor in module.named_parameters():
        if not is_plain(tensor) or not dense(tensor):
            continue
        piece = Piece(key, 0, span_nbytes(tensor), tensor, True)
        count = overflows(piece.flat, codec.dtype) if codec.fits(piece) else 0
        if count:
            found[key] = count
    if found:
        worst = max(found, key=found.__getitem__)
        raise SettingError(
            f"transport={codec.name!r}: {sum(found.values())} finite weights of {name} in {len(found)} tensors (the most, "
            f"{found[worst]}, in {worst}) are too large for torch.{codec.name} and would become infinite. Use another dtype, "
            "or 'raw' for this component; `transport_overflow=True` allows it."
        )
