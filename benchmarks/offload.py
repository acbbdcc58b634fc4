"""Latency and memory of a pipeline, resident, under stock model offload and under ours, in one run on one device.

    python -m benchmarks.offload --out DIR [--device cuda] [--model sdxl] [--steps 30 --steps 4] [--budget 8GiB]

Writes offload.csv (a row per mode and step count), offload.json (the machine, the link as measured in this run, versions,
commit and command) and a Perfetto trace of each of our modes. On the simulated accelerator every row says so; so must who
quotes it.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline

import prefetch_offload
from prefetch_offload.commands import devices, link

MODES = ("resident", "stock", "ours, stock's memory", "ours, default")


@dataclasses.dataclass
class Row:
    """One mode at one step count. Seconds are medians over `rounds` calls after `warm_up` calls.

    Attributes:
        peak_allocated: the allocator's peak during the timed calls, less what was allocated before the mode began.
        peak_reserved: the same of what the allocator took from the driver, from zero.
        exposed_ms: time per call that compute waited for copies; None where it is not known.
        link_gbps: bytes over busy time of the copy stream.
        predicted_s, bound_s: a call by our plan, and the physical limit in that budget over the measured link.
        image: hash of the last image; `equal` compares it with the resident one.
    """

    model: str
    mode: str
    steps: int
    first_s: float
    median_s: float
    slowest_s: float
    rounds: int
    warm_up: int
    peak_allocated: int
    peak_reserved: int
    exposed_ms: float | None
    hidden_ms: float | None
    h2d_nbytes: int | None
    link_gbps: float | None
    enable_s: float
    pinned_nbytes: int
    image: str
    equal: bool | None
    simulated: bool
    predicted_s: float | None = None
    bound_s: float | None = None


def build(model: str) -> DiffusionPipeline:
    if model == "sdxl":
        from . import models

        return models.sdxl()
    if model == "flux":
        from .flux import flux

        return flux()
    if model == "flux-small":
        from prefetch_offload.testing.pipelines import scaled

        return scaled("flux", width=192, layers=4, text_width=192, text_layers=8).build()
    if model == "sdxl-small":
        from prefetch_offload.testing.pipelines import scaled

        return scaled("sdxl", width=64).build()
    raise typer.BadParameter(f"{model!r} is not known: sdxl, flux, sdxl-small or flux-small")


def call(pipe: DiffusionPipeline, model: str, steps: int) -> np.ndarray:
    size = 64 if model.endswith("small") else 1024
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = {"height": size, "width": size, "num_inference_steps": steps, "generator": generator, "output_type": "np"}
    if model == "flux-small":
        inputs["max_sequence_length"] = 32
    return np.asarray(pipe("a serene lake at dawn", **inputs).images)


def measure(model: str, mode: str, steps_list: list[int], device: torch.device, rounds: int, out: Path) -> list[Row]:
    """All step counts of one mode, on a fresh pipeline."""
    module: Any = torch.get_device_module(device)
    gc.collect()
    module.empty_cache()
    before = module.memory_allocated(device)
    pipe = build(model)
    start = time.perf_counter()
    offload = None
    if mode == "resident":
        pipe.to(device)
    elif mode == "stock":
        pipe.enable_model_cpu_offload(device=device)
    else:
        budget = "stock" if "stock" in mode else None if "default" in mode else mode.removeprefix("ours, ")
        small = {"unit_min": 64 << 10, "unit_max": 512 << 10} if model.endswith("small") else {}
        offload = prefetch_offload.enable(pipe, device=device, budget=budget, **small)
    enable_s = time.perf_counter() - start

    def timed(steps: int) -> tuple[float, np.ndarray]:
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        image = call(pipe, model, steps)
        torch.accelerator.synchronize(device)
        return time.perf_counter() - start, image

    rows = []
    for steps in steps_list:
        first, image = timed(steps)
        warm_up = 2
        for _ in range(warm_up - 1):
            timed(steps)
        module.reset_peak_memory_stats(device)
        stats = offload.stats if offload is not None else None
        times = []
        for _ in range(rounds):
            seconds, image = timed(steps)
            times.append(seconds)
        later = offload.stats if offload is not None else None
        exposed = hidden = moved = gbps = None
        if stats is not None and later is not None:
            exposed = sum(c.exposed_ms for c in later.components) - sum(c.exposed_ms for c in stats.components)
            hidden = sum(c.hidden_ms for c in later.components) - sum(c.hidden_ms for c in stats.components)
            moved = (later.h2d_nbytes - stats.h2d_nbytes) // rounds
            gbps = later.link_gbps
        rows.append(
            Row(
                model=model,
                mode=mode,
                steps=steps,
                first_s=first,
                median_s=statistics.median(times),
                slowest_s=max(times),
                rounds=rounds,
                warm_up=warm_up,
                peak_allocated=module.max_memory_allocated(device) - before,
                peak_reserved=module.max_memory_reserved(device),
                exposed_ms=None if exposed is None else exposed / rounds,
                hidden_ms=None if hidden is None else hidden / rounds,
                h2d_nbytes=moved,
                link_gbps=gbps,
                enable_s=enable_s,
                pinned_nbytes=later.pinned_nbytes if later is not None else 0,
                image=hashlib.sha256(image.tobytes()).hexdigest()[:16],
                equal=None,
                simulated=devices.simulator(device) is not None,
                predicted_s=_seconds(later.last_call.predicted_ms) if later is not None and later.last_call else None,
                bound_s=_seconds(later.last_call.bound_ms) if later is not None and later.last_call else None,
            )
        )
        print(
            f"{mode}, {steps} steps: {rows[-1].median_s:.3f} s, peak {rows[-1].peak_allocated / 2**30:.2f} GiB",
            flush=True,
        )
    if offload is not None:
        offload.trace(out / f"trace-{model}-{mode.replace(', ', '-').replace(' ', '-').replace(chr(39), '')}.json")
        (out / "reports.txt").open("a").write(f"{model}, {mode}\n{offload.report()}\n")
        offload.disable()
    elif mode == "stock":
        pipe.remove_all_hooks()
    return rows


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def machine(device: torch.device, gbps: link.Link) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    driver = None
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": devices.describe(device),
        "link": dataclasses.asdict(gbps),
        "driver": driver,
        "python": sys.version.split()[0],
        "versions": {p: metadata.version(p) for p in ("torch", "diffusers", "accelerate", "transformers")},
        "commit": commit or None,
        "command": shlex.join(["python", "-m", "benchmarks.offload", *sys.argv[1:]]),
    }


def main(
    out: Annotated[Path, typer.Option(help="folder for the results")],
    device: Annotated[str | None, typer.Option(help="cuda, xpu, simgpu; found when left out")] = None,
    model: str = "sdxl",
    steps: Annotated[list[int] | None, typer.Option()] = None,
    rounds: int = 3,
    budget: Annotated[list[str] | None, typer.Option(help="ours in this budget, too, as 8GiB; can be repeated")] = None,
    only: Annotated[list[str] | None, typer.Option(help="these modes instead of all: resident, stock, ...")] = None,
) -> None:
    """Measure all modes and write the results."""
    modes = [*(only if only is not None else MODES), *(f"ours, {b}" for b in budget or [])]
    out.mkdir(parents=True, exist_ok=True)
    where = devices.pick(None if device == "simgpu" else device, simulate=device == "simgpu")
    record: dict[str, Any] = {"machine": machine(where, link.measure(where))}
    rows: list[Row] = []
    for mode in modes:
        try:
            rows += measure(model, mode, steps or [30, 4], where, rounds, out)
        except Exception as error:  # a mode that fails is a row that says so
            record.setdefault("failed", {})[mode] = f"{type(error).__name__}: {error}"
            print(f"{mode} failed: {error}", flush=True)
        truth = {r.steps: r.image for r in rows if r.mode == "resident"}
        for row in rows:
            row.equal = row.image == truth[row.steps] if row.steps in truth else None
        with (out / "offload.csv").open("w", newline="") as file:  # after each mode: what is there stays there
            if rows:
                writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
                writer.writeheader()
                writer.writerows(map(dataclasses.asdict, rows))
        record["rows"] = [dataclasses.asdict(r) for r in rows]
        (out / "offload.json").write_text(json.dumps(record, indent=1))
    if "failed" in record or any(r.equal is False for r in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
