"""What the host pays. Here only as ratios; benchmarks/test_host_costs.py has the figures in microseconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from conftest import DEVICE
from race import on_a_slow_link
from wide import Wide, WidePipeline

from prefetch_offload.adapter.hooks import shape_of


def cpu_seconds(function: Callable[[], object], rounds: int, setup: Callable[[], object] = lambda: None) -> float:
    """Median processor time of this thread: other processes on the machine do not count."""
    times = []
    gc.disable()
    try:
        for _ in range(rounds):
            setup()
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
    finally:
        gc.enable()
    return sorted(times)[rounds // 2]


def test_a_repeated_entry_costs_the_same_however_many_parameters_there_are(enable: Any) -> None:
    small, large = (WidePipeline(Wide(n), Wide(n)) for n in (20, 4000))
    x = torch.zeros(1, device=DEVICE)

    def repeat(pipe: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(200):
                pipe.first(x)

        return run

    costs = []
    for pipe in (small, large):
        enable(pipe, verify=False)
        with torch.no_grad():
            pipe.first(x)
            costs.append(cpu_seconds(repeat(pipe), 20))
    assert costs[1] <= 2 * costs[0]


def test_a_first_entry_costs_a_few_looks_at_each_parameter(enable: Any) -> None:
    """Rescan, version checks, fingerprints, plan and binding, against one plain loop over the same tensors."""
    pipe = WidePipeline(Wide(4000), Wide(4000))
    offload = enable(pipe, verify=False)
    engine, client = offload._engine, offload._session.client
    component = pipe.first._hf_hook.component
    x = torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        pipe.first(x)
        pipe.second(x)
    shape = shape_of(pipe.first, (x,), {})
    tensors = list(pipe.first.parameters())
    look = cpu_seconds(lambda: [(t.data_ptr(), t._version) for t in tensors], 30)
    entry = cpu_seconds(lambda: engine.enter(component, shape), 30, lambda: engine.end_call(client))
    assert component.bound
    assert entry <= 25 * look


def test_speed_on_a_slow_link(sim: Any) -> None:
    """With wide room, since the machine may be busy; benchmarks/test_simulated_speed.py has the project's own limits."""
    times = on_a_slow_link(sim, rounds=(1, 3))
    assert times["stock"] / times["ours"] >= 1.25
    assert times["default"] / times["resident"] <= 1.6
