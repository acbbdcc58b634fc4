"""From 15% to all of the weights: `python -m pytest -s benchmarks/test_simulated_budgets.py`.

Real pipelines and the real engine; times are by the simulated device's own clock, which operators and copies advance, and are
the same on every machine. *predicted* is what the plan comes to with the compute times measured in that same call, *planned*
what it came to before the call.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from budgets import CASES, run

from prefetch_offload.testing import load

SHARES = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0)
MONOTONE = 1.02


@pytest.mark.parametrize("name", CASES)
def test_measured_predicted_and_the_physical_limit(name: str) -> None:
    outcomes = run(name, SHARES, load())
    print(f"\n{name} (simulated): seconds a call by the device's clock; resident {outcomes[0].resident:.3f}")
    print("| budget | measured | predicted | planned | physical limit | measured / predicted | / planned | / limit |")
    print("|---|---|---|---|---|---|---|---|")
    for o in outcomes:
        times = " | ".join(f"{seconds:.3f}" for seconds in (o.measured, o.predicted, o.planned, o.bound))
        ratios = " | ".join(f"{o.measured / seconds:.2f}" for seconds in (o.predicted, o.planned, o.bound))
        print(f"| {o.share:.0%} of the weights | {times} | {ratios} |")
    for o in outcomes:
        assert o.same
        assert o.peak_nbytes <= o.budget_nbytes
        assert o.hazards == []
        assert 1 / 1.15 <= o.measured / o.predicted <= 1.15
        assert o.measured / o.bound <= 1.15
    for less, more in itertools.pairwise(outcomes):
        assert more.measured <= MONOTONE * less.measured, "a larger budget is no slower"
