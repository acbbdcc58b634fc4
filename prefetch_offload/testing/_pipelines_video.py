"""Small video pipelines: Wan 2.2, LTX, CogVideoX, Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from . import _pipeline_parts as parts


def _wan_transformer(width: int, layers: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=16,
        out_channels=16,
        num_attention_heads=width // 12,
        attention_head_dim=12,
        num_layers=layers,
        ffn_dim=2 * width,
        text_dim=32,
        freq_dim=32,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def build_wan(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, width: int = 48, layers: int = 3
) -> DiffusionPipeline:
    """Wan 2.2: two transformers, one for high noise and one for low, so the denoiser changes in mid-call; UMT5.

    In half precision each transformer is of two dtypes (time embedding, norms and tables stay in float32, as
    `from_pretrained` leaves them) and the VAE is in float32. The VAE decodes frame by frame with a cache of features.
    """
    with parts.seeded(seed):
        pipe = WanPipeline(
            tokenizer=parts.t5_tokenizer(),
            text_encoder=parts.umt5_text(),
            transformer=_wan_transformer(width, layers),
            transformer_2=_wan_transformer(width, layers),
            vae=AutoencoderKLWan(
                base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
            ),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            boundary_ratio=0.875,
        )
        return parts.finish(pipe, dtype, as_is=("vae",))


def build_ltx(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, width: int = 32, layers: int = 3
) -> DiffusionPipeline:
    """T5, a transformer over unpatched latents, and a VAE that takes a timestep (0.9.1), scaled by a parameter without
    dimensions. The pipeline reads the VAE's latent statistics, which are buffers, before the VAE runs."""
    with parts.seeded(seed):
        vae = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=(1,) * 5,
            decoder_block_out_channels=(16, 32, 64),
            decoder_layers_per_block=(1, 1, 2, 2),
            decoder_spatio_temporal_scaling=(True,) * 3,
            decoder_inject_noise=(False,) * 4,
            upsample_residual=(True,) * 3,
            upsample_factor=(2,) * 3,
            timestep_conditioning=True,
        )
        # Fresh statistics are zeros and ones; true ones make a buffer that did not arrive show.
        vae.latents_mean.normal_(std=0.1)
        vae.latents_std.uniform_(0.8, 1.2)
        pipe = LTXPipeline(
            tokenizer=parts.t5_tokenizer(),
            text_encoder=parts.t5_text(),
            transformer=LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=width // 4,
                cross_attention_dim=width,
                num_layers=layers,
                caption_channels=32,
            ),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
        return parts.finish(pipe, dtype)


def build_cogvideox(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, width: int = 32, layers: int = 3
) -> DiffusionPipeline:
    """T5, a transformer with rotary positions and adaptive norms in every block, a causal 3D VAE with caches."""
    with parts.seeded(seed):
        pipe = CogVideoXPipeline(
            tokenizer=parts.t5_tokenizer(),
            text_encoder=parts.t5_text(),
            transformer=CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=width // 2,
                in_channels=4,
                out_channels=4,
                time_embed_dim=16,
                text_embed_dim=32,
                num_layers=layers,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                max_text_seq_length=32,
                use_rotary_positional_embeddings=True,
            ),
            vae=AutoencoderKLCogVideoX(
                block_out_channels=(8, 16, 16, 16),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                temporal_compression_ratio=4,
            ),
            scheduler=CogVideoXDDIMScheduler(),
        )
        return parts.finish(pipe, dtype)


def build_svd(dtype: torch.dtype = torch.float32, seed: int = 0, *, layers: int = 1) -> DiffusionPipeline:
    """Image to video: image encoder and VAE `encode`, a UNet with spatial and temporal blocks, then a temporal
    `decode` in chunks. In float16 the VAE is cast to float32 for `encode` and back, in the call."""
    with parts.seeded(seed):
        unet = UNetSpatioTemporalConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            cross_attention_dim=32,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        )
        pipe = StableVideoDiffusionPipeline(
            # The pipeline resizes its image to 224, whatever the encoder.
            image_encoder=parts.clip_vision(image_size=224, patch_size=32),
            feature_extractor=parts.clip_image_processor(224),
            unet=unet,
            vae=AutoencoderKLTemporalDecoder(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D",) * 2,
                layers_per_block=2,
                latent_channels=4,
            ),
            scheduler=EulerDiscreteScheduler(
                prediction_type="v_prediction",
                interpolation_type="linear",
                sigma_max=700.0,
                sigma_min=0.002,
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
        )
        return parts.finish(pipe, dtype)


def _call(
    frames: int, size: int, pipe: Any, seed: int, steps: int, prompt: str, settings: dict, extra: dict
) -> np.ndarray:
    inputs = {"prompt": prompt, "num_inference_steps": steps, "num_frames": frames, "height": size, "width": size}
    return parts.run(pipe, seed, inputs | {"max_sequence_length": 32} | settings | extra)


def call_wan(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    """From two steps on, both transformers run."""
    return _call(5, 32, pipe, seed, steps, prompt, {}, extra)


def call_ltx(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return _call(9, 64, pipe, seed, steps, prompt, {"decode_timestep": 0.05, "decode_noise_scale": 0.025}, extra)


def call_cogvideox(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return _call(9, 64, pipe, seed, steps, prompt, {}, extra)


def call_svd(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    """No text encoder: `prompt` only chooses the input picture."""
    image = parts.picture(seed + sum(prompt.encode()), size=32)
    inputs = {"image": image, "num_frames": 3, "decode_chunk_size": 2, "height": 32, "width": 32}
    return parts.run(pipe, seed, inputs | {"num_inference_steps": steps} | extra)
