"""Activations are what is on the device besides weights, also where weights move while they are measured."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_scripts import Chain, Pair

from prefetch_offload.strategy import whole


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_what_moves_for_a_pass_more_than_expected_is_no_activation(
    extra: int, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pipe = Pair(Chain([128, 192]), Chain([512, 256, 384, 256, 512, 320]))
    nbytes = sum(p.nbytes for m in (pipe.first, pipe.second) for p in m.parameters())
    offload = enable(pipe, budget=int(0.8 * nbytes), unit_min=4 << 10, unit_max=2 << 20, strategy=whole)
    x, more = torch.randn(1, 32), torch.randn(3, 32)
    for _ in range(2):
        pipe(x, 2)
    engine, began = offload._engine, type(offload._engine).pass_begins
    spent: list[bool] = []

    def pass_begins(component: Any) -> None:
        spent.append(component.stream is not None and component.stream.spent)
        before = engine.residency.held_nbytes
        began(engine, component)
        segment = engine._segments[threading.get_ident()]
        assert segment.held_nbytes == engine.residency.held_nbytes, "weights that came are known to be weights"
        moved.append(engine.residency.held_nbytes - before)

    moved: list[int] = []
    monkeypatch.setattr(engine, "pass_begins", pass_begins)
    pipe(more, 2 + extra)
    assert any(spent) is (extra > 0)
    assert any(moved) is (extra > 0), "or the test shows nothing"
