"""Pictures of a result of `benchmarks.offload`: latency over memory, and latency over steps.

python -m benchmarks plot DIR/offload.csv
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from prefetch_offload.commands import picture

GIB = 1 << 30


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["median_s"]]


def colour_of(mode: str) -> str:
    if mode.startswith("ours"):
        return "#0b6e4f"
    return {"resident": "#222222", "stock": "#c1121f"}.get(mode, "#8d99ae")


def draw(path: Path) -> list[Path]:
    """Both pictures beside the file, for each model and each thing compiled. Returns their paths.

    Raises:
        SettingError: matplotlib is missing.
    """
    plt = picture.require()
    made = []
    rows = rows_of(path)
    for model, compiled in sorted({(r["model"], r["compile"]) for r in rows}):
        chosen = [r for r in rows if (r["model"], r["compile"]) == (model, compiled)]
        simulated = " (simulated)" if any(r["simulated"] == "True" for r in chosen) else ""
        steps = sorted({int(r["steps"]) for r in chosen})
        name = f"{model}-{compiled}".replace("/", "-")
        for kind in ("memory", "steps"):
            figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
            if kind == "memory":
                _memory(axes, [r for r in chosen if int(r["steps"]) == steps[-1]])
                axes.set_title(f"{model}, {steps[-1]} steps, compiled: {compiled}{simulated}")
            else:
                _steps(axes, chosen)
                axes.set_title(f"{model}, compiled: {compiled}{simulated}")
            axes.set_ylabel("seconds a call")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            made.append(path.parent / f"{name}-{kind}.png")
            figure.savefig(made[-1], dpi=150)
            plt.close(figure)
    return made


def _memory(axes: Any, rows: list[dict[str, str]]) -> None:
    ours = sorted((r for r in rows if r["mode"].startswith("ours")), key=lambda r: int(r["peak_allocated"]))
    axes.plot(
        [int(r["peak_allocated"]) / GIB for r in ours], [float(r["median_s"]) for r in ours], color=colour_of("ours")
    )
    for row in rows:
        x, y = int(row["peak_allocated"]) / GIB, float(row["median_s"])
        axes.scatter([x], [y], color=colour_of(row["mode"]), zorder=3)
        axes.annotate(row["mode"], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("peak of allocated device memory, GiB")


def _steps(axes: Any, rows: list[dict[str, str]]) -> None:
    for mode in dict.fromkeys(r["mode"] for r in rows):
        mine = sorted((r for r in rows if r["mode"] == mode), key=lambda r: int(r["steps"]))
        axes.plot(
            [int(r["steps"]) for r in mine], [float(r["median_s"]) for r in mine], marker="o", label=mode, color=None
        )
    axes.set_xlabel("steps")
    axes.legend(fontsize=8)
