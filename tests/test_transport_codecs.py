"""Weights that travel encoded: packed, as fp8, or as another dtype."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, plan_anew, refuse_each, settle, weight_nbytes
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN, apply_layerwise_casting
from prefetch_offload_kernels import build_table, cast_unit_reference, reference
from torch import nn

import prefetch_offload
from prefetch_offload import Quantized, SettingError, codecs
from prefetch_offload.bound import lower_bound_ms
from prefetch_offload.codecs import codec_for
from prefetch_offload.encoded import EncodedUnit
from prefetch_offload.encoding import Piece
from prefetch_offload.recorder import Recorder
from prefetch_offload.simulator import ComponentLoad, Link, Workload, simulate
from prefetch_offload.strategy import plan_call
from prefetch_offload.testing.pipelines import scaled
from prefetch_offload.units import align

PIPES = {
    "sdxl": scaled("sdxl", width=64, vae_width=8, text_width=64, text_layers=2),
    "flux": scaled("flux", width=192, layers=3, text_width=64, text_layers=2, vae_width=8),
}
INPUTS: dict[str, dict[str, int]] = {"sdxl": {"height": 16, "width": 16}, "flux": {}}
UNITS = {"unit_min": 64 << 10, "unit_max": 512 << 10}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators that stand in for the kernel take besides is as small as these models."""
    monkeypatch.setattr(reference, "_CHUNK", 32768)
    monkeypatch.setattr(reference, "_BLOCKS", 8)


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return PIPES[name].build(dtype=dtype)


def draw(name: str, pipe: Any, seed: int = 0) -> bytes:
    return np.asarray(PIPES[name].call(pipe, seed=seed, steps=2, **INPUTS[name])).tobytes()


@functools.cache
def resident(name: str, lossy: Callable[[Any], None] | None = None, dtype: torch.dtype = torch.bfloat16) -> list[bytes]:
    """Three images of the pipeline when all of it lives on the device, its weights first changed by `lossy`."""
    pipe = build(name, dtype)
    if lossy is not None:
        lossy(pipe)
    pipe = pipe.to(DEVICE)
    return [draw(name, pipe, seed) for seed in range(3)]


def weights(pipe: Any) -> list[tuple[str, torch.Tensor]]:
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return [(f"{n}.{key}", p.detach()) for n, m in modules.items() for key, p in m.named_parameters()]


def encoded_units(offload: Any) -> list[EncodedUnit]:
    units = [u for c in offload._session.client.components.values() for u in c.units]
    return [u for u in units if isinstance(u, EncodedUnit)]


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("way", ["raw", "packed"])
@pytest.mark.parametrize("name", PIPES)
def test_lossless_ways_give_the_resident_images(name: str, way: str, share: float | None, sim: Any, enable: Any) -> None:
    expected = resident(name)
    pipe = build(name)
    budget = None if share is None else int(share * weight_nbytes(pipe))
    offload = enable(pipe, transport=way, budget=budget, **UNITS)
    assert bool(encoded_units(offload)) == (way == "packed")
    for seed in range(3):
        settle(sim)
        sim.reset()
        assert draw(name, pipe, seed) == expected[seed]
        if budget is not None:
            assert sim.counters()["peak"] <= budget
    assert offload.stats.d2h_nbytes == 0


def layerwise_cast(module: nn.Module) -> set[str]:
    """Names of the parameters that diffusers' own layerwise casting makes float8, of a copy; embeddings aside."""
    cast = copy.deepcopy(module)
    if hasattr(cast, "enable_layerwise_casting"):
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    else:
        kept = tuple(rf"(^|\.){n}(\.|$)" for n in getattr(cast, "_keep_in_fp32_modules", None) or ())
        apply_layerwise_casting(cast, torch.float8_e4m3fn, torch.bfloat16, (*DEFAULT_SKIP_MODULES_PATTERN, *kept))
    embeddings = {f"{n}.weight" for n, m in cast.named_modules() if isinstance(m, nn.Embedding)}
    return {key for key, p in cast.named_parameters() if p.dtype == torch.float8_e4m3fn} - embeddings


LARGEST = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344, torch.int8: 127}


def rounded_as(pipe: Any, dtype: torch.dtype, scale: str) -> None:
    """Every weight that travels quantised, rounded as it arrives; written independently of the codec."""
    for module in pipe.components.values():
        if not isinstance(module, nn.Module):
            continue
        cast = layerwise_cast(module)
        for key, p in module.named_parameters():
            if p.dim() < 2 or p.numel() < 1024 or key not in cast:
                continue
            rows = p.detach().float().reshape(p.shape[0] if scale == "channel" else 1, -1)
            step = (rows.abs().amax(1, keepdim=True) / LARGEST[dtype]).clamp(min=2.0**-126)
            steps = rows / step
            steps = steps.round() if dtype == torch.int8 else steps.to(dtype).float()
            p.data = (steps * step).to(p.dtype).view(p.shape)


def fp8_rounded(pipe: Any) -> None:
    rounded_as(pipe, torch.float8_e4m3fn, "channel")


@pytest.mark.parametrize("share", [None, 0.4])
@pytest.mark.parametrize("name", PIPES)
def test_fp8_gives_the_images_of_the_rounded_weights(name: str, share: float | None, sim: Any, enable: Any) -> None:
    expected = resident(name, fp8_rounded)
    assert expected[0] != resident(name)[0], "or the test shows nothing"
    pipe = build(name)
    before = {key: p.clone() for key, p in weights(pipe)}
    offload = enable(pipe, transport="fp8", budget=None if share is None else int(share * weight_nbytes(pipe)), **UNITS)
    for seed in range(3):
        assert draw(name, pipe, seed) == expected[seed]
    assert offload.stats.d2h_nbytes == 0
    offload.disable()
    assert all(torch.equal(before[key], p) for key, p in weights(pipe)), "the host's weights are exact"


@pytest.mark.parametrize("way", ["raw", "packed", "fp8"])
@pytest.mark.parametrize("name", PIPES)
def test_no_more_memory_than_stock_offload(name: str, way: str, sim: Any, enable: Any) -> None:
    """What encoded weights arrive in is counted, and stock has no such thing."""
    pipe = build(name)
    pipe.enable_model_cpu_offload(device=DEVICE)
    stock = 0
    for seed in range(2):
        settle(sim)
        sim.reset()
        draw(name, pipe, seed)
        stock = max(stock, sim.counters()["peak"])
    pipe.remove_all_hooks()
    pipe.to("cpu")
    del pipe
    pipe = build(name)
    offload = enable(pipe, transport=way, budget="stock", **UNITS)
    assert bool(encoded_units(offload)) is (way != "raw")
    for seed in range(4):
        settle(sim)
        sim.reset()
        draw(name, pipe, seed % 2)
        assert sim.counters()["peak"] <= stock, f"call {seed}"
    assert not offload.stats.counts


def test_what_is_to_travel_otherwise_does_so_from_within_a_call(sim: Any, enable: Any) -> None:
    """It is no change that will be undone when the call ends: it is taken in as it is to travel, and stays so."""
    pipe = build("flux")
    ids = torch.ones(1, 77, dtype=torch.long)
    offload = enable(pipe, transport={"text_encoder": "packed"}, **UNITS)
    component = pipe.text_encoder._hf_hook.component
    with torch.no_grad(), offload.calling():
        expected = pipe.text_encoder(ids)[0].cpu()
        rejected = [u.key for u in encoded_units(offload)]
        assert rejected
        component.reject(rejected)
        offload._engine.show_masters([component])
        assert torch.equal(pipe.text_encoder(ids)[0].cpu(), expected)
        assert not component.suspended and not encoded_units(offload)
    assert not component.suspended_units and not encoded_units(offload)
    with torch.no_grad(), offload.calling():
        assert torch.equal(pipe.text_encoder(ids)[0].cpu(), expected)
    assert not encoded_units(offload)


def on_link(offload: Any) -> dict[str, int]:
    return {c.name: c.link_nbytes for c in offload.stats.components}


def test_bytes_over_the_link_and_in_host_memory_are_as_computed(sim: Any, enable: Any) -> None:
    """One call from an empty device with room for all: everything travels once."""
    pipe = build("flux")
    raw = enable(pipe, **UNITS)
    draw("flux", pipe)
    whole = raw.stats.h2d_nbytes
    assert raw.stats.pinned_nbytes >= whole
    raw.disable()
    moved = {}
    for way in ("packed", "fp8"):
        pipe = build("flux")
        offload = enable(pipe, transport=way, **UNITS)
        settle(sim)
        sim.reset()
        draw("flux", pipe)
        moved[way] = offload.stats.h2d_nbytes
        assert moved[way] == sum(on_link(offload).values()) == offload.stats.pinned_nbytes
        assert moved[way] == sim.counters()["h2d_pinned"]
        assert "travels encoded: " in offload.report() and "transformer" in offload.report().split("travels encoded: ")[1]
        offload.disable()
    assert moved["packed"] <= 0.77 * whole
    expected = able = fp8 = 0
    for c in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        module = getattr(pipe, c)
        codec = codec_for(offload.settings, c, module, torch.device(DEVICE))
        for key, t in (*module.named_parameters(), *module.named_buffers()):
            piece = Piece(key, 0, t.nbytes, t, isinstance(t, nn.Parameter))
            recipe = codec.recipe(piece) if codec is not None else None
            if recipe is not None:
                assert recipe.nbytes == t.numel() + 4 * t.shape[0] + -t.numel() % 4
                able, fp8 = able + t.nbytes, fp8 + recipe.nbytes
            expected += align(recipe.nbytes if recipe is not None else t.nbytes, 16)
    assert expected <= moved["fp8"] <= 1.02 * expected, "tied weights once; no more than alignment comes on top"
    assert able > 0.5 * whole and fp8 <= 0.51 * able


@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_masters_edited_between_calls_are_honoured(way: str, sim: Any, enable: Any) -> None:
    def edit(pipe: Any) -> None:
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.data *= 2.0  # leaves no mark
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].attn.to_k.weight.mul_(3.0)
        pipe.transformer.transformer_blocks[2].attn.to_k.weight.data = (
            pipe.transformer.transformer_blocks[2].attn.to_k.weight.data * 0.5
        )

    def edited(pipe: Any) -> None:
        edit(pipe)
        if way == "fp8":
            fp8_rounded(pipe)

    expected = resident("flux", edited)
    for share in (None, 0.4):
        pipe = build("flux")
        budget = None if share is None else int(share * weight_nbytes(pipe))
        offload = enable(pipe, transport=way, budget=budget, **UNITS)
        before = draw("flux", pipe, 1)
        encodings = [u.encodings for u in encoded_units(offload)]
        assert set(encodings) == {1}
        edit(pipe)
        assert draw("flux", pipe, 1) == expected[1] != before
        if share is not None:
            assert draw("flux", pipe, 2) == expected[2], "streamed as planned, too"
        assert sum(u.encodings > 1 for u in encoded_units(offload)) <= 3, "only what changed"
        offload.disable()
        assert draw_on_device("flux", pipe, edited=fp8_rounded if way == "fp8" else None) == expected[0]


def test_refresh_sees_what_no_fingerprint_does(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    offload = enable(pipe, transport="packed", fingerprints=False, **UNITS)
    before = draw("flux", pipe)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.data[1:9] = 4.0  # between the words that a fingerprint samples
    offload.refresh()
    after = draw("flux", pipe)
    offload.disable()
    assert after != before and after == draw_on_device("flux", pipe, None)


def draw_on_device(name: str, pipe: Any, edited: Callable[[Any], None] | None) -> bytes:
    if edited is not None:
        edited(pipe)
    return draw(name, pipe.to(DEVICE))


def test_what_is_written_on_the_device_is_taken_over(sim: Any, enable: Any) -> None:
    """In a callback, marked and unmarked; what a lossy way made of the other weights is not taken for a change."""
    pipe = build("flux")
    offload = enable(pipe, transport="fp8", **UNITS)
    before = {key: p.clone() for key, p in weights(pipe)}

    def write(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.transformer.proj_out.weight.data.zero_()
            with torch.no_grad():
                pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(0)
        return inputs

    def harmless(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs

    PIPES["flux"].call(pipe, steps=2, callback_on_step_end=harmless)
    assert offload.stats.d2h_nbytes == 0
    PIPES["flux"].call(pipe, steps=2, callback_on_step_end=write)
    changed = [key for key, p in weights(pipe) if not torch.equal(p, before[key])]
    assert sorted(changed) == ["transformer.proj_out.weight", "transformer.transformer_blocks.0.attn.to_q.weight"]
    first = draw("flux", pipe)
    offload.release()
    assert draw("flux", pipe) == first, "encoded again, it is the same"
    assert [key for key, p in weights(pipe) if not torch.equal(p, before[key])] == changed


@pytest.mark.parametrize(
    ("dtype", "stored", "too_large"),
    [
        (torch.float16, torch.float32, 1e6),
        (torch.float8_e5m2, torch.bfloat16, 1e6),
        (torch.float8_e4m3fn, torch.bfloat16, 1000.0),  # no infinity comes of it: a cast makes 448
    ],
)
def test_a_dtype_that_cannot_hold_the_weights_is_refused(
    dtype: torch.dtype, stored: torch.dtype, too_large: float, sim: Any, enable: Any
) -> None:
    name = str(dtype).removeprefix("torch.")
    pipe = build("flux", stored)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    infinite = pipe.transformer.transformer_blocks[1].attn.to_q.weight
    text = pipe.text_encoder.encoder.layers[1].mlp.fc1.weight
    with torch.no_grad():
        weight[0, :3] = too_large
        infinite[0, 0] = float("inf")  # it was infinite before
        text[1, :2] = -too_large
    told = rf"'{name}': 3 finite weights of transformer in 1 tensors .* transformer_blocks.0.attn.to_q.weight\)"
    both = rf"transport='{name}': 2 finite weights of text_encoder in 1 tensors .*mlp.fc1.weight\); .*{told} are too large"
    with pytest.raises(SettingError, match=both):
        prefetch_offload.enable(pipe, device=DEVICE, transport=dtype, **UNITS)
    assert not hasattr(pipe.transformer, "_hf_hook") and type(pipe).__name__ == "FluxPipeline"
    offload = enable(pipe, transport={"transformer": dtype}, transport_overflow=True, **UNITS)
    assert encoded_units(offload)
    draw("flux", pipe)
    arrived = {m.name: m.twin for c in offload._session.client.components.values() for m in c.masters}
    largest = 448.0 if dtype == torch.float8_e4m3fn else float("inf")
    assert arrived["transformer_blocks.0.attn.to_q.weight"].cpu()[0, :3].tolist() == [largest] * 3
    assert arrived["transformer_blocks.1.attn.to_q.weight"].cpu()[0, 0].isinf()
    del arrived
    offload.disable()
    assert float(weight.detach()[0, 0]) == torch.tensor(too_large, dtype=stored)
    if stored == torch.float32:
        offload = enable(pipe, transport=torch.bfloat16, **UNITS)  # which can
        assert encoded_units(offload)


def fp16_rounded(pipe: Any) -> None:
    for _, p in weights(pipe):
        p.copy_(p.to(torch.float16))


def test_float32_travels_as_float16(sim: Any, enable: Any) -> None:
    expected = resident("sdxl", fp16_rounded, torch.float32)
    pipe = build("sdxl", torch.float32)
    offload = enable(pipe, transport=torch.float16, **UNITS)
    assert [draw("sdxl", pipe, seed) for seed in range(3)] == expected
    stats = offload.stats
    assert sum(c.link_nbytes for c in stats.components) <= 0.52 * sum(c.nbytes for c in stats.components)
    offload.disable()
    pipe = build("sdxl", torch.float32)
    fp16_rounded(pipe)  # weights that were fp16 once: nothing is lost
    exact = [p.clone() for _, p in weights(pipe)]
    enable(pipe, transport=torch.float16, **UNITS)
    assert [draw("sdxl", pipe, seed) for seed in range(3)] == expected
    assert all(torch.equal(a, b) for a, (_, b) in zip(exact, weights(pipe), strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zip", r"='zip' is no way to move weights: give 'raw', 'packed', 'fp8', 'int8', 'auto', one of torch.float16"),
        (torch.int8, r"transport=torch.int8 is no way .* Did you mean 'int8'\?"),
        (torch.float32, r"transport=torch.float32 is no way"),
        (Quantized, r"transport=<class .*Quantized'> is no way .* This is a class: give an instance of it\."),
        ({}, r"transport={} names no component: leave it out"),
        ({"scheduler": "fp8"}, r"transport names 'scheduler', a Flow\w+, which has no weights .*, transformer"),
        (8, "transport=8 is no way"),
        (None, "transport=None is no way"),
        ({"vae": "zip"}, r"transport\['vae'\]='zip' is no way"),
        ({3: "raw"}, "3 is neither"),
        ({"vea": "fp8"}, r"transport names 'vea', .* its components are .*vae"),
    ],
)
def test_unknown_ways_are_refused(given: Any, message: str, sim: Any) -> None:
    pipe = build("flux")
    with pytest.raises(SettingError, match=message):
        prefetch_offload.enable(pipe, device=DEVICE, transport=given, **UNITS)
    assert not hasattr(pipe.transformer, "_hf_hook") and type(pipe).__name__ == "FluxPipeline"


def test_a_way_per_component_and_another_one_later(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    offload = enable(pipe, transport={"transformer": "packed", "vae": torch.float16, "default": "raw"}, **UNITS)

    def encoded() -> set[str]:
        return {u.key.split("#")[0] for u in encoded_units(offload)}

    assert encoded() == {"transformer"}, "bfloat16 is no wider than float16"
    assert [draw("flux", pipe, seed) for seed in range(3)] == resident("flux")
    enable(pipe, transport={"text_encoder": "packed"}, **UNITS)
    assert encoded() == {"text_encoder"}
    assert [draw("flux", pipe, seed) for seed in range(3)] == resident("flux")
    enable(pipe, transport="auto", **UNITS)
    assert encoded() == set(), "not measured here"
    assert [draw("flux", pipe, seed) for seed in range(3)] == resident("flux")


def test_two_pipelines_give_the_staging_buffer_back(sim: Any, enable: Any) -> None:
    pipes = [build("flux"), build("sdxl")]
    offloads = [enable(pipe, transport="packed", **UNITS) for pipe in pipes]
    engine = offloads[0]._engine
    for name, pipe in zip(("flux", "sdxl"), pipes, strict=True):
        assert draw(name, pipe) == resident(name)[0]
    assert engine.transport.staging.held_nbytes > 0
    for offload in offloads:
        offload.disable()
    assert engine.transport.staging.held_nbytes == engine.transport.staging.overhead_nbytes == 0
    assert engine.pins.nbytes == 0


def test_auto_leaves_raw_what_was_measured_to_be_slower(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this device all of it: its link takes no time, and what stands in for the kernel does."""
    monkeypatch.setattr(codecs, "MEASURED_ON", (DEVICE,))
    pipe = build("flux")
    offload = enable(pipe, transport="auto", budget=int(0.5 * weight_nbytes(pipe)), **UNITS)
    packed = len(encoded_units(offload))
    assert [draw("flux", pipe, seed) for seed in range(3)] == resident("flux")
    assert len(encoded_units(offload)) < packed // 2


def test_auto_decides_unit_by_unit(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MEASURED_ON", (DEVICE,))
    measured = Recorder.unpack_ms

    def said(recorder: Recorder) -> dict[str, dict[str, float]]:
        return {
            key: {unit: 1e6 if "single_transformer_blocks.1" in unit else 0.0 for unit in times}
            for key, times in measured(recorder).items()
        }

    monkeypatch.setattr(Recorder, "unpack_ms", said)
    pipe = build("flux")
    offload = enable(pipe, transport="auto", **UNITS)
    before = {u.key for u in encoded_units(offload)}
    assert [draw("flux", pipe, seed) for seed in range(3)] == resident("flux")
    left = {u.key for u in encoded_units(offload)}
    assert left == {u for u in before if "single_transformer_blocks.1" not in u} != before


def test_the_planner_counts_what_is_on_the_link() -> None:
    """Half the bytes over a link are as all of them over one that is twice as fast. Unpacking comes behind the last copy, and
    sets the pace where it takes longer than copying."""
    units = tuple(f"u{i}" for i in range(6))
    nbytes, compute = dict.fromkeys(units, 10_000_000), dict.fromkeys(units, 0.1)
    whole = ComponentLoad(units, nbytes, compute, 1_000_000)
    half = dataclasses.replace(whole, copy_nbytes=dict.fromkeys(units, 5_000_000))
    slow, fast, budget = Link(10.0), Link(20.0), 31_000_000

    def call(load: ComponentLoad, link: Link) -> tuple[float, float, int]:
        workload = Workload({"a": load}, (("a", 4),))
        plan = plan_call(workload, budget, link)
        return plan.prediction.call_ms, lower_bound_ms(workload, budget, link), plan.prediction.h2d_nbytes

    assert call(half, slow)[:2] == pytest.approx(call(whole, fast)[:2])
    assert 2 * call(half, slow)[2] == call(whole, fast)[2]
    came: list[float] = []
    for unpack_ms in (0.0, 0.4, 1.0):  # a copy takes 0.51
        unpacked = dataclasses.replace(half, unpack_ms=dict.fromkeys(units, unpack_ms))
        ms, bound, _ = call(unpacked, slow)
        assert call(half, slow)[1] <= bound <= ms
        came.append(simulate(Workload({"a": unpacked}, (("a", 1),)), {}, 1 << 30, slow).first_ms)
    assert came[1] - came[0] == pytest.approx(0.4), "behind the last copy"
    assert came[2] - came[0] == pytest.approx(1.0 + 5 * (1.0 - 0.51)), "each is behind the one before"
    mixed = dataclasses.replace(whole, copy_nbytes=dict.fromkeys(units[::2], 5000000))
    ms, bound, _ = call(mixed, slow)
    assert call(half, slow)[1] <= bound <= ms <= call(whole, slow)[0]


@pytest.mark.parametrize("shape", [(64, 48), (8, 40, 3, 3), (1, 2048), (2048, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_in_any_order_of_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = [t, t.transpose(0, 1).contiguous().transpose(0, 1)]
    views += [t.to(memory_format=torch.channels_last)] if t.dim() == 4 else []
    for view in views:
        piece = Piece("linear.weight", 0, t.nbytes, view, True)
        recipe = Quantized(torch.float8_e4m3fn).recipe(piece)
        assert recipe is not None
        out, back = torch.zeros(recipe.nbytes, dtype=torch.uint8), torch.zeros(t.nbytes, dtype=torch.uint8)
        recipe.write(out)
        cast_unit_reference(build_table([recipe.descriptor(0, 0)], "cpu"), out, back)
        error = (back.view(dtype).float() - piece.flat.float()).abs()
        assert (error <= piece.flat.float().abs() / 15 + t.abs().max().float() / 448 / 512).all()
    bad = t.clone()
    bad.view(-1)[7] = float("nan")
    assert Quantized(torch.float8_e4m3fn).recipe(Piece("linear.weight", 0, t.nbytes, bad, True)) is None, "it has no scale"


def test_a_refused_allocation_anywhere(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a unit, of the staging buffer, or of what the cast takes meanwhile: as many calls are saved as with raw units."""
    monkeypatch.setattr(reference, "_BLOCKS", 1)
    case = scaled("flux", width=128, layers=2, text_width=64, text_layers=2, vae_width=8)

    def draw(pipe: Any) -> bytes:
        return np.asarray(case.call(pipe, steps=1)).tobytes()

    expected = draw(case.build(dtype=torch.bfloat16).to(DEVICE))
    pipe = case.build(dtype=torch.bfloat16)
    offload = enable(pipe, transport="packed", budget=int(0.6 * weight_nbytes(pipe)), verify=False, **UNITS)
    draw(pipe)
    sim.reset()
    assert draw(pipe) == expected
    n = int(sim.counters()["allocs"])

    def attempt() -> None:
        assert draw(pipe) == expected

    saved, raised = refuse_each(sim, offload, range(0, n, n // 6), attempt, lambda _: plan_anew(offload))
    attempt()
    assert saved > 2 * raised and offload.stats.counts["ladder"] > 0


class Subclass(torch.Tensor):
    """Stands for torchao's and GGUF's: bytes do not say all that there is about it."""


def test_a_subclass_tensor_travels_as_it_is(sim: Any, enable: Any) -> None:
    def odd(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            block.attn.to_q.weight = nn.Parameter(block.attn.to_q.weight.detach().as_subclass(Subclass), requires_grad=False)

    pipe = build("flux")
    odd(pipe)
    names = {f"transformer_blocks.{i}.attn.to_q.weight" for i in range(len(pipe.transformer.transformer_blocks))}
    offload = enable(pipe, transport="packed", **UNITS)
    inside = {m.name for u in encoded_units(offload) for m in u.masters if u.key.startswith("transformer")}
    assert not inside & names and inside
    assert draw("flux", pipe) == resident("flux")[0]
    assert all(type(pipe.transformer.get_parameter(name)) is Subclass for name in names)
    assert {c.name for c in offload.stats.components if not c.pinned} == {"transformer"}
