"""What the host pays per entry, in microseconds: `python -m pytest benchmarks/test_host_costs.py`.

On an idle machine; medians of this thread's processor time. The limits are those the project promises.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("budget", ["all", "half"])
def test_a_streamed_unit(budget: str, wide: Any, benchmark: Any) -> None:
    """Per use: await it, drop the one before, and start a copy. At most 60 microseconds; nothing for a resident one."""
    n, nbytes = 200, 16 << 10
    pipe = WidePipeline(Blocks(n, nbytes), Wide(2))
    settings = {"unit_min": nbytes, "unit_max": nbytes, "fingerprints": False}
    if budget == "half":
        settings["budget"] = n * nbytes // 2
    x = torch.zeros(1, device=DEVICE)
    with prefetch_offload.enable(pipe, device=DEVICE, **settings) as offload, torch.no_grad():
        for _ in range(3):
            pipe.first(x)
        before = offload.stats.h2d_nbytes
        passes = 30
        gc.disable()
        benchmark.pedantic(pipe.first, args=(x,), rounds=passes, warmup_rounds=0)
        gc.enable()
        moved = (offload.stats.h2d_nbytes - before) // nbytes / passes
        hooked = sum("_compiled_call_impl" in block.__dict__ for block in pipe.first.blocks)
    with torch.no_grad():
        bare = Blocks(n, nbytes).to(DEVICE)
        start = time.thread_time()
        for _ in range(passes):
            bare(x)
        empty = (time.thread_time() - start) / passes
    each = (benchmark.stats.stats.median - empty) / (moved or n)
    print(f"\n{budget}: {moved:.0f} units of {n} move in each pass; {1e6 * each:.1f} microseconds each")
    if budget == "all":
        assert not moved and not hooked
        assert each <= 1e-6
    else:
        assert n / 3 <= moved <= n
        assert each <= 60e-6
