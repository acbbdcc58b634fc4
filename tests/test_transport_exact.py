"""What travels in fewer bytes than it is used in although nothing is lost: 32-bit weights of 16 bits, layerwise casting, an
upcast within a call."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, settle, weight_nbytes
from test_transport_codecs import PIPES, UNITS, build, draw, encoded_units, fp8_rounded, small_chunks, weights

from prefetch_offload import codecs
from prefetch_offload.codecs import Packed
from prefetch_offload.encoding import Piece
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.units import align

__all__ = ["small_chunks"]  # for every test here, too


def rounded(dtype: torch.dtype) -> Any:
    pipe = build("flux", torch.float32)
    for _, p in weights(pipe):
        p.copy_(p.to(dtype))
    return pipe


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_checkpoints_of_16_bits_in_float32_travel_as_what_they_were(dtype: torch.dtype, sim: Any, enable: Any) -> None:
    """As when a 16-bit checkpoint is loaded without a dtype: lossless, and half of the bytes."""
    expected = draw("flux", rounded(dtype).to(DEVICE))
    for share in (None, 0.5):
        pipe = rounded(dtype)
        exact = [p.clone() for _, p in weights(pipe)]
        budget = None if share is None else int(share * weight_nbytes(pipe))
        offload = enable(pipe, transport="packed", budget=budget, **UNITS)
        stats = offload.stats
        assert sum(c.link_nbytes for c in stats.components) <= 0.52 * sum(c.nbytes for c in stats.components)
        assert draw("flux", pipe) == expected
        offload.disable()
        assert all(torch.equal(a, b) for a, (_, b) in zip(exact, weights(pipe), strict=True))


def test_weights_that_need_their_32_bits_travel_whole(sim: Any, enable: Any) -> None:
    offload = enable(build("flux", torch.float32), transport="packed", **UNITS)
    assert encoded_units(offload) == []


def in_float16(pipe: Any, folder: Path, loaded: bool) -> Any:
    """Of a pipeline in float32: cast, or stored as it is and loaded as float16."""
    if not loaded:
        return pipe.to(torch.float16)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        stored = getattr(pipe, name)
        assert {p.dtype for p in stored.parameters()} == {torch.float32}
        stored.save_pretrained(folder / name)
        setattr(pipe, name, type(stored).from_pretrained(folder / name, torch_dtype=torch.float16))
    return pipe


@pytest.mark.parametrize("when", ["loaded so", "cast before enabling", "cast while enabled"])
def test_a_float32_checkpoint_that_runs_in_float16_travels_as_float16(when: str, tmp_path: Path, sim: Any, enable: Any) -> None:
    """By itself, without a transport."""
    loaded = when == "loaded so"
    truth = in_float16(build("flux", torch.float32), tmp_path, loaded).to(DEVICE)
    expected = [draw("flux", truth, seed) for seed in range(2)]
    del truth
    pipe = build("flux", torch.float32)
    nbytes = weight_nbytes(pipe)
    if when != "cast while enabled":
        in_float16(pipe, tmp_path, loaded)
    offload = enable(pipe, **UNITS)
    if when == "cast while enabled":
        draw("flux", pipe)
        pipe.to(torch.float16)
    sent = offload.stats.h2d_nbytes
    settle(sim)
    sim.reset()
    assert draw("flux", pipe) == expected[0]
    moved = offload.stats.h2d_nbytes - sent
    assert sim.counters()["h2d_pinned"] == moved, "out of pinned memory"
    assert moved == weight_nbytes(pipe) <= 0.51 * nbytes, "half, but for what transformers keeps in float32 of T5"
    assert draw("flux", pipe, 1) == expected[1]
    assert offload.stats.d2h_nbytes == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 2.0**-140, 2.0**-24, 65504.0, 65536.0, 1 + 2.0**-12])
def test_any_value_comes_back_bit_for_bit_or_travels_whole(value: float) -> None:
    t = torch.ones(64, 64)
    t[3, 5] = value
    t.view(torch.int32)[7, 7] = 0x7FC00001 if value != value else t.view(torch.int32)[7, 7]  # a NaN with a payload
    recipe = Packed().recipe(Piece("linear.weight", 0, t.nbytes, t, True))
    bits = t.view(torch.int32)
    kept = [d for d in (torch.float16, torch.bfloat16) if torch.equal(t.to(d).to(torch.float32).view(torch.int32), bits)]
    assert (recipe is not None) == bool(kept)
    if isinstance(recipe, codecs.Cast):
        out = torch.zeros(recipe.nbytes, dtype=torch.uint8)
        recipe.write(out)
        assert torch.equal(out.view(recipe.dtype).view(64, 64).to(torch.float32).view(torch.int32), bits)


def test_layerwise_casting_travels_as_the_fp8_that_it_stores(sim: Any, enable: Any) -> None:
    """By itself, without a transport: what the modules store is what moves."""

    def cast(pipe: Any) -> Any:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        return pipe

    def call(pipe: Any) -> bytes:
        return np.asarray(PIPES["flux"].call(pipe, steps=2)).tobytes()

    expected = call(cast(build("flux")).to(DEVICE))
    pipe = cast(build("flux"))
    stored = [p for p in pipe.transformer.parameters() if p.dtype == torch.float8_e4m3fn]
    own = sum(p.nbytes for p in pipe.transformer.parameters())
    assert sum(p.numel() for p in stored) > 0.5 * sum(p.numel() for p in pipe.transformer.parameters())
    offload = enable(pipe, **UNITS)
    settle(sim)
    sim.reset()
    assert call(pipe) == expected
    moved = {c.name: c.h2d_nbytes for c in offload.stats.components}
    assert own <= moved["transformer"] <= 1.02 * own, "once in the call, as stored"
    assert sim.counters()["h2d_pinned"] == sum(moved.values())
    assert offload.stats.d2h_nbytes == 0
    assert call(pipe) == expected
    packed = enable(pipe, transport="packed", **UNITS)
    assert call(pipe) == expected
    assert {c.name: c.link_nbytes for c in packed.stats.components}["transformer"] <= moved["transformer"]


# ------------------------------------------------------------------- an upcast within a call
UPCAST = CASES["sdxl-upcast"]


def picture(pipe: Any, seed: int = 0) -> bytes:
    return np.asarray(UPCAST.call(pipe, seed=seed)).tobytes()


def resident_upcast(transport: Any) -> Any:
    """The pipeline on the device, its weights as they arrive: as fp8 a VAE is rounded once, to the type that it is cast to."""
    pipe = UPCAST.build()
    if transport in ("raw", "packed"):
        return pipe.to(DEVICE)
    wide = copy.deepcopy(pipe.vae).float()
    fp8_rounded(SimpleNamespace(components={"vae": wide}))
    arriving = {key: p.detach().to(DEVICE) for key, p in wide.named_parameters()}
    if transport == "fp8":
        fp8_rounded(pipe)
    vae, stock = pipe.to(DEVICE).vae, pipe.vae.to

    def to(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        for key, p in vae.named_parameters():
            if p.dtype == torch.float32:
                p.data.copy_(arriving[key])
        return result

    vae.to = to
    return pipe


@pytest.mark.parametrize("transport", ["raw", "packed", "fp8", {"vae": "fp8"}], ids=["raw", "packed", "fp8", "vae-fp8"])
def test_a_vae_that_is_cast_up_travels_as_what_it_was(transport: Any, sim: Any, enable: Any) -> None:
    """Without prefetch, so that it moves once: as half of the bytes that it is used in, or fewer, and nothing comes back."""
    truth = resident_upcast(transport)
    expected = [picture(truth, seed) for seed in range(2)]
    del truth
    pipe = UPCAST.build()
    offload = enable(pipe, transport=transport, prefetch=False, **UNITS)
    parts = {c.name: c for c in offload.stats.components}
    narrow = sum(align(p.nbytes) for p in pipe.vae.parameters())
    assert parts["vae"].link_nbytes <= (0.75 if "fp8" in str(transport) else 1.02) * narrow
    before = {key: p.detach().clone() for key, p in pipe.vae.named_parameters()}
    sent = 0
    for seed in range(2):
        offload.release()
        settle(sim)
        sim.reset()
        assert picture(pipe, seed) == expected[seed]
        moved = {c.name: c.h2d_nbytes for c in offload.stats.components}
        assert moved["vae"] <= (seed + 1) * parts["vae"].link_nbytes
        assert sim.counters()["h2d_pinned"] == sum(moved.values()) - sent, "out of pinned memory, like all weights"
        sent = sum(moved.values())
        assert offload.stats.d2h_nbytes == 0
    assert {u.encodings for u in encoded_units(offload)} <= {1}
    assert all(torch.equal(before[key], p) and p.dtype == torch.float16 for key, p in pipe.vae.named_parameters())
    offload.disable()
    assert all(torch.equal(before[key], p) for key, p in pipe.vae.named_parameters())


@pytest.mark.parametrize("marked", [True, False])
def test_a_vae_that_was_edited_is_encoded_anew_when_it_is_cast_up(marked: bool, sim: Any, enable: Any) -> None:
    """Edited between calls, it is next loaded when it has been cast up already."""

    def images(pipe: Any, then: Any) -> list[bytes]:
        made = [picture(pipe)]
        for weight in (pipe.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_out.weight):
            if marked:
                with torch.no_grad():
                    weight.mul_(1.5)
            else:
                weight.data.mul_(1.5)
        then()
        return [*made, picture(pipe), picture(pipe)]

    pipe = UPCAST.build()
    offload = enable(pipe, transport={"vae": torch.float8_e5m2}, transport_overflow=True, **UNITS)
    made = images(pipe, offload.release)
    assert made[0] != made[1] == made[2]
    assert {u.encodings for u in encoded_units(offload)} == {1, 2} and offload.stats.d2h_nbytes == 0
    offload.disable()
    fresh = UPCAST.build()
    with torch.no_grad():
        for weight in (fresh.vae.decoder.conv_in.weight, fresh.vae.decoder.conv_out.weight):
            weight.mul_(1.5)
    other = enable(fresh, transport={"vae": torch.float8_e5m2}, transport_overflow=True, **UNITS)
    assert picture(fresh) == made[1]
    assert other.stats.d2h_nbytes == 0


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("when", ["before it is entered", "while it runs", "before it is cast back"])
def test_a_vae_that_is_written_after_it_was_cast_up(when: str, marked: bool, sim: Any, enable: Any) -> None:
    """What is written counts, in this call and after it, as on the device."""

    def scale(weight: torch.Tensor) -> None:
        if marked:
            with torch.no_grad():
                weight.mul_(1.25)
        else:
            weight.data.mul_(1.25)

    def changing(pipe: Any) -> list[bytes]:
        vae, weight = pipe.vae, lambda: pipe.vae.decoder.conv_in.weight
        stock = vae.to

        def to(*args: Any, **kwargs: Any) -> Any:
            if when == "before it is cast back" and weight().dtype == torch.float32:
                scale(weight())
            result = stock(*args, **kwargs)
            if when == "before it is entered" and weight().dtype == torch.float32:
                scale(weight())
            return result

        vae.to = to
        handle = vae.decoder.conv_in.register_forward_pre_hook(lambda *_: scale(weight()) if when == "while it runs" else None)
        made = [picture(pipe)]
        handle.remove()
        del vae.to
        return [*made, picture(pipe)]

    expected = changing(UPCAST.build().to(DEVICE))
    pipe = UPCAST.build()
    enable(pipe, **UNITS)
    picture(pipe)
    assert changing(pipe) == expected


@pytest.mark.parametrize("originals", ["file", "memory"])
@pytest.mark.parametrize("marked", [True, False])
def test_of_a_vae_that_arrived_rounded_only_what_was_written_comes_back(
    marked: bool, originals: str, sim: Any, enable: Any
) -> None:
    """The other weights stay exact, those of the same unit, too; what came back is encoded anew."""
    pipe = UPCAST.build()
    before = {key: p.detach().clone() for key, p in pipe.vae.named_parameters()}
    settings = {"transport": {"vae": "fp8"}, "originals": originals, "fingerprints": False, **UNITS}
    offload = enable(pipe, **settings)
    arrived: list[torch.Tensor] = []

    def scale(*_: Any) -> None:
        weight = pipe.vae.decoder.conv_in.weight
        arrived.append(weight.detach().cpu().clone())
        if marked:
            with torch.no_grad():
                weight.mul_(1.25)
        else:
            weight.data.mul_(1.25)

    handle = pipe.vae.decoder.conv_in.register_forward_pre_hook(scale)
    picture(pipe)
    handle.remove()
    after = {key: p.detach().clone() for key, p in pipe.vae.named_parameters()}
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["decoder.conv_in.weight"]
    assert arrived[0].dtype == torch.float32 and not torch.equal(arrived[0], before["decoder.conv_in.weight"].float())
    assert torch.equal(after["decoder.conv_in.weight"], (arrived[0] * 1.25).half())
    assert offload.stats.d2h_nbytes == after["decoder.conv_in.weight"].nbytes
    second = picture(pipe)
    other = UPCAST.build()
    other.vae.load_state_dict(after, strict=False)
    enable(other, **settings)
    assert picture(other) == second
