"""The rows of `benchmarks.offload`: what is measured of a mode, and the file they are kept in between runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY = ("model", "mode", "compile", "steps", "simulated", "height", "width", "dtype")
SCENE = ("model", "compile", "height", "width", "dtype", "gpu")  # what rows of one picture or table have in common


@dataclasses.dataclass
class Row:
    """One mode at one step count. Seconds are over all timed calls of all rounds; bytes and times of copies are per call.

    Attributes:
        compile: what was compiled: nothing, the denoiser's repeated blocks, or the denoiser as one graph.
        first_s: the first call of a fresh pipeline; None at the step counts that came later in the same visit, and where ours
            was enabled already and has another budget.
        q25_s, q75_s: quartiles, by the inclusive method.
        peak_allocated: the allocator's peak during the timed calls, less what was allocated before the mode began.
        peak_reserved: the same of what the allocator took from the driver.
        driver_nbytes: the highest device memory in use by the driver's figure, contexts included, sampled every 20 ms
            during the timed calls; memory taken away to set a budget is not counted.
        rss_nbytes: the highest resident host memory of the process, sampled alike; None where the weights of another visit were
            kept beside it.
        pinned_nbytes: host memory pinned after the timed calls: by us, or in use in PyTorch's pinned allocator.
        exposed_ms, hidden_ms: copy time that compute waited for, or did not; None where nobody records it.
        h2d_nbytes, d2h_nbytes: weights copied each way; of other modes only the simulator tells.
        copy_gbps: bytes over busy time of the copy stream, in the timed calls.
        graphs, recompiles: of the whole visit, by Dynamo's counters; None where nothing was compiled.
        predicted_s, bound_s: a call by our plan, and the physical limit in that budget over the measured link.
        image: hash of the last image; `equal` compares it with the resident one.
        error: why there are no figures, or not all.
        budget: of the device memory, as asked for; empty where the mode takes what it likes.
        link_gbps: host to device as measured in the run of the last visit, as are the columns after it.
        peer: the package that the mode is of, where it is no part of diffusers, with its version.
        times: each timed call.
    """

    model: str
    mode: str
    compile: str
    steps: int
    simulated: bool
    height: int = 1024
    width: int = 1024
    dtype: str = ""
    budget: str = ""
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
    copy_gbps: float | None = None
    graphs: int | None = None
    recompiles: int | None = None
    predicted_s: float | None = None
    bound_s: float | None = None
    image: str = ""
    equal: bool | None = None
    error: str = ""
    gpu: str = ""
    host: str = ""
    link_gbps: float | None = None
    driver: str = ""
    versions: str = ""
    peer: str = ""
    commit: str = ""
    command: str = ""
    times: list[float] = dataclasses.field(default_factory=list, repr=False)

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    def took(self, seconds: list[float]) -> None:
        """So many more timed calls."""
        self.times += seconds
        self.calls, self.rounds = len(self.times), self.rounds + 1
        quartiles = statistics.quantiles(self.times, method="inclusive") if self.calls > 1 else [self.times[0]] * 3
        self.q25_s, self.median_s, self.q75_s = quartiles
        self.slowest_s = max(self.times)

    def most(self, **figures: int | None) -> None:
        """Keep the highest of each over all rounds."""
        for name, value in figures.items():
            if value is not None:
                setattr(self, name, max(getattr(self, name) or 0, value))


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` made.

    Raises:
        ValueError: it has other columns.
    """
    fields = {f.name: str(f.type) for f in dataclasses.fields(Row)}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(fields):
            raise ValueError(f"{path} has other columns than this version writes: give --out another folder.")
        return [Row(**{name: _value(fields[name], text) for name, text in row.items()}) for row in reader]


def latest(rows: Iterable[Row], *also: str) -> list[Row]:
    """Of two rows for the same on one GPU, and with the same in the columns `also`, the later one."""
    return list({(*r.key, r.gpu, *(getattr(r, name) for name in also)): r for r in rows}.values())


def by_scene(rows: Iterable[Row], *also: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows that have `SCENE`, and the columns `also`, in common, by those."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(getattr(row, name)) for name in (*SCENE, *also)), []).append(row)
    return found


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind.startswith("list"):
        return [float(t) for t in text.split()]
    if not text:
        return None
    if kind.startswith("bool"):
        return text == "True"
    return int(text) if kind.startswith("int") else float(text)


def write(out: Path, rows: list[Row], runs: list[dict[str, Any]]) -> None:
    """offload.csv and offload.json, each replaced in one go: who is killed meanwhile leaves the one before."""
    found = [dataclasses.asdict(row) for row in rows]
    parts = {name: out / f".{name}" for name in ("offload.csv", "offload.json")}
    with parts["offload.csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows({**row, "times": " ".join(f"{t:.6f}" for t in row["times"])} for row in found)
    parts["offload.json"].write_text(json.dumps({"runs": runs, "rows": found}, indent=1))
    for name, part in parts.items():
        os.replace(part, out / name)
