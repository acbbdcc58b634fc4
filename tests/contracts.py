"""What the contract tests share: the same steps on a pipeline that stock offloads and on one that we do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.pipelines.pipeline_utils as pipeline_utils
import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, resident, settle
from torch import nn

from prefetch_offload import Offload
from prefetch_offload.adapter.hooks import CpuOffload, unwrap
from prefetch_offload.testing.pipelines import CASES

Steps = Callable[[Any], list[Any]]

# Nothing is ever evicted; and: in many units, of which little more than the running component's stays.
BUDGETS = {"roomy": {}, "tight": {"budget": "stock", "unit_min": 4 << 10, "unit_max": 64 << 10}}


@contextmanager
def stock_device() -> Iterator[None]:
    """diffusers looks for CUDA and the like only; stock's re-enabling without arguments needs it to find ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_utils, "get_device", lambda: DEVICE)
        yield


def stocked(name: str, **sizes: Any) -> Any:
    """The pipeline of a case, offloaded by diffusers itself."""
    pipe = CASES[name].build(**sizes)
    pipe.enable_model_cpu_offload(device=DEVICE)
    return pipe


@torch.no_grad()
def perform(steps: Steps, pipe: Any) -> list[Any]:
    return steps(pipe)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its state dict as it is now."""
    return {n: t.detach().cpu().clone() for n, t in module.state_dict().items()}


def by_stock(name: str, steps: Steps, sim: Any, **sizes: Any) -> list[Any]:
    """What `steps` gives on the pipeline under stock offload, on the same device."""
    with stock_device():
        found = copy.deepcopy(perform(steps, stocked(name, **sizes)))
    settle(sim)
    return found


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    """Bit for bit: arrays, tensors, and lists and dictionaries of them; anything else with ==."""
    assert len(found) == len(expected)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        where = f"step {i}"
        assert type(one) is type(other), where
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape, where
            assert one.tobytes() == other.tobytes(), where
        elif isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and one.device.type == other.device.type, where
            assert torch.equal(one.cpu(), other.cpu()), where
        elif isinstance(one, list | tuple):
            assert_equal(list(one), list(other))
        elif isinstance(one, dict):
            assert list(one) == list(other), where
            assert_equal(list(one.values()), list(other.values()))
        else:
            assert one == other, f"{where}: {one!r}, under stock {other!r}"


def like_stock(
    name: str, steps: Steps, sim: Any, enable: Any, *, settings: Any = None, **sizes: Any
) -> tuple[Any, Offload]:
    """Run `steps` under stock and under us, and compare all that they return. Gives our pipeline and its handle."""
    return next(iter(like_stock_in(({} if settings is None else settings,), name, steps, sim, enable, **sizes)))


def like_stock_in(
    budgets: Iterable[dict[str, Any]], name: str, steps: Steps, sim: Any, enable: Any, **sizes: Any
) -> Iterator[tuple[Any, Offload]]:
    """The same with each of several settings, one after the other."""
    expected = by_stock(name, steps, sim, **sizes)
    for settings in budgets:
        pipe = CASES[name].build(**sizes)
        offload = enable(pipe, **settings)
        assert_equal(perform(steps, pipe), expected)
        yield pipe, offload
        offload.disable()


def differ(*arrays: Any) -> bool:
    """No two of them are equal: each step had an effect."""
    kinds = {np.asarray(a).tobytes() for a in arrays}
    return len(kinds) == len(arrays)


def parts(pipe: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def hooked(pipe: Any) -> dict[str, CpuOffload]:
    """Our hooks by component name."""
    found = {n: unwrap(m).__dict__.get("_hf_hook") for n, m in parts(pipe).items()}
    return {n: h for n, h in found.items() if isinstance(h, CpuOffload)}


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def on_host(pipe: Any) -> bool:
    """Every component that may be offloaded shows host tensors."""
    return all(
        t.device.type == "cpu"
        for n, m in parts(pipe).items()
        if n not in pipe._exclude_from_cpu_offload
        for t in tensors(m)
    )


def assert_right(name: str, pipe: Any, calls: int = 2) -> None:
    """It gives what the pipeline gives when all of it lives on the device: right after a change, and again."""
    for seed, truth in list(enumerate(resident(name, torch.float32)))[:calls]:
        assert_same([np.asarray(CASES[name].call(pipe, seed=seed))], [truth])


def pixels(name: str, pipe: Any, seed: int = 0, steps: int = 1, **extra: Any) -> np.ndarray:
    return np.asarray(CASES[name].call(pipe, seed=seed, steps=steps, **extra))
