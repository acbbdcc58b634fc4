"""Built-in figures against the published models, built from their configurations on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.published import (
    T5_XXL,
    clip_g,
    clip_l,
    clip_l_projection,
    flux_transformer,
    sd3_transformer,
    sdxl_unet,
    t5,
    vae,
)
from prefetch_offload.config import GIB, Settings
from prefetch_offload.figures import MODELS
from prefetch_offload.masters import modules_of, tensors_of
from prefetch_offload.shapes import Block, Part, blocks_of, idle, workload_of
from prefetch_offload.units import Extent, cut, order_of_use


# ------------------------------------------------------ published configurations
def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **T5_XXL))


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
            text_config={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            tie_word_embeddings=False,
        )
    )


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(num_attention_heads=40, ffn_dim=13824, num_layers=40)


BUILDERS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "sdxl": {"text_encoder": clip_l, "text_encoder_2": clip_g, "unet": sdxl_unet, "vae": lambda: vae(4, True)},
    "sd3": {
        "text_encoder": clip_l_projection,
        "text_encoder_2": clip_g,
        "text_encoder_3": t5,
        "transformer": sd3_transformer,
        "vae": lambda: vae(16, False),
    },
    "flux": {
        "text_encoder": clip_l,
        "text_encoder_2": t5,
        "transformer": flux_transformer,
        "vae": lambda: vae(16, False),
    },
    "qwen-image": {"text_encoder": qwen_vl, "transformer": QwenImageTransformer2DModel, "vae": AutoencoderKLQwenImage},
    "wan-2.2": {"text_encoder": umt5, "transformer": wan, "transformer_2": wan, "vae": AutoencoderKLWan},
    "ltx": {"text_encoder": t5, "transformer": LTXVideoTransformer3DModel, "vae": AutoencoderKLLTXVideo},
}


def built(build: Callable[[], nn.Module], part: Part) -> tuple[tuple[Block, ...], int]:
    """The blocks that a component of these weights is cut into, and its parameters."""
    with torch.device("meta"):
        module = build().to(getattr(torch, part.dtype))
    names = {id(m): n for n, m in module.named_modules(remove_duplicate=False)}
    tensors = {
        id(t): (f"{names[id(m)]}.{key}".lstrip("."), t) for m in modules_of(module) for _, key, t in tensors_of([m])
    }
    extents = [Extent(name, t.nbytes) for name, t in tensors.values() if t.numel()]
    extents = [extents[i] for i in order_of_use([e.name for e in extents])]
    settings = Settings()
    layouts = cut(extents, settings.unit_min, settings.unit_max)
    units = [(u.name, u.nbytes, idle(part.kind, [extents[p.extent].name for p in u.placements])) for u in layouts]
    return blocks_of(units), sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", list(MODELS))
def test_units_are_those_of_the_published_model(name: str) -> None:
    assert list(BUILDERS[name]) == [p.name for p in MODELS[name].parts]
    for part in MODELS[name].parts:
        blocks, parameters = built(BUILDERS[name][part.name], part)
        sizes = [(n, b.idle) for b in part.blocks for _ in range(b.repeat) for n in b.nbytes]
        assert sizes == [(n, b.idle) for b in blocks for _ in range(b.repeat) for n in b.nbytes], part.name
        assert parameters == part.parameters, part.name


@pytest.mark.parametrize(
    ("model", "part", "billions"),
    [
        ("sdxl", "unet", 2.567),
        ("sdxl", "text_encoder", 0.123),
        ("sdxl", "text_encoder_2", 0.695),
        ("sdxl", "vae", 0.084),
        ("sd3", "transformer", 2.03),
        ("flux", "transformer", 11.90),
        ("flux", "text_encoder_2", 4.76),
        ("qwen-image", "transformer", 20.43),
        ("qwen-image", "text_encoder", 8.29),
        ("wan-2.2", "transformer", 14.29),
        ("wan-2.2", "text_encoder", 5.68),
        ("ltx", "transformer", 1.92),
    ],
)
def test_totals_are_the_published_parameter_counts(model: str, part: str, billions: float) -> None:
    found = next(p for p in MODELS[model].parts if p.name == part)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    # Buffers and alignment come on top, and one of SD3's position tables.
    assert found.total_nbytes == pytest.approx(
        found.parameters * getattr(torch, found.dtype).itemsize, rel=0.03, abs=1 << 20
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_figures_are_complete(name: str) -> None:
    model = MODELS[name]
    assert {p.kind for p in model.parts} == {"encoder", "denoiser", "decoder"}
    assert model.step_source and model.times_source
    assert sum(p.step_share for p in model.parts if p.kind == "denoiser") == pytest.approx(1)
    assert all(0 < p.activation_nbytes < 16 * GIB for p in model.parts)
    assert all(any(not b.idle for b in p.blocks) for p in model.parts)


# ------------------------------------------------------------------ shapes
def test_blocks_fold_what_repeats() -> None:
    units = [("in", 5, True), *[("a", 1, False), ("b", 2, False)] * 3, ("out", 1, False)]
    blocks = blocks_of(units)
    assert blocks == (Block("in", (5,), idle=True), Block("a", (1, 2), 3), Block("out", (1,)))
    assert [n for b in blocks for _ in range(b.repeat) for n in b.nbytes] == [n for _, n, _ in units]


def test_idle_and_busy_units_are_not_folded_together() -> None:
    units = [("a", 1, True), ("b", 1, False)] * 2
    assert [b.idle for b in blocks_of(units)] == [True, False, True, False]


def test_a_workload_has_the_times_that_were_asked_for() -> None:
    parts = (
        Part("text_encoder", "encoder", "float16", (Block("table", (4,), idle=True), Block("x", (1,), 2))),
        Part("text_encoder_2", "encoder", "float16", (Block("x", (6,)),)),
        Part("high", "denoiser", "float16", (Block("x", (10, 30)),), passes_per_step=2, step_share=0.3),
        Part("low", "denoiser", "float16", (Block("x", (10,)),), step_share=0.7),
        Part("vae", "decoder", "float16", (Block("x", (1,)),), activation_nbytes=7),
    )
    workload = workload_of(parts, 10, 100.0, 8.0, 5.0, {"denoiser": 3})
    assert workload.runs == (("text_encoder", 1), ("text_encoder_2", 1), ("high", 6), ("low", 7), ("vae", 1))
    assert workload.compute_ms == pytest.approx(8 + 10 * 100 + 5)
    assert [round(t, 6) for t in workload.components["text_encoder"].compute_ms.values()] == [0, 1, 1]
    assert [round(t, 6) for t in workload.components["high"].compute_ms.values()] == [12.5, 37.5]
    assert [c.activation_nbytes for c in workload.components.values()] == [0, 0, 3, 3, 7]


def test_two_stages_take_all_steps_each() -> None:
    parts = tuple(Part(name, "denoiser", "float16", (Block("x", (1,)),)) for name in ("prior", "decoder"))
    assert workload_of(parts, 9, 1.0, 0.0, 0.0).runs == (("prior", 9), ("decoder", 9))
