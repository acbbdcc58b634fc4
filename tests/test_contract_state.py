"""State that is kept elsewhere than in plain tensors: of caches, of tensor subclasses, of modules that move by themselves, of
pipelines that are gone; and inputs that are not at the top."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import DEVICE, refuse_each, settle
from contracts import hooked, on_host, pixels
from diffusers import FirstBlockCacheConfig, StableDiffusionImg2ImgPipeline
from test_host import Params4bit
from test_streaming_odd import Pipeline
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import prefetch_offload
from prefetch_offload.adapter.hooks import shape_of
from prefetch_offload.testing.pipelines import CASES, lora_state_dict


def test_a_cache_and_a_refused_allocation(sim: Any, enable: Any) -> None:
    """A cache has taken note of a step that ran out of memory: a second try would find that nothing has changed."""
    pipe = CASES["flux"].build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    offload = enable(pipe)
    expected = pixels("flux", pipe, steps=4)
    pixels("flux", pipe, steps=4)
    sim.reset()
    pixels("flux", pipe, steps=4)
    allocations = int(sim.counters()["allocs"])

    def attempt() -> None:
        assert pixels("flux", pipe, steps=4).tobytes() == expected.tobytes()

    places = range(0, allocations, allocations // 40)
    saved, raised = refuse_each(sim, offload, places, attempt, lambda _: pipe.transformer._reset_stateful_cache())
    assert saved and raised and saved + raised == len(places)
    attempt()


class Quantized(TwoTensor):
    """As torchao's: it says that it takes other data, and does not."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._has_compatible_shallow_copy_type:
            return True
        if func is torch.Tensor.data.__set__:
            raise RuntimeError("Attempted to call `variable.set_data(tensor)`")
        return super().__torch_function__(func, types, args, kwargs or {})


def quantized(t: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(Quantized(t, t.clone()), requires_grad=False)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.a, self.bias)


def with_a_quantized_layer(name: str = "flux") -> Any:
    pipe = CASES[name].build()
    old = pipe.transformer.proj_out
    new = Linear(old.in_features, old.out_features)
    new.weight, new.bias = quantized(old.weight.detach()), old.bias
    pipe.transformer.proj_out = new
    return pipe


@torch.no_grad()
def replaced_on_the_device(pipe: Any) -> list[Any]:
    """As peft merges an adapter into torchao's weights, once the transformer has been called by itself."""
    found = [pixels("flux", pipe)]
    transformer = pipe.transformer
    transformer._hf_hook.pre_forward(transformer)
    layer = transformer.proj_out
    assert layer.weight.a.device.type == DEVICE
    layer.weight = quantized(layer.weight.a * 2)
    return [*found, *(pixels("flux", pipe) for _ in range(3))]


def test_a_quantized_weight_that_is_replaced_on_the_device(sim: Any, enable: Any) -> None:
    stock = with_a_quantized_layer()
    stock.enable_model_cpu_offload(device=DEVICE)
    expected = replaced_on_the_device(stock)
    assert expected[0].tobytes() != expected[1].tobytes()
    del stock
    pipe = with_a_quantized_layer()
    offload = enable(pipe)
    found = replaced_on_the_device(pipe)
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]
    offload.release()
    offload.disable()
    assert on_host(pipe) and pipe.transformer.proj_out.weight.a.device.type == "cpu"


@torch.no_grad()
def test_hooks_removed_while_a_quantized_weight_is_on_the_device(sim: Any, enable: Any) -> None:
    """All of it stays there, as under stock."""
    pipe = with_a_quantized_layer()
    enable(pipe)
    pixels("flux", pipe)
    pipe.transformer._hf_hook.pre_forward(pipe.transformer)
    pipe.remove_all_hooks()
    weights = [*pipe.transformer.parameters()]
    assert Counter(getattr(p, "a", p).device.type for p in weights) == {DEVICE: len(weights)}
    pipe.to("cpu")
    assert pipe.transformer.proj_out.weight.a.device.type == "cpu"


@pytest.mark.parametrize("by", ["load_lora_weights", "to"])
@torch.no_grad()
def test_a_module_that_moves_by_itself_is_moved_by_someone_else(by: str, sim: Any, enable: Any) -> None:
    expected = pixels("sdxl", CASES["sdxl"].build().to(DEVICE)).tobytes()
    pipe = CASES["sdxl"].build()
    linear = pipe.unet.mid_block.attentions[0].proj_in
    linear.weight = Params4bit(linear.weight.detach(), requires_grad=False)
    enable(pipe)
    for _ in range(2):
        assert pixels("sdxl", pipe).tobytes() == expected
        pipe.unet._hf_hook.pre_forward(pipe.unet)
        assert pipe.unet.conv_in.weight.device.type == DEVICE
        if by == "to":
            pipe.unet.to("cpu")
        else:
            pipe.load_lora_weights(lora_state_dict(pipe))
            pipe.unload_lora_weights()
    assert pixels("sdxl", pipe).tobytes() == expected


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("keep", [False, True], ids=["handle gone", "handle kept"])
def test_disabled_after_a_pipeline_that_shared_it_is_gone(keep: bool, again: bool, sim: Any) -> None:
    pipe = CASES["sd"].build()
    offload = prefetch_offload.enable(pipe, device=DEVICE, verify=True)
    expected = pixels("sd", pipe).tobytes()
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    for unit_max in (1 << 28, 1 << 29)[: 1 + again]:
        handle = prefetch_offload.enable(other, device=DEVICE, verify=True, unit_max=unit_max)
    kept = [handle][: int(keep)]
    del other, handle
    gc.collect()
    assert pixels("sd", pipe).tobytes() == expected
    offload.disable()
    assert on_host(pipe) and not hooked(pipe)
    assert not offload._engine.live()
    settle(sim)
    assert sim.counters()["pinned"] == 0
    del kept


# ----------------------------------------------------------------------------------------------------------- inputs
def test_inputs_in_lists_and_dictionaries_have_a_shape() -> None:
    module = nn.Identity()

    def shape(n: int) -> Any:
        t = torch.zeros(n)
        return [shape_of(module, *given) for given in (([[t]], {}), ([(t, None)], {}), ([], {"a": {"b": [t, 1]}}))]

    assert shape(3) == shape(3)
    assert all(one != other for one, other in zip(shape(3), shape(4), strict=True))


class Pieces(nn.Module):
    """As Z-Image's transformer: its inputs are lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8, requires_grad=False)
        self.dtype, self.config = torch.float32, None

    def forward(self, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.tanh(piece @ self.weight) for piece in pieces]


class OfPieces(Pipeline):
    @torch.no_grad()
    def __call__(self, rows: int) -> torch.Tensor:  # type: ignore[override]
        made = self.first([torch.ones(rows, 64, device=self._execution_device)])
        self.maybe_free_model_hooks()
        return made[0].cpu()


def test_what_lists_need_is_learned_for_each_size(sim: Any, enable: Any) -> None:
    offload = enable(pipe := OfPieces(Pieces()))
    needs = []
    for rows in (8, 512, 8, 512):
        pipe(rows)
        client = offload._session.client
        (shape,) = client.shapes.values()
        needs.append(client.memory.activations[shape])
    assert needs[0] == needs[2] < needs[1] == needs[3]
