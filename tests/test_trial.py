"""What calls come to by the planner's quick way is what the simulator says, to the last digit."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimum import random_case
from test_strategy import questions, uneven, workloads

from prefetch_offload.schedule import _scripts, repeating
from prefetch_offload.simulator import Link, Workload, simulate
from prefetch_offload.strategy import balanced
from prefetch_offload.trial import Trials
from prefetch_offload.window import Share, handed_over, share_of


def same(workload: Workload, shares: dict[str, Share], budget: int, link: Link, calls: int) -> None:
    reference = simulate(workload, shares, budget, link, calls)
    quick = Trials(workload, budget, link)(shares, calls)
    assert quick == (reference.call_ms, reference.first_ms, reference.h2d_nbytes, reference.peak_nbytes)


@settings(deadline=None, max_examples=150)
@given(workloads(12), st.randoms(use_true_random=False), st.integers(1, 3))
def test_whatever_the_shares(workload: Workload, draw: random.Random, calls: int) -> None:
    budget = int(workload.smallest_budget_nbytes * draw.choice([1, 1.2, 2, 4]))
    shares = {}
    for name, c in workload.components.items():
        cap = budget - c.activation_nbytes
        kind = draw.randrange(4)
        if not c.streamable or (kind == 0 and c.total_nbytes <= cap) or len(c.must) == len(c.units):
            continue
        if kind == 1 and c.total_nbytes <= cap:
            share = handed_over(c.units, c.nbytes, c.must, draw.random() < 0.5)
        else:
            limit = draw.randint(c.least_nbytes, max(c.least_nbytes, min(cap, c.total_nbytes)))
            must = sum(c.nbytes[u] for u in c.must)
            window = draw.randint(c.least_nbytes - must, max(c.least_nbytes - must, limit - must))
            share = share_of(c.units, c.nbytes, c.compute_ms, limit, window, c.must)
            loose = [u for u in c.units if u not in share.keep]
            share = replace(
                share,
                ahead=draw.random() < 0.5,
                late=frozenset(u for u in loose if draw.random() < 0.2),
                head=frozenset(loose[:1]) if draw.random() < 0.2 else None,
            )
        shares[name] = share
    same(workload, shares, budget, Link(draw.choice([0.5, 1.0, 8.0]), draw.choice([0.0, 0.1])), calls)


@settings(deadline=None, max_examples=30)
@given(questions(most_units=20))
def test_planned_ones(question: tuple[Workload, int, Link]) -> None:
    workload, budget, link = question
    same(workload, balanced(workload, budget, link), budget, link, 2)


@pytest.mark.parametrize("seed", range(10))
def test_scripts(seed: int) -> None:
    workload, budget, link = random_case(seed)
    schedule, _ = repeating(workload, budget, link, 1e9, 20_000)
    assert schedule is not None
    same(workload, _scripts(workload, schedule), budget, link, 4)


def test_units_that_travel_as_something_else() -> None:
    c = uneven(40, 12_000_000, 325.0, "a", 0)
    some = c.units[::3]
    c = replace(c, copy_nbytes={u: c.nbytes[u] // 2 for u in some}, unpack_ms=dict.fromkeys(some, 0.3))
    workload = Workload({"a": c, "b": uneven(9, 5_000_000, 50.0, "b", 1_000_000)}, (("a", 5), ("b", 1)))
    same(workload, balanced(workload, 8_000_000, Link(0.1)), 8_000_000, Link(0.1), 2)
