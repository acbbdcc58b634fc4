"""Figures about a run, and how they are shown: what moved, what was hidden behind compute, what was exposed."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .config import MIB
from .trace import Timeline, busy_ms

if TYPE_CHECKING:
    from .engine import Engine
    from .holdings import Client


@dataclasses.dataclass(frozen=True)
class ComponentStats:
    """One component since it was enabled.

    Attributes:
        name: what the pipeline calls it.
        nbytes: its weights, as units on the device take them.
        pinned: all of it is in pinned host memory, so it can be prefetched.
        activation_nbytes: device memory in use besides weights while it ran, at most; None: not measured yet.
        entries: how often the pipeline switched to it.
        hits, misses: units that were there, or on their way, when it was entered, and units that were not.
        h2d_nbytes: bytes copied to the device.
        copy_ms: time its copies took on the copy stream.
        exposed_ms: time that compute waited for them.
        compute_ms: time from entering it to entering the next.
    """

    name: str
    nbytes: int
    pinned: bool
    activation_nbytes: int | None
    entries: int
    hits: int
    misses: int
    h2d_nbytes: int
    copy_ms: float
    exposed_ms: float
    compute_ms: float

    @property
    def hidden_ms(self) -> float:
        """Copy time that compute did not wait for."""
        return max(0.0, self.copy_ms - self.exposed_ms)


@dataclasses.dataclass(frozen=True)
class Stats:
    """A snapshot. Times are the device's own, from the last few thousand spans; bytes and counts are totals.

    Attributes:
        simulated: made on the simulated accelerator.
        calls: pipeline calls that ended, with or without an error.
        h2d_nbytes, d2h_nbytes: weights copied to the device, and changed weights written back.
        pinned_nbytes: pinned host memory of all pipelines on the device, the staging ring's included.
        resident_nbytes: device memory that weights hold now.
        peak_nbytes: the highest device memory the allocator has seen.
        budget: as set.
        counts: noteworthy events: ``ladder`` (ran out of memory and tried again), ``prefetch refused``.
    """

    device: str
    simulated: bool
    budget: int | str | None
    calls: int
    components: tuple[ComponentStats, ...]
    h2d_nbytes: int
    d2h_nbytes: int
    pinned_nbytes: int
    resident_nbytes: int
    peak_nbytes: int
    link_gbps: float | None
    counts: dict[str, int]

    def to_json(self) -> str:
        """Everything, with the derived figures, as JSON."""
        record = dataclasses.asdict(self)
        for shown, component in zip(record["components"], self.components, strict=True):
            shown["hidden_ms"] = component.hidden_ms
        return json.dumps(record)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is expected of the next call.

    Attributes:
        order: components in the order of the last call, or of the pipeline's sequence before there was one.
        resident: for each component, the share of its bytes that is on the device or on its way.
    """

    order: tuple[str, ...]
    resident: dict[str, float]

    def __str__(self) -> str:
        return " -> ".join(f"{name} ({self.resident.get(name, 0.0):.0%} there)" for name in self.order)


def plan(engine: Engine, client: Client) -> Plan:
    """The expected order of `client`'s next call and what is on the device."""
    held = set(engine.residency.held())
    names = {key: c.name for key, c in client.components.items()}
    resident = {
        c.name: sum(u.nbytes for u in c.units if u.key in held) / (c.nbytes or 1) for c in client.components.values()
    }
    return Plan(tuple(names[key] for key in client.order.expected if key in names), resident)


def collect(engine: Engine, client: Client) -> Stats:
    """Figures of `client`'s components. Waits for the device."""
    timeline = engine.timeline()
    recorder = engine.recorder
    components = []
    for component in client.components.values():
        totals = recorder.of(component.key)
        known = [a for (key, _), a in client.memory.activations.items() if key == component.key]  # type: ignore[misc]
        components.append(
            ComponentStats(
                name=component.name,
                nbytes=component.nbytes,
                pinned=all(u.prefetchable for u in component.units),
                activation_nbytes=max(known, default=None),
                entries=totals.entries,
                hits=totals.hits,
                misses=totals.misses,
                h2d_nbytes=totals.h2d_nbytes,
                copy_ms=_on(timeline, "copy", component.key),
                exposed_ms=_on(timeline, "stalls", component.key),
                compute_ms=_on(timeline, "compute", component.key),
            )
        )
    copies = [s for s in timeline.spans if s.track == "copy" and s.args["component"] in client.components]
    copy_ms = busy_ms(copies)
    moved = sum(int(s.args["nbytes"]) for s in copies)
    return Stats(
        device=str(engine.device),
        simulated=timeline.simulated,
        budget=client.settings.budget,
        calls=client.calls,
        components=tuple(components),
        h2d_nbytes=sum(c.h2d_nbytes for c in components),
        d2h_nbytes=sum(c.d2h_nbytes for c in client.components.values()),
        pinned_nbytes=engine.pins.nbytes,
        resident_nbytes=engine.residency.held_nbytes,
        peak_nbytes=max(engine.high_water, engine.lanes.peak_nbytes()),
        link_gbps=moved / copy_ms / 1e6 if copy_ms > 0 else None,
        counts=dict(recorder.counts),
    )


def _on(timeline: Timeline, track: str, key: str) -> float:
    return busy_ms(s for s in timeline.spans if s.track == track and s.args.get("component") == key)


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


def summary(stats: Stats) -> str:
    """The figures that concern all components."""
    link = f"{stats.link_gbps:.2f} GB/s" if stats.link_gbps else "no copies"
    noted = "".join(f"; {what}: {n}" for what, n in stats.counts.items())
    return (
        f"to the device {stats.h2d_nbytes / MIB:.1f} MiB at {link}, back {stats.d2h_nbytes / MIB:.2f} MiB; pinned "
        f"{stats.pinned_nbytes / MIB:.1f} MiB; on the device now {stats.resident_nbytes / MIB:.1f} MiB, peak "
        f"{stats.peak_nbytes / MIB:.1f} MiB{noted}"
    )


def render(stats: Stats) -> str:
    """Table and summary as plain text."""
    console = Console(file=io.StringIO(), width=118)
    console.print(table(stats))
    console.print(summary(stats), soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
