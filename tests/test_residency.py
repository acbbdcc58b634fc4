"""The state machine: a model that does anything to it, the table of what is allowed, and examples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefetch_offload.errors import OffloadError, TransitionError
from prefetch_offload.planner import EntryPlan, plan_entry
from prefetch_offload.residency import (
    TRANSITIONS,
    Await,
    Drop,
    Dropped,
    Entered,
    Event,
    Instruction,
    Load,
    LoadFailed,
    Prefetched,
    Residency,
    State,
)

UNITS = tuple(f"u{i}" for i in range(12))
COMPONENTS = ("text", "unet", "vae", "control")
WHATS = ("load", "load failed", "await", "await undone", "drop")


def snapshot(residency: Residency) -> tuple[Any, ...]:
    """Everything that can be seen of it."""
    view = residency.view()
    states = {unit: residency.state(unit) for unit in view.nbytes}
    return view, states, residency.held_nbytes, {unit: residency.story(unit) for unit in view.nbytes}


class OutOfMemory(Exception):
    """The toy device refused a load."""


class ToyDevice:
    """Carries out instructions to the letter and objects to what a real device could not do.

    Attributes:
        memory: bytes of each unit on the device.
        waited: units whose copy compute has waited for.
        most: the most bytes there ever were since `watch`.
    """

    def __init__(self) -> None:
        self.memory: dict[str, int] = {}
        self.waited: set[str] = set()
        self.most = 0

    @property
    def nbytes(self) -> int:
        return sum(self.memory.values())

    def watch(self) -> None:
        self.most = self.nbytes

    def do(self, instruction: Instruction, nbytes: int) -> None:
        unit = instruction.unit
        if isinstance(instruction, Load):
            assert unit not in self.memory, f"{unit} is loaded over itself"
            self.memory[unit] = nbytes
            self.most = max(self.most, self.nbytes)
        elif isinstance(instruction, Await):
            assert unit in self.memory, f"waiting for {unit}, which no copy was enqueued for"
            assert unit not in self.waited, f"waiting for {unit} twice"
            self.waited.add(unit)
        else:
            assert instruction.arrived == (unit in self.waited), f"{unit} is dropped while its copy is under way"
            del self.memory[unit]
            self.waited.discard(unit)


class ResidencyMachine(RuleBasedStateMachine):
    """Components come, run, fail to load, lose units and go, in any order; the device knows what should be where."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency()
        self.device = ToyDevice()
        self.nbytes: dict[str, int] = {}
        self.components: dict[str, tuple[str, ...]] = {}

    # ------------------------------------------------------------------------------------------------------- helpers
    def bytes_of(self, units: Any) -> int:
        return sum(self.nbytes[u] for u in set(units))

    def carry_out(self, instructions: list[Instruction], fails_at: int | None) -> bool:
        """As the engine does: at the first load that fails, tell the core what did not happen. True: nothing failed."""
        for i, instruction in enumerate(instructions):
            if i == fails_at and isinstance(instruction, Load):
                self.residency.handle(LoadFailed(instruction.unit, tuple(instructions[i + 1 :])))
                return False
            self.device.do(instruction, self.nbytes[instruction.unit])
        return True

    def assert_in_order(self, instructions: list[Instruction]) -> None:
        kinds = [type(i) for i in instructions]
        assert kinds == sorted(kinds, key=lambda kind: kind is not Drop), "a load comes before a drop"
        for i, instruction in enumerate(instructions):
            if isinstance(instruction, Await):
                assert Load(instruction.unit) not in instructions[i:], "compute waits for a copy enqueued later"

    def draw_plan(self, data: st.DataObject, component: str | None) -> tuple[EntryPlan, int, frozenset[str]]:
        """A plan, its cap, and the units it protects."""
        cap = data.draw(st.integers(0, 40), label="cap")
        upcoming = data.draw(st.lists(st.sampled_from(COMPONENTS), max_size=5), label="upcoming")
        running = data.draw(st.sets(st.sampled_from(COMPONENTS), max_size=2), label="running") & self.components.keys()
        protected = frozenset(u for c in running for u in self.components[c])
        prefetch = data.draw(st.booleans(), label="prefetch")
        return plan_entry(self.residency.view(), component, cap, upcoming, protected, prefetch), cap, protected

    # --------------------------------------------------------------------------------------------------------- rules
    @rule(
        component=st.sampled_from(COMPONENTS),
        sizes=st.dictionaries(st.sampled_from(UNITS), st.tuples(st.integers(0, 6), st.booleans()), max_size=4),
    )
    def take_in(self, component: str, sizes: dict[str, tuple[int, bool]]) -> None:
        """A component arrives, or is cut anew; some of its units may be known, as shared ones are."""
        for unit, (nbytes, prefetchable) in sizes.items():
            if unit not in self.nbytes:
                self.residency.add_unit(unit, nbytes, prefetchable)
                self.nbytes[unit] = nbytes
        self.residency.set_component(component, list(sizes))
        self.components[component] = tuple(sizes)

    @precondition(lambda self: self.components)
    @rule(data=st.data(), fails_at=st.none() | st.integers(0, 8))
    def enter(self, data: st.DataObject, fails_at: int | None) -> None:
        component = data.draw(st.sampled_from(sorted(self.components)), label="component")
        own = self.components[component]
        plan, cap, protected = self.draw_plan(data, component)
        bound = max(cap, self.bytes_of([*own, *(protected & self.device.memory.keys())]), self.device.nbytes)
        instructions = self.residency.handle(Entered(component, plan))
        assert all(self.residency.state(u) is State.READY for u in own)
        assert self.residency.is_ready(component)
        self.assert_in_order(instructions)
        ahead = [Load(u) for u in plan.prefetches]
        assert instructions[len(instructions) - len(ahead) :] == ahead, "what is needed now comes first"
        self.device.watch()
        if self.carry_out(instructions, fails_at):
            assert set(own) <= self.device.waited
            assert self.device.nbytes == plan.peak_nbytes
        assert self.device.most <= bound

    @precondition(lambda self: self.components)
    @rule(data=st.data(), fails_at=st.none() | st.integers(0, 8))
    def use_idle_time(self, data: st.DataObject, fails_at: int | None) -> None:
        plan, cap, protected = self.draw_plan(data, None)
        bound = max(cap, self.bytes_of(protected & self.device.memory.keys()), self.device.nbytes)
        instructions = self.residency.handle(Prefetched(plan))
        assert not any(isinstance(i, Await) for i in instructions), "nothing waits for what is not needed yet"
        self.assert_in_order(instructions)
        self.device.watch()
        if self.carry_out(instructions, fails_at):
            assert self.device.nbytes == plan.peak_nbytes
        assert self.device.most <= bound

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        held = sorted(self.device.memory)
        units = data.draw(st.lists(st.sampled_from(held), unique=True), label="units") if held else []
        instructions = self.residency.handle(Dropped(tuple(units)))
        assert [i.unit for i in instructions] == units
        self.carry_out(instructions, None)

    @precondition(lambda self: self.components)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """A component goes, and with it the units that no other one reads."""
        component = data.draw(st.sampled_from(sorted(self.components)), label="component")
        units = self.components.pop(component)
        shared = set(itertools.chain.from_iterable(self.components.values()))
        going = [u for u in units if u not in shared]
        self.carry_out(self.residency.handle(Dropped(tuple(u for u in going if u in self.device.memory))), None)
        self.residency.remove_component(component)
        for unit in going:
            self.residency.remove_unit(unit)
            del self.nbytes[unit]

    @precondition(lambda self: self.nbytes)
    @rule(data=st.data())
    def forget_a_unit(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.nbytes)), label="unit")
        if unit in self.device.memory:
            self.refuses(lambda: self.residency.remove_unit(unit), unit)
            return
        self.residency.remove_unit(unit)
        del self.nbytes[unit]
        self.components = {c: tuple(u for u in units if u != unit) for c, units in self.components.items()}

    @precondition(lambda self: self.nbytes and self.components)
    @rule(data=st.data())
    def try_what_is_not_allowed(self, data: st.DataObject) -> None:
        """The illegal step follows legal ones, so that an event applied by halves would show."""
        unit = data.draw(st.sampled_from(sorted(self.nbytes)), label="unit")
        component = data.draw(st.sampled_from(sorted(self.components)), label="component")
        plan, _, _ = self.draw_plan(data, component)
        others = tuple(u for u in sorted(self.device.memory) if u != unit)
        events: list[Event] = [Dropped((*others, unit, unit))]
        if unit in self.device.memory:
            events.append(Prefetched(EntryPlan(drops=others, prefetches=(unit,))))
            if unit not in plan.drops:
                events.append(Entered(component, EntryPlan(plan.drops, (*plan.prefetches, unit))))
            events.append(LoadFailed(others[0] if others else unit, (Drop(unit, True),)))
        else:
            events.append(Dropped((*others, unit)))
            events.append(Entered(component, EntryPlan((*plan.drops, unit), plan.prefetches)))
            events.append(LoadFailed(unit))
            events.append(LoadFailed(unit, tuple(Load(u) for u in others)))
        if unit in self.device.waited:
            events.append(LoadFailed(unit))
        for event in events:
            blamed = None if isinstance(event, LoadFailed) else unit
            self.refuses(lambda event=event: self.residency.handle(event), blamed)

    def refuses(self, act: Any, unit: str | None) -> None:
        """`act` raises, tells the story of `unit` (None: of some unit), and changes nothing."""
        before = snapshot(self.residency)
        with pytest.raises(TransitionError) as caught:
            act()
        assert snapshot(self.residency) == before
        stories = [self.residency.story(u) for u in (self.nbytes if unit is None else [unit])]
        assert any(story in str(caught.value) for story in stories)

    # ---------------------------------------------------------------------------------------------------- invariants
    @invariant()
    def it_is_consistent(self) -> None:
        self.residency.validate()

    @invariant()
    def it_knows_what_the_device_holds(self) -> None:
        assert set(self.residency.held()) == set(self.device.memory)
        assert self.residency.held_nbytes == self.device.nbytes
        for unit in self.nbytes:
            expected = State.HOST
            if unit in self.device.memory:
                expected = State.READY if unit in self.device.waited else State.LOADING
            assert self.residency.state(unit) is expected

    @invariant()
    def its_view_is_the_truth(self) -> None:
        view = self.residency.view()
        assert dict(view.nbytes) == self.nbytes
        assert dict(view.components) == self.components
        assert view.held == self.device.memory.keys()
        assert view.held_nbytes == self.device.nbytes
        for component, units in self.components.items():
            assert self.residency.nbytes(component) == self.bytes_of(units)
            assert self.residency.units_of(component) == units
            assert self.residency.is_ready(component) == (set(units) <= self.device.waited)


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(deadline=None, max_examples=150, stateful_step_count=25)


# ------------------------------------------------------------------------------------------------------------ the table
def in_state(state: State) -> Residency:
    """Unit u (3 bytes) of component c, in `state`."""
    residency = Residency()
    residency.add_unit("u", 3)
    residency.set_component("c", ["u"])
    if state is State.LOADING:
        residency.handle(Prefetched(EntryPlan(prefetches=("u",))))
    elif state is State.READY:
        residency.handle(Entered("c", EntryPlan()))
    assert residency.state("u") is state
    return residency


def test_the_table_knows_only_states_and_words_that_are_used() -> None:
    assert {what for _, what in TRANSITIONS} == set(WHATS)
    assert set(TRANSITIONS.values()) == set(State)


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("state", State)
def test_every_pair_is_in_the_table_or_refused(state: State, what: str) -> None:
    # Underneath the events, some of which cannot ask for what is not allowed: an entry looks at the state first.
    residency = in_state(state)
    if (state, what) in TRANSITIONS:
        residency._apply([("u", what)], "test")
        assert residency.state("u") is TRANSITIONS[state, what]
        assert residency.held_nbytes == (0 if residency.state("u") is State.HOST else 3)
        assert f"test: {what} -> {residency.state('u').value}" in residency.story("u")
    else:
        before = snapshot(residency)
        with pytest.raises(TransitionError) as caught:
            residency._apply([("u", what)], "test")
        problem = f"test: '{what}' is not allowed for u, which is {state.value}"
        assert str(caught.value) == f"{problem}\n{residency.story('u')}"
        assert snapshot(residency) == before
    residency.validate()


EVENTS: dict[str, tuple[Event, set[State]]] = {
    # name: (event, the states of u in which it is allowed)
    "enter": (Entered("c", EntryPlan()), set(State)),
    "drop and enter": (Entered("c", EntryPlan(drops=("u",))), {State.LOADING, State.READY}),
    "prefetch": (Prefetched(EntryPlan(prefetches=("u",))), {State.HOST}),
    "prefetch what is entered": (Entered("c", EntryPlan(prefetches=("u",))), set()),
    "drop": (Dropped(("u",)), {State.LOADING, State.READY}),
    "drop twice": (Dropped(("u", "u")), set()),
    "fail": (LoadFailed("u"), {State.LOADING}),
    "fail with its wait": (LoadFailed("u", (Await("u"),)), {State.READY}),
    "undo a drop": (LoadFailed("u", (Drop("u", True),)), set()),
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("state", State)
def test_events_in_states(state: State, name: str) -> None:
    event, allowed = EVENTS[name]
    residency = in_state(state)
    before = snapshot(residency)
    if state in allowed:
        residency.handle(event)
        residency.validate()
        assert residency.story("u").endswith(residency.state("u").value) or snapshot(residency) == before
    else:
        with pytest.raises(TransitionError) as caught:
            residency.handle(event)
        assert isinstance(caught.value, OffloadError)
        assert residency.story("u") in str(caught.value)
        assert snapshot(residency) == before


# ------------------------------------------------------------------------------------------------------------- examples
def four_units() -> Residency:
    """Components "text" of unit t (1 byte) and "unet" of units a, b and c (2 bytes each)."""
    residency = Residency()
    residency.add_unit("t", 1)
    for unit in "abc":
        residency.add_unit(unit, 2)
    residency.set_component("text", "t")
    residency.set_component("unet", "abc")
    return residency


def test_an_entry_drops_loads_waits_and_loads_ahead_in_this_order() -> None:
    residency = four_units()
    assert residency.handle(Entered("text", EntryPlan(prefetches=("a",)))) == [Load("t"), Await("t"), Load("a")]
    instructions = residency.handle(Entered("unet", EntryPlan(drops=("t",))))
    assert instructions == [
        Drop("t", arrived=True), Load("b"), Load("c"), Await("a"), Await("b"), Await("c"),
    ]  # fmt: skip
    assert residency.handle(Entered("unet", EntryPlan(prefetches=("t",)))) == [Load("t")]


def test_dropping_what_is_on_its_way_says_so() -> None:
    residency = four_units()
    residency.handle(Entered("text", EntryPlan(prefetches=("a", "b"))))
    assert residency.handle(Dropped(("b", "t"))) == [Drop("b", arrived=False), Drop("t", arrived=True)]
    assert residency.held() == ("a",)


def test_an_entry_may_reload_its_own_unit() -> None:
    residency = in_state(State.READY)
    assert residency.handle(Entered("c", EntryPlan(drops=("u",)))) == [Drop("u", arrived=True), Load("u"), Await("u")]


def test_a_failed_load_undoes_what_came_after_it_and_nothing_before() -> None:
    residency = four_units()
    instructions = residency.handle(Entered("unet", EntryPlan(prefetches=("t",))))
    assert instructions[:3] == [Load("a"), Load("b"), Load("c")]
    assert residency.handle(LoadFailed("b", tuple(instructions[2:]))) == []
    assert {u: residency.state(u) for u in "abct"} == {
        "a": State.LOADING, "b": State.HOST, "c": State.HOST, "t": State.HOST,
    }  # fmt: skip
    assert residency.held_nbytes == 2


def test_names_must_be_new_known_and_different() -> None:
    residency = four_units()
    before = snapshot(residency)
    with pytest.raises(ValueError, match="unit a is known already"):
        residency.add_unit("a", 1)
    with pytest.raises(ValueError, match="unit z has -1 bytes"):
        residency.add_unit("z", -1)
    with pytest.raises(ValueError, match="component vae names the unknown unit z"):
        residency.set_component("vae", ["a", "z"])
    with pytest.raises(ValueError, match="component vae names a unit twice: a, b, a"):
        residency.set_component("vae", ["a", "b", "a"])
    assert snapshot(residency) == before


@pytest.mark.parametrize(
    "event",
    [
        Entered("nobody", EntryPlan(prefetches=("a",))),
        Entered("unet", EntryPlan(prefetches=("nothing",))),
        Prefetched(EntryPlan(prefetches=("a", "nothing"))),
        Dropped(("nothing",)),
        LoadFailed("nothing"),
    ],
)
def test_an_unknown_name_changes_nothing(event: Event) -> None:
    residency = four_units()
    before = snapshot(residency)
    with pytest.raises(KeyError):
        residency.handle(event)
    assert snapshot(residency) == before


def test_removing_a_component_leaves_its_units() -> None:
    residency = four_units()
    residency.handle(Entered("unet", EntryPlan()))
    assert residency.knows("unet")
    residency.remove_component("unet")
    residency.remove_component("unet")  # not known any more: nothing to do
    assert not residency.knows("unet")
    assert residency.knows("text")
    assert residency.held() == ("a", "b", "c")
    residency.validate()


def test_removing_a_unit_takes_it_out_of_its_components() -> None:
    residency = four_units()
    residency.remove_unit("b")
    assert residency.units_of("unet") == ("a", "c")
    residency.validate()


def test_a_view_is_a_copy() -> None:
    residency = four_units()
    view = residency.view()
    residency.handle(Entered("unet", EntryPlan()))
    residency.add_unit("new", 1)
    residency.set_component("vae", ["new"])
    assert view == four_units().view()


def test_a_component_without_units_is_always_ready() -> None:
    residency = Residency()
    residency.set_component("scheduler", [])
    assert residency.is_ready("scheduler")
    assert residency.handle(Entered("scheduler", EntryPlan())) == []


def test_a_story_tells_the_last_transitions_in_order() -> None:
    residency = in_state(State.HOST)
    assert residency.story("u") == "story of u (3 bytes):\n  nothing has happened to it"
    residency.handle(Prefetched(EntryPlan(prefetches=("u",))))
    residency.handle(Entered("c", EntryPlan()))
    residency.handle(Dropped(("u",)))
    assert residency.story("u").splitlines() == [
        "story of u (3 bytes):",
        "  Prefetched: load -> loading",
        "  Entered: await -> ready",
        "  Dropped: drop -> host",
    ]


def test_a_story_does_not_grow_without_end() -> None:
    residency = in_state(State.HOST)
    for _ in range(100):
        residency.handle(Entered("c", EntryPlan()))
        residency.handle(Dropped(("u",)))
    assert len(residency.story("u").splitlines()) == 33


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda r: setattr(r, "held_nbytes", 1), "held_nbytes is 1, the units say 0"),
        (lambda r: r._units.pop("a"), "unet names a unit that is gone"),
        (lambda r: r._components.update(unet=("a", "a")), "unet names a unit twice"),
    ],
)
def test_validate_objects(harm: Any, complaint: str) -> None:
    residency = four_units()
    residency.validate()
    harm(residency)
    with pytest.raises(AssertionError, match=complaint):
        residency.validate()
