"""Figures about a run: what moved, what was hidden behind compute, what was exposed, and what had been predicted."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from .trace import Span, Timeline, busy_ms, overlap_ms, times_of, total_ms, within

if TYPE_CHECKING:
    from .clients import Client
    from .component import Component
    from .engine import Engine
    from .simulator import Prediction

# What is compared of each component.
COMPARED = ("copies", "hidden_ms", "exposed_ms", "stalled_ms", "hits", "misses")


@dataclasses.dataclass(frozen=True)
class Compiles:
    """Graphs, graph breaks and recompiles (the reason of each) within one call."""

    graphs: int
    graph_breaks: int
    recompiles: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ComponentStats:
    """One component since it was enabled.

    Attributes:
        name: what the pipeline calls it.
        nbytes: its weights, as units on the device take them.
        pinned: all of it is in pinned host memory, so it can be prefetched.
        activation_nbytes: device memory in use besides weights while it ran, at most; None: not measured yet.
        entries: how often the pipeline switched to it.
        hits, misses: units that were there, or on their way, when they were needed, and units that were not. See `Compared`.
        h2d_nbytes: bytes copied to the device.
        copy_ms: time its copies took on the copy stream.
        exposed_ms: the part of it in which compute waited, for them or for others.
        stalled_ms: time that compute waited to read its units.
        compute_ms: time from entering it to entering the next.
        graphs: graphs that torch.compile made while it ran, recompiled ones included; None: this PyTorch does not tell.
        graph_breaks: how often compiled code had to be cut; None as above.
        recompiles: the reason of each recompile: function, and the guard that failed.
        compiled_in_call: the same three of the last call; None as above.
        link_nbytes: what loading all of it puts on the link: less than `nbytes` where weights travel encoded.
        encoded: some of it does.
        host_nbytes: host memory that its weights take, encoded ones included.
        filed_nbytes: bytes of weights that lie in files instead, since what travels in their place is in memory.
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
    graphs: int | None = 0
    graph_breaks: int | None = 0
    recompiles: tuple[str, ...] = ()
    compiled_in_call: Compiles | None = None
    link_nbytes: int = 0
    encoded: bool = False
    host_nbytes: int = 0
    filed_nbytes: int = 0
    stalled_ms: float = 0.0

    @property
    def hidden_ms(self) -> float:
        """Copy time that compute did not wait for."""
        return max(0.0, self.copy_ms - self.exposed_ms)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One component in the last call: measured, and as the call's plan predicted it for a call in the steady state.

    A call has the copies that were begun from the end of the call before to its own end. The last of them may be for the call
    after it; in the steady state the call before began as many for this one.

    Attributes:
        streamed_nbytes: bytes of its units that do not stay from pass to pass.
        copies: units copied to the device.
        exposed_ms: the time in which its units were being copied while compute waited, for them or for others.
        hidden_ms: the rest of the time that its copies took on the copy stream.
        stalled_ms: the time that compute waited to read its units. It may be for copies of another component that are ahead
            of its own; over all components, this and `exposed_ms` differ by waits in which nothing was copied.
        hits: units that were on the device or on their way when they were needed. Needed is what a component is to hold when
            it is entered, and later any unit that is read for the first time since it left.
        misses: units that were not: their copies began only then.
        predicted_copies, predicted_hidden_ms, predicted_exposed_ms, predicted_stalled_ms, predicted_hits, predicted_misses:
            the same by the plan; None: there was no plan.
    """

    name: str
    streamed_nbytes: int
    copies: int
    hidden_ms: float
    exposed_ms: float
    stalled_ms: float
    hits: int
    misses: int
    predicted_copies: int | None
    predicted_hidden_ms: float | None
    predicted_exposed_ms: float | None
    predicted_stalled_ms: float | None
    predicted_hits: int | None
    predicted_misses: int | None


@dataclasses.dataclass(frozen=True)
class LastCall:
    """The last complete call, measured beside predicted.

    Attributes:
        ms: from its start to the end of its last kernel.
        predicted_ms: by the plan that it followed; None: it was the first, or nothing was planned.
        bound_ms: no schedule within the budget could have been faster, given the measured compute times and link.
        planned_because: why that plan was made.
    """

    ms: float
    predicted_ms: float | None
    bound_ms: float | None
    planned_because: str
    components: tuple[Compared, ...]


@dataclasses.dataclass(frozen=True)
class Stats:
    """A snapshot. Times are the device's own; those of `components` are from the last few thousand spans, and so is the link.
    Bytes and counts are totals, and `last_call` is complete.

    Attributes:
        simulated: made on the simulated accelerator.
        calls: pipeline calls that ended, with or without an error.
        h2d_nbytes, d2h_nbytes: weights copied to the device, and changed weights written back.
        pinned_nbytes: pinned host memory of all pipelines on the device, the staging ring's included.
        resident_nbytes: device memory that weights hold now.
        peak_nbytes: the highest device memory seen.
        pool_nbytes: device memory of units that keep their addresses (`stable_addresses`), what they are about to give back
            and what an arena keeps for them included.
        budget: as set.
        counts: noteworthy events: ``ladder`` (ran out of memory and tried again), ``prefetch refused``, ``cache given back``.
        last_call: the last complete call beside its plan; None: there was none.
        dropped_spans: spans, the oldest ones, that times and traces do not have any more.
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
    pool_nbytes: int
    link_gbps: float | None
    counts: dict[str, int]
    last_call: LastCall | None
    dropped_spans: int = 0

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
        streamed: for each component, the share of its bytes that is to pass through a window in every pass.
    """

    order: tuple[str, ...]
    resident: dict[str, float]
    streamed: dict[str, float]

    def __str__(self) -> str:
        return " -> ".join(self._of(name) for name in self.order)

    def _of(self, name: str) -> str:
        streamed = f", {self.streamed[name]:.0%} streamed" if self.streamed.get(name) else ""
        return f"{name} ({self.resident.get(name, 0.0):.0%} there{streamed})"


def plan(engine: Engine, client: Client) -> Plan:
    """The expected order of `client`'s next call and what is on the device."""
    held = set(engine.residency.held())
    names = {key: c.name for key, c in client.components.items()}
    resident = {
        c.name: sum(u.nbytes for u in c.units if u.key in held) / (c.nbytes or 1) for c in client.components.values()
    }
    streamed = {c.name: _streamed(client, c) / (c.nbytes or 1) for c in client.components.values()}
    return Plan(tuple(names[key] for key in client.order.expected if key in names), resident, streamed)


def _streamed(client: Client, component: Component) -> int:
    share = client.shares.get(component.key)
    return sum(u.nbytes for u in component.units if share is not None and u.key not in share.keep)


def _last_call(engine: Engine, client: Client) -> LastCall | None:
    call, plan = client.last_call, client.followed
    if call is None or call.mark is None:
        return None
    with engine.lock:
        times = engine.recorder.times(call, "copy", "stalls")
        earlier = engine.recorder.times(call, "copy", before=True)
    waits = [span for of in times.values() if of is not None for span in of["stalls"]]
    predicted = plan.prediction if plan is not None else None
    rows = []
    for key, component in client.components.items():
        of, of_earlier = times.get(key) or {"copy": [], "stalls": []}, earlier.get(key) or {"copy": []}
        figures = call.figures.get(key)
        copy_ms, exposed_ms = total_ms(of["copy"]), overlap_ms([*of["copy"], *of_earlier["copy"]], waits)
        rows.append(
            Compared(
                name=component.name,
                streamed_nbytes=_streamed(client, component),
                copies=len(of["copy"]),
                hidden_ms=max(0.0, copy_ms - exposed_ms),
                exposed_ms=exposed_ms,
                stalled_ms=total_ms(of["stalls"]),
                hits=figures.hits if figures is not None else 0,
                misses=figures.misses if figures is not None else 0,
                **_predicted(predicted, key),
            )
        )
    return LastCall(
        ms=call.mark.duration_ms(),
        predicted_ms=predicted.call_ms if predicted is not None else None,
        bound_ms=plan.bound_ms if plan is not None else None,
        planned_because=client.followed_because if plan is not None else "",
        components=tuple(rows),
    )


def _predicted(of: Prediction | None, key: str) -> dict[str, Any]:
    if of is None:
        return {f"predicted_{what}": None for what in COMPARED}
    exposed_ms = of.exposed_ms.get(key, 0.0)
    return {
        "predicted_copies": of.copies.get(key, 0),
        "predicted_hidden_ms": max(0.0, of.copy_ms.get(key, 0.0) - exposed_ms),
        "predicted_exposed_ms": exposed_ms,
        "predicted_stalled_ms": of.stalled_ms.get(key, 0.0),
        "predicted_hits": of.hits.get(key, 0),
        "predicted_misses": of.misses.get(key, 0),
    }


def predicted(client: Client, timeline: Timeline) -> Timeline | None:
    """What the plan of the client's last call expected of it, all passes, to lie beside that call in `timeline`."""
    plan = client.followed
    calls = [s for s in timeline.spans if s.track == "calls" and s.args["client"] == client.number and not s.args["failed"]]
    if plan is None or not calls:
        return None
    shown, start_ms, length_ms = plan.last_call()
    named = {key: component.name for key, component in client.components.items()}
    spans = [dataclasses.replace(s, name=named.get(s.name, s.name)) for s in shown.spans]
    spans.append(Span("calls", f"{calls[-1].name}, predicted", start_ms, length_ms))
    shown = dataclasses.replace(shown, spans=tuple(sorted(spans, key=lambda s: s.start_ms)))
    return within(shown, start_ms, start_ms + length_ms, calls[-1].start_ms - start_ms)


def collect(engine: Engine, client: Client) -> Stats:
    """Figures of `client`'s components. Waits for the device."""
    timeline = engine.timeline()
    recorder = engine.recorder
    components = []
    waits = times_of(s for s in timeline.spans if s.track == "stalls")
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
                exposed_ms=overlap_ms(times_of(_of(timeline, "copy", component.key)), waits),
                stalled_ms=_on(timeline, "stalls", component.key),
                compute_ms=_on(timeline, "compute", component.key),
                link_nbytes=sum(u.payload_nbytes for u in component.units),
                encoded=any(u.travels_encoded for u in component.units),
                host_nbytes=sum(u.host_nbytes for u in component.units),
                filed_nbytes=sum(u.filed_nbytes for u in component.units),
                **_compiles(component),
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
        peak_nbytes=max(engine.high_water, engine.lanes.peak_taken_nbytes()),
        pool_nbytes=engine.addresses.pool_nbytes if engine.addresses is not None else 0,
        link_gbps=moved / copy_ms / 1e6 if copy_ms > 0 else None,
        counts=dict(recorder.counts),
        last_call=_last_call(engine, client),
        dropped_spans=timeline.dropped,
    )


def _compiles(component: Component) -> dict[str, Any]:
    from .compiling import Counts, watch  # not above: figures can be shown without torch

    if watch.missing:
        return {"graphs": None, "graph_breaks": None}
    compiled = component.compiled
    total, call = (compiled.total, compiled.call) if compiled is not None else (Counts(), Counts())
    return {
        "graphs": total.graphs,
        "graph_breaks": total.breaks,
        "recompiles": tuple(total.recompiles),
        "compiled_in_call": Compiles(call.graphs, call.breaks, tuple(call.recompiles)),
    }


def _of(timeline: Timeline, track: str, key: str) -> list[Span]:
    return [s for s in timeline.spans if s.track == track and s.args.get("component") == key]


def _on(timeline: Timeline, track: str, key: str) -> float:
    return busy_ms(_of(timeline, track, key))
