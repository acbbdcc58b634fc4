"""What entering a compiled component costs over the bare compiled call: `python -m pytest benchmarks/test_compile_costs.py`.

On an idle machine; medians of this thread's processor time.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from wide import Wide, WidePipeline

import prefetch_offload
from prefetch_offload.testing import load

DEVICE = "simgpu"


def each_us(call: Any, x: torch.Tensor) -> float:
    """Microseconds of a call."""
    rounds = []
    for _ in range(200):
        start = time.thread_time_ns()
        for _ in range(50):
            call(x)
        rounds.append((time.thread_time_ns() - start) / 50e3)
    return statistics.median(rounds)


@pytest.mark.parametrize("way", ["in place", "assigned"])
def test_repeated_entry_into_a_compiled_component(way: str) -> None:
    """The denoiser's second and later steps: at most 30 microseconds over the same call without offload."""
    load()
    found = []
    for offloaded in (False, True):
        torch._dynamo.reset()
        pipe = WidePipeline(Wide(20), Wide(20))
        offload = prefetch_offload.enable(pipe, device=DEVICE) if offloaded else pipe.first.to(DEVICE)
        if way == "in place":
            pipe.first.compile(backend="eager", fullgraph=True)
        else:
            pipe.first = torch.compile(pipe.first, backend="eager", fullgraph=True)
        x = torch.zeros(1, device=DEVICE)
        gc.disable()
        with torch.no_grad():
            for _ in range(5):
                pipe.first(x)
            found.append(each_us(pipe.first, x))
        gc.enable()
        if offloaded:
            offload.disable()
    torch._dynamo.reset()
    print(f"\n{way}: {found[0]:.1f} microseconds bare, {found[1]:.1f} offloaded")
    assert found[1] - found[0] <= 30
