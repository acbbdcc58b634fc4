"""Pictures of results of `benchmarks.offload`: latency over memory, latency over steps, and timelines.

python -m benchmarks plot DIR/offload.csv [OTHER/offload.csv ...]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefetch_offload.commands import curve, picture
from prefetch_offload.trace import MEASURED, TRACKS, Level, Span, Timeline

from .rows import Row, by_scene, latest, read


def rows_of(paths: list[Path]) -> list[Row]:
    """Rows with figures; of two for the same on one GPU, the one of the later file."""
    return latest(r for path in paths for r in read(path) if r.median_s)


def colour_of(mode: str) -> str:
    if mode.startswith("ours"):
        return "#0b6e4f"
    return {"resident": "#222222", "stock": "#c1121f"}.get(mode, "#8d99ae")


def draw(paths: list[Path]) -> list[Path]:
    """For each model, size, dtype, GPU and thing compiled: latency over memory, of each step count that several modes have;
    latency over steps, where there are several; and a timeline for each trace that lies beside a file.

    Everything is written beside the first file. Returns the paths.

    Raises:
        SettingError: matplotlib is missing.
    """
    plt = picture.require()
    made: list[Path] = []
    names: set[str] = set()
    for scene, chosen in sorted(by_scene(rows_of(paths)).items()):
        model, compiled, height, width, dtype, gpu = scene
        simulated = " (simulated)" if any(r.simulated for r in chosen) and "simulated" not in gpu else ""
        steps = sorted({r.steps for r in chosen})
        name = f"{model}-{compiled}".replace("/", "-")
        if name in names:  # another size, dtype or GPU of the same
            name = "-".join((name, height, width, dtype, gpu)).replace(" ", "-")
        names.add(name)
        about = f"{model}, {width} x {height}, {dtype}, compiled: {compiled}, {gpu}{simulated}"
        by_steps = {n: [r for r in chosen if r.steps == n] for n in steps}
        wanted = [(f"memory-{n}", some) for n, some in by_steps.items() if len(some) > 1]
        for kind, some in [*wanted, *([("steps", chosen)] if len(steps) > 1 else [])]:
            figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
            if kind == "steps":
                _steps(axes, some)
                axes.set_title(about, fontsize=10)
            else:
                _memory(axes, some)
                axes.set_title(f"{about}\n{some[0].steps} steps, median and quartiles", fontsize=10)
            axes.set_ylabel("seconds a call")
            if kind == "steps":
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            made.append(paths[0].parent / f"{name}-{kind}.png")
            figure.savefig(made[-1], dpi=150)
            plt.close(figure)
    for folder in dict.fromkeys(p.parent for p in paths):
        for trace in sorted(folder.glob("trace-*.json")):
            timeline = timeline_of(trace)
            calls = picture.calls_of(timeline)
            if calls:
                made.append(paths[0].parent / f"timeline-{trace.stem.removeprefix('trace-')}.png")
                title = trace.stem.removeprefix("trace-") + (" (simulated)" if timeline.simulated else "")
                last = {f"call {n}": c.duration_ms / 1e3 for n, c in enumerate(calls, 1)}
                picture.draw(timeline, made[-1], title, "the last two calls", dict(list(last.items())[-2:]))
    return made


def timeline_of(path: Path) -> Timeline:
    """What `Offload.trace` wrote, without what was predicted."""
    record = json.loads(path.read_text())
    spans, levels = [], []
    for event in record["traceEvents"]:
        if event["pid"] != MEASURED:
            continue  # what was predicted
        if event["ph"] == "X":
            track = TRACKS[event["tid"]]
            spans.append(Span(track, event["name"], event["ts"] / 1e3, event["dur"] / 1e3, event["args"]))
        elif event["ph"] == "C":
            levels.append(Level(event["ts"] / 1e3, round(event["args"]["MiB"] * 2**20)))
    about = record["otherData"]
    return Timeline(tuple(spans), tuple(levels), about["simulated"], about["device"], about.get("dropped", 0))


def _memory(axes: Any, rows: list[Row]) -> None:
    exact = [r for r in rows if r.mode.startswith("ours") and r.mode.count(":") < 2]  # no transport
    unit, size = curve.unit_of(max(r.peak_allocated for r in rows))
    ours = sorted(exact, key=lambda r: r.peak_allocated)
    axes.plot([r.peak_allocated / size for r in ours], [r.median_s for r in ours], color=colour_of("ours"))
    for row in rows:
        x, y = row.peak_allocated / size, row.median_s
        spread = [[y - row.q25_s], [row.q75_s - y]]
        axes.errorbar([x], [y], yerr=spread, fmt="o", color=colour_of(row.mode), zorder=3)
    axes.set_xlim(0, 1.15 * max(r.peak_allocated for r in rows) / size)
    axes.set_ylim(0, 1.08 * max(r.q75_s for r in rows))
    _name(axes, [(r.mode, r.peak_allocated / size, r.median_s) for r in rows])
    axes.set_xlabel(f"peak of allocated device memory, {unit}")


def _name(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Write the name of each point beside it, where no other name or point is: above or below, right or left, or off."""
    dots = [axes.transData.transform((x, y)) for _, x, y in points]
    scale = axes.figure.dpi / 72  # pixels of a point of type
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots]
    for (name, x, y), (left, bottom) in zip(points, dots, strict=True):
        wide = 5 * len(name)  # points, at size 8
        places = [(dx, dy) for n in range(6) for dy in (4 + 10 * n, -11 - 10 * n) for dx in (5, -5 - wide)]
        boxes = {}
        for dx, dy in places:
            x0, y0 = left + dx * scale, bottom + dy * scale
            boxes[dx, dy] = (x0, y0, x0 + wide * scale, y0 + 8 * scale)
        free = (p for p, (a, b, c, d) in boxes.items() if all(c < e or g < a or d < f or h < b for e, f, g, h in taken))
        place = next(free, places[0])
        taken.append(boxes[place])
        axes.annotate(name, (x, y), textcoords="offset points", xytext=place, fontsize=8)


def _steps(axes: Any, rows: list[Row]) -> None:
    for mode in dict.fromkeys(r.mode for r in rows):
        mine = sorted((r for r in rows if r.mode == mode), key=lambda r: r.steps)
        axes.plot([r.steps for r in mine], [r.median_s for r in mine], marker="o", label=mode, color=None)
    axes.set_xlabel("steps")
    axes.legend(fontsize=8)
