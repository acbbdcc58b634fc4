"""Pipelines at full size from their published configurations, with random weights: latency does not depend on the values."""

from __future__ import annotations

import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

from prefetch_offload.testing._pipeline_parts import clip_tokenizer

from . import published

VOCABULARY = 49408  # of the stand-in tokenizer, in place of T5's own of 32,128


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module made on the meta device, with host memory of `dtype` and seeded values: matrices small, norms one."""
    module = module.to(dtype).to_empty(device="cpu").eval()
    # One block of noise, over and over: drawing 2.6e9 numbers one by one would take minutes.
    noise = torch.empty(1 << 20).normal_(0, 0.02, generator=torch.Generator("cpu").manual_seed(0)).to(dtype)
    for number, (name, tensor) in enumerate([*module.named_parameters(), *module.named_buffers()]):
        if not tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))  # position ids
        elif tensor.dim() > 1:
            block = noise.roll(101 * number)  # no two tensors alike
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def token_ids() -> dict[str, int]:
    """What a text encoder has to know of the stand-in tokenizer."""
    tokenizer = clip_tokenizer()
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": VOCABULARY}


def silent(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sdxl(dtype: torch.dtype = torch.float16) -> DiffusionPipeline:
    """Stable Diffusion XL base 1.0: UNet 5.14 GB, text encoders 0.25 and 1.39 GB, VAE 0.17 GB in fp16."""
    ids = token_ids()
    with torch.device("meta"):
        unet = published.sdxl_unet()
        vae = published.vae(4, True, sample_size=1024, scaling_factor=0.13025, force_upcast=True)
        first, second = published.clip_l(**ids), published.clip_g(**ids)
    return silent(
        StableDiffusionXLPipeline(
            text_encoder=filled(first, dtype),
            text_encoder_2=filled(second, dtype),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(pad_token="!"),
            unet=filled(unet, dtype),
            vae=filled(vae, dtype),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
        )
    )


@torch.no_grad()
def sd3(dtype: torch.dtype = torch.float16) -> DiffusionPipeline:
    """Stable Diffusion 3 medium: transformer 4.2 GB, T5-XXL 9.5 GB, CLIP 0.25 and 1.39 GB, VAE 0.17 GB in fp16."""
    ids = token_ids()
    with torch.device("meta"):
        transformer = published.sd3_transformer()
        vae = published.vae(16, False, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609)
        first, second = published.clip_l_projection(**ids), published.clip_g(**ids)
        third = published.t5(vocab_size=VOCABULARY, is_encoder_decoder=False, use_cache=False)
    return silent(
        StableDiffusion3Pipeline(
            transformer=filled(transformer, dtype),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=filled(vae, dtype),
            text_encoder=filled(first, dtype),
            tokenizer=clip_tokenizer(),
            text_encoder_2=filled(second, dtype),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=filled(third, dtype),
            tokenizer_3=clip_tokenizer(),
        )
    )


@torch.no_grad()
def flux(
    dtype: torch.dtype = torch.bfloat16, layers: int = 19, single_layers: int = 38, text_layers: int = 24
) -> DiffusionPipeline:
    """Flux.1 dev: transformer 23.8 GB, T5-XXL 9.5 GB, CLIP 0.25 GB, VAE 0.17 GB in bf16; fewer layers for a trial."""
    with torch.device("meta"):
        transformer = published.flux_transformer(num_layers=layers, num_single_layers=single_layers)
        vae = published.vae(16, False, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159)
        clip = published.clip_l(**token_ids())
        t5 = published.t5(vocab_size=VOCABULARY, num_layers=text_layers, is_encoder_decoder=False, use_cache=False)
    return silent(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=filled(clip, dtype),
            tokenizer=clip_tokenizer(),
            text_encoder_2=filled(t5, dtype),
            tokenizer_2=clip_tokenizer(),
            transformer=filled(transformer, dtype),
            vae=filled(vae, dtype),
        )
    )


PIPELINES = {"sdxl": sdxl, "sd3": sd3, "flux": flux}
