"""The kernels that cast and unpack a unit, against PyTorch's own ways, on a GPU.

    python -m benchmarks.kernels --out DIR [--seconds 300] [--largest 1024]

Writes kernels.csv (a row per case, size and method) and kernels.json (the GPU, its copy bandwidth and its link as measured in
this run, versions, commit and command). Every result is compared with PyTorch's while it is measured.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from prefetch_offload_kernels import (
    Descriptor,
    Table,
    available,
    build_table,
    cast_unit,
    cast_unit_reference,
    pack_bf16,
    prepare,
)

MB = 1_000_000
SIZES_MB = (1, 4, 16, 64, 256, 1024)
ROW = 4096  # elements per scale, where there is one per row
TENSOR = 16 << 20  # elements of the unit's tensors: a projection of a large transformer; small units have eight tensors
GOAL_OF_COPY = 0.85
GOAL_OF_LINK = 6.0

F32, F16, BF16, E4M3, E5M2, I8 = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
)  # fmt: skip
# What a case is scaled by: nothing, a number for each tensor, or one for each row.
Scaling = Literal["", "tensor", "row"]
# name -> source, target, scaling
CASES: dict[str, tuple[torch.dtype | str, torch.dtype, Scaling]] = {
    "unpack bf16": ("packed", BF16, ""),
    "fp8 e4m3 x row scale -> bf16": (E4M3, BF16, "row"),
    "fp8 e4m3 -> bf16": (E4M3, BF16, ""),
    "fp32 -> bf16": (F32, BF16, ""),
    "fp16 -> fp32": (F16, F32, ""),
    "int8 x row scale -> fp16": (I8, F16, "row"),
    "copy bf16": (BF16, BF16, ""),
    "fp8 e4m3 x tensor scale -> bf16": (E4M3, BF16, "tensor"),
    "fp8 e5m2 x row scale -> bf16": (E5M2, BF16, "row"),
    "fp8 e5m2 -> fp16": (E5M2, F16, ""),
    "fp8 e4m3 x row scale -> fp32": (E4M3, F32, "row"),
    "int8 x tensor scale -> bf16": (I8, BF16, "tensor"),
    "int8 -> bf16": (I8, BF16, ""),
    "fp32 -> fp16": (F32, F16, ""),
    "bf16 -> fp32": (BF16, F32, ""),
}

# Seconds of one call of a function, on a quiet device.
Timer = Callable[[Callable[[], object]], float]


@dataclasses.dataclass
class Row:
    """One method on one unit.

    Attributes:
        target_nbytes: size of the unit as it is used.
        moved_nbytes: bytes that have to be read and written.
        seconds: of one call; median.
        gbps: moved_nbytes over seconds.
        of_copy: gbps over that of a device-to-device copy of as many bytes.
        of_link: the rate at which this takes in bytes that travelled, over the pinned link's.
        equal: whether the result is PyTorch's, bit for bit.
    """

    case: str
    method: str
    tensors: int
    target_nbytes: int
    moved_nbytes: int
    seconds: float
    gbps: float
    of_copy: float
    of_link: float
    equal: bool


@dataclasses.dataclass
class Unit:
    """Tensors to be cast: where they are, and where they go."""

    table: Table
    staging: torch.Tensor
    target: torch.Tensor
    sources: list[torch.Tensor]
    scales: list[torch.Tensor]
    results: list[torch.Tensor]

    @property
    def moved_nbytes(self) -> int:
        return sum(d.source_nbytes + d.target_nbytes + 4 * d.scales for d in self.table.descriptors)


def build_unit(case: str, target_nbytes: int, device: str) -> Unit:
    """A unit of `target_nbytes` or a little less on `device`, filled with weights of standard deviation 0.02."""
    source, target, scaling = CASES[case]
    total = target_nbytes // target.itemsize
    count = max(ROW, min(TENSOR, total // 8) // ROW * ROW)
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = pack_bf16(weights.to(BF16)) if source == "packed" else None
    channel = ROW if scaling == "row" else None  # None: all of a tensor
    scale = torch.rand(count // ROW if scaling == "row" else 1, generator=torch.Generator().manual_seed(1))
    if isinstance(source, torch.dtype):
        values = (weights * (2000 if source == I8 else 1)).to(source)
    else:
        assert packed is not None
        values = packed
    raw = values.view(torch.uint8)
    descriptors, pieces, offset = [], [], 0
    for index in range(max(1, total // count)):
        place = index * count * target.itemsize
        if packed is not None:
            descriptors.append(Descriptor.of_packed(packed, offset, place))
        else:
            assert isinstance(source, torch.dtype)
            scale_offset = offset + raw.numel() if scaling else None
            descriptors.append(Descriptor(offset, place, count, source, target, scale_offset, channel))
        pieces.append(raw)
        if scaling:
            pieces.append(scale.view(torch.uint8))
        offset += raw.numel() + (scale.nbytes if scaling else 0)
        pieces.append(torch.zeros(-offset % 256, dtype=torch.uint8))
        offset += -offset % 256
    staging = torch.empty(offset, dtype=torch.uint8, device=device)
    begin = 0
    for piece in pieces:
        staging[begin : begin + piece.numel()].copy_(piece)
        begin += piece.numel()
    table = build_table(descriptors, device)
    result = torch.empty(table.target_nbytes, dtype=torch.uint8, device=device)
    cut = [staging[d.source_offset : d.source_offset + d.source_nbytes] for d in descriptors]
    return Unit(
        table,
        staging,
        result,
        [part.view(source) if isinstance(source, torch.dtype) else part for part in cut],
        [staging[d.scale_offset :][: 4 * d.scales].view(F32) for d in descriptors if d.scale_offset is not None],
        [result[d.target_offset : d.target_offset + d.target_nbytes].view(target) for d in descriptors],
    )


def methods(unit: Unit) -> dict[str, Callable[[], object]]:
    """Ways to do it, by name. Each writes `unit.results`, except those by `Tensor.to`, which allocate their own."""

    def kernel() -> None:
        cast_unit(unit.table, unit.staging, unit.target)

    def reference() -> None:
        cast_unit_reference(unit.table, unit.staging, unit.target)

    def loop() -> None:
        for source, result in zip(unit.sources, unit.results, strict=True):
            result.copy_(source)

    def scaled_loop() -> None:
        for source, scale, result in zip(unit.sources, unit.scales, unit.results, strict=True):
            rows = scale.numel()
            result.view(rows, -1).copy_(source.view(rows, -1).to(F32).mul_(scale[:, None]))

    def scaled_to() -> list[torch.Tensor]:
        made = []
        for source, scale, result in zip(unit.sources, unit.scales, unit.results, strict=True):
            rows = scale.numel()
            made.append(source.view(rows, -1).to(F32).mul_(scale[:, None]).to(result.dtype).view(-1))
        return made

    def scaled_foreach() -> None:
        wide = [torch.empty_like(source, dtype=F32) for source in unit.sources]
        torch._foreach_copy_(wide, unit.sources)
        rows = [w.view(scale.numel(), -1) for w, scale in zip(wide, unit.scales, strict=True)]
        torch._foreach_mul_(rows, [scale[:, None] for scale in unit.scales])
        torch._foreach_copy_(unit.results, wide)

    def foreach() -> None:
        torch._foreach_copy_(unit.results, unit.sources)

    def to() -> list[torch.Tensor]:
        dtype = unit.results[0].dtype
        copied = unit.sources[0].dtype == dtype
        return [source.clone() if copied else source.to(dtype) for source in unit.sources]

    ways: dict[str, Callable[[], object]] = {"kernel": kernel}
    if isinstance(unit.table.descriptors[0].source, str):
        # No operator unpacks: beside those that together do, what it takes only to move as many bytes as come of it.
        reference()
        unpacked = _cut(unit, unit.target.clone())
        return {
            **ways,
            "PyTorch operators": reference,
            "_foreach_copy_ of the unpacked": lambda: torch._foreach_copy_(unit.results, unpacked),
        }
    if unit.scales:
        return {
            **ways,
            "loop of to, mul_, copy_": scaled_loop,
            "_foreach_copy_, _foreach_mul_": scaled_foreach,
            "Tensor.to, mul_, to": scaled_to,
        }
    return {**ways, "loop of copy_": loop, "_foreach_copy_": foreach, "Tensor.to": to}


def measure(case: str, target_nbytes: int, device: str, timer: Timer, link_gbps: float) -> Iterator[Row]:
    """Every method on one unit, each compared with the reference."""
    unit = build_unit(case, target_nbytes, device)
    cast_unit_reference(unit.table, unit.staging, unit.target)
    expected = unit.target.clone()
    prepare(unit.table)
    copy_gbps = measure_copy(unit.moved_nbytes // 2, device, timer)
    travelled = sum(d.source_nbytes + 4 * d.scales for d in unit.table.descriptors)
    for method, call in methods(unit).items():
        unit.target.zero_()
        made = call()
        if isinstance(made, list):
            equal = all(torch.equal(a, b) for a, b in zip(made, _cut(unit, expected), strict=True))
        else:
            equal = torch.equal(unit.target, expected)
        del made
        seconds = timer(call)
        yield Row(
            case,
            method,
            len(unit.sources),
            unit.target.numel(),
            unit.moved_nbytes,
            seconds,
            unit.moved_nbytes / seconds / 1e9,
            unit.moved_nbytes / seconds / 1e9 / copy_gbps,
            travelled / seconds / 1e9 / link_gbps,
            equal,
        )


def _cut(unit: Unit, target: torch.Tensor) -> list[torch.Tensor]:
    return [target[d.target_offset : d.target_offset + d.target_nbytes].view(d.target) for d in unit.table.descriptors]


def measure_copy(nbytes: int, device: str, timer: Timer) -> float:
    """GB/s read and written by a copy of so many bytes on the device."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / timer(lambda: target.copy_(source)) / 1e9


def measure_link(nbytes: int = 256 << 20) -> float:
    """GB/s of copies from pinned host memory, the best of five."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    rates = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        device.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(nbytes / (begin.elapsed_time(end) * 1e6))
    return float(max(rates[1:]))


def cuda_timer(call: Callable[[], object]) -> float:
    """The median of triton.testing.do_bench, which clears the L2 cache before every call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=60, return_mode="median")) / 1e3


def run_of(command: list[str]) -> str:
    """What a command says, or "unknown"."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def about(link_gbps: float, copy_gbps: float) -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": run_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
        "commit": run_of(["git", "rev-parse", "HEAD"]),
        "command": shlex.join(sys.argv),
        "link_gbps": link_gbps,
        "copy_gbps": copy_gbps,
        "goals": {"of_copy": GOAL_OF_COPY, "of_link, unpacking": GOAL_OF_LINK},
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    seconds: Annotated[float, typer.Option(help="Stop beginning new cases after so long.")] = 300.0,
    largest: Annotated[int, typer.Option(help="Largest unit, in MB as it is used.")] = SIZES_MB[-1],
) -> None:
    """Measure, print and write."""
    if not torch.cuda.is_available():
        typer.echo(
            "benchmarks.kernels measures a CUDA GPU, and there is none here. Run it where there is one.", err=True
        )
        raise typer.Exit(2)
    if not available("cuda"):
        typer.echo(
            "Triton does not run on this GPU (its floor is compute capability 8.0): no kernel to measure.", err=True
        )
        raise typer.Exit(2)
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    link_gbps = measure_link()
    copy_gbps = measure_copy(1 << 30, "cuda", cuda_timer)
    typer.echo(
        f"{torch.cuda.get_device_name()}: copies {copy_gbps:.0f} GB/s read and written, link {link_gbps:.1f} GB/s"
    )
    rows: list[Row] = []
    skipped: list[str] = []
    # The largest first: they are what the goals are about, if time runs out.
    for size in sorted((s for s in SIZES_MB if s <= largest), reverse=True):
        for case in CASES:
            if time.monotonic() > deadline or torch.cuda.mem_get_info()[0] < 16 * size * MB:
                skipped.append(f"{case}, {size} MB")
                continue
            for row in measure(case, size * MB, "cuda", cuda_timer, link_gbps):
                rows.append(row)
                typer.echo(
                    f"{size:5} MB  {case:32} {row.method:30} {row.seconds * 1e6:10.1f} us {row.gbps:7.0f} GB/s "
                    f"{row.of_copy:5.0%} of copy {row.of_link:6.1f} x link{'' if row.equal else '  DIFFERS'}"
                )
            torch.cuda.empty_cache()
    with (out / "kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    written = {**about(link_gbps, copy_gbps), "skipped": skipped, "rows": [dataclasses.asdict(row) for row in rows]}
    (out / "kernels.json").write_text(json.dumps(written, indent=1) + "\n")
    if skipped:
        typer.echo(f"Not measured, for want of time or memory: {'; '.join(skipped)}")
    if not all(row.equal for row in rows):
        typer.echo("Some results differ from PyTorch's.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
