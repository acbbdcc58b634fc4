"""Small image pipelines built on transformers (SD3, Flux) and of two stages (Kandinsky 2.2, Stable Cascade)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    SD3Transformer2DModel,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
    StableDiffusion3Pipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from . import _pipeline_parts as parts
from ._pipelines_sdxl import call_img2img, call_text


def _flow_vae(width: int, **settings: Any) -> Any:
    """The VAE of SD3 and Flux: a shift of the latents, no quant convolutions."""
    return parts.vae_kl(width, use_quant_conv=False, use_post_quant_conv=False, **settings)


def build_flux(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    width: int = 32,
    layers: int = 2,
    single_layers: int | None = None,
    text_width: int = 32,
    text_layers: int = 3,
    vae_width: int = 16,
    pipeline: type[DiffusionPipeline] = FluxPipeline,
) -> DiffusionPipeline:
    """CLIP and T5; a transformer of two kinds of blocks (`layers` double ones, then by default twice as many single
    ones) over packed 2x2 latents, with embedded guidance as in the dev model.

    `width` is a multiple of 16, from 256 on of 64; about 2 GB in float16 is width=1280, layers=8, text_width=1024,
    text_layers=12.
    """
    with parts.seeded(seed):
        tokenizer = parts.clip_tokenizer()
        head = 16 if width < 256 else 64
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=layers,
            num_single_layers=2 * layers if single_layers is None else single_layers,
            attention_head_dim=head,
            num_attention_heads=width // head,
            joint_attention_dim=text_width,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
        )
        pipe = pipeline(
            text_encoder=parts.clip_text(tokenizer),
            text_encoder_2=parts.t5_text(text_width, text_layers),
            tokenizer=tokenizer,
            tokenizer_2=parts.t5_tokenizer(),
            transformer=transformer,
            vae=_flow_vae(vae_width, scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
        return parts.finish(pipe, dtype)


def build_flux_img2img(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> DiffusionPipeline:
    """The VAE runs twice: `encode` before the transformer, `decode` after it."""
    return build_flux(dtype, seed, pipeline=FluxImg2ImgPipeline, **sizes)


def build_sd3(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, width: int = 32, layers: int = 4
) -> DiffusionPipeline:
    """Three text encoders, two projected CLIPs and T5, whose embeddings are padded to T5's width and joined; blocks
    with and without a second attention (3.5 medium), the last of another shape; a persistent position buffer."""
    with parts.seeded(seed):
        tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.clip_tokenizer(pad_token="!")
        transformer = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=width // 16,
            caption_projection_dim=width,
            joint_attention_dim=96,
            pooled_projection_dim=64,
            pos_embed_max_size=24,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
        pipe = StableDiffusion3Pipeline(
            text_encoder=parts.clip_text_projected(tokenizer),
            text_encoder_2=parts.clip_text_projected(tokenizer_2),
            text_encoder_3=parts.t5_text(width=96),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=parts.t5_tokenizer(),
            transformer=transformer,
            vae=_flow_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        return parts.finish(pipe, dtype)


def build_kandinsky22(dtype: torch.dtype = torch.float32, seed: int = 0) -> DiffusionPipeline:
    """Prior and decoder in one pipeline that has both as sub-pipelines over the same modules. The prior itself is
    excluded from offload; the offload sequence is not the order of execution; the decoder is a VQ model."""
    with parts.seeded(seed):
        tokenizer = parts.clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
            addition_embed_type="image",
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            resnet_time_scale_shift="scale_shift",
        )
        movq = VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=1,
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=32,
            norm_num_groups=8,
            norm_type="spatial",
        )
        prior = PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=32)
        # They scale the prior's result; a fresh model has zeros there and every image embedding would be alike.
        prior.clip_std.data.fill_(1.0)
        pipe = KandinskyV22CombinedPipeline(
            unet=unet,
            scheduler=DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
            ),
            movq=movq,
            prior_prior=prior,
            prior_image_encoder=parts.clip_vision(),
            prior_text_encoder=parts.clip_text_projected(tokenizer),
            prior_tokenizer=tokenizer,
            prior_scheduler=UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
            ),
            prior_image_processor=parts.clip_image_processor(),
        )
        return parts.finish(pipe, dtype)


def build_stable_cascade(dtype: torch.dtype = torch.float32, seed: int = 0) -> DiffusionPipeline:
    """Prior and decoder, each a pipeline with a UNet and a text encoder of its own; `enable_model_cpu_offload` of the
    combined one hands on to both. The prior's text embeddings serve both stages: the decoder's text encoder is there
    but never runs. Blocks of three kinds, and a VQ-GAN with batch norm buffers at the end."""
    with parts.seeded(seed):
        tokenizer = parts.clip_tokenizer()
        block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
        prior = StableCascadeUNet(
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 2),
            up_num_layers_per_block=(2, 1),
            block_types_per_layer=(block, block),
            clip_text_in_channels=32,
            clip_text_pooled_in_channels=32,
            clip_image_in_channels=32,
            switch_level=(False,),
            timestep_ratio_embedding_dim=16,
        )
        decoder = StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            patch_size=2,
            conditioning_dim=32,
            block_out_channels=(16, 32),
            num_attention_heads=(-1, 2),
            down_num_layers_per_block=(1, 2),
            up_num_layers_per_block=(2, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(2, 2),
            block_types_per_layer=(block[:2], block),
            clip_text_pooled_in_channels=32,
            effnet_in_channels=16,
            timestep_ratio_embedding_dim=16,
            timestep_conditioning_type=("sca",),
        )
        vqgan = PaellaVQModel(bottleneck_blocks=2, embed_dim=32, num_vq_embeddings=32)
        # Fresh, it gives black or white almost everywhere, where a difference would not show.
        vqgan.out_block[0].weight.data.mul_(0.05)
        vqgan.out_block[0].bias.data.fill_(0.5)
        pipe = StableCascadeCombinedPipeline(
            tokenizer=tokenizer,
            text_encoder=parts.clip_text_projected(tokenizer),
            decoder=decoder,
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=vqgan,
            prior_prior=prior,
            prior_text_encoder=parts.clip_text_projected(tokenizer),
            prior_tokenizer=tokenizer,
            prior_scheduler=DDPMWuerstchenScheduler(),
            prior_feature_extractor=parts.clip_image_processor(),
            prior_image_encoder=parts.clip_vision(),
        )
        return parts.finish(pipe, dtype)


def call_flux(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return call_text(pipe, seed, steps, prompt, **({"max_sequence_length": 32, "height": 32, "width": 32} | extra))


def call_flux_img2img(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    size = {"max_sequence_length": 32, "height": 64, "width": 64}
    return call_img2img(pipe, seed, steps, prompt, **(size | extra))


def call_sd3(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return call_flux(pipe, seed, steps, prompt, **extra)


def call_two_stage(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    """The prior takes two steps at least: its unCLIP scheduler divides by one less."""
    return call_text(pipe, seed, steps, prompt, **({"prior_num_inference_steps": max(steps, 2)} | extra))


def call_stable_cascade(
    pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any
) -> np.ndarray:
    """With an input image, so that the prior's image encoder runs too."""
    inputs = {"images": [parts.picture(seed)], "decoder_guidance_scale": 2.0, "height": 128, "width": 128}
    return call_two_stage(pipe, seed, steps, prompt, **(inputs | extra))
