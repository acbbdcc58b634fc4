"""Two results of `benchmarks.offload` side by side: what became slower, larger, or another image.

python -m benchmarks compare OLD.csv NEW.csv [--band 0.05]
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

KEY = ("model", "mode", "compile", "steps", "simulated")
MEMORY_BAND = 0.01  # of the allocator's peak, which is the same in every run but for caches of libraries


@dataclass(frozen=True)
class Finding:
    """Something that got worse. `band`: the relative change that would have been taken for noise."""

    row: str
    what: str
    before: str
    after: str
    band: float

    def __str__(self) -> str:
        return f"{self.row}: {self.what} {self.before} -> {self.after} (noise: {self.band:.1%})"


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by what they measure. Raises ValueError if the file is no such result."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(KEY) <= set(rows[0]):
        raise ValueError(
            f"{path} has no rows of `python -m benchmarks.offload`: its columns have to include {', '.join(KEY)}."
        )
    return {tuple(row[k] for k in KEY): row for row in rows}


def noise(row: dict[str, str]) -> float:
    """Half of the spread between the quartiles, relative to the median."""
    median, q25, q75 = (float(row.get(k) or 0) for k in ("median_s", "q25_s", "q75_s"))
    return (q75 - q25) / 2 / median if median > 0 else 0.0


def compare(old: Path, new: Path, band: float = 0.05) -> tuple[list[Finding], int]:
    """What got worse, and how many rows could be compared.

    A time is worse when it grew by more than `band`, or than three times the noise of the two runs if that is more.

    Raises:
        ValueError: a file is no result, or the two have no row in common.
    """
    before, after = read(old), read(new)
    common = [key for key in before if key in after]
    if not common:
        raise ValueError(
            f"{old} and {new} have no row in common: same model, mode, compile and steps, both simulated or not."
        )
    found = []
    for key in common:
        was, now = before[key], after[key]
        name = ", ".join((key[0], key[1], f"compile {key[2]}", f"{key[3]} steps"))
        if was["error"] != now["error"] and now["error"]:
            found.append(Finding(name, "fails:", was["error"] or "ran", now["error"], 0.0))
            continue
        if was["equal"] == "True" and now["equal"] == "False":
            found.append(
                Finding(name, "its image is not the resident one's any more:", was["image"], now["image"], 0.0)
            )
        if was["median_s"] and now["median_s"]:
            allowed = max(band, 3 * max(noise(was), noise(now)))
            if float(now["median_s"]) > float(was["median_s"]) * (1 + allowed):
                seconds = [f"{float(r['median_s']):.3f} s" for r in (was, now)]
                found.append(Finding(name, "time", *seconds, allowed))
        peaks = [int(r["peak_allocated"] or 0) for r in (was, now)]
        if peaks[0] and peaks[1] > peaks[0] * (1 + MEMORY_BAND):
            found.append(Finding(name, "peak", *(f"{p / 2**20:.1f} MiB" for p in peaks), MEMORY_BAND))
    return found, len(common)
