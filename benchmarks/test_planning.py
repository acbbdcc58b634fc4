"""What planning a call costs: `python -m pytest benchmarks/test_planning.py`.

On an idle core; medians of this thread's processor time. The limit is the one the project promises. What is timed is
finding the shares, and whatever that needs of the lower bound; the prediction and the plan's own bound are made when they
are asked for.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from prefetch_offload.figures import MODELS
from prefetch_offload.shapes import workload_of
from prefetch_offload.simulator import ComponentLoad, Link, Workload
from prefetch_offload.strategy import plan_call

MB = 10**6
LIMIT_S = 50e-3


def uneven(n_units: int) -> Workload:
    """A text encoder, a denoiser of 30 steps and a decoder: 33 GB in `n_units` units whose sizes and times differ."""
    draw = random.Random(n_units)
    components = {}
    for name, part, nbytes, ms, activations in (
        ("text", n_units * 3 // 10 or 1, 9_000 * MB, 100, 0),
        ("denoiser", n_units * 6 // 10 or 1, 24_000 * MB, 300, 500),
        ("vae", n_units - n_units * 3 // 10 - n_units * 6 // 10, 200 * MB, 200, 1500),
    ):
        units = tuple(f"{name}/{i}" for i in range(part))
        size = [draw.choice([1, 1, 2, 3]) * draw.uniform(0.5, 1.5) for _ in units]
        took = [k * draw.uniform(0.5, 2) for k in size]
        components[name] = ComponentLoad(
            units,
            {u: int(nbytes * k / sum(size)) for u, k in zip(units, size, strict=True)},
            {u: ms * k / sum(took) for u, k in zip(units, took, strict=True)},
            activations * MB,
        )
    return Workload(components, (("text", 1), ("denoiser", 30), ("vae", 1)))


def planned(benchmark: Any, workload: Workload, share: float) -> None:
    """In the smallest budget, and so much of what it takes to hold everything more."""
    parts = workload.components.values()
    least = workload.smallest_budget_nbytes
    most = sum(c.total_nbytes for c in parts) + max(c.activation_nbytes for c in parts)
    budget = int(least + share * (most - least))
    benchmark.pedantic(plan_call, args=(workload, budget, Link(25.0)), rounds=7, warmup_rounds=1)
    assert benchmark.stats.stats.median <= LIMIT_S


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("share", [0.1, 0.35, 0.7])
@pytest.mark.parametrize("n_units", [6, 40, 120, 300, 3000])
def test_planning_uneven_units(n_units: int, share: float, benchmark: Any) -> None:
    planned(benchmark, uneven(n_units), share)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_planning_a_model(name: str, share: float, benchmark: Any) -> None:
    model = MODELS[name]
    workload = workload_of(model.parts, model.steps, model.step_ms, model.encode_ms, model.decode_ms)
    planned(benchmark, workload, share)
