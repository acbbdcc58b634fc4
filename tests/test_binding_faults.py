"""Interrupted while it is shown what, a component comes back to its own parameters, and to their exact values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, weight_nbytes
from interrupts import Interrupts, some
from test_transport_codecs import UNITS, small_chunks, weights

import prefetch_offload
from prefetch_offload.testing.pipelines import scaled

__all__ = ["small_chunks"]  # for every test here, too

CASE = scaled("flux", width=96, layers=2, text_width=48, text_layers=2, vae_width=8)


def call(pipe: Any) -> bytes:
    return np.asarray(CASE.call(pipe, steps=1)).tobytes()


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{n}.{key}": p for n, m in modules.items() for key, p in m.named_parameters()}


@pytest.mark.parametrize("way", ["raw", "fp8"])
def test_an_interrupt_while_units_leave(way: str, sim: Any, enable: Any) -> None:
    """Parameters are the objects that they were, and what fp8 leaves of them is not taken for a change."""
    pipe = CASE.build(dtype=torch.bfloat16)
    own, before = parameters(pipe), {key: p.clone() for key, p in weights(pipe)}
    offload = enable(pipe, transport=way, budget=int(0.8 * weight_nbytes(pipe)), verify=False, **UNITS)
    call(pipe)
    expected = call(pipe)
    interrupts = Interrupts("leave")
    places = interrupts.lines(lambda: call(pipe))
    assert len(places) > 20
    for place in some(places, 3):
        assert interrupts.at(place, lambda: call(pipe))
        assert call(pipe) == expected, interrupts.last
        shown = parameters(pipe)
        assert all(shown[key] is p for key, p in own.items()), interrupts.last
    assert offload.stats.d2h_nbytes == 0
    offload.disable()
    assert all(p is own[key] and torch.equal(p, before[key]) for key, p in parameters(pipe).items())


@pytest.mark.parametrize("way", ["raw", "fp8"])
def test_an_interrupt_while_a_pipeline_is_disabled(way: str, sim: Any, enable: Any) -> None:
    """It can be called as it is, and disabled again; its weights are exact all the while."""
    pipe = CASE.build(dtype=torch.bfloat16)
    own, before = parameters(pipe), {key: p.clone() for key, p in weights(pipe)}

    def begin() -> Any:
        return prefetch_offload.enable(pipe, device=DEVICE, transport=way, verify=False, **UNITS)

    interrupts = Interrupts("detach_hook", "_unhook")
    with begin():
        expected = call(pipe)
    places = interrupts.lines(begin().disable)
    assert len(places) > 50
    for place in some(places, 57 if way == "fp8" else 27):
        offload = begin()
        assert interrupts.at(place, offload.disable)
        if pipe.__dict__.get("_all_hooks"):
            assert call(pipe) == expected, interrupts.last
        offload.disable()
        assert all(p is own[key] and torch.equal(p, before[key]) for key, p in parameters(pipe).items()), interrupts.last
        engine = offload._engine
        assert not engine.live() and not engine.units and engine.pins.nbytes == 0, interrupts.last
