"""What the host pays. Here only as ratios; benchmarks/test_host_costs.py has the figures in microseconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from conftest import DEVICE, settle
from torch import nn
from wide import Wide, WidePipeline

from prefetch_offload.adapter.hooks import shape_of
from prefetch_offload.testing.pipelines import scaled


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


def _seconds(pipe: Any, case: Any, sim: Any, seed: int) -> float:
    settle(sim)
    start = time.perf_counter()
    case.call(pipe, seed=seed, steps=4)
    return time.perf_counter() - start


def _race(sim: Any, case: Any, pipes: list[Any], rounds: int) -> list[float]:
    """Median seconds of each, taking turns so that drift of the machine meets all alike; a first call of each is not counted."""
    times: list[list[float]] = [[] for _ in pipes]
    for seed in range(rounds + 1):
        for pipe, kept in zip(pipes, times, strict=True):
            kept.append(_seconds(pipe, case, sim, seed))
    return [sorted(kept[1:])[rounds // 2] for kept in times]


def test_speed_on_a_slow_link(sim: Any, enable: Any) -> None:
    """Copying all weights takes as long as computing: at stock's memory at least 1.6 times faster than stock, and within a
    tenth of resident when the default budget holds everything. Ratios of medians, on the simulated accelerator."""
    case = scaled("sdxl", width=64)
    resident_pipe = case.build().to(DEVICE)
    sim.op_delay_us(50)  # compute takes its time without taking the processor's
    resident = min(_seconds(resident_pipe, case, sim, seed) for seed in range(3))
    modules = [m for m in resident_pipe.components.values() if isinstance(m, nn.Module)]
    gbps = sum(p.numel() * p.itemsize for m in modules for p in m.parameters()) / resident / 1e9
    sim.configure(1 << 50, gbps, gbps, gbps)

    stock_pipe, pipe = case.build(), case.build()
    stock_pipe.enable_model_cpu_offload(device=DEVICE)
    offload = enable(pipe, budget="stock", verify=False, unit_min=64 << 10, unit_max=512 << 10)
    stock, ours = _race(sim, case, [stock_pipe, pipe], 3)
    print(f"\nsimulated: stock {stock:.2f} s, ours at stock's memory {ours:.2f} s\n{offload.report()}")
    assert stock / ours >= 1.6

    enable(pipe, verify=False)
    resident, default = _race(sim, case, [resident_pipe, pipe], 5)
    print(f"simulated: resident {resident:.2f} s, ours with the default budget {default:.2f} s")
    sim.op_delay_us(0)
    assert default <= 1.1 * resident
