"""Taking in what changed, interrupted between any two lines or refused: never a wrong weight, and nothing kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import DEVICE, settle
from interrupts import Interrupts, some
from test_scripts import Chain, Pair
from torch import nn

import prefetch_offload
from prefetch_offload import OffloadError
from prefetch_offload.host import Pins
from prefetch_offload.registry import engines
from prefetch_offload.strategy import whole

WIDTHS = (64, 48, 64), (48, 64, 48, 64)
UNITS = {"unit_min": 32 << 10, "unit_max": 64 << 10}  # most of two or three layers each
# a layer each, and not all of them fit
SMALL = {"unit_min": 4 << 10, "unit_max": 20 << 10, "budget": 56 << 10, "strategy": whole}
WAYS: dict[str, dict[str, Any]] = {  # each tries every twelfth place, beginning with another one
    "raw": UNITS,
    "encoded": {"transport": torch.bfloat16, **UNITS},
    "addresses": {"stable_addresses": True, **UNITS},
    "streamed": SMALL,
}


def build() -> Pair:
    torch.manual_seed(0)
    pipe = Pair(*(Chain([*widths]) for widths in WIDTHS))
    for p in (*pipe.first.parameters(), *pipe.second.parameters()):
        p.data = p.data.bfloat16().float()  # what it travels as changes nothing
    return pipe


def change(pipe: Pair, number: int) -> None:
    """One weight's data lies elsewhere, another's parameter is a new one, and a layer comes or goes; the units' other weights
    stay where they are."""
    layers = pipe.second.layers
    with torch.no_grad():
        moved = layers[1].weight
        moved.data = (moved.data * (1.0 if number % 3 else -1.0)).clone()
        layers[3].weight = nn.Parameter(layers[3].weight.roll(1, 0).contiguous())
    if len(layers) == 4:
        layers.append(nn.Linear(48, 48, bias=False))
        layers[4].weight.data = torch.eye(48).roll(number, 0)
    else:
        del layers[4]


def state(pipe: Pair) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for m in (pipe.first, pipe.second) for p in m.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_while_changes_are_taken_in(way: str, sim: Any, enable: Any) -> None:
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    plain, pipe = build().to(DEVICE), build()
    offload = enable(pipe, **WAYS[way])
    assert torch.equal(pipe(x, 2), plain(x, 2))
    interrupts = Interrupts("_refresh", "_recover")
    change(pipe, 0)
    places = interrupts.lines(lambda: pipe(x, 2))
    assert len(places) > 50
    for number, place in enumerate(some(places, 12, 3 * list(WAYS).index(way)), 1):
        change(pipe, number)
        expected_state = state(pipe)
        interrupts.at(place, lambda: pipe(x, 2))
        plain = rebuilt(pipe, expected_state)
        expected = plain(x, 2)
        assert torch.equal(pipe(x, 2), expected), interrupts.last
        assert_consistent(offload)
        assert all(map(torch.equal, state(pipe), expected_state))
        assert torch.equal(pipe(x, 2), expected)
    del plain
    settle(sim)  # interrupted frames hold on to what they had
    engine = offload._engine
    assert engine.pins.nbytes == sum(u.source.nbytes for u in engine.units.values() if u.source.pinned)
    offload.disable()
    assert all(map(torch.equal, state(pipe), expected_state))


def rebuilt(pipe: Pair, weights: list[torch.Tensor]) -> Pair:
    """Another pipeline of these weights, on the device."""
    made = build()
    if len(pipe.second.layers) == 5:
        made.second.layers.append(nn.Linear(48, 48, bias=False))
    for p, value in zip((*made.first.parameters(), *made.second.parameters()), weights, strict=True):
        p.data = value.clone()
    return made.to(DEVICE)


def assert_consistent(offload: Any) -> None:
    """Every unit of every component is known to all who have to know it, and no others are."""
    engine = offload._engine
    engine.residency.validate()
    units = {u.key for c in engine.live() for u in (*c.units, *c.suspended_units)}
    assert set(engine.units) == units
    assert set(engine.recorder.owner) == units
    assert set(engine.transport.staging._units) == {u for u in units if engine.units[u].travels_encoded}
    assert set(engine.transport.flights) <= units


def test_a_refusal_while_changes_are_taken_in(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orderly error leaves nothing to repair: what has been taken in by then must not be taken for the old units'."""
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    offload = enable(pipe, **UNITS)
    before, pin = pipe(x, 2), Pins.pin
    for refused in range(1, 3):
        calls = itertools.count(1)

        def refuse(pins: Pins, slab: Any, calls: Any = calls, refused: int = refused) -> bool:
            if next(calls) == refused:
                raise OffloadError("no more of these")
            return pin(pins, slab)

        for layer in pipe.second.layers[1], pipe.second.layers[3]:
            layer.weight.data = -layer.weight.data * (1 + refused)
        changed = rebuilt(pipe, state(pipe))
        with monkeypatch.context() as patch:
            patch.setattr(Pins, "pin", refuse)
            with pytest.raises(OffloadError, match="no more of these"):
                pipe(x, 2)
        expected = changed(x, 2)
        assert not torch.equal(expected, before)
        assert torch.equal(pipe(x, 2), expected)
        assert_consistent(offload)
    del changed
    settle(sim)


def test_a_refused_allocation_while_changes_are_taken_in(sim: Any, enable: Any) -> None:
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    offload = enable(pipe, transport=torch.bfloat16, **UNITS)
    saved = 0
    for index in range(24):
        layer = pipe.second.layers[index % 4]
        layer.weight.data = -layer.weight.data.clone()
        changed = rebuilt(pipe, state(pipe))
        expected = changed(x, 2)
        del changed
        sim.fail_allocation(index)
        try:
            assert torch.equal(pipe(x, 2), expected), index
            saved += 1
        except torch.OutOfMemoryError:
            pass
        sim.fail_allocation(-1)
        assert torch.equal(pipe(x, 2), expected), index
        assert_consistent(offload)
    assert saved > 12
    settle(sim)


def test_an_interrupt_while_a_pipeline_is_taken_in(sim: Any, enable: Any) -> None:
    """Nothing is left of it: the pipeline can be enabled as if for the first time."""
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    before = state(pipe)
    plain = build().to(DEVICE)
    expected = plain(x, 2)
    interrupts = Interrupts("component")

    def begin() -> Any:
        return prefetch_offload.enable(pipe, device=DEVICE, transport=torch.bfloat16, **UNITS)

    places = interrupts.lines(begin)
    begin().disable()
    for place in some(places, 9):
        assert interrupts.at(place, begin)
        assert all(map(torch.equal, state(pipe), before)), interrupts.last
        offload = begin()
        assert torch.equal(pipe(x, 2), expected), interrupts.last
        assert_consistent(offload)
        offload.disable()
        assert all(map(torch.equal, state(pipe), before)), interrupts.last
        assert not any(e.live() or e.units for e in engines.values()), interrupts.last
    del plain, offload
    settle(sim)
    assert not any(e.pins.nbytes for e in engines.values())


def test_an_interrupt_before_masters_know_whose_they_are(sim: Any, enable: Any) -> None:
    """They lie in another unit's memory by then: the one that goes must not take them along."""
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    enable(pipe, **WAYS["encoded"])
    interrupts = Interrupts("adopt")
    pipe(x, 2)
    change(pipe, 0)
    places = [p for p in interrupts.lines(lambda: pipe(x, 2)) if interrupts.seen[p][0].endswith("component.py")]
    assert len(places) > 40
    for number, place in enumerate(places, 1):
        change(pipe, number)
        expected = state(pipe)
        interrupts.at(place, lambda: pipe(x, 2))
        pipe(x, 2)
        assert all(map(torch.equal, state(pipe), expected)), interrupts.last
