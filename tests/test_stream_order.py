"""Mutation check: without any one of the engine's waits, the checkers object. With all of them, nobody does."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, settle

import prefetch_offload
from prefetch_offload import device as lanes_module
from prefetch_offload.device import Lanes
from prefetch_offload.testing.pipelines import CASES

REASONS = {
    name: value
    for name, value in vars(lanes_module).items()
    if name.isupper() and isinstance(value, str) and not name.startswith("_")
}


def plain_call(pipe: Any, offload: Any) -> None:
    CASES["flux"].call(pipe, steps=1)


def two_streams(pipe: Any, offload: Any) -> None:
    """The text encoder runs on one stream, then on another, and then its memory is wanted back."""
    ids = torch.ones(1, 77, dtype=torch.long, device=DEVICE)
    # As a call of the pipeline: outside of one, weights are looked at on the device, and the host waits for that.
    with torch.no_grad(), offload.calling():
        pipe.text_encoder(ids)
        other = torch.Stream(device=DEVICE)
        other.wait_event(torch.accelerator.current_stream().record_event())
        with other:
            pipe.text_encoder(ids)
            offload.release()  # the memory belongs to the first stream
        torch.accelerator.current_stream().wait_event(other.record_event())


def unused_prefetch(pipe: Any, offload: Any) -> None:
    """What was prefetched while the text encoder ran is given back before anyone used it."""
    with torch.no_grad():
        pipe.text_encoder(torch.ones(1, 77, dtype=torch.long, device=DEVICE))
    offload.release()


def retired_in_flight(pipe: Any, offload: Any) -> None:
    """Masters are let go while a prefetch out of them is under way.

    On a side stream: the simulator's default stream lets the host wait for whatever it waits for.
    """
    with torch.Stream(device=DEVICE):
        unused_prefetch(pipe, offload)
        offload.disable()


def changed_on_another_stream(pipe: Any, offload: Any) -> None:
    """A weight is changed on one stream and read back on another."""

    def change(module: Any, *args: Any) -> None:
        next(module.parameters()).add_(1)

    handle = pipe.text_encoder.register_forward_hook(change)
    other = torch.Stream(device=DEVICE)
    other.wait_event(torch.accelerator.current_stream().record_event())
    with torch.no_grad(), other:
        pipe.text_encoder(torch.ones(1, 77, dtype=torch.long, device=DEVICE))
    handle.remove()
    offload.release()


ENCODED = {"transport": "fp8", "unit_min": 16 << 10, "unit_max": 64 << 10}
# reason -> (what makes the engine need it, settings)
SCENARIOS: dict[str, tuple[Callable[[Any, Any], None], dict[str, Any]]] = {
    "COPY_AFTER_ALLOCATION": (plain_call, {}),
    "USE_AFTER_COPY": (plain_call, {}),
    "FREE_AFTER_LAST_USE": (two_streams, {"prefetch": False}),
    "FREE_AFTER_UNUSED_COPY": (unused_prefetch, {}),
    "STAGE_AFTER_COPY": (plain_call, {"pin": False, "staging": 16 << 10}),
    "RETIRE_AFTER_COPY": (retired_in_flight, {}),
    "WRITE_BACK_AFTER_USE": (changed_on_another_stream, {"prefetch": False}),
    "CAST_AFTER_COPY": (plain_call, ENCODED),
    "STAGE_AFTER_CAST": (plain_call, ENCODED),
}


def test_every_reason_to_wait_has_a_scenario() -> None:
    elsewhere = {"COPY_AFTER_REUSE", "UNMAP_AFTER_USE"}  # tests/test_virtual.py
    assert set(SCENARIOS) | elsewhere == set(REASONS)


@contextlib.contextmanager
def without(reason: str | None) -> Iterator[list[str]]:
    """Waits for `reason` do nothing. Yields the reasons of all waits, to see that the scenario needs this one."""
    seen: list[str] = []
    wait, host_wait = Lanes.wait, Lanes.host_wait

    def patched(original: Callable[..., None], position: int) -> Callable[..., None]:
        def skipping(*args: Any) -> None:
            seen.append(args[position])
            if args[position] != reason:
                original(*args)

        return skipping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lanes, "wait", patched(wait, 3))
        patch.setattr(Lanes, "host_wait", patched(host_wait, 2))
        yield seen


def run(scenario: Callable[[Any, Any], None], settings: dict[str, Any]) -> tuple[list[Any], Any]:
    pipe = CASES["flux"].build()
    offload = prefetch_offload.enable(pipe, device=DEVICE, verify=True, **settings)
    engine = offload._engine
    try:
        scenario(pipe, offload)
        return offload.hazards, engine
    finally:
        offload.disable()


@pytest.fixture
def slow_link(ext: Any) -> Iterator[Any]:
    """Copies take long enough to be overtaken. Unlike `sim`, hazards are allowed here."""
    settle(ext)
    ext.reset()
    ext.configure(1 << 50, 0.002, 0.05, 0)  # slower than a busy machine, too
    yield ext
    ext.configure(1 << 50, 0, 0, 0)
    settle(ext)
    ext.reset()


def assert_quiet(scenario: Callable[[Any, Any], None], settings: dict[str, Any], reason: str, ext: Any) -> None:
    """With all waits nobody objects, and this one is among them."""
    with without(None) as seen:
        hazards, engine = run(scenario, settings)
    settle(ext)
    assert REASONS[reason] in seen, "the scenario does not need this wait"
    assert hazards == [] and engine.lanes.hazards == []
    assert ext.hazards() == [] and ext.counters()["violations"] == 0


def run_without(scenario: Callable[[Any, Any], None], settings: dict[str, Any], reason: str, ext: Any) -> Any:
    """Run without one of the waits. Returns the engine, whose checker may have objected."""
    with without(REASONS[reason]):
        pipe = CASES["flux"].build()
        offload = prefetch_offload.enable(pipe, device=DEVICE, verify=True, **settings)
        engine = offload._engine
        with contextlib.suppress(IndexError):  # an embedding may well be asked for a garbage position
            scenario(pipe, offload)
        offload.disable()
        settle(ext)
    return engine


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_reported_when_all_waits_are_there(name: str, slow_link: Any) -> None:
    assert_quiet(*SCENARIOS[name], name, slow_link)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_missing_wait_is_reported(name: str, slow_link: Any) -> None:
    engine = run_without(*SCENARIOS[name], name, slow_link)
    # our own checker, which also works on CUDA, and the simulator's
    if name != "WRITE_BACK_AFTER_USE":  # ours is not told what a model does to its weights
        assert engine.lanes.hazards, "the pure checker saw nothing"
    if name != "STAGE_AFTER_COPY":  # the simulator does not follow accesses to host memory
        assert slow_link.hazards() or slow_link.counters()["violations"], "the simulator saw nothing"


def test_the_ring_without_its_wait_gives_a_wrong_image(slow_link: Any) -> None:
    pipe = CASES["flux"].build()
    truth = np.asarray(CASES["flux"].call(CASES["flux"].build().to(DEVICE), steps=1))
    offload = prefetch_offload.enable(pipe, device=DEVICE, pin=False, staging=16 << 10)
    try:
        wrong = np.zeros(0)
        with without(REASONS["STAGE_AFTER_COPY"]), contextlib.suppress(IndexError):
            wrong = np.asarray(CASES["flux"].call(pipe, steps=1))
        offload.release()
        right = np.asarray(CASES["flux"].call(pipe, steps=1))
    finally:
        offload.disable()
    assert wrong.tobytes() != truth.tobytes()
    assert right.tobytes() == truth.tobytes()
    gc.collect()
