"""What a unit takes on the device is what the device's allocator counts for it: a budget holds there, not only in a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from caching_allocator import MIB, Block, CachingAllocator
from conftest import DEVICE, weight_nbytes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prefetch_offload import simulator
from prefetch_offload.adoption import build_units
from prefetch_offload.config import Settings
from prefetch_offload.device import Lanes
from prefetch_offload.figures import MODELS
from prefetch_offload.host import Pins
from prefetch_offload.loading import SlabUnit
from prefetch_offload.masters import Master
from prefetch_offload.residency import Drop, Instruction, Load
from prefetch_offload.shapes import workload_of
from prefetch_offload.simulator import Link
from prefetch_offload.strategy import plan_call
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.transport import Transport
from prefetch_offload.units import device_nbytes


@given(st.integers(0, 300 * MIB) | st.integers(1, 150).flatmap(lambda n: st.integers(n * MIB - 1024, n * MIB + 1024)))
def test_it_is_what_new_memory_counts(nbytes: int) -> None:
    allocator = CachingAllocator()
    allocator.take(nbytes)
    assert allocator.allocated == max(512, device_nbytes(nbytes))
    again = CachingAllocator()
    again.take(device_nbytes(nbytes))
    assert again.allocated == allocator.allocated and again.reserved == allocator.reserved


class _Replay(simulator._Device):
    """Takes and gives memory as the engine does, with activations between."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.allocator = CachingAllocator()
        self.there: dict[str, Block] = {}

    def carry_out(self, instructions: Sequence[Instruction], activations: int) -> None:
        for instruction in instructions:
            if isinstance(instruction, Drop):
                self.allocator.give(self.there.pop(instruction.unit))
            elif isinstance(instruction, Load):
                self.there[instruction.unit] = self.allocator.take(self.nbytes[instruction.unit])
        super().carry_out(instructions, activations)
        parts = [self.allocator.take(activations // n) for n in (8, 4, 4, 8, 16, 16, 100)]  # less than all of them
        for part in parts:
            self.allocator.give(part)


@pytest.mark.parametrize("gib", [2, 6])
def test_sdxl_stays_within_its_budget_as_the_allocator_counts(gib: int) -> None:
    model, budget = MODELS["sdxl"], gib << 30
    workload = workload_of(model.parts, model.steps, model.step_ms, model.encode_ms, model.decode_ms)

    def peak(counted: Any) -> int:
        components = {
            name: dataclasses.replace(c, nbytes={u: counted(n) for u, n in c.nbytes.items()})
            for name, c in workload.components.items()
        }
        load = dataclasses.replace(workload, components=components)
        device = _Replay(load, plan_call(load, budget, Link(25.0)).shares, budget, Link(25.0), False)
        for _ in range(2):
            device.run_call()
        return device.allocator.peak

    assert peak(device_nbytes) <= budget
    assert peak(lambda n: -(-n // 512) * 512) > budget, "the model would not have found it"


def test_units_ask_for_what_they_count(sim: Any) -> None:
    """One of 11.2 MiB counts 12, and takes as many; the bytes that travel are its own."""
    weight = nn.Parameter(torch.randn(1713, 1713), requires_grad=False)
    entries: dict[str, Any] = {"weight": weight}
    device = torch.device(DEVICE, 0)
    pins = Pins(device)
    masters = [Master(weight, "weight", [(entries, "weight")])]
    (unit,) = build_units("m#0", masters, Settings(), pins)
    assert isinstance(unit, SlabUnit) and unit.payload_nbytes < unit.nbytes == 12 * MIB
    lanes = Lanes(device, verify=True)
    transport = Transport(lanes, pins)
    before = sim.counters()["allocated"]
    for _ in range(2):  # new, and resized
        transport.load(unit)
        assert unit.bytes is not None and unit.bytes.numel() == unit.payload_nbytes
        assert sim.counters()["allocated"] - before == unit.nbytes
        transport.wait(unit)
        assert torch.equal(unit.bytes.cpu(), unit.slab.bytes)
        transport.drop(unit)
        assert sim.counters()["allocated"] == before
    transport.retire(unit)
    assert lanes.hazards == []


@pytest.fixture
def pieces(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that enables a pipeline in a budget, and returns the handle, the device's bytes, and a function that
    calls the pipeline while the allocator gives back what it had cached so many times."""

    def make(budget: int | None) -> Any:
        case = CASES["flux"]
        pipe = case.build()
        total = sim.counters()["allocated"] + int(0.9 * weight_nbytes(pipe)) + 4 * MIB
        sim.configure(total, 0, 0, 0)
        offload = enable(pipe, budget=budget, unit_min=64 << 10, unit_max=512 << 10)
        engine, retries = offload._engine, 0
        monkeypatch.setattr(engine.lanes, "_figures", lambda: {"num_alloc_retries": retries})
        starts = engine.start_call

        def call(within: int, without: int = 0, ladder: int = 0) -> None:
            def start_call(*args: Any) -> None:
                nonlocal retries
                starts(*args)
                retries += within
                engine.recorder.count("ladder", ladder)

            nonlocal retries
            retries += without
            monkeypatch.setattr(engine, "start_call", start_call)
            images.append(np.asarray(case.call(pipe, seed=0)))
            assert np.array_equal(images[-1], images[0])

        images: list[Any] = []
        return offload, total, call

    return make


def test_what_is_planned_from_what_is_free_leaves_more_where_free_memory_is_in_pieces(pieces: Any) -> None:
    """The allocator says so: it gave back what it had cached, for which the host waits, in the middle of a call."""
    offload, total, call = pieces(None)
    engine = offload._engine
    call(20)  # goes by no plan yet: how much is needed was not known
    assert offload._session.client.spared_nbytes == 0
    call(0, without=7)  # between calls it is others' affair
    (client,) = engine.clients
    assert offload._session.client.spared_nbytes == 0 and client.plan is not None
    before = client.plan.budget_nbytes
    call(4)
    assert offload._session.client.spared_nbytes == 0, "that costs less than to stream more"
    for _ in range(2):
        call(5)
    call(0)
    assert offload._session.client.spared_nbytes == 2 * (total // 32) and offload.stats.counts["cache given back"] == 34
    assert client.plan is not None
    assert client.plan.budget_nbytes == pytest.approx(before - offload._session.client.spared_nbytes, abs=total // 100)
    engine.recorder.count("ladder")  # in no call
    call(1)
    assert offload._session.client.spared_nbytes == 2 * (total // 32)
    for _ in range(3):
        call(1, ladder=1)
    assert offload._session.client.spared_nbytes == total // 4
    offload.budget = None
    assert offload._session.client.spared_nbytes == 0


def test_a_budget_in_bytes_gives_way_where_free_memory_is_in_pieces(pieces: Any) -> None:
    """By as much as makes a difference: what it does not want of the device is free already."""
    offload, total, call = pieces(None)
    engine, budget = offload._engine, int(0.8 * offload._engine.lanes.total_nbytes())
    offload.budget = budget
    for _ in range(2):
        call(0)
    (client,) = engine.clients
    assert client.plan.budget_nbytes == budget
    for parts in (1, 2, 4, 8, 8):
        call(5)
        call(0)
        assert client.plan.budget_nbytes == pytest.approx(budget - parts * (total // 32), abs=total // 100)
    offload.budget = budget
    for _ in range(2):
        call(0)
    assert client.plan.budget_nbytes == budget


def test_what_one_pipeline_spares_is_none_of_anothers_affair(pieces: Any, enable: Any, sim: Any) -> None:
    offload, total, call = pieces(None)
    sim.configure(3 * total, 0, 0, 0)
    engine = offload._engine
    offload.budget = int(0.4 * total)
    case = CASES["flux"]
    other = enable(case.build(), unit_min=64 << 10, unit_max=512 << 10)
    assert other._engine is engine
    before = engine.available(other._session.client)
    for _ in range(3):
        call(0)
    call(5)
    assert offload._session.client.spared_nbytes > 0
    assert engine.available(other._session.client) == pytest.approx(before, rel=0.02)


def test_what_is_spared_leaves_a_budget_where_the_device_has_enough(pieces: Any, sim: Any) -> None:
    """Also when something else has come onto the device since."""
    offload, total, call = pieces(None)
    sim.configure(4 * total, 0, 0, 0)
    offload.budget = budget = int(0.8 * total)
    for _ in range(3):
        call(0)
    call(5)
    other = torch.empty(2 * total, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):
        call(0)
    plan = offload._session.client.plan
    assert plan is not None and plan.budget_nbytes == pytest.approx(budget - 4 * total // 32, abs=total // 100)
    del other
