"""The simulated accelerator: accesses that no event orders, and memory that is given back too early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import SLOW, N, Program, device_bytes, on_device

# ------------------------------------------------------------------------------------------------------- happens-before


def ordered(p: Program) -> None:
    d = on_device()
    p.side_waits()
    p.copy(d)
    p.main_waits()
    d.sum()
    p.side_waits()


def read_before_the_copy(p: Program) -> None:
    d = on_device()
    p.side_waits()
    p.copy(d)
    d.sum()
    p.main_waits()


def overwrite_while_read(p: Program) -> None:
    d = on_device().fill_(1)
    p.side_waits()
    d.sum()
    p.copy(d)
    p.main_waits()


def freed_while_a_copy_is_pending(p: Program) -> None:
    d = on_device()
    p.side_waits()
    p.copy(d)
    del d


def side_memory_freed_unordered_after_compute(p: Program) -> None:
    d = p.allocated_on_side()
    p.copy(d)
    p.main_waits()
    d.sum()
    del d


def side_memory_freed_in_order(p: Program) -> None:
    d = p.allocated_on_side()
    p.copy(d)
    p.main_waits()
    d.sum()
    p.side_waits()
    del d


def side_memory_freed_with_record_stream(p: Program) -> None:
    d = p.allocated_on_side()
    p.copy(d)
    p.main_waits()
    d.record_stream(p.main)
    d.sum()
    del d


def two_halves_of_one_slab(p: Program) -> None:
    d = on_device(2 * N)
    p.side_waits()
    d[:N].fill_(0)
    d[:N].sum()
    p.copy(d[N:])
    d[:N].sum()
    p.main_waits()
    d[N:].sum()


def allocation_not_waited_for(p: Program) -> None:
    d = on_device()
    p.copy(d)
    p.main_waits()


def allocation_waited_for_by_the_host(p: Program) -> None:
    d = on_device()
    torch.accelerator.synchronize()
    p.copy(d)
    p.main_waits()


def event_recorded_before_the_allocation(p: Program) -> None:
    event = p.main.record_event()
    d = on_device()
    p.side.wait_event(event)
    p.copy(d)
    p.main_waits()


def older_event_waited_for_last(p: Program) -> None:
    older = p.main.record_event()
    d = on_device()
    p.side_waits()
    p.side.wait_event(older)
    p.copy(d)
    p.main_waits()


def stream_found_idle(p: Program) -> None:
    """A query that says yes is as good as a wait."""
    d = p.allocated_on_side()
    p.copy(d)
    while not p.side.query():
        time.sleep(0.001)
    d.sum()
    torch.accelerator.synchronize()


def event_found_done(p: Program) -> None:
    d = p.allocated_on_side()
    p.copy(d)
    event = p.side.record_event()
    while not event.query():
        time.sleep(0.001)
    d.sum()
    torch.accelerator.synchronize()


def side_allocation_used_by_main(p: Program) -> None:
    d = p.allocated_on_side()
    d.fill_(0)
    p.side_waits()


def index_read_unordered(p: Program) -> None:
    """The indices are an optional tensor list, which is easily overlooked."""
    table = on_device().fill_(0)
    with p.side:
        index = torch.zeros(4, dtype=torch.long, device="simgpu")
    table[index]
    p.side_waits()


CASES = [
    (ordered, None),
    (read_before_the_copy, "is not ordered after the write by copy"),
    (overwrite_while_read, "write by copy to the device"),
    (freed_while_a_copy_is_pending, "freed while in use"),
    (side_memory_freed_unordered_after_compute, "freed while in use"),
    (side_memory_freed_in_order, None),
    (side_memory_freed_with_record_stream, None),
    (two_halves_of_one_slab, None),
    (allocation_not_waited_for, "write by allocation on stream 0"),
    (allocation_waited_for_by_the_host, None),
    (event_recorded_before_the_allocation, "write by allocation on stream 0"),
    (older_event_waited_for_last, None),
    (stream_found_idle, None),
    (event_found_done, None),
    (side_allocation_used_by_main, "write by allocation"),
    (index_read_unordered, "read by aten::index"),
]


@pytest.mark.parametrize("paced", [False, True], ids=["unpaced", "paced"])
@pytest.mark.parametrize(("case", "objection"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_hazard(bare: Any, case: Callable[[Program], None], objection: str | None, paced: bool) -> None:
    if paced:
        bare.configure(-1, 0.1, 0.1, 0)  # 2.6 ms a copy
    case(Program())
    bare.drain()
    found = bare.hazards()
    assert bare.counters()["hazards"] == len(found)
    if objection is None:
        assert found == []
        assert bare.counters()["violations"] == 0
    else:
        assert any(objection in message for message in found), found


# ----------------------------------------------------------------------------------------------------------- lifetimes


def test_pending_copy_into_freed_memory_is_a_violation(bare: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
    freed_while_a_copy_is_pending(Program())
    bare.drain()
    assert bare.counters()["violations"] == 1


def test_memory_of_a_side_stream_may_be_freed_behind_its_own_copy(bare: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
    p = Program()
    d = p.allocated_on_side()
    p.copy(d)
    held = device_bytes(bare)
    del d
    assert device_bytes(bare) == held - 4 * N, "the bytes are free at once, in the order of their stream"
    bare.drain()
    assert bare.counters()["violations"] == 0 and bare.hazards() == []


def test_record_stream_keeps_memory_until_that_stream_got_there(bare: Any) -> None:
    bare.configure(-1, SLOW, SLOW, 0)
    p = Program()
    d = on_device().fill_(7)
    back = torch.zeros(N).pin_memory()
    p.side_waits()
    with p.side:
        back.copy_(d, non_blocking=True)
    d.record_stream(p.side)
    del d
    bare.drain()
    assert bare.counters()["violations"] == 0 and bare.hazards() == []
    assert (back == 7).all()


def test_fresh_and_freed_memory_is_poison(bare: Any) -> None:
    assert on_device().isnan().all()
