"""Failing well: whatever goes wrong in a call, never a wrong image, always a working next call, nothing kept."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, refuse_each, resident, settle, weight_nbytes
from interrupts import interrupts

from prefetch_offload.testing.pipelines import CASES

CASE = CASES["flux"]
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")


def call(pipe: Any, seed: int = 0) -> np.ndarray:
    return np.asarray(CASE.call(pipe, seed=seed, steps=1))


@pytest.fixture(scope="module")
def truth(ext: Any) -> np.ndarray:
    return call(CASE.build().to("simgpu"))


class _Boom(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [_Boom, KeyboardInterrupt])
@pytest.mark.parametrize("name", COMPONENTS)
def test_exception_in_a_component(name: str, error: type, when: str, truth: Any, enable: Any) -> None:
    pipe = CASE.build()
    offload = enable(pipe)
    module = getattr(pipe, name)
    target = module.decoder if name == "vae" else module  # a forward hook fires on calls, not on decode

    def fail(*args: Any) -> None:
        raise error("in the middle")

    handle = target.register_forward_pre_hook(fail) if when == "before" else target.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        call(pipe)
    handle.remove()
    assert all(p.device.type == "cpu" for m in COMPONENTS for p in getattr(pipe, m).parameters())
    assert_same([call(pipe)], [truth])
    assert all(p.device.type == "cpu" for m in COMPONENTS for p in getattr(pipe, m).parameters())
    assert offload.stats.d2h_nbytes == 0


@pytest.mark.parametrize("budget", [None, "stock"])
def test_allocation_failures_throughout_a_call(budget: Any, truth: Any, sim: Any, enable: Any) -> None:
    pipe = CASE.build()
    offload = enable(pipe, budget=budget, unit_min=4096, unit_max=128 << 10, verify=False)
    sim.reset()
    assert_same([call(pipe)], [truth])
    first = int(sim.counters()["allocs"])
    stride = 5 if budget is None else 7

    def attempt() -> None:
        assert_same([call(pipe)], [truth])

    def again(index: int) -> None:
        if index % 7 == 0:
            attempt()

    saved, raised = refuse_each(sim, offload, range(0, first, stride), attempt, again)
    assert_same([call(pipe)], [truth])
    assert offload.stats.counts["ladder"] > 0
    # What fails inside of a component is tried again; only what fails in the pipeline's own code comes out.
    assert saved > 4 * raised


def test_running_out_of_memory_for_good_says_why(truth: Any, sim: Any, enable: Any) -> None:
    pipe = CASE.build()
    offload = enable(pipe)
    settle(sim)
    sim.configure(sim.counters()["allocated"] + (100 << 10), 0, 0, 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"prefetch_offload: .* needs .* MiB for its weights.* are free"):
        call(pipe)
    sim.configure(1 << 50, 0, 0, 0)
    assert_same([call(pipe)], [truth])
    assert offload.stats.counts["ladder"] > 0


def test_a_tight_device_is_survived_and_planned_for(truth: Any, sim: Any, enable: Any) -> None:
    """More is resident than fits together with activations: the ladder makes room, and later calls do not need it."""
    pipe = CASE.build()
    offload = enable(pipe, reserve=1)
    sim.reset()
    call(pipe)
    peak = sim.counters()["high_water"]
    offload.release()
    settle(sim)
    sim.configure(int(peak * 0.9), 0, 0, 0)
    assert_same([call(pipe)], [truth])
    assert_same([call(pipe)], [truth])
    before = offload.stats.counts.get("ladder", 0)
    assert_same([call(pipe)], [truth])
    assert offload.stats.counts.get("ladder", 0) == before
    sim.configure(1 << 50, 0, 0, 0)


@pytest.mark.parametrize("budget", [None, 0.6])
def test_what_is_free_may_lie_in_pieces_between_its_own_units(truth: Any, sim: Any, enable: Any, budget: Any) -> None:
    """Others have gone, and there is still no memory in one piece: its own units go, too, and come back one by one."""
    pipe = CASE.build()
    nbytes = None if budget is None else int(budget * weight_nbytes(pipe))
    offload = enable(pipe, budget=nbytes, unit_min=16 << 10, unit_max=64 << 10)
    for _ in range(2):
        assert_same([call(pipe)], [truth])
    own = {c.name: c.nbytes for c in offload.stats.components}["transformer"]
    engine, held = offload._engine, []

    def refuse(*args: Any) -> None:
        held.append(sum(engine.units[u].nbytes for u in engine.residency.held()))
        if len(held) <= 2:
            raise torch.OutOfMemoryError("simgpu out of memory")

    handle = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(refuse)
    assert_same([call(pipe)], [truth])
    assert offload.stats.counts["ladder"] == 2
    assert held[1] <= own and held[2] < held[1], "first the others went, then all that can come back"
    held[:] = [0, 0]
    assert_same([call(pipe)], [truth])
    handle.remove()
    assert max(held[2:]) <= held[2], "it goes on with as little as it can"
    assert_same([call(pipe)], [truth])
    assert offload.hazards == [] and offload.stats.counts["ladder"] == 2

    def never(*args: Any) -> None:
        held.append(0)
        raise torch.OutOfMemoryError("simgpu out of memory")

    held.clear()
    handle = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(never)
    with pytest.raises(torch.OutOfMemoryError):
        call(pipe)
    handle.remove()
    assert len(held) == 3
    assert_same([call(pipe)], [truth])


@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("callback", [False, True], ids=["by-hand", "in-a-call"])
def test_who_catches_it_may_try_again(truth: Any, sim: Any, enable: Any, tries: int, callback: bool) -> None:
    """Nothing is left to come back into, once the last try's weights have gone: the next call of the component loads them."""
    pipe = CASE.build()
    offload = enable(pipe, unit_min=16 << 10, unit_max=64 << 10)
    for _ in range(2):
        assert_same([call(pipe)], [truth])
    latents = torch.randn(1, pipe.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(3)).to("simgpu")
    failed = []

    def refuse(*args: Any) -> None:
        failed.append(1)
        if len(failed) <= tries:
            if len(failed) == tries:
                sim.configure(4096, 0, 0, 0)  # something else has taken the memory
            raise torch.OutOfMemoryError("simgpu out of memory")

    def decode() -> Any:
        with torch.no_grad():
            return pipe.vae.decode(latents).sample.cpu()

    def fall_back(*args: Any) -> Any:
        if not failed:  # in the first step
            with pytest.raises(torch.OutOfMemoryError):
                decode()
            sim.configure(1 << 50, 0, 0, 0)
            assert torch.equal(decode(), expected)
        return args[-1]

    expected = decode()
    handle = pipe.vae.decoder.register_forward_pre_hook(refuse)
    if callback:
        image = np.asarray(CASE.call(pipe, seed=0, steps=1, callback_on_step_end=fall_back))
        assert_same([image], [truth])
    else:
        fall_back(None)
    handle.remove()
    assert_same([call(pipe)], [truth])
    assert offload.hazards == []


@pytest.mark.parametrize("index", [1, 3, 8, 20])
def test_memory_may_run_out_while_its_own_units_go(sim: Any, enable: Any, index: int) -> None:
    """Outside of calls it is looked for what was written to them, which takes device memory."""
    pipe = CASE.build()
    enable(pipe, unit_min=16 << 10, unit_max=64 << 10)
    for _ in range(2):
        call(pipe)
    latents = torch.randn(1, pipe.vae.config.latent_channels, 8, 8).to("simgpu")
    failed = []

    def refuse(*args: Any) -> None:
        failed.append(1)
        if len(failed) <= 2:
            if len(failed) == 2:
                sim.fail_allocation(index, times=1)
            raise torch.OutOfMemoryError("simgpu out of memory")

    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample.cpu()
        handle = pipe.vae.decoder.register_forward_pre_hook(refuse)
        with contextlib.suppress(torch.OutOfMemoryError):
            assert torch.equal(pipe.vae.decode(latents).sample.cpu(), expected)
        sim.fail_allocation(-1)
        handle.remove()
        assert torch.equal(pipe.vae.decode(latents).sample.cpu(), expected)


def test_device_generator_is_restored_before_the_second_try(sim: Any, enable: Any) -> None:
    """A component that draws random numbers on the device draws the same ones again."""
    pipe = CASE.build()
    enable(pipe)
    drawn = []

    def draw(*args: Any) -> None:
        drawn.append(torch.rand(4, device="simgpu").cpu())
        if len(drawn) == 1:
            raise torch.OutOfMemoryError("simgpu out of memory")

    handle = pipe.transformer.register_forward_pre_hook(draw)
    call(pipe)
    handle.remove()
    assert len(drawn) == 2 and torch.equal(drawn[0], drawn[1])


def test_no_second_try_with_gradients(sim: Any, enable: Any) -> None:
    pipe = CASE.build()
    enable(pipe)
    tries = []

    def fail(*args: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("simgpu out of memory")

    handle = pipe.text_encoder.register_forward_pre_hook(fail)
    with torch.enable_grad(), pytest.raises(torch.OutOfMemoryError):
        pipe.text_encoder(torch.ones(1, 8, dtype=torch.long))
    handle.remove()
    assert len(tries) == 1


def test_interrupt_at_any_line(truth: Any, sim: Any, enable: Any) -> None:
    """Ctrl-C between any two lines of the engine: the call fails, the next one gives the right image."""
    pipe = CASE.build()
    offload = enable(pipe, unit_min=4096, unit_max=128 << 10, verify=False)
    call(pipe)
    for _, image in interrupts(120, lambda: call(pipe), before=offload.release):
        if image is not None:
            assert_same([image], [truth])
        assert_same([call(pipe)], [truth])
        offload._engine.residency.validate()
    assert offload.stats.d2h_nbytes == 0
    assert_same([np.asarray(CASE.call(pipe, seed=1))], [resident("flux", torch.float32)[1]])
