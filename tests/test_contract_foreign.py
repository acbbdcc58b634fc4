"""Code that knows nothing of us: overrides of the method, generate(), caches, patched forwards, other offload managers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import accelerate
import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident
from contracts import (
    assert_equal,
    assert_right,
    by_stock,
    differ,
    hooked,
    like_stock,
    on_host,
    parts,
    perform,
    pixels,
    stock_device,
    stocked,
)
from diffusers import ComponentsManager, FirstBlockCacheConfig, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prefetch_offload
from prefetch_offload.testing import _pipeline_parts
from prefetch_offload.testing.pipelines import CASES


def again(cls: type, pipe: Any) -> Any:
    """The same pipeline as another class."""
    made = cls(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


# ------------------------------------------------------------ overrides of the method
class LikeAudioLDM2(StableDiffusionXLPipeline):
    """Hooks parts of a component, then, last, the component itself; frees by a hook of its own at the end."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = "cuda") -> None:
        from accelerate import cpu_offload_with_hook

        if self.device.type != "cpu":
            self.to("cpu", silence_dtype_warnings=True)
        hook = None
        for model in (self.text_encoder.encoder, self.text_encoder_2, self.unet, self.vae, self.text_encoder):
            _, hook = cpu_offload_with_hook(model, torch.device(device), prev_module_hook=hook)
        self.final_offload_hook = hook

    def maybe_free_model_hooks(self) -> None:
        if hasattr(self, "final_offload_hook"):
            self.final_offload_hook.offload()


class LikeMusicLDM(LikeAudioLDM2):
    """It takes no device."""

    def enable_model_cpu_offload(self, gpu_id: int = 0) -> None:
        LikeAudioLDM2.enable_model_cpu_offload(self, device=f"{DEVICE}:{gpu_id}")


@pytest.mark.parametrize("cls", [LikeAudioLDM2, LikeMusicLDM])
def test_an_override_that_hooks_parts_and_the_whole(cls: type, sim: Any, enable: Any) -> None:
    pipe = again(cls, CASES["sdxl"].build())
    offload = enable(pipe) if cls is LikeAudioLDM2 else prefetch_offload.enable(pipe, verify=True)
    assert_right("sdxl", pipe)
    assert {c.name for c in offload.stats.components} == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert on_host(pipe)
    offload.disable()
    assert not any(hasattr(m, "_hf_hook") for part in parts(pipe).values() for m in part.modules())
    pipe.to(DEVICE)
    del pipe.final_offload_hook
    assert_right("sdxl", pipe, 1)


def test_combined_pipelines_enable_their_decoder_in_every_call(sim: Any, enable: Any) -> None:
    """Kandinsky's `progress_bar` does, with no arguments."""
    pipe = CASES["kandinsky22"].build()
    offload = enable(pipe)
    expected = resident("kandinsky22", torch.float32)
    assert_same([pixels("kandinsky22", pipe, steps=2)], expected[:1])
    pipe.decoder_pipe.enable_model_cpu_offload()
    pipe.prior_pipe.enable_model_cpu_offload()
    assert_same(images_of("kandinsky22", pipe), expected)
    offload.disable()
    for one in (pipe, pipe.decoder_pipe, pipe.prior_pipe):
        assert not hooked(one) and "_prefetch_offload" not in vars(one)


ODD = ["unet->text_encoder->unet->nonsense->vae->text_encoder", "vae", "", "scheduler->unet-vae"]


@pytest.mark.parametrize("sequence", ODD)
def test_odd_sequences_are_read_as_stock_reads_them(sequence: str, sim: Any, enable: Any) -> None:
    stock, pipe = CASES["sd"].build(), CASES["sd"].build()
    stock.model_cpu_offload_seq = pipe.model_cpu_offload_seq = sequence
    stock.enable_model_cpu_offload(device=DEVICE)
    enable(pipe)
    assert [type(h.model).__name__ for h in pipe._all_hooks] == [type(h.model).__name__ for h in stock._all_hooks]
    assert [h.hook.prev_module_hook is None for h in pipe._all_hooks] == [
        h.hook.prev_module_hook is None for h in stock._all_hooks
    ]
    assert_right("sd", pipe)


# ------------------------------------------------------- what reads and patches forward
def test_signatures_are_those_of_the_authors(enable: Any) -> None:
    plain, pipe = CASES["sd"].build(), CASES["sd"].build()
    enable(pipe)
    pairs = [(getattr(pipe, n).forward, m.forward) for n, m in parts(plain).items()]
    pairs += [(pipe.vae.encode, plain.vae.encode), (pipe.vae.decode, plain.vae.decode), (pipe.__call__, plain.__call__)]
    pairs += [(type(pipe).__call__, type(plain).__call__), (type(pipe.unet).forward, type(plain.unet).forward)]
    for ours, theirs in pairs:
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__name__ == theirs.__name__
    assert pipe._get_signature_keys(pipe) == plain._get_signature_keys(plain)
    assert pipe.config == plain.config and type(pipe.unet).__qualname__ == "UNet2DConditionModel"
    assert type(pipe.unet) in (type(plain.unet),) and {type(plain.unet): 1}[type(pipe.unet)] == 1
    assert type(pipe.unet) not in (type(pipe.vae), type(plain.vae), nn.Module)


def test_a_forward_patched_before_and_after(sim: Any, enable: Any) -> None:
    """As DeepCache and the like do: on the instance, around the one that was there."""

    def patch(module: nn.Module, name: str = "forward") -> None:
        inner = getattr(module, name)

        @functools.wraps(inner)
        def patched(*args: Any, **kwargs: Any) -> Any:
            first, *rest = args
            return inner(first * 0.5, *rest, **kwargs)

        setattr(module, name, patched)

    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("sd", pipe)]
        patch(pipe.unet)
        made += [pixels("sd", pipe)]
        patch(pipe.vae, "decode")
        made += [pixels("sd", pipe)]
        return made

    found = by_stock("sd", lambda p: steps(p)[:1], sim)
    expected = CASES["sd"].build().to(DEVICE)
    truth = perform(steps, expected)
    assert differ(*truth)
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    assert_equal(perform(steps, pipe), truth)
    assert_same(found, truth[:1])
    offload.disable()
    pipe.to(DEVICE)
    assert_same([pixels("sd", pipe)], truth[2:])

    early = CASES["sd"].build()
    patch(early.unet)
    enable(early)
    assert_same([pixels("sd", early)], truth[1:2])
    assert on_host(early)


def test_a_class_patched_on_the_instance(sim: Any, enable: Any) -> None:
    """As HiDiffusion does: the model's class becomes a subclass of what it was."""
    pipe = CASES["sd"].build()
    offload = enable(pipe)

    class Halved(type(pipe.unet)):  # type: ignore[misc]
        def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(sample * 0.5, *args, **kwargs)

    plain = pixels("sd", pipe)
    pipe.unet.__class__ = Halved
    halved = pixels("sd", pipe)
    assert differ(plain, halved)
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert_same([pixels("sd", pipe)], [halved])
    offload.disable()
    assert isinstance(pipe.unet, Halved)
    pipe.to(DEVICE)
    assert_same([pixels("sd", pipe)], [halved])


def test_diffusers_cache_hooks(sim: Any, enable: Any) -> None:
    def steps(pipe: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe, steps=3)]
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        made += [pixels("flux", pipe, steps=3), pixels("flux", pipe, steps=3)]
        pipe.transformer.disable_cache()
        return [*made, pixels("flux", pipe, steps=3)]

    found = by_stock("flux", steps, sim)
    assert differ(found[0], found[1]) and found[1].tobytes() == found[2].tobytes()
    like_stock("flux", steps, sim, enable)


def test_forward_hooks_of_the_program(sim: Any, enable: Any) -> None:
    seen: list[tuple[str, str]] = []
    pipe = CASES["sd"].build()
    enable(pipe)
    pipe.unet.register_forward_hook(lambda m, args, out: seen.append(("after", next(m.parameters()).device.type)))
    pipe.unet.conv_in.register_forward_pre_hook(lambda m, args: seen.append(("in", m.weight.device.type)))
    pixels("sd", pipe)
    assert seen == [("in", DEVICE), ("after", DEVICE)]


# -------------------------------------------------------------------- other machinery
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # as with stock: the model waits on the CPU
@pytest.mark.filterwarnings("ignore:You are calling .generate")  # whose input is on the device already, as for stock
def test_generate_of_a_language_model(sim: Any, enable: Any) -> None:
    """Reaches forward only; every token is a call of it. The key-value cache lives on the device."""

    def build() -> Any:
        with _pipeline_parts.seeded(3):
            config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
            pipe = CASES["sdxl"].build()
            pipe.register_modules(image_encoder=LlamaForCausalLM(config).eval())
            return pipe

    ids = torch.tensor([[5, 9, 13]], device=DEVICE)

    def steps(pipe: Any) -> list[Any]:
        model = pipe.image_encoder
        made: list[Any] = [model.generate(ids, max_new_tokens=6, do_sample=False), pixels("sdxl", pipe)]
        made += [model(ids).logits]
        pipe.maybe_free_model_hooks()
        return [*made, pixels("sdxl", pipe)]

    stock, pipe = build(), build()
    with stock_device():
        stock.enable_model_cpu_offload(device=DEVICE)
        expected = perform(steps, stock)
    enable(pipe)
    assert_equal(perform(steps, pipe), expected)
    assert expected[0].shape == (1, 9) and on_host(pipe)


def test_a_components_manager_takes_over(sim: Any, enable: Any) -> None:
    """It strips all hooks and installs its own, which are no CpuOffload."""
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pixels("sd", pipe)
    manager = ComponentsManager()
    for name, module in parts(pipe).items():
        if name != "safety_checker":
            manager.add(name, module)
    manager.enable_auto_cpu_offload(device=DEVICE, memory_reserve_margin="0GB")
    assert not hooked(pipe) and hasattr(pipe.unet, "_hf_hook")
    assert not offload._engine.live() and not offload._engine.pins.nbytes
    out = pipe.unet(torch.ones(1, 4, 8, 8), 1, torch.ones(1, 7, 32)).sample
    assert out.device.type == DEVICE
    manager.disable_auto_cpu_offload()
    offload.disable()


def test_under_a_default_device(sim: Any, enable: Any) -> None:
    with torch.device(DEVICE):
        pipe = CASES["flux"].build()
        pipe.to("cpu")
        enable(pipe)
        assert_same(images_of("flux", pipe), images_of("flux", pipe))
    assert on_host(pipe)


def test_accelerates_function_is_stocks_outside_of_enable(sim: Any, enable: Any) -> None:
    before = accelerate.cpu_offload_with_hook
    pipe = CASES["sd"].build()
    enable(pipe)
    assert accelerate.cpu_offload_with_hook is before
    with pytest.raises(ValueError, match="index"):
        prefetch_offload.enable(CASES["sd"].build(), gpu_id=1, device=f"{DEVICE}:0")
    assert accelerate.cpu_offload_with_hook is before
    _, hook = accelerate.cpu_offload_with_hook(nn.Linear(2, 2), torch.device(DEVICE, 0))
    assert type(hook.hook) is accelerate.hooks.CpuOffload
    assert type(StableDiffusionPipeline.enable_model_cpu_offload) is type(stocked)
