"""What PyTorch's allocator makes of weights that come and go, on a device that has little more than the budget.

    python -m benchmarks.pieces                          # SDXL in 5 GiB, a device of 24 GiB and one of 5.5
    python -m benchmarks.pieces --model flux --gib 16

For each device a table: with expandable segments, and without; for each call, what was reserved at most, how often the
allocator gave back what it had cached (the host waits for that), and how often memory ran out within. The first line has what
it was measured on. The device's limit is set by `torch.cuda.set_per_process_memory_fraction`.
"""

from __future__ import annotations

import gc
import time
import warnings
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline

import prefetch_offload
from prefetch_offload import segments
from prefetch_offload.commands import devices
from prefetch_offload.config import GIB

from .models import PIPELINES


def measure(pipe: DiffusionPipeline, budget: int, room: int, together: bool, calls: int, steps: int, size: int) -> list[str]:
    """Rows of the table: the pipeline called in `budget` while the process may take `room` bytes. The pipeline is as before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / torch.cuda.mem_get_info()[1]))
    rows = []
    with prefetch_offload.enable(pipe, budget=budget, expandable_segments=together) as offload:
        on = segments.put_together()
        for number in range(1, calls + 1):
            torch.cuda.reset_peak_memory_stats()
            before, ladder = torch.cuda.memory_stats(), offload.stats.counts.get("ladder", 0)
            start, why = time.perf_counter(), ""
            try:
                pipe("a serene lake", num_inference_steps=steps, height=size, width=size)
            except torch.OutOfMemoryError:
                why = "; no image"
            seconds = time.perf_counter() - start
            after = torch.cuda.memory_stats()
            retries = after["num_alloc_retries"] - before["num_alloc_retries"]
            ladder = offload.stats.counts.get("ladder", 0) - ladder
            allocated, reserved = (after[f"{what}_bytes.all.peak"] / GIB for what in ("allocated", "reserved"))
            cells = (number, f"{allocated:.2f}", f"{reserved:.2f}", retries, f"{ladder}{why}", f"{seconds:.2f}")
            rows.append(f"| {'expandable' if on else 'as PyTorch comes'} | {' | '.join(map(str, cells))} |")
    torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(PIPELINES)}")] = "sdxl",
    gib: Annotated[float, typer.Option(help="the budget")] = 5.0,
    free: Annotated[float, typer.Option(help="GiB that the smaller device has beyond the budget")] = 0.5,
    calls: Annotated[int, typer.Option(help="in a row")] = 6,
    steps: Annotated[int, typer.Option(help="of each call")] = 3,
    size: Annotated[int, typer.Option(help="of the image, in pixels")] = 1024,
) -> None:
    """Print the tables."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; over a stand-in for one: tests/cuda_standin/README.md")
    device = torch.device("cuda", torch.cuda.current_device())
    name = devices.describe(device)
    print(f"{name}, torch {torch.__version__}{'; simulated' if 'stand-in' in name else ''}. {model}, {size} x {size}, ", end="")
    print(f"{steps} steps, budget {gib} GiB.", flush=True)
    warnings.simplefilter("ignore", prefetch_offload.OffloadWarning)  # of what the first call takes, which is not the point
    pipe = PIPELINES[model]()
    budget, whole = int(gib * GIB), int(torch.cuda.mem_get_info()[1])
    for room in (whole, budget + int(free * GIB)):
        print(f"\nThe process may take {room / GIB:.1f} GiB:\n")
        print("| segments | call | in use GiB | reserved GiB | given back | ran out | s |\n|---|---|---|---|---|---|---|")
        for together in (True, False):
            print("\n".join(measure(pipe, budget, room, together, calls, steps, size)), flush=True)


if __name__ == "__main__":
    typer.run(main)
