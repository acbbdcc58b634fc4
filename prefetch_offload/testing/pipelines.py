"""Small but structurally true diffusers pipelines, with random weights and no download.

`CASES[name].build(dtype, seed)` builds one on the CPU, `CASES[name].call(pipe, seed, steps)` runs it. Both follow from
their seed alone, so two ways of running a pipeline on one device must give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from . import _pipelines_image as image
from . import _pipelines_sdxl as sdxl
from . import _pipelines_video as video


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline, how to build it and how to call it. Further keywords of `build` are sizes (see the builders), those
    of `call` go to the pipeline's `__call__`."""

    name: str
    build: Callable[..., DiffusionPipeline]
    call: Callable[..., np.ndarray | torch.Tensor]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("sdxl", sdxl.build_sdxl, sdxl.call_text),
        Case("sdxl-img2img", sdxl.build_sdxl_img2img, sdxl.call_img2img),
        Case("sdxl-inpaint", sdxl.build_sdxl_inpaint, sdxl.call_inpaint),
        Case("sdxl-controlnet", sdxl.build_sdxl_controlnet, sdxl.call_controlnet),
        Case("sdxl-ip-adapter", sdxl.build_sdxl_ip_adapter, sdxl.call_ip_adapter),
        Case("sdxl-upcast", sdxl.build_sdxl_upcast, sdxl.call_sd),
        Case("sd", sdxl.build_sd, sdxl.call_sd),
        Case("sd3", image.build_sd3, image.call_sd3),
        Case("flux", image.build_flux, image.call_flux),
        Case("flux-img2img", image.build_flux_img2img, image.call_flux_img2img),
        Case("wan", video.build_wan, video.call_wan),
        Case("ltx", video.build_ltx, video.call_ltx),
        Case("cogvideox", video.build_cogvideox, video.call_cogvideox),
        Case("svd", video.build_svd, video.call_svd),
        Case("kandinsky22", image.build_kandinsky22, image.call_two_stage),
        Case("stable-cascade", image.build_stable_cascade, image.call_stable_cascade),
    )
}


def scaled(name: str, **sizes: Any) -> Case:
    """The same case in another size, as `scaled("sdxl", width=128, layers=2)`."""
    case = CASES[name]
    return dataclasses.replace(case, build=functools.partial(case.build, **sizes))


_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_LORA_CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def lora_state_dict(
    pipe: DiffusionPipeline, rank: int = 4, seed: int = 0, *, text_encoders: bool = False, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """A LoRA for the attention layers of `pipe`'s denoiser, for `pipe.load_lora_weights`.

    Its B matrices are not zero as they are before training, so the image changes. With `text_encoders` it also has
    matrices for the CLIP text encoders.
    """
    parts = {name: _LORA_TARGETS for name in ("unet", "transformer") if getattr(pipe, name, None) is not None}
    if text_encoders:
        clips = (CLIPTextModel, CLIPTextModelWithProjection)
        parts |= {name: _LORA_CLIP_TARGETS for name, part in pipe.components.items() if isinstance(part, clips)}
    noise = torch.Generator("cpu").manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for part, targets in parts.items():
        for name, layer in getattr(pipe, part).named_modules():
            if not isinstance(layer, nn.Linear) or not name.endswith(targets):
                continue
            shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
            for matrix, shape in shapes.items():
                value = torch.randn(shape, generator=noise) * scale * shape[1] ** -0.5
                weights[f"{part}.{name}.{matrix}.weight"] = value.to(layer.weight.dtype)
    return weights
