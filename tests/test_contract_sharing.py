"""Components that several pipelines use, that are replaced, dropped, or go away with their pipeline."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident, settle
from contracts import (
    BUDGETS,
    assert_equal,
    assert_right,
    differ,
    hooked,
    on_host,
    parts,
    perform,
    pixels,
    state,
    stock_device,
    stocked,
)
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    MultiControlNetModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
)
from torch import nn

from prefetch_offload.registry import engines
from prefetch_offload.testing import _pipeline_parts
from prefetch_offload.testing.pipelines import CASES

PICTURE = _pipeline_parts.picture(0, size=32)


def redraw(pipe: Any, seed: int = 0) -> np.ndarray:
    """An image-to-image call."""
    pipe.set_progress_bar_config(disable=True)
    size = {"max_sequence_length": 32, "height": 32, "width": 32} if isinstance(pipe, FluxImg2ImgPipeline) else {}
    noise = torch.Generator().manual_seed(seed)
    return pipe(
        "a cat", image=PICTURE, strength=0.5, num_inference_steps=2, output_type="np", generator=noise, **size
    ).images


def either(name: str, steps: Any, sim: Any, enable: Any, settings: Any = None, **sizes: Any) -> tuple[Any, Any]:
    """`steps(pipe, offload, *)` where `offload(other)` enables another pipeline in the way that `pipe` is enabled."""
    with stock_device():
        stock = stocked(name, **sizes)
        expected = perform(lambda p: steps(p, lambda other: other.enable_model_cpu_offload(device=DEVICE)), stock)
    del stock
    settle(sim)
    pipe = CASES[name].build(**sizes)
    offload = enable(pipe, **(settings or {}))
    assert_equal(perform(lambda p: steps(p, functools.partial(enable, **(settings or {}))), pipe), expected)
    return pipe, offload


# ------------------------------------------------------------------------ from_pipe
@pytest.mark.parametrize("settings", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "enabled"])
@pytest.mark.parametrize(("name", "cls"), [("sd", StableDiffusionImg2ImgPipeline), ("flux", FluxImg2ImgPipeline)])
def test_from_pipe(
    settings: Any, name: str, cls: type[DiffusionPipeline], enabled: bool, sim: Any, enable: Any
) -> None:
    """The new pipeline shares all modules. It is cast to fp32 unless told otherwise: here, from bf16."""

    def steps(pipe: Any, offload: Any) -> list[Any]:
        made: list[Any] = [pixels(name, pipe)]
        other = cls.from_pipe(pipe)
        assert {id(m) for m in parts(other).values()} == {id(m) for m in parts(pipe).values()}
        if enabled:
            offload(other)
        made += [
            str(other.dtype),
            redraw(other),
            pixels(name, pipe),
            redraw(other, 1),
            redraw(other, 2),
            pixels(name, pipe),
        ]
        pipe.maybe_free_model_hooks()
        return [*made, state(pipe.vae), [next(m.parameters()).dtype for m in parts(pipe).values()]]

    pipe, offload = either(name, steps, sim, enable, settings, dtype=torch.bfloat16)
    assert on_host(pipe)
    assert offload.stats.d2h_nbytes == 0


def test_from_pipe_keeps_the_dtype_when_told(sim: Any, enable: Any) -> None:
    def steps(pipe: Any, offload: Any) -> list[Any]:
        made: list[Any] = [pixels("flux", pipe)]
        other = AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=torch.bfloat16)
        offload(other)
        back = FluxPipeline.from_pipe(other, torch_dtype=torch.bfloat16)
        return [*made, type(other).__name__, redraw(other), pixels("flux", pipe), pixels("flux", back), str(back.dtype)]

    _, offload = either("flux", steps, sim, enable, dtype=torch.bfloat16)
    assert offload.stats.d2h_nbytes == 0


def test_two_pipelines_that_share_and_alternate(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    first = enable(pipe)
    pinned = first._engine.pins.nbytes
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    truth = StableDiffusionImg2ImgPipeline(**CASES["sd"].build().to(DEVICE).components)
    expected, redrawn = resident("sd", torch.float32), [redraw(truth, seed) for seed in (0, 1)]
    del truth
    second = enable(other)
    assert second._engine is first._engine and first._engine.pins.nbytes == pinned, "no master is pinned twice"
    copied = []
    for seed in (0, 1):
        before = first.stats.h2d_nbytes
        assert_same([np.asarray(CASES["sd"].call(pipe, seed=seed))], [expected[seed]])
        assert_same([redraw(other, seed)], [redrawn[seed]])
        copied.append(first.stats.h2d_nbytes - before)
        assert on_host(pipe) and on_host(other)
    assert copied[1] == 0, "what one has brought in, the other uses"
    assert len(pipe._all_hooks) == len(other._all_hooks) == 3
    second.disable()
    assert_same(images_of("sd", pipe), expected)
    assert on_host(pipe) and set(hooked(pipe)) == {"text_encoder", "unet", "vae"}
    enable(other)
    assert_same(images_of("sd", pipe), expected)
    first.disable()
    assert_same([redraw(other)], redrawn[:1])
    assert on_host(other) and set(hooked(other)) == {"text_encoder", "unet", "vae"}


def test_a_stock_pipeline_that_shares_takes_the_hooks_and_gives_them_back(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    enable(pipe)
    other = StableDiffusionPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = resident("sd", torch.float32)
    with stock_device():
        other.enable_model_cpu_offload(device=DEVICE)
        for seed in (0, 1):
            assert_same([np.asarray(CASES["sd"].call(other, seed=seed))], [expected[seed]])
            assert_same([np.asarray(CASES["sd"].call(pipe, seed=seed))], [expected[seed]])
            assert on_host(pipe)
            assert len(pipe._all_hooks) == 3
    other.remove_all_hooks()


def test_one_unet_in_two_pipelines(sim: Any, enable: Any) -> None:
    one, two = CASES["sd"].build(), CASES["sd"].build(seed=1)
    two.unet = one.unet
    expected = [np.asarray(CASES["sd"].call(p.to(DEVICE))) for p in (one, two)]
    for pipe in (one, two):
        pipe.to("cpu")
    first, second = enable(one), enable(two)
    for _ in range(2):
        assert_same([np.asarray(CASES["sd"].call(p)) for p in (one, two)], expected)
    first.disable()
    assert hooked(two).keys() == {"text_encoder", "unet", "vae"} and not hooked(one).keys() - {"unet"}
    assert_same([np.asarray(CASES["sd"].call(two))], expected[1:])
    second.disable()
    assert not hooked(one) and not hooked(two)


# ------------------------------------------------------------------------- replaced
def test_a_component_replaced_on_the_pipeline(sim: Any, enable: Any) -> None:
    def steps(pipe: Any, offload: Any) -> list[Any]:
        made: list[Any] = [pixels("sd", pipe)]
        pipe.unet = CASES["sd"].build(seed=5).unet
        made += [pixels("sd", pipe), pixels("sd", pipe)]
        pipe.register_modules(vae=CASES["sd"].build(seed=6).vae.to(DEVICE))
        made += [pixels("sd", pipe), pixels("sd", pipe, seed=1)]
        names = {id(m): n for n, m in parts(pipe).items()}
        chain = [names[id(h.hook.prev_module_hook.model)] if h.hook.prev_module_hook else None for h in pipe._all_hooks]
        return [*made, [names[id(h.model)] for h in pipe._all_hooks], chain]

    pipe, offload = either("sd", steps, sim, enable)
    assert on_host(pipe)
    assert offload.stats.d2h_nbytes == 0
    assert {c.name for c in offload.stats.components} == {"text_encoder", "unet", "vae"}


@pytest.mark.parametrize("bound", [False, True], ids=["between", "within"])
def test_the_old_component_is_freed(bound: bool, sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pixels("sd", pipe)
    pinned = offload._engine.pins.nbytes
    if bound:
        pipe.unet._hf_hook.pre_forward(pipe.unet)
    old = weakref.ref(pipe.unet)
    weight = weakref.ref(pipe.unet.conv_in.weight)
    pipe.unet = CASES["sd"].build(seed=5).unet
    gc.collect()
    assert old() is None and weight() is None
    assert offload._engine.pins.nbytes == pinned
    assert len(offload._engine.live()) == 3
    kept = CASES["sd"].build(seed=7).unet
    pipe.unet = kept
    pixels("sd", pipe)
    pipe.unet = CASES["sd"].build().unet
    assert not hasattr(kept, "_hf_hook") and type(kept).__name__ == type(kept).__qualname__ == "UNet2DConditionModel"
    assert all(p.device.type == "cpu" for p in kept.parameters())
    assert_right("sd", pipe)


def test_a_component_set_to_none(sim: Any, enable: Any) -> None:
    def steps(pipe: Any, offload: Any) -> list[Any]:
        embeds, pooled, _ = pipe.encode_prompt("a cat", None, torch.device(DEVICE), max_sequence_length=32)
        pipe.text_encoder = pipe.text_encoder_2 = None
        given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        made: list[Any] = [pixels("flux", pipe, **given), pixels("flux", pipe, **given, seed=1)]
        return [*made, len(pipe._all_hooks), sorted(parts(pipe))]

    pipe, offload = either("flux", steps, sim, enable)
    gc.collect()
    assert len(offload._engine.live()) == 2, "their memory is given back"
    assert on_host(pipe)


# ----------------------------------------------------------------------- going away
def _one_and_both() -> tuple[Any, Any]:
    """A pipeline with a ControlNet, and one with that and a second one, of the same other components."""
    one, other = CASES["sdxl-controlnet"].build(), CASES["sdxl-controlnet"].build(seed=5)
    nets = MultiControlNetModel([one.controlnet, other.controlnet])
    both = StableDiffusionXLControlNetPipeline(**{**one.components, "controlnet": nets})
    both.set_progress_bar_config(disable=True)
    return one, both


def _pixels_of_both(pipe: Any) -> np.ndarray:
    image = _pipeline_parts.picture(0)
    return pixels("sdxl-controlnet", pipe, image=[image, image], controlnet_conditioning_scale=[1.0, 0.5])


@pytest.mark.parametrize("first", [0, 1], ids=["alone first", "both first"])
@pytest.mark.parametrize("leaves", [0, 1], ids=["the first leaves", "the second leaves"])
def test_a_component_that_is_part_of_another_pipelines(leaves: int, first: int, sim: Any, enable: Any) -> None:
    """One ControlNet in a pipeline of its own and, beside another one, in a second pipeline."""
    plain = [p.to(DEVICE) for p in _one_and_both()]
    run = (functools.partial(pixels, "sdxl-controlnet"), _pixels_of_both)
    truth = [f(p) for f, p in zip(run, plain, strict=True)]
    del plain
    pipes = _one_and_both()
    offloads: list[Any] = [enable(pipes[first]), enable(pipes[1 - first])]
    if first:
        offloads.reverse()
    for _ in range(2):
        assert_same([f(p) for f, p in zip(run, pipes, strict=True)], truth)
    offloads[leaves].disable()
    assert_same([run[1 - leaves](pipes[1 - leaves])], [truth[1 - leaves]])
    offloads[1 - leaves].disable()
    for pipe in pipes:
        assert not any(hasattr(m, "_hf_hook") for p in parts(pipe).values() for m in p.modules())
    for i in (0, 1):
        assert_same([run[i](pipes[i].to(DEVICE))], [truth[i]])
        pipes[i].to("cpu")


def test_a_shallow_copy_is_a_pipeline_of_its_own(sim: Any, enable: Any) -> None:
    """As servers make one for each request, with a scheduler of its own."""
    pipe = CASES["flux"].build()
    offload = enable(pipe)
    assert_right("flux", pipe, 1)
    twin = copy.copy(pipe)
    assert type(twin).__name__ == "FluxPipeline" and twin._prefetch_offload is not offload
    assert all(twin.components[n] is m for n, m in parts(pipe).items())
    for one in (twin, pipe, twin):
        assert_right("flux", one)
        assert on_host(one)
    offload.disable()
    assert_right("flux", twin)
    again = copy.copy(pipe)  # of one that is not enabled: stock's
    assert "_prefetch_offload" not in vars(again) and type(again) is FluxPipeline
    twin._prefetch_offload.disable()


def test_a_component_that_was_none_for_a_while(sim: Any, enable: Any) -> None:
    """It is offloaded again at once: a component may be used before the next call."""
    plain = CASES["flux"].build().to(DEVICE)
    pipe = CASES["flux"].build()
    enable(pipe)
    kept, pipe.text_encoder = pipe.text_encoder, None
    pipe.text_encoder = kept
    with torch.no_grad():
        assert_equal(*[[*p.encode_prompt("a cat", None, max_sequence_length=32)[:2]] for p in (pipe, plain)])
    assert "text_encoder" in hooked(pipe)
    pipe.watermark = nn.Linear(2, 2)  # is none
    assert not hasattr(pipe.watermark, "_hf_hook")
    assert_right("flux", pipe)


@pytest.mark.parametrize("keep_handle", [False, True])
@pytest.mark.parametrize("state_", ["fresh", "called", "bound", "failed"])
def test_a_collected_pipeline_gives_everything_back(state_: str, keep_handle: bool, sim: Any) -> None:
    import prefetch_offload

    pipe = CASES["flux"].build()
    handle: Any = prefetch_offload.enable(pipe, device=DEVICE, verify=True)
    if state_ != "fresh":
        pixels("flux", pipe)
    if state_ == "bound":
        pipe.transformer._hf_hook.pre_forward(pipe.transformer)
    if state_ == "failed":
        with pytest.raises(TypeError):
            pipe(nonsense=1)
    alive = weakref.ref(pipe.transformer)
    if not keep_handle:
        handle = None
    del pipe
    gc.collect()
    assert alive() is None
    settle(sim)
    for engine in engines.values():
        assert not engine.live() and not engine.pins.nbytes and not engine.residency.held_nbytes
    assert sim.counters()["pinned"] == 0
    if handle is not None:
        assert "gone" in repr(handle)
        handle.report()
        handle.disable()


def test_one_of_two_sharing_pipelines_is_collected(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    enable(pipe)
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    enable(other)
    redraw(other)
    del other
    gc.collect()
    assert_right("sd", pipe)
    assert on_host(pipe)


# -------------------------------------------------------------------------- threads
def test_two_pipelines_in_two_threads(sim: Any, enable: Any) -> None:
    names = ("flux", "sd")
    pipes = {name: CASES[name].build() for name in names}
    expected = {name: resident(name, torch.float32) for name in names}
    for pipe in pipes.values():
        enable(pipe)
    found: dict[str, Any] = {}
    together = threading.Barrier(2)

    def work(name: str) -> None:
        together.wait(60)
        found[name] = [images_of(name, pipes[name]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(n,)) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for name in names:
        for images in found[name]:
            assert_same(images, expected[name])
        assert on_host(pipes[name])


def test_a_call_of_another_pipeline_inside_a_call(sim: Any, enable: Any) -> None:
    outer, inner = CASES["sd"].build(), CASES["flux"].build()
    enable(outer)
    enable(inner)
    drawn = []

    def draw(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        drawn.append(np.asarray(CASES["flux"].call(inner, seed=step)))
        return inputs

    image = pixels("sd", outer, steps=2, callback_on_step_end=draw)
    assert_same([image], resident("sd", torch.float32)[:1])
    assert_same(drawn, resident("flux", torch.float32)[:2])
    assert differ(*drawn) and on_host(outer) and on_host(inner)


def test_a_component_that_outlives_its_pipeline(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    image = pixels("sd", pipe)
    vae = pipe.vae
    latents = torch.ones(1, 4, 8, 8, device=DEVICE)
    with torch.no_grad():
        expected = vae.decode(latents).sample.cpu()
    pipe.maybe_free_model_hooks()
    del pipe
    gc.collect()
    with torch.no_grad():
        assert torch.equal(vae.decode(latents).sample.cpu(), expected)
    offload.disable()
    assert not hasattr(vae, "_hf_hook") and all(p.device.type == "cpu" for p in vae.parameters())
    assert offload._engine.live() == [], "what its hook's chain kept alive, as stock's does, has gone, too"
    assert image.shape == (1, 32, 32, 3)
