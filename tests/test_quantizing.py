"""Which weights lose something in transport, and how much: the layers of layerwise casting, overflow, scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from conftest import DEVICE, weight_nbytes
from diffusers.hooks import layerwise_casting
from diffusers.hooks._common import _GO_LC_SUPPORTED_PYTORCH_LAYERS
from prefetch_offload_kernels import build_table, cast_unit_reference
from test_transport_codecs import (
    LARGEST,
    UNITS,
    build,
    draw,
    encoded_units,
    layerwise_cast,
    resident,
    rounded_as,
    small_chunks,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from prefetch_offload import Quantized, SettingError, quantizing
from prefetch_offload.codecs import Packed, codec_for
from prefetch_offload.config import Settings
from prefetch_offload.encoding import Piece
from prefetch_offload.quantizing import Narrowed

__all__ = ["small_chunks"]  # the fixture, for these tests too

TEXT = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 64, "d_kv": 16, "vocab_size": 100}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "wan": lambda: diffusers.WanTransformer3DModel(num_layers=2),
    "ltx": lambda: diffusers.LTXVideoTransformer3DModel(num_layers=2),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(num_layers=2),
    "sana": lambda: diffusers.SanaTransformer2DModel(num_layers=1),
    "flux": lambda: diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1),
    "sdxl": lambda: diffusers.UNet2DConditionModel(cross_attention_dim=2048),
    "hunyuan": lambda: diffusers.HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1),
    "t5": lambda: T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **TEXT)),
    "umt5": lambda: UMT5EncoderModel(UMT5Config(**TEXT)),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(num_hidden_layers=1)),
}
STAY = {  # of each, some that a rule by names alone gets wrong
    "wan": ("scale_shift_table", "blocks.0.scale_shift_table", "condition_embedder.time_embedder.linear_1.weight"),
    "ltx": ("scale_shift_table", "transformer_blocks.0.scale_shift_table"),
    "pixart": ("scale_shift_table", "adaln_single.linear.weight"),
    "sana": ("scale_shift_table", "transformer_blocks.0.scale_shift_table"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight"),
    "umt5": ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",),
    "clip": ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),
}
TRAVEL = {
    "flux": ("context_embedder.weight", "x_embedder.weight", "time_text_embed.timestep_embedder.linear_1.weight"),
    "sdxl": ("time_embedding.linear_1.weight", "conv_in.weight"),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight",),
}


def rounded_names(model: nn.Module, way: Any = "fp8") -> set[str]:
    """What travels as 8 bits, if its values allow it."""
    codec = codec_for(Settings.make(transport=way), "model", model, torch.device("cpu"))
    assert isinstance(codec, Quantized | Narrowed)
    names = set()
    for key, p in model.named_parameters():
        like = torch.empty_strided(p.shape, p.stride(), dtype=torch.bfloat16, device="meta")
        piece = Piece(key, 0, like.nbytes, like, True)
        if codec.least_nbytes(piece) < piece.nbytes:
            names.add(key)
    return names


@pytest.mark.parametrize("way", ["fp8", "int8", torch.float8_e5m2, Quantized(torch.float8_e4m3fn, "tensor")])
@pytest.mark.parametrize("name", MODELS)
def test_the_layers_are_those_of_layerwise_casting(name: str, way: Any) -> None:
    """Of these, all matrices that are not small and no embeddings."""
    with torch.device("meta"):
        model = MODELS[name]()
    ours = rounded_names(model, way)
    large = {key for key, p in model.named_parameters() if p.dim() > 1 and p.numel() >= 1024}
    assert ours == layerwise_cast(model) & large
    assert not ours & set(STAY.get(name, ())) and large >= set(STAY.get(name, ()))
    assert ours >= set(TRAVEL.get(name, ())) and ours
    norms = {f"{n}.weight" for n, m in model.named_modules() if "Norm" in type(m).__name__}
    assert norms and not ours & norms


def test_the_rule_is_that_of_this_diffusers() -> None:
    assert set(quantizing.CASTABLE) == set(_GO_LC_SUPPORTED_PYTORCH_LAYERS) - {nn.Embedding}
    assert set(quantizing.SKIPPED) >= set(layerwise_casting.DEFAULT_SKIP_MODULES_PATTERN)


def test_what_peft_adds_stays_and_what_it_wraps_travels() -> None:
    from peft import LoraConfig

    model = build("flux").transformer
    before = rounded_names(model)
    model.add_adapter(LoraConfig(r=32, target_modules=["to_q"]))
    after = rounded_names(model)
    assert before == {key.replace("base_layer.", "") for key in after}
    assert any("base_layer" in key for key in after) and not any("lora_" in key for key in after)


def test_compiled_modules_go_by_their_own_names() -> None:
    model = build("flux").transformer
    before = rounded_names(model)
    assert {key.replace("_orig_mod.", "") for key in rounded_names(torch.compile(model, backend="eager"))} == before
    model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")
    inside = rounded_names(model)
    assert {key.replace("_orig_mod.", "") for key in inside} == before and any("_orig_mod" in key for key in inside)


def test_a_matrix_tied_to_an_embedding_stays() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))
    assert rounded_names(model) == {"0.weight", "2.weight"}
    model[0].weight = model[1].weight
    assert rounded_names(model) == {"2.weight"}


# ------------------------------------------------------------------------------------------------------------ overflow
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_overflow_is_counted_over_all_patterns(dtype: torch.dtype, source: torch.dtype) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(source)
    finite = patterns[patterns.isfinite()]
    # As if it had one exponent more: e4m3fn's 448 is followed by 480, and 464, between them, is even with the former.
    beyond = finite.double().abs() > 464 if dtype == torch.float8_e4m3fn else finite.to(dtype).float().isinf()
    assert quantizing.overflows(patterns, dtype) == int(beyond.sum())
    for value, too_large in zip(finite[::31], beyond[::31], strict=True):
        assert quantizing.overflows(value.view(1), dtype) == int(too_large)


@pytest.mark.parametrize(
    ("dtype", "tie", "at_the_tie"),
    [
        (torch.float16, 65520.0, 1),
        (torch.bfloat16, 2.0**128 - 2.0**119, 1),
        (torch.float8_e5m2, 61440.0, 1),
        (torch.float8_e4m3fn, 464.0, 0),
    ],
)
def test_halfway_to_the_next_one(dtype: torch.dtype, tie: float, at_the_tie: int) -> None:
    exact = torch.tensor([tie, -tie])
    below, above = exact.nextafter(torch.zeros(2)), exact.nextafter(exact * math.inf)
    counts = [quantizing.overflows(t, dtype) for t in (below, exact, above)]
    assert counts == [0, 2 * at_the_tie, 2]
    if dtype != torch.float8_e4m3fn:
        assert [int(t.to(dtype).isinf().sum()) for t in (below, exact, above)] == counts
    assert quantizing.overflows(torch.tensor([math.inf, math.nan]), dtype) == 0, "they were no numbers before"


@pytest.mark.parametrize("overflow", [False, True])
def test_infinities_travel_raw_where_the_dtype_has_none(overflow: bool) -> None:
    t = torch.ones(64, 64, dtype=torch.bfloat16)
    t[0, 0] = -math.inf
    piece = Piece("linear.weight", 0, t.nbytes, t, True)
    assert Narrowed(torch.float8_e4m3fn, overflow).recipe(piece) is None
    assert Narrowed(torch.float8_e5m2, overflow).recipe(piece) is not None
    t[0, 0] = math.nan
    assert Narrowed(torch.float8_e4m3fn, overflow).recipe(piece) is not None, "NaN it has"


# ------------------------------------------------------------------------------------------------------------- scales
KINDS = [(dtype, scale) for dtype in LARGEST for scale in ("channel", "tensor")]


def arrive(codec: Any, piece: Piece) -> torch.Tensor:
    recipe = codec.recipe(piece)
    out, back = torch.full((recipe.nbytes,), 7, dtype=torch.uint8), torch.zeros(piece.nbytes, dtype=torch.uint8)
    recipe.write(out)
    cast_unit_reference(build_table([recipe.descriptor(0, 0)], "cpu"), out, back)
    return back.view(piece.flat.dtype)


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize(("dtype", "scale"), KINDS)
def test_images_are_those_of_the_rounded_weights(dtype: Any, scale: Any, share: float | None, sim: Any, enable: Any) -> None:
    def rounded(pipe: Any) -> None:
        rounded_as(pipe, dtype, scale)

    expected = resident("flux", rounded)
    assert expected[0] != resident("flux")[0], "or the test shows nothing"
    pipe = build("flux")
    budget = None if share is None else int(share * weight_nbytes(pipe))
    offload = enable(pipe, transport=Quantized(dtype, scale=scale), budget=budget, **UNITS)
    assert encoded_units(offload)
    assert [draw("flux", pipe, seed) for seed in range(3)] == expected
    if scale == "channel" and share is None and dtype != torch.float8_e5m2:
        before = [u.key for u in encoded_units(offload)]
        enable(pipe, transport="int8" if dtype == torch.int8 else "fp8", **UNITS)
        assert draw("flux", pipe) == expected[0]
        assert len([u.key for u in encoded_units(offload)]) == len(before)


@pytest.mark.parametrize(("dtype", "scale"), KINDS)
def test_the_largest_weight_arrives_as_it_was(dtype: Any, scale: Any) -> None:
    """Of each channel, or of the tensor, up to what the scale itself is rounded by; of the largest numbers, too."""
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        largest = torch.finfo(stored).max
        for top in (largest, 1.0, largest * (1 - 2.0**-8)):
            t = torch.full((64, 64), top / 4, dtype=torch.float64).to(stored)
            t[:, 5] = torch.tensor([-top, top] * 32, dtype=torch.float64).to(stored)
            t[3] = 0
            back = arrive(Quantized(dtype, scale), Piece("linear.weight", 0, t.nbytes, t, True)).view(64, 64)
            assert back.isfinite().all() and not back[3].any()
            ratio = back[:, 5].double()[t[:, 5] != 0] / t[:, 5].double()[t[:, 5] != 0]
            assert (ratio - 1).abs().max() <= max(2.0**-22, torch.finfo(stored).eps / 2)


def test_what_has_no_scale_travels_raw() -> None:
    for bad in (math.inf, math.nan):
        t = torch.ones(64, 64)
        t[1, 1] = bad
        for dtype, scale in KINDS:
            assert Quantized(dtype, scale).recipe(Piece("linear.weight", 0, t.nbytes, t, True)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.int4,), r"Quantized\(torch.int4\): give one of torch.float8_e4m3fn, torch.float8_e5m2, torch.int8"),
        ((torch.float16,), r"Quantized\(torch.float16\): give one of"),
        ((torch.int8, "row"), r"Quantized\(..., scale='row'\): give 'channel' or 'tensor'"),
    ],
)
def test_other_kinds_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Quantized(*arguments)


def test_packing_goes_where_the_accelerator_is() -> None:
    """Asked without a GPU: nothing is computed here."""
    for way, there in (("packed", "cuda"), ("auto", "cuda"), ("packed", DEVICE), ("packed", "cpu")):
        device = torch.device(there, 1) if there == "cuda" else torch.device(there)
        codec = codec_for(Settings.make(transport=way), "vae", nn.Linear(4, 4), device)
        assert isinstance(codec, Packed)
        assert codec.device == (device if there == "cuda" else None)
    assert codec_for(Settings.make(transport="auto"), "vae", nn.Linear(4, 4), torch.device("cpu")) is None
