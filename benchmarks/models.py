"""Pipelines at full size from their published configurations, with random weights: latency does not depend on the values."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prefetch_offload.testing._pipeline_parts import clip_tokenizer


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module made on the meta device, with host memory of `dtype` and seeded values: matrices small, norms one."""
    module = module.to(dtype).to_empty(device="cpu").eval()
    generator = torch.Generator("cpu").manual_seed(0)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))  # position ids
        elif tensor.dim() > 1:
            # One block of noise, repeated: filling 2.6e9 numbers one by one would take minutes.
            block = torch.empty(min(tensor.numel(), 1 << 20)).normal_(0, 0.02, generator=generator).to(dtype)
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
        else:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


@torch.no_grad()
def sdxl(dtype: torch.dtype = torch.float16) -> DiffusionPipeline:
    """Stable Diffusion XL base 1.0: UNet 5.14 GB, text encoders 0.25 and 1.39 GB, VAE 0.17 GB in fp16."""
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 49408}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        first = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids)
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
                **ids,
            )
        )
    pipe = StableDiffusionXLPipeline(
        text_encoder=filled(first, dtype),
        text_encoder_2=filled(second, dtype),
        tokenizer=tokenizer,
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
    pipe.set_progress_bar_config(disable=True)
    return pipe
