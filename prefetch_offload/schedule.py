"""Schedules of a small call, decision by decision: which units are on the device at every read. Pure.

    shares = scripted(workload, budget_nbytes, Link(25.0), shares)

A window keeps the same units in every pass. With few and large units that costs up to a sixth of a call, since the best
ones to drop differ from pass to pass; so calls of few units are searched for the shortest schedule of all, which shares
then follow as a script.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .bound import lower_bound_ms
from .simulator import Link, Workload
from .trial import Trials
from .window import Script, Share

MOST_UNITS = 8  # every set of them may be on the device: twice as many with each more
MOST_READS = 80
DECISIONS = 60_000  # that may be tried: up to half a second, once. A third of it: 2 of 500 cases over 5% from the optimum
CALLS = 4  # until what a call leaves on the link has come to rest
ENOUGH = 1.005  # of the physical limit: not worth a search
BEAM = 200  # states to go on from behind each read
ROUNDS = 4  # calls in which what a call leaves on the link has to come to rest

# What a call begins with, later than its start: when the link is free, and when each unit arrives.
Lag = tuple[float, tuple[float, ...]]


@dataclass(frozen=True)
class Schedule:
    """A call that leaves the device as it found it.

    Attributes:
        ms: what it takes.
        held: units on the device or on their way: before the call, and during each read.
    """

    ms: float
    held: tuple[frozenset[str], ...]


class _State(NamedTuple):
    """Behind a read: when the kernels and the link are done, and when units that are on their way arrive."""

    now: float
    link: float
    ready: tuple[float, ...]
    after: int  # the set on the device
    before: _State | None
    least: float  # the call takes at least so long


def scripted(workload: Workload, budget_nbytes: int, link: Link, shares: Mapping[str, Share]) -> dict[str, Share]:
    """`shares`, or scripts that make a shorter call.

    Components have to run once in a call and read one unit at a time.
    """
    n_reads = sum(passes * len(workload.components[name].units) for name, passes in workload.runs)
    names = [name for name, _ in workload.runs]
    if n_reads > MOST_READS or len(set(names)) < len(names) or not all(c.apart for c in workload.components.values()):
        return dict(shares)
    trials = Trials(workload, budget_nbytes, link)
    before = trials(shares, CALLS)
    fits = before.peak_nbytes <= budget_nbytes
    if fits and before.call_ms <= ENOUGH * lower_bound_ms(workload, budget_nbytes, link):
        return dict(shares)
    found, _ = repeating(workload, budget_nbytes, link, before.call_ms * (1 - 1e-6), DECISIONS)
    if found is None:
        return dict(shares)
    scripts = _scripts(workload, found)
    after = trials(scripts, CALLS)
    return scripts if after.peak_nbytes <= budget_nbytes and after.call_ms < before.call_ms else dict(shares)


def _scripts(workload: Workload, schedule: Schedule) -> dict[str, Share]:
    reads = [
        (name, unit) for name, passes in workload.runs for _ in range(passes) for unit in workload.components[name].units
    ]
    n = len(reads)
    shares: dict[str, Share] = {}
    at = 0
    for name, passes in workload.runs:
        c = workload.components[name]
        rows, most = [], c.least_nbytes
        for _ in range(passes):
            row = []
            for _ in c.units:
                held = schedule.held[at + 1]
                following = dict.fromkeys(reads[(at + i) % n][1] for i in range(n))  # in order of next use
                row.append(tuple(u for u in following if u in held))
                most = max(most, sum(c.nbytes[u] for u in held if u in c.nbytes))
                at += 1
            rows.append(tuple(row))
        shares[name] = Share(most, c.must, script=Script(c.units, tuple(rows)))
    return shares


def repeating(workload: Workload, budget_nbytes: int, link: Link, beat_ms: float, effort: int) -> tuple[Schedule | None, bool]:
    """The shortest call in less than `beat_ms` that can be repeated, or None; and whether that is certain.

    Before each read any units may be dropped and any loaded; units loaded together come in order of use. A state is left
    out when another one with the same units is no later in anything, or when what is left must take too long.

    Args:
        effort: decisions to try.
    """
    return _Schedules(workload, budget_nbytes, link, beat_ms, effort).search()


@dataclass
class _Schedules:
    workload: Workload
    budget_nbytes: int
    link: Link
    best_ms: float
    effort: int
    found: Schedule | None = None
    certain: bool = True
    choices: dict[tuple[int, int], list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)

    def search(self) -> tuple[Schedule | None, bool]:
        components = self.workload.components
        self.names = [u for c in components.values() for u in c.units]
        nbytes = {u: c.nbytes[u] for c in components.values() for u in c.units}
        index = {u: v for v, u in enumerate(self.names)}
        n = self.n = len(self.names)
        self.size = [nbytes[u] for u in self.names]
        self.copy = [c.next_ms(u, self.link) for c in components.values() for u in c.units]
        self.behind = [c.load_ms(u, self.link) - c.next_ms(u, self.link) for c in components.values() for u in c.units]
        self.total = [sum(self.size[v] for v in range(n) if m >> v & 1) for m in range(1 << n)]
        self.reads: list[tuple[int, float, int]] = []  # unit, compute, room
        self.whole: list[int] = []  # units that have to be there together with it
        self.fixed: list[bool] = []  # nothing can move before it: it is in the middle of one that does not stream
        for name, passes in self.workload.runs:
            c = components[name]
            self.fixed += [not c.streamable and i > 0 for i in range(passes * len(c.units))]
            there = sum(1 << index[u] for u in (c.must if c.streamable else c.units))
            for _ in range(passes):
                for u in c.units:
                    self.reads.append((index[u], c.compute_ms.get(u, 0.0), self.budget_nbytes - c.activation_nbytes))
                    self.whole.append(there)
        end = self.end = len(self.reads)
        self.rest = [0.0] * (end + 1)  # at least so long from each read on
        self.next = [[2 * end] * n for _ in range(2 * end + 1)]  # the next read of each unit
        for i in range(2 * end - 1, -1, -1):
            self.next[i] = [*self.next[i + 1]]
            self.next[i][self.reads[i % end][0]] = i
        for i in range(end - 1, -1, -1):
            self.rest[i] = self.rest[i + 1] + self.reads[i][1]
        self.order = [sorted(range(n), key=self.next[i].__getitem__) for i in range(end)]
        self.ahead = [  # the units that are read again in this call, in order, and what follows that
            [(v, self.rest[self.next[i + 1][v]]) for v in self.order[i] if self.next[i + 1][v] < end] for i in range(end)
        ]
        for ahead in self.ahead:
            ahead.sort(key=lambda a: -a[1])
        starts = sorted((self._least(m), m) for m in range(1 << n) if self.total[m] <= self.reads[-1][2])
        for least, start in starts:
            if least >= self.best_ms:
                break
            if self.effort <= 0:
                return self.found, False
            self._from(start)
        return self.found, self.certain

    def _least(self, start: int) -> float:
        """What a call that begins with `start` takes at least."""
        queue, least = 0.0, self.rest[0]
        for v in self.order[0]:
            if not start >> v & 1 and self.next[0][v] < self.end:
                queue += self.copy[v]
                least = max(least, queue + self.behind[v] + self.rest[self.next[0][v]])
        return least

    def _from(self, start: int) -> None:
        """Calls that begin and end with `start`: from a free link first, then from what such a call leaves."""
        lags: list[Lag] = [(0.0, (0.0,) * self.n)]
        for _ in range(ROUNDS):
            left: set[Lag] = set()
            for lag in lags:
                for held, s in self._call(start, lag):
                    if start & ~held or s.now >= self.best_ms:
                        continue
                    late = tuple(max(0.0, t - s.now) if start >> v & 1 else 0.0 for v, t in enumerate(s.ready))
                    left.add((s.link - s.now, late))
                    if _no_later((s.link - s.now, late), lag):
                        self.best_ms = s.now
                        self.found = Schedule(s.now, self._path(s))
            lags = []
            for one in sorted(left):
                if not any(_no_later(other, one) for other in lags):
                    lags.append(one)
            if not lags:
                return
        self.certain = False

    def _set(self, mask: int) -> frozenset[str]:
        return frozenset(self.names[v] for v in range(self.n) if mask >> v & 1)

    def _path(self, state: _State | None) -> tuple[frozenset[str], ...]:
        found = []
        while state is not None:
            found.append(self._set(state.after))
            state = state.before
        return tuple(reversed(found))

    def _call(self, start: int, lag: Lag) -> Iterator[tuple[int, _State]]:
        layer = {start: [_State(0.0, lag[0], lag[1], start, None, 0.0)]}
        for i in range(self.end):
            found: dict[int, list[_State]] = {}
            for held, states in layer.items():
                for loads, after in self._choices(held, i):
                    self.effort -= len(states)
                    for state in states:
                        new = self._step(i, state, loads, after)
                        if new is not None:
                            found.setdefault(after, []).append(new)
                if self.effort <= 0:
                    self.certain = False
                    return
            layer = {}
            for held, states in found.items():
                front: list[_State] = []
                for s in sorted(states, key=lambda s: s[:3]):
                    if not any(_before(f, s) for f in front):
                        front.append(s)
                layer[held] = front
            if sum(map(len, layer.values())) > BEAM:
                self.certain = False
                every = [s for some in layer.values() for s in some]
                layer = {}
                for s in sorted(every, key=lambda s: (s.least, *s[:4]))[:BEAM]:
                    layer.setdefault(s.after, []).append(s)
        for held, states in layer.items():
            for s in states:
                yield held, s

    def _step(self, i: int, state: _State, loads: tuple[int, ...], after: int) -> _State | None:
        """Read number `i` behind these loads; None: too late."""
        unit, compute, _ = self.reads[i]
        now, link, ready = state.now, state.link, [*state.ready]
        for v in loads:
            link = (link if link > now else now) + self.copy[v]
            ready[v] = link + self.behind[v]
        now = (ready[unit] if ready[unit] > now else now) + compute
        queue = link if link > now else now
        least = now + self.rest[i + 1]
        for v, rest in self.ahead[i]:
            if after >> v & 1:
                late = ready[v] + rest
            else:
                queue += self.copy[v]
                late = queue + self.behind[v] + rest
            if late > least:
                least = late
        if least >= self.best_ms:
            return None
        pending = tuple(t if t > now and after >> v & 1 else 0.0 for v, t in enumerate(ready))
        return _State(now, max(link, now), pending, after, state, max(least, state.least))

    def _choices(self, held: int, i: int) -> list[tuple[tuple[int, ...], int]]:
        """What may be done before read `i`: (loads in order of use, the set then on the device).

        Of the sets to drop only those of which every unit is needed to make room.
        """
        if (held, i) in self.choices:
            return self.choices[held, i]
        unit, _, room = self.reads[i]
        there = self.whole[i] | 1 << unit
        missing = [v for v in self.order[i] if not held >> v & 1]
        others = [v for v in range(self.n) if held >> v & 1 and not there >> v & 1]
        found: list[tuple[tuple[int, ...], int]] = []
        if self.fixed[i]:
            found = [((), held)] if not there & ~held and self.total[held] <= room else []
            self.choices[held, i] = found
            return found
        for r in range(len(missing) + 1):
            for loads in itertools.combinations(missing, r):
                more = sum(1 << v for v in loads)
                if there & ~(held | more) or self.total[more | there] > room:
                    continue
                need = self.total[held | more] - room
                for k in range(len(others) + 1 if need > 0 else 1):
                    for drops in itertools.combinations(others, k):
                        nbytes = sum(self.size[v] for v in drops)
                        if nbytes >= need and not any(nbytes - self.size[v] >= need for v in drops):
                            found.append((loads, held & ~sum(1 << v for v in drops) | more))
        self.choices[held, i] = found
        return found


def _before(a: _State, b: _State) -> bool:
    """Nothing is later behind `a`, which is no later than `b` itself."""
    return a.link <= b.link and all(x <= max(y, b.now) for x, y in zip(a.ready, b.ready, strict=True))


def _no_later(a: Lag, b: Lag) -> bool:
    return a[0] <= b[0] + 1e-9 and all(x <= y + 1e-9 for x, y in zip(a[1], b[1], strict=True))
