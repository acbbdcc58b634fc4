"""What can go wrong while weights travel encoded: writes without a mark, interrupts, a wait that is left out, no room."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, settle, weight_nbytes
from interrupts import interrupts
from prefetch_offload_kernels import reference
from test_stream_order import SCENARIOS, assert_quiet, run_without, slow_link, unused_prefetch
from test_transport_codecs import PIPES, UNITS, build, draw, encoded_units, small_chunks
from torch import nn

import prefetch_offload
from prefetch_offload import BudgetError, codecs, transport
from prefetch_offload.adoption import least_of
from prefetch_offload.codecs import codec_for
from prefetch_offload.config import Settings
from prefetch_offload.encoded import EncodedUnit
from prefetch_offload.host import Pins
from prefetch_offload.testing.pipelines import scaled

__all__ = ["slow_link", "small_chunks"]  # for every test here, too

SHARE = 0.4
CASE = scaled("flux", width=96, layers=2, text_width=48, text_layers=2, vae_width=8)


def draw_with(pipe: Any, write: Callable[[Any], None], steps: int = 3) -> bytes:
    """A call with a callback that writes after the first step."""

    def callback(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            write(pipe)
        return inputs

    return np.asarray(PIPES["flux"].call(pipe, steps=steps, callback_on_step_end=callback)).tobytes()


def scale_without_a_mark(pipe: Any) -> None:
    """Some weights of every block: units that are there, that were there, and that have yet to come."""
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.attn.to_q.weight.data.mul_(4.0)


@pytest.mark.parametrize("originals", ["file", "memory"])
def test_unmarked_writes_of_a_callback_to_streamed_units(originals: str, sim: Any, enable: Any) -> None:
    expected = draw_with(build("flux").to(DEVICE), scale_without_a_mark)
    pipe = build("flux")
    assert expected != draw_with(pipe.to(DEVICE), lambda pipe: None), "or the test shows nothing"
    pipe = build("flux")
    before = {key: p.detach().clone() for key, p in pipe.transformer.named_parameters()}
    enable(pipe, transport="packed", budget=int(SHARE * weight_nbytes(pipe)), originals=originals, **UNITS)
    draw("flux", pipe)
    draw("flux", pipe)
    assert draw_with(pipe, scale_without_a_mark) == expected
    after = dict(pipe.transformer.named_parameters())
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith("attn.to_q.weight")}
    assert all(torch.equal(before[key] * 4.0, after[key]) for key in changed)


@pytest.mark.parametrize("originals", ["file", "memory"])
def test_unmarked_writes_by_hand_between_passes_of_a_streamed_component(originals: str, sim: Any, enable: Any) -> None:
    """Called by hand, and streaming: what is written between two passes, on the device or on the host, counts in the next."""
    tokens = torch.arange(9, device=DEVICE)[None]

    def perform(pipe: Any) -> list[torch.Tensor]:
        encoder = pipe.text_encoder_2
        made = []
        with torch.no_grad():
            for _ in range(3):
                made.append(encoder(tokens)[0].cpu())
                for block in encoder.encoder.block:
                    block.layer[0].SelfAttention.q.weight.data.mul_(3.0)
        return made

    case = scaled("flux", width=48, layers=1, text_width=192, text_layers=6, vae_width=8)
    expected = perform(case.build(dtype=torch.bfloat16).to(DEVICE))
    pipe = case.build(dtype=torch.bfloat16)
    nbytes = sum(p.nbytes for p in pipe.text_encoder_2.parameters())
    offload = enable(pipe, transport="packed", budget=int(0.8 * nbytes), originals=originals, **UNITS)
    component = next(c for c in offload._session.client.components.values() if c.name == "text_encoder_2")
    made = perform(pipe)
    assert component.stream is not None and component.stream.window is not None, "it streams"
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert not torch.equal(made[0], made[1]) and offload.stats.d2h_nbytes > 0


# ------------------------------------------------------------------------------- interrupts
def test_an_interrupt_at_any_line(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between any two lines, with weights to encode anew among what is under way: never a wrong image after it."""
    monkeypatch.setattr(reference, "_BLOCKS", 1)
    pipe, plain = CASE.build(dtype=torch.bfloat16), CASE.build(dtype=torch.bfloat16).to(DEVICE)
    offload = enable(pipe, transport="packed", budget=int(0.75 * weight_nbytes(pipe)), verify=False, **UNITS)

    def call(pipe: Any) -> bytes:
        return np.asarray(CASE.call(pipe, steps=1)).tobytes()

    def negate(pipe: Any) -> None:
        with torch.no_grad():
            for block in pipe.transformer.transformer_blocks:
                block.attn.to_q.weight.neg_()

    expected = []
    for _ in range(2):
        expected.append(call(plain))
        negate(plain)
    assert [call(pipe), call(pipe)] == expected[:1] * 2 and expected[0] != expected[1]
    turn = 0

    def other_weights() -> None:
        nonlocal turn
        offload.release()
        negate(pipe)
        turn = 1 - turn

    for number, image in interrupts(20, lambda: call(pipe), before=other_weights):
        assert image in (None, expected[turn])
        assert call(pipe) == expected[turn], number
        offload._engine.residency.validate()
    assert offload.stats.d2h_nbytes == 0
    assert set(offload._engine.transport.staging._units) == {u.key for u in encoded_units(offload)}
    del plain


STEPS_OF_ENCODING = ["pin", "sample", "write", "descriptor"]


@pytest.mark.parametrize("originals", ["file", "memory"])
@pytest.mark.parametrize("step", STEPS_OF_ENCODING)
def test_what_was_encoded_half_is_encoded_again(
    step: str, originals: str, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of encoding, in a call in which units have been looked at before."""
    pipe = CASE.build(dtype=torch.bfloat16)
    offload = enable(pipe, transport="packed", originals=originals, **UNITS)
    before = np.asarray(CASE.call(pipe, steps=1)).tobytes()
    pipe.transformer.proj_out.weight.data.mul_(2.0)
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.data.mul_(2.0)
    offload.release()
    owner = {"pin": Pins, "sample": EncodedUnit, "write": codecs._Packing, "descriptor": codecs._Packing}[step]
    stock, armed = getattr(owner, step), [True]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        if armed.pop() if armed else False:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        CASE.call(pipe, steps=1)
    (torn,) = {u.key for u in encoded_units(offload) if u.dirty} or {""}
    engine = offload._engine
    engine._sampled |= {u.key for u in encoded_units(offload)}  # as units are that streamed before in the call
    with engine._held(), engine._change:
        for unit in encoded_units(offload):
            if unit.key == torn:
                assert unit.outdated(look=False), "what is half done is done again, whoever asks"
    after = np.asarray(CASE.call(pipe, steps=1)).tobytes()
    offload.disable()
    assert before != after == np.asarray(CASE.call(pipe.to(DEVICE), steps=1)).tobytes()


# ------------------------------------------------------------------------------ order on the device
def encoded_anew_in_flight(pipe: Any, offload: Any) -> None:
    """What a prefetch copies out of is replaced, since the weights were written."""
    with torch.Stream(device=DEVICE):
        unused_prefetch(pipe, offload)
        with torch.no_grad():
            for p in pipe.text_encoder_2.parameters():
                p.mul_(2.0)
        pipe.text_encoder_2(torch.ones(1, 77, dtype=torch.long, device=DEVICE))
        offload.release()


ENCODED: dict[str, tuple[Callable[[Any, Any], None], dict[str, Any], str]] = {
    **{name: (*scenario, name) for name, scenario in SCENARIOS.items()},
    "encoded anew": (encoded_anew_in_flight, {}, "RETIRE_AFTER_COPY"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_every_wait_of_encoded_units_is_needed(name: str, slow_link: Any) -> None:
    """With all waits nobody objects; without one of them our own checker does, or the simulator's."""
    scenario, settings, reason = ENCODED[name]
    settings = {**settings, "transport": torch.float16}
    assert_quiet(scenario, settings, reason, slow_link)
    engine = run_without(scenario, settings, reason, slow_link)
    assert engine.lanes.hazards or slow_link.hazards() or slow_link.counters()["violations"]


# ------------------------------------------------------------------------------------- the budget
@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_a_budget_without_room_to_arrive_in_is_refused(way: str, sim: Any, enable: Any) -> None:
    pipe = build("flux")
    settings = {"transport": way, **UNITS}
    least = [
        least_of(m, Settings.make(**settings), codec_for(Settings.make(**settings), n, m, torch.device("cpu")))
        for n, m in pipe.components.items()
        if isinstance(m, nn.Module)
    ]
    weights = max(one.weights_nbytes for one in least)
    payloads = sorted((n for one in least for n in one.payloads_nbytes), reverse=True)
    needed = weights + sum(payloads[:2]) + sum(one.tables_nbytes for one in least)
    assert needed > weights + (100 << 10)
    with pytest.raises(BudgetError, match=rf"take {weights} bytes .* at once, and what encoded weights arrive in \d+ bytes"):
        prefetch_offload.enable(pipe, device=DEVICE, budget=needed - 1, **settings)
    assert not hasattr(pipe.transformer, "_hf_hook")
    offload = enable(pipe, budget=needed, **settings)
    transport = offload._engine.transport
    assert needed - weights <= transport.staging.overhead_nbytes, "a call needs no less"
    raw = enable(build("flux"), budget=needed - 1, **UNITS)
    assert raw.budget == needed - 1


WIDE = scaled("flux", width=320, layers=2, text_width=64, text_layers=2, vae_width=8)


def assert_within(budget: int, sim: Any, pipe: Any, offload: Any) -> None:
    """Three calls, and no more device memory held for encoded units than is counted."""
    transport = offload._engine.transport
    for _ in range(3):
        settle(sim)
        sim.reset()
        draw("flux", pipe)
        assert sim.counters()["peak"] <= budget
        assert transport.staging.held_nbytes <= transport.staging.overhead_nbytes


def arrive_in(offload: Any) -> int:
    """Bytes of the larger of the buffers that there are."""
    return max(b.bytes.numel() for b in offload._engine.transport.staging.buffers if b is not None)


def test_a_budget_is_kept_once_the_largest_encoded_units_are_gone(sim: Any, enable: Any) -> None:
    """Those of another pipeline, which made the staging buffer as large as it was."""
    other, pipe = WIDE.build(dtype=torch.bfloat16), build("flux")
    first = enable(other, transport="packed", unit_min=64 << 10, unit_max=8 << 20)
    WIDE.call(other, steps=1)
    budget = int(0.6 * weight_nbytes(pipe))
    offload = enable(pipe, transport="packed", budget=budget, **UNITS)
    draw("flux", pipe)
    largest = arrive_in(offload)
    first.disable()
    assert_within(budget, sim, pipe, offload)
    assert arrive_in(offload) < largest
    assert draw("flux", pipe) == draw("flux", build("flux").to(DEVICE))


def test_a_budget_is_kept_once_the_largest_units_travel_raw(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    budget, settings = int(0.6 * weight_nbytes(pipe)), {"unit_min": 64 << 10, "unit_max": 2 << 20}
    offload = enable(pipe, transport="packed", budget=budget, **settings)
    draw("flux", pipe)
    draw("flux", pipe)
    enable(pipe, transport={"text_encoder": "packed"}, budget=budget, **settings)
    assert encoded_units(offload)
    assert_within(budget, sim, pipe, offload)
    assert draw("flux", pipe) == draw("flux", build("flux").to(DEVICE))


def test_a_unit_that_becomes_smaller_when_it_is_encoded_anew_needs_less_to_arrive_in(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    offload = enable(pipe, transport="packed", unit_min=8 << 20, unit_max=64 << 20)
    with torch.no_grad():  # values that cannot be packed
        for p in pipe.transformer.parameters():
            p.view(torch.int16).random_(-(1 << 15), 1 << 15)
            p.nan_to_num_(0, 0, 0)
    draw("flux", pipe)
    transport = offload._engine.transport
    before = arrive_in(offload)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.fill_(0.01)
    offload.release()
    draw("flux", pipe)
    assert arrive_in(offload) < before
    assert transport.staging.held_nbytes <= transport.staging.overhead_nbytes


def test_no_room_for_a_kernel_is_met_as_no_room_for_weights(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton loads a kernel where it is first launched, and says what is missing in words of its own."""
    expected = draw("flux", build("flux").to(DEVICE))
    pipe = build("flux")
    offload = enable(pipe, transport="packed", **UNITS)
    cast, launches = transport.cast_unit, itertools.count()

    def full(*args: Any) -> None:
        if next(launches) in (0, 5):
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        cast(*args)

    monkeypatch.setattr(transport, "cast_unit", full)
    assert draw("flux", pipe) == expected
    assert next(launches) > 5, "it was met"
    assert sum(offload.stats.counts.values()) > 0
