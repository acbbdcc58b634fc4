"""Windows of a few units, tried on the units themselves: the chunks of `search` are too coarse to tell them apart. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .bound import lower_bound_ms
from .simulator import SIMULATED_PASSES, ComponentLoad, Link, Workload
from .trial import Trials
from .window import Share, handed_over, share_of

FINE_STEPS = 5_400  # of comparing windows on the units themselves
ENOUGH = 1.005  # of the physical limit: no window is worth more trying then


def refined(workload: Workload, shares: dict[str, Share], budget_nbytes: int, link: Link) -> dict[str, Share]:
    """`shares`, or what is better than them on the units themselves: chunks are too coarse to tell windows apart.

    As many alternatives are simulated as their effort allows: none with thousands of units.
    """
    cost = 2 * sum(min(passes, SIMULATED_PASSES) * len(workload.components[name].units) for name, passes in workload.runs)
    trials = FINE_STEPS // max(1, cost)
    if trials < 2 or not shares:
        return shares

    tried = Trials(workload, budget_nbytes, link)

    def value(candidate: dict[str, Share]) -> tuple[float, int]:
        p = tried(candidate)
        return (p.call_ms if p.peak_nbytes <= budget_nbytes else math.inf, p.h2d_nbytes)

    best, least = shares, value(shares)
    enough = lower_bound_ms(workload, budget_nbytes, link) * ENOUGH
    for moves in _moves(workload, shares, budget_nbytes):
        candidate = best | moves
        if candidate == best:
            continue
        if trials <= 1 or least[0] <= enough:
            break
        trials -= 1
        found = value(candidate)
        if found < least:
            best, least = candidate, found
    return best


def _moves(workload: Workload, shares: Mapping[str, Share], budget_nbytes: int) -> Iterator[dict[str, Share]]:
    """Shares to try, the most telling first: all components at once, then one by one, those with the most to copy first."""
    found: dict[str, list[Share]] = {}
    for name in sorted(shares, key=lambda n: -passes_of(workload, n) * workload.components[n].total_nbytes):
        c = workload.components[name]
        some = _windows(c, budget_nbytes - c.activation_nbytes, passes_of(workload, name) > 1)
        if some:
            found[name] = some
    again = {name: some for name, some in found.items() if passes_of(workload, name) > 1}
    once = {name: some[0] for name, some in found.items() if name not in again}
    # What is read once, through a narrow window, leaves its room to what is read in every pass; that is worth something
    # only where that one has a narrow window as well. Neither would be found alone.
    widths = max(map(len, again.values()), default=1)
    for i in range(widths):
        yield once | {name: some[min(i, len(some) - 1)] for name, some in again.items()}
    for i in range(1, max(map(len, found.values()), default=0)):
        for name, some in found.items():
            if name in once and i < len(some):
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
