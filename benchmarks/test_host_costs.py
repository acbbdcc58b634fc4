"""What the host pays per entry, in microseconds: `python -m pytest benchmarks/test_host_costs.py`.

On an idle machine; medians of this thread's processor time. The limits are those the project promises.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from wide import Blocks, Wide, WidePipeline

import prefetch_offload
from prefetch_offload.adapter.hooks import shape_of
from prefetch_offload.testing import load

DEVICE = "simgpu"


@pytest.fixture
def wide() -> Iterator[Any]:
    """A function that makes and enables a pipeline of two components with `n` parameters each."""
    load()
    made = []

    def make(n: int) -> tuple[Any, Any]:
        pipe = WidePipeline(Wide(n), Wide(n))
        made.append(prefetch_offload.enable(pipe, device=DEVICE))
        return pipe, made[-1]

    gc.disable()
    yield make
    gc.enable()
    for offload in made:
        offload.disable()


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("n", [20, 2000, 6000])
def test_repeated_entry_into_a_resident_component(n: int, wide: Any, benchmark: Any) -> None:
    """The denoiser's second and later steps, the call of an empty module included: at most 30 microseconds."""
    pipe, _ = wide(n)
    x = torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        pipe.first(x)
        benchmark.pedantic(pipe.first, args=(x,), rounds=300, iterations=100, warmup_rounds=5)
    assert benchmark.stats.stats.median <= 30e-6


@pytest.mark.benchmark(timer=time.thread_time)
def test_first_entry_in_a_call_with_2000_parameters(wide: Any, benchmark: Any) -> None:
    """Rescan, version checks, fingerprints, plan and binding, with nothing to move: at most 5 ms."""
    pipe, offload = wide(2000)
    engine, client = offload._engine, offload._session.client
    component = pipe.first._hf_hook.component
    x = torch.zeros(1, device=DEVICE)
    with torch.no_grad():
        pipe.first(x)
        pipe.second(x)
    shape = shape_of(pipe.first, (x,), {})
    benchmark.pedantic(
        lambda: engine.enter(component, shape), setup=lambda: engine.end_call(client), rounds=100, warmup_rounds=3
    )
    assert component.bound and len(component.masters) == 2000
    assert benchmark.stats.stats.median <= 5e-3


class Within(WidePipeline):
    """Measures its first component from within a call."""

    @torch.no_grad()
    def __call__(self, measure: Callable[[nn.Module], None]) -> None:
        measure(self.first)
        self.maybe_free_model_hooks()


def device_calls(lanes: Any, slabs: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """What no engine could do without, for one use of each unit: memory, a copy, and the events that order and time it."""
    for slab, target in zip(slabs, targets, strict=True):
        compute = lanes.compute()
        target.untyped_storage().resize_(slab.nbytes)
        lanes.wait(lanes.copy, lanes.record(compute), "")
        lanes.record(lanes.copy)
        with lanes.copy:
            target.copy_(slab, non_blocking=True)
        ready = lanes.record(lanes.copy)
        lanes.wait(compute, ready, "")
        target.untyped_storage().resize_(0)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("budget", ["all", "half"])
def test_a_streamed_unit(budget: str, wide: Any, benchmark: Any) -> None:
    """Per use: await it, drop the one before, and start a copy. At most 60 microseconds; nothing for a resident one.

    Within a pipeline call. The calls into the (simulated) device that any engine has to make are measured beside it and
    not counted in; both are printed, and so is the median. Of 200 rounds the fastest counts: the others are as slow as
    the machine was busy. Units have 16 tensors each.
    """
    n, nbytes, rounds = 200, 16 << 10, 200
    pipe = Within(Blocks(n, nbytes), Wide(2))
    settings = {"unit_min": nbytes, "unit_max": nbytes, "fingerprints": False}
    if budget == "half":
        settings["budget"] = n * nbytes // 2
    x = torch.zeros(1, device=DEVICE)
    device, empty = [], []
    bare = Blocks(n, nbytes).to(DEVICE)
    with prefetch_offload.enable(pipe, device=DEVICE, **settings) as offload:
        lanes = offload._engine.lanes
        slabs = [u.slab.bytes for u in offload._engine.units.values() if u.payload_nbytes == nbytes][: n // 2]  # pinned
        targets = [torch.empty(nbytes, dtype=torch.uint8, device=DEVICE) for _ in slabs]

        def beside() -> None:  # interleaved, so that a slow moment of the machine hits all of them
            start = time.thread_time()
            device_calls(lanes, slabs, targets)
            device.append((time.thread_time() - start) / len(slabs))
            start = time.thread_time()
            bare(x)
            empty.append(time.thread_time() - start)

        def measure(first: nn.Module) -> None:
            first(x)  # it arrives
            before.append(offload.stats.h2d_nbytes)
            benchmark.pedantic(first, args=(x,), setup=beside, rounds=rounds, warmup_rounds=0)

        for _ in range(3):
            pipe(lambda first: [first(x) for _ in range(20)])
        before: list[int] = []
        gc.disable()
        pipe(measure)
        gc.enable()
        moved = (offload.stats.h2d_nbytes - before[0]) // nbytes / rounds
        hooked = sum("_compiled_call_impl" in block.__dict__ for block in pipe.first.blocks)
    each = (benchmark.stats.stats.min - min(empty)) / (moved or n)
    own = each - min(device) * bool(moved)
    print(f"\n{budget}: {moved:.0f} units of {n} move in each pass; {1e6 * each:.1f} microseconds each", end="")
    median = (benchmark.stats.stats.median - min(empty)) / (moved or n)
    print(f", {1e6 * own:.1f} of them not in calls into the device (median: {1e6 * median:.1f} in all)")
    if budget == "all":
        assert not moved and not hooked
        assert each <= 1e-6
    else:
        assert n / 3 <= moved <= n
        assert own <= 60e-6
