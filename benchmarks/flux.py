"""Flux.1 dev at full size from its published configuration, with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from prefetch_offload.testing._pipeline_parts import clip_tokenizer

from .models import filled


@torch.no_grad()
def flux(
    dtype: torch.dtype = torch.bfloat16, layers: int = 19, single_layers: int = 38, text_layers: int = 24
) -> DiffusionPipeline:
    """Transformer 23.8 GB, T5-XXL 9.5 GB, CLIP 0.25 GB, VAE 0.17 GB in bf16; fewer layers for a trial."""
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 49408}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids)
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=49408,  # of the stand-in tokenizer; T5's own has 32,128
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=text_layers,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=filled(clip, dtype),
        tokenizer=tokenizer,
        text_encoder_2=filled(t5, dtype),
        tokenizer_2=clip_tokenizer(),
        transformer=filled(transformer, dtype),
        vae=filled(vae, dtype),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
