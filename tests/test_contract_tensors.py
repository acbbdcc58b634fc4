"""What the modules show: the same parameters as before, whole, tied and attributed; and copies, pickles and files of them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import accelerate.hooks
import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident
from contracts import assert_right, hooked, on_host, parts, pixels, stocked, tensors
from diffusers import FluxPipeline, UNet2DConditionModel
from torch import nn

from prefetch_offload.testing.pipelines import CASES


def described(module: nn.Module) -> list[Any]:
    """Everything about its tensors that a program can see, but for their device and address."""
    buffers = {n: (set(m._non_persistent_buffers_set), list(m._buffers)) for n, m in module.named_modules()}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [buffers] + [
        (n, type(t), t.shape, t.stride(), t.dtype, t.requires_grad, t.is_leaf, t.is_inference(), dict(vars(t)))
        for n, t in named
    ]


def marked(pipe: Any) -> Any:
    """Give one component what small models lack: a frozen, a transposed, an attributed and an empty parameter."""
    unet = pipe.unet
    unet.conv_in.weight.requires_grad_(False)
    unet.conv_in.weight.note = {"from": "a test"}
    weight = unet.time_embedding.linear_1.weight
    weight.data = weight.data.t().contiguous().t()
    unet.conv_out.weight.data = unet.conv_out.weight.data.to(memory_format=torch.channels_last)
    unet.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    unet.register_buffer("passing", torch.arange(5), persistent=False)
    unet.plain_attribute = torch.ones(2)
    return pipe


def test_tensors_stay_the_same_objects_with_all_their_properties(sim: Any, enable: Any) -> None:
    pipe = marked(CASES["sd"].build())
    unet = pipe.unet
    before, objects = described(unet), [id(t) for t in tensors(unet)]
    values = [t.detach().clone() for t in tensors(unet)]
    assert not unet.time_embedding.linear_1.weight.is_contiguous()
    enable(pipe)

    def check() -> None:
        assert [id(t) for t in tensors(unet)] == objects and described(unet) == before
        assert all(torch.equal(a, b) for a, b in zip(tensors(unet), values, strict=True))
        assert unet.plain_attribute.device.type == "cpu"

    check()
    unet._hf_hook.pre_forward(unet)
    assert described(unet) == before
    assert all(t.device.type == DEVICE for t in tensors(unet))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(unet), values, strict=True))
    twins = [id(t) for t in tensors(unet)]
    assert unet.plain_attribute.device.type == "cpu", "a plain tensor attribute is no parameter"
    pipe.maybe_free_model_hooks()
    check()
    unet._hf_hook.pre_forward(unet)
    assert [id(t) for t in tensors(unet)] == twins, "device parameters persist: nothing recompiles"
    pipe.maybe_free_model_hooks()
    pixels("sd", pipe)
    check()
    pipe._prefetch_offload.disable()
    check()


def test_ties_hold_on_the_host_and_on_the_device(enable: Any) -> None:
    pipe = CASES["flux"].build()
    t5 = pipe.text_encoder_2
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    enable(pipe)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    t5._hf_hook.pre_forward(t5)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight, "one tensor, two names"
    assert t5.shared.weight.device.type == DEVICE
    pipe.maybe_free_model_hooks()
    t5.shared.weight.data[3] = 7.0
    assert (t5.encoder.embed_tokens.weight[3] == 7.0).all()


def test_views_that_share_storage_still_do(sim: Any, enable: Any) -> None:
    """Parameters that are views of one tensor keep overlapping, on the host and on the device."""
    pipe = CASES["sd"].build()
    whole = torch.randn(6, 4)
    pipe.unet.register_buffer("whole", whole)
    pipe.unet.register_buffer("rows", whole[2:5])
    pipe.unet.register_buffer("column", whole[:, 1])
    enable(pipe)
    unet = pipe.unet
    unet.whole[3, 1] = 5.0
    assert unet.rows[1, 1] == 5.0 and unet.column[3] == 5.0
    unet._hf_hook.pre_forward(unet)
    base = unet.whole.data_ptr()
    assert unet.rows.data_ptr() - base == 2 * 4 * 4 and unet.column.data_ptr() - base == 4
    assert torch.equal(unet.rows.cpu(), unet.whole.cpu()[2:5])
    pipe.maybe_free_model_hooks()
    unet.conv_in.weight.data = unet.conv_in.weight.data.clone()  # their unit is made anew
    unet._hf_hook.pre_forward(unet)
    assert unet.rows.data_ptr() - unet.whole.data_ptr() == 2 * 4 * 4
    pipe.maybe_free_model_hooks()
    unet.rows[0] = 9.0
    assert (unet.whole[2] == 9.0).all()


def test_no_inference_tensors_appear(sim: Any, enable: Any) -> None:
    """Stock moves weights under the caller's inference_mode and leaves inference tensors behind."""
    pipe = CASES["flux"].build()
    with torch.inference_mode():
        offload = enable(pipe)
        assert_right("flux", pipe)
        pipe.transformer._hf_hook.pre_forward(pipe.transformer)
        assert not any(t.is_inference() for t in tensors(pipe.transformer))
        pipe.maybe_free_model_hooks()
        offload.release()
    assert not any(t.is_inference() for m in parts(pipe).values() for t in tensors(m))
    pipe.transformer._hf_hook.pre_forward(pipe.transformer)
    bias = pipe.transformer.proj_out.bias
    assert bias.requires_grad
    bias.sum().backward()  # autograd accepts them
    assert bias.grad is not None
    bias.grad = None
    pipe.maybe_free_model_hooks()


def test_weights_loaded_under_inference_mode_become_normal(sim: Any, enable: Any) -> None:
    with torch.inference_mode():
        pipe = CASES["flux"].build()
    assert next(pipe.transformer.parameters()).is_inference()
    enable(pipe)
    assert_right("flux", pipe)
    assert not any(t.is_inference() for m in parts(pipe).values() for t in tensors(m))


# --------------------------------------------------------------------- copies
def test_deepcopy_of_a_hooked_module(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    enable(pipe)
    for bound in (False, True):
        if bound:
            pipe.transformer._hf_hook.pre_forward(pipe.transformer)
        made = copy.deepcopy(pipe.transformer)
        assert isinstance(made._hf_hook, accelerate.hooks.CpuOffload) and made._hf_hook is not pipe.transformer._hf_hook
        assert described(made) == described(pipe.transformer)
        shown = {t.data_ptr() for t in tensors(pipe.transformer)}
        assert not shown & {t.data_ptr() for t in tensors(made)}, "no memory is shared"
        pipe.maybe_free_model_hooks()
        original = pipe.transformer
        with torch.no_grad():
            original.proj_out.weight.zero_()  # the copy has its own
        pipe.transformer = made
        assert_right("flux", pipe)
        del original


def test_deepcopy_of_an_enabled_pipeline(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe)
    pixels("flux", pipe)
    twin = copy.deepcopy(pipe)
    assert type(twin).__name__ == "FluxPipeline" and isinstance(twin, FluxPipeline)
    assert set(hooked(twin)) == set(hooked(pipe))
    assert not {id(m) for m in parts(twin).values()} & {id(m) for m in parts(pipe).values()}
    expected = resident("flux", torch.float32)
    for seed in (0, 1):
        for one in (twin, pipe):
            assert_same([np.asarray(CASES["flux"].call(one, seed=seed))], [expected[seed]])
    offload.disable()
    assert_same(images_of("flux", twin), expected)
    assert on_host(twin)
    twin._prefetch_offload.disable()


@pytest.mark.parametrize("bound", [False, True])
def test_pickle_and_torch_save_of_a_hooked_module(bound: bool, sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    truth = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    enable(pipe)
    pixels("sd", pipe)
    if bound:
        pipe.unet._hf_hook.pre_forward(pipe.unet)
    file = io.BytesIO()
    torch.save(pipe.unet, file)
    file.seek(0)
    loaded = [torch.load(file, weights_only=False, map_location="cpu")]
    loaded += [] if bound else [pickle.loads(pickle.dumps(pipe.unet))]  # the simulator cannot unpickle its tensors
    for made in loaded:
        assert type(made) is UNet2DConditionModel and not hasattr(made, "_hf_hook")
        assert all(torch.equal(t.cpu(), truth[n]) for n, t in made.state_dict().items())
    pipe.maybe_free_model_hooks()


def test_pickle_of_an_enabled_pipeline(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    enable(pipe)
    made = pickle.loads(pickle.dumps(pipe))
    assert type(made) is FluxPipeline and not hooked(made) and not getattr(made, "_all_hooks", None)
    made.to(DEVICE)
    assert_right("flux", made)


def test_torch_save_of_a_state_dict_takes_no_slab_along(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    pipe.unet.register_buffer("count", torch.arange(3))  # another dtype in the same slab
    plain, ours, one = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(pipe.unet.state_dict(), plain)
    enable(pipe)
    torch.save(pipe.unet.state_dict(), ours)
    torch.save(pipe.unet.conv_in.bias, one)
    assert ours.tell() <= plain.tell() * 1.01 and one.tell() < 4096


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_save_pretrained_while_enabled(name: str, tmp_path: Any, sim: Any, enable: Any) -> None:
    pipe = CASES[name].build()
    stock = CASES[name].build()  # untouched: on this device stock offload breaks T5's tie, and saves it twice
    stock.save_pretrained(tmp_path / "stock")
    enable(pipe)
    pixels(name, pipe)
    pipe.save_pretrained(tmp_path / "between")
    encoder = pipe.text_encoder if name == "sd" else pipe.text_encoder_2
    encoder._hf_hook.pre_forward(encoder)
    assert all(t.device.type == DEVICE for t in tensors(encoder))
    pipe.save_pretrained(tmp_path / "within")
    files = sorted(p.relative_to(tmp_path / "stock") for p in (tmp_path / "stock").rglob("*") if p.is_file())
    for folder in ("between", "within"):
        found = sorted(p.relative_to(tmp_path / folder) for p in (tmp_path / folder).rglob("*") if p.is_file())
        assert found == files
        for file in (f for f in files if not f.parent.name.startswith("tokenizer")):  # they remember their last padding
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file
    again = type(stock).from_pretrained(tmp_path / "within", safety_checker=pipe.components.get("safety_checker"))
    again.set_progress_bar_config(disable=True)
    again.to(DEVICE)
    assert_right(name, again)


def test_state_dict_and_dtype_and_device_between_calls(enable: Any) -> None:
    stock, pipe = stocked("sd"), CASES["sd"].build()
    enable(pipe)
    for one in (stock, pipe):
        pixels("sd", one)
    for name, module in parts(stock).items():
        ours = getattr(pipe, name)
        assert (ours.device.type, ours.dtype) == (module.device.type, module.dtype)
        one, other = ours.state_dict(), module.state_dict()
        assert list(one) == list(other)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.values(), other.values(), strict=True))
    assert pipe.device == stock.device and pipe.dtype == stock.dtype
    assert pipe.unet.num_parameters() == stock.unet.num_parameters()
    assert repr(pipe.unet) == repr(stock.unet) and repr(pipe) == repr(stock)
