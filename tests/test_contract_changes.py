"""Weights, buffers and modules changed in every way a program has: the next call shows it, as under stock offload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from contracts import BUDGETS, Steps, by_stock, differ, hooked, like_stock, like_stock_in, on_host, parts, pixels, state
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from prefetch_offload.testing.pipelines import CASES

Change = Callable[[Any], None]


def enter(pipe: Any, *names: str) -> None:
    for name in names:
        getattr(pipe, name)._hf_hook.pre_forward(getattr(pipe, name))


# ------------------------------------------------------------------ writes in place
@torch.no_grad()
def _add_(pipe: Any) -> None:
    pipe.unet.conv_in.weight.add_(0.1)
    pipe.text_encoder.final_layer_norm.bias.mul_(1.5)


def _data_add(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data += 0.1
    pipe.vae.decoder.conv_in.weight.data.mul_(1.5)


def _data_assigned(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 1.5
    pipe.vae.decoder.conv_in.bias.data = torch.ones_like(pipe.vae.decoder.conv_in.bias)


def _numpy(pipe: Any) -> None:
    pipe.unet.conv_in.weight.detach().cpu().numpy()[...] *= 1.5


def _parameter_replaced(pipe: Any) -> None:
    old = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = nn.Parameter(old.detach() * 1.5)
    pipe.vae.decoder.conv_in.register_parameter("bias", None)


def _load_state_dict(pipe: Any) -> None:
    pipe.unet.load_state_dict(CASES["sd"].build(seed=3).unet.state_dict())


def _load_state_dict_assign(pipe: Any) -> None:
    pipe.unet.load_state_dict(CASES["sd"].build(seed=3).unet.state_dict(), assign=True)


def _module_replaced(pipe: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        pipe.unet.conv_in = nn.Conv2d(4, 24, 3, padding=1)
        pipe.vae.decoder.add_module("unused", nn.Linear(3, 3))


def _initialised(pipe: Any) -> None:
    nn.init.constant_(pipe.unet.conv_in.weight, 0.01)


def _requires_grad(pipe: Any) -> None:
    pipe.unet.requires_grad_(False)
    pipe.vae.train(False)


WRITES = [
    _add_, _data_add, _data_assigned, _numpy, _parameter_replaced, _load_state_dict, _load_state_dict_assign,
    _module_replaced, _initialised,
]  # fmt: skip


@pytest.mark.parametrize("change", WRITES, ids=lambda f: f.__name__.strip("_"))
def test_a_write_between_calls_is_seen(change: Change, sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("sd", pipe), pixels("sd", pipe)]
        change(pipe)
        return [*made, pixels("sd", pipe), pixels("sd", pipe), state(pipe.unet), state(pipe.vae)]

    for pipe, offload in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert differ(pixels("sd", pipe), pixels("sd", CASES["sd"].build().to(DEVICE)))
        assert offload.stats.d2h_nbytes == 0
        assert on_host(pipe)


def test_refresh_sees_what_no_sample_sees(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe, fingerprints=False)
    before = [pixels("sd", pipe), pixels("sd", pipe)][1]
    _data_add(pipe)
    offload.refresh()
    expected = CASES["sd"].build().to(DEVICE)
    _data_add(expected)
    assert pixels("sd", pipe).tobytes() == pixels("sd", expected).tobytes() != before.tobytes()


@torch.no_grad()
def _in_place_on_the_device(pipe: Any) -> None:
    pipe.unet.conv_in.weight.add_(0.1)
    pipe.unet.conv_out.bias.copy_(torch.ones(4))


def _data_on_the_device(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data += 0.1


def _data_assigned_on_the_device(pipe: Any) -> None:
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data * 1.5


def _parameter_replaced_on_the_device(pipe: Any) -> None:
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.detach() * 1.5)
    pipe.unet.register_buffer("late", torch.ones(3, device=DEVICE))


@pytest.mark.parametrize(
    "change",
    [
        _in_place_on_the_device,
        _data_on_the_device,
        _data_assigned_on_the_device,
        _parameter_replaced_on_the_device,
        _load_state_dict,
    ],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_a_write_while_on_the_device_is_kept(change: Change, sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("sd", pipe)]
        enter(pipe, "unet")
        change(pipe)
        made += [pixels("sd", pipe), state(pipe.unet), pixels("sd", pipe)]
        return made

    for pipe, _ in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert on_host(pipe)


@pytest.mark.parametrize("marked", [True, False])
def test_a_write_inside_a_call_is_kept(marked: bool, sim: Any, enable: Any) -> None:
    """A callback changes weights on the device."""

    def steps(pipe: Any) -> list[Any]:
        def callback(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            with torch.no_grad():
                weight = pipe.unet.conv_in.weight
                (weight if marked else weight.data).mul_(1.1)
            return inputs

        first = pixels("sd", pipe, steps=2, callback_on_step_end=callback)
        return [first, pixels("sd", pipe, steps=2), state(pipe.unet)]

    found = by_stock("sd", steps, sim)
    assert differ(found[0], found[1])
    like_stock("sd", steps, sim, enable)


# -------------------------------------------------------------------------- dtypes
def test_casting_components_and_the_pipeline(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("sd", pipe)]
        pipe.vae.to(torch.bfloat16)
        made += [state(pipe.vae), pipe.vae.decode(torch.ones(1, 4, 8, 8, dtype=torch.bfloat16, device=DEVICE)).sample]
        pipe.vae.to(dtype=torch.float32)
        made += [pixels("sd", pipe)]
        pipe.unet.half().float()
        made += [pixels("sd", pipe)]
        enter(pipe, "unet")
        pipe.unet.to(torch.bfloat16)
        pipe.unet.to(torch.float32)
        made += [pixels("sd", pipe)]
        pipe.to(torch.bfloat16)
        made += [pixels("sd", pipe), pixels("sd", pipe, seed=1)]
        pipe.to(dtype=torch.float32)
        return [*made, pixels("sd", pipe), state(pipe.unet), state(pipe.text_encoder)]

    for pipe, _ in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert on_host(pipe)
        assert all(t.dtype == torch.float32 for t in pipe.unet.parameters())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layerwise_casting(compute: torch.dtype, sim: Any, enable: Any) -> None:
    """Storage in float8. Device memory does not hold two copies, and no weight comes back."""
    peaks: dict[int, int] = {}

    def steps(pipe: Any) -> list[Any]:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
        made: list[Any] = [pixels("flux", pipe, steps=2), pixels("flux", pipe, steps=2)]
        sim.reset()
        made += [pixels("flux", pipe, steps=2, seed=1)]
        peaks[len(peaks)] = sim.counters()["high_water"]
        return [*made, state(pipe.transformer)]

    pipe, offload = like_stock("flux", steps, sim, enable, dtype=compute, settings={"budget": "stock"})
    assert offload.stats.d2h_nbytes == 0
    assert peaks[1] <= peaks[0], "no more than stock's"
    stored = [p for p in pipe.transformer.parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(stored) > 20 and all(p.device.type == "cpu" for p in stored)


def test_layerwise_casting_switched_on_after_calls(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe), pixels("flux", pipe)]
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
        return [*made, pixels("flux", pipe), pixels("flux", pipe), state(pipe.transformer)]

    _, offload = like_stock("flux", steps, sim, enable)
    assert offload.stats.d2h_nbytes == 0


# --------------------------------------------------------------- features of models
def _sweep(name: str, *switches: tuple[Change, Change]) -> Steps:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels(name, pipe)]
        for on, off in switches:
            on(pipe)
            made += [pixels(name, pipe)]
            enter(pipe, "vae")
            off(pipe)
        return [*made, pixels(name, pipe)]

    return steps


SWITCHES: dict[str, tuple[Change, Change]] = {
    "freeu": (lambda p: p.enable_freeu(0.9, 0.2, 1.2, 1.4), lambda p: p.disable_freeu()),
    "slicing": (lambda p: p.vae.enable_slicing(), lambda p: p.vae.disable_slicing()),
    "tiling": (lambda p: p.vae.enable_tiling(), lambda p: p.vae.disable_tiling()),
    "attention slicing": (lambda p: p.enable_attention_slicing(1), lambda p: p.disable_attention_slicing()),
    "processor": (lambda p: p.unet.set_attn_processor(AttnProcessor()), lambda p: p.unet.set_default_attn_processor()),
    "fused qkv": (lambda p: p.fuse_qkv_projections(), lambda p: p.unfuse_qkv_projections()),
    "channels last": (
        lambda p: p.unet.to(memory_format=torch.channels_last),
        lambda p: p.unet.to(memory_format=torch.contiguous_format),
    ),
}


def test_switches_of_models(sim: Any, enable: Any) -> None:
    switches = dict(SWITCHES)
    fused = switches.pop("fused qkv")
    for pipe, offload in like_stock_in(BUDGETS.values(), "sd", _sweep("sd", *switches.values()), sim, enable):
        assert offload.stats.d2h_nbytes == 0
        assert on_host(pipe)
    pipe, offload = like_stock(
        "sdxl", _sweep("sdxl", fused, switches["freeu"]), sim, enable
    )  # fused qkv: an SDXL feature
    assert offload.stats.d2h_nbytes == 0
    assert on_host(pipe)


def test_fused_qkv_of_a_transformer_while_on_the_device(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe)]
        pipe.transformer.fuse_qkv_projections()
        made += [pixels("flux", pipe)]
        enter(pipe, "transformer")
        pipe.transformer.unfuse_qkv_projections()
        made += [pixels("flux", pipe)]
        enter(pipe, "transformer")
        pipe.transformer.fuse_qkv_projections()
        return [*made, pixels("flux", pipe), pixels("flux", pipe, seed=1)]

    pipe, _ = like_stock("flux", steps, sim, enable)
    assert on_host(pipe)


@pytest.mark.parametrize("bound", [False, True], ids=["between", "within"])
def test_resized_token_embeddings(bound: bool, sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe)]
        if bound:
            enter(pipe, "text_encoder", "text_encoder_2")
        torch.manual_seed(0)
        pipe.text_encoder.resize_token_embeddings(600, mean_resizing=False)
        pipe.text_encoder_2.resize_token_embeddings(120, mean_resizing=False)
        made += [pixels("flux", pipe)]
        return [*made, pipe.text_encoder.get_input_embeddings().weight.shape, pixels("flux", pipe)]

    pipe, _ = like_stock("flux", steps, sim, enable)
    shared = pipe.text_encoder_2
    assert shared.shared.weight is shared.encoder.embed_tokens.weight and shared.shared.weight.shape[0] == 120
    assert set(hooked(pipe)) == set(parts(pipe))
