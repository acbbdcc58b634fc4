"""LoRA, textual inversion and IP-Adapter on an enabled pipeline: bit for bit what they give under stock offload."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, assert_same
from contracts import BUDGETS, by_stock, differ, hooked, like_stock, like_stock_in, on_host, parts, pixels, state

from prefetch_offload.testing import _pipeline_parts, _pipelines_sdxl
from prefetch_offload.testing.pipelines import CASES, lora_state_dict


def loras(seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    return lora_state_dict(CASES["sd"].build(), seed=seed, text_encoders=True, **options)


def encode(pipe: Any) -> tuple[torch.Tensor, ...]:
    """A direct call, after which stock leaves the text encoder on the device."""
    return pipe.encode_prompt("a photo", torch.device(DEVICE), 1, True)


def enter(pipe: Any, *names: str) -> None:
    for name in names:
        module = getattr(pipe, name)
        module._hf_hook.pre_forward(module)
        assert next(module.parameters()).device.type == DEVICE


def assert_ours(pipe: Any) -> None:
    assert set(hooked(pipe)) == {n for n in parts(pipe) if n not in pipe._exclude_from_cpu_offload}
    assert len(pipe._all_hooks) == len(hooked(pipe))
    assert pipe._offload_device == torch.device(DEVICE, 0)
    assert on_host(pipe)


# ------------------------------------------------------------------------------ LoRA
def test_a_lora_through_its_life(sim: Any, enable: Any) -> None:
    first, second = loras(1), loras(2)

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sd", pipe)]

        def look() -> None:
            made.append(pixels("sd", pipe))

        pipe.load_lora_weights(first, adapter_name="one")
        look()
        pipe.set_adapters("one", 0.5)
        look()
        pipe.load_lora_weights(second, adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.7, -0.4])
        look()
        pipe.fuse_lora(adapter_names=["one"], lora_scale=0.9)
        look()
        pipe.unfuse_lora()
        look()
        pipe.disable_lora()
        look()
        pipe.enable_lora()
        look()
        pipe.delete_adapters("one")
        look()
        pipe.unload_lora_weights()
        look()
        return [*made, state(pipe.unet)]

    for pipe, offload in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert_ours(pipe)
        assert offload.stats.d2h_nbytes == 0, "all of it happened on the host"


def test_each_lora_step_has_an_effect(sim: Any) -> None:
    """So that the comparison above compares something."""

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sd", pipe)]
        pipe.load_lora_weights(loras(1), adapter_name="one")
        made.append(pixels("sd", pipe))
        pipe.set_adapters("one", 0.5)
        made.append(pixels("sd", pipe))
        pipe.fuse_lora(lora_scale=0.9)
        made.append(pixels("sd", pipe))
        return made

    assert differ(*by_stock("sd", steps, sim))


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_fuse_and_unfuse_while_components_are_on_the_device(safe: bool, sim: Any, enable: Any) -> None:
    weights = loras(3)

    def steps(pipe: Any) -> list[Any]:
        pipe.load_lora_weights(weights)
        made: list[Any] = [pixels("sd", pipe), encode(pipe)]
        assert pipe.text_encoder.device.type == DEVICE
        pipe.fuse_lora(safe_fusing=safe)  # the text encoder on the device, the UNet on the host
        made += [encode(pipe), pixels("sd", pipe), pixels("sd", pipe, seed=1)]
        enter(pipe, "unet")
        pipe.unfuse_lora()
        made += [pixels("sd", pipe), encode(pipe)]
        enter(pipe, "unet", "text_encoder")
        pipe.fuse_lora(safe_fusing=safe)
        pipe.maybe_free_model_hooks()
        made += [state(m) for m in (pipe.unet, pipe.text_encoder)]
        made += [pixels("sd", pipe)]
        pipe.unload_lora_weights()
        return [*made, pixels("sd", pipe)]

    for pipe, _ in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert_ours(pipe)


def test_load_and_unload_while_components_are_on_the_device(sim: Any, enable: Any) -> None:
    weights = loras(4)

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sd", pipe), encode(pipe)]
        pipe.load_lora_weights(weights, adapter_name="late")
        made += [encode(pipe), pixels("sd", pipe)]
        enter(pipe, "unet", "text_encoder")
        pipe.set_adapters("late", 0.3)
        made += [pixels("sd", pipe)]
        enter(pipe, "unet", "text_encoder")
        pipe.unload_lora_weights()
        return [*made, pixels("sd", pipe)]

    for pipe, _ in like_stock_in(BUDGETS.values(), "sd", steps, sim, enable):
        assert_ours(pipe)


def test_a_lora_loaded_before_enable_and_fused_after(sim: Any, enable: Any) -> None:
    weights = loras(5)
    expected = []
    for ours in (False, True):
        pipe = CASES["sd"].build()
        pipe.load_lora_weights(weights)
        if ours:
            enable(pipe)
        else:
            pipe.enable_model_cpu_offload(device=DEVICE)
        made = [pixels("sd", pipe)]
        pipe.fuse_lora()
        made += [pixels("sd", pipe)]
        pipe.unfuse_lora()
        made += [pixels("sd", pipe)]
        expected.append(made)
        del pipe
    assert_same(expected[1], expected[0])


def test_hotswapping_a_lora(sim: Any, enable: Any) -> None:
    """peft writes the new adapter over the old one's parameters, in place."""
    first, second = ({k: v for k, v in loras(s).items() if k.startswith("unet")} for s in (6, 7))

    def steps(pipe: Any) -> list[Any]:
        pipe.load_lora_weights(first, adapter_name="one")
        made = [pixels("sd", pipe)]
        pipe.load_lora_weights(second, adapter_name="one", hotswap=True)
        made += [pixels("sd", pipe)]
        enter(pipe, "unet")
        pipe.load_lora_weights(first, adapter_name="one", hotswap=True)
        return [*made, pixels("sd", pipe)]

    pipe, _ = like_stock("sd", steps, sim, enable)
    assert_ours(pipe)


def test_lora_on_a_transformer_in_bf16_with_a_tight_budget(sim: Any, enable: Any) -> None:
    weights = lora_state_dict(CASES["flux"].build(dtype=torch.bfloat16))

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("flux", pipe)]
        pipe.load_lora_weights(weights)
        made += [pixels("flux", pipe), pixels("flux", pipe, joint_attention_kwargs={"scale": 0.4})]
        pipe.fuse_lora()
        made += [pixels("flux", pipe)]
        pipe.unfuse_lora()
        return [*made, pixels("flux", pipe)]

    pipe, offload = like_stock("flux", steps, sim, enable, settings={"budget": "stock"}, dtype=torch.bfloat16)
    assert_ours(pipe)
    assert offload.stats.d2h_nbytes == 0


# ----------------------------------------------------------------- textual inversion
@pytest.mark.parametrize("bound", [False, True], ids=["between", "within"])
def test_textual_inversion_keeps_the_accelerator(bound: bool, sim: Any, enable: Any) -> None:
    """Stock enables again with the text encoder's device: between calls that is the CPU, and it stays there for good."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sd", pipe, prompt="a <thing> here")]
        if bound:
            enter(pipe, "text_encoder")
        pipe.load_textual_inversion(vectors, token="<thing>")
        made += [pixels("sd", pipe, prompt="a <thing> here"), pixels("sd", pipe, seed=1, prompt="a <thing> here")]
        pipe.unload_textual_inversion()
        return [*made, pixels("sd", pipe, prompt="a <thing> here")]

    whole = CASES["sd"].build().to(DEVICE)  # the truth; it is edited on the host, where PyTorch can
    expected = [pixels("sd", whole, prompt="a <thing> here")]
    whole.to("cpu").load_textual_inversion(vectors, token="<thing>")
    expected += [pixels("sd", whole.to(DEVICE), seed=seed, prompt="a <thing> here") for seed in (0, 1)]
    whole.to("cpu").unload_textual_inversion()
    expected += [pixels("sd", whole.to(DEVICE), prompt="a <thing> here")]
    del whole
    pipe = CASES["sd"].build()
    enable(pipe)
    found = steps(pipe)
    assert_same(found, expected)
    assert differ(*found[:2]) and found[0].tobytes() == found[3].tobytes()
    assert_ours(pipe)
    assert pipe._execution_device == torch.device(DEVICE, 0)


# ------------------------------------------------------------------------ IP-Adapter
@pytest.mark.parametrize("bound", [False, True], ids=["between", "within"])
def test_ip_adapter_loaded_after_enable(bound: bool, sim: Any, enable: Any) -> None:
    parts_ = {"image_encoder": _pipeline_parts.clip_vision, "feature_extractor": _pipeline_parts.clip_image_processor}

    def sizes() -> dict[str, Any]:
        with _pipeline_parts.seeded(5):
            return {name: make() for name, make in parts_.items()}

    with _pipeline_parts.seeded(9):
        plain = CASES["sdxl"].build(**sizes())
        weights = _pipelines_sdxl._ip_adapter_state_dict(plain.unet, plain.image_encoder.config.projection_dim)
    picture = _pipeline_parts.picture(0)

    def steps(pipe: Any) -> list[Any]:
        made = [pixels("sdxl", pipe)]
        if bound:
            enter(pipe, "unet", "image_encoder")
        pipe.load_ip_adapter(weights, subfolder="", weight_name="")
        made += [pixels("sdxl", pipe, ip_adapter_image=picture)]
        pipe.set_ip_adapter_scale(0.3)
        made += [pixels("sdxl", pipe, ip_adapter_image=picture, seed=s) for s in (0, 1)]
        pipe.unload_ip_adapter()
        return made

    expected = by_stock("sdxl", steps, sim, **sizes())
    pipe = CASES["sdxl"].build(**sizes())
    enable(pipe)
    found = steps(pipe)
    assert_same(found, expected)
    assert differ(*found)
    assert_ours(pipe)
    assert pipe.image_encoder is None
    assert_same([pixels("sdxl", pipe)], found[:1])


def test_an_image_encoder_registered_late_is_offloaded(sim: Any, enable: Any) -> None:
    """load_ip_adapter registers one without a hook; the hooks come with the next call."""
    pipe = CASES["sdxl"].build()
    enable(pipe)
    pixels("sdxl", pipe)
    with _pipeline_parts.seeded(5):
        encoder = _pipeline_parts.clip_vision()
    pipe.register_modules(image_encoder=encoder, feature_extractor=_pipeline_parts.clip_image_processor())
    pixels("sdxl", pipe)
    assert_ours(pipe)
    assert "image_encoder" in hooked(pipe)
