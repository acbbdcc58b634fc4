"""Weights that travel encoded: packed, as fp8, or as another dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, settle, weight_nbytes
from prefetch_offload_kernels import reference
from torch import nn

from prefetch_offload.encoded import EncodedUnit
from prefetch_offload.testing.pipelines import scaled

PIPES = {
    "sdxl": scaled("sdxl", width=64, vae_width=8, text_width=64, text_layers=2),
    "flux": scaled("flux", width=192, layers=4, text_width=64, text_layers=2, vae_width=8),
}
INPUTS: dict[str, dict[str, int]] = {"sdxl": {"height": 16, "width": 16}, "flux": {}}
UNITS = {"unit_min": 64 << 10, "unit_max": 512 << 10}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators that stand in for the kernel take besides is as small as these models."""
    monkeypatch.setattr(reference, "_CHUNK", 8192)
    monkeypatch.setattr(reference, "_BLOCKS", 1)


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return PIPES[name].build(dtype=dtype)


def draw(name: str, pipe: Any, seed: int = 0) -> bytes:
    return np.asarray(PIPES[name].call(pipe, seed=seed, steps=2, **INPUTS[name])).tobytes()


@functools.cache
def resident(name: str, lossy: Callable[[Any], None] | None = None, dtype: torch.dtype = torch.bfloat16) -> list[bytes]:
    """Three images of the pipeline when all of it lives on the device, its weights first changed by `lossy`."""
    pipe = build(name, dtype)
    if lossy is not None:
        lossy(pipe)
    pipe = pipe.to(DEVICE)
    return [draw(name, pipe, seed) for seed in range(3)]


def weights(pipe: Any) -> list[tuple[str, torch.Tensor]]:
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return [(f"{n}.{key}", p.detach()) for n, m in modules.items() for key, p in m.named_parameters()]


def encoded_units(offload: Any) -> list[EncodedUnit]:
    units = [u for c in offload._session.client.components.values() for u in c.units]
    return [u for u in units if isinstance(u, EncodedUnit)]


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("way", ["raw", "packed"])
@pytest.mark.parametrize("name", PIPES)
def test_lossless_ways_give_the_resident_images(name: str, way: str, share: float | None, sim: Any, enable: Any) -> None:
    expected = resident(name)
    pipe = build(name)
    budget = None if share is None else int(share * weight_nbytes(pipe))
    offload = enable(pipe, transport=way, budget=budget, **UNITS)
    assert bool(encoded_units(offload)) == (way == "packed")
    for seed in range(3):
        settle(sim)
        sim.reset()
        assert draw(name, pipe, seed) == expected[seed]
        if budget is not None:
            assert sim.counters()["peak"] <= budget
    assert offload.stats.d2h_nbytes == 0


def fp8_rounded(pipe: Any) -> None:
    """Every weight that travels as fp8, rounded as it arrives; written independently of the codec."""
    skipped = ("norm", "embed", "shared", "proj_in", "proj_out")
    for module in pipe.components.values():
        if not isinstance(module, nn.Module):
            continue
        more = tuple(getattr(module, "_skip_layerwise_casting_patterns", None) or ())
        more += tuple(f".{n}" for n in getattr(module, "_keep_in_fp32_modules", None) or ())
        for key, p in module.named_parameters():
            of = key.rpartition(".")[0]
            if p.dim() < 2 or p.numel() < 1024 or any(s in of for s in (*skipped[:3], *more)) or of in skipped[3:]:
                continue
            rows = p.detach().float().reshape(p.shape[0], -1)
            scale = (rows.abs().amax(1, keepdim=True) / 448).clamp(min=2.0**-126)
            p.data = ((rows / scale).to(torch.float8_e4m3fn).float() * scale).to(p.dtype).view(p.shape)


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("name", PIPES)
def test_fp8_gives_the_images_of_the_rounded_weights(name: str, share: float | None, sim: Any, enable: Any) -> None:
    expected = resident(name, fp8_rounded)
    assert expected[0] != resident(name)[0], "or the test shows nothing"
    pipe = build(name)
    before = {key: p.clone() for key, p in weights(pipe)}
    offload = enable(pipe, transport="fp8", budget=None if share is None else int(share * weight_nbytes(pipe)), **UNITS)
    for seed in range(3):
        assert draw(name, pipe, seed) == expected[seed]
    assert offload.stats.d2h_nbytes == 0
    offload.disable()
    assert all(torch.equal(before[key], p) for key, p in weights(pipe)), "the host's weights are exact"
