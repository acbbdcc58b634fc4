"""What to drop and what to load when a component is entered. Pure: a view in, a plan out.

The rule is Belady's: what is used next comes first, what is used last goes first. `upcoming` is cyclic, since the call
after this one will most likely run the same components in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
        drops: units to drop, none of them the entered component's or a protected one's.
        prefetches: units to copy in ahead of use.
        peak_nbytes: device bytes of all units once the plan is carried out.
    """

    drops: tuple[str, ...] = ()
    prefetches: tuple[str, ...] = ()
    peak_nbytes: int = 0


def distances(view: View, upcoming: Sequence[str]) -> dict[str, int]:
    """For each unit, how many component switches away its next use is; units that no upcoming component reads are last."""
    far = len(upcoming)
    found: dict[str, int] = {}
    for i, component in enumerate(upcoming):
        for unit in view.components.get(component, ()):
            found.setdefault(unit, i)
    return {unit: found.get(unit, far) for unit in view.nbytes}


def plan_entry(
    view: View,
    component: str | None,
    cap_nbytes: int,
    upcoming: Sequence[str],
    protected: frozenset[str] = frozenset(),
    prefetch: bool = True,
) -> EntryPlan:
    """The plan for entering `component`, or for idle time when it is None.

    Args:
        view: what there is, and what is on the device.
        component: the component about to run. All of its units will be on the device, whatever the cap.
        cap_nbytes: device bytes that weights may take while it runs.
        upcoming: the components expected next, nearest first, cyclic.
        protected: units that may not be dropped (a component that is running in this or another thread).
        prefetch: False plans drops only.

    Returns:
        A plan whose `peak_nbytes` is at most `cap_nbytes`, unless the component and the protected units alone are more.
        Units are prefetched in order of use, as far as they fit; a held unit makes room only for one used before it.
    """
    own = frozenset(view.components[component]) if component is not None else frozenset()
    distance = distances(view, upcoming)
    order = {u: i for units in view.components.values() for i, u in enumerate(units)}
    # Farthest first; of one component the last units first, so that what stays is the part it reads first. Between
    # components that are equally far the name decides: sets have an order of their own in every process.
    victims = sorted(
        (u for u in view.held if u not in own and u not in protected),
        key=lambda u: (distance[u], order.get(u, 0), u),
    )
    drops: list[str] = []
    held = view.held_nbytes + sum(view.nbytes[u] for u in own - view.held)

    while held > cap_nbytes and victims:
        unit = victims.pop()
        drops.append(unit)
        held -= view.nbytes[unit]

    prefetches: list[str] = []
    if prefetch and held <= cap_nbytes:
        taken = set(view.held) | own
        for i, name in enumerate(upcoming):
            for unit in view.components.get(name, ()):
                if unit in taken or unit not in view.prefetchable:
                    continue
                room = cap_nbytes - held
                tail = len(victims)
                while room < view.nbytes[unit] and tail and distance[victims[tail - 1]] > i:
                    tail -= 1
                    room += view.nbytes[victims[tail]]
                if room < view.nbytes[unit]:
                    return EntryPlan(tuple(drops), tuple(prefetches), held)
                for victim in reversed(victims[tail:]):
                    drops.append(victim)
                    held -= view.nbytes[victim]
                del victims[tail:]
                taken.add(unit)
                prefetches.append(unit)
                held += view.nbytes[unit]
    return EntryPlan(tuple(drops), tuple(prefetches), held)
