"""The simulated accelerator: memory of the device and of the host, what is counted and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import GRANULE, SLOW, N, Program, device_bytes, on_device

ALREADY_REGISTERED, NOT_REGISTERED, OVER_LIMIT = 712, 713, 2


# ------------------------------------------------------------------------------------------------------- device memory


@pytest.mark.parametrize(("asked", "taken"), [(1, GRANULE), (GRANULE, GRANULE), (GRANULE + 1, 2 * GRANULE)])
def test_sizes_are_rounded_up(bare: Any, asked: int, taken: int) -> None:
    before = bare.counters()
    t = torch.empty(asked, dtype=torch.uint8, device="simgpu")
    after = bare.counters()
    assert after["allocated"] - before["allocated"] == taken
    assert after["peak"] - before["peak"] == taken
    assert t.nbytes == asked
    del t
    assert device_bytes(bare) == before["allocated"]
    assert bare.counters()["peak"] == after["peak"]


def test_capacity_is_checked_on_rounded_sizes(bare: Any) -> None:
    bare.configure(device_bytes(bare) + 2 * GRANULE, 0, 0, 0)
    kept = [torch.empty(1, dtype=torch.uint8, device="simgpu") for _ in range(2)]
    with pytest.raises(torch.OutOfMemoryError, match="simgpu out of memory"):
        torch.empty(1, dtype=torch.uint8, device="simgpu")
    assert bare.counters()["allocs"] == 2
    kept.pop()
    torch.empty(GRANULE, dtype=torch.uint8, device="simgpu")


@pytest.mark.parametrize(
    ("index", "times", "fails"), [(0, 1, [0]), (2, 1, [2]), (1, 3, [1, 2, 3]), (-1, 1, []), (0, 0, [])]
)
def test_allocations_fail_on_demand(bare: Any, index: int, times: int, fails: list[int]) -> None:
    on_device()  # counted before the call, so not by it
    bare.fail_allocation(index, times)

    def fail() -> bool:
        try:
            on_device(1)
        except torch.OutOfMemoryError:
            return True
        return False

    assert [i for i in range(6) if fail()] == fails
    assert bare.counters()["allocs"] == 1 + 6 - len(fails), "only the successful ones are counted"


def test_failing_allocations_can_be_called_off(bare: Any) -> None:
    bare.fail_allocation(0, times=5)
    with pytest.raises(torch.OutOfMemoryError):
        on_device()
    bare.fail_allocation(-1)
    on_device()


def test_an_operator_inside_meets_the_failure(bare: Any) -> None:
    d = on_device().fill_(1)
    bare.fail_allocation(0)
    with pytest.raises(torch.OutOfMemoryError):
        d + 1
    assert (d + 1).sum().item() == 2 * N


def test_high_water_outlives_a_reset_of_the_peak(bare: Any) -> None:
    base = device_bytes(bare)
    del (d := [on_device()])[:]
    torch.accelerator.reset_peak_memory_stats()
    assert bare.counters()["peak"] == base
    assert bare.counters()["high_water"] == base + 4 * N
    assert d == []
    bare.reset()
    assert bare.counters()["high_water"] == base


def test_storage_gives_its_memory_back_and_takes_new(bare: Any) -> None:
    base = device_bytes(bare)
    t = torch.arange(N, device="simgpu", dtype=torch.float32)
    view = t[10:20]
    storage = t.untyped_storage()
    assert device_bytes(bare) == base + 4 * N
    storage.resize_(0)
    assert device_bytes(bare) == base
    for use in (view.sum, view.cpu, lambda: view.fill_(1)):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use()
    storage.resize_(4 * N)
    assert device_bytes(bare) == base + 4 * N
    assert view.isnan().all(), "what was freed is gone"
    t.copy_(torch.arange(N) * 2.0)
    assert view.tolist() == [2.0 * i for i in range(10, 20)]
    assert bare.hazards() == []


def test_growing_keeps_what_was_there(bare: Any) -> None:
    t = torch.arange(8, device="simgpu", dtype=torch.float32)
    t.untyped_storage().resize_(64)
    assert t.tolist() == list(range(8))
    t.resize_(12)
    assert t[:8].tolist() == list(range(8))
    t.resize_(1000)
    assert t[:8].tolist() == list(range(8))


@pytest.mark.parametrize("resize", [lambda t: t.untyped_storage().resize_(8 * N), lambda t: t.resize_(2 * N)])
@pytest.mark.parametrize("waits", [False, True])
def test_growing_reads_the_old_memory(bare: Any, resize: Callable[[torch.Tensor], Any], waits: bool) -> None:
    p, d = Program(), on_device()
    p.side_waits()
    p.copy(d)
    if waits:
        p.main_waits()
    resize(d)
    assert any("read by resize_" in message for message in bare.hazards()) is not waits
    assert bool(bare.hazards()) is not waits


# --------------------------------------------------------------------------------------------------------- host memory


@pytest.fixture
def cudart(mod: Any) -> Any:
    return mod.cudart()


def test_registered_memory_is_pinned(bare: Any, cudart: Any) -> None:
    before = bare.counters()
    t = torch.zeros(1001, dtype=torch.uint8)
    assert not t.is_pinned()
    assert cudart.cudaHostRegister(t.data_ptr(), 1001, 0) == 0
    assert t.is_pinned() and t[1000:].is_pinned()
    during = bare.counters()
    assert during["pinned"] - before["pinned"] == 1001, "exact bytes"
    assert during["peak_pinned"] - before["peak_pinned"] == 1001
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    assert not t.is_pinned()
    assert bare.counters()["pinned"] == before["pinned"]
    assert bare.counters()["peak_pinned"] == during["peak_pinned"]
    assert bare.counters()["violations"] == 0


def test_copies_of_registered_memory_are_asynchronous(bare: Any, cudart: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
    t = torch.ones(N)
    p, d = Program(), on_device()
    p.side_waits()

    def copy() -> bool:
        with p.side:
            d.copy_(t, non_blocking=True)
        return p.side.query()

    assert copy(), "a pageable copy is over when it returns"
    assert cudart.cudaHostRegister(t.data_ptr(), t.nbytes, 0) == 0
    assert not copy()
    p.main_waits()
    assert (d == 1).all()
    assert bare.counters()["h2d_async"] == t.nbytes
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    assert bare.counters()["violations"] == 0 and bare.hazards() == []


def test_unregistering_under_a_pending_copy_is_a_violation(bare: Any, cudart: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
    t = torch.ones(N)
    assert cudart.cudaHostRegister(t.data_ptr(), t.nbytes, 0) == 0
    p, d = Program(), on_device()
    p.side_waits()
    with p.side:
        d.copy_(t, non_blocking=True)
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    p.main_waits()
    assert bare.counters()["violations"] == 1
    assert d.isnan().all(), "the copy did not run: the memory may be gone"


def test_refusals_leave_an_error_behind_once(bare: Any, cudart: Any) -> None:
    t = torch.zeros(100, dtype=torch.uint8)
    p, pinned = t.data_ptr(), torch.zeros(100).pin_memory()
    assert cudart.cudaGetLastError() == 0
    assert cudart.cudaHostRegister(p + 10, 50, 0) == 0
    for overlap, nbytes in ((p + 10, 50), (p, 11), (p + 59, 41), (p, 100), (p + 20, 1), (pinned.data_ptr() + 8, 8)):
        assert cudart.cudaHostRegister(overlap, nbytes, 0) == ALREADY_REGISTERED
        assert cudart.cudaGetLastError() == ALREADY_REGISTERED
        assert cudart.cudaGetLastError() == 0
    for beside, nbytes in ((p, 10), (p + 60, 40)):
        assert cudart.cudaHostRegister(beside, nbytes, 0) == 0
        assert cudart.cudaHostUnregister(beside) == 0
    assert cudart.cudaHostRegister(p, 0, 0) == 1
    assert cudart.cudaGetLastError() == 1
    assert cudart.cudaHostUnregister(p + 11) == NOT_REGISTERED
    assert cudart.cudaGetLastError() == NOT_REGISTERED
    assert cudart.cudaHostUnregister(p + 10) == 0
    assert cudart.cudaGetLastError() == 0


def test_the_next_operator_trips_over_an_uncleared_error(bare: Any, cudart: Any) -> None:
    """As on CUDA, where the check after a kernel launch finds it."""
    d = on_device()
    assert cudart.cudaHostUnregister(1) == NOT_REGISTERED
    with pytest.raises(RuntimeError, match="713"):
        d.fill_(1)
    d.fill_(1)


def test_pin_limit(bare: Any, cudart: Any) -> None:
    held = bare.counters()["pinned"]
    bare.pin_limit(held + 1000)
    t = torch.zeros(1001, dtype=torch.uint8)
    assert cudart.cudaHostRegister(t.data_ptr(), 1001, 0) == OVER_LIMIT
    assert cudart.cudaGetLastError() == OVER_LIMIT
    assert not t.is_pinned()
    assert cudart.cudaHostRegister(t.data_ptr(), 1000, 0) == 0
    with pytest.raises(RuntimeError, match="tried to pin 1 bytes"):
        torch.empty(1, dtype=torch.uint8, pin_memory=True)
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    kept = torch.empty(1000, dtype=torch.uint8, pin_memory=True)
    with pytest.raises(RuntimeError, match="tried to pin"):
        torch.zeros(1).pin_memory()
    assert cudart.cudaGetLastError() == 0, "the allocator clears it"
    assert bare.counters()["pinned"] == held + kept.nbytes
    bare.pin_limit(-1)
    torch.zeros(N).pin_memory()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_copy_may_not_leave_the_registered_range(bare: Any, cudart: Any, non_blocking: bool) -> None:
    t, d = torch.zeros(100), on_device(100)
    assert cudart.cudaHostRegister(t.data_ptr(), 396, 0) == 0
    d[:99].copy_(t[:99], non_blocking=non_blocking)
    with pytest.raises(RuntimeError, match="ends beyond it"):
        d.copy_(t, non_blocking=non_blocking)
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0


def test_transfers_are_counted_by_kind(bare: Any) -> None:
    d = on_device()
    pinned, pageable = torch.zeros(N).pin_memory(), torch.zeros(N)
    d.copy_(pinned)
    d[:10].copy_(pageable[:10])
    pinned[:100].copy_(d[:100])
    pageable[:1000].copy_(d[:1000])
    d[:5].copy_(d[5:10])
    counters = bare.counters()
    elements = {"h2d_pinned": N, "h2d_pageable": 10, "d2h_pinned": 100, "d2h_pageable": 1000, "d2d": 5}
    elements |= {"h2d": N + 10, "d2h": 1100, "h2d_async": 0, "d2h_async": 0}
    assert {name: counters[name] for name in elements} == {name: 4 * n for name, n in elements.items()}
    bare.reset()
    assert not any(bare.counters()[name] for name in elements)
