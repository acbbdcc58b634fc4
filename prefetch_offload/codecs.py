"""Which codec a component's weights travel by, and the lossless one. `encoding.py` has the interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from prefetch_offload_kernels import (
    PACKED_BF16,
    Descriptor,
    Survey,
    pack_bf16,
    packing_workspace_nbytes,
    survey_bf16,
)
from torch import nn

from .config import Settings
from .encoding import SMALLEST, Cast, Codec, Piece, Recipe, dense, holds
from .errors import SettingError
from .masters import is_plain, span_nbytes
from .quantizing import Narrowed, Quantized

# Of a tensor's bytes: what does not become smaller than this travels raw.
WORTH_PACKING = 0.95
# Kinds of devices on which "auto" packs, and goes by what events say about it. The others' operators are slower than a link.
MEASURED_ON = ("cuda",)


class Packed(Codec):
    """bfloat16 in about 12 bits, and float32 as a 16-bit type that holds all of a tensor's values, both without loss.

    Attributes:
        device: where packing is computed; None: on the host.
    """

    name = "packed"
    lossless = True

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
            return Cast(piece, narrow) if narrow is not None else None
        survey = survey_bf16(piece.flat, self.device)
        return _Packing(piece, survey, self.device) if survey.ratio <= WORTH_PACKING else None

    def workspace_nbytes(self, piece: Piece) -> int:
        packs = self.device is not None and self.fits(piece) and piece.flat.dtype == torch.bfloat16
        return packing_workspace_nbytes(piece.flat.numel()) if packs else 0

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


def codec_for(settings: Settings, name: str, module: nn.Module, device: torch.device) -> Codec | None:
    """How the component `name` travels; None: raw."""
    way = settings.transport_of(name)
    if isinstance(way, Codec):
        return way.on(module, device)
    assert isinstance(way, str)
    if way == "packed" or (way == "auto" and device.type in MEASURED_ON):
        return Packed(device if device.type == "cuda" else None)
    if way in ("raw", "auto"):
        return None
    if way in ("fp8", "int8"):
        return Quantized(torch.float8_e4m3fn if way == "fp8" else torch.int8).on(module, device)
    return Narrowed(getattr(torch, way), settings.transport_overflow).on(module, device)


def check_transport(modules: Mapping[str, nn.Module], settings: Settings) -> None:
    """Refuse a way that cannot hold components' weights, before anything has been changed.

    Raises:
        SettingError: with how many weights of which components would not arrive as numbers of their size.
    """
    told = []
    for name, module in modules.items():
        codec = codec_for(settings, name, module, torch.device("cpu"))
        found = _overflowing(module, codec) if codec is not None else {}
        if found:
            worst = max(found, key=found.__getitem__)
            told.append(
                f"transport={codec.name!r}: {sum(found.values())} finite weights of {name} in {len(found)} tensors (the most, "
                f"{found[worst]}, in {worst})"
            )
    if told:
        raise SettingError(
            f"{'; '.join(told)} are too large for that type, and would become infinite or be cut to its largest number. Use "
            "another one, or 'raw' for these components; `transport_overflow=True` allows it for dtypes."
        )


def _overflowing(module: nn.Module, codec: Codec) -> dict[str, int]:
    """Names of parameters that overflow, and how many of their elements do."""
    found = {}
    for key, tensor in module.named_parameters():
        if is_plain(tensor) and dense(tensor):
            count = codec.overflows(Piece(key, 0, span_nbytes(tensor), tensor, True))
            if count:
                found[key] = count
    return found
