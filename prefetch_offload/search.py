"""Which shares make the shortest steady call: candidates, compared by simulating them. Pure.

    shares = balanced(workload, 8 << 30, Link(25.0))

Components of a few units are searched as they are, all sets that may stay included. Larger ones are searched as a few
chunks of neighbouring units, and what is found is carried over to the units. Where a call has so few units that every
decision can be tried, `schedule` may find a better one than any set that stays. The effort is counted in simulated units,
never in time, so that the same question always gets the same answer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .bound import lower_bound_ms
from .refine import FINE_STEPS, passes_of, refined
from .schedule import MOST_UNITS, scripted
from .simulator import SIMULATED_PASSES, ComponentLoad, Link, Workload
from .trial import Trials
from .window import Share, Window, handed_over, share_of

# Simulated unit uses that a search may take: a small workload is worth a thorough search; a large one gets
# some 20 ms, since it is planned while a user waits.
THOROUGH_STEPS = 3_000
STEPS = 900
SMALL_UNITS = 16  # workloads of so many units in all are searched thoroughly
TWICE_UNITS = 200  # of so many, chunks are searched a second time, as for LESS of the budget: what was found there fits, too
LESS = 15 / 16
FEW_UNITS = 4  # components of so many units try every set that may stay
CHUNKS = 6  # a larger component is searched as so many chunks
MOST_CHUNKS = 18  # unless its room is so small that they must be smaller

NEAR = 0.5  # how many of the walk's steps are to a share close by
SLACK = 1.02  # how much longer a call may become in one step
PATIENCE = 30  # steps that may lead nowhere

Choice = tuple["Share | None", ...]  # by component; None: whole
Value = tuple[float, float, int]


def balanced(workload: Workload, budget_nbytes: int, link: Link) -> dict[str, Share]:
    """Shares for the shortest steady call."""
    n_units = sum(len(c.units) for c in workload.components.values())
    if n_units <= SMALL_UNITS:
        found = _Search(workload, budget_nbytes, link, THOROUGH_STEPS).shares()
        if n_units <= MOST_UNITS:
            return scripted(workload, budget_nbytes, link, found)
        return refined(workload, [found], budget_nbytes, link, THOROUGH_STEPS)
    budgets, steps = [budget_nbytes], FINE_STEPS
    if n_units <= TWICE_UNITS:
        budgets.append(int(budget_nbytes * LESS))
        steps -= 2 * STEPS
    return refined(workload, (_rough(workload, b, link) for b in budgets), budget_nbytes, link, steps)


def _rough(workload: Workload, budget_nbytes: int, link: Link) -> dict[str, Share]:
    """Shares found on chunks of units, and carried over to the units."""
    coarse = Workload(
        {name: _chunked(c, budget_nbytes - c.activation_nbytes) for name, c in workload.components.items()}, workload.runs
    )
    rough_shares: Mapping[str, Share] = {}
    if coarse.smallest_budget_nbytes <= budget_nbytes:
        rough_shares = _Search(coarse, budget_nbytes, link, STEPS).shares()
    shares: dict[str, Share] = {}
    for name, c in workload.components.items():
        cap = budget_nbytes - c.activation_nbytes
        rough = rough_shares.get(name)
        if not c.streamable or (rough is None and c.total_nbytes <= cap):
            continue
        shares[name] = _fine(c, coarse.components[name], rough or Share(cap, frozenset()), passes_of(workload, name))
    return shares


def _chunked(c: ComponentLoad, cap_nbytes: int) -> ComponentLoad:
    """`c` as a few chunks of neighbouring units; units that must stay are one chunk, read first."""
    if not c.streamable:
        every = c.units[:1]  # names of chunks are those of their first units: no two components share one
        return ComponentLoad(
            every,
            dict.fromkeys(every, c.total_nbytes),
            dict.fromkeys(every, c.pass_ms),
            c.activation_nbytes,
            streamable=False,
            **_travel(c, dict.fromkeys(c.units, every[0])),
        )
    if len(c.units) <= CHUNKS:
        return c
    loose = [u for u in c.units if u not in c.must]
    must_nbytes = sum(c.nbytes[u] for u in c.must)
    nbytes: dict[str, int] = {}
    compute_ms: dict[str, float] = {}
    first = next((u for u in c.units if u in c.must), "")
    if c.must:
        nbytes[first] = must_nbytes
        compute_ms[first] = sum(c.compute_ms.get(u, 0.0) for u in c.must)
    # a window has to hold three of them
    total = c.total_nbytes - must_nbytes
    n = min(MOST_CHUNKS, max(CHUNKS, math.ceil(3 * total / max(1, cap_nbytes - must_nbytes))))
    at = 0
    names: dict[int, str] = {}
    chunk_of = dict.fromkeys(c.must, first)
    for unit in loose:
        name = chunk_of[unit] = names.setdefault(min(n - 1, at * n // max(1, total)), unit)
        nbytes[name] = nbytes.get(name, 0) + c.nbytes[unit]
        compute_ms[name] = compute_ms.get(name, 0.0) + c.compute_ms.get(unit, 0.0)
        at += c.nbytes[unit]
    return ComponentLoad(
        tuple(nbytes),
        nbytes,
        compute_ms,
        c.activation_nbytes,
        frozenset([first] if c.must else []),
        True,
        **_travel(c, chunk_of),
    )


def _travel(c: ComponentLoad, chunk_of: Mapping[str, str]) -> dict[str, Any]:
    """What chunks put on the link, and what turning that into them takes; nothing for a component that travels as it is."""
    if not c.copy_nbytes and not c.unpack_ms:
        return {}
    copy_nbytes = dict.fromkeys(chunk_of.values(), 0)
    unpack_ms = dict.fromkeys(chunk_of.values(), 0.0)
    for unit, chunk in chunk_of.items():
        copy_nbytes[chunk] += c.link_nbytes(unit)
        unpack_ms[chunk] += c.unpack_ms.get(unit, 0.0)
    return {"copy_nbytes": copy_nbytes, "unpack_ms": unpack_ms}


def _fine(c: ComponentLoad, coarse: ComponentLoad, rough: Share, passes: int) -> Share:
    """`rough`, found for the chunks of a component, for its units."""
    if coarse is c:
        return rough
    if rough.limit_nbytes >= c.total_nbytes:
        return handed_over(c.units, c.nbytes, c.must, rough.ahead)
    window = rough.limit_nbytes - sum(coarse.nbytes[u] for u in rough.keep)
    if passes > 1:
        # One that is read and one that arrives behind it; with many small ones, a few more against uneven times.
        largest = max((c.nbytes[u] for u in c.units if u not in c.must), default=0)
        window = min(window, max(2 * largest, rough.limit_nbytes // 64))
    must = sum(c.nbytes[u] for u in c.must)
    window = max(window, min(rough.limit_nbytes - must, c.least_nbytes - must))
    if passes <= 1:
        return replace(rough, keep=c.must)  # read once, so nothing is gained by what stays
    return replace(share_of(c.units, c.nbytes, c.compute_ms, rough.limit_nbytes, window, c.must), ahead=rough.ahead)


@dataclass
class _Search:
    """A walk from the best of a few starts: one component's share at a time is exchanged, for any other or a close one.

    A step that makes the call a little longer is taken too; after some that led nowhere, the walk goes on from elsewhere,
    and then from the best choice so far. It ends when the effort is spent, or when no schedule could be better.
    """

    workload: Workload
    budget_nbytes: int
    link: Link
    steps: int

    def shares(self) -> dict[str, Share]:
        self.names = tuple(self.workload.components)
        self.seen: dict[Choice, Value] = {}
        self.trials = Trials(self.workload, self.budget_nbytes, self.link)
        self.cost = 2 * sum(
            min(passes, SIMULATED_PASSES) * len(self.workload.components[name].units) for name, passes in self.workload.runs
        )
        options = [self._options(name) for name in self.names]
        starts = self._starts(options)
        best = current = min(starts, key=self._value)
        movable = [i for i, some in enumerate(options) if len(some) > 1]
        enough = lower_bound_ms(self.workload, self.budget_nbytes, self.link) * (1 + 1e-6)
        draw = random.Random(0)  # the same walk every time
        idle, returning = 0, False
        while movable and self.steps > 0 and self._value(best)[0] > enough:
            i = draw.choice(movable)
            near = self._nearby(self.names[i], current[i]) if draw.random() < NEAR else []
            other = current[:i] + (draw.choice(near or options[i]),) + current[i + 1 :]
            if other in self.seen:
                self.steps -= 1 + self.cost // 8  # so that it ends where there is little to try
            value = self._value(other)
            idle += 1
            if value[0] <= self._value(current)[0] * SLACK:
                current = other
            if value < self._value(best):
                best, idle = other, 0
            if idle > PATIENCE:
                # from where it has not been, and then from the best again
                far = starts.pop() if starts else tuple(draw.choice(some) for some in options)
                current, idle, returning = (best if returning else far), 0, not returning
        return self._named(best)

    def _named(self, choice: Choice) -> dict[str, Share]:
        return {name: share for name, share in zip(self.names, choice, strict=True) if share is not None}

    def _value(self, choice: Choice) -> Value:
        """The steady call's time. Of two that take equally long: the first call's, then the bytes that are copied."""
        if choice not in self.seen:
            self.steps -= max(1, self.cost)
            p = self.trials(self._named(choice))
            fits = p.peak_nbytes <= self.budget_nbytes
            self.seen[choice] = (round(p.call_ms, 6) if fits else math.inf, round(p.first_ms, 6), p.h2d_nbytes)
        return self.seen[choice]

    def _nearby(self, name: str, share: Share | None) -> list[Share]:
        """`share` with one unit more or less in its head, and with one more or less that comes late."""
        c = self.workload.components[name]
        loose = [u for u in c.units if u not in c.must]
        if len(loose) > FEW_UNITS:
            return []
        if share is None:
            share = Share(c.total_nbytes, c.must)
        window = Window(c.units, c.nbytes, share)
        head = frozenset(window.head())
        found = []
        for unit in window.order:
            if sum(c.nbytes[u] for u in head ^ {unit}) <= window.limit_nbytes:
                found.append(replace(share, head=head ^ {unit}))
            if len(window.order) > 1:
                found.append(replace(share, late=share.late ^ {unit}))
        return found

    def _starts(self, options: list[list[Share | None]]) -> list[Choice]:
        """As much as fits of each; all handed over unit by unit; the smallest windows for what is read once."""
        first = tuple(o[0] for o in options)
        second = tuple(o[min(1, len(o) - 1)] for o in options)
        third = tuple(
            o[-1] if passes_of(self.workload, name) == 1 else o[0] for name, o in zip(self.names, options, strict=True)
        )
        return list(dict.fromkeys([first, second, third]))

    def _options(self, name: str) -> list[Share | None]:
        """What a component may be given, from the most to the least memory."""
        c = self.workload.components[name]
        cap = self.budget_nbytes - c.activation_nbytes
        if not c.streamable or not any(u not in c.must for u in c.units):
            return [None]
        found: list[Share | None] = [None] if c.total_nbytes <= cap else []
        if c.total_nbytes <= cap:
            found += [handed_over(c.units, c.nbytes, c.must, ahead) for ahead in (True, False)]
        few = sum(u not in c.must for u in c.units) <= FEW_UNITS
        shares = _every_share(c, cap) if few else _some_shares(c, cap)
        for share in sorted(shares, key=lambda s: (-s.limit_nbytes, -len(s.keep), sorted(s.keep))):
            found.append(share)
            if share.limit_nbytes < cap:
                found.append(replace(share, ahead=True))
        return list(dict.fromkeys(found))


def _every_share(c: ComponentLoad, cap_nbytes: int) -> set[Share]:
    """Every set that may stay, with every window that makes a difference."""
    loose = [u for u in c.units if u not in c.must]
    found: set[Share] = set()
    for r in range(len(loose)):
        for stay in itertools.combinations(loose, r):
            keep = c.must | frozenset(stay)
            kept = sum(c.nbytes[u] for u in keep)
            streamed = [c.nbytes[u] for u in loose if u not in keep]
            windows = {sum(some) for k in range(1, len(streamed) + 1) for some in itertools.combinations(streamed, k)}
            limits = {kept + w for w in windows if w >= max(streamed)} | {cap_nbytes}
            found |= {Share(limit, keep) for limit in limits if kept + max(streamed) <= limit <= cap_nbytes}
    return found


def _some_shares(c: ComponentLoad, cap_nbytes: int) -> set[Share]:
    loose = [c.nbytes[u] for u in c.units if u not in c.must]
    largest, total = max(loose), c.total_nbytes
    must = total - sum(loose)
    limits = {cap_nbytes, must + 2 * largest, must + 3 * largest, *(must + (total - must) * k // 4 for k in (1, 2, 3))}
    found: set[Share] = set()
    for limit in sorted(limits):
        for window in (largest, 2 * largest, 3 * largest, limit - must):
            if limit <= cap_nbytes and must + window <= limit < total:
                found.add(share_of(c.units, c.nbytes, c.compute_ms, limit, window, c.must))
    return {s for s in found if sum(c.nbytes[u] for u in s.keep) + largest <= s.limit_nbytes} or {
        Share(cap_nbytes, c.must)
    }
