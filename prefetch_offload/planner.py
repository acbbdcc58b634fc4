"""What to drop and what to load when a component is entered. Pure: a view in, a plan out.

The rule is Belady's: what is used next comes first, what is used last goes first. `upcoming` is cyclic, since the call
after this one will most likely run the same components in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import filterfalse
from typing import Any, NamedTuple


@dataclass(frozen=True)
class View:
    """What a planner sees.

    Attributes:
        nbytes: the device bytes of every unit.
        held: units that occupy device memory now (arrived or not).
        prefetchable: units that can be copied ahead of use (pinned, one contiguous copy).
        components: the units of each component, in the order it reads them.
        held_nbytes: the sum over `held`.
    """

    nbytes: Mapping[str, int]
    held: frozenset[str]
    prefetchable: frozenset[str]
    components: Mapping[str, tuple[str, ...]]
    held_nbytes: int


@dataclass(frozen=True)
class EntryPlan:
    """Drop these, in order; then (the entered component's own units are loaded); then load those, in order.

    Attributes:
        drops: units to drop. Of the entered component's only those that pass through a window and do not come first.
        prefetches: units to copy in ahead of use.
        peak_nbytes: device bytes of all units once the plan is carried out.
        loads: the entered component's units to copy in now, each awaited when it is read; None: all, awaited now.
    """

    drops: tuple[str, ...] = ()
    prefetches: tuple[str, ...] = ()
    peak_nbytes: int = 0
    loads: tuple[str, ...] | None = None


def distances(
    nbytes: Mapping[str, int], components: Mapping[str, tuple[str, ...]], upcoming: Sequence[str]
) -> dict[str, int]:
    """For each unit, how many component switches away its next use is; units that no upcoming component reads are last."""
    found = dict.fromkeys(nbytes, len(upcoming))
    for i in range(len(upcoming) - 1, -1, -1):
        found.update(dict.fromkeys(components.get(upcoming[i], ()), i))
    return found


class Turns(NamedTuple):
    """When units are used next, for a caller that asks again and again about the same components.

    Attributes:
        distance: see `distances`.
        rank: what is used last ranks highest: farthest first; of one component the last units first, so that what stays is
            the part it reads first. Between components that are equally far the name decides: sets have an order of their
            own in every process.
    """

    distance: Mapping[str, int]
    rank: Mapping[str, Any]


def plan_entry(
    view: View,
    component: str | None,
    cap_nbytes: int,
    upcoming: Sequence[str],
    protected: frozenset[str] = frozenset(),
    prefetch: bool = True,
    heads: Mapping[str, tuple[str, ...]] | None = None,
    lazily: bool = False,
    turns: Turns | None = None,
) -> EntryPlan:
    """The plan for entering `component`, or for idle time when it is None.

    Args:
        view: what there is, and what is on the device.
        component: the component about to run. All of its units will be on the device, whatever the cap.
        cap_nbytes: device bytes that weights may take while it runs.
        upcoming: the components expected next, nearest first, cyclic.
        protected: units that may not be dropped (a component that is running in this or another thread).
        prefetch: False plans drops only.
        heads: for components that do not get room for all of their units, those to hold when they begin, in the order
            they come; the rest streams. Of others all units are held.
        lazily: the component awaits each unit when it is read.
        turns: for these components, heads and `upcoming`, where they are known already.

    Returns:
        A plan whose `peak_nbytes` is at most `cap_nbytes`, unless the component and the protected units alone are more.
        Units are prefetched in order of use, as far as they fit; a held unit makes room only for one used before it.
    """
    heads = heads or {}
    components = {**view.components, **heads} if heads else view.components
    wanted = components[component] if component is not None else ()
    own = frozenset(wanted)
    if turns is None:
        far = distances(view.nbytes, components, upcoming)
        order = {u: i for units in view.components.values() for i, u in enumerate(units)}
        turns = Turns(far, {u: (far[u], order.get(u, 0), u) for u in view.held})
    distance = turns.distance
    victims = sorted(view.held - own - protected, key=turns.rank.__getitem__)
    # What streams begins with its head: its window is accounted for unit by unit from there on.
    drops: list[str] = []
    if component is not None and component in heads:
        drops = [u for u in view.components[component] if u in view.held and u not in own and u not in protected]
    if drops:
        leaving = set(drops)
        victims = [u for u in victims if u not in leaving]
    held = view.held_nbytes + sum(view.nbytes[u] for u in own - view.held) - sum(view.nbytes[u] for u in drops)
    loads = tuple(u for u in wanted if u not in view.held) if lazily and component is not None else None

    while held > cap_nbytes and victims:
        unit = victims.pop()
        drops.append(unit)
        held -= view.nbytes[unit]

    prefetches: list[str] = []
    if prefetch and held <= cap_nbytes:
        taken = set(view.held) | own
        for i, name in enumerate(upcoming):
            for unit in filterfalse(taken.__contains__, components.get(name, ())):
                if unit not in view.prefetchable:
                    continue
                room = cap_nbytes - held
                tail = len(victims)
                while room < view.nbytes[unit] and tail and distance[victims[tail - 1]] > i:
                    tail -= 1
                    room += view.nbytes[victims[tail]]
                if room < view.nbytes[unit]:
                    return EntryPlan(tuple(drops), tuple(prefetches), held, loads)
                for victim in reversed(victims[tail:]):
                    drops.append(victim)
                    held -= view.nbytes[victim]
                del victims[tail:]
                taken.add(unit)
                prefetches.append(unit)
                held += view.nbytes[unit]
    return EntryPlan(tuple(drops), tuple(prefetches), held, loads)


def follow(target: Sequence[str], held: Iterable[str], own: Sequence[str] | None = None, lazily: bool = True) -> EntryPlan:
    """The plan that leaves `target` on the device, or on its way, and nothing else.

    Args:
        target: in the order in which units are to be loaded.
        held: units on the device now.
        own, lazily: of the component that is entered, see `plan_entry`; None: none is.
    """
    there, wanted = set(held), set(target)
    drops = tuple(sorted(there - wanted))
    missing = [u for u in target if u not in there]
    if own is None:
        return EntryPlan(drops, tuple(missing))
    mine = set(own)
    loads = tuple(u for u in missing if u in mine)
    return EntryPlan(drops, tuple(u for u in missing if u not in mine), 0, loads if lazily else None)


def lasting(
    plan: EntryPlan,
    held: Iterable[str],
    cap_nbytes: int,
    nbytes: Mapping[str, int],
    owner: Mapping[str, str],
    upcoming: Sequence[str],
    room_nbytes: Callable[[str], int],
) -> EntryPlan:
    """`plan` without the prefetches that would have to leave again, before they are read, for a component that comes
    first: they only delay its own copies. Drops that made room for them are left out too.

    Args:
        held: units on the device before the plan is carried out.
        cap_nbytes, upcoming: as for `plan_entry`.
        nbytes, owner: of every unit; its component.
        room_nbytes: bytes that others may hold while a component runs.
    """
    if not plan.prefetches:
        return plan
    names = list(dict.fromkeys(upcoming))
    index = {name: i for i, name in enumerate(names)}
    rooms = [room_nbytes(name) for name in names]
    there = [0] * len(names)  # bytes by component that are wanted no later than those to be prefetched
    dropped = set(plan.drops)
    for unit in filterfalse(dropped.__contains__, held):
        at = index.get(owner[unit])
        if at is not None:
            there[at] += nbytes[unit]
    kept = 0
    for unit in plan.prefetches:
        at = index[owner[unit]]
        there[at] += nbytes[unit]
        if any(sum(there[j + 1 : at + 1]) > rooms[j] for j in range(at)):
            break
        kept += 1
    if kept == len(plan.prefetches):
        return plan
    peak = plan.peak_nbytes - sum(nbytes[u] for u in plan.prefetches[kept:])
    drops = list(plan.drops)
    while drops and owner[drops[-1]] != upcoming[-1] and peak + nbytes[drops[-1]] <= cap_nbytes:
        peak += nbytes[drops.pop()]
    return EntryPlan(tuple(drops), plan.prefetches[:kept], peak, plan.loads)
