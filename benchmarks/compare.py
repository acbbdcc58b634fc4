"""Two results of `benchmarks.offload` side by side: what became slower, larger, another image, or is not there any more.

python -m benchmarks compare OLD.csv NEW.csv [--band 0.05] [--any-machine]
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from .rows import KEY, Row

MACHINE = ("gpu", "host")
WIDEST = 0.25  # the band of a time whatever the runs' own spread, and of what was measured once, such as a first call
LINK_BAND = 0.1  # how far the link of two runs may differ before that is said
MEMORY_BAND = 0.01  # of the allocator's peak, which is the same in every run but for caches of libraries
RESERVED_BAND = 0.05  # of what it took from the driver, in blocks
HOST_BAND = 0.25  # of the process's memory, which has whatever ran before in it
COPIED_SLACK = 1 << 20  # bytes written back: none is what is expected, and a ratio says nothing about none


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


def bands(band: float) -> str:
    """What is taken for noise, in words."""
    return (
        f"Noise: {band:.1%} of a time, or three times the runs' own spread if that is more, up to {max(band, WIDEST):.0%}; "
        f"{max(band, WIDEST):.0%} of a first call, and of a time that is of one call; "
        f"{MEMORY_BAND:.0%} of a peak and {RESERVED_BAND:.0%} of what is reserved; "
        f"{RESERVED_BAND:.0%} of what is copied in or pinned, {HOST_BAND:.0%} of the process's memory; "
        f"{COPIED_SLACK >> 20} MiB written back; no recompile, no row."
    )


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by what they measure. Raises ValueError if the file is no such result."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {f.name for f in dataclasses.fields(Row)}
    if not rows or not needed <= set(rows[0]):
        lacking = f"; these are missing: {', '.join(sorted(needed - set(rows[0])))}" if rows else ""
        raise ValueError(f"{path} has no rows as `python -m benchmarks.offload` writes them{lacking}.")
    return {tuple(row[k] for k in KEY): row for row in rows}


def noise(row: dict[str, str]) -> float:
    """Half of the spread between the quartiles, relative to the median; infinite where one call has none."""
    if row.get("calls") == "1":
        return math.inf
    median, q25, q75 = (float(row.get(k) or 0) for k in ("median_s", "q25_s", "q75_s"))
    return (q75 - q25) / 2 / median if median > 0 else 0.0


def compare(old: Path, new: Path, band: float = 0.05, any_machine: bool = False) -> tuple[list[Finding], int]:
    """What got worse, and how many rows could be compared. `bands` says what is taken for noise.

    Raises:
        ValueError: a file is no result, the two have no row in common, or they are of different machines.
    """
    before, after = read(old), read(new)
    common = [key for key in before if key in after]
    if not common:
        raise ValueError(
            f"{old} and {new} have no row in common: same model, size, dtype, mode, compile and steps, both simulated or not."
        )
    for column in () if any_machine else MACHINE:
        ran = [{rows[key][column] for key in common if rows[key]["median_s"]} for rows in (before, after)]
        if ran[0] and ran[1] and ran[0] != ran[1]:
            was, now = (" and ".join(sorted(names)) for names in ran)
            raise ValueError(
                f"they are of different machines, {was} and {now}: --any-machine compares them all the same."
            )
    found = []
    for key, was in before.items():
        name = f"{key[0]}, {key[1]}, compile {key[2]}, {key[3]} steps"
        if was["median_s"] and key not in after:
            found.append(Finding(name, "is gone:", "ran", "no row", 0.0))
        elif key in after:
            found += _worse(name, was, after[key], band)
    return found, len(common)


def links(old: Path, new: Path) -> str:
    """What to know of the links that the two were measured over: nothing, or that they differ."""
    told = []
    for path in (old, new):
        figures = [float(row["link_gbps"]) for row in read(path).values() if row.get("link_gbps")]
        told.append(statistics.median(figures) if figures else None)
    was, now = told
    if not was or not now or abs(now / was - 1) <= LINK_BAND:
        return ""
    return f"The links differ, {was:.3g} and {now:.3g} GB/s: times of all but resident depend on that."


def _worse(name: str, was: dict[str, str], now: dict[str, str], band: float) -> list[Finding]:
    if now["error"] and was["error"] != now["error"]:
        return [Finding(name, "fails:", was["error"] or "ran", now["error"], 0.0)]
    if was["median_s"] and not now["median_s"]:
        return [Finding(name, "has no figures any more:", f"{float(was['median_s']):.3f} s", "nothing", 0.0)]
    found = []
    if was["equal"] == "True" and now["equal"] != "True":
        what = "its image is not the resident one's any more:"
        found.append(Finding(name, what, was["image"], now["image"], 0.0))

    def grew(column: str, what: str, unit: str, scale: float, allowed: float, slack: float = 0.0) -> None:
        if was[column] and now[column]:
            values = float(was[column]), float(now[column])
            if values[1] > values[0] * (1 + allowed) + slack:
                found.append(
                    Finding(name, what, *(f"{v / scale:.{3 if unit == ' s' else 1}f}{unit}" for v in values), allowed)
                )

    widest = max(band, WIDEST)
    grew("median_s", "time", " s", 1, min(max(band, 3 * max(noise(was), noise(now))), widest))
    grew("first_s", "first call", " s", 1, widest)
    grew("peak_allocated", "peak", " MiB", 2**20, MEMORY_BAND)
    grew("peak_reserved", "peak reserved", " MiB", 2**20, RESERVED_BAND)
    grew("h2d_nbytes", "copied in", " MiB", 2**20, RESERVED_BAND, COPIED_SLACK)
    grew("pinned_nbytes", "pinned", " MiB", 2**20, RESERVED_BAND, COPIED_SLACK)
    grew("rss_nbytes", "the process's memory", " MiB", 2**20, HOST_BAND)
    grew("d2h_nbytes", "written back", " MiB", 2**20, 0.0, COPIED_SLACK)
    grew("recompiles", "recompiles", "", 1, 0.0)
    return found
