"""The order of a pipeline's components, and the device bytes left to weights beside what each was measured to need."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prefetch_offload.calls import MAX_SWITCHES, CallOrder, Memory
from prefetch_offload.config import GIB, KIB

NAMES = ("text", "unet", "vae", "control")


def no_repeats(names: Iterable[str]) -> list[str]:
    """Entering the component that was entered last is no switch; the engine does not report it."""
    kept: list[str] = []
    for name in names:
        if kept[-1:] != [name]:
            kept.append(name)
    return kept


switches = st.lists(st.sampled_from(NAMES), min_size=1, max_size=12).map(no_repeats)
names_with_repeats = st.lists(st.sampled_from(NAMES), max_size=8)


def call(order: CallOrder, names: Iterable[str]) -> None:
    """A call that ends as it should."""
    order.start()
    for name in names:
        order.enter(name)
    order.finish()


# ---------------------------------------------------------------------------------------------------------------- order
@settings(deadline=None)
@given(hint=names_with_repeats)
def test_a_component_named_twice_in_the_hint_counts_once(hint: list[str]) -> None:
    order = CallOrder(hint)
    assert order.expected == tuple(sorted(set(hint), key=hint.index))
    assert order.upcoming() == order.expected


@settings(deadline=None)
@given(hint=names_with_repeats, before=switches, names=switches)
def test_the_last_call_is_what_is_expected_next(hint: list[str], before: list[str], names: list[str]) -> None:
    order = CallOrder(hint)
    call(order, before)
    call(order, names)
    assert order.expected == tuple(names)
    assert order.upcoming() == tuple(names)


@settings(deadline=None)
@given(hint=names_with_repeats, names=switches)
def test_a_call_that_goes_as_the_last_one_is_foreseen_at_every_step(hint: list[str], names: list[str]) -> None:
    """However often components take turns."""
    order = CallOrder(hint)
    call(order, names)
    order.start()
    for i, name in enumerate(names):
        assert order.upcoming()[0] == name
        order.enter(name)
        assert order.upcoming() == tuple(names[i + 1 :] + names[: i + 1])
    order.finish()
    assert order.expected == tuple(names)


@settings(deadline=None)
@given(hint=names_with_repeats, names=switches, broken=switches)
def test_a_call_that_raised_teaches_nothing(hint: list[str], names: list[str], broken: list[str]) -> None:
    order = CallOrder(hint)
    call(order, names)
    order.start()
    for name in broken:
        order.enter(name)
    order.start()  # the next call; nobody told that the last one ended
    assert order.upcoming() == tuple(names)
    for name in names:
        assert order.upcoming()[0] == name
        order.enter(name)
    order.finish()
    assert order.expected == tuple(names)


def test_a_call_that_entered_nothing_teaches_nothing() -> None:
    order = CallOrder(["text", "unet"])
    call(order, [])
    assert order.expected == ("text", "unet")


def test_the_first_call_corrects_the_hint() -> None:
    order = CallOrder(["text", "image_encoder", "unet", "vae"])
    call(order, ["vae", "text", "unet", "vae"])
    assert order.expected == ("vae", "text", "unet", "vae")


def test_a_component_that_is_left_out_is_passed_over() -> None:
    order = CallOrder(["text", "image_encoder", "unet", "vae"])
    order.start()
    order.enter("text")
    order.enter("unet")
    assert order.upcoming() == ("vae", "text", "image_encoder", "unet")


def test_a_component_nobody_expected_moves_nothing() -> None:
    order = CallOrder(["text", "unet", "vae"])
    order.start()
    order.enter("text")
    order.enter("upscaler")
    assert order.upcoming() == ("unet", "vae", "text")
    order.enter("unet")
    assert order.upcoming() == ("vae", "text", "unet")
    order.finish()
    assert order.expected == ("text", "upscaler", "unet")


def test_more_and_fewer_alternations_than_last_time() -> None:
    order = CallOrder()
    call(order, ["text", *["control", "unet"] * 3, "vae"])
    order.start()
    order.enter("text")
    order.enter("control")
    order.enter("unet")
    assert order.upcoming()[0] == "control"
    order.enter("vae")  # fewer: the nearest such entry ahead
    assert order.upcoming()[0] == "text"
    order.start()
    for name in ["text", *["control", "unet"] * 4]:  # more
        order.enter(name)
    assert order.upcoming()[0] == "control"  # past the end of the expected order, and found again in its next round
    order.enter("vae")
    order.finish()
    assert order.expected == ("text", *["control", "unet"] * 4, "vae")


def test_of_several_such_entries_the_nearest_ahead_is_meant() -> None:
    order = CallOrder()
    call(order, ["text", "unet", "vae", "unet", "control"])
    order.start()
    order.enter("text")
    order.enter("unet")
    assert order.upcoming()[0] == "vae"
    order.enter("unet")
    assert order.upcoming()[0] == "control"


def test_an_order_has_an_end() -> None:
    order = CallOrder()
    call(order, ["text", *["control", "unet"] * MAX_SWITCHES, "vae"])
    assert len(order.expected) == MAX_SWITCHES
    assert order.expected[:3] == ("text", "control", "unet")


@settings(deadline=None)
@given(names=switches, gone=st.sampled_from(NAMES), entered=st.integers(0, 12))
def test_a_forgotten_component_is_out_of_the_order_also_in_mid_call(names: list[str], gone: str, entered: int) -> None:
    order = CallOrder()
    call(order, names)
    order.start()
    for name in names[:entered]:
        order.enter(name)
    order.forget(gone)
    left = [n for n in names[:entered] if n != gone], [n for n in names[entered:] if n != gone]
    assert order.upcoming() == tuple(left[1] + left[0])
    for name in left[1]:
        order.enter(name)
    order.finish()
    assert order.expected == tuple(left[0] + left[1])


@settings(deadline=None)
@given(hint=names_with_repeats, before=switches, names=switches)
def test_visits_are_counted_from_the_start_of_the_call(hint: list[str], before: list[str], names: list[str]) -> None:
    order = CallOrder(hint)
    call(order, before)
    for i, name in enumerate(names):
        assert order.visits(name) == names[:i].count(name)
        order.enter(name)
    order.finish()
    assert all(order.visits(name) == 0 for name in NAMES)


def test_nothing_known_nothing_expected() -> None:
    order = CallOrder()
    assert order.upcoming() == ()
    order.enter("unet")
    assert order.upcoming() == ()
    order.forget("unet")
    order.finish()
    assert order.expected == ()


class OrderMachine(RuleBasedStateMachine):
    """Anything in any order: what comes next is always one cycle of what is expected."""

    def __init__(self) -> None:
        super().__init__()
        self.order = CallOrder()
        self.last: str | None = None

    @rule(name=st.sampled_from(NAMES))
    def enter(self, name: str) -> None:
        self.order.enter(name)
        if name in self.order.expected:
            assert self.order.upcoming()[-1] == name, "the current one comes last"

    @rule()
    def start(self) -> None:
        self.order.start()
        assert self.order.upcoming() == self.order.expected

    @rule()
    def finish(self) -> None:
        self.order.finish()
        assert self.order.upcoming() == self.order.expected

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        self.order.forget(name)
        assert name not in self.order.expected

    @rule(hint=names_with_repeats)
    def expect(self, hint: list[str]) -> None:
        self.order.expect(hint)
        assert set(self.order.expected) == set(hint)

    @invariant()
    def upcoming_is_a_rotation(self) -> None:
        upcoming, expected = self.order.upcoming(), self.order.expected
        assert len(upcoming) == len(expected)
        assert upcoming in [expected[i:] + expected[:i] for i in range(max(1, len(expected)))]


TestOrderMachine = OrderMachine.TestCase
TestOrderMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


# --------------------------------------------------------------------------------------------------------------- memory
budgets = st.none() | st.just("stock") | st.integers(1, 1000)
nbytes = st.integers(0, 1000)
# Shapes and the weights of their components: (shape, weights, [activations on each run])
History = dict[str, tuple[int, list[int]]]
histories = st.dictionaries(st.sampled_from("abcd"), st.tuples(nbytes, st.lists(nbytes, min_size=1, max_size=3)))


def measured(budget: int | str | None, history: History) -> Memory:
    memory = Memory(budget)  # type: ignore[arg-type]
    for shape, (weights, runs) in history.items():
        for activations in runs:
            memory.learn(shape, activations, weights)
            memory.commit()
    return memory


@settings(deadline=None, max_examples=100)
@given(budget=budgets, history=histories, out=st.sets(st.sampled_from("abcde")), weights=nbytes, available=nbytes)
def test_a_component_that_runs_is_always_given_its_weights(
    budget: int | str | None, history: History, out: set[str], weights: int, available: int
) -> None:
    memory = measured(budget, history)
    for shape in out:
        memory.ran_out(shape)
    for shape in "abcde":
        assert memory.cap(shape, weights, available) >= weights


@settings(deadline=None, max_examples=100)
@given(history=histories, available=nbytes)
def test_stock_never_takes_more_than_stock_would_nor_than_there_is(history: History, available: int) -> None:
    memory = measured("stock", history)
    floor = max((weights + max(runs) for weights, runs in history.values()), default=None)
    assert memory.stock_floor() == floor
    for shape, (weights, runs) in history.items():
        assert floor is not None
        assert memory.cap(shape, weights, available, 0) == max(0, min(floor, available) - max(runs))
        assert memory.cap(shape, weights, available) == max(weights, min(floor, available) - max(runs)), "it cannot be streamed"


@settings(deadline=None, max_examples=100)
@given(history=histories, available=nbytes, overhead=nbytes)
def test_under_stock_the_overhead_takes_the_place_of_weights(history: History, available: int, overhead: int) -> None:
    memory = measured("stock", history)
    floor = memory.stock_floor()
    memory.overhead_nbytes = overhead
    for shape, (weights, runs) in history.items():
        assert floor is not None
        assert memory.cap(shape, weights, available, 0) == max(0, min(floor - overhead, available) - max(runs))
        assert memory.cap(shape, weights, available) >= weights, "it cannot be streamed"
    assert memory.cap("new", 500, 500 + available, 100) == max(100, 500 - overhead)
    if available < 500:  # and some is left to its activations
        assert memory.cap("new", 500, available, 100) == max(100, min(500 - overhead, available - available // 4))


@settings(deadline=None, max_examples=100)
@given(budget=st.integers(1, 1000), history=histories, available=nbytes, spare=st.sampled_from([0, 1 << 20]))
def test_a_budget_holds_weights_and_activations(budget: int, history: History, available: int, spare: int) -> None:
    memory = measured(budget, history)
    memory.spare_nbytes = spare
    for shape, (weights, runs) in history.items():
        aside = memory.set_aside(shape)
        assert max(runs) + spare <= aside <= max(runs) * 65 // 64 + max(spare, 16 * KIB) and aside > max(runs)
        for least in (weights, 0, weights // 3):  # what can be streamed needs less
            room = memory.cap(shape, weights, available, least)
            assert room == max(least, min(budget, available) - aside)
            assert memory.cap(shape, weights, budget + aside, least) + aside == max(budget, least + aside), "there is enough"


@settings(deadline=None, max_examples=100)
@given(history=histories, available=nbytes)
def test_without_a_budget_what_is_free_is_shared_with_the_activations(history: History, available: int) -> None:
    memory = measured(None, history)
    for shape, (weights, runs) in history.items():
        assert memory.cap(shape, weights, available) == max(weights, available - max(runs))


@settings(deadline=None)
@given(budget=st.just("stock") | st.integers(1, 1000), history=histories, weights=nbytes, available=nbytes)
def test_a_shape_not_measured_yet_runs_alone_within_a_budget(
    budget: int | str, history: History, weights: int, available: int
) -> None:
    memory = measured(budget, history)
    assert not memory.knows("new")
    assert memory.cap("new", weights, available) == weights


def test_a_shape_not_measured_yet_leaves_a_quarter_without_a_budget() -> None:
    memory = Memory(None)
    assert memory.cap("new", 1 * GIB, 8 * GIB) == 6 * GIB
    assert memory.cap("new", 7 * GIB, 8 * GIB) == 7 * GIB


@pytest.mark.parametrize("budget", [None, "stock", 1_000_000])
def test_a_shape_that_ran_out_runs_alone_for_good(budget: int | str | None) -> None:
    there = 5000 if budget is None else 10**9
    memory = measured(budget, {"a": (50, [10]), "b": (500, [100])})
    assert memory.cap("a", 50, there) > 50
    memory.ran_out("a")
    assert memory.cap("a", 50, there) == 50
    memory.learn("a", 1, 50)
    memory.commit()
    assert memory.cap("a", 50, there) == 50
    assert memory.cap("b", 500, there) >= 500, "the others are as they were"
    assert memory.cap("b", 500, there) == measured(budget, {"a": (50, [10]), "b": (500, [100])}).cap("b", 500, there)
    if budget != "stock":
        assert memory.cap("a", 50, there, 20) == 50
        memory.ran_out("a")
        assert memory.cap("a", 50, there, 20) == 20, "alone, it ran out again: from now on it is streamed"
    memory.ran_out("unmeasured")
    memory.forgive()  # there is more to spare
    assert memory.cap("a", 50, there) > 50 and memory.alone == {"unmeasured"}


def test_a_large_component_starts_within_part_of_the_budget() -> None:
    """Until it has run, nobody knows what it needs besides its weights."""
    memory = Memory(1000)
    assert memory.cap("new", 500, 0, 10) == 500
    assert memory.cap("new", 501, 0, 10) == 250
    assert memory.cap("new", 501, 0, 300) == 300, "less than that it cannot run in"
    assert memory.cap("new", 501, 0) == 501, "it cannot be streamed"


@settings(deadline=None)
@given(calls=st.lists(st.lists(nbytes, min_size=1, max_size=4), min_size=1, max_size=4), weights=nbytes)
def test_the_most_that_was_ever_measured_counts_once_its_call_is_over(calls: list[list[int]], weights: int) -> None:
    memory = Memory(10**6)
    known: int | None = None  # the most in the calls that are over
    for runs in calls:
        for activations in runs:
            memory.learn("shape", activations, weights)
            assert memory.knows("shape") is (known is not None)
            assert memory.cap("shape", weights, 10**9) == (weights if known is None else 10**6 - memory.set_aside("shape"))
        memory.commit()
        known = max(runs if known is None else [known, *runs])
        assert memory.activations == {"shape": known}
        assert memory.needs == {"shape": weights + known}
        assert memory.stock_floor() == weights + known
        assert memory.cap("shape", weights, 10**9) == 10**6 - memory.set_aside("shape")


def test_a_commit_without_runs_changes_nothing() -> None:
    memory = measured(1000, {"a": (50, [10])})
    memory.commit()
    assert memory == measured(1000, {"a": (50, [10])})


def test_a_component_that_has_grown_is_counted_with_its_new_weights() -> None:
    memory = measured("stock", {"a": (50, [30])})
    memory.learn("a", 10, 70)
    memory.commit()
    assert memory.stock_floor() == 100
    assert memory.cap("a", 70, 0) == 70


def test_nothing_measured_no_floor() -> None:
    assert Memory("stock").stock_floor() is None
