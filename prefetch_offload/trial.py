"""What calls come to, and nothing else: the simulator's figures without its timeline, for planners that compare many. Pure.

    trials = Trials(workload, budget_nbytes, Link(25.0))
    trials(shares).call_ms

The same rules on the same virtual clock (`plan_entry`, `lasting`, `follow`, `Window`), several times as fast: there is no
state machine in between, and what depends on the workload alone is worked out once. `simulate` is the reference;
`tests/test_trial.py` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .planner import Turns, View, distances, follow, lasting, plan_entry
from .simulator import SIMULATED_PASSES, Link, Workload, turn
from .window import Scripted, Share, Window, begun, held_first, window_of


class Figures(NamedTuple):
    """Of the last call, as in `Prediction`; `first_ms` of the first."""

    call_ms: float
    first_ms: float
    h2d_nbytes: int
    peak_nbytes: int


class Trials:
    """Calls of `workload` in `budget_nbytes` over `link`, with whatever shares they are asked about."""

    def __init__(self, workload: Workload, budget_nbytes: int, link: Link) -> None:
        self.workload, self.budget_nbytes, self.link = workload, budget_nbytes, link
        self.components = {name: c.units for name, c in workload.components.items()}
        self.nbytes: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        # What a load takes until the next one, and then until it can be read; and its bytes on the link.
        self.travel: dict[str, tuple[float, float, int]] = {}
        for name, c in workload.components.items():
            for unit in c.units:
                self.nbytes[unit] = c.nbytes[unit]
                self.owner[unit] = name
                pace = c.next_ms(unit, link)
                self.travel[unit] = pace, c.load_ms(unit, link) - pace, c.link_nbytes(unit)
        self.prefetchable = frozenset(self.nbytes)
        self.totals = {name: c.total_nbytes for name, c in workload.components.items()}
        self.reads = {name: [(u, c.compute_ms.get(u, 0.0)) for u in c.units] for name, c in workload.components.items()}
        order = {u: i for units in self.components.values() for i, u in enumerate(units)}
        self.place = {u: i for i, u in enumerate(sorted(self.nbytes, key=lambda u: (order[u], u)))}
        names = [name for name, _ in workload.runs]
        self.upcoming = [tuple(names[i + 1 :] + names[: i + 1]) for i in range(len(names))]
        self._held_first: dict[tuple[str, Share], tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def __call__(self, shares: Mapping[str, Share], calls: int = 2) -> Figures:
        """As `simulate` with these arguments."""
        return _Trial(self, shares).figures(calls)

    def held_first(self, name: str, share: Share) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a component that streams holds before it begins, and when it does."""
        found = self._held_first.get((name, share))
        if found is None:
            of = (self.components[name], self.workload.components[name].nbytes, share)
            found = self._held_first[name, share] = held_first(*of, False), held_first(*of, True)
        return found

    def turns(self, upcoming: tuple[str, ...], heads: Mapping[str, tuple[str, ...]]) -> Turns:
        distance = distances(self.nbytes, {**self.components, **heads}, upcoming)
        n = len(distance)
        return Turns(distance, {u: distance[u] * n + place for u, place in self.place.items()})


class _Trial:
    """One device, as `_Device` of the simulator."""

    def __init__(self, of: Trials, shares: Mapping[str, Share]) -> None:
        self.of = of
        self.shares = {n: s for n, s in shares.items() if s.script or not s.keep.issuperset(of.components[n])}
        first = {name: of.held_first(name, share) for name, share in self.shares.items()}
        self.heads = {name: heads for name, (heads, _) in first.items()}
        self.first = {name: entered for name, (_, entered) in first.items()}
        self.rooms = {  # bytes that others may hold while it runs
            name: of.budget_nbytes
            - c.activation_nbytes
            - (self.shares[name].limit_nbytes if name in self.shares else of.totals[name])
            for name, c in of.workload.components.items()
        }
        self.turns: dict[tuple[int, tuple[str, ...] | None], Turns] = {}  # by run, and what is there first; None: idle
        self.now = self.link = self.skipped_ms = 0.0
        self.arrived: dict[str, bool] = {}  # of units that are on the device or on their way
        self.ready: dict[str, float] = {}
        self.held_nbytes = self.h2d_nbytes = self.peak_nbytes = 0
        self.activation_nbytes = 0

    def figures(self, calls: int) -> Figures:
        first_ms = ms = 0.0
        h2d_nbytes = 0
        for number in range(calls):
            ms, h2d_nbytes = self.now + self.skipped_ms, self.h2d_nbytes
            for i, (name, passes) in enumerate(self.of.workload.runs):
                self.run(i, name, passes)
            if number == 0:
                first_ms = self.now + self.skipped_ms
        return Figures(self.now + self.skipped_ms - ms, first_ms, self.h2d_nbytes - h2d_nbytes, self.peak_nbytes)

    def move(self, drops: Iterable[str], loads: Iterable[str]) -> None:
        """These leave, then those come."""
        nbytes, ready = self.of.nbytes, self.ready
        for unit in drops:
            if not self.arrived.pop(unit) and ready[unit] > self.now:
                self.now = ready[unit]  # freed behind its copy
            self.held_nbytes -= nbytes[unit]
        link = self.link
        for unit in loads:
            pace, behind, copied = self.of.travel[unit]
            link = (link if link > self.now else self.now) + pace
            ready[unit] = link + behind
            self.arrived[unit] = False
            self.held_nbytes += nbytes[unit]
            self.h2d_nbytes += copied
        self.link = link
        if self.held_nbytes + self.activation_nbytes > self.peak_nbytes:
            self.peak_nbytes = self.held_nbytes + self.activation_nbytes

    def need(self, unit: str) -> None:
        """`unit`, which is not there or on its way, is read."""
        if unit not in self.arrived:
            self.move((), (unit,))
        if self.ready[unit] > self.now:
            self.now = self.ready[unit]
        self.arrived[unit] = True

    def view(self) -> View:
        of = self.of
        return View(of.nbytes, frozenset(self.arrived), of.prefetchable, of.components, self.held_nbytes)

    def run(self, i: int, name: str, passes: int) -> None:
        of = self.of
        c, upcoming = of.workload.components[name], of.upcoming[i]
        cap = of.budget_nbytes - c.activation_nbytes
        self.activation_nbytes = c.activation_nbytes
        share, first = self.shares.get(name), self.first.get(name, ())
        if share is not None and i == 0:
            here = sum(of.nbytes[u] for u in c.units if u in self.arrived)
            share = begun(share, c.units, c.nbytes, c.must, here, self.held_nbytes - here, cap)
            first = first if share is self.shares[name] else c.units
        room = cap if share is None else cap - share.limit_nbytes + sum(of.nbytes[u] for u in first)
        if share is not None and share.script is not None:
            plan = follow(share.script.first(), self.arrived, c.units, c.streamable)
        else:
            heads = {**self.heads, name: first} if share is not None else self.heads
            ahead = share is None or share.ahead
            if (i, first) not in self.turns:
                self.turns[i, first] = of.turns(upcoming, heads)
            turns = self.turns[i, first]
            plan = plan_entry(self.view(), name, room, upcoming, frozenset(), ahead, heads, c.streamable, turns)
            plan = lasting(plan, self.arrived, room, of.nbytes, of.owner, upcoming, self.rooms.__getitem__)
        own = plan.loads
        if own is None:
            dropped = set(plan.drops)
            own = tuple(u for u in c.units if u in dropped or u not in self.arrived)
        self.move(plan.drops, own)
        if plan.loads is None:
            for unit in c.units:
                self.need(unit)
        if plan.prefetches:
            self.move((), plan.prefetches)
        window: Window | None = None
        if share is not None:
            window = window_of(c.units, c.nbytes, share)
            for unit in window.order:
                if unit in self.arrived:
                    window.arrived(unit)
        simulated = min(passes, SIMULATED_PASSES if share is None or share.script is None else len(share.script.rows))
        for number in range(simulated):
            ms, h2d_nbytes = self.now + self.skipped_ms, self.h2d_nbytes
            if window is None:
                self.whole_pass(name)
            else:
                self.one_pass(i, name, window, number == simulated - 1, cap)
            if number == simulated - 2 and passes > simulated:
                self.skipped_ms += (passes - simulated) * (self.now + self.skipped_ms - ms)
                self.h2d_nbytes += (passes - simulated) * (self.h2d_nbytes - h2d_nbytes)

    def whole_pass(self, name: str) -> None:
        arrived = self.arrived
        for unit, compute_ms in self.of.reads[name]:
            if not arrived.get(unit):
                self.need(unit)
            self.now += compute_ms

    def one_pass(self, i: int, name: str, window: Window, last: bool, cap: int) -> None:
        of, arrived = self.of, self.arrived
        reads = of.reads[name]
        streamed = frozenset(window.order)
        scripted = window if isinstance(window, Scripted) else None
        window.begin()
        for at, (unit, compute_ms) in enumerate(reads):
            streams = unit in streamed
            if scripted is not None:
                plan = follow(scripted.row(unit) or (), arrived)
                if plan.drops or plan.prefetches:
                    self.move(plan.drops, plan.prefetches)
            elif streams and unit not in window.held:
                self.move(window.need(unit)[0], ())
            if not arrived.get(unit):
                self.need(unit)
            self.now += compute_ms
            if streams:
                drops, loads = window.done(unit, last)
                if drops or loads:
                    self.move(drops, loads)
            if last and turn(at, len(reads)) and window.finished():
                upcoming = of.upcoming[i]
                if (i, None) not in self.turns:
                    self.turns[i, None] = of.turns(upcoming, self.heads)
                rest = of.workload.components[name].must.union(of.components[name][at + 1 :])
                plan = plan_entry(self.view(), None, cap, upcoming, rest, heads=self.heads, turns=self.turns[i, None])
                plan = lasting(plan, arrived, cap, of.nbytes, of.owner, upcoming, self.rooms.__getitem__)
                if plan.drops or plan.prefetches:
                    self.move(plan.drops, plan.prefetches)
