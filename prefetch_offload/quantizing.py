"""Codecs that lose something: weights rounded to 8 bits with scales, or to a narrower dtype; and which ones are left alone."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from typing import Literal

import torch
from prefetch_offload_kernels import Descriptor
from torch import nn

from .encoding import CHUNK, FLOATS, SMALLEST, Cast, Codec, Piece, Recipe, has_infinities, tiles
from .errors import SettingError

# The layers that diffusers' layerwise casting casts (`_GO_LC_SUPPORTED_PYTORCH_LAYERS`), but embeddings: a row of one is
# read as it is, and nothing averages what rounding it does.
CASTABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip
# Its DEFAULT_SKIP_MODULES_PATTERN, and what fine-tuning adds, which is small (peft's `adapter_layer_names`).
SKIPPED = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$", r"(^|\.)(lora_|hada_|lokr_)")
QUANTIZED = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}  # the largest number of each


class Layers:
    """Which of a component's weights diffusers' layerwise casting would cast: those of layers that do the bulk of the work,
    unless the layer or one around it is skipped by name."""

    def __init__(self, module: nn.Module) -> None:
        module = module._modules.get("_orig_mod") or module
        self._root = weakref.ref(module)
        kept = [*(getattr(module, "_keep_in_fp32_modules", None) or ())]
        if not hasattr(module, "enable_layerwise_casting"):  # transformers means whole names, and diffusers parts of them
            kept += getattr(module, "_keep_in_fp32_modules_strict", None) or ()
            kept = [rf"(^|\.){name}($|\.)" for name in kept]
        own = getattr(module, "_skip_layerwise_casting_patterns", None) or ()
        self._patterns = [re.compile(p) for p in (*SKIPPED, *kept, *own)]
        names: dict[int, list[str]] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        tied = [same for same in names.values() if len(same) > 1]
        self._tied = {name for same in tied if not all(map(self._casts, same)) for name in same}

    def cast(self, name: str) -> bool:
        """The parameter of this name is one of them, under all names that it has."""
        return name not in self._tied and self._casts(name)

    def _casts(self, name: str) -> bool:
        module, path = self._root(), ""
        for part in name.split("."):
            if isinstance(module, CASTABLE):
                return True
            if part == "_orig_mod":  # of compiled modules; the root is what it was without
                module = module._modules.get(part, module) if module is not None else None
                continue
            module = module._modules.get(part) if module is not None else None
            path = f"{path}.{part}".lstrip(".")
            if module is None or any(p.search(path) for p in self._patterns):
                return False
        return False


def may_lose(piece: Piece, layers: Layers | None) -> bool:
    """It is a weight that takes being rounded to 8 bits: no vector, not small, and a layer's that is cast."""
    if not _is_weight(piece) or piece.tensor is None:
        return False
    large = piece.tensor.dim() > 1 and piece.tensor.numel() >= SMALLEST
    return large and (layers is None or layers.cast(piece.name))


@dataclasses.dataclass(frozen=True)
class Quantized(Codec):
    """Weights in 8 bits, with float32 scales by which the largest weight becomes the largest number there is.

    Norms, embeddings, vectors, small tensors, and the layers that diffusers' layerwise casting skips travel raw, and so does
    what has no scale, since it holds an infinity or NaN.

    Args:
        dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8.
        scale: one per output channel, or one for the whole tensor.

    Raises:
        SettingError: another dtype or scale.
    """

    dtype: torch.dtype
    scale: Literal["channel", "tensor"] = "channel"
    layers: Layers | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in QUANTIZED:
            raise SettingError(f"Quantized({self.dtype}): give one of {', '.join(map(str, QUANTIZED))}.")
        if self.scale not in ("channel", "tensor"):
            raise SettingError(f"Quantized(..., scale={self.scale!r}): give 'channel' or 'tensor'.")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{str(self.dtype).removeprefix('torch.')} with a scale per {self.scale}"

    def on(self, module: nn.Module, device: torch.device) -> Codec:
        return dataclasses.replace(self, layers=Layers(module))

    def least_nbytes(self, piece: Piece) -> int:
        return piece.flat.numel() + 4 * self._scales(piece) if may_lose(piece, self.layers) else piece.nbytes

    def recipe(self, piece: Piece) -> Recipe | None:
        if not may_lose(piece, self.layers):
            return None
        scales = torch.zeros(self._scales(piece), dtype=torch.float32)
        for rows, _, values in tiles(piece.flat.view(len(scales), -1)):
            scales[rows] = torch.maximum(scales[rows], values.abs().amax(1).to(torch.float32))
        largest = QUANTIZED[self.dtype]
        scales /= largest
        if not scales.isfinite().all():
            return None
        # rounded up, the scale of the largest float32 there is would make infinity of it
        scales = torch.where((scales * largest).isinf(), scales.nextafter(torch.zeros(())), scales)
        return _Scaled(piece, scales.clamp_(min=torch.finfo(torch.float32).tiny), self.dtype)

    def _scales(self, piece: Piece) -> int:
        return piece.rows if self.scale == "channel" else 1


@dataclasses.dataclass(frozen=True)
class _Scaled:
    piece: Piece
    scales: torch.Tensor  # [rows] float32
    dtype: torch.dtype

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
        largest = QUANTIZED[self.dtype]
        elements = out[: self.elements].view(self.dtype).view(len(self.scales), -1)
        for rows, columns, values in tiles(self.piece.flat.view(len(self.scales), -1)):
            scaled = values.to(torch.float32) / self.scales[rows, None]
            if self.dtype is torch.int8:
                scaled.round_()
            elements[rows, columns] = scaled.clamp_(-largest, largest).to(self.dtype)
        out[self.elements : self.begin] = 0
        out[self.begin :].view(torch.float32).copy_(self.scales)

    def descriptor(self, source: int, target: int) -> Descriptor:
        assert self.piece.tensor is not None
        return Descriptor(
            source,
            target,
            self.elements,
            self.dtype,
            self.piece.tensor.dtype,
            scale_offset=source + self.begin,
            channel=self.elements // len(self.scales),
            name=self.piece.name,
        )


class Narrowed(Codec):
    """Wider parameters as another dtype. One that would overflow stays raw, unless that is allowed; so does one with infinities
    where the dtype has none."""

    def __init__(self, dtype: torch.dtype, overflow: bool = False, layers: Layers | None = None) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.dtype, self.overflow, self.layers = dtype, overflow, layers

    def on(self, module: nn.Module, device: torch.device) -> Codec:
        return Narrowed(self.dtype, self.overflow, Layers(module)) if self.dtype.itemsize == 1 else self

    def fits(self, piece: Piece) -> bool:
        """It would travel as the dtype, if its values allow it."""
        if self.dtype.itemsize == 1:
            return may_lose(piece, self.layers)
        return _is_weight(piece) and piece.flat.dtype.itemsize > self.dtype.itemsize

    def least_nbytes(self, piece: Piece) -> int:
        return piece.flat.numel() * self.dtype.itemsize if self.fits(piece) else piece.nbytes

    def overflows(self, piece: Piece) -> int:
        return overflows(piece.flat, self.dtype) if self.fits(piece) and not self.overflow else 0

    def recipe(self, piece: Piece) -> Recipe | None:
        if not self.fits(piece) or self.overflows(piece):
            return None
        if not has_infinities(self.dtype) and any(values.isinf().any() for values in piece.flat.split(CHUNK)):
            return None
        return Cast(piece, self.dtype)


def overflows(flat: torch.Tensor, dtype: torch.dtype) -> int:
    """How many finite elements of `flat`, rounded to nearest, are beyond the largest number that `dtype` has."""
    info = torch.finfo(dtype)
    step = 2.0 ** math.floor(math.log2(info.max)) * info.eps
    # Halfway to the next one there would be, rounding goes to the even one of both. Not by what a cast gives: float8_e4m3fn,
    # which has no infinity, silently cuts to its largest.
    compare = torch.ge if info.max / step % 2 else torch.gt
    found = 0
    for values in flat.split(CHUNK):
        size = values.to(torch.float32).abs()
        found += int((compare(size, info.max + step / 2) & size.isfinite()).sum())
    return found


def _is_weight(piece: Piece) -> bool:
    return piece.trained and piece.tensor is not None and piece.tensor.dtype in FLOATS
