"""What planning a call costs: `python -m pytest benchmarks/test_planning.py`.

On an idle core; medians of this thread's processor time. The limit is the one the project promises.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from prefetch_offload.simulator import ComponentLoad, Link, Workload
from prefetch_offload.strategy import plan_call

MB = 10**6


def workload(n_units: int) -> Workload:
    """A text encoder, a denoiser of 30 steps and a decoder, 12 GB in `n_units` units each."""
    components = {}
    for name, activations in (("text", 0), ("denoiser", 500), ("vae", 2000)):
        units = tuple(f"{name}/{i}" for i in range(n_units))
        components[name] = ComponentLoad(
            units, dict.fromkeys(units, 12_000 * MB // n_units), dict.fromkeys(units, 300 / n_units), activations * MB
        )
    return Workload(components, (("text", 1), ("denoiser", 30), ("vae", 1)))


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("budget_gb", [4, 8, 16])
def test_planning_3000_units(budget_gb: int, benchmark: Any) -> None:
    """Shares and the lower bound, everything streamed: at most 50 ms. The prediction is made when it is asked for."""
    load = workload(1000)
    benchmark.pedantic(plan_call, args=(load, budget_gb * 1000 * MB, Link(25.0)), rounds=7, warmup_rounds=1)
    assert benchmark.stats.stats.median <= 50e-3
