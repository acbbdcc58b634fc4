"""Predictions as pictures: latency over memory, and one call as a timeline, drawn or as text."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import GIB, MIB
from ..simulator import SIMULATED_PASSES
from ..strategy import CallPlan
from ..trace import Span, Timeline
from . import picture

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INK = picture.INK


@dataclass(frozen=True)
class Line:
    """Predictions over one link: (device memory, seconds, seconds of the physical limit), by memory."""

    label: str
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Mark:
    """A single point: `shape` is matplotlib's; `published` ones are hollow."""

    label: str
    memory: float
    seconds: float
    shape: str = "o"
    published: bool = False


def one_call(plan: CallPlan) -> tuple[Timeline, float]:
    """The last simulated call, told from its start, and its length in it; what repeats is left out of both."""
    timeline = plan.prediction.timeline
    computed = [s for s in timeline.spans if s.track == "compute"]
    spans = computed[len(computed) // 2 :]  # both simulated calls compute the same
    first = spans[0]
    waits = [s.start_ms for s in timeline.spans if s.track == "stalls" and abs(s.end_ms - first.start_ms) < 1e-6]
    start_ms = min([first.start_ms, *waits])
    end_ms = max(s.end_ms for s in spans)
    shown = picture.window(timeline, start_ms, end_ms)
    return shown, end_ms - start_ms


def memory_of(plan: CallPlan, shown: Timeline, length_ms: float) -> list[tuple[float, int, int]]:
    """(milliseconds, bytes of weights, bytes of activations) from there on, of a call as `one_call` tells it."""
    computed = [s for s in shown.spans if s.track == "compute"]
    runs = [0.0]  # where each run begins: what it waits for belongs to it
    names = [computed[0].name]
    for before, span in itertools.pairwise(computed):
        if span.name != before.name:
            runs.append(before.end_ms)
            names.append(span.name)
    starts = [level.start_ms for level in shown.levels]
    found = []
    for at in sorted({0.0, *starts, *runs, length_ms}):
        level = shown.levels[max(0, bisect.bisect_right(starts, at) - 1)].nbytes if starts else 0
        running = plan.workload.components[names[bisect.bisect_right(runs, at) - 1]]
        found.append((at, level, running.activation_nbytes))
    return found


def left_out(plan: CallPlan) -> str:
    """What a timeline of the call does not show."""
    longer = [f"{SIMULATED_PASSES} of {n} passes of {name}" for name, n in plan.workload.runs if n > SIMULATED_PASSES]
    return f"{', '.join(longer)} shown; those between repeat" if longer else "all of it shown"


def text(plan: CallPlan, width: int) -> str:
    """The call in three rows of letters, one for each component."""
    shown, length_ms = one_call(plan)
    names = [name for name, _ in plan.workload.runs]
    letters = {name: LETTERS[i % len(LETTERS)] for i, name in enumerate(dict.fromkeys(names))}
    cells = max(10, width - 20)
    lines = [
        f"{label:>17} |{_cells([s for s in shown.spans if s.track == track], length_ms, cells, letters)}|"
        for track, label in picture.ROWS
    ]
    legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    return "\n".join((*lines, f"{'':17}  {legend}; {length_ms / 1e3:.2f} s wide: {left_out(plan)}"))


def bars(lines: Sequence[Line], width: int, unit: str) -> str:
    """Latency over memory as text: for each link a bar for each budget, all of one scale. `#` reaches to the physical limit."""
    most = max(seconds for line in lines for _, seconds, _ in line.points)
    cells = max(10, width - 31)
    rows = []
    for line in lines:
        rows.append(f"{line.label:>17}")
        for memory, seconds, limit in line.points:
            length = max(1, round(seconds / most * cells))
            solid = min(length, round(limit / most * cells))
            bar = "#" * solid + "-" * (length - solid)
            rows.append(f"{memory:>13.2f} {unit} |{bar:<{cells}}| {seconds:.3g} s")
    return "\n".join((*rows, f"{'':17}  # to the physical limit, - beyond it"))


def _cells(spans: Sequence[Span], length_ms: float, cells: int, letters: Mapping[str, str]) -> str:
    """In each cell whoever has most of it, and nothing where that is less than a quarter."""
    cell_ms = length_ms / cells
    filled: list[dict[str, float]] = [{} for _ in range(cells)]
    for span in spans:
        for i in range(max(0, int(span.start_ms / cell_ms)), min(cells, int(span.end_ms / cell_ms) + 1)):
            part = min(span.end_ms, (i + 1) * cell_ms) - max(span.start_ms, i * cell_ms)
            filled[i][span.name] = filled[i].get(span.name, 0.0) + part
    most = [max(cell.items(), key=lambda item: item[1], default=("", 0.0)) for cell in filled]
    return "".join(letters[name] if part >= cell_ms / 4 else "." for name, part in most)


def unit_of(nbytes: int) -> tuple[str, int]:
    """The unit in which sizes of about `nbytes` are read best, and its bytes."""
    return ("GiB", GIB) if nbytes >= GIB else ("MiB", MIB)


def draw(
    lines: Sequence[Line],
    title: str,
    path: Path,
    marks: Sequence[Mark] = (),
    unit: str = "GiB",
    subtitle: str = "predicted, a call after the first",
) -> None:
    """Write a PNG: seconds a call over the device memory that it may take, which is in `unit`.

    Raises:
        SettingError: matplotlib is not installed.
    """
    pyplot = picture.require()
    with pyplot.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999"}):
        figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
        limit = "physical limit" + (" of each link" if len(lines) > 1 else "")
        for line, colour in zip(lines, _colours(len(lines)), strict=True):
            memory, seconds, limits = zip(*line.points, strict=True)
            axes.plot(memory, seconds, color=colour, marker="o", markersize=4, label=f"prefetch_offload, {line.label}")
            axes.plot(memory, limits, color=colour, linestyle="--", linewidth=1.2)
        axes.plot([], [], color=INK, linestyle="--", linewidth=1.2, label=limit)
        for mark, colour in zip(marks, _mark_colours(marks), strict=True):
            face = "white" if mark.published else colour
            axes.plot(
                mark.memory,
                mark.seconds,
                mark.shape,
                color=colour,
                markerfacecolor=face,
                markersize=9,
                label=mark.label,
            )
        _scale(axes, [s for line in lines for _, s, _ in line.points] + [m.seconds for m in marks])
        axes.set_xlim(left=0)
        axes.set_xlabel(f"device memory for weights and activations ({unit})")
        axes.set_ylabel("seconds a call")
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes.set_title(subtitle, loc="left", fontsize=10)
        axes.grid(color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Beside the picture: lines fall from the upper left, and marks may lie anywhere.
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _colours(n: int) -> list[str]:
    return [picture.COLOURS[i % len(picture.COLOURS)] for i in range(n)]


def _mark_colours(marks: Sequence[Mark]) -> list[str]:
    """Black for what is predicted, grey for what others published: colours are for links."""
    return ["#777777" if mark.published else INK for mark in marks]


def _scale(axes: Any, seconds: Sequence[float]) -> None:
    """From zero, unless the slowest would press the others to the ground."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(seconds) > 8 * min(seconds):
        axes.set_yscale("log")
        axis = axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max(seconds) * 1.06)


def draw_call(plan: CallPlan, title: str, path: Path) -> None:
    """Write a PNG of one call: what runs, what is copied meanwhile, what is waited for, and the memory it takes.

    Raises:
        SettingError: matplotlib is not installed.
    """
    pyplot = picture.require()
    shown, length_ms = one_call(plan)
    # Units follow one another without a gap: drawn one by one, their edges would be all that is seen.
    spans = [
        s
        for track, _ in picture.ROWS
        for s in picture.joined([t for t in shown.spans if t.track == track], gap_ms=length_ms * 1e-5)
    ]
    shown = Timeline((Span("calls", "call", 0.0, length_ms), *spans), shown.levels, True, shown.device)
    names = list(dict.fromkeys(name for name, _ in plan.workload.runs))
    colours = {n: picture.COLOURS[i] if i < len(picture.COLOURS) else picture.OTHER for i, n in enumerate(names)}
    unit, scale = unit_of(plan.budget_nbytes)
    seconds = plan.prediction.call_ms / 1e3
    where = f"{plan.budget_nbytes / scale:.2f} {unit} over {plan.link.gbps:g} GB/s, {seconds:.3g} s a call"
    with pyplot.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999"}):
        figure, (gantt, memory) = pyplot.subplots(
            2, 1, figsize=(12, 5.4), height_ratios=[2.2, 1.2], layout="constrained"
        )
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        picture._gantt(gantt, shown, colours, where)
        taken = memory_of(plan, shown, length_ms)
        times = [at / 1e3 for at, _, _ in taken]
        weights = [nbytes / scale for _, nbytes, _ in taken]
        total = [(nbytes + activations) / scale for _, nbytes, activations in taken]
        memory.fill_between(times, total, step="post", color=INK, alpha=0.10, linewidth=0, label="activations")
        memory.fill_between(times, weights, step="post", color=INK, alpha=0.25, linewidth=0, label="weights")
        memory.step(times, total, where="post", color=INK, linewidth=1.2)
        memory.axhline(plan.budget_nbytes / scale, color=INK, linestyle="--", linewidth=1.2, label="budget")
        memory.set_ylim(0, 1.1 * plan.budget_nbytes / scale)
        memory.set_ylabel(unit)
        memory.set_xlabel(f"s; {left_out(plan)}")
        memory.set_title("on the device, predicted", loc="left", fontsize=10)
        memory.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, fontsize=9)
        picture._plain(memory)
        for axes in (gantt, memory):
            axes.set_xlim(0, length_ms / 1e3)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
