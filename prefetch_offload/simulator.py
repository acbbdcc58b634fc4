"""The same core on a virtual clock: what a call will take, where it will wait, and how far that is from physics. Pure.

    prediction = simulate(workload, shares, budget_nbytes, Link(25.0))

One compute stream and one link, each in order, as on a device. The host runs ahead of both, so that a copy is held up
only by the link and by the kernels that were enqueued before its memory was freed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .planner import EntryPlan, follow, lasting, plan_entry
from .residency import Await, Drop, Dropped, Entered, Instruction, Load, Needed, Prefetched, Residency, State
from .trace import Level, Span, Timeline
from .window import Scripted, Share, Window, begun, held_first, window_of

# Passes of a run that are simulated one by one; those in between repeat the last of them. 2 fill the window and show
# its steady state, 1 is the last, in which the next component comes in.
SIMULATED_PASSES = 3


@dataclass(frozen=True)
class ComponentLoad:
    """One component as a planner sees it.

    Attributes:
        units: in order of use within a pass, each once.
        nbytes: device bytes of each unit.
        compute_ms: time of each unit in one pass, without waiting.
        activation_nbytes: device memory in use besides weights while it runs.
        must: units read throughout its run; they cannot be streamed.
        streamable: False: all units have to be there at once (a compiled graph, a module with its own `.to()`).
        apart: no module reads several units at once, those in `must` aside.
        copy_nbytes: bytes that a unit puts on the link, where they are not those that it takes on the device.
        unpack_ms: what turning them into the unit takes behind the copy, while the link goes on with the next one.
    """

    units: tuple[str, ...]
    nbytes: Mapping[str, int]
    compute_ms: Mapping[str, float]
    activation_nbytes: int = 0
    must: frozenset[str] = frozenset()
    streamable: bool = True
    apart: bool = True
    copy_nbytes: Mapping[str, int] = field(default_factory=dict)
    unpack_ms: Mapping[str, float] = field(default_factory=dict)

    def link_nbytes(self, unit: str) -> int:
        """Bytes that a copy of `unit` puts on the link."""
        return self.copy_nbytes.get(unit, self.nbytes[unit])

    def load_ms(self, unit: str, link: Link) -> float:
        """From the start of a unit's copy until it can be read."""
        return self.link_ms(unit, link) + self.unpack_ms.get(unit, 0.0)

    def link_ms(self, unit: str, link: Link) -> float:
        """How long its copy takes the link."""
        return link.copy_ms(self.link_nbytes(unit))

    def next_ms(self, unit: str, link: Link) -> float:
        """From the start of a unit's copy until that of another can begin. With two buffers to arrive in, what is slower of
        copying and unpacking sets the pace."""
        return max(self.link_ms(unit, link), self.unpack_ms.get(unit, 0.0))

    @property
    def total_nbytes(self) -> int:
        return sum(self.nbytes[u] for u in self.units)

    @property
    def pass_ms(self) -> float:
        return sum(self.compute_ms.get(u, 0.0) for u in self.units)

    @property
    def least_nbytes(self) -> int:
        """The fewest bytes of weights that it can run with: what stays, and one unit at a time of what does not."""
        if not self.streamable:
            return self.total_nbytes
        must = sum(self.nbytes[u] for u in self.must)
        return must + max((self.nbytes[u] for u in self.units if u not in self.must), default=0)


@dataclass(frozen=True)
class Workload:
    """A pipeline call.

    Attributes:
        components: by name.
        runs: (component, passes) in order; the call after it will be the same.
    """

    components: Mapping[str, ComponentLoad]
    runs: tuple[tuple[str, int], ...]

    @property
    def compute_ms(self) -> float:
        """A call of the resident pipeline: nothing but compute."""
        return sum(self.components[c].pass_ms * passes for c, passes in self.runs)

    @property
    def smallest_budget_nbytes(self) -> int:
        """The smallest budget that the call can run in."""
        return max((c.least_nbytes + c.activation_nbytes for c in self.components.values()), default=0)


@dataclass(frozen=True)
class Link:
    """Host to device. `gbps` in 10^9 bytes a second; `latency_ms` for each copy."""

    gbps: float
    latency_ms: float = 0.01

    def copy_ms(self, nbytes: int) -> float:
        return nbytes / self.gbps / 1e6 + self.latency_ms


@dataclass(frozen=True)
class Prediction:
    """What the last simulated call does; repeated passes are counted in.

    Attributes:
        call_ms: from its start to the end of its last kernel.
        copy_ms: by component, the time that its copies take, those for the call after this one included.
        stalled_ms: by component, the time that compute waits to read its units.
        h2d_nbytes: bytes copied in the call.
        peak_nbytes: the most device memory, weights and activations, at any time.
        timeline: of all simulated calls, repeated passes left out.
        first_ms: the first call, from an empty device.
        start_ms: of this call, in the timeline.
        link_gbps: what the link really carries, idle time included: `h2d_nbytes` over `call_ms`.
        link_use: the part of the call in which something is copied.
        exposed_ms: by component, the part of `copy_ms` in which compute waits, for whatever.
        copies: by component, how many units are copied.
        hits, misses: by component, how often a unit that was needed was there or on its way, and how often it was not
            (`Recorder.met`).
    """

    call_ms: float
    copy_ms: Mapping[str, float]
    stalled_ms: Mapping[str, float]
    h2d_nbytes: int
    peak_nbytes: int
    timeline: Timeline
    first_ms: float
    start_ms: float
    exposed_ms: Mapping[str, float]
    copies: Mapping[str, int]
    hits: Mapping[str, int]
    misses: Mapping[str, int]

    @property
    def link_gbps(self) -> float:
        return self.h2d_nbytes / self.call_ms / 1e6 if self.call_ms > 0 else 0.0

    @property
    def link_use(self) -> float:
        # One copy at a time; what this call begins for the next one is as much as the one before began for it.
        return min(1.0, sum(self.copy_ms.values()) / self.call_ms) if self.call_ms > 0 else 0.0


@dataclass(frozen=True)
class _Totals:
    ms: float
    noted: dict[tuple[str, str], float]
    h2d_nbytes: int

    def since(self, before: _Totals, what: str) -> dict[str, float]:
        """By component, what was noted after `before`."""
        return {n: value - before.noted.get((w, n), 0.0) for (w, n), value in self.noted.items() if w == what}


@dataclass
class _Clock:
    """The two streams' times, and what has been recorded."""

    compute: float = 0.0
    copy: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    copies: list[Span] = field(default_factory=list)  # those of `spans` that are copies
    levels: list[Level] = field(default_factory=list)
    peak_nbytes: int = 0
    skipped_ms: float = 0.0
    noted: dict[tuple[str, str], float] = field(default_factory=dict)  # by what and component
    h2d_nbytes: int = 0

    def totals(self) -> _Totals:
        return _Totals(self.compute + self.skipped_ms, dict(self.noted), self.h2d_nbytes)

    def note(self, what: str, name: str, amount: float = 1) -> None:
        self.noted[what, name] = self.noted.get((what, name), 0) + amount

    def waits(self, name: str, unit: str, wait: float) -> None:
        """Compute waits to read `unit`. Copies run one behind another, and all that run meanwhile are enqueued."""
        start, end = self.compute, self.compute + wait
        self.spans.append(Span("stalls", name, start, wait, {"unit": unit}))
        self.note("stalled", name, wait)
        for copy in reversed(self.copies):
            if copy.end_ms <= start:
                break
            self.note("exposed", copy.name, max(0.0, min(end, copy.end_ms) - max(start, copy.start_ms)))

    def repeat(self, before: _Totals, times: int) -> None:
        """What happened since `before` happens so many times more."""
        now = self.totals()
        self.skipped_ms += times * (now.ms - before.ms)
        for key, value in self.noted.items():
            self.noted[key] = value + times * (value - before.noted.get(key, 0))
        self.h2d_nbytes += times * (now.h2d_nbytes - before.h2d_nbytes)


class _Device:
    """Carries out what the core says, as the engine does."""

    def __init__(
        self,
        workload: Workload,
        shares: Mapping[str, Share],
        budget_nbytes: int,
        link: Link,
        every_pass: bool,
    ) -> None:
        self.workload, self.shares, self.budget, self.link = workload, shares, budget_nbytes, link
        self.every_pass = every_pass
        self.clock = _Clock()
        self.met: set[str] = set()  # units that were counted when their component was entered, and not read since
        self.residency = Residency()
        self.owner: dict[str, str] = {}
        self.nbytes: dict[str, int] = {}
        self.travel: dict[str, tuple[float, float, float, int]] = {}  # of units loaded before: see `_travel`
        for name, component in workload.components.items():
            for unit in component.units:
                self.residency.add_unit(unit, component.nbytes[unit])
                self.owner[unit] = name
                self.nbytes[unit] = component.nbytes[unit]
            self.residency.set_component(name, component.units)
        self.heads = {name: self._held_first(name, False) for name in shares if self._streams(name)}
        self.first = {name: self._held_first(name, True) for name in self.heads}

    def _streams(self, name: str) -> bool:
        share = self.shares.get(name)
        if share is None:
            return False
        return share.script is not None or not share.keep.issuperset(self.workload.components[name].units)

    def _held_first(self, name: str, entered: bool) -> tuple[str, ...]:
        """What a component that streams holds before it begins, or when it does."""
        component = self.workload.components[name]
        return held_first(component.units, component.nbytes, self.shares[name], entered)

    def carry_out(self, instructions: Sequence[Instruction], activations: int) -> None:
        clock = self.clock
        for instruction in instructions:
            unit = instruction.unit
            name = self.owner[unit]
            if isinstance(instruction, Load):
                start = max(clock.copy, clock.compute)
                took, pace, behind, nbytes = self._travel(name, unit)
                clock.copy = start + pace
                clock.ready[unit] = clock.copy + behind
                clock.h2d_nbytes += nbytes
                clock.copies.append(Span("copy", name, start, took, {"unit": unit, "nbytes": nbytes}))
                clock.spans.append(clock.copies[-1])
                clock.note("copied", name, took)
                clock.note("copies", name)
            elif isinstance(instruction, Await):
                wait = clock.ready[unit] - clock.compute
                if wait > 0:
                    clock.waits(name, unit, wait)
                    clock.compute += wait
            elif isinstance(instruction, Drop) and not instruction.arrived:
                clock.compute = max(clock.compute, clock.ready[unit])  # freed behind its copy
        # Drops come before the loads that take their place, so what is held in the end is the most.
        clock.peak_nbytes = max(clock.peak_nbytes, self.residency.held_nbytes + activations)
        clock.levels.append(Level(clock.compute, self.residency.held_nbytes))

    def _travel(self, name: str, unit: str) -> tuple[float, float, float, int]:
        """What a load takes on the link, until the next one, and from then until it can be read; and its bytes on the link."""
        found = self.travel.get(unit)
        if found is None:
            c, link = self.workload.components[name], self.link
            pace = c.next_ms(unit, link)
            found = c.link_ms(unit, link), pace, c.load_ms(unit, link) - pace, c.link_nbytes(unit)
            self.travel[unit] = found
        return found

    def run_call(self) -> None:
        runs = self.workload.runs
        names = [name for name, _ in runs]
        for i, (name, passes) in enumerate(runs):
            self.run(name, passes, tuple(names[i + 1 :] + names[: i + 1]), begins=i == 0)

    def run(self, name: str, passes: int, upcoming: tuple[str, ...], begins: bool) -> None:
        component = self.workload.components[name]
        cap = self.budget - component.activation_nbytes
        share, first = self.shares[name] if name in self.heads else None, self.first.get(name, ())
        if share is not None and begins:
            own = sum(component.nbytes[u] for u in self.residency.held(name))
            beside = self.residency.held_nbytes - own
            share = begun(share, component.units, component.nbytes, component.must, own, beside, cap)
            first = first if share is self.shares[name] else component.units
        room = cap
        if share is not None:
            # The window fills up after the entry, without asking again: what it may grow by is not for others.
            room -= share.limit_nbytes - sum(component.nbytes[u] for u in first)
        script = share.script if share is not None else None
        if script is not None:
            plan = follow(script.first(), self.residency.held(), component.units, component.streamable)
        else:
            plan = plan_entry(
                self.residency.view(),
                name,
                room,
                upcoming,
                prefetch=share is None or share.ahead,
                heads={**self.heads, name: first} if share is not None else self.heads,
                lazily=component.streamable,
            )
            plan = self.lasting(plan, room, upcoming)
        act = component.activation_nbytes
        entered = self.residency.handle(Entered(name, plan))
        self.carry_out(entered, act)
        self.met = set(self.residency.held(name))
        missing = sum(isinstance(i, Load) and self.owner[i.unit] == name for i in entered)
        self.clock.note("misses", name, missing)
        self.clock.note("hits", name, len(self.met) - missing)
        window: Window | None = None
        if share is not None:
            window = window_of(component.units, component.nbytes, share)
            for unit in self.residency.held():
                if window.streams(unit):
                    window.arrived(unit)
        simulated = passes if self.every_pass else min(passes, SIMULATED_PASSES if script is None else len(script.rows))
        for number in range(simulated):
            last = number == simulated - 1
            before = self.clock.totals()
            self.one_pass(component, window, last, cap, upcoming)
            self.met.clear()
            if number == simulated - 2 and passes > simulated:
                self.clock.repeat(before, passes - simulated)

    def room_nbytes(self, name: str) -> int:
        """Bytes that others may hold while `name` runs."""
        component = self.workload.components[name]
        own = self.shares[name].limit_nbytes if name in self.heads else component.total_nbytes
        return self.budget - component.activation_nbytes - own

    def lasting(self, plan: EntryPlan, cap: int, upcoming: tuple[str, ...]) -> EntryPlan:
        return lasting(plan, self.residency.held(), cap, self.nbytes, self.owner, upcoming, self.room_nbytes)

    def one_pass(
        self, component: ComponentLoad, window: Window | None, last: bool, cap: int, upcoming: tuple[str, ...]
    ) -> None:
        act, clock, residency = component.activation_nbytes, self.clock, self.residency
        name = self.owner[component.units[0]] if component.units else ""
        if window is not None:
            window.begin()
        for i, unit in enumerate(component.units):
            streamed = window is not None and window.streams(unit)
            if residency.state(unit) is not State.READY:
                if unit in self.met:  # counted when the component was entered
                    self.met.remove(unit)
                else:
                    clock.note("misses" if residency.state(unit) is State.HOST else "hits", name)
            if isinstance(window, Scripted):
                plan = follow(window.row(unit) or (), residency.held())
                if plan.drops or plan.prefetches:
                    self.carry_out(residency.handle(Prefetched(plan)), act)
            elif window is not None and streamed:
                drops = () if unit in window.held else window.need(unit)[0]
                if drops:
                    self.carry_out(residency.handle(Dropped(tuple(drops))), act)
            if residency.state(unit) is not State.READY:
                self.carry_out(residency.handle(Needed((unit,))), act)
            assert residency.state(unit) is State.READY and clock.ready[unit] <= clock.compute + 1e-6, unit
            start = clock.compute
            clock.compute += component.compute_ms.get(unit, 0.0)
            clock.spans.append(Span("compute", name, start, clock.compute - start, {"unit": unit}))
            if window is None:
                continue
            if streamed:
                drops, loads = window.done(unit, last)
                if drops or loads:
                    self.carry_out(residency.handle(Prefetched(EntryPlan(tuple(drops), tuple(loads)))), act)
            if last and turn(i, len(component.units)) and window.finished():
                rest = component.must.union(component.units[i + 1 :])
                plan = plan_entry(residency.view(), None, cap, upcoming, protected=rest, heads=self.heads)
                plan = self.lasting(plan, cap, upcoming)
                if plan.drops or plan.prefetches:
                    self.carry_out(residency.handle(Prefetched(plan)), act)


def turn(index: int, n_units: int) -> bool:
    """Whether to look for what to prefetch behind unit `index` of a last pass: some sixteen times in it, and at its end."""
    every = max(1, n_units // 16)
    return index % every == every - 1 or index == n_units - 1


def simulate(
    workload: Workload,
    shares: Mapping[str, Share],
    budget_nbytes: int,
    link: Link,
    calls: int = 2,
    every_pass: bool = False,
) -> Prediction:
    """`calls` calls in a row, the first from an empty device; the figures are the last one's.

    Args:
        shares: for components that do not keep all of their units on the device while they run; others do.
        budget_nbytes: device bytes for weights and activations.
        every_pass: the timeline has all passes, also those that repeat.
    """
    device = _Device(workload, shares, budget_nbytes, link, every_pass)
    clock = device.clock
    before = clock.totals()
    first_ms = start_ms = 0.0
    for number in range(calls):
        before, start_ms = clock.totals(), clock.compute
        device.run_call()
        if number == 0:
            first_ms = clock.totals().ms
    after = clock.totals()
    return Prediction(
        call_ms=after.ms - before.ms,
        copy_ms=after.since(before, "copied"),
        stalled_ms=after.since(before, "stalled"),
        h2d_nbytes=after.h2d_nbytes - before.h2d_nbytes,
        peak_nbytes=clock.peak_nbytes,
        timeline=Timeline(tuple(sorted(clock.spans, key=lambda s: s.start_ms)), tuple(clock.levels), True, "predicted"),
        first_ms=first_ms,
        start_ms=start_ms,
        exposed_ms=after.since(before, "exposed"),
        copies={n: round(count) for n, count in after.since(before, "copies").items()},
        hits={n: round(count) for n, count in after.since(before, "hits").items()},
        misses={n: round(count) for n, count in after.since(before, "misses").items()},
    )
