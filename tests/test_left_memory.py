"""Device memory of units that have left: it is gone at once, or once a graph that has seen it is."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE, settle
from diffusers import DiffusionPipeline
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from virtual_memory import GRAIN, FakeCuda

from prefetch_offload.device import Lanes
from prefetch_offload.loading import CarriedUnit
from prefetch_offload.virtual import Driver, VirtualAddresses

WIDTH = 256
UNITS = {"unit_min": 1 << 10, "unit_max": 256 << 10}


class Linear(nn.Module):
    """A matrix product and no more, with a weight of any type."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(make(torch.randn(WIDTH, WIDTH) / 16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return torch.tanh(x @ (weight.a if isinstance(weight, TwoTensor) else weight))


class Pipeline(DiffusionPipeline):
    model_cpu_offload_seq = "first->second"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, second=second)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        x = self.second(self.first(torch.ones(4, WIDTH, device=self._execution_device)))
        self.maybe_free_model_hooks()
        return x.cpu()


def build(carried: bool) -> Pipeline:
    parts = [nn.Sequential(*(Linear(carry if carried else lambda t: t) for _ in range(8))) for _ in range(2)]
    for part in parts:
        part.dtype, part.config = torch.float32, None
    return Pipeline(*parts)


def carry(t: torch.Tensor) -> torch.Tensor:
    return TwoTensor(t, t.clone())


def allocated(sim: Any) -> int:
    settle(sim)
    return int(sim.counters()["allocated"])


def test_carried_tensors_leave_the_device_when_they_are_dropped(sim: Any, enable: Any) -> None:
    """Each travels as a new tensor; nothing of ours may hold on to the one before."""
    pipe = build(carried=True)
    before = allocated(sim)
    offload = enable(pipe, budget="stock", **UNITS)
    units = [u for c in offload._session.client.components.values() for u in c.units]
    assert units and all(isinstance(u, CarriedUnit) for u in units)
    largest = max(sum(u.nbytes for u in c.units) for c in offload._session.client.components.values())
    expected = pipe()
    for _ in range(2):
        sim.reset()
        assert torch.equal(pipe(), expected)
        assert sim.counters()["peak"] - before < 1.5 * largest, "one component at a time, and a little to compute with"
    offload.release()
    assert allocated(sim) - before < units[0].nbytes


@pytest.mark.parametrize("carried", [False, True], ids=["slab", "carried"])
def test_memory_that_a_graph_has_seen_goes_with_the_graph(carried: bool, sim: Any, enable: Any) -> None:
    pipe = build(carried)
    before = allocated(sim)
    offload = enable(pipe, **UNITS)
    x = torch.ones(4, WIDTH, device=DEVICE, requires_grad=True)
    out = pipe.first(x).sum()
    offload.release()
    assert allocated(sim) - before > 8 * WIDTH * WIDTH * 4, "the backward pass needs it"
    out.backward()
    del out, x
    assert allocated(sim) - before < WIDTH * WIDTH * 4


@pytest.mark.parametrize("carried", [False, True], ids=["slab", "carried"])
def test_it_goes_back_behind_the_backward_pass(carried: bool, sim: Any, enable: Any) -> None:
    """Loaded on one stream, used on another: the graph's memory belongs to the first, which has not waited for what the
    second will have done by then."""
    pipe = build(carried)
    offload = enable(pipe, **UNITS)
    x = torch.ones(4, WIDTH, device=DEVICE)
    with torch.no_grad():
        pipe.first(x)
    expected = torch.ones(4, WIDTH, device=DEVICE, requires_grad=True)
    pipe.first(expected).sum().backward()
    side = torch.Stream(device=DEVICE)
    side.wait_event(torch.accelerator.current_stream().record_event())
    sim.configure(1 << 50, 0.05, 0.05, 0)
    with side:
        y = torch.ones(4, WIDTH, device=DEVICE, requires_grad=True)
        out = pipe.first(y).sum()
        offload.release()
        out.backward()
        del out
        gc.collect()
        grad = y.grad.cpu()
    sim.configure(1 << 50, 0, 0, 0)
    torch.accelerator.current_stream().wait_event(side.record_event())
    assert torch.equal(grad, expected.grad.cpu())
    assert sim.hazards() == []


def test_memory_that_was_passed_on_is_free_when_it_is_given_back(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is mapped to two addresses then, and exists as long as it is mapped to either."""
    waited: list[str] = []
    host_wait, happened = Lanes.host_wait, Lanes.happened
    monkeypatch.setattr(Lanes, "host_wait", lambda *args: (waited.append(args[2]), host_wait(*args)))
    monkeypatch.setattr(Lanes, "happened", lambda *args: bool(waited) and happened(*args))  # the device is far behind
    lanes = Lanes(torch.device(DEVICE, 0))
    cuda = FakeCuda()
    cuda.capacity = 3 * GRAIN
    addresses = VirtualAddresses(lanes, Driver(cuda, 0))
    sizes = {"a": 2, "b": 2, "c": 3}
    a, b, c = (SimpleNamespace(key=key, slab=SimpleNamespace(nbytes=n * GRAIN)) for key, n in sizes.items())
    for unit in (a, b):
        addresses.map(unit)
        addresses.unmap(unit, lanes.record(lanes.compute()))
    assert cuda.used == 2 * GRAIN and not waited, "the second has what the first had"
    addresses.map(c)
    assert cuda.used == addresses.pool_nbytes == 3 * GRAIN and len(waited) == 1
    addresses.unmap(c, None)
    for unit in (a, b, c):
        addresses.forget(unit)
    gc.collect()
    assert cuda.used == 0 and not cuda.ranges
