"""`prefetch-offload bench`: one model on one device, resident, under stock offload and in several budgets of ours."""

from __future__ import annotations

import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..api import enable
from ..config import MIB, Settings
from ..device import is_out_of_memory
from ..errors import BudgetError, OffloadError
from . import curve, devices, models, picture, running

PROMPT = "a serene lake at dawn"


@dataclass(frozen=True)
class Request:
    """The command's options. `prompt`: None: `PROMPT`, if the pipeline takes one."""

    model: str
    prompt: str | None = None
    budgets: tuple[str, ...] = ()
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    dtype: str | None = None
    device: str | None = None
    simulate: bool = False
    calls: int = 5
    out: Path | None = None
    resident: bool = True


@dataclass(frozen=True)
class Result:
    """One way of running. `outcome` is None where it could not, and `error` says why.

    Attributes:
        predicted_s, bound_s: of the last call, by our plan; None for others.
        fits: False: `error` is about memory.
    """

    label: str
    outcome: running.Outcome | None
    error: str = ""
    predicted_s: float | None = None
    bound_s: float | None = None
    fits: bool = True

    @property
    def later_s(self) -> float | None:
        """The median of the calls after the second, or the second: we learn in the first, and plan from then on."""
        if self.outcome is None:
            return None
        seconds = self.outcome.seconds
        return statistics.median(seconds[2:] or seconds[1:])


def bench(request: Request, console: Console) -> bool:
    """Run all ways, one after the other, and print a table; with `out`, write results.csv and curve.png.

    Returns:
        False: images differ. A way that does not fit, or is refused, is a row that says so.

    Raises:
        SettingError, ValueError, OSError: something was asked for that cannot be had.
    """
    budgets = [b for text in request.budgets for b in text.split(",") if b]
    for budget in budgets:
        Settings.make(budget)
    models.check_dtype(request.dtype)
    if request.out is not None:
        picture.require_folder(request.out)
    device = devices.pick(request.device, request.simulate)
    simulated = devices.simulator(device) is not None
    running.quiet(device, progress=sys.stderr.isatty())
    dtype = running.dtype_of(request.dtype, device)
    console.print(f"Running on the {devices.describe(device)}, {str(dtype).split('.')[1]}.")
    ways = ["resident"] if request.resident else []
    ways += ["stock offload", "prefetch_offload, stock's memory", "prefetch_offload, default"]
    results = []
    for label in [*ways, *(f"prefetch_offload, {b}" for b in budgets)]:
        results.append(_run(label, request, device, dtype))
        running.forget()
        found = results[-1]
        console.print(f"{label}: {found.error or f'{found.later_s:.2f} s'}", soft_wrap=True, markup=False)
    reference = next((r.outcome for r in results if r.outcome is not None), None)
    title = f"{request.calls} calls each, on the {devices.describe(device)}" + (" (simulated)" if simulated else "")
    console.print(_table(title, results, reference))
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        where = {
            "device": devices.describe(device),
            "simulated": simulated,
            "model": request.model,
            "dtype": str(dtype).split(".")[1],
            "calls": request.calls,
            "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}, prefetch_offload {__version__}",
        }
        _write(request.out / "results.csv", results, reference, where)
        if reference is None:
            console.print(
                f"Wrote results.csv to {request.out}. No way could run, so there is no curve.", soft_wrap=True
            )
        else:
            name = Path(request.model).resolve().name if Path(request.model).is_dir() else request.model
            _draw(request.out / "curve.png", f"{name} on the {devices.describe(device)}", results)
            console.print(f"Wrote results.csv and curve.png to {request.out}.", soft_wrap=True)
    ours = [r.outcome for r in results if r.outcome is not None and r.label.startswith("prefetch_offload")]
    return reference is None or all(running.same(o, reference) for o in ours)


def _run(label: str, request: Request, device: torch.device, dtype: torch.dtype) -> Result:
    pipe = running.load(request.model, dtype)
    pipe.set_progress_bar_config(desc=label, leave=False, disable=not sys.stderr.isatty())
    inputs = running.inputs_for(
        pipe,
        {"prompt": PROMPT},
        prompt=request.prompt,
        num_inference_steps=request.steps,
        width=request.width,
        height=request.height,
    )
    seeds = (0,) * request.calls
    devices.reset_peak(device)
    try:
        if label == "resident":
            return Result(label, running.measure(label, pipe.to(device), device, inputs, seeds))
        if label == "stock offload":
            pipe.enable_model_cpu_offload(device=device)
            return Result(label, running.measure(label, pipe, device, inputs, seeds))
        wanted = label.split(", ")[1]
        budget = {"stock's memory": "stock", "default": None}.get(wanted, wanted)
        with enable(pipe, device=device, budget=budget) as offload:
            peak = lambda: offload.stats.peak_nbytes  # noqa: E731
            outcome = running.measure(label, pipe, device, inputs, seeds, peak)
            last = offload.stats.last_call
            if last is None or last.predicted_ms is None or last.bound_ms is None:
                return Result(label, outcome)
            return Result(label, outcome, "", last.predicted_ms / 1e3, last.bound_ms / 1e3)
    except (OffloadError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
        fits = not isinstance(error, BudgetError) and not is_out_of_memory(error)
        if fits and not isinstance(error, OffloadError):
            raise
        return Result(label, None, str(error).splitlines()[0], fits=fits)


def _table(title: str, results: list[Result], reference: running.Outcome | None) -> Table:
    made = Table(title=title)
    made.add_column("")
    for heading in ("first call s", "later calls s", "planned s", "limit s", "peak MiB", "images"):
        made.add_column(heading, justify="right")
    for r in results:
        if r.outcome is None:
            made.add_row(r.label, "-", "-", "-", "-", "-", "refused" if r.fits else "does not fit")
            continue
        made.add_row(
            r.label,
            f"{r.outcome.seconds[0]:.2f}",
            f"{r.later_s:.2f}",
            "-" if r.predicted_s is None else f"{r.predicted_s:.2f}",
            "-" if r.bound_s is None else f"{r.bound_s:.2f}",
            f"{r.outcome.peak_nbytes / MIB:.1f}",
            _verdict(r.outcome, reference),
        )
    return made


def _verdict(outcome: running.Outcome, reference: running.Outcome | None) -> str:
    if outcome is reference or reference is None:
        return "reference"
    return "equal" if running.same(outcome, reference) else "DIFFERENT"


def _write(path: Path, results: list[Result], reference: running.Outcome | None, where: dict[str, object]) -> None:
    """A row for each way; what all rows have in common, `where`, is in each, so that files can be put together."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("way", "first_s", "later_s", "planned_s", "bound_s", "peak_nbytes", "images", "error", *where)
        )
        for r in results:
            o = r.outcome
            figures = (None,) * 2 if o is None else (o.seconds[0], r.later_s)
            peak, verdict = (None, "") if o is None else (o.peak_nbytes, _verdict(o, reference))
            measured = (*figures, r.predicted_s, r.bound_s, peak, verdict, r.error)
            writer.writerow((r.label, *measured, *where.values()))


def _draw(path: Path, title: str, results: list[Result]) -> None:
    done = [(r, r.outcome) for r in results if r.outcome is not None]
    unit, size = curve.unit_of(max((o.peak_nbytes for _, o in done), default=0))
    points = sorted((o.peak_nbytes / size, float(r.later_s or 0), r.bound_s) for r, o in done if r.bound_s is not None)
    lines = [curve.Line("measured", tuple(points))] if points else []
    marks = [
        curve.Mark(r.label, o.peak_nbytes / size, float(r.later_s or 0), shape)
        for (r, o), shape in zip([d for d in done if d[0].bound_s is None], "os^Dv", strict=False)
    ]
    curve.draw(lines, title, path, marks, unit, "measured, the median of the calls after the second")
