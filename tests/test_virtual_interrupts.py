"""Interrupts between any two lines that map or unmap device memory: nothing leaks, nothing is done twice, and it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, resident
from interrupts import some, spots
from virtual_memory import GRAIN, FakeCuda

from prefetch_offload import driver, virtual
from prefetch_offload.device import Lanes
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.virtual import Driver, VirtualAddresses

FILES = {module.__file__ for module in (virtual, driver)}


class Interrupt(KeyboardInterrupt):
    """Told from one of the keyboard's."""


def interrupted(act: Callable[[], Any], at: int = -1) -> list[tuple[str, int]]:
    """Run `act`, until line number `at` of FILES is about to run. Returns the lines that were about to, by file and number."""
    lines: list[tuple[str, int]] = []

    def each(frame: FrameType, event: str, value: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) == at + 1:
                raise Interrupt
        return each

    def enter(frame: FrameType, event: str, value: Any) -> Any:
        # what Python calls at the end of an object has nobody to raise to, but for what it calls itself
        code = frame.f_code
        return each if code.co_filename in FILES and code.co_name != "__del__" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        act()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def run(addresses: VirtualAddresses, units: list[Any], held: dict[str, torch.Tensor]) -> None:
    """Every way through: mapped and unmapped, passed on, taken back, reclaimed, kept by whoever shows it, and forgotten."""
    lanes = addresses.lanes
    a, b, c, d = units

    def read(unit: Any) -> torch.Event:
        held[unit.key].add_(1)
        return lanes.record(lanes.compute())

    def come(unit: Any) -> None:
        held[unit.key] = addresses.map(unit)
        lanes.compute().wait_event(lanes.record(lanes.copy))

    come(a)
    addresses.unmap(a, read(a))
    come(b)  # what a has left
    addresses.unmap(b, read(b))
    come(b)  # taken back
    come(a)  # its own is with b
    come(c)
    addresses.unmap(a, read(a))
    addresses.unmap(b, read(b))
    addresses.limit_nbytes = 3 * GRAIN
    come(d)  # of another size: one has to go
    addresses.trim()
    addresses.hand_over(c)  # shown still
    come(c)
    held.pop(c.key)
    addresses.unmap(d, read(d))
    addresses.give_back()
    come(b)
    addresses.unmap(b, read(b))
    held.pop(b.key)
    addresses.forget(b)
    addresses.limit_nbytes = None


def units_of(*sizes: int) -> list[Any]:
    return [SimpleNamespace(key=f"unit{i}", slab=SimpleNamespace(nbytes=n)) for i, n in enumerate(sizes)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of those at a tensor's end
def test_an_interrupt_before_any_line(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "happened", lambda *args: False)  # everything takes long
    device = torch.device(DEVICE, 0)

    def attempt(number: int) -> list[tuple[str, int]]:
        cuda = FakeCuda()
        addresses = VirtualAddresses(Lanes(device, verify=True), Driver(cuda, 0))
        units = units_of(100, GRAIN, 5, 2 * GRAIN)
        held: dict[str, torch.Tensor] = {}
        lines = interrupted(lambda: run(addresses, units, held), number)
        # as the engine recovers
        addresses.lanes.synchronize()
        held.clear()
        for unit in units:
            addresses.unmap(unit, None)
        assert addresses.pool_nbytes == cuda.used == 0, f"after line {number}"
        assert addresses.idle_nbytes == 0 and not cuda.behind
        addresses.limit_nbytes = None
        for turn in range(2):
            for unit in units:
                shown = addresses.map(unit)
                assert addresses.holds(unit)
                shown.fill_(turn)
                assert int(shown.sum()) == turn * unit.slab.nbytes, "it can be written and read"
            del shown
            assert addresses.pool_nbytes == cuda.used == 5 * GRAIN
            for unit in units:
                addresses.unmap(unit, addresses.lanes.record(addresses.lanes.compute()))
        for unit in units:
            addresses.forget(unit)
        assert not cuda.ranges and not cuda.behind and not cuda.memories and cuda.used == addresses.pool_nbytes == 0
        assert addresses.lanes.hazards == []
        return lines

    lines = attempt(-1)
    assert len(set(lines)) > 110, "of all that there are"
    for number in spots(lines):
        assert len(attempt(number)) == number + 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_call(enable: Any, sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's part: whatever was cut short, the next call finds every unit, and what is left is free."""
    cuda = FakeCuda()
    monkeypatch.setattr(virtual, "driver_for", lambda device: Driver(cuda, 0))
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, unit_min=32 << 10, unit_max=128 << 10)
    expected = resident("flux", torch.float32)[:1]

    def call() -> None:
        CASES["flux"].call(pipe, seed=0)
        offload.release()

    call()
    found = spots(interrupted(call))
    assert len(found) > 100
    for number in some(found, len(found) // 10):
        (*_, where) = interrupted(call, number)
        offload.release()
        assert cuda.used == offload.stats.pool_nbytes == 0 and not cuda.behind, where
        assert_same([np.asarray(CASES["flux"].call(pipe, seed=0))], expected)
        assert cuda.used == offload.stats.pool_nbytes
    offload.disable()
    assert not cuda.memories and not cuda.behind


def test_a_tensor_may_end_while_an_exception_is_on_its_way(sim: Any) -> None:
    ended: list[int] = []
    memory = torch.zeros(8, dtype=torch.uint8, device=DEVICE)

    def fail() -> Any:
        raise ValueError("on its way")

    with pytest.raises(ValueError, match="on its way"):
        (driver.show(memory.data_ptr(), 8, memory.device, lambda: ended.append(1)), fail())
    assert ended == [1]
    shown = driver.show(memory.data_ptr(), 8, memory.device, lambda: ended.append(2))
    view = shown[4:].fill_(3)
    del shown
    assert ended == [1] and memory.cpu().tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    del view
    assert ended == [1, 2]
