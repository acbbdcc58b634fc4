"""Where every unit is: the one place that may change it. No IO, no torch.

    instructions = residency.handle(Entered("unet", plan))

Events say what happened; instructions say what the device has to do, in order. An event that a unit's state does not
allow raises `TransitionError` with the unit's story and changes nothing.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .errors import TransitionError
from .planner import EntryPlan, View


class State(enum.Enum):
    """A unit's state, and what it costs.

    HOST: only the host master exists; no device bytes.
    LOADING: device bytes are held and the copy is enqueued on the copy stream; compute may not read them yet.
    READY: device bytes are held and the compute stream has waited for the copy; compute may read them.
    """

    HOST = "host"
    LOADING = "loading"
    READY = "ready"

    __hash__ = object.__hash__  # members are single objects; Enum's own is a Python call, and this is the inner loop


@dataclass(frozen=True)
class Load:
    """Allocate the unit's device bytes and enqueue its copy."""

    unit: str


@dataclass(frozen=True)
class Await:
    """Make the compute stream wait for the unit's ready event."""

    unit: str


@dataclass(frozen=True)
class Drop:
    """Free the unit's device bytes. `arrived` is False when compute has not waited for the copy: wait first."""

    unit: str
    arrived: bool


Instruction = Load | Await | Drop


@dataclass(frozen=True)
class Entered:
    """A component is about to run, and `plan` says what that takes."""

    component: str
    plan: EntryPlan


@dataclass(frozen=True)
class Needed:
    """These units are about to be read."""

    units: tuple[str, ...]


@dataclass(frozen=True)
class Prefetched:
    """There is room and time to spare: carry out `plan`, which loads nothing that is needed now."""

    plan: EntryPlan


@dataclass(frozen=True)
class LoadFailed:
    """The device refused the memory for `unit`; `undone` are the instructions after it, not carried out either."""

    unit: str
    undone: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """These units must leave the device: their masters changed, or the memory is wanted back."""

    units: tuple[str, ...]


Event = Entered | Needed | Prefetched | LoadFailed | Dropped

# (state, what happens) -> state. What is not here is not allowed.
TRANSITIONS: dict[tuple[State, str], State] = {
    (State.HOST, "load"): State.LOADING,
    (State.LOADING, "load failed"): State.HOST,
    (State.LOADING, "await"): State.READY,
    (State.READY, "await undone"): State.LOADING,
    (State.LOADING, "drop"): State.HOST,
    (State.READY, "drop"): State.HOST,
}


@dataclass
class _Unit:
    nbytes: int
    prefetchable: bool
    load: Load
    wait: Await
    drop: Drop  # once it has arrived
    state: State = State.HOST
    story: deque[tuple[str, str, State]] = field(default_factory=lambda: deque(maxlen=32))


class Residency:
    """The states of all units on one device.

    Attributes:
        held_nbytes: device bytes of all units that are LOADING or READY. Derived, kept for speed; see `validate`.
    """

    def __init__(self) -> None:
        self._units: dict[str, _Unit] = {}
        self._components: dict[str, tuple[str, ...]] = {}
        self._known: tuple[dict[str, int], frozenset[str]] | None = None  # for views, until a unit comes or goes
        self.held_nbytes = 0

    # ------------------------------------------------------------ what there is
    def add_unit(self, unit: str, nbytes: int, prefetchable: bool = True) -> None:
        """Make a unit known, in state HOST. Raises ValueError if the name is taken or `nbytes` is negative."""
        if unit in self._units:
            raise ValueError(f"unit {unit} is known already")
        if nbytes < 0:
            raise ValueError(f"unit {unit} has {nbytes} bytes, fewer than none")
        self._units[unit] = _Unit(nbytes, prefetchable, Load(unit), Await(unit), Drop(unit, arrived=True))
        self._known = None

    def remove_unit(self, unit: str) -> None:
        """Forget a unit. Raises TransitionError unless it is in state HOST."""
        if self._units[unit].state is not State.HOST:
            raise TransitionError(f"cannot forget {unit} while it is {self.state(unit).value}\n{self.story(unit)}")
        del self._units[unit]
        self._known = None
        self._components = {c: tuple(u for u in units if u != unit) for c, units in self._components.items()}

    def set_component(self, component: str, units: Sequence[str]) -> None:
        """Name the units a component reads, in the order it reads them. Units may belong to several components.

        Raises ValueError if one is unknown or named twice.
        """
        for unit in units:
            if unit not in self._units:
                raise ValueError(f"component {component} names the unknown unit {unit}")
        if len(set(units)) != len(units):
            raise ValueError(f"component {component} names a unit twice: {', '.join(units)}")
        self._components[component] = tuple(units)

    def knows_unit(self, unit: str) -> bool:
        return unit in self._units

    def knows(self, component: str) -> bool:
        return component in self._components

    def remove_component(self, component: str) -> None:
        """Forget a component, if it is known; its units stay until `remove_unit`."""
        self._components.pop(component, None)

    def state(self, unit: str) -> State:
        return self._units[unit].state

    def units_of(self, component: str) -> tuple[str, ...]:
        return self._components[component]

    def nbytes(self, component: str) -> int:
        """Device bytes of a component when all of its units are resident."""
        return sum(self._units[u].nbytes for u in self._components[component])

    def held(self, component: str | None = None) -> tuple[str, ...]:
        """Units with device bytes: all, or those of one component."""
        if component is None:
            return tuple([u for u, unit in self._units.items() if unit.state is not State.HOST])
        return tuple([u for u in self._components[component] if self._units[u].state is not State.HOST])

    def is_ready(self, component: str) -> bool:
        return all(self._units[u].state is State.READY for u in self._components[component])

    def view(self) -> View:
        """What a planner may look at: a copy, so that planning changes nothing."""
        if self._known is None:
            self._known = (
                {u: unit.nbytes for u, unit in self._units.items()},
                frozenset(u for u, unit in self._units.items() if unit.prefetchable),
            )
        return View(
            nbytes=self._known[0],
            held=frozenset(self.held()),
            prefetchable=self._known[1],
            components=dict(self._components),
            held_nbytes=self.held_nbytes,
        )

    # ---------------------------------------------------------------- the mutator
    def handle(self, event: Event) -> list[Instruction]:
        """Apply an event and return what the device has to do, in order.

        Raises:
            TransitionError: the event is not allowed in a unit's state. Nothing has changed.
        """
        if isinstance(event, Needed):  # these two for every use of a streamed unit
            steps = self._needed(event.units)
        elif isinstance(event, Prefetched):
            steps = [*self._drops(event.plan.drops), *[(u, "load") for u in event.plan.prefetches]]
        elif isinstance(event, Entered):
            steps = self._entered(event.component, event.plan)
        elif isinstance(event, LoadFailed):
            steps = self._failed(event)
        else:
            steps = self._drops(event.units)
        return self._apply(steps, type(event).__name__)

    def _drops(self, units: Iterable[str]) -> list[tuple[str, str]]:
        return [(u, "drop") for u in units]

    def _needed(self, units: Iterable[str]) -> list[tuple[str, str]]:
        steps = [(u, "load") for u in units if self._units[u].state is State.HOST]
        return steps + [(u, "await") for u in units if self._units[u].state is not State.READY]

    def _entered(self, component: str, plan: EntryPlan) -> list[tuple[str, str]]:
        dropped = set(plan.drops)
        own = self._components[component]
        steps = self._drops(plan.drops)
        if plan.loads is not None:
            return steps + [(u, "load") for u in (*plan.loads, *plan.prefetches)]
        steps += [(u, "load") for u in own if u in dropped or self._units[u].state is State.HOST]
        steps += [(u, "await") for u in own if u in dropped or self._units[u].state is not State.READY]
        return steps + [(u, "load") for u in plan.prefetches]

    def _failed(self, event: LoadFailed) -> list[tuple[str, str]]:
        steps = []
        for instruction in reversed(event.undone):
            if isinstance(instruction, Await):
                steps.append((instruction.unit, "await undone"))
            elif isinstance(instruction, Load):
                steps.append((instruction.unit, "load failed"))
            else:
                raise TransitionError(f"a drop cannot be undone: {instruction}\n{self.story(instruction.unit)}")
        return steps + [(event.unit, "load failed")]

    def _apply(self, steps: list[tuple[str, str]], cause: str) -> list[Instruction]:
        units = self._units
        after: dict[str, State] = {}
        instructions: list[Instruction] = []
        moves: list[tuple[_Unit, str, State]] = []
        for unit, what in steps:
            entry = units[unit]
            before = after.get(unit, entry.state)
            new = TRANSITIONS.get((before, what))
            if new is None:
                raise TransitionError(
                    f"{cause}: '{what}' is not allowed for {unit}, which is {before.value}\n{self.story(unit)}"
                )
            after[unit] = new
            moves.append((entry, what, new))
            if what == "load":
                instructions.append(entry.load)
            elif what == "await":
                instructions.append(entry.wait)
            elif what == "drop":
                instructions.append(entry.drop if before is State.READY else Drop(unit, arrived=False))
        for entry, what, new in moves:
            self.held_nbytes += entry.nbytes * ((new is not State.HOST) - (entry.state is not State.HOST))
            entry.state = new
            entry.story.append((cause, what, new))
        return instructions

    # ---------------------------------------------------------------- diagnosis
    def story(self, unit: str) -> str:
        """The last transitions of a unit, one a line."""
        lines = [f"{cause}: {what} -> {new.value}" for cause, what, new in self._units[unit].story]
        lines = lines or ["nothing has happened to it"]
        return "\n".join([f"story of {unit} ({self._units[unit].nbytes} bytes):", *("  " + s for s in lines)])

    def validate(self) -> None:
        """Assert what must always hold. For tests and fixtures."""
        held = sum(u.nbytes for u in self._units.values() if u.state is not State.HOST)
        assert held == self.held_nbytes, f"held_nbytes is {self.held_nbytes}, the units say {held}"
        for component, units in self._components.items():
            assert all(u in self._units for u in units), f"{component} names a unit that is gone"
            assert len(set(units)) == len(units), f"{component} names a unit twice"
