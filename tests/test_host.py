"""The host store: what lies in slabs, how it is pinned, and how much memory that takes."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import prefetch_offload
from prefetch_offload import OffloadWarning, UnsupportedError
from prefetch_offload.adoption import build_units, check_tensors
from prefetch_offload.component import Component
from prefetch_offload.config import Settings
from prefetch_offload.host import Pins
from prefetch_offload.loading import CarriedUnit, SlabUnit
from prefetch_offload.masters import span_nbytes
from prefetch_offload.testing.pipelines import CASES, scaled

SMALL = Settings(unit_min=1024, unit_max=16 << 10)


class Odd(nn.Module):
    """Everything a tensor can be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(33, 17)
        self.tied = nn.Linear(33, 17, bias=False)
        self.tied.weight = self.plain.weight
        self.factor = nn.Parameter(torch.randn(7, dtype=torch.float16), requires_grad=False)
        self.last = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.randn(6, 9).t())
        self.sliced = nn.Parameter(torch.randn(10, 10)[:, 2:7])
        base = torch.arange(64, dtype=torch.float32)
        self.register_buffer("view_a", base[:40])
        self.register_buffer("view_b", base[24:].view(5, 8))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))
        self.register_buffer("hidden", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("nothing", None)
        self.factor.note = "kept"  # type: ignore[attr-defined]
        self.untouched = torch.ones(3)


def snapshot(module: nn.Module) -> dict[str, Any]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {n: (t, t.detach().clone(), t.stride(), t.dtype, t.requires_grad) for n, t in tensors}


@pytest.fixture
def component(sim: Any) -> Any:
    module = Odd()
    before = snapshot(module)
    pins = Pins(torch.device(DEVICE, 0))
    made = Component(module, "odd", torch.device(DEVICE, 0), SMALL, pins)
    made.adopt()
    yield made, module, before
    for unit in made.units:
        unit.retire()
    assert pins.nbytes == 0


def test_adoption_changes_no_object_value_stride_or_flag(component: Any) -> None:
    _, module, before = component
    after = snapshot(module)
    assert after.keys() == before.keys()
    for name, (tensor, value, stride, dtype, grad) in after.items():
        assert tensor is before[name][0], name
        assert torch.equal(value, before[name][1]), name
        assert (stride, dtype, grad) == before[name][2:], name
    assert module.tied.weight is module.plain.weight
    assert module.factor.note == "kept"


def test_slab_tensors_have_storages_of_their_own(component: Any) -> None:
    """Saving one parameter must not save its slab."""
    _, module, _ = component
    for tensor in module.parameters():
        assert tensor.untyped_storage().nbytes() == span_nbytes(tensor)
        assert tensor.is_pinned()


def test_twins_equal_their_masters_and_keep_ties_views_and_strides(component: Any, sim: Any) -> None:
    made, module, before = component
    device = torch.device(DEVICE, 0)
    nbytes = sim.counters()["allocated"]
    for unit in made.units:
        unit.allocate(device)
        if isinstance(unit, SlabUnit):
            assert unit.bytes is not None
            unit.bytes.copy_(unit.slab.bytes)
    made.bind()
    for name, (tensor, value, stride, dtype, grad) in snapshot(module).items():
        assert tensor.device == device, name
        assert torch.equal(value.cpu(), before[name][1]), name
        assert (stride, dtype, grad) == before[name][2:], name
        assert isinstance(tensor, nn.Parameter) == isinstance(before[name][0], nn.Parameter)
    assert module.tied.weight is module.plain.weight
    assert module.factor.note == "kept"
    assert module.untouched.device.type == "cpu"
    module.view_a[30] = 99.0  # the same memory as view_b[0, 6]
    assert module.view_b[0, 6].item() == 99.0
    assert made.unbind() == []
    assert module.view_a is before["view_a"][0] and module.view_a[30] == 99.0, "a changed buffer is written back"
    assert module.view_b[0, 6] == 99.0
    del tensor, value
    for unit in made.units:
        unit.free()
        unit.abandon()
    assert sim.counters()["allocated"] == nbytes


def test_units_keep_shared_ranges_together(component: Any) -> None:
    made, module, _ = component
    where = {id(m.tensor): u for u in made.units for m in u.masters}
    assert where[id(module.view_a)] is where[id(module.view_b)]
    assert len([u for u in made.units if isinstance(u, CarriedUnit)]) == 1  # the empty buffer
    assert sum(len(u.masters) for u in made.units) == len({id(t) for t in (*module.parameters(), *module.buffers())})


def test_inference_tensors_become_normal_ones(sim: Any) -> None:
    with torch.inference_mode():
        module = nn.Linear(4, 4)
    assert module.weight.is_inference()
    value = module.weight.clone()
    made = Component(module, "linear", torch.device(DEVICE, 0), SMALL, Pins(torch.device(DEVICE, 0)))
    with torch.inference_mode():
        made.adopt()
        for unit in made.units:
            unit.allocate(torch.device(DEVICE, 0))
    assert not module.weight.is_inference() and torch.equal(module.weight, value)
    assert isinstance(module.weight, nn.Parameter)
    assert not any(m.twin is None or m.twin.is_inference() for m in made.masters)
    for unit in made.units:
        unit.retire()


def test_wrapper_subclasses_are_carried_as_they_are(sim: Any, enable: Any) -> None:
    """As torchao's weights: a tensor of two inner tensors, never rebuilt as a plain Parameter."""
    expected = resident("sdxl", torch.float32)[0]
    pipe = CASES["sdxl"].build()
    linear = pipe.unet.mid_block.attentions[0].proj_in
    plain = linear.weight.detach().clone()
    linear.weight = nn.Parameter(TwoTensor(plain, plain.clone()), requires_grad=False)
    offload = enable(pipe)
    seen: list[Any] = []
    handle = linear.register_forward_pre_hook(
        lambda module, args: seen.append((type(module.weight), module.weight.a.device))
    )
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.a, linear.bias)
    assert_same([np.asarray(CASES["sdxl"].call(pipe, seed=0))], [expected])
    handle.remove()
    del linear.forward
    assert seen[0] == (TwoTensor, torch.device(DEVICE, 0))
    assert type(linear.weight) is TwoTensor and linear.weight.a.device.type == "cpu"
    assert offload.stats.d2h_nbytes == 0


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes': state outside of the tensor that only its own `.to()` moves."""


def test_weights_with_state_outside_of_the_tensor_are_moved_by_their_module(enable: Any) -> None:
    expected = resident("sdxl", torch.float32)
    pipe = CASES["sdxl"].build()
    linear = pipe.unet.mid_block.attentions[0].proj_in
    linear.weight = Params4bit(linear.weight.detach(), requires_grad=False)
    enable(pipe)
    assert_same(images_of("sdxl", pipe), expected)
    assert type(linear.weight).__name__ in ("Params4bit", "Parameter") and linear.weight.device.type == "cpu"


def test_modules_are_collected_while_their_pipeline_is_disabled(enable: Any, monkeypatch: Any) -> None:
    """A pipeline goes at once, its modules with the next collection: that may come anywhere in the engine."""
    gc.disable()
    try:
        pipe = CASES["sdxl"].build()
        linear = pipe.vae.quant_conv  # the vae: no other hook refers to it
        linear.weight = Params4bit(linear.weight.detach(), requires_grad=False)
        offload = enable(pipe)
        vae = weakref.ref(pipe.vae)
        del pipe, linear
        assert vae() is not None
        evict = offload._engine.evict
        monkeypatch.setattr(offload._engine, "evict", lambda gone: (evict(gone), gc.collect()))
        offload.disable()
    finally:
        gc.enable()
    gc.collect()
    assert vae() is None and not offload._engine.live()


def test_meta_tensors_are_refused_before_anything_changes(enable: Any) -> None:
    pipe = CASES["sdxl"].build()
    pipe.vae.to("meta")
    storages = [p.data_ptr() for p in pipe.unet.parameters()]
    with pytest.raises(UnsupportedError, match=r"vae\..* is on the meta device.*Load the weights first"):
        enable(pipe)
    assert [p.data_ptr() for p in pipe.unet.parameters()] == storages
    assert not hasattr(pipe.unet, "_hf_hook")


def test_sharded_tensors_are_refused() -> None:
    class Sharded(nn.Module):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            tensor = torch.zeros(2)
            tensor.device_mesh = "a mesh"  # type: ignore[attr-defined]
            yield "weight", tensor

    with pytest.raises(UnsupportedError, match=r"unet.weight is a DTensor.*full_tensor"):
        check_tensors("unet", Sharded())


def test_pinned_bytes_are_exact(sim: Any, enable: Any) -> None:
    pipe = scaled("sdxl", width=64).build()
    weights = sum(t.numel() * t.itemsize for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
                  for t in {id(t): t for t in (*m.parameters(), *m.buffers())}.values())  # fmt: skip
    offload = enable(pipe, unit_min=64 << 10, unit_max=256 << 10)
    largest = max(u.nbytes for c in offload._session.client.components.values() for u in c.units)
    pinned = sim.counters()["pinned"]
    assert offload.stats.pinned_nbytes == pinned
    assert weights <= pinned <= 1.02 * weights + largest


def test_a_refused_pin_falls_back_to_the_ring_with_one_warning(sim: Any, enable: Any) -> None:
    expected = resident("sdxl", torch.float32)
    pipe = CASES["sdxl"].build()
    sim.pin_limit(1 << 20)
    with pytest.warns(OffloadWarning, match="could not pin.*small pinned ring") as caught:
        offload = enable(pipe, unit_min=64 << 10, unit_max=256 << 10, staging=32 << 10)
    assert len(caught) == 1
    assert sim.last_error() == 0, "the refusal must not surface in the next kernel"
    with warnings.catch_warnings():
        warnings.simplefilter("error", OffloadWarning)
        assert_same(images_of("sdxl", pipe), expected)
        offload.release()
        assert_same(images_of("sdxl", pipe), expected)
    assert 0 < sim.counters()["pinned"] <= 1 << 20
    assert not all(c.pinned for c in offload.stats.components)
    sim.pin_limit(-1)


def test_no_pinned_memory_at_all(sim: Any, enable: Any) -> None:
    expected = resident("flux", torch.float32)
    pipe = CASES["flux"].build()
    sim.pin_limit(1)
    with pytest.warns(OffloadWarning):
        enable(pipe)
    assert_same(images_of("flux", pipe), expected)
    assert sim.counters()["pinned"] == 0
    sim.pin_limit(-1)


def test_pinned_limit_is_kept(sim: Any, enable: Any) -> None:
    pipe = CASES["sdxl"].build()
    with pytest.warns(OffloadWarning, match="limit of"):
        enable(pipe, pinned_limit=1 << 20, unit_min=64 << 10, unit_max=256 << 10, staging=32 << 10)
    assert_same(images_of("sdxl", pipe), resident("sdxl", torch.float32))
    assert sim.counters()["peak_pinned"] <= (1 << 20) + (32 << 10)


def test_a_backend_that_cannot_register_memory(sim: Any, enable: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr(torch.get_device_module(DEVICE), "cudart")
    pipe = CASES["sdxl"].build()
    offload = enable(pipe)
    assert all(p.is_pinned() for p in pipe.unet.parameters())
    assert_same(images_of("sdxl", pipe), resident("sdxl", torch.float32))
    value = pipe.unet.conv_in.weight.detach().clone()
    offload.disable()
    assert torch.equal(pipe.unet.conv_in.weight, value)
    assert sim.counters()["pinned"] == 0


def test_a_model_is_taken_in_once(sim: Any) -> None:
    """Taking tensors in again leaves slabs that hold them alone."""
    module = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    pins = Pins(torch.device(DEVICE, 0))
    made = Component(module, "m", torch.device(DEVICE, 0), SMALL, pins)
    made.adopt()
    slabs = [u.slab for u in made.units if isinstance(u, SlabUnit)]
    assert made.unchanged()
    assert made.adopt() == ([], [])
    module[3].weight = nn.Parameter(torch.randn(32, 32))
    assert not made.unchanged()
    new, gone = made.adopt()
    kept = [u.slab for u in made.units if isinstance(u, SlabUnit) and u not in new]
    assert len(gone) == 1 and len(kept) == len(slabs) - 1
    assert build_units("none", [], SMALL, pins) == []
    for unit in (*made.units, *gone):
        unit.retire()
    assert pins.nbytes == 0


MEASURE = """
    import gc, threading, time, torch, psutil
    import prefetch_offload
    from prefetch_offload.testing import load
    from prefetch_offload.testing.pipelines import CASES
    ext = load()
    pipe = CASES["sdxl"].build()
    block = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(128)))  # 2 GiB in all
    with torch.no_grad():
        for p in block.parameters(): p.fill_(1.0)
    pipe.unet.ballast = block
    process = psutil.Process()
    gc.collect()
    before = peak = process.memory_info().rss
    done = False
    def watch():
        global peak
        while not done:
            peak = max(peak, process.memory_info().rss); time.sleep(0.002)
    thread = threading.Thread(target=watch); thread.start()
    offload = prefetch_offload.enable(pipe, device="simgpu")
    done = True; thread.join()
    after = process.memory_info().rss
    weights = sum(p.numel() * p.itemsize for p in pipe.unet.parameters())
    pinned = offload.stats.pinned_nbytes
    offload.disable()
    print(weights, before, peak, after, pinned, ext.counters()["pinned"])
"""


def test_enabling_never_holds_two_copies() -> None:
    """A 2 GB pipeline, in a process of its own: resident set size stays within the weights and 300 MB."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    weights, before, peak, after, pinned, left = map(int, run.stdout.split()[-6:])
    assert weights > 2 << 30
    assert peak - before <= 300 << 20, f"{(peak - before) >> 20} MiB above what the loaded pipeline takes"
    assert after - before <= 300 << 20
    assert weights <= pinned <= 1.02 * weights + (256 << 20)
    assert left == 0
    assert prefetch_offload.__version__
