"""The kernels that cast and unpack a unit, against PyTorch's own ways, on a GPU.

    python -m benchmarks.kernels --out DIR [--seconds 300] [--size 1024 --size 64]

Writes kernels.csv (a row per case, size and method) and kernels.json (the GPU, its copy bandwidth and its link as measured in
this run, versions, commit and command), after every case. Called again it measures what is missing there; rows of another GPU,
other versions or another commit are measured anew. Every result is compared with PyTorch's while it is measured.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prefetch_offload_kernels import available, cast_unit_reference, prepare

from . import origin
from .kernel_cases import CASES, MB, build_unit, cut, methods

SIZES_MB = (1024, 256, 64, 16, 4, 1)  # the goals are about the largest
GOAL_OF_COPY = 0.85
GOAL_OF_LINK = 6.0
UNFINISHED = 3

# Seconds of one call of a function, on a quiet device.
Timer = Callable[[Callable[[], object]], float]


@dataclasses.dataclass
class Row:
    """One method on one unit.

    Attributes:
        size_mb: size of the unit, about, as it was asked for.
        target_nbytes: its size as it is used.
        moved_nbytes: bytes that have to be read and written.
        seconds: of one call; median.
        gbps: moved_nbytes over seconds.
        of_copy: gbps over that of a device-to-device copy of as many bytes.
        of_link: the rate at which this takes in bytes that travelled, over the pinned link's.
        equal: whether the result is PyTorch's, bit for bit.
    """

    case: str
    size_mb: int
    method: str
    tensors: int
    target_nbytes: int
    moved_nbytes: int
    seconds: float
    gbps: float
    of_copy: float
    of_link: float
    equal: bool


def measure(case: str, size_mb: int, device: str, timer: Timer, link_gbps: float) -> Iterator[Row]:
    """Every method on one unit, each compared with the reference."""
    unit = build_unit(case, size_mb * MB, device)
    cast_unit_reference(unit.table, unit.staging, unit.target)
    expected = unit.target.clone()
    prepare(unit.table)
    copy_gbps = measure_copy(unit.moved_nbytes // 2, device, timer)
    travelled = sum(d.source_nbytes + 4 * d.scales for d in unit.table.descriptors)
    for method, call in methods(unit).items():
        unit.target.zero_()
        made = call()
        if isinstance(made, list):
            equal = all(torch.equal(a, b) for a, b in zip(made, cut(unit.table, expected), strict=True))
        else:
            equal = torch.equal(unit.target, expected)
        del made
        seconds = timer(call)
        yield Row(
            case,
            size_mb,
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


def about(out: Path, link_gbps: float, copy_gbps: float) -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": origin.driver(),
        "cuda": torch.version.cuda,
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
        "commit": origin.commit(),
        "command": origin.command("benchmarks.kernels", out),
        "link_gbps": link_gbps,
        "copy_gbps": copy_gbps,
        "goals": {"of_copy": GOAL_OF_COPY, "of_link, unpacking": GOAL_OF_LINK},
    }


def kept(path: Path, here: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run of the same program on the same GPU."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    if any(earlier[what] != here[what] for what in ("gpu", "driver", "versions", "commit")):
        return []
    return [Row(**row) for row in earlier["rows"]]


def write(out: Path, here: dict[str, Any], rows: list[Row], skipped: list[str]) -> None:
    """Both files, each replaced in one go."""
    shown = [dataclasses.asdict(row) for row in rows]
    with (out / ".kernels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(shown)
    (out / ".kernels.json").write_text(json.dumps({**here, "skipped": skipped, "rows": shown}, indent=1) + "\n")
    for name in ("kernels.csv", "kernels.json"):
        os.replace(out / f".{name}", out / name)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results; what is in it is completed.")],
    seconds: Annotated[float, typer.Option(help="Stop beginning new cases after so long.")] = 300.0,
    size: Annotated[list[int] | None, typer.Option(help="Units of about so many MB as they are used.")] = None,
) -> None:
    """Measure, print and write. Exit code 1: a result is not PyTorch's; 3: out of time, and the same command goes on; 2: it
    could not begin."""
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
    here = about(out, link_gbps, copy_gbps)
    rows = kept(out / "kernels.json", here)
    done = {(row.case, row.size_mb) for row in rows}
    late: list[str] = []
    too_large: list[str] = []
    for one in dict.fromkeys(size or SIZES_MB):
        for case in CASES:
            if (case, one) in done:
                continue
            if torch.cuda.mem_get_info()[0] < 16 * one * MB:
                too_large.append(f"{case}, {one} MB")
                continue
            if time.monotonic() > deadline:
                late.append(f"{case}, {one} MB")
                continue
            some = list(measure(case, one, "cuda", cuda_timer, link_gbps))
            for row in some:
                typer.echo(
                    f"{one:5} MB  {case:50} {row.method:30} {row.seconds * 1e6:10.1f} us {row.gbps:7.0f} GB/s "
                    f"{row.of_copy:5.0%} of copy {row.of_link:6.1f} x link{'' if row.equal else '  DIFFERS'}"
                )
            rows += some
            write(out, here, rows, too_large)
            torch.cuda.empty_cache()
    write(out, here, rows, too_large + late)
    for skipped, why in ((too_large, "memory"), (late, "time")):
        if skipped:
            typer.echo(f"Not measured, for want of {why}: {'; '.join(skipped)}")
    if not all(row.equal for row in rows):
        typer.echo("Some results differ from PyTorch's.", err=True)
        raise typer.Exit(1)
    if late:
        raise typer.Exit(UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
