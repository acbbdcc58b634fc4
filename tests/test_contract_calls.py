"""Calls in every order a program makes them, and what can be seen in their midst: as under stock offload."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import DEVICE, assert_same, resident
from contracts import (
    assert_right,
    by_stock,
    differ,
    hooked,
    like_stock,
    on_host,
    parts,
    perform,
    pixels,
    state,
    stocked,
    tensors,
)
from diffusers import RePaintPipeline, RePaintScheduler, UNet2DModel
from torch import nn

from prefetch_offload.testing import _pipeline_parts
from prefetch_offload.testing.pipelines import CASES

NOISE = functools.partial(torch.randn, generator=torch.Generator().manual_seed(7))
LATENTS, IMAGE, TEXT = NOISE(1, 4, 16, 16), NOISE(1, 3, 32, 32), NOISE(1, 77, 32)


def encode(pipe: Any, prompt: str = "a photo") -> tuple[torch.Tensor, ...]:
    return pipe.encode_prompt(prompt, torch.device(DEVICE), 1, True)


# --------------------------------------------------------------------- visible state
def _watch(pipe: Any) -> list[Any]:
    """At each entry: where the pipeline and every component say they are."""
    seen: list[Any] = []

    def look(name: str, *_: Any) -> None:
        where = {n: (m.device.type, m.dtype) for n, m in parts(pipe).items()}
        seen.append((name, where, pipe.device.type, pipe.dtype, pipe._execution_device))

    for name, module in parts(pipe).items():
        for label, child in module.named_children():  # inside of its forward, or of encode and decode
            child.register_forward_pre_hook(functools.partial(look, f"{name}.{label}"))
    return seen


@pytest.mark.parametrize("name", ["sd", "sdxl-img2img", "sdxl-controlnet", "flux-img2img", "wan", "svd", "kandinsky22"])
def test_devices_and_dtypes_at_each_entry(name: str, sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        seen = _watch(pipe)
        made: list[Any] = [pixels(name, pipe, steps=2), pixels(name, pipe, steps=2)]
        return [*made, list(seen), str(pipe.device), str(pipe._execution_device)]

    pipe, _ = like_stock(name, steps, sim, enable)
    assert on_host(pipe)


def test_between_direct_calls_components_are_where_stock_has_them(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        def where() -> dict[str, str]:
            return {n: m.device.type for n, m in parts(pipe).items()}

        made: list[Any] = [where()]
        encode(pipe)
        made += [where()]
        pipe.vae.decode(LATENTS.to(DEVICE))
        made += [where()]
        pipe.unet(LATENTS.to(DEVICE), 5, TEXT.to(DEVICE))
        made += [where()]
        pipe.maybe_free_model_hooks()
        return [*made, where()]

    like_stock("sd", steps, sim, enable)


# ------------------------------------------------------------------------ any order
def test_submodules_called_directly_in_any_order(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        vae, unet = pipe.vae, pipe.unet
        latents, image, text = (t.to(DEVICE) for t in (LATENTS, IMAGE, TEXT))
        # Inputs on the host go along with weights that move, and only then.
        made: list[Any] = [vae.decode(latents).sample, unet(LATENTS, 5, TEXT).sample, unet(latents, 5, text).sample]
        made += [
            vae.encode(image).latent_dist.mean,
            *encode(pipe),
            vae(image).sample,
            vae.decode(latents, return_dict=False),
        ]
        made += [pixels("sd", pipe)]
        made += [unet(sample=LATENTS, timestep=5, encoder_hidden_states=TEXT).sample]
        made += [unet.forward(latents, 5, text).sample, vae.encode(image).latent_dist.mode(), vae.forward(image).sample]
        pipe.maybe_free_model_hooks()
        return [*made, pixels("sd", pipe), pixels("sd", pipe, seed=1)]

    pipe, _ = like_stock("sd", steps, sim, enable)
    assert on_host(pipe)


def test_encode_prompt_first_then_call_with_embeddings(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        positive, negative = encode(pipe)
        given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
        made: list[Any] = [pixels("sd", pipe, **given), positive]
        encode(pipe)
        made += [pixels("sd", pipe, **given, seed=1)]
        hidden = pipe.text_encoder(torch.arange(9)[None].to(DEVICE), output_hidden_states=True).hidden_states[-2]
        made += [
            pipe.text_encoder.final_layer_norm(hidden)
        ]  # clip_skip reads weights after the forward, past every hook
        return [*made, pixels("sd", pipe), pixels("sd", pipe, negative_prompt="dull", guidance_scale=3.0)]

    pipe, _ = like_stock("sd", steps, sim, enable)
    assert on_host(pipe)


def test_options_that_change_the_order(sim: Any, enable: Any) -> None:
    """A negative prompt makes Flux visit both encoders twice; guidance, batches and prompts change from call to call."""

    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe)]
        made += [pixels("flux", pipe, negative_prompt="dull", true_cfg_scale=3.0)]
        made += [pixels("flux", pipe, num_images_per_prompt=2), pixels("flux", pipe, steps=3)]
        made += [pipe("a cat", num_inference_steps=1, height=32, width=32, output_type="latent",
                      generator=torch.Generator().manual_seed(0)).images, pixels("flux", pipe, prompt="another")]  # fmt: skip
        return [*made, pixels("flux", pipe, negative_prompt="dull", true_cfg_scale=3.0), pixels("flux", pipe)]

    pipe, offload = like_stock("flux", steps, sim, enable)
    assert on_host(pipe)
    assert offload.stats.d2h_nbytes == 0


# ------------------------------------------------------------ interrupts and errors
def test_a_callback_that_interrupts(sim: Any, enable: Any) -> None:
    def interrupt(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 0
        return inputs

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sd", pipe, steps=3, callback_on_step_end=interrupt)]
        return [*made, pixels("sd", pipe, steps=3), pixels("sd", pipe, steps=3, callback_on_step_end=interrupt)]

    assert differ(*by_stock("sd", steps, sim)[:2])
    pipe, _ = like_stock("sd", steps, sim, enable)
    assert on_host(pipe)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_a_callback_that_raises(error: type[BaseException], sim: Any, enable: Any) -> None:
    def fail(*_: Any) -> Any:
        raise error("from the callback")

    pipe = CASES["sd"].build()
    offload = enable(pipe)
    for _ in range(2):
        with pytest.raises(error):
            pixels("sd", pipe, steps=2, callback_on_step_end=fail)
        assert_right("sd", pipe)
        assert on_host(pipe)
    assert offload.stats.d2h_nbytes == 0
    with pytest.raises(error):
        pixels("sd", pipe, callback_on_step_end=fail)
    offload.disable()
    assert on_host(pipe)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae.decoder", "safety_checker"])
def test_an_error_inside_a_component(part: str, sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    enable(pipe)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError(part)

    pixels("sd", pipe)
    handle = pipe.components[part.split(".")[0]].get_submodule(part.partition(".")[2]).register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match=part):
        pixels("sd", pipe)
    handle.remove()
    assert_right("sd", pipe)
    assert on_host(pipe)


def test_a_wrong_argument(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    enable(pipe)
    for bad in ({"prompt": 7}, {"callback_on_step_end_tensor_inputs": ["nonsense"]}):
        with pytest.raises((ValueError, TypeError)):
            pixels("sd", pipe, **bad)
    assert_right("sd", pipe)


# --------------------------------------------------------------- moved by the program
def test_pipe_to_host_and_device_and_back(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe)]
        pipe.to("cpu")
        made += [pixels("flux", pipe)]
        pipe.to(DEVICE)
        made += [{n: m.device.type for n, m in parts(pipe).items()}, pixels("flux", pipe), pixels("flux", pipe, seed=1)]
        pipe.encode_prompt("a photo", None, torch.device(DEVICE), max_sequence_length=32)
        pipe.to("cpu")
        made += [pixels("flux", pipe)]
        pipe.transformer.to(DEVICE)
        made += [pixels("flux", pipe)]
        pipe.vae._hf_hook.pre_forward(pipe.vae)
        pipe.vae.to("cpu")
        return [*made, pixels("flux", pipe), state(pipe.transformer), state(pipe.vae)]

    pipe, _ = like_stock("flux", steps, sim, enable)
    assert on_host(pipe)
    assert set(hooked(pipe)) == set(parts(pipe))


def test_enabled_while_on_the_device(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build().to(DEVICE)
    enable(pipe)
    assert on_host(pipe)
    assert_right("sd", pipe)


def test_enabling_again_and_disabling_in_turn(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    first = enable(pipe)
    pixels("sd", pipe)
    copied = first.stats.h2d_nbytes
    assert enable(pipe) is first
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert_right("sd", pipe)
    assert first.stats.h2d_nbytes == copied, "device copies survive"
    assert enable(pipe, budget="stock") is first
    assert_right("sd", pipe)
    first.disable()
    first.disable()
    second = enable(pipe)
    assert second is not first
    assert_right("sd", pipe)
    first.disable()
    assert hooked(pipe), "an old handle has nothing to say"


def test_reset_device_map_unhooks(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        pixels("flux", pipe)
        pipe.reset_device_map()
        made: list[Any] = [sum(hasattr(m, "_hf_hook") for m in parts(pipe).values())]
        pipe.hf_device_map = {"": DEVICE}
        pipe.reset_device_map()
        made += [sum(hasattr(m, "_hf_hook") for m in parts(pipe).values()), len(pipe._all_hooks), pipe.hf_device_map]
        pipe.to(DEVICE)
        return [*made, pixels("flux", pipe)]

    pipe, offload = like_stock("flux", steps, sim, enable)
    assert not any(offload._engine.live()) and not offload._engine.pins.nbytes
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert_right("flux", pipe)


def test_maybe_free_by_hand_at_any_time(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pipe.maybe_free_model_hooks()
    pipe.maybe_free_model_hooks()
    assert_right("sd", pipe)

    def free(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe.maybe_free_model_hooks()  # in the midst of a call
        return inputs

    assert (
        pixels("sd", pipe, steps=2, callback_on_step_end=free).tobytes() == resident("sd", torch.float32)[0].tobytes()
    )
    offload.disable()
    pipe.maybe_free_model_hooks()
    assert not hooked(pipe)


def test_excluded_for_this_instance(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "image_encoder"]
        pipe.enable_model_cpu_offload(device=DEVICE)
        made: list[Any] = [pixels("sdxl", pipe)]
        pipe._exclude_from_cpu_offload = ["image_encoder", "text_encoder"]  # named in the sequence: hooked all the same
        pipe.enable_model_cpu_offload(device=DEVICE)
        made += [pixels("sdxl", pipe), [n for n, m in parts(pipe).items() if hasattr(m, "_hf_hook")]]
        return [*made, {n: m.device.type for n, m in parts(pipe).items()}]

    like_stock("sdxl", steps, sim, enable)

    def unnamed(pipe: Any) -> list[Any]:
        pipe._exclude_from_cpu_offload = ["controlnet"]
        pipe.enable_model_cpu_offload(device=DEVICE)
        made: list[Any] = [
            pixels("sdxl-controlnet", pipe),
            [n for n, m in parts(pipe).items() if hasattr(m, "_hf_hook")],
        ]
        return [*made, {n: m.device.type for n, m in parts(pipe).items()}, pixels("sdxl-controlnet", pipe)]

    _, offload = like_stock("sdxl-controlnet", unnamed, sim, enable)
    offload.disable()


def test_a_pipeline_of_which_nothing_is_offloaded(sim: Any, enable: Any) -> None:
    """All of it excluded, and then no model left: stock takes either."""

    def steps(pipe: Any) -> list[Any]:
        pipe._exclude_from_cpu_offload, pipe.model_cpu_offload_seq = list(parts(pipe)), ""
        pipe.enable_model_cpu_offload(device=DEVICE)
        made = [pixels("sdxl", pipe), {n: m.device.type for n, m in parts(pipe).items()}, len(pipe._all_hooks)]
        for name in parts(pipe):
            setattr(pipe, name, None)
        pipe.enable_model_cpu_offload(device=DEVICE)
        return [*made, len(pipe._all_hooks)]

    pipe, offload = like_stock("sdxl", steps, sim, enable)
    assert offload.device == torch.device(DEVICE, 0)
    for empty in (offload, enable(pipe)):
        assert empty.stats.h2d_nbytes == 0 and empty.report()
        empty.release()
        empty.disable()
    fresh = CASES["sdxl"].build()
    fresh._exclude_from_cpu_offload, fresh.model_cpu_offload_seq = list(parts(fresh)), ""
    first = enable(fresh)
    assert pixels("sdxl", fresh).tobytes() == by_stock("sdxl", lambda p: [pixels("sdxl", p)], sim)[0].tobytes()
    assert first.report() and first.device.type == DEVICE


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_that_never_frees_its_components(sim: Any, enable: Any) -> None:
    def build() -> Any:
        with _pipeline_parts.seeded(0):
            unet = UNet2DModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                               down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
            return RePaintPipeline(unet=unet, scheduler=RePaintScheduler())

    def steps(pipe: Any) -> list[Any]:
        pipe.set_progress_bar_config(disable=True)
        image, mask = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
        call = functools.partial(
            pipe, image, mask, num_inference_steps=2, jump_length=1, jump_n_sample=1, output_type="np"
        )
        return [call(generator=torch.Generator().manual_seed(s)).images for s in (0, 1)]

    stock, pipe = build(), build()
    stock.enable_model_cpu_offload(device=DEVICE)
    offload = enable(pipe)
    expected, found = perform(steps, stock), perform(steps, pipe)
    assert_same(found, expected)
    assert all(t.device.type == "cpu" for t in tensors(pipe.unet)), "a call has ended, whatever the pipeline says"
    assert offload.stats.d2h_nbytes == 0
    stock.unet.to("cpu")


def test_two_denoisers_that_alternate_do_not_thrash(sim: Any, enable: Any) -> None:
    """The ControlNet runs before the UNet in every step: under stock one of them pushes the other out of the sequence."""
    pipe = CASES["sdxl-controlnet"].build()
    offload = enable(pipe)
    pixels("sdxl-controlnet", pipe, steps=4)
    before = offload.stats.h2d_nbytes
    expected = pixels("sdxl-controlnet", stocked("sdxl-controlnet"), steps=4)
    assert_same([pixels("sdxl-controlnet", pipe, steps=4)], [expected])
    assert offload.stats.h2d_nbytes == before
    assert isinstance(pipe.controlnet, nn.Module) and on_host(pipe)
