"""A pipeline that has been under stock offload before, whose hooks leave each component's `forward` on the instance."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from conftest import DEVICE, assert_same, images_of, resident, weight_nbytes
from torch import nn

from prefetch_offload import Offload
from prefetch_offload.points import is_traced
from prefetch_offload.testing.pipelines import CASES


def test_it_is_streamed_all_the_same(enable: Callable[..., Offload]) -> None:
    pipe = CASES["flux"].build(dtype=torch.float32)
    pipe.enable_model_cpu_offload(device=DEVICE)
    np.asarray(CASES["flux"].call(pipe, seed=0))
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert "forward" in pipe.transformer.__dict__, "else there is nothing to test"
    budget = int(0.6 * weight_nbytes(pipe)) + (1 << 20)
    offload = enable(pipe, budget=budget, unit_min=16 << 10, unit_max=64 << 10)
    assert all(c.streamable for c in offload._engine.live() if len(c.units) > 1)
    assert_same(images_of("flux", pipe), resident("flux", torch.float32))


def test_what_forwards_elsewhere_is_told_apart() -> None:
    module = nn.Linear(2, 2)
    assert not is_traced(module)
    module.forward = module.forward  # type: ignore[method-assign]
    assert not is_traced(module)
    other = copy.copy(module)
    assert is_traced(other), "it calls the first one's"
    module.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert is_traced(module)
