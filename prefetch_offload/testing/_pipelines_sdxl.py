"""Small UNet image pipelines: Stable Diffusion, and SDXL with its relatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from . import _pipeline_parts as parts

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _sdxl_blocks(width: int, layers: int, text_width: int) -> dict[str, Any]:
    """What the UNet and its ControlNet have in common. Heads grow with the width, as in the real one."""
    return {
        "in_channels": 4,
        "block_out_channels": (width, 2 * width),
        "layers_per_block": layers,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, max(4, width // 32)),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * text_width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + text_width,
        "norm_num_groups": 8,
    }


def _sdxl_unet(width: int, layers: int, text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        out_channels=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **_sdxl_blocks(width, layers, text_width),
    )


def build_sdxl(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    width: int = 24,
    layers: int = 2,
    text_width: int = 32,
    text_layers: int = 3,
    vae_width: int = 16,
    force_upcast: bool = False,
    pipeline: type[DiffusionPipeline] = StableDiffusionXLPipeline,
    **components: Any,
) -> DiffusionPipeline:
    """Two CLIP text encoders (the second projected), a UNet whose time embedding takes the pooled text, a VAE.

    Bytes grow with the square of `width` (the UNet) and of `text_width`; about 2 GB in float16 is width=704,
    text_width=768, text_layers=12. `components` go to the pipeline class as they are.
    """
    with parts.seeded(seed):
        tokenizer, tokenizer_2 = parts.clip_tokenizer(), parts.clip_tokenizer(pad_token="!")
        pipe = pipeline(
            text_encoder=parts.clip_text(tokenizer, text_width, text_layers),
            text_encoder_2=parts.clip_text_projected(tokenizer_2, text_width, text_layers),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_sdxl_unet(width, layers, text_width),
            vae=parts.vae_kl(vae_width, scaling_factor=0.13025, force_upcast=force_upcast),
            scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),
            **components,
        )
        return parts.finish(pipe, dtype)


def build_sdxl_img2img(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> DiffusionPipeline:
    """The VAE runs twice: `encode` before the UNet, `decode` after it."""
    return build_sdxl(dtype, seed, pipeline=StableDiffusionXLImg2ImgPipeline, **sizes)


def build_sdxl_inpaint(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> DiffusionPipeline:
    """The VAE runs three times: it encodes the image and the masked image, and decodes."""
    return build_sdxl(dtype, seed, pipeline=StableDiffusionXLInpaintPipeline, **sizes)


def build_sdxl_upcast(dtype: torch.dtype = torch.float16, seed: int = 0, **sizes: Any) -> DiffusionPipeline:
    """`force_upcast`: in float16 the pipeline casts its VAE to float32 before `decode` and back after it, in the call.
    In other dtypes it runs like plain SDXL, so the default here is float16."""
    return build_sdxl(dtype, seed, force_upcast=True, **sizes)


def build_sdxl_controlnet(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    width: int = 24,
    layers: int = 2,
    text_width: int = 32,
    **sizes: Any,
) -> DiffusionPipeline:
    """The ControlNet is not in the offload sequence but is offloaded, and takes turns with the UNet in every step."""
    with parts.seeded(seed + 1):
        controlnet = ControlNetModel(
            # One halving, to the latents' size.
            conditioning_embedding_out_channels=(16, 32),
            **_sdxl_blocks(width, layers, text_width),
        )
    return build_sdxl(
        dtype,
        seed,
        width=width,
        layers=layers,
        text_width=text_width,
        pipeline=StableDiffusionXLControlNetPipeline,
        controlnet=controlnet,
        **sizes,
    )


def _ip_adapter_state_dict(unet: UNet2DConditionModel, image_width: int) -> dict[str, dict[str, torch.Tensor]]:
    """The plain IP-Adapter's file: one projection to four tokens, and keys and values for each cross-attention."""
    cross = unet.config.cross_attention_dim
    attention: dict[str, torch.Tensor] = {}
    crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for place, name in enumerate(crossing):
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            # Odd numbers: in the original file the even ones are the self-attentions.
            attention[f"{2 * place + 1}.{part}.weight"] = torch.randn(inner, cross) * cross**-0.5
    projection = {
        "proj.weight": torch.randn(4 * cross, image_width) * image_width**-0.5,
        "proj.bias": torch.randn(4 * cross) * 0.02,
        "norm.weight": 1 + torch.randn(cross) * 0.02,
        "norm.bias": torch.randn(cross) * 0.02,
    }
    return {"image_proj": projection, "ip_adapter": attention}


def build_sdxl_ip_adapter(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> DiffusionPipeline:
    """An image encoder runs before the UNet; attention processors with weights of their own are part of the UNet."""
    with parts.seeded(seed + 1):
        pipe = build_sdxl(
            dtype, seed, image_encoder=parts.clip_vision(), feature_extractor=parts.clip_image_processor(), **sizes
        )
        state_dict = _ip_adapter_state_dict(pipe.unet, pipe.image_encoder.config.projection_dim)
        pipe.load_ip_adapter(state_dict, subfolder="", weight_name="")
        return parts.finish(pipe, dtype)


def build_sd(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, width: int = 24, layers: int = 2, text_width: int = 32
) -> DiffusionPipeline:
    """The safety checker is not in the offload sequence and is excluded from offload: stock leaves it on the device."""
    with parts.seeded(seed):
        tokenizer = parts.clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(width, 2 * width),
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        vision = parts.clip_vision_config()
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=32))
        pipe = StableDiffusionPipeline(
            text_encoder=parts.clip_text(tokenizer, text_width),
            tokenizer=tokenizer,
            unet=unet,
            vae=parts.vae_kl(scaling_factor=0.18215),
            scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False),
            safety_checker=checker,
            feature_extractor=parts.clip_image_processor(),
        )
        parts.finish(pipe, dtype)
        # A cosine is at most one, so the checker runs but never blacks out the image, which would hide a difference.
        checker.concept_embeds_weights.data.fill_(2.0)
        checker.special_care_embeds_weights.data.fill_(2.0)
        return pipe


def call_text(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return parts.run(pipe, seed, {"prompt": prompt, "num_inference_steps": steps, "height": 64, "width": 64} | extra)


def call_sd(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return call_text(pipe, seed, steps, prompt, **({"height": 32, "width": 32} | extra))


def call_img2img(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    """Strength one half of twice the steps: `steps` of them run."""
    inputs = {"prompt": prompt, "image": parts.picture(seed), "strength": 0.5, "num_inference_steps": 2 * steps}
    return parts.run(pipe, seed, inputs | extra)


def call_inpaint(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    inputs = {"mask_image": parts.mask(), "height": 64, "width": 64}
    return call_img2img(pipe, seed, steps, prompt, **(inputs | extra))


def call_controlnet(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return call_text(pipe, seed, steps, prompt, **({"image": parts.picture(seed)} | extra))


def call_ip_adapter(pipe: Any, seed: int = 0, steps: int = 2, prompt: str = parts.PROMPT, **extra: Any) -> np.ndarray:
    return call_text(pipe, seed, steps, prompt, **({"ip_adapter_image": parts.picture(seed)} | extra))
