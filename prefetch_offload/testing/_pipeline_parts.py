"""Parts that the small pipelines share: tokenizers, text and image encoders, autoencoders, and the last touches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT = "a photo of a cat"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The weights follow from the seed, and the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-level, one token a byte. Built from a vocabulary in memory: `from_pretrained` without a network or a cache
    gives a tokenizer of two tokens, and every prompt would look the same."""
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram over printable ASCII, with the special tokens where T5 has them (pad 0, end 1, unknown 2)."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(c), -4.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )


def clip_text(tokenizer: CLIPTokenizer, width: int = 32, layers: int = 3) -> CLIPTextModel:
    return CLIPTextModel(_clip_config(tokenizer, width, layers))


def clip_text_projected(tokenizer: CLIPTokenizer, width: int = 32, layers: int = 3) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_clip_config(tokenizer, width, layers))


def clip_vision_config(width: int = 32, layers: int = 3, image_size: int = 32, patch_size: int = 8) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )


def clip_vision(image_size: int = 32, patch_size: int = 8) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(clip_vision_config(image_size=image_size, patch_size=patch_size))


def clip_image_processor(image_size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})


def _t5_settings(width: int, layers: int) -> dict[str, Any]:
    """T5 v1.1: a gated feed-forward, and (but for UMT5) a position bias that only the first block owns."""
    return {
        "vocab_size": 98,
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def t5_text(width: int = 32, layers: int = 3) -> T5EncoderModel:
    """`shared` and `encoder.embed_tokens` are one tied parameter."""
    return T5EncoderModel(T5Config(**_t5_settings(width, layers)))


def umt5_text(width: int = 32, layers: int = 3) -> UMT5EncoderModel:
    """Tied as in T5; every block has a position bias of its own."""
    return UMT5EncoderModel(UMT5Config(**_t5_settings(width, layers)))


def vae_kl(width: int = 16, latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Two down and two up blocks, attention in the middle; latents are half the image's edge."""
    settings.setdefault("force_upcast", False)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        **settings,
    )


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names that `from_pretrained(torch_dtype=dtype)` leaves in float32: the real models are of mixed dtypes there."""
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    # transformers keeps this list for float16 only; its strict list holds for bfloat16 too.
    if isinstance(model, PreTrainedModel):
        names = names if dtype == torch.float16 else set()
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return names if dtype in (torch.float16, torch.bfloat16) else set()


@torch.no_grad()
def ready(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast as `from_pretrained` would, in eval mode, and with no parameter left constant. Casting twice is harmless.

    Fresh norms, biases and zero convolutions are constants. Two swapped copies of them, or one that never arrived,
    would not show in the image.
    """
    keep = _kept_in_fp32(model, dtype)
    done: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or id(tensor) in done:
            continue
        done.add(id(tensor))
        if isinstance(tensor, nn.Parameter) and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
        if dtype != torch.float32 and not keep.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


def finish(pipe: DiffusionPipeline, dtype: torch.dtype, as_is: tuple[str, ...] = ()) -> DiffusionPipeline:
    """`ready` for each component; those named in `as_is` stay in float32, as their users keep them."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            ready(part, torch.float32 if name in as_is else dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int) -> torch.Generator:
    """On the CPU whatever the pipeline's device, so that every device starts from the same noise."""
    return torch.Generator("cpu").manual_seed(seed)


def run(pipe: DiffusionPipeline, seed: int, inputs: dict[str, Any]) -> np.ndarray:
    """Call it and give back the images or frames, whatever the output is called."""
    output: BaseOutput = pipe(**({"output_type": "np", "generator": generator(seed)} | inputs))
    return np.asarray(output[0])


def picture(seed: int, size: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def mask(size: int = 64) -> Image.Image:
    """White, the part to repaint, in the lower half."""
    half = np.zeros((size, size), dtype=np.uint8)
    half[size // 2 :] = 255
    return Image.fromarray(half)
