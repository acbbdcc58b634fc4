"""Windows of a few units, tried on the units themselves: the chunks of `search` are too coarse to tell them apart. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from .bound import lower_bound_ms
from .simulator import SIMULATED_PASSES, ComponentLoad, Link, Workload
from .trial import Trials
from .window import Share, handed_over, share_of

FINE_STEPS = 5_800  # of comparing windows on the units themselves
TRIAL_STEPS = 100  # what a trial costs, however few units there are
ROOMS = 8  # parts of its room of which a component may leave some to others
ENOUGH = 1.005  # of the physical limit: no window is worth more trying then


def refined(
    workload: Workload, starts: Iterable[dict[str, Share]], budget_nbytes: int, link: Link, steps: int = FINE_STEPS
) -> dict[str, Share]:
    """The best of `starts`, or what is better than that on the units themselves: chunks are too coarse to tell windows apart.

    As many alternatives are simulated as their effort allows: none with thousands of units.

    Args:
        starts: shares; those behind the first only where that is not good enough.
        steps: simulated unit uses that it may take.
    """
    found = iter(starts)
    first = best = next(found)
    cost = 2 * sum(min(passes, SIMULATED_PASSES) * len(workload.components[name].units) for name, passes in workload.runs)
    trials = steps // (cost + TRIAL_STEPS)
    if trials < 2:
        return best

    tried = Trials(workload, budget_nbytes, link)

    def value(candidate: dict[str, Share]) -> tuple[float, int]:
        p = tried(candidate)
        return (p.call_ms if p.peak_nbytes <= budget_nbytes else math.inf, p.h2d_nbytes)

    least = value(best)
    enough = lower_bound_ms(workload, budget_nbytes, link) * ENOUGH
    if least[0] > enough:
        for other in found:
            trials -= 1
            best, least = min((best, least), (other, value(other)), key=lambda pair: pair[1])
    seen = [best]
    before: dict[str, Share] | None = None
    while before != best:
        before = best
        for moves in _moves(workload, first, budget_nbytes):
            candidate = {name: share for name, share in (best | moves).items() if share is not None}
            if candidate in seen:
                continue
            if trials <= 1 or least[0] <= enough:
                return best
            trials -= 1
            seen.append(candidate)
            reached = value(candidate)
            if reached < least:
                best, least = candidate, reached
    return best


def _moves(workload: Workload, shares: Mapping[str, Share], budget_nbytes: int) -> Iterator[dict[str, Share | None]]:
    """Shares to try, the most telling first. None: whole.

    Of what has a share, and then of all that can be streamed: all components at once, then one by one, those with the most
    to copy first. At last, of each, what leaves others more room: a larger budget is no use if all of it is filled.
    """
    of = workload.components
    caps = {name: budget_nbytes - c.activation_nbytes for name, c in of.items()}
    names = [name for name, c in of.items() if c.streamable and not c.must.issuperset(c.units)]
    names.sort(key=lambda n: -passes_of(workload, n) * of[n].total_nbytes)
    windows = {name: _windows(of[name], caps[name], passes_of(workload, name) > 1) for name in names}
    yield from _together(workload, {name: some for name, some in windows.items() if name in shares})
    yield from _together(workload, windows)
    for name in names:
        if of[name].total_nbytes <= caps[name]:
            yield {name: None}
        others = {c.total_nbytes for other, c in of.items() if other != name}
        for room in sorted(others | {caps[name] * k // ROOMS for k in range(1, ROOMS // 2)}):
            for share in _windows(of[name], caps[name] - room, True):
                if share.limit_nbytes < of[name].total_nbytes:
                    yield {name: share}
                    yield {name: replace(share, ahead=True)}


def _together(workload: Workload, windows: Mapping[str, list[Share]]) -> Iterator[dict[str, Share | None]]:
    """Combinations of these shares."""
    found = {name: some for name, some in windows.items() if some}
    again = {name: some for name, some in found.items() if passes_of(workload, name) > 1}
    once = {name: some for name, some in found.items() if name not in again}
    # What is read once, through a narrow window, leaves its room to what is read in every pass; that is worth something
    # only where that one has a narrow window as well. Neither would be found alone.
    for j in range(max(map(len, once.values()), default=1)):
        for i in range(max(map(len, again.values()), default=1)):
            yield {name: some[min(j if name in once else i, len(some) - 1)] for name, some in found.items()}
    for i in range(1, max(map(len, once.values()), default=0)):
        for name, some in once.items():
            if i < len(some):
                yield {name: some[i]}
    for name, some in again.items():
        yield {name: replace(some[0], ahead=True)}


def _windows(c: ComponentLoad, cap_nbytes: int, again: bool) -> list[Share]:
    """Shares of a component with windows of a few of its largest units, the most promising first.

    Args:
        again: it is read more than once in a row; what its window does not take stays.
    """
    loose = [c.nbytes[u] for u in c.units if u not in c.must]
    must = c.total_nbytes - sum(loose)
    found = []
    for n in (3, 2, 1) if again else (6, len(loose), 3):
        window = n * max(loose, default=0)
        limit = cap_nbytes if again else min(must + window, cap_nbytes)
        if not loose or must + window > limit:
            continue
        if limit >= c.total_nbytes:
            found.append(handed_over(c.units, c.nbytes, c.must))
        else:
            found.append(share_of(c.units, c.nbytes, c.compute_ms, limit, window, c.must))
    return list(dict.fromkeys(found))


def passes_of(workload: Workload, name: str) -> int:
    return max((passes for other, passes in workload.runs if other == name), default=1)
