"""Units for `benchmarks.kernels`: what is in them, and the ways to turn them into what a model computes with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from prefetch_offload_kernels import Descriptor, Table, build_table, cast_unit, cast_unit_reference, pack_bf16

MB = 1_000_000
ROW = 4096  # elements per scale, where there is one per row
SHORT_ROW = 36  # the same of a small convolution: four channels of 3 x 3
GRAIN = 32 * SHORT_ROW  # elements: whole rows, and a multiple of 256 bytes in every type
TENSOR = 16 << 20  # elements of the unit's tensors: a projection of a large transformer; small units have eight tensors

F32, F16, BF16, E4M3, E5M2, I8 = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
)  # fmt: skip


class Kind(NamedTuple):
    """What a tensor travels as and becomes. It is scaled by nothing, by a number for all of it, or by one for each row."""

    source: torch.dtype | Literal["packed"]
    target: torch.dtype
    scaling: Literal["", "tensor", "row", "short row"] = ""


# name -> kinds, which the tensors of a unit have in turn
CASES: dict[str, tuple[Kind, ...]] = {
    "unpack bf16": (Kind("packed", BF16),),
    "fp8 e4m3 x row scale -> bf16": (Kind(E4M3, BF16, "row"),),
    "fp8 e4m3 x row scale -> fp16": (Kind(E4M3, F16, "row"),),
    # What a unit of a quantized transformer is: layers that stay as they are beside those that do not.
    "mixed: copy, fp8 e4m3 x row scale, unpack -> bf16": (Kind(BF16, BF16), Kind(E4M3, BF16, "row"), Kind("packed", BF16)),
    "fp8 e4m3 -> bf16": (Kind(E4M3, BF16),),
    "fp32 -> bf16": (Kind(F32, BF16),),
    "fp16 -> fp32": (Kind(F16, F32),),
    "int8 x row scale -> fp16": (Kind(I8, F16, "row"),),
    "copy bf16": (Kind(BF16, BF16),),
    "fp8 e4m3 x short row scale -> fp16": (Kind(E4M3, F16, "short row"),),
    "fp8 e4m3 x tensor scale -> bf16": (Kind(E4M3, BF16, "tensor"),),
    "fp8 e4m3 x tensor scale -> fp16": (Kind(E4M3, F16, "tensor"),),
    "fp8 e4m3 -> fp16": (Kind(E4M3, F16),),
    "fp8 e5m2 x row scale -> bf16": (Kind(E5M2, BF16, "row"),),
    "fp8 e5m2 x tensor scale -> fp16": (Kind(E5M2, F16, "tensor"),),
    "fp8 e5m2 -> fp16": (Kind(E5M2, F16),),
    "fp8 e5m2 -> fp32": (Kind(E5M2, F32),),
    "fp8 e4m3 x row scale -> fp32": (Kind(E4M3, F32, "row"),),
    "int8 x tensor scale -> bf16": (Kind(I8, BF16, "tensor"),),
    "int8 -> bf16": (Kind(I8, BF16),),
    "int8 x row scale -> fp32": (Kind(I8, F32, "row"),),
    "fp32 -> fp16": (Kind(F32, F16),),
    "bf16 -> fp32": (Kind(BF16, F32),),
    "fp16 -> bf16": (Kind(F16, BF16),),
    "bf16 -> fp16": (Kind(BF16, F16),),
}


@dataclass
class Unit:
    """Tensors to be cast: where they are, and where they go. `scales` has None for one that is not scaled."""

    table: Table
    staging: torch.Tensor
    target: torch.Tensor
    sources: list[torch.Tensor]
    scales: list[torch.Tensor | None]
    results: list[torch.Tensor]

    @property
    def moved_nbytes(self) -> int:
        return sum(d.source_nbytes + d.target_nbytes + 4 * d.scales for d in self.table.descriptors)


class _Laid(NamedTuple):
    """A tensor as it lies in staging, scales behind it."""

    raw: torch.Tensor
    scale: torch.Tensor | None
    channel: int | None  # None: all of a tensor


def _lay(kind: Kind, count: int) -> _Laid:
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    if kind.source == "packed":
        packed = pack_bf16(weights.to(BF16))
        assert packed is not None
        return _Laid(packed, None, None)
    values = (weights * (2000 if kind.source == I8 else 1)).to(kind.source)
    channel = {"row": ROW, "short row": SHORT_ROW}.get(kind.scaling)
    rows = count // channel if channel else 1
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(1)) if kind.scaling else None
    return _Laid(values.view(torch.uint8), scale, channel)


def build_unit(case: str, target_nbytes: int, device: str) -> Unit:
    """A unit of `target_nbytes` or a little less on `device`, filled with weights of standard deviation 0.02."""
    kinds = CASES[case]
    itemsize = kinds[0].target.itemsize
    total = target_nbytes // itemsize
    grain = GRAIN if any(kind.scaling == "short row" for kind in kinds) else ROW
    count = max(grain, min(TENSOR, total // 8) // grain * grain)
    laid = [_lay(kind, count) for kind in kinds]
    descriptors, pieces, offset = [], [], 0
    turns = itertools.cycle(zip(kinds, laid, strict=True))
    for index in range(max(1, total // count)):
        kind, tensor = next(turns)
        place, nbytes = index * count * itemsize, tensor.raw.numel()
        if kind.source == "packed":
            descriptors.append(Descriptor.of_packed(tensor.raw, offset, place))
        else:
            scale_offset = offset + nbytes if tensor.scale is not None else None
            descriptors.append(Descriptor(offset, place, count, kind.source, kind.target, scale_offset, tensor.channel))
        pieces.append(tensor.raw)
        if tensor.scale is not None:
            pieces.append(tensor.scale.view(torch.uint8))
            nbytes += tensor.scale.nbytes
        pieces.append(torch.zeros(-nbytes % 256, dtype=torch.uint8))
        offset += nbytes + -nbytes % 256
    staging = torch.empty(offset, dtype=torch.uint8, device=device)
    begin = 0
    for piece in pieces:
        staging[begin : begin + piece.numel()].copy_(piece)
        begin += piece.numel()
    table = build_table(descriptors, device)
    result = torch.empty(table.target_nbytes, dtype=torch.uint8, device=device)
    travelled = [staging[d.source_offset : d.source_offset + d.source_nbytes] for d in descriptors]
    return Unit(
        table,
        staging,
        result,
        [t if isinstance(d.source, str) else t.view(d.source) for t, d in zip(travelled, descriptors, strict=True)],
        [None if d.scale_offset is None else staging[d.scale_offset :][: 4 * d.scales].view(F32) for d in descriptors],
        cut(table, result),
    )


def cut(table: Table, target: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in `target`, uint8 bytes that are laid out as `table` says."""
    return [target[d.target_offset : d.target_offset + d.target_nbytes].view(d.target) for d in table.descriptors]


def methods(unit: Unit) -> dict[str, Callable[[], object]]:
    """Ways to do it, by name. Each writes `unit.results`, except those by `Tensor.to`, which allocate their own."""

    def kernel() -> None:
        cast_unit(unit.table, unit.staging, unit.target)

    def reference() -> None:
        cast_unit_reference(unit.table, unit.staging, unit.target)

    ways: dict[str, Callable[[], object]] = {"kernel": kernel}
    if any(isinstance(d.source, str) for d in unit.table.descriptors):
        # No operator unpacks: beside those that together do, what it takes only to move as many bytes as come of it.
        reference()
        unpacked = cut(unit.table, unit.target.clone())
        return {
            **ways,
            "PyTorch operators": reference,
            "_foreach_copy_ of the unpacked": lambda: torch._foreach_copy_(unit.results, unpacked),
        }
    scales = [scale for scale in unit.scales if scale is not None]
    return {**ways, **(_scaled(unit, scales) if scales else _plain(unit))}


def _plain(unit: Unit) -> dict[str, Callable[[], object]]:
    def loop() -> None:
        for source, result in zip(unit.sources, unit.results, strict=True):
            result.copy_(source)

    def foreach() -> None:
        torch._foreach_copy_(unit.results, unit.sources)

    def to() -> list[torch.Tensor]:
        dtype = unit.results[0].dtype
        copied = unit.sources[0].dtype == dtype
        return [source.clone() if copied else source.to(dtype) for source in unit.sources]

    return {"loop of copy_": loop, "_foreach_copy_": foreach, "Tensor.to": to}


def _scaled(unit: Unit, scales: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    def loop() -> None:
        for source, scale, result in zip(unit.sources, scales, unit.results, strict=True):
            rows = scale.numel()
            result.view(rows, -1).copy_(source.view(rows, -1).to(F32).mul_(scale[:, None]))

    def foreach() -> None:
        wide = [torch.empty_like(source, dtype=F32) for source in unit.sources]
        torch._foreach_copy_(wide, unit.sources)
        rows = [w.view(scale.numel(), -1) for w, scale in zip(wide, scales, strict=True)]
        torch._foreach_mul_(rows, [scale[:, None] for scale in scales])
        torch._foreach_copy_(unit.results, wide)

    def to() -> list[torch.Tensor]:
        made = []
        for source, scale, result in zip(unit.sources, scales, unit.results, strict=True):
            rows = scale.numel()
            made.append(source.view(rows, -1).to(F32).mul_(scale[:, None]).to(result.dtype).view(-1))
        return made

    return {"loop of to, mul_, copy_": loop, "_foreach_copy_, _foreach_mul_": foreach, "Tensor.to, mul_, to": to}
