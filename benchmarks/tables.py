"""Results of `benchmarks.offload` as Markdown: a table for each model and thing compiled, and the goals that they meet or miss.

python -m benchmarks table DIR/offload.csv [OTHER/offload.csv ...]
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from prefetch_offload.commands import curve

from .modes import parts
from .rows import Row, by_scene, latest, read

HEADINGS = (
    "mode", "steps", "median s", "quartiles s", "x resident", "x faster than stock", "first s", "enable s", "peak",
    "reserved", "driver", "host, pinned", "in, back", "exposed ms", "GB/s", "graphs, recompiles", "image",
)  # fmt: skip


def rows_of(paths: Iterable[Path]) -> list[Row]:
    """Of two rows for the same on one GPU, with the same versions, the one of the later file."""
    return latest((r for path in paths for r in read(path)), "versions")


def tables(rows: list[Row]) -> str:
    """All of it. Rows that were never measured, by no error of theirs, have no GPU, and are in the table of their own."""
    found = []
    for scene, some in by_scene(rows, "versions").items():
        model, compiled, height, width, dtype, gpu, versions = scene
        simulated = " (simulated: seconds say nothing about any GPU)" if some[0].simulated else ""
        links = sorted({r.link_gbps for r in some if r.link_gbps})
        link = f", link {links[0]:.3g} to {links[-1]:.3g} GB/s" if links else ""
        driver = "".join(f", driver {d}" for d in sorted({r.driver for r in some if r.driver}))
        commits = ", ".join(sorted({r.commit[:12] for r in some if r.commit})) or "unknown"
        about = (
            f"{gpu or 'not measured yet'}{simulated}{link}{driver}; {versions}; commit {commits}; host {some[0].host}"
        )
        lines = [f"## {model}, {width} x {height}, {dtype}, compiled: {compiled}", "", about, ""]
        unit = curve.unit_of(max(r.peak_allocated or 0 for r in some))
        lines += [f"Sizes are in {unit[0]}.", "", _line(HEADINGS), _line("---" for _ in HEADINGS)]
        ordered = sorted(some, key=lambda r: -r.steps)  # stable: modes stay in their order
        lines += [_line(_cells(row, some, unit)) for row in ordered]
        about_goals = goals(some)
        found.append("\n".join([*lines, *(["", *about_goals] if about_goals else [])]))
    return "\n\n".join(found) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, beside: list[Row], unit: tuple[str, int]) -> list[str]:
    if row.median_s is None:
        error = row.error.replace("|", "/") or "not measured yet"
        return [row.mode, str(row.steps), error, *[""] * (len(HEADINGS) - 3)]
    resident, stock = _seconds(beside, "resident", row.steps), _seconds(beside, "stock", row.steps)
    size = functools.partial(_size, unit=unit)
    both = f"{size(row.h2d_nbytes)}, {size(row.d2h_nbytes)}" if row.h2d_nbytes is not None else ""
    counted = f"{row.graphs}, {row.recompiles}" if row.graphs is not None else ""
    image = {None: "", True: "equal", False: "another"}[row.equal]
    return [
        f"{row.mode} ({row.peer})" if row.peer else row.mode,
        str(row.steps),
        f"{row.median_s:.3f}",
        f"{row.q25_s:.3f} to {row.q75_s:.3f} ({row.calls} calls)",
        f"{row.median_s / resident:.2f}" if resident else "",
        f"{stock / row.median_s:.2f}" if stock else "",
        "" if row.first_s is None else f"{row.first_s:.2f}",
        "" if row.enable_s is None else f"{row.enable_s:.2f}",
        *(size(n) for n in (row.peak_allocated, row.peak_reserved, row.driver_nbytes)),
        f"{size(row.rss_nbytes)}, {size(row.pinned_nbytes)}",
        both,
        "" if row.exposed_ms is None else f"{row.exposed_ms:.1f}",
        "" if row.copy_gbps is None else f"{row.copy_gbps:.3g}",
        counted,
        f"{image}; {row.error}" if row.error else image,
    ]


def _size(nbytes: int | None, unit: tuple[str, int]) -> str:
    return "" if nbytes is None else f"{nbytes / unit[1]:.{2 if unit[0] == 'GiB' else 1}f}"


def _seconds(rows: list[Row], mode: str, steps: int) -> float | None:
    return next((r.median_s for r in rows if (r.mode, r.steps) == (mode, steps)), None)


def goals(rows: list[Row]) -> list[str]:
    """What the project set out to reach, of one scene, met or missed by these rows; nothing where it is not about them."""
    if rows[0].simulated:
        return []
    found = []

    def goal(mode: str, steps: int, what: str, value: float, limit: float, at_most: bool, other: str = "") -> None:
        met = value <= limit if at_most else value >= limit
        bound = "at most" if at_most else "at least"
        calls = min(r.calls for r in rows if r.steps == steps and r.mode in (mode, other) and r.calls)
        text = f"{steps} steps {what}: {value:.2f}{' by one call' if calls == 1 else ''}, the goal is {bound} {limit:g}"
        traces = f"trace-{rows[0].model}-{mode}-{rows[0].compile}-*.json".replace(":", "-")
        found.append(f"- met: {text}" if met else f"- **MISSED**: {text}; {traces} shows why")

    for steps, slower, faster in ((30, 1.05, 2.0), (4, 1.35, 5.0)) if rows[0].model == "sdxl" else ():
        ours, resident, stock = (_seconds(rows, m, steps) for m in ("ours:stock", "resident", "stock"))
        if ours and resident:
            goal("ours:stock", steps, "at stock's memory, x resident", ours / resident, slower, True, "resident")
        if ours and stock:
            goal("ours:stock", steps, "at stock's memory, x faster than stock", stock / ours, faster, False, "stock")
    for mine in rows if rows[0].model == "flux" else ():
        resident = _seconds(rows, "resident", mine.steps)
        if mine.mode == "ours:8GiB" and mine.copy_gbps and mine.link_gbps:
            use = mine.copy_gbps / mine.link_gbps
            goal(mine.mode, mine.steps, "in 8GiB, streaming, of the pinned link", use, 0.9, False)
        if mine.mode == "ours:16GiB" and mine.median_s and resident:
            goal(mine.mode, mine.steps, "in 16GiB, x resident", mine.median_s / resident, 1.05, True, "resident")
    for steps in sorted({r.steps for r in rows}, reverse=True):
        for mine in rows:
            name, budget, transport = parts(mine.mode)
            if name != "ours" or transport or not budget or mine.steps != steps or not mine.median_s:
                continue
            measured = [(r, *parts(r.mode)) for r in rows if r.steps == steps and r.median_s]
            peers = [r for r, peer, held, _ in measured if held == budget and peer != "ours"]
            if peers:
                best = min(peers, key=lambda r: r.median_s or 0.0)
                what = f"ahead of every peer in {budget} (the best of {len(peers)}: {best.mode}), x faster"
                goal(mine.mode, steps, what, (best.median_s or 0.0) / mine.median_s, 1.0, False, best.mode)
    return found
