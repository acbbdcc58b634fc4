"""What no schedule of a call can beat: the link has to carry what memory cannot keep. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .simulator import ComponentLoad, Link, Workload

# Windows longer than this many stretches are not looked at one by one; the one over the whole call always is.
LONGEST_WINDOW = 48


@dataclass(frozen=True)
class _Stretch:
    """Passes of one run with no boundary inside that matters: its first, those in between, or its last.

    Attributes:
        before_nbytes: the most that can be on the device at its beginning and still be there when it runs.
    """

    component: str
    passes: int
    before_nbytes: int


def lower_bound_ms(workload: Workload, budget_nbytes: int, link: Link) -> float:
    """A time that no call can beat, whatever the calls before it have left on the device.

    A *window* is a stretch of the call between two moments. It takes at least its compute. It also takes at least the
    time to copy the units that are read in it, less what can be on the device at its beginning; and whatever is read
    after the last of them arrives comes on top. Windows that follow each other add up, so the bound is the longest path
    over the moments between runs, and between the first, the middle and the last passes of each.
    """
    stretches = _stretches(workload, budget_nbytes)
    tails = {name: _tail_ms(c, link) for name, c in workload.components.items()}
    totals = {name: c.total_nbytes for name, c in workload.components.items()}
    copies_ms = {name: sum(_copy_ms(c, u, link) for u in c.units) for name, c in workload.components.items()}
    # What a byte on the device saves at most: not the same where units travel encoded.
    saves = {
        name: max((_copy_ms(c, u, link) / max(c.nbytes[u], 1) for u in c.units), default=0.0)
        for name, c in workload.components.items()
    }
    n = len(stretches)
    longest = [0.0] * (n + 1)
    for start in range(n - 1, -1, -1):
        room = max(0, stretches[start].before_nbytes)
        read: set[str] = set()
        nbytes, largest, compute = 0, 1, 0.0
        copied, saved = 0.0, 0.0
        best = 0.0
        for end in range(start, n if start == 0 else min(n, start + LONGEST_WINDOW)):
            stretch = stretches[end]
            c = workload.components[stretch.component]
            inner = c.pass_ms * stretch.passes
            crossing = 0.0
            if stretch.component not in read:
                read.add(stretch.component)
                # the component's first pass ends as early as its copies allow; its other passes come on top
                saved = max(saved, saves[stretch.component])
                crossing = copied - room * saved + tails[stretch.component] + inner - c.pass_ms
                nbytes += totals[stretch.component]
                copied += copies_ms[stretch.component]
                largest = max(largest, max(c.nbytes.values(), default=1))
            compute += inner
            missing = nbytes - room
            if missing > 0:
                copies = math.ceil(missing / largest)
                crossing = max(crossing, copied - room * saved + copies * link.latency_ms)
            elif crossing > 0 and nbytes <= room:
                crossing = 0.0
            took = max(compute, crossing)
            if end == start and stretch.passes > 1:
                # middle passes: each of them is a window of its own
                stay = budget_nbytes - c.activation_nbytes
                again = max(0, c.total_nbytes - stay)
                copies = math.ceil(again / largest)
                least = copies_ms[stretch.component] - stay * saves[stretch.component] if again else 0.0
                took = max(took, stretch.passes * (least + copies * link.latency_ms))
            best = max(best, took + longest[end + 1])
        longest[start] = best
    return longest[0]


def _stretches(workload: Workload, budget_nbytes: int) -> list[_Stretch]:
    caps = [budget_nbytes - workload.components[name].activation_nbytes for name, _ in workload.runs]
    found: list[_Stretch] = []
    for i, (name, passes) in enumerate(workload.runs):
        if passes <= 0:
            continue
        found.append(_Stretch(name, 1, min(caps[i], caps[i - 1])))  # the first run comes after the last one
        if passes > 2:
            found.append(_Stretch(name, passes - 2, caps[i]))
        if passes > 1:
            found.append(_Stretch(name, 1, caps[i]))
    return found


def _tail_ms(component: ComponentLoad, link: Link) -> float:
    """From the first copy of a component to the end of a pass, were nothing of it on the device and the link its own.

    For each unit: the copies of all up to it, turning the one that came last into what it is, then the compute from it on.
    """
    copied, rest, found = 0.0, component.pass_ms, 0.0
    behind = math.inf  # whichever comes last
    for unit in component.units:
        copied += _copy_ms(component, unit, link)
        behind = min(behind, component.unpack_ms.get(unit, 0.0))
        found = max(found, copied + behind + rest)
        rest -= component.compute_ms.get(unit, 0.0) if component.streamable else 0.0
    return found


def _copy_ms(component: ComponentLoad, unit: str, link: Link) -> float:
    """Of one unit, the latency left out: it depends on how many copies there are."""
    return component.link_nbytes(unit) / link.gbps / 1e6
