"""How figures are shown: tables and lines of text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from .config import MIB
from .stats import COMPARED, LastCall, Stats


def table(stats: Stats) -> Table:
    """The components as a rich table."""
    where = stats.device + (" (simulated)" if stats.simulated else "")
    budget = f"{stats.budget / MIB:.1f} MiB" if isinstance(stats.budget, int) else stats.budget or "free memory"
    made = Table(title=f"prefetch_offload on {where}, {stats.calls} calls, budget {budget}")
    made.add_column("component", no_wrap=True)
    for heading in ("weights MiB", "entries", "hits", "misses", "moved MiB", "hidden ms", "exposed ms", "compute ms"):
        made.add_column(heading, justify="right")
    for c in stats.components:
        made.add_row(
            c.name + ("" if c.pinned else " (not pinned)"),
            f"{c.nbytes / MIB:.1f}",
            str(c.entries),
            str(c.hits),
            str(c.misses),
            f"{c.h2d_nbytes / MIB:.1f}",
            f"{c.hidden_ms:.1f}",
            f"{c.exposed_ms:.1f}",
            f"{c.compute_ms:.1f}",
        )
    return made


def comparison(last: LastCall) -> Table:
    """The last call beside its plan: two rows for each component."""
    title = f"the last call: {last.ms:.1f} ms"
    if last.predicted_ms is not None and last.bound_ms is not None:
        title += f"; planned {last.predicted_ms:.1f} ms, physical limit {last.bound_ms:.1f} ms ({last.planned_because})"
    made = Table(title=title)
    made.add_column("component", no_wrap=True)
    made.add_column("")
    for heading in ("streamed MiB", *(what.replace("_", " ") for what in COMPARED)):
        made.add_column(heading, justify="right")
    for c in last.components:
        measured, planned = ([_cell(getattr(c, kind + what)) for what in COMPARED] for kind in ("", "predicted_"))
        made.add_row(c.name, "measured", f"{c.streamed_nbytes / MIB:.1f}", *measured)
        if last.predicted_ms is not None:
            made.add_row("", "planned", "", *planned)
    return made


def _cell(figure: float | None) -> str:
    return "-" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.1f}"


def summary(stats: Stats) -> str:
    """The figures that concern all components."""
    link = f"{stats.link_gbps:.2f} GB/s" if stats.link_gbps else "no copies"
    noted = "".join(f"; {what}: {n}" for what, n in stats.counts.items())
    if stats.dropped_spans:
        noted += f"; times are without the {stats.dropped_spans} oldest spans"
    return (
        f"to the device {stats.h2d_nbytes / MIB:.1f} MiB at {link}, back {stats.d2h_nbytes / MIB:.2f} MiB; pinned "
        f"{stats.pinned_nbytes / MIB:.1f} MiB; on the device now {stats.resident_nbytes / MIB:.1f} MiB, peak "
        f"{stats.peak_nbytes / MIB:.1f} MiB{noted}"
    )


def encoded(stats: Stats) -> list[str]:
    """A line about the components whose weights travel encoded, if there are any."""
    shown = [
        f"{c.name} {c.nbytes / MIB:.1f} MiB as {c.link_nbytes / MIB:.1f} MiB"
        for c in stats.components
        if c.encoded
    ]
    if not shown:
        return []
    host, filed = sum(c.host_nbytes for c in stats.components), sum(c.filed_nbytes for c in stats.components)
    where = f"weights take {host / MIB:.1f} MiB of host memory and {filed / MIB:.1f} MiB in files"
    return [f"travels encoded: {', '.join(shown)}; {where}"]


def compiles(stats: Stats) -> list[str]:
    """A line for each component that was compiled, and one for the reason of each recompile."""
    lines: list[str] = []
    for c in stats.components:
        last = c.compiled_in_call
        if c.graphs is None or last is None:
            return ["compiled: not counted, since this PyTorch does not tell"]
        if not c.graphs and not c.graph_breaks and not c.recompiles:
            continue
        lines.append(
            f"compiled: {c.name}: {c.graphs} graphs, {c.graph_breaks} breaks, {len(c.recompiles)} recompiles; in the last call "
            f"{last.graphs}, {last.graph_breaks}, {len(last.recompiles)}"
        )
        lines += [f"  recompiled: {reason}" for reason in dict.fromkeys(c.recompiles)]
    return lines


def render(stats: Stats) -> str:
    """Table and summary as plain text."""
    console = Console(file=io.StringIO(), width=118)
    console.print(table(stats))
    if stats.last_call is not None:
        console.print(comparison(stats.last_call))
    console.print(summary(stats), soft_wrap=True)
    for line in (*encoded(stats), *compiles(stats)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
