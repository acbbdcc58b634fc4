"""Our calls against stock's and resident ones on a link as slow as compute, on the simulated accelerator."""

from __future__ import annotations

import gc
import time
from typing import Any

from torch import nn

import prefetch_offload
from prefetch_offload.testing.pipelines import scaled

DEVICE = "simgpu"


def seconds(pipe: Any, case: Any, sim: Any, seed: int) -> float:
    gc.collect()
    sim.drain()
    start = time.perf_counter()
    case.call(pipe, seed=seed, steps=4)
    return time.perf_counter() - start


def race(sim: Any, case: Any, pipes: list[Any], rounds: int) -> list[float]:
    """Median seconds of each, taking turns so that drift of the machine meets all alike; first calls are not counted."""
    times: list[list[float]] = [[] for _ in pipes]
    for seed in range(rounds + 1):
        for pipe, kept in zip(pipes, times, strict=True):
            kept.append(seconds(pipe, case, sim, seed))
    return [sorted(kept[1:])[rounds // 2] for kept in times]


def on_a_slow_link(sim: Any, rounds: tuple[int, int] = (3, 5)) -> dict[str, float]:
    """Median seconds of `stock` and `ours` (at stock's memory), then of `resident` and `default` (the default budget).

    The link is slowed until copying all weights once takes as long as a resident call. So many rounds of each of the two.
    """
    case = scaled("sdxl", width=64)
    resident_pipe = case.build().to(DEVICE)
    sim.op_delay_us(50)  # compute takes its time without taking the processor's
    try:
        resident = min(seconds(resident_pipe, case, sim, seed) for seed in range(3))
        modules = [m for m in resident_pipe.components.values() if isinstance(m, nn.Module)]
        gbps = sum(p.numel() * p.itemsize for m in modules for p in m.parameters()) / resident / 1e9
        sim.configure(1 << 50, gbps, gbps, gbps)
        stock_pipe, pipe = case.build(), case.build()
        stock_pipe.enable_model_cpu_offload(device=DEVICE)
        offload = prefetch_offload.enable(pipe, device=DEVICE, budget="stock", unit_min=64 << 10, unit_max=512 << 10)
        stock, ours = race(sim, case, [stock_pipe, pipe], rounds[0])
        print(f"\nsimulated: stock {stock:.2f} s, ours at stock's memory {ours:.2f} s\n{offload.report()}")
        prefetch_offload.enable(pipe, device=DEVICE)
        resident, default = race(sim, case, [resident_pipe, pipe], rounds[1])
        print(f"simulated: resident {resident:.2f} s, ours with the default budget {default:.2f} s")
        offload.disable()
        stock_pipe.remove_all_hooks()
        stock_pipe.to("cpu")
    finally:
        sim.op_delay_us(0)
        sim.configure(1 << 50, 0, 0, 0)
    return {"stock": stock, "ours": ours, "resident": resident, "default": default}
