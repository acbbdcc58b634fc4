"""Fixtures: the simulated accelerator, and what must hold after every test that used it."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import interrupts
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import prefetch_offload
from prefetch_offload import Offload
from prefetch_offload.registry import engines
from prefetch_offload.simulator import Link, Workload
from prefetch_offload.strategy import Strategy, balanced
from prefetch_offload.testing import load
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.units import align
from prefetch_offload.window import Share

DEVICE = "simgpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    say = "interrupt at every line, rather than at some, and draw other examples in every run; takes long"
    parser.addoption("--thorough", action="store_true", help=say)


def pytest_configure(config: pytest.Config) -> None:
    interrupts.THOROUGH = config.getoption("thorough", default=False)
    # The same examples in every run: one that fails does so for everybody, and on the commit that broke it. How long one takes
    # is the machine's affair.
    slow = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("same", derandomize=True, **slow)
    hypothesis.settings.register_profile("thorough", **slow)
    hypothesis.settings.load_profile("thorough" if interrupts.THOROUGH else "same")


@pytest.fixture(scope="session")
def ext() -> Iterator[Any]:
    """The simulator, compiled once."""
    loaded = load()
    gc.collect()
    gc.freeze()  # the libraries' objects; looking through them again around every test takes longer than many tests
    yield loaded
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_no_garbage() -> None:
    """Tests collect garbage before and after: a third of a second each time if that went through all of PyTorch's objects."""
    gc.collect()
    gc.freeze()


def settle(ext: Any) -> None:
    gc.collect()
    ext.drain()


@pytest.fixture
def sim(ext: Any) -> Iterator[Any]:
    """The simulated accelerator in its plain state; afterwards no hazard, no violation, no memory kept, the same stream."""
    settle(ext)
    ext.configure(1 << 50, 0, 0, 0)
    ext.op_delay_us(0)
    ext.device_clock(False)
    ext.pin_limit(-1)
    ext.fail_allocation(-1)
    ext.reset()
    before, stream = ext.counters(), torch.accelerator.current_stream()
    yield ext
    ext.fail_allocation(-1)
    ext.op_delay_us(0)
    ext.device_clock(False)
    left = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)  # for the tests that follow, whatever this one did
    settle(ext)
    after = ext.counters()
    assert left == stream, "another stream was left current"
    assert ext.hazards() == []
    assert after["violations"] == 0
    # less is possible: tables that an earlier test's model kept in a cache
    assert after["allocated"] <= before["allocated"], "device memory was kept"
    assert after["pinned"] == before["pinned"], "host memory stayed pinned"


@pytest.fixture
def bare(ext: Any) -> Iterator[Any]:
    """The simulator with its plain settings and fresh counters. Hazards are allowed here; nothing else is left."""
    settle(ext)
    stream = torch.accelerator.current_stream()
    configured = ext.counters()["capacity"]
    ext.configure(-1, 0, 0, 0)
    ext.reset()
    before = ext.counters()
    yield ext
    ext.fail_allocation(-1)
    ext.op_delay_us(0)
    ext.device_clock(False)
    ext.pin_limit(-1)
    ext.configure(configured, 0, 0, 0)
    torch.accelerator.set_stream(stream)
    settle(ext)
    for _ in range(100):  # a thread of autograd's lets go of a graph after the pass has returned
        if ext.counters()["allocated"] <= before["allocated"]:
            break
        time.sleep(0.01)
    ext.last_error()
    after = ext.counters()
    ext.reset()
    assert after["pinned"] == before["pinned"], "the test left host memory pinned"
    assert after["allocated"] <= before["allocated"], "the test left device memory allocated"


@pytest.fixture
def mod(bare: Any) -> Any:
    """The module by which PyTorch knows the device, as `torch.cuda`."""
    return torch.get_device_module(DEVICE)


@pytest.fixture
def enable(sim: Any) -> Iterator[Callable[..., Offload]]:
    """`prefetch_offload.enable` on the simulated accelerator; afterwards everything is disabled and checked."""
    made: list[Offload] = []

    def _enable(pipe: DiffusionPipeline, **settings: Any) -> Offload:
        offload = prefetch_offload.enable(pipe, device=settings.pop("device", DEVICE), **{"verify": True, **settings})
        made.append(offload)
        return offload

    yield _enable
    for engine in engines.values():
        engine.residency.validate()
    for offload in made:
        assert offload.hazards == []
        offload.disable()
    made.clear()
    for engine in engines.values():
        assert not engine.live(), "components are still taken in"
        assert engine.residency.held_nbytes == 0
        assert not engine.transport.flights
        assert engine.pins.nbytes == 0


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Nothing is compiled, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def refuse_each(
    sim: Any, offload: Offload, indices: Iterable[int], attempt: Callable[[], None], then: Callable[[int], None]
) -> tuple[int, int]:
    """Attempt a call for each index, with that allocation refused. Returns how many were saved, and how many ran out of memory.

    Args:
        attempt: the call, which asserts its image.
        then: after each, with its index and nothing refused any more.
    """
    saved = raised = 0
    for index in indices:
        offload.release()
        sim.fail_allocation(index)
        try:
            attempt()
            saved += 1
        except torch.OutOfMemoryError:
            raised += 1
        sim.fail_allocation(-1)
        then(index)
        offload._engine.residency.validate()
    return saved, raised


def planned_once() -> Strategy:
    """The default strategy, which gives the same shares for the same call, whatever speed a busy machine has at the time."""
    plans: dict[Any, Mapping[str, Share]] = {}

    def once(workload: Workload, budget_nbytes: int, link: Link) -> Mapping[str, Share]:
        key = (workload.runs, tuple(c.units for c in workload.components.values()), budget_nbytes)
        if key not in plans:
            plans[key] = balanced(workload, budget_nbytes, link)
        return plans[key]

    return once


def plan_anew(offload: Offload) -> None:
    """It has learned to run in less; here every failure is to be met by the same plan."""
    offload.budget = offload.budget


SEEDS = (0, 1, 2)


@cache
def resident(name: str, dtype: torch.dtype) -> tuple[np.ndarray, ...]:
    """What the pipeline gives when all of it lives on the device: the truth."""
    pipe = CASES[name].build(dtype=dtype).to(DEVICE)
    return tuple(np.asarray(CASES[name].call(pipe, seed=seed)) for seed in SEEDS)


def images_of(name: str, pipe: DiffusionPipeline) -> tuple[np.ndarray, ...]:
    """Three calls."""
    return tuple(np.asarray(CASES[name].call(pipe, seed=seed)) for seed in SEEDS)


def assert_same(images: Any, expected: Any) -> None:
    """Bit for bit."""
    assert len(images) == len(expected)
    for image, truth in zip(images, expected, strict=True):
        assert image.dtype == truth.dtype and image.shape == truth.shape
        assert image.tobytes() == truth.tobytes()


def weight_nbytes(pipe: DiffusionPipeline) -> int:
    """Bytes of all components' parameters and buffers as they lie in units, shared ones once.

    Every tensor begins at a multiple of 256 bytes: nothing next to the weights of a real model, two or three per cent of
    these small ones.
    """
    tensors = {
        id(t): align(t.numel() * t.itemsize)
        for m in pipe.components.values()
        if isinstance(m, torch.nn.Module)
        for t in (*m.parameters(), *m.buffers())
    }
    return sum(tensors.values())
