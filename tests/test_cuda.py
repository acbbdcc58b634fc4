"""The main claim on a real GPU. Everything here is skipped without one; `python -m benchmarks.gpu_suite` runs it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, weight_nbytes
from prefetch_offload_kernels import available
from test_transport_codecs import fp8_rounded

import prefetch_offload
from prefetch_offload import segments
from prefetch_offload.config import Settings
from prefetch_offload.host import Pins, Slab
from prefetch_offload.testing.pipelines import CASES, scaled

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
# Weights next to which activations are small, as in the real models.
BUDGETED: dict[str, tuple[Any, dict[str, int]]] = {
    "sdxl": (scaled("sdxl", width=96, vae_width=8, text_width=128, text_layers=6), {"height": 16, "width": 16}),
    "flux": (scaled("flux", width=192, layers=4, text_width=192, text_layers=8, vae_width=8), {}),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Deterministic kernels; and afterwards no memory kept."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    # libraries keep workspaces of their own, once; weights would be far more
    assert torch.cuda.memory_allocated() - before <= 64 << 20


@pytest.mark.parametrize("budget", [None, "stock"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [n for n in CASES if n != "sdxl-upcast"])
def test_same_images_as_resident(name: str, dtype: torch.dtype, budget: Any) -> None:
    case = CASES[name]
    pipe = case.build(dtype=dtype).to("cuda")
    truth = [np.asarray(case.call(pipe, seed=seed)) for seed in range(3)]
    del pipe
    pipe = case.build(dtype=dtype)
    with prefetch_offload.enable(pipe, budget=budget, verify=True, unit_min=64 << 10, unit_max=512 << 10) as offload:
        assert_same([np.asarray(case.call(pipe, seed=seed)) for seed in range(3)], truth)
        assert offload.hazards == []
        assert offload.stats.d2h_nbytes == 0
        assert all(c.pinned for c in offload.stats.components)


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_budget_in_bytes(name: str, share: float) -> None:
    """Streamed: the resident images, and no more of the device than was promised."""
    case, inputs = BUDGETED[name]
    pipe = case.build().to("cuda")
    truth = [np.asarray(case.call(pipe, seed=seed, **inputs)) for seed in range(3)]  # libraries have their workspaces now
    pipe.to("cpu")
    del pipe
    pipe = case.build()
    budget = int(share * weight_nbytes(pipe))
    gc.collect()
    before = torch.cuda.memory_allocated()
    with prefetch_offload.enable(pipe, budget=budget, verify=True, unit_min=64 << 10, unit_max=512 << 10) as offload:
        for seed in range(3):
            torch.cuda.reset_peak_memory_stats()
            assert_same([np.asarray(case.call(pipe, seed=seed, **inputs))], truth[seed : seed + 1])
            assert torch.cuda.max_memory_allocated() - before <= budget, f"call {seed}"
        assert offload.stats.peak_nbytes - before <= budget, "also where the statistic was reset to measure"
        assert offload.hazards == []
        assert not offload.stats.counts
        assert sum(c.exposed_ms + c.hidden_ms for c in offload.stats.components) > 0


@pytest.fixture
def allowed() -> Iterator[Any]:
    """Returns a function by which this process may take only so much more of the device."""

    def allow(nbytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("together", [None, False], ids=["as-it-comes", "in-pieces"])
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_device_as_small_as_the_budget(name: str, together: bool | None, allowed: Any) -> None:
    """Free memory is short, and lies in pieces: the resident images all the same, in every call."""
    case, inputs = BUDGETED[name]
    pipe = case.build().to("cuda")
    truth = [np.asarray(case.call(pipe, seed=seed, **inputs)) for seed in range(5)]
    pipe.to("cpu")
    del pipe
    pipe = case.build()
    budget = int(0.6 * weight_nbytes(pipe))
    gc.collect()
    settings = {"unit_min": 64 << 10, "unit_max": 512 << 10, "expandable_segments": together}
    with prefetch_offload.enable(pipe, budget=budget, verify=True, **settings) as offload:
        allowed(budget + (24 << 20))  # the allocator's own segments are of 20 MiB, and of 2
        assert_same([np.asarray(case.call(pipe, seed=seed, **inputs)) for seed in range(5)], truth)
        assert offload.hazards == []


def test_free_pieces_are_put_together() -> None:
    """By PyTorch's allocator, while a pipeline is enabled that needs it."""
    device = torch.device("cuda", torch.cuda.current_device())
    if segments.put_together() or segments.never(device) is not None:
        pytest.skip(f"expandable segments: {segments.never(device) or 'on already'}")
    case, inputs = BUDGETED["flux"]
    pipe = case.build()
    with prefetch_offload.enable(pipe, budget=int(0.6 * weight_nbytes(pipe)), unit_min=64 << 10, unit_max=512 << 10):
        case.call(pipe, **inputs)
        assert segments.put_together()
        assert any(s["is_expandable"] for s in torch.cuda.memory._snapshot()["segments"])
    assert not segments.put_together()
    with prefetch_offload.enable(pipe):  # all of it fits, many times over
        assert not segments.put_together()


@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_encoded_weights_arrive_by_the_kernel(way: str) -> None:
    """Lossless: as resident; fp8: as the same rounded weights resident."""
    assert available("cuda")
    case = CASES["flux"]
    pipe = case.build(dtype=torch.bfloat16)
    nbytes = sum(p.nbytes for m in pipe.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters())
    if way == "fp8":
        fp8_rounded(pipe)
    pipe = pipe.to("cuda")
    truth = [np.asarray(case.call(pipe, seed=seed)) for seed in range(3)]
    del pipe
    pipe = case.build(dtype=torch.bfloat16)
    settings = {"unit_min": 64 << 10, "unit_max": 512 << 10}
    with prefetch_offload.enable(pipe, device="cuda", transport=way, verify=True, **settings) as offload:
        assert_same([np.asarray(case.call(pipe, seed=seed)) for seed in range(3)], truth)
        assert offload.hazards == [] and offload.stats.d2h_nbytes == 0
        assert sum(c.link_nbytes for c in offload.stats.components) < 0.9 * nbytes


def test_upcast_vae() -> None:
    case = CASES["sdxl-upcast"]
    pipe = case.build().to("cuda")
    truth = [np.asarray(case.call(pipe, seed=seed)) for seed in range(2)]
    del pipe
    pipe = case.build()
    with prefetch_offload.enable(pipe, verify=True) as offload:
        assert_same([np.asarray(case.call(pipe, seed=seed)) for seed in range(2)], truth)
        assert offload.hazards == []


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_sanitizer(name: str) -> None:
    """Under TORCH_CUDA_SANITIZER=1 an access without an order raises; without it, this is one more run."""
    pipe = CASES[name].build(dtype=torch.float16)
    with prefetch_offload.enable(pipe, budget="stock", unit_min=64 << 10, unit_max=512 << 10) as offload:
        for seed in range(3):
            CASES[name].call(pipe, seed=seed)
        assert offload.stats.calls == 3
    print("sanitizer:", os.environ.get("TORCH_CUDA_SANITIZER", "off"))


def test_stock_budget_never_takes_more_memory_than_stock() -> None:
    case = CASES["sdxl"]

    def peak(pipe: Any) -> int:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        case.call(pipe, seed=0)
        return torch.cuda.max_memory_allocated()

    pipe = case.build(dtype=torch.float16)
    pipe.enable_model_cpu_offload()
    case.call(pipe, seed=1)
    stock = peak(pipe)
    pipe.remove_all_hooks()
    pipe.to("cpu")
    del pipe
    pipe = case.build(dtype=torch.float16)
    with prefetch_offload.enable(pipe, budget="stock", unit_min=64 << 10, unit_max=512 << 10):
        case.call(pipe, seed=1)
        assert peak(pipe) <= stock


def test_parameters_keep_their_identity_after_hooks_are_removed_on_the_device() -> None:
    pipe = CASES["sdxl"].build(dtype=torch.float16)
    weight = next(pipe.text_encoder.parameters())
    prefetch_offload.enable(pipe)
    with torch.no_grad():
        pipe.text_encoder(torch.ones(1, 77, dtype=torch.long, device="cuda"))
    pipe.remove_all_hooks()
    assert next(pipe.text_encoder.parameters()) is weight
    assert weight.device.type == "cuda"


def test_registered_memory_is_pinned_and_a_refusal_leaves_no_error_behind() -> None:
    pins = Pins(torch.device("cuda", 0))
    slab = Slab(1 << 20)
    assert pins.pin(slab) and slab.bytes.is_pinned()
    again = Slab.__new__(Slab)
    again.nbytes, again._memory, again.bytes, again.pinned, again._unpin = (
        slab.nbytes,
        slab._memory,
        slab.bytes,
        False,
        None,
    )
    with pytest.warns(prefetch_offload.OffloadWarning, match="could not pin"):
        assert not pins.pin(again)  # already registered
    torch.ones(8, device="cuda").sum().item()
    torch.cuda.synchronize()
    slab.unpin()
    assert not slab.bytes.is_pinned()
    assert ctypes.c_char and Settings().pin
