"""From 15% to all of the weights: `python -m pytest -s benchmarks/test_simulated_budgets.py`, on an idle machine.

Times are simulated: real pipelines on the simulated accelerator, whose copies take the time the link would. *predicted* is what
the plan comes to with the compute times measured in that same call, *planned* what it came to before the call: a machine whose
speed changes between calls moves those two apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from budgets import CASES, run

from prefetch_offload.testing import load

SHARES = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_measured_predicted_and_the_physical_limit(name: str) -> None:
    outcomes = run(name, SHARES, load())
    print(f"\n{name} (simulated): seconds a call; resident {outcomes[0].resident:.2f}")
    print("| budget | measured | predicted | planned | physical limit | measured / predicted | / planned | / limit |")
    print("|---|---|---|---|---|---|---|---|")
    for o in outcomes:
        times = " | ".join(f"{seconds:.2f}" for seconds in (o.measured, o.predicted, o.planned, o.bound))
        ratios = " | ".join(f"{o.measured / seconds:.2f}" for seconds in (o.predicted, o.planned, o.bound))
        print(f"| {o.share:.0%} of the weights | {times} | {ratios} |")
    for o in outcomes:
        assert o.same
        assert o.peak_nbytes <= o.budget_nbytes
        assert o.hazards == []
        assert 1 / 1.15 <= o.measured / o.predicted <= 1.15
        assert o.measured / o.bound <= 1.15
