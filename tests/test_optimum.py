"""The planner next to a brute-force optimum, on small calls at random."""

from __future__ import annotations

import functools

import pytest
from optimum import Optimum, random_case

from prefetch_offload import search
from prefetch_offload.simulator import Prediction, simulate
from prefetch_offload.strategy import balanced, lower_bound_ms

GROUPS = 20
CASES = 500
CALLS = 5  # the last of them is a steady one
NOTHING = 1e-6
# Of 500 cases 499 are equal and the other one is 0.8% off. What is promised is 5% in all of them.
WORST = 0.05
WALKS = range(0, CASES, 6)


@functools.cache
def planned(seed: int) -> tuple[Prediction, float]:
    """What the planner comes to, and the shortest call that can be repeated at all, in ms."""
    workload, budget, link = random_case(seed)
    prediction = simulate(workload, balanced(workload, budget, link), budget, link, CALLS)
    return prediction, Optimum(workload, budget, link, prediction.call_ms * (1 + NOTHING / 2)).search()


@pytest.mark.parametrize("group", range(GROUPS))
def test_next_to_the_optimum_of_all_schedules(group: int) -> None:
    """The steady call, next to the optimum, which is not below the physical limit either."""
    gaps = {}
    for seed in range(group * CASES // GROUPS, (group + 1) * CASES // GROUPS):
        workload, budget, link = random_case(seed)
        prediction, best = planned(seed)
        assert prediction.peak_nbytes <= budget, "weights and activations, at any instant"
        assert lower_bound_ms(workload, budget, link) <= best * (1 + 1e-9)
        assert best <= prediction.call_ms * (1 + NOTHING / 10), "the brute force does not know the planner's schedule"
        gaps[seed] = prediction.call_ms / best - 1
    assert max(gaps.values()) <= WORST, gaps
    assert sum(gap < NOTHING for gap in gaps.values()) >= 0.8 * len(gaps), gaps


def test_the_walk_alone_next_to_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls so small are searched decision by decision; larger ones by the walk over shares, of which this is the measure.

    It is not within 5% everywhere, since shares keep the same units in every pass, and here a unit is up to a third of
    the device: of these 84 cases 65 are equal, 76 within 5%, and the worst is 11.3% off; of all 500 466, and 35%.
    """
    monkeypatch.setattr(search, "MOST_UNITS", 0)
    gaps = {}
    for seed in WALKS:
        workload, budget, link = random_case(seed)
        shares = balanced(workload, budget, link)
        assert all(share.script is None for share in shares.values())
        prediction = simulate(workload, shares, budget, link, CALLS)
        assert prediction.peak_nbytes <= budget
        gaps[seed] = prediction.call_ms / planned(seed)[1] - 1
    assert min(gaps.values()) >= -NOTHING / 10
    assert sum(gap < NOTHING for gap in gaps.values()) >= 65, gaps
    assert sum(gap <= WORST for gap in gaps.values()) >= 76, gaps
    assert max(gaps.values()) <= 0.115, gaps
