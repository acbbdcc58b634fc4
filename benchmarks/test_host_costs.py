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

from wide import Wide, WidePipeline

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
