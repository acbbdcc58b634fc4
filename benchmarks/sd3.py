"""Stable Diffusion 3 medium at full size from its published configuration, with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from prefetch_offload.testing._pipeline_parts import clip_tokenizer

from .models import filled


@torch.no_grad()
def sd3(dtype: torch.dtype = torch.float16) -> DiffusionPipeline:
    """Transformer 4.2 GB, T5-XXL 9.5 GB, CLIP 0.25 and 1.39 GB, VAE 0.17 GB in fp16."""
    tokenizer = clip_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "vocab_size": 49408}
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=192,
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        first = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                **ids,
            )
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
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=49408,  # of the stand-in tokenizer; T5's own has 32,128
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
    pipe = StableDiffusion3Pipeline(
        transformer=filled(transformer, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=filled(vae, dtype),
        text_encoder=filled(first, dtype),
        tokenizer=tokenizer,
        text_encoder_2=filled(second, dtype),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=filled(t5, dtype),
        tokenizer_3=clip_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
