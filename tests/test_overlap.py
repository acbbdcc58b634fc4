"""What runs beside what, on the engine: orders of events on a slow simulated link, and no number of milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from conftest import DEVICE, settle, weight_nbytes

import prefetch_offload
from prefetch_offload.simulator import Link, Workload
from prefetch_offload.strategy import balanced
from prefetch_offload.testing.pipelines import scaled
from prefetch_offload.trace import Span
from prefetch_offload.window import Share

FLUX = scaled("flux", width=192, layers=2, text_width=192, text_layers=8, vae_width=8)
UNITS = {"unit_min": 64 << 10, "unit_max": 512 << 10}
STEPS = 2
GBPS = 0.15


def steady(workload: Workload, budget_nbytes: int, link: Link) -> Mapping[str, Share]:
    """The default strategy for made-up times, so that the speed of a busy machine has no say in what is planned."""
    made_up = {
        name: replace(c, compute_ms=dict.fromkeys(c.units, 4.0 if "transformer" in name else 1.0))
        for name, c in workload.components.items()
    }
    return balanced(Workload(made_up, workload.runs), budget_nbytes, Link(GBPS))


@cache
def resident_image() -> bytes:
    return np.asarray(FLUX.call(FLUX.build().to(DEVICE), steps=STEPS)).tobytes()


@dataclass(frozen=True)
class Recorded:
    """A call in the steady state, within 35% of the weights.

    Attributes:
        copies: that began after it did, in their order.
        runs: of components, by name.
        ended_ms: its end.
        kept, kept_nbytes: units of the transformer that are to stay from pass to pass.
        text_limit_nbytes: what the larger text encoder may hold.
        nbytes: of components, by name.
    """

    copies: tuple[Span, ...]
    runs: Mapping[str, Span]
    ended_ms: float
    kept: frozenset[str]
    kept_nbytes: int
    text_limit_nbytes: int
    nbytes: Mapping[str, int]

    def first_copy(self, component: str) -> Span:
        return next(s for s in self.copies if s.name == component)


@cache
def recorded(sim: Any) -> Recorded:
    expected = resident_image()
    pipe = FLUX.build()
    settle(sim)
    sim.configure(1 << 50, GBPS, GBPS, GBPS)
    budget = int(0.35 * weight_nbytes(pipe))
    with prefetch_offload.enable(pipe, device=DEVICE, budget=budget, strategy=steady, verify=True, **UNITS) as offload:
        for call in range(3):
            sim.op_delay_us(100 if call == 2 else 0)  # compute takes its time without taking the processor's
            assert np.asarray(FLUX.call(pipe, steps=STEPS)).tobytes() == expected
        timeline = offload.timeline()
        client = offload._session.client
        components = {c.name: c for c in client.components.values()}
        kept = frozenset(client.shares[components["transformer"].key].keep)
        last = [s for s in timeline.spans if s.track == "calls"][-1]
        since = [s for s in timeline.spans if s.start_ms >= last.start_ms]
        found = Recorded(
            copies=tuple(s for s in since if s.track == "copy"),
            runs={s.name: s for s in since if s.track == "compute"},
            ended_ms=last.end_ms,
            kept=kept,
            kept_nbytes=sum(components["transformer"].unit_nbytes[u] for u in kept),
            text_limit_nbytes=client.shares[components["text_encoder_2"].key].limit_nbytes,
            nbytes={name: c.nbytes for name, c in components.items()},
        )
        assert offload.hazards == []
        assert not offload.stats.counts
    sim.op_delay_us(0)
    return found


def test_the_first_step_starts_when_its_first_block_has_arrived(sim: Any, enable: Any) -> None:
    expected = resident_image()
    pipe = FLUX.build()
    settle(sim)
    offload = enable(pipe, **UNITS)
    assert np.asarray(FLUX.call(pipe, steps=STEPS)).tobytes() == expected
    offload.release()
    transformer = next(c for c in offload._session.client.components.values() if c.name == "transformer")
    gbps = transformer.nbytes / 0.5e9  # half a second for all of it
    sim.configure(1 << 50, gbps, gbps, gbps)
    lanes, flights = offload._engine.lanes, offload._engine.transport.flights
    done: list[torch.Event] = []
    ready: dict[str, torch.Event] = {}

    def after_the_first_block(*_: Any) -> None:
        if not done:
            done.append(lanes.record(lanes.compute()))

    def after_the_first_step(*_: Any) -> None:
        ready.update({u: flights[u].ready for u in transformer.order if not ready})

    handles = [
        pipe.transformer.transformer_blocks[0].register_forward_hook(after_the_first_block),
        pipe.transformer.register_forward_hook(after_the_first_step),
    ]
    assert np.asarray(FLUX.call(pipe, steps=STEPS)).tobytes() == expected
    for handle in handles:
        handle.remove()
    lanes.synchronize()
    there = [done[0].elapsed_time(event) <= 0 for event in ready.values()]  # when the first block had run, in order of use
    assert there[0]
    assert not there[-1]
    assert there == sorted(there, reverse=True), "they come in the order in which they are used"


def test_a_text_encoder_that_streams_leaves_the_denoiser_what_it_keeps(sim: Any) -> None:
    call = recorded(sim)
    assert call.text_limit_nbytes < call.nbytes["text_encoder_2"] / 2, "it passes through a window"
    assert sum(s.args["nbytes"] for s in call.copies if s.name == "text_encoder_2") > call.text_limit_nbytes
    streamed = sum(s.args["nbytes"] for s in call.copies if s.name == "transformer")
    again = sum(s.args["nbytes"] for s in call.copies if s.args["unit"] in call.kept)
    # Of what it keeps, so much leaves as others take, and the encoder takes no more than its window.
    assert again <= call.text_limit_nbytes + call.nbytes["text_encoder"] + call.nbytes["vae"]
    assert again < min(call.kept_nbytes / 2, call.nbytes["text_encoder_2"] / 2)
    assert 0 < streamed - again <= STEPS * (call.nbytes["transformer"] - call.kept_nbytes)


def test_the_decoder_arrives_during_the_last_steps(sim: Any) -> None:
    call = recorded(sim)
    assert call.first_copy("vae").start_ms < call.runs["transformer"].end_ms


def test_the_next_calls_text_encoder_arrives_before_this_call_ends(sim: Any) -> None:
    call = recorded(sim)
    coming = call.first_copy("text_encoder")
    assert call.runs["text_encoder"].end_ms < coming.start_ms, "this call's came before"
    assert coming.start_ms < call.runs["vae"].end_ms <= call.ended_ms


