"""Latency and memory of a pipeline in many modes (`benchmarks.modes`), in one run on one device.

    python -m benchmarks.offload --out DIR [--device cuda] [--model sdxl] [--steps 30 --steps 4] [--mode stock --mode ours:8GiB]

Modes take turns in each round, so that drift of clocks and temperature hits all of them alike; every visit builds its pipeline
anew. Writes offload.csv (a row per mode and step count; a mode that cannot run is a row that says why), offload.json (the
machine, the link as measured in this run, versions, commit and command) and a Perfetto trace of each of our modes. On the
simulated accelerator every row says so; so must who quotes it.
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
import traceback
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from diffusers import DiffusionPipeline

from prefetch_offload.commands import devices, link, running
from prefetch_offload.testing.pipelines import scaled

from . import models, modes

# What is compared unless modes are named. Peers that are not installed are rows that say so.
DEFAULT = ("resident", "stock", "ours:stock", "ours", *(m for m in modes.MODES if m not in ("resident", "stock")))
COMPILE = ("none", "regional", "whole")


@dataclasses.dataclass
class Row:
    """One mode at one step count. Seconds are over all timed calls of all rounds.

    Attributes:
        compile: what was compiled: nothing, the denoiser's repeated blocks, or the denoiser as one graph.
        first_s: the first call, of the first round.
        peak_allocated: the allocator's peak during the timed calls, less what was allocated before the mode began.
        peak_reserved: the same of what the allocator took from the driver.
        driver_nbytes: device memory in use by the driver's figure after the timed calls, contexts included.
        rss_nbytes, pinned_nbytes: host memory of the process, and what of it we have pinned.
        exposed_ms, hidden_ms: copy time per call that compute waited for, or did not; None where it is not known.
        link_gbps: bytes over busy time of the copy stream.
        graphs, recompiles: of the whole run; None where nobody counts.
        predicted_s, bound_s: a call by our plan, and the physical limit in that budget over the measured link.
        image: hash of the last image; `equal` compares it with the resident one.
        error: why there are no figures.
    """

    model: str
    mode: str
    compile: str
    steps: int
    simulated: bool
    first_s: float | None = None
    median_s: float | None = None
    q25_s: float | None = None
    q75_s: float | None = None
    slowest_s: float | None = None
    calls: int = 0
    rounds: int = 0
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    driver_nbytes: int | None = None
    rss_nbytes: int | None = None
    pinned_nbytes: int | None = None
    enable_s: float | None = None
    exposed_ms: float | None = None
    hidden_ms: float | None = None
    h2d_nbytes: int | None = None
    d2h_nbytes: int | None = None
    link_gbps: float | None = None
    graphs: int | None = None
    recompiles: int | None = None
    predicted_s: float | None = None
    bound_s: float | None = None
    image: str = ""
    equal: bool | None = None
    error: str = ""
    times: list[float] = dataclasses.field(default_factory=list, repr=False)

    def took(self, seconds: list[float]) -> None:
        """So many more timed calls."""
        self.times += seconds
        self.calls, self.rounds = len(self.times), self.rounds + 1
        ordered = sorted(self.times)
        quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
        self.q25_s, self.median_s, self.q75_s = quartiles[0], statistics.median(ordered), quartiles[2]
        self.slowest_s = ordered[-1]

    def record(self) -> dict[str, Any]:
        """As written: without the single times."""
        found = dataclasses.asdict(self)
        del found["times"]
        return found


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is run: a built-in model, or a folder or hub id; step counts; what is compiled; timed calls of a visit."""

    model: str
    steps: tuple[int, ...]
    compile: str
    calls: int
    device: torch.device

    @property
    def small(self) -> bool:
        return self.model in SMALL

    @property
    def simulated(self) -> bool:
        return devices.simulator(self.device) is not None


# Small versions of the same, for a machine without a GPU.
SMALL = {
    "flux-small": {"width": 192, "layers": 4, "text_width": 192, "text_layers": 8},
    "sdxl-small": {"width": 64},
}


def build(model: str) -> DiffusionPipeline:
    if model in models.PIPELINES:
        return models.PIPELINES[model]()
    if model in SMALL:
        return scaled(model.removesuffix("-small"), **SMALL[model]).build()
    return models.silent(running.load(model, torch.bfloat16))


def call(pipe: DiffusionPipeline, model: str, steps: int) -> np.ndarray:
    size = 64 if model in SMALL else 1024
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = {"height": size, "width": size, "num_inference_steps": steps, "generator": generator, "output_type": "np"}
    if model == "flux-small":
        inputs["max_sequence_length"] = 32
    return np.asarray(pipe("a serene lake at dawn", **inputs).images)


def visit(scenario: Scenario, mode: str, rows: dict[int, Row], out: Path) -> None:
    """One visit to one mode, on a fresh pipeline: its figures go into `rows`, by step count."""
    device = scenario.device
    module: Any = torch.get_device_module(device)
    gc.collect()
    module.empty_cache()
    before = module.memory_allocated(device)
    pipe = build(scenario.model)
    start = time.perf_counter()
    settings = {"unit_min": 64 << 10, "unit_max": 512 << 10} if scenario.small else {}
    offload = modes.place(mode, pipe, device, **(settings if mode.startswith("ours") else {}))
    enable_s = time.perf_counter() - start
    if scenario.compile != "none":
        torch._dynamo.reset()  # what the mode before has compiled would do for this one
        _, denoiser = modes.largest(pipe)
        # Inductor has no code for the simulated accelerator.
        options: dict[str, Any] = {"fullgraph": True, **({"backend": "aot_eager"} if scenario.simulated else {})}
        if scenario.compile == "regional":
            denoiser.compile_repeated_blocks(**options)
        else:
            denoiser.compile(**options)

    def timed(steps: int) -> tuple[float, np.ndarray]:
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        image = call(pipe, scenario.model, steps)
        torch.accelerator.synchronize(device)
        return time.perf_counter() - start, image

    try:
        for steps in scenario.steps:
            row = rows[steps]
            first, image = timed(steps)
            timed(steps)  # the second call of ours is the first with a plan
            module.reset_peak_memory_stats(device)
            stats = offload.stats if offload is not None else None
            times = []
            for _ in range(scenario.calls):
                seconds, image = timed(steps)
                times.append(seconds)
            if row.first_s is None:
                row.first_s, row.enable_s = first, enable_s
            row.took(times)
            row.peak_allocated = max(row.peak_allocated or 0, module.max_memory_allocated(device) - before)
            row.peak_reserved = max(row.peak_reserved or 0, module.max_memory_reserved(device))
            free, total = module.mem_get_info(device)
            row.driver_nbytes = max(row.driver_nbytes or 0, total - free)
            row.rss_nbytes = max(row.rss_nbytes or 0, psutil.Process().memory_info().rss)
            image_hash = hashlib.sha256(image.tobytes()).hexdigest()[:16]
            if row.image and row.image != image_hash:
                row.error = "its own images differ"
            row.image = image_hash
            if offload is not None and stats is not None:
                _ours(row, stats, offload.stats, scenario.calls)
            print(f"{mode}, {steps} steps: {row.median_s:.3f} s, peak {row.peak_allocated / 2**30:.2f} GiB", flush=True)
        if offload is not None:
            name = f"{scenario.model}-{mode}-{scenario.compile}".replace(":", "-").replace("/", "-")
            offload.trace(out / f"trace-{name}.json")
            (out / "reports.txt").open("a").write(f"{scenario.model}, {mode}, {scenario.compile}\n{offload.report()}\n")
    finally:
        if offload is not None:
            offload.disable()
        elif mode == "stock":
            pipe.remove_all_hooks()


def _ours(row: Row, stats: Any, later: Any, calls: int) -> None:
    row.exposed_ms = (sum(c.exposed_ms for c in later.components) - sum(c.exposed_ms for c in stats.components)) / calls
    row.hidden_ms = (sum(c.hidden_ms for c in later.components) - sum(c.hidden_ms for c in stats.components)) / calls
    row.h2d_nbytes = (later.h2d_nbytes - stats.h2d_nbytes) // calls
    row.d2h_nbytes = (later.d2h_nbytes - stats.d2h_nbytes) // calls
    row.link_gbps, row.pinned_nbytes = later.link_gbps, later.pinned_nbytes
    compiled = [c for c in later.components if getattr(c, "graphs", None)]
    if compiled:
        row.graphs = sum(c.graphs for c in compiled)
        row.recompiles = sum(len(c.recompiles) for c in compiled)
    if later.last_call:
        row.predicted_s, row.bound_s = _seconds(later.last_call.predicted_ms), _seconds(later.last_call.bound_ms)


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
        "versions": {p: metadata.version(p) for p in ("torch", "diffusers", "accelerate", "transformers")}
        | modes.versions(),
        "commit": commit or None,
        "command": shlex.join(["python", "-m", "benchmarks.offload", *sys.argv[1:]]),
    }


def main(
    out: Annotated[Path, typer.Option(help="folder for the results")],
    device: Annotated[str | None, typer.Option(help="cuda, xpu, simgpu; found when left out")] = None,
    model: Annotated[str, typer.Option(help="sdxl, sd3, flux, sdxl-small, flux-small, a folder or a hub id")] = "sdxl",
    steps: Annotated[list[int] | None, typer.Option()] = None,
    mode: Annotated[list[str] | None, typer.Option(help="see benchmarks.modes; can be repeated")] = None,
    compile: Annotated[str, typer.Option(help="none, regional or whole")] = "none",
    rounds: Annotated[int, typer.Option(min=1, help="visits to each mode, in turns")] = 2,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of a visit")] = 3,
    seconds: Annotated[float, typer.Option(help="begin no visit after so long")] = 1e9,
) -> None:
    """Measure modes in turns and write the results."""
    started = time.monotonic()
    chosen = list(mode or DEFAULT)
    for name in chosen:
        modes.check(name)
    if compile not in COMPILE:
        raise typer.BadParameter(f"--compile {compile}: {', '.join(COMPILE)}")
    out.mkdir(parents=True, exist_ok=True)
    where = devices.pick(None if device == "simgpu" else device, simulate=device == "simgpu")
    scenario = Scenario(model, tuple(steps or [30, 4]), compile, calls, where)
    record: dict[str, Any] = {"machine": machine(where, link.measure(where))}
    rows = {m: {s: Row(model, m, compile, s, scenario.simulated) for s in scenario.steps} for m in chosen}
    failed = False
    for number in range(rounds):
        for name in chosen:
            mine = rows[name]
            if any(r.error for r in mine.values()):
                continue
            if time.monotonic() - started > seconds:
                for row in mine.values():
                    row.error = row.error or ("" if row.calls else "out of time")
                continue
            try:
                visit(scenario, name, mine, out)
            except Exception as error:  # a mode that fails is a row that says so
                for row in mine.values():
                    row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                failed |= name.startswith("ours") or name == "resident"
                print(f"{name} failed: {error}", flush=True)
                if not isinstance(error, modes.NotHere):
                    (out / "errors.txt").open("a").write(f"{name}\n{traceback.format_exc()}\n")
            truth = {s: r.image for s, r in rows.get("resident", {}).items() if r.image}
            for row in (r for some in rows.values() for r in some.values()):
                row.equal = row.image == truth[row.steps] if row.image and row.steps in truth else None
            write(out, [r for some in rows.values() for r in some.values()], record, number + 1)
    if failed or any(r.equal is False for n, some in rows.items() if n.startswith("ours") for r in some.values()):
        raise typer.Exit(1)


def write(out: Path, rows: list[Row], record: dict[str, Any], rounds: int) -> None:
    """After each visit: what is there stays there."""
    found = [r.record() for r in rows]
    with (out / "offload.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    record |= {"rounds begun": rounds, "rows": found}
    (out / "offload.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
