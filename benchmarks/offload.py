"""Latency and memory of a pipeline in many modes (`benchmarks.modes`), in one run on one device.

    python -m benchmarks.offload --out DIR [--device cuda] [--model sdxl] [--steps 30 --steps 4] [--mode stock --mode ours:8GiB]

Modes take turns in each round, so that drift of clocks and temperature hits all of them alike; every visit builds its pipeline
anew, except for those that `--keep` hands it on to (`benchmarks.shelf`). Writes offload.csv (a row per mode and step count, see
`benchmarks.rows`; a mode that cannot run is a row that says why), offload.json (the same, with what the machine of each run
was) and a Perfetto trace of each of our modes.

What offload.csv in DIR has already stays, and only what is missing is run: the rest after a run that was stopped, or other
modes and step counts. A mode that a run was stopped in comes last. What ours or resident failed at, and rows of another GPU
or of other versions, are measured anew. On the simulated accelerator every row says so; so must who quotes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline

from prefetch_offload.commands import devices, link, running
from prefetch_offload.commands.models import check_dtype
from prefetch_offload.config import LOSSLESS, MIB, parse_nbytes
from prefetch_offload.errors import SettingError
from prefetch_offload.testing.pipelines import scaled

from . import models, modes, origin, watch
from .rows import KEY, Row, read, write
from .shelf import Shelf

# What is compared unless modes are named. Peers that are not installed are rows that say so.
DEFAULT = ("resident", "stock", "ours:stock", "ours", *(m for m in modes.MODES if m not in ("resident", "stock")))
COMPILE = ("none", "regional", "whole")
LATE = "out of time"
STOPPED = "did not end"  # what a row says while it is measured: who is killed or runs out of time leaves it so
EXIT_UNFINISHED = 3


class Late(BaseException):
    """Time is up while a mode is measured. No `Exception`, so that nobody else takes it for theirs."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Late` in the block once so much time has passed."""

    def ring(*_: object) -> None:
        raise Late

    if seconds > 1e6:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model (built-in, a folder or a hub id), its dtype and image size, what is compiled, and timed calls of a visit, which
    makes no further one once they have taken `enough_s`."""

    model: str
    dtype: str
    height: int
    width: int
    compile: str
    calls: int
    device: torch.device
    enough_s: float = math.inf

    @property
    def simulated(self) -> bool:
        return devices.simulator(self.device) is not None

    def row(self, mode: str, steps: int) -> Row:
        """Its row, without figures."""
        return Row(
            self.model, mode, self.compile, steps, self.simulated, self.height, self.width, self.dtype, _budget_of(mode)
        )


# Small versions of the same, for a machine without a GPU.
SMALL: dict[str, dict[str, int]] = {
    "flux-small": {"width": 192, "layers": 4, "text_width": 192, "text_layers": 8},
    "sdxl-small": {"width": 64},
    "sd3-small": {"width": 64},
}


def _budget_of(mode: str) -> str:
    name, budget, _ = modes.parts(mode)
    return budget or ("default" if name == "ours" else "")


def default_dtype(model: str) -> str:
    return "float32" if model in SMALL else "float16" if model in ("sdxl", "sd3") else "bfloat16"


def build(scenario: Scenario) -> DiffusionPipeline:
    model, dtype = scenario.model, getattr(torch, scenario.dtype)
    if model in models.PIPELINES:
        return models.PIPELINES[model](dtype)
    if model in SMALL:
        return scaled(model.removesuffix("-small"), **SMALL[model]).build(dtype)
    return models.silent(running.load(model, dtype))


def call(pipe: DiffusionPipeline, scenario: Scenario, steps: int) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
    if scenario.model in ("flux-small", "sd3-small"):
        inputs["max_sequence_length"] = 32
    size = {"height": scenario.height, "width": scenario.width}
    return np.asarray(pipe("a serene lake at dawn", **size, **inputs).images)


def visit(
    scenario: Scenario,
    mode: str,
    rows: list[Row],
    limit: int | None,
    out: Path,
    done: Callable[[Row], None],
    shelf: Shelf,
) -> None:
    """One visit to one mode, on the pipeline that `shelf` has for it, with at most `limit` bytes of the device: its figures go
    into `rows`, one for each step count, and `done` hears of each."""
    device = scenario.device
    module: Any = torch.get_device_module(device)
    shelf.make_room(mode)
    watch.settle(device)
    with modes.limited(device, limit) as taken:
        before, before_reserved = module.memory_allocated(device), module.memory_reserved(device)
        try:
            pipe, offload, enable_s = shelf.take(mode, limit)
            _compile(pipe, scenario)
            compiled = watch.compiles()

            def timed(steps: int) -> tuple[float, np.ndarray]:
                torch.accelerator.synchronize(device)
                start = time.perf_counter()
                image = call(pipe, scenario, steps)
                torch.accelerator.synchronize(device)
                return time.perf_counter() - start, image

            for number, row in enumerate(rows):
                first: float | None = None
                # Other step counts have the same shapes: only what is planned or compiled is new.
                warm = number == 0 or scenario.compile != "none" or offload is not None
                for _ in range(modes.warm_calls(mode, row.steps) if number == 0 else int(warm)):
                    seconds, _image = timed(row.steps)
                    first = first or seconds
                module.reset_peak_memory_stats(device)
                stats, copied = offload.stats if offload is not None else None, watch.copied_nbytes(device)
                times = []
                with watch.Peaks(device) as peaks:
                    while len(times) < scenario.calls and sum(times) < scenario.enough_s:
                        seconds, image = timed(row.steps)
                        times.append(seconds)
                if number == 0 and row.first_s is None and enable_s is not None:
                    row.first_s = first or times[0]
                row.enable_s = row.enable_s or enable_s
                row.took(times)
                reserved = module.max_memory_reserved(device) - before_reserved
                sampled = None if peaks.device_nbytes is None else peaks.device_nbytes - taken
                row.most(
                    peak_allocated=module.max_memory_allocated(device) - before,
                    peak_reserved=reserved,
                    driver_nbytes=None if sampled is None else max(sampled, reserved),  # samples may miss it
                    rss_nbytes=None if shelf.shared else peaks.rss_nbytes,
                    pinned_nbytes=watch.pinned_nbytes(device),
                )
                if copied is not None:
                    now = watch.copied_nbytes(device) or copied
                    row.h2d_nbytes, row.d2h_nbytes = (
                        (b - a) // len(times) for a, b in zip(copied, now, strict=True)
                    )
                if scenario.compile != "none" and compiled is not None:
                    later = watch.compiles() or compiled
                    row.graphs, row.recompiles = (b - a for a, b in zip(compiled, later, strict=True))
                if offload is not None and stats is not None:
                    _ours(row, stats, offload, len(times))
                image_hash = hashlib.sha256(image.tobytes()).hexdigest()[:16]
                row.error = "its own images differ" if row.image not in ("", image_hash) else ""
                row.image = image_hash
                peak = (row.peak_allocated or 0) / 2**30
                print(f"{mode}, {row.steps} steps: {row.median_s:.3f} s, peak {peak:.2f} GiB", flush=True)
                done(row)
            if offload is not None:
                steps = "-".join(str(row.steps) for row in rows)
                name = f"{scenario.model}-{mode}-{scenario.compile}-{steps}".replace(":", "-").replace("/", "-")
                offload.trace(out / f"trace-{name}.json")
                with (out / "reports.txt").open("a") as reports:
                    reports.write(f"{scenario.model}, {mode}, {scenario.compile}, {steps}\n{offload.report()}\n")
        except BaseException:
            shelf.clear()
            raise
        shelf.put_back()


def _compile(pipe: DiffusionPipeline, scenario: Scenario) -> None:
    if scenario.compile == "none":
        return
    torch._dynamo.reset()  # what the mode before has compiled would do for this one
    _, denoiser = modes.largest(pipe)
    # Inductor has no code for the simulated accelerator; what Dynamo does is all that is to be seen there.
    options: dict[str, Any] = {"fullgraph": True, **({"backend": "eager"} if scenario.simulated else {})}
    (denoiser.compile_repeated_blocks if scenario.compile == "regional" else denoiser.compile)(**options)


def _ours(row: Row, stats: Any, offload: Any, calls: int) -> None:
    """What only we record, in place of what could be told from outside."""
    later = offload.stats
    row.h2d_nbytes = (later.h2d_nbytes - stats.h2d_nbytes) // calls
    row.d2h_nbytes = (later.d2h_nbytes - stats.d2h_nbytes) // calls
    row.pinned_nbytes = later.pinned_nbytes
    found = watch.copies(offload.timeline(), calls)
    if found is not None:
        row.exposed_ms, row.hidden_ms, row.copy_gbps = found
    if later.last_call:
        row.predicted_s, row.bound_s = _seconds(later.last_call.predicted_ms), _seconds(later.last_call.bound_ms)


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def processor() -> str:
    """The host's, and how many of its cores are here."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def machine(device: torch.device, out: Path) -> dict[str, Any]:
    """What the figures depend on, by the names of a row's columns; and `peers`, their versions."""
    # A simulated link does not vary, and may be slow.
    measured = link.measure(device, 256 * MIB if devices.simulator(device) is None else 8 * MIB)
    versions = [f"{p} {metadata.version(p)}" for p in ("torch", "diffusers", "accelerate", "transformers")]
    return {
        "gpu": devices.describe(device),
        "host": processor(),
        "link_gbps": measured.h2d_pinned_gbps or measured.h2d_pageable_gbps,
        "driver": origin.driver() if device.type == "cuda" else "",
        "versions": ", ".join([*versions, f"python {sys.version.split()[0]}"]),
        "commit": origin.commit(),
        "command": origin.command("benchmarks.offload", out),
        "link": dataclasses.asdict(measured),
        "peers": modes.versions(),
    }


def ours_fails(row: Row) -> bool:
    """A row that must not be: ours without figures or with another image, or resident without, but for a model too large."""
    name, _, transport = modes.parts(row.mode)
    if name not in ("resident", "ours") or (name == "resident" and row.error.startswith("OutOfMemoryError")):
        return False
    return row.error not in ("", LATE, STOPPED) or (row.equal is False and (transport or "raw") in LOSSLESS)


def limit_of(mode: str, rows: list[Row]) -> int | None:
    """The bytes that a mode may use which has no budget of its own. `stock`: what stock offload took from the driver."""
    name, budget, _ = modes.parts(mode)
    if name == "ours" or not budget:
        return None
    if budget != "stock":
        return parse_nbytes(budget, "budget")
    taken = [r.peak_reserved for r in rows if r.mode == "stock" and r.peak_reserved]
    if not taken:
        raise modes.NotHere("stock offload has not been measured, whose memory this is to be held to")
    return max(taken)


def main(
    out: Annotated[Path, typer.Option(help="folder for the results; what is in it is completed")],
    device: Annotated[str | None, typer.Option(help="cuda, xpu, simgpu; found when left out")] = None,
    model: Annotated[str, typer.Option(help="sdxl, sd3, flux, any of them with -small, a folder or a hub id")] = "sdxl",
    steps: Annotated[list[int] | None, typer.Option()] = None,
    mode: Annotated[list[str] | None, typer.Option(help="see benchmarks.modes; can be repeated")] = None,
    compile: Annotated[str, typer.Option(help="none, regional or whole")] = "none",
    rounds: Annotated[int, typer.Option(min=1, help="visits to each mode, in turns")] = 2,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of a visit")] = 3,
    seconds: Annotated[
        float, typer.Option(help="stop after so long; what is missing then is left for the next run")
    ] = 1e9,
    enough: Annotated[float, typer.Option(help="seconds of timed calls after which a visit makes no more")] = 1e9,
    keep: Annotated[
        bool, typer.Option("--keep", help="one pipeline for resident, stock and ours, pinned once for all budgets")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16, float32; the model's own when left out")] = None,
    height: Annotated[int | None, typer.Option(help="of the image; 1024, or 64 of small models")] = None,
    width: Annotated[int | None, typer.Option()] = None,
    simulated_link: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s each way on the simulated accelerator; else as fast as memory")
    ] = None,
) -> None:
    """Measure modes in turns and write the results. Exit code 1: resident or ours failed, or ours drew another image; 3: out of
    time, and the same command goes on; 2: it could not begin."""
    started = time.monotonic()
    chosen = list(dict.fromkeys(mode or DEFAULT))
    try:
        for name in chosen:
            modes.check(name)
        if compile not in COMPILE:
            raise ValueError(f"--compile {compile}: {', '.join(COMPILE)}")
        check_dtype(dtype)
        if keep and compile != "none":
            raise ValueError("--keep is for --compile none: what is compiled for one mode would stay so for the next.")
        out.mkdir(parents=True, exist_ok=True)
        where = devices.pick(None if device == "simgpu" else device, simulate=device == "simgpu")
        simulator = devices.simulator(where)
        if simulated_link is not None:
            if simulator is None:
                raise ValueError("--simulated-link is for --device simgpu: other links are as fast as they are.")
            simulator.configure(-1, *[simulated_link] * 3)  # the capacity stays
        known = read(out / "offload.csv") if (out / "offload.csv").is_file() else []
    except (ValueError, SettingError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    size = 64 if model in SMALL else 1024
    scenario = Scenario(model, dtype or default_dtype(model), height or size, width or size, compile, calls, where, enough)
    settings = {"unit_min": 64 << 10, "unit_max": 512 << 10} if model in SMALL else {}
    shelf = Shelf(lambda: build(scenario), where, keep, **settings)
    about = machine(where, out)
    earlier = out / "offload.json"
    runs = [*(json.loads(earlier.read_text())["runs"] if earlier.is_file() else []), about]
    table = {r.key: r for r in known}
    fresh = [scenario.row(name, s) for name in chosen for s in dict.fromkeys(steps or [30, 4])]
    stopped = {r.mode for r in fresh if r.key in table and table[r.key].error == STOPPED}
    mine = [_resumed(row, table, about) for row in fresh]

    def save(_: Row | None = None) -> None:
        truth = {_scene(r): r.image for r in table.values() if r.mode == "resident" and r.image}
        for row in table.values():
            row.equal = row.image == truth[_scene(row)] if row.image and _scene(row) in truth else None
        write(out, list(table.values()), runs)

    late = False
    for number in range(rounds):
        for name in sorted(chosen, key=lambda n: n in stopped):
            todo = [r for r in mine if r.mode == name and r.rounds <= number and not r.error]
            # Only the first step count of a visit has a fresh pipeline's profiling in it.
            for some in [[r] for r in todo] if modes.warm_calls(name, 1) == 0 else [todo]:
                if not some:
                    continue
                left = seconds - (time.monotonic() - started)
                if late or left <= 0:
                    late = True
                    for row in some:
                        row.error = "" if row.calls else LATE
                    continue
                for row in some:
                    _about(row, about)
                    row.error = STOPPED
                save()
                try:
                    others = [r for r in table.values() if _scene(r)[1:] == _scene(some[0])[1:]]
                    with alarm(left):
                        visit(scenario, name, some, limit_of(name, others), out, save, shelf)
                except Late:
                    late = True
                except Exception as error:  # a mode that fails is a row that says so
                    told = str(error).splitlines()[0] if str(error) else ""
                    for row in some:
                        row.error = f"{type(error).__name__}: {told}" if row.error == STOPPED else row.error
                    print(f"{name} failed: {error}", flush=True)
                    if not isinstance(error, modes.NotHere):
                        with (out / "errors.txt").open("a") as errors:
                            errors.write(f"{name}\n{traceback.format_exc()}\n")
                        late |= _broken(where)
                save()
    shelf.clear()
    save()
    if any(ours_fails(r) for r in mine):
        raise typer.Exit(1)
    if late:
        print("out of time: the same command goes on", flush=True)
        raise typer.Exit(EXIT_UNFINISHED)


def _resumed(fresh: Row, table: dict[tuple[Any, ...], Row], about: dict[str, Any]) -> Row:
    """The row as the table has it, else anew. What a peer failed with stays; a package may have been installed since."""
    old = table.get(fresh.key)
    if old is not None and (old.error in (LATE, STOPPED) or old.error.startswith(modes.NotHere.__name__)):
        old.error = ""
    elsewhere = old is not None and old.gpu != "" and (old.gpu, old.versions) != (about["gpu"], about["versions"])
    if old is None or elsewhere or ours_fails(old):
        table[fresh.key] = fresh
    return table[fresh.key]


def _about(row: Row, about: dict[str, Any]) -> None:
    for name in ("gpu", "host", "link_gbps", "driver", "versions", "commit", "command"):
        setattr(row, name, about[name])
    package = modes.package_of(modes.parts(row.mode)[0])
    version = about["peers"][package] if package else None
    row.peer = f"{package} {version}" if version else ""


def _scene(row: Row) -> tuple[Any, ...]:
    """What rows have to have in common for their images to be equal; the step count comes first."""
    return (row.steps, *(getattr(row, n) for n in KEY if n not in ("mode", "steps")), row.gpu, row.versions)


def _broken(device: torch.device) -> bool:
    """A device that has failed stays so for the rest of the process: whatever else is run there would only fail, too."""
    try:
        torch.accelerator.synchronize(device)
    except Exception:
        print("the device does not answer any more: the rest is left for the next run", flush=True)
        return True
    return False


if __name__ == "__main__":
    typer.run(main)
