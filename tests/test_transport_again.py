"""Enabled again with another transport: the host never holds a component twice, nor pins it twice, interrupted or not."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, weight_nbytes
from interrupts import Interrupts, some
from test_transport_codecs import UNITS, build, draw, resident, small_chunks, weights

import prefetch_offload
from prefetch_offload.host import Pins, Slab
from prefetch_offload.testing.pipelines import scaled

CASE = scaled("flux", width=96, layers=2, text_width=48, text_layers=2, vae_width=8)
__all__ = ["small_chunks"]  # for every test here, too


@pytest.mark.parametrize(("first", "then"), [("raw", "packed"), ("packed", "raw"), ("packed", "fp8")])
def test_the_host_holds_one_copy(first: str, then: str, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("flux")
    nbytes = weight_nbytes(pipe)
    live: weakref.WeakSet[Any] = weakref.WeakSet()
    held, pinned = [0], [0]
    stock, pin = Slab.__init__, Pins.pin

    def init(self: Slab, nbytes: int) -> None:
        stock(self, nbytes)
        live.add(self._memory)
        held.append(sum(map(len, live)))

    def watched(self: Pins, slab: Slab) -> bool:
        done = pin(self, slab)
        pinned.append(self.nbytes)
        return done

    monkeypatch.setattr(Slab, "__init__", init)
    monkeypatch.setattr(Pins, "pin", watched)
    enable(pipe, transport=first, **UNITS)
    draw("flux", pipe)
    held[:], pinned[:] = [0], [0]
    enable(pipe, transport=then, **UNITS)
    unit = 1 << 20  # the largest, with what is at hand while it is encoded
    assert nbytes / 4 < max(pinned) <= nbytes + unit
    assert max(held) <= nbytes + unit
    if then != "fp8":
        assert draw("flux", pipe) == resident("flux")[0]


@pytest.mark.parametrize(("first", "then"), [("raw", "fp8"), ("packed", "raw")])
def test_an_interrupt_while_it_is_enabled_again(first: str, then: str, sim: Any, enable: Any) -> None:
    """The next call is right by either transport, and the weights are exact."""
    pipe = CASE.build(dtype=torch.bfloat16)
    before = [p.clone() for _, p in weights(pipe)]
    interrupts = Interrupts("travel")

    def again(way: str) -> Any:
        return prefetch_offload.enable(pipe, device=DEVICE, transport=way, verify=False, **UNITS)

    def call() -> bytes:
        return np.asarray(CASE.call(pipe, steps=1)).tobytes()

    again(first)
    right = [call()]
    places = interrupts.lines(lambda: again(then))
    right.append(call())
    assert len(places) > 50
    for place in some(places, len(places) // 8):
        again(first)
        call()
        assert interrupts.at(place, lambda: again(then))
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights(pipe), strict=True)), interrupts.last
        offload = again(then)
        assert call() == right[1], interrupts.last
    offload.disable()
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights(pipe), strict=True))
