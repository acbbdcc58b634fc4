"""Packing on the accelerator: the same bytes as on the host, and in no more memory than the budget knows of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, settle, weight_nbytes
from prefetch_offload_kernels import pack_bf16, packing_workspace_nbytes, reference
from test_transport_codecs import UNITS, build, draw, encoded_units, resident

from prefetch_offload.codecs import Packed


@pytest.fixture
def on_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA. Casting, which takes no memory there, takes as little as can be."""
    monkeypatch.setattr(reference, "_BLOCKS", 1)
    stock = Packed.__init__

    def there(self: Packed, device: torch.device | None = None) -> None:
        stock(self, torch.device(DEVICE, 0))

    monkeypatch.setattr(Packed, "__init__", there)


@pytest.mark.parametrize("elements", [1000, 70_000, 2_000_000])
def test_it_gives_the_same_bytes_in_the_memory_that_it_says(elements: int, sim: Any) -> None:
    weights = (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    weights[::501] = 1e30  # listed apart
    expected = pack_bf16(weights, limit=float("inf"))
    settle(sim)
    sim.reset()
    packed = pack_bf16(weights, limit=float("inf"), device=DEVICE)
    assert packed is not None and expected is not None and torch.equal(packed, expected)
    taken, counted = sim.counters()["peak"], packing_workspace_nbytes(elements)
    assert taken <= counted <= 16 * elements + (64 << 10)


@pytest.mark.slow
def test_budgets_hold_while_weights_are_packed_anew(on_the_accelerator: None, sim: Any, enable: Any) -> None:
    pipe = build("flux")
    budget = int(0.5 * weight_nbytes(pipe))
    offload = enable(pipe, transport="packed", budget=budget, **UNITS)
    assert [draw("flux", pipe, seed) for seed in range(2)] == resident("flux")[:2]

    def negate() -> None:
        with torch.no_grad():
            for weight in pipe.transformer.parameters():
                weight.neg_()

    for _ in range(4):
        negate()
        before = sum(u.encodings for u in encoded_units(offload))
        settle(sim)
        sim.reset()
        draw("flux", pipe)
        assert sim.counters()["peak"] <= budget
        assert sum(u.encodings for u in encoded_units(offload)) > before
    assert draw("flux", pipe, 2) == resident("flux")[2]
