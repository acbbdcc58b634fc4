"""The main claim, on every pipeline: same line, same images bit for bit, no more memory, nothing copied back."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, SEEDS, assert_same, images_of, resident, settle, weight_nbytes

import prefetch_offload
from prefetch_offload.adapter.hooks import CpuOffload
from prefetch_offload.testing.pipelines import CASES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = [n for n in CASES if n != "sdxl-upcast"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_same_images_and_no_weights_back(name: str, dtype: torch.dtype, sim: Any, enable: Any) -> None:
    expected = resident(name, dtype)
    pipe = CASES[name].build(dtype=dtype)
    nbytes = weight_nbytes(pipe)
    offload = enable(pipe)
    later = []
    for seed in SEEDS:
        before = offload.stats.h2d_nbytes
        assert_same([np.asarray(CASES[name].call(pipe, seed=seed))], [expected[seed]])
        later.append(offload.stats.h2d_nbytes - before)
    stats = offload.stats
    assert stats.d2h_nbytes == 0
    assert 0 < later[0] <= nbytes, "each unit travels at most once in the first call"
    assert later[1:] == [0, 0], "with a budget that holds everything, later calls copy nothing"
    assert all(p.device.type == "cpu" for p in _offloaded_parameters(pipe))


@pytest.mark.parametrize("name", NAMES)
def test_a_program_that_is_not_edited(name: str, sim: Any) -> None:
    """What diffusers asks of its own offload, with `install()`: two enables, a call after each; then its sequential one."""
    expected = resident(name, torch.float32)
    pipe = CASES[name].build()
    prefetch_offload.install(verify=True, budget="stock")
    try:
        for seed in (0, 1):
            pipe.enable_model_cpu_offload(device=DEVICE)
            assert pipe._execution_device == torch.device(DEVICE, 0)
            assert_same([np.asarray(CASES[name].call(pipe, seed=seed))], [expected[seed]])
            found = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
            for component in (m for n, m in found.items() if n not in pipe._exclude_from_cpu_offload):
                assert component.device.type == "cpu"
                assert type(component._hf_hook) is CpuOffload
        offload = pipe._prefetch_offload
        assert offload.hazards == []
        pipe.enable_sequential_cpu_offload(device=DEVICE)  # takes over
        assert not any(type(getattr(m, "_hf_hook", None)) is CpuOffload for m in found.values())
        assert not offload._engine.live()
    finally:
        prefetch_offload.uninstall()
        pipe.remove_all_hooks()


def _offloaded_parameters(pipe: Any) -> list[torch.Tensor]:
    modules = [
        m
        for n, m in pipe.components.items()
        if isinstance(m, torch.nn.Module) and n not in pipe._exclude_from_cpu_offload
    ]
    return [t for m in modules for t in (*m.parameters(), *m.buffers())]


def _stock_peak(name: str, sim: Any) -> int:
    pipe = CASES[name].build()
    pipe.enable_model_cpu_offload(device=DEVICE)
    images_of(name, pipe)
    settle(sim)
    sim.reset()
    CASES[name].call(pipe, seed=0)
    return int(sim.counters()["high_water"])


@pytest.mark.parametrize("name", NAMES)
def test_stock_budget_never_takes_more_memory_than_stock(name: str, sim: Any, enable: Any) -> None:
    expected = resident(name, torch.float32)
    gc.collect()
    stock = _stock_peak(name, sim)
    settle(sim)
    pipe = CASES[name].build()
    enable(pipe, budget="stock", unit_min=64 << 10, unit_max=512 << 10)
    for seed in SEEDS:
        sim.reset()
        assert_same([np.asarray(CASES[name].call(pipe, seed=seed))], [expected[seed]])
        assert sim.counters()["high_water"] <= stock, f"call {seed}"


@pytest.mark.parametrize("name", NAMES)
def test_disable_leaves_the_device_as_it_was(name: str, sim: Any, enable: Any) -> None:
    pipe = CASES[name].build()
    settle(sim)
    before = sim.counters()["allocated"]
    cls = type(pipe)
    offload = enable(pipe)
    CASES[name].call(pipe, seed=0)
    kept_by_pipeline = _unhooked_bytes(pipe)
    offload.disable()
    settle(sim)
    assert sim.counters()["allocated"] - before <= kept_by_pipeline
    assert type(pipe) is cls
    assert all(not hasattr(m, "_hf_hook") for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    assert all(p.device.type == "cpu" for p in _offloaded_parameters(pipe))


def _unhooked_bytes(pipe: Any) -> int:
    """Device tensors that are nobody's parameter or buffer: a scheduler's sigmas, a model's cached tables."""
    gc.collect()
    owned = {t.data_ptr() for t in _offloaded_parameters(pipe)}
    found = {
        t.untyped_storage().data_ptr(): -(-t.untyped_storage().nbytes() // 512) * 512
        for t in gc.get_objects()
        if type(t) in (torch.Tensor,) and t.device.type == DEVICE and t.data_ptr() not in owned
    }
    units = {
        u.bytes.untyped_storage().data_ptr()
        for c in pipe.__dict__["_prefetch_offload"]._session.client.components.values()
        for u in c.units
        if getattr(u, "bytes", None) is not None
    }
    return sum(n for p, n in found.items() if p not in units)


def test_upcast_vae_in_fp16(sim: Any, enable: Any) -> None:
    """SDXL casts its VAE to fp32 on the host and back to fp16 on the device, in every call."""
    expected = resident("sdxl-upcast", torch.float16)
    pipe = CASES["sdxl-upcast"].build()
    offload = enable(pipe)
    travels = {c.name: c.link_nbytes for c in offload.stats.components}["vae"]  # as fp16; a little more than its tensors
    assert_same(images_of("sdxl-upcast", pipe), expected)
    assert all(p.dtype == torch.float16 and p.device.type == "cpu" for p in pipe.vae.parameters())
    assert offload.stats.d2h_nbytes == 0, "cast back, it is what the host has"
    moved = {c.name: c.h2d_nbytes for c in offload.stats.components}
    # As fp16 all of the time: when it is cast up in three calls, and ahead of use for these and for the next.
    assert moved["vae"] <= (3 + 4) * travels
    pinned = offload.stats.pinned_nbytes
    assert_same(images_of("sdxl-upcast", pipe), expected)
    assert offload.stats.pinned_nbytes == pinned, "slabs are kept over the cast and back"


@pytest.mark.parametrize("budget", [None, "stock", 12 << 20])
@pytest.mark.parametrize("name", ["sdxl-img2img", "sdxl-inpaint"])
def test_upcast_vae_that_encodes_first(name: str, budget: Any, sim: Any, enable: Any) -> None:
    """The VAE is cast while it is on the device, and later that memory is wanted for something else."""
    pipe = CASES[name].build(force_upcast=True, dtype=torch.float16).to(DEVICE)
    expected = images_of(name, pipe)
    del pipe
    pipe = CASES[name].build(force_upcast=True, dtype=torch.float16)
    enable(pipe, budget=budget, unit_min=4096, unit_max=64 << 10)
    assert_same(images_of(name, pipe), expected)
