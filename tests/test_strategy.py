"""Joint planning: never over budget, never below the physical limit, and next to a brute-force optimum."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch_offload.errors import BudgetError
from prefetch_offload.simulator import ComponentLoad, Link, Prediction, Workload, simulate
from prefetch_offload.strategy import balanced, lower_bound_ms, plan_call, stock_ms, whole
from prefetch_offload.trace import Span

MB = 10**6
TINY = 1e-6
MONOTONE = 1.02


# ------------------------------------------------------------------------------------------------- random workloads
@st.composite
def workloads(draw: st.DrawFn, most_units: int = 5) -> Workload:
    components = {}
    runs = []
    for name in "abc"[: draw(st.integers(1, 3))]:
        units = tuple(f"{name}{i}" for i in range(draw(st.integers(1, most_units))))
        components[name] = ComponentLoad(
            units,
            {u: draw(st.integers(1, 8)) * MB for u in units},
            {u: draw(st.floats(0.01, 10)) for u in units},
            draw(st.integers(0, 8)) * MB,
            frozenset(units[:1]) if draw(st.booleans()) else frozenset(),
            draw(st.sampled_from([True, True, True, False])),
        )
        runs.append((name, draw(st.integers(1, 5))))
    if draw(st.booleans()):
        runs.append(runs[0])
    return Workload(components, tuple(runs))


@st.composite
def questions(draw: st.DrawFn, most_units: int = 5) -> tuple[Workload, int, Link]:
    workload = draw(workloads(most_units))
    most = sum(c.total_nbytes + c.activation_nbytes for c in workload.components.values())
    budget = draw(st.integers(workload.smallest_budget_nbytes, max(most, workload.smallest_budget_nbytes)))
    return workload, budget, Link(draw(st.sampled_from([0.5, 1.0, 2.0, 8.0])), draw(st.sampled_from([0.0, 0.01, 0.1])))


def by_unit(spans: Sequence[Span], unit: str) -> list[Span]:
    return [s for s in spans if s.track == "copy" and s.args["unit"] == unit]


def check(workload: Workload, budget: int, link: Link, prediction: Prediction) -> None:
    """What must be true of every simulated run."""
    assert prediction.peak_nbytes <= budget
    assert all(level.nbytes <= budget for level in prediction.timeline.levels)
    assert prediction.call_ms >= lower_bound_ms(workload, budget, link) - TINY
    spans = prediction.timeline.spans
    for track in ("compute", "copy"):
        for before, after in itertools.pairwise(s for s in spans if s.track == track):
            assert before.end_ms <= after.start_ms + TINY, "one after the other"
    copies: dict[str, list[float]] = {}
    for span in spans:
        if span.track == "copy":
            copies.setdefault(span.args["unit"], []).append(span.end_ms)
    for span in spans:
        if span.track == "compute":
            ends = copies[span.args["unit"]]
            assert any(end <= span.start_ms + TINY for end in ends), f"{span.args['unit']} is read before it is there"
            # nor while a copy of it is on its way
            assert not any(s.start_ms + TINY < span.start_ms < s.end_ms - TINY for s in by_unit(spans, span.args["unit"]))


# ------------------------------------------------------------------------------------------------------- properties
@settings(deadline=None, max_examples=120)
@given(questions())
def test_a_plan_keeps_the_budget_and_reads_nothing_before_it_is_there(question: tuple[Workload, int, Link]) -> None:
    workload, budget, link = question
    check(workload, budget, link, simulate(workload, balanced(workload, budget, link), budget, link))


@settings(deadline=None, max_examples=25)
@given(questions(most_units=30))
def test_so_does_one_of_many_units(question: tuple[Workload, int, Link]) -> None:
    workload, budget, link = question
    check(workload, budget, link, simulate(workload, balanced(workload, budget, link), budget, link))


def jittered(workload: Workload, link: Link, draw: random.Random) -> Workload:
    """Each unit computes in 0.3 to 3 times its time, and its copies take up to as long again."""
    components = {
        name: replace(
            c,
            compute_ms={u: ms * draw.uniform(0.3, 3.0) for u, ms in c.compute_ms.items()},
            unpack_ms={u: link.copy_ms(n) * draw.uniform(0.0, 1.0) for u, n in c.nbytes.items()},
        )
        for name, c in workload.components.items()
    }
    return Workload(components, workload.runs)


@settings(deadline=None, max_examples=60)
@given(questions(), st.randoms(use_true_random=False), st.floats(0.3, 3.0))
def test_other_times_than_planned_change_the_speed_only(
    question: tuple[Workload, int, Link], draw: random.Random, faster: float
) -> None:
    """Compute and link differ from what the plan was made for: still in budget, in order, and no deadlock."""
    workload, budget, link = question
    shares = balanced(workload, budget, link)
    other = Link(link.gbps * faster, link.latency_ms)
    real = jittered(workload, other, draw)
    check(real, budget, other, simulate(real, shares, budget, other, 3))


@settings(deadline=None, max_examples=20)
@given(questions(most_units=30), st.randoms(use_true_random=False), st.floats(0.3, 3.0))
def test_so_they_do_with_many_units(question: tuple[Workload, int, Link], draw: random.Random, faster: float) -> None:
    test_other_times_than_planned_change_the_speed_only.hypothesis.inner_test(question, draw, faster)  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=60)
@given(workloads(8), st.sampled_from([0.5, 1.0, 8.0]), st.floats(0.3, 3.0), st.randoms(use_true_random=False), st.booleans())
def test_in_stocks_memory_no_slower_than_stock(
    workload: Workload, gbps: float, faster: float, draw: random.Random, jitter: bool
) -> None:
    """Stock's copies go over the same link, as if its memory were pinned; also where times are not those planned for."""
    budget = max(c.total_nbytes + c.activation_nbytes for c in workload.components.values())
    shares = balanced(workload, budget, Link(gbps, 0.0))
    if jitter:
        gbps *= faster
        components = jittered(workload, Link(gbps), draw).components
        workload = Workload({n: replace(c, unpack_ms={}) for n, c in components.items()}, workload.runs)
    prediction = simulate(workload, shares, budget, Link(gbps, 0.0), 3)
    assert prediction.peak_nbytes <= budget
    assert prediction.call_ms <= stock_ms(workload, gbps, gbps) + TINY


@settings(deadline=None, max_examples=40)
@given(questions())
def test_the_same_question_gets_the_same_answer(question: tuple[Workload, int, Link]) -> None:
    assert balanced(*question) == balanced(*question)


@settings(deadline=None, max_examples=60)
@given(questions())
def test_no_slower_than_pinned_copies_of_whole_components_one_after_the_other(
    question: tuple[Workload, int, Link],
) -> None:
    workload, budget, link = question
    if any(c.total_nbytes + c.activation_nbytes > budget for c in workload.components.values()):
        return
    entries = [a for a, b in zip(workload.runs, workload.runs[1:] + workload.runs[:1], strict=True)]
    serial = workload.compute_ms
    for name, _ in entries:
        c = workload.components[name]
        serial += sum(link.copy_ms(c.nbytes[u]) for u in c.units)
    assert simulate(workload, balanced(workload, budget, link), budget, link).call_ms <= serial + TINY


@settings(deadline=None, max_examples=100, derandomize=True)
@given(questions(), st.floats(1.0, 1.5))
def test_more_memory_is_not_slower(question: tuple[Workload, int, Link], factor: float) -> None:
    """The same examples every time, since nothing makes sure of it: each budget is searched with limited effort."""
    not_slower(*question, factor)


def not_slower(workload: Workload, budget: int, link: Link, factor: float) -> None:
    less = simulate(workload, balanced(workload, budget, link), budget, link).call_ms
    more_nbytes = int(budget * factor)
    more = simulate(workload, balanced(workload, more_nbytes, link), more_nbytes, link).call_ms
    assert more <= MONOTONE * less


def drawn(seed: int, most_units: int) -> tuple[Workload, int, Link, float]:
    """A call at random, a budget that it can run in, a link, and how many times as much a larger budget is."""
    draw = random.Random(seed)
    components, runs = {}, []
    for name in "abc"[: draw.randint(1, 3)]:
        units = tuple(f"{name}{i}" for i in range(draw.randint(1, most_units)))
        components[name] = ComponentLoad(
            units,
            {u: draw.randint(1, 8) * MB for u in units},
            {u: draw.uniform(0.01, 10) for u in units},
            draw.randint(0, 8) * MB,
            frozenset(units[:1]) if draw.random() < 0.5 else frozenset(),
            draw.random() < 0.75,
        )
        runs.append((name, draw.randint(1, 5)))
    if draw.random() < 0.5:
        runs.append(runs[0])
    workload = Workload(components, tuple(runs))
    least = workload.smallest_budget_nbytes
    most = sum(c.total_nbytes + c.activation_nbytes for c in components.values())
    budget = draw.randint(least, max(most, least))
    link = Link(draw.choice([0.5, 1, 2, 8]), draw.choice([0, 0.01, 0.1]))
    return workload, budget, link, draw.uniform(1, 1.5)


@pytest.mark.parametrize(
    ("most_units", "seed"), [(12, 1254), (12, 1278), (12, 1439), (30, 307), (30, 630), (30, 753), (30, 963), (30, 1273)]
)
def test_nor_where_it_was(most_units: int, seed: int) -> None:
    """Of some 4,000 pairs drawn so, these were 2.1% to 6.1% slower in the larger budget."""
    not_slower(*drawn(seed, most_units))


@pytest.mark.parametrize("most_units", [12, 30])
def test_nor_in_others_drawn_at_random(most_units: int) -> None:
    for seed in range(2000, 2080):
        not_slower(*drawn(seed, most_units))


# ----------------------------------------------------------------------------------------------- worked examples
def sdxl(activation_nbytes: int = 0) -> Workload:
    """A text encoder, a denoiser and a decoder of 16 units, 10 steps of 100 ms."""
    sizes = {"text": (1600 * MB, 20.0), "unet": (4800 * MB, 100.0), "vae": (160 * MB, 60.0)}
    components = {}
    for name, (nbytes, ms) in sizes.items():
        units = tuple(f"{name}/{i}" for i in range(16))
        components[name] = ComponentLoad(
            units, dict.fromkeys(units, nbytes // 16), dict.fromkeys(units, ms / 16), activation_nbytes
        )
    return Workload(components, (("text", 1), ("unet", 10), ("vae", 1)))


def test_with_room_for_all_a_call_is_compute_and_nothing_else() -> None:
    workload = sdxl()
    plan = plan_call(workload, 7000 * MB, Link(25.0))
    assert plan.shares == {}
    assert plan.prediction.call_ms == pytest.approx(workload.compute_ms) == plan.bound_ms
    assert plan.prediction.h2d_nbytes == 0
    assert plan.prediction.first_ms > plan.prediction.call_ms


def test_a_denoiser_of_which_enough_stays_streams_for_free() -> None:
    """It needs 2300 MB over a 25 GB/s link in each step of 100 ms, which carries 2500 MB in that time."""
    workload = sdxl()
    plan = plan_call(workload, 2500 * MB + 600 * MB, Link(25.0))
    assert plan.prediction.peak_nbytes <= 3100 * MB
    assert plan.prediction.call_ms <= 1.06 * plan.bound_ms


def test_a_text_encoder_does_not_evict_the_denoiser() -> None:
    workload, budget, link = sdxl(), 5300 * MB, Link(4.0)
    plan = plan_call(workload, budget, link)
    evicting = simulate(workload, whole(workload, budget, link), budget, link)
    assert plan.prediction.h2d_nbytes < 0.8 * evicting.h2d_nbytes
    assert plan.prediction.call_ms < evicting.call_ms


def test_the_bound_of_a_streamed_denoiser_is_the_one_of_the_textbook() -> None:
    """Each step costs max(c, (1 - r) S / B)."""
    units = tuple(f"u{i}" for i in range(10))
    c = ComponentLoad(units, dict.fromkeys(units, 100 * MB), dict.fromkeys(units, 1.0))
    workload = Workload({"unet": c}, (("unet", 20),))
    assert lower_bound_ms(workload, 1000 * MB, Link(10.0, 0.0)) == pytest.approx(200.0)
    assert lower_bound_ms(workload, 900 * MB, Link(10.0, 0.0)) == pytest.approx(20 * 10.0 + 1.0, abs=2.0)
    assert lower_bound_ms(workload, 500 * MB, Link(10.0, 0.0)) == pytest.approx(20 * 50.0, rel=0.01)


def test_a_budget_that_is_too_small_is_refused_and_the_smallest_is_named() -> None:
    workload = sdxl(activation_nbytes=100 * MB)
    assert workload.smallest_budget_nbytes == 400 * MB
    plan = plan_call(workload, 400 * MB, Link(25.0))
    assert plan.prediction.peak_nbytes <= 400 * MB
    with pytest.raises(BudgetError, match=str(400 * MB)):
        plan_call(workload, 400 * MB - 1, Link(25.0))


def test_stock_copies_each_component_in_and_back() -> None:
    workload = sdxl()
    copies = 6560 / 25.0 + 6560 / 10.0
    assert stock_ms(workload, 25.0, 10.0) == pytest.approx(workload.compute_ms + copies)
    assert whole(workload, 0, Link(25.0)) == {}


def test_stock_copies_a_component_again_that_the_next_one_sent_back() -> None:
    a = ComponentLoad(("a",), {"a": 10 * MB}, {"a": 1.0})
    b = ComponentLoad(("b",), {"b": 100 * MB}, {"b": 1.0})
    workload = Workload({"a": a, "b": b}, (("a", 1), ("b", 1), ("a", 1), ("b", 1)))
    assert stock_ms(workload, 1.0, 1.0) == pytest.approx(4.0 + 2 * (2 * 10 + 100)), "b waits for nobody to send it back"


def uneven(n: int, nbytes: int, pass_ms: float, name: str, activation_nbytes: int) -> ComponentLoad:
    """Every fourth unit is twice as large, and every seventh takes twice as long."""
    sizes = {f"{name}/{i}": 1 + (i % 4 == 3) for i in range(n)}
    times = {f"{name}/{i}": 1 + (i % 7 == 6) for i in range(n)}
    size, time = nbytes // sum(sizes.values()), pass_ms / sum(times.values())
    return ComponentLoad(
        tuple(sizes), {u: k * size for u, k in sizes.items()}, {u: k * time for u, k in times.items()}, activation_nbytes
    )


@pytest.mark.parametrize("share", [0.15, 0.25, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("units", [(40, 100), (24, 60)])
def test_of_two_components_that_both_stream_each_leaves_the_other_room(units: tuple[int, int], share: float) -> None:
    """The proportions of Flux: a text encoder and a denoiser of which neither fits, and a link that is as busy as compute."""
    encoder, denoiser = units
    mb = 1_000_000
    workload = Workload(
        {
            "text": uneven(encoder, 12 * mb, 325.0, "text", mb // 3),
            "denoiser": uneven(denoiser, 40 * mb, 710.0, "denoiser", 2 * mb),
            "vae": uneven(3, mb // 5, 68.0, "vae", mb * 3 // 4),
        },
        (("text", 1), ("denoiser", 4), ("vae", 1)),
    )
    plan = plan_call(workload, int(share * 52.2 * mb), Link(0.0326))
    assert plan.prediction.peak_nbytes <= plan.budget_nbytes
    assert plan.bound_ms <= plan.prediction.call_ms * (1 + 1e-9) <= 1.1 * plan.bound_ms


@pytest.mark.parametrize("gbps", [0.0296, 0.04])
def test_what_is_read_once_comes_before_what_waits_behind_it(gbps: float) -> None:
    """The proportions of SDXL in stock's memory: all of the text encoders has room beside the first of the denoiser."""
    mb = 1_000_000
    workload = Workload(
        {
            "text": uneven(9, 9_963_000, 157.0, "text", mb),
            "text 2": uneven(9, 10_110_000, 150.0, "text 2", mb),
            "denoiser": uneven(29, 34_670_000, 636.0, "denoiser", 9_509_000),
            "vae": uneven(1, 685_000, 73.0, "vae", mb),
        },
        (("text", 1), ("text 2", 1), ("denoiser", 3), ("vae", 1)),
    )
    plan = plan_call(workload, 44_180_000, Link(gbps))
    assert plan.prediction.peak_nbytes <= plan.budget_nbytes
    assert plan.prediction.call_ms <= 1.06 * plan.bound_ms
