"""The planner next to a brute-force optimum, on small calls at random."""

from __future__ import annotations

import pytest
from optimum import Optimum, random_case

from prefetch_offload.simulator import simulate
from prefetch_offload.strategy import balanced

GROUPS = 20
CASES = 500
CALLS = 5  # the last of them is a steady one
NOTHING = 1e-6
# Of 500 cases 499 are equal and the other one is 0.8% off. What is promised is 5% in all of them.
WORST = 0.05


@pytest.mark.parametrize("group", range(GROUPS))
def test_next_to_the_optimum_of_all_schedules(group: int) -> None:
    """The steady call, next to the shortest call that can be repeated at all."""
    gaps = {}
    for seed in range(group * CASES // GROUPS, (group + 1) * CASES // GROUPS):
        workload, budget, link = random_case(seed)
        shares = balanced(workload, budget, link)
        prediction = simulate(workload, shares, budget, link, CALLS)
        assert prediction.peak_nbytes <= budget
        assert all(level.nbytes <= budget for level in prediction.timeline.levels)
        best = Optimum(workload, budget, link, prediction.call_ms * (1 + NOTHING / 2)).search()
        assert best <= prediction.call_ms * (1 + NOTHING / 10), "the brute force does not know the planner's schedule"
        gaps[seed] = prediction.call_ms / best - 1
    assert max(gaps.values()) <= WORST, gaps
    assert sum(gap < NOTHING for gap in gaps.values()) >= 0.8 * len(gaps), gaps
