"""Calls in several budgets on a slow link, on the simulated accelerator: measured beside predicted and the physical limit.

Times are the device's own (`device_clock`): they follow from the order in which the engine puts work on the streams, and
are the same on every machine. The host runs ahead, as on a GPU, and costs nothing.
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import numpy as np
from torch import nn

import prefetch_offload
from prefetch_offload.testing.pipelines import Case, scaled

DEVICE = "simgpu"
CASES = {
    "sdxl": (scaled("sdxl", width=96, vae_width=8, text_width=128, text_layers=6), {"height": 16, "width": 16}),
    "flux": (scaled("flux", width=192, layers=4, text_width=192, text_layers=8, vae_width=8), {}),
}
STEPS = 4
UNITS = {"unit_min": 64 << 10, "unit_max": 512 << 10}
OP_DELAY_US = 500  # of the device's clock


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Seconds of a call in a steady state, and what is predicted for the compute times that were measured in that same call.

    It is the call with the median of measured over the limit, of those that had a plan.

    Attributes:
        planned: the same prediction as it was before the call, for the compute times of the calls before it.
        same: all images are the resident pipeline's, bit for bit.
        hazards: what the simulator found in all calls, and the package's own checker in one more, which was not timed.
    """

    name: str
    share: float
    measured: float
    predicted: float
    planned: float
    bound: float
    resident: float
    peak_nbytes: int
    budget_nbytes: int
    same: bool
    hazards: list[Any]


def weight_nbytes(pipe: Any) -> int:
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.nbytes for t in tensors.values())


def timed(case: Case, inputs: dict[str, Any], pipe: Any, sim: Any, seed: int) -> tuple[float, np.ndarray]:
    """Seconds from the call's start to its end on the device, and the image."""
    gc.collect()
    sim.drain()
    start = sim.device_seconds()
    image = np.asarray(case.call(pipe, seed=seed, steps=STEPS, **inputs))
    return sim.device_seconds() - start, image


def checked(case: Case, inputs: dict[str, Any], pipe: Any, sim: Any, budget: int) -> list[Any]:
    """Hazards of a call that follows a plan, by the checker that would cost a timed one time."""
    sim.op_delay_us(0)
    with prefetch_offload.enable(pipe, device=DEVICE, budget=budget, verify=True, **UNITS) as offload:
        for seed in range(2):
            case.call(pipe, seed=seed, steps=2, **inputs)
        found = list(offload.hazards)
    sim.op_delay_us(OP_DELAY_US)
    return found


def run(name: str, shares: tuple[float, ...], sim: Any, calls: int = 4) -> list[Outcome]:
    """The link is set so that copying all weights takes as long as two denoising steps of a resident call."""
    case, inputs = CASES[name]
    sim.configure(1 << 50, 0, 0, 0)
    sim.op_delay_us(OP_DELAY_US)
    sim.device_clock(True)
    found = []
    try:
        pipe = case.build().to(DEVICE)
        nbytes = weight_nbytes(pipe)
        resident = [timed(case, inputs, pipe, sim, seed) for seed in range(calls)]
        seconds = sorted(s for s, _ in resident[1:])[(calls - 1) // 2]
        del pipe
        gbps = nbytes / (2 * seconds / STEPS) / 1e9
        sim.configure(1 << 50, gbps, gbps, gbps)
        for share in shares:
            pipe = case.build()
            budget = int(share * nbytes)
            offload = prefetch_offload.enable(pipe, device=DEVICE, budget=budget, **UNITS)
            sim.reset()
            ran, plans = [], []
            for seed in range(calls + 1):  # the plan of each call after it rests on what that one took
                ran.append(timed(case, inputs, pipe, sim, seed % calls))
                plans.append(offload._session.client.plan)
            peak = int(sim.counters()["peak"])
            offload.disable()
            truth = [*resident, resident[0]]
            same = all(a.tobytes() == b.tobytes() for (_, a), (_, b) in zip(ran, truth, strict=True))
            hazards = checked(case, inputs, pipe, sim, budget) + list(sim.hazards())
            pairs = [
                (seconds, plan, before)
                for (seconds, _), plan, before in zip(ran[2:], plans[3:], plans[2:], strict=False)
                if plan is not None and before is not None
            ]
            measured, plan, before = sorted(pairs, key=lambda p: p[0] / p[1].bound_ms)[(len(pairs) - 1) // 2]
            found.append(
                Outcome(
                    name=name,
                    share=share,
                    measured=measured,
                    predicted=plan.prediction.call_ms / 1e3,
                    planned=before.prediction.call_ms / 1e3,
                    bound=plan.bound_ms / 1e3,
                    resident=seconds,
                    peak_nbytes=peak,
                    budget_nbytes=budget,
                    same=same,
                    hazards=hazards,
                )
            )
            del pipe, offload
    finally:
        sim.device_clock(False)
        sim.op_delay_us(0)
        sim.configure(1 << 50, 0, 0, 0)
    return found
