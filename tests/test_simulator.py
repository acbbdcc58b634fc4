"""The simulated accelerator: what it counts, what it refuses, what it objects to, and how it is built."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prefetch_offload import testing
from prefetch_offload.testing import SimulatorUnavailable, simgpu

ROOT = Path(__file__).parents[1]
N = 1 << 16  # float32 elements: 256 KiB
GRANULE = 512  # bytes
SLOW = 0.001  # GB/s: a copy of N elements takes 262 ms, so that it is surely pending when the test looks
ALREADY_REGISTERED, NOT_REGISTERED, OVER_LIMIT = 712, 713, 2


def settle(ext: Any) -> None:
    gc.collect()
    ext.drain()


@pytest.fixture
def sim() -> Iterator[Any]:
    """The simulator with its plain settings and fresh counters. Hazards are allowed here; nothing else is left."""
    ext = testing.load()
    settle(ext)
    stream = torch.accelerator.current_stream()
    configured = ext.counters()["capacity"]
    ext.configure(-1, 0, 0, 0)
    ext.reset()
    before = ext.counters()
    yield ext
    ext.fail_allocation(-1)
    ext.op_delay_us(0)
    ext.pin_limit(-1)
    ext.configure(configured, 0, 0, 0)
    torch.accelerator.set_stream(stream)
    settle(ext)
    ext.last_error()
    after = ext.counters()
    ext.reset()
    assert after["pinned"] == before["pinned"], "the test left host memory pinned"
    assert after["allocated"] <= before["allocated"], "the test left device memory allocated"


@pytest.fixture
def mod(sim: Any) -> Any:
    return torch.get_device_module("simgpu")


def device_bytes(ext: Any) -> int:
    return ext.counters()["allocated"]


def on_device(n: int = N) -> torch.Tensor:
    return torch.empty(n, device="simgpu")


def side_stream() -> torch.Stream:
    return torch.Stream(device="simgpu")


def main_stream() -> torch.Stream:
    return torch.accelerator.current_stream()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120, check=False
    )


# ------------------------------------------------------------------------------------------------------- happens-before


class Program:
    """Two streams and a pinned tensor: the vocabulary of the hazard cases."""

    def __init__(self) -> None:
        self.pinned = torch.randn(N).pin_memory()
        self.side, self.main = side_stream(), main_stream()

    def side_waits(self) -> None:
        self.side.wait_event(self.main.record_event())

    def main_waits(self) -> None:
        self.main.wait_event(self.side.record_event())

    def copy(self, d: torch.Tensor) -> None:
        with self.side:
            d.copy_(self.pinned, non_blocking=True)

    def allocated_on_side(self) -> torch.Tensor:
        with self.side:
            return on_device()


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
def test_hazard(sim: Any, case: Callable[[Program], None], objection: str | None, paced: bool) -> None:
    if paced:
        sim.configure(-1, 0.1, 0.1, 0)  # 2.6 ms a copy
    case(Program())
    sim.drain()
    found = sim.hazards()
    assert sim.counters()["hazards"] == len(found)
    if objection is None:
        assert found == []
        assert sim.counters()["violations"] == 0
    else:
        assert any(objection in message for message in found), found


# ----------------------------------------------------------------------------------------------------------- lifetimes


def test_pending_copy_into_freed_memory_is_a_violation(sim: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
    freed_while_a_copy_is_pending(Program())
    sim.drain()
    assert sim.counters()["violations"] == 1


def test_memory_of_a_side_stream_may_be_freed_behind_its_own_copy(sim: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
    p = Program()
    d = p.allocated_on_side()
    p.copy(d)
    held = device_bytes(sim)
    del d
    assert device_bytes(sim) == held - 4 * N, "the bytes are free at once, in the order of their stream"
    sim.drain()
    assert sim.counters()["violations"] == 0 and sim.hazards() == []


def test_record_stream_keeps_memory_until_that_stream_got_there(sim: Any) -> None:
    sim.configure(-1, SLOW, SLOW, 0)
    p = Program()
    d = on_device().fill_(7)
    back = torch.zeros(N).pin_memory()
    p.side_waits()
    with p.side:
        back.copy_(d, non_blocking=True)
    d.record_stream(p.side)
    del d
    sim.drain()
    assert sim.counters()["violations"] == 0 and sim.hazards() == []
    assert (back == 7).all()


def test_fresh_and_freed_memory_is_poison(sim: Any) -> None:
    assert on_device().isnan().all()


# ------------------------------------------------------------------------------------------------------- device memory


@pytest.mark.parametrize(("asked", "taken"), [(1, GRANULE), (GRANULE, GRANULE), (GRANULE + 1, 2 * GRANULE)])
def test_sizes_are_rounded_up(sim: Any, asked: int, taken: int) -> None:
    before = sim.counters()
    t = torch.empty(asked, dtype=torch.uint8, device="simgpu")
    after = sim.counters()
    assert after["allocated"] - before["allocated"] == taken
    assert after["peak"] - before["peak"] == taken
    assert t.nbytes == asked
    del t
    assert device_bytes(sim) == before["allocated"]
    assert sim.counters()["peak"] == after["peak"]


def test_capacity_is_checked_on_rounded_sizes(sim: Any) -> None:
    sim.configure(device_bytes(sim) + 2 * GRANULE, 0, 0, 0)
    kept = [torch.empty(1, dtype=torch.uint8, device="simgpu") for _ in range(2)]
    with pytest.raises(torch.OutOfMemoryError, match="simgpu out of memory"):
        torch.empty(1, dtype=torch.uint8, device="simgpu")
    assert sim.counters()["allocs"] == 2
    kept.pop()
    torch.empty(GRANULE, dtype=torch.uint8, device="simgpu")


@pytest.mark.parametrize(
    ("index", "times", "fails"), [(0, 1, [0]), (2, 1, [2]), (1, 3, [1, 2, 3]), (-1, 1, []), (0, 0, [])]
)
def test_allocations_fail_on_demand(sim: Any, index: int, times: int, fails: list[int]) -> None:
    on_device()  # counted before the call, so not by it
    sim.fail_allocation(index, times)

    def fail() -> bool:
        try:
            on_device(1)
        except torch.OutOfMemoryError:
            return True
        return False

    assert [i for i in range(6) if fail()] == fails
    assert sim.counters()["allocs"] == 1 + 6 - len(fails), "only the successful ones are counted"


def test_failing_allocations_can_be_called_off(sim: Any) -> None:
    sim.fail_allocation(0, times=5)
    with pytest.raises(torch.OutOfMemoryError):
        on_device()
    sim.fail_allocation(-1)
    on_device()


def test_an_operator_inside_meets_the_failure(sim: Any) -> None:
    d = on_device().fill_(1)
    sim.fail_allocation(0)
    with pytest.raises(torch.OutOfMemoryError):
        d + 1
    assert (d + 1).sum().item() == 2 * N


def test_high_water_outlives_a_reset_of_the_peak(sim: Any) -> None:
    base = device_bytes(sim)
    del (d := [on_device()])[:]
    torch.accelerator.reset_peak_memory_stats()
    assert sim.counters()["peak"] == base
    assert sim.counters()["high_water"] == base + 4 * N
    assert d == []
    sim.reset()
    assert sim.counters()["high_water"] == base


def test_storage_gives_its_memory_back_and_takes_new(sim: Any) -> None:
    base = device_bytes(sim)
    t = torch.arange(N, device="simgpu", dtype=torch.float32)
    view = t[10:20]
    storage = t.untyped_storage()
    assert device_bytes(sim) == base + 4 * N
    storage.resize_(0)
    assert device_bytes(sim) == base
    for use in (view.sum, view.cpu, lambda: view.fill_(1)):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            use()
    storage.resize_(4 * N)
    assert device_bytes(sim) == base + 4 * N
    assert view.isnan().all(), "what was freed is gone"
    t.copy_(torch.arange(N) * 2.0)
    assert view.tolist() == [2.0 * i for i in range(10, 20)]
    assert sim.hazards() == []


def test_growing_keeps_what_was_there(sim: Any) -> None:
    t = torch.arange(8, device="simgpu", dtype=torch.float32)
    t.untyped_storage().resize_(64)
    assert t.tolist() == list(range(8))
    t.resize_(12)
    assert t[:8].tolist() == list(range(8))
    t.resize_(1000)
    assert t[:8].tolist() == list(range(8))


@pytest.mark.parametrize("resize", [lambda t: t.untyped_storage().resize_(8 * N), lambda t: t.resize_(2 * N)])
@pytest.mark.parametrize("waits", [False, True])
def test_growing_reads_the_old_memory(sim: Any, resize: Callable[[torch.Tensor], Any], waits: bool) -> None:
    p, d = Program(), on_device()
    p.side_waits()
    p.copy(d)
    if waits:
        p.main_waits()
    resize(d)
    assert any("read by resize_" in message for message in sim.hazards()) is not waits
    assert bool(sim.hazards()) is not waits


# --------------------------------------------------------------------------------------------------------- host memory


@pytest.fixture
def cudart(mod: Any) -> Any:
    return mod.cudart()


def test_registered_memory_is_pinned(sim: Any, cudart: Any) -> None:
    before = sim.counters()
    t = torch.zeros(1001, dtype=torch.uint8)
    assert not t.is_pinned()
    assert cudart.cudaHostRegister(t.data_ptr(), 1001, 0) == 0
    assert t.is_pinned() and t[1000:].is_pinned()
    during = sim.counters()
    assert during["pinned"] - before["pinned"] == 1001, "exact bytes"
    assert during["peak_pinned"] - before["peak_pinned"] == 1001
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    assert not t.is_pinned()
    assert sim.counters()["pinned"] == before["pinned"]
    assert sim.counters()["peak_pinned"] == during["peak_pinned"]
    assert sim.counters()["violations"] == 0


def test_copies_of_registered_memory_are_asynchronous(sim: Any, cudart: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
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
    assert sim.counters()["h2d_async"] == t.nbytes
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    assert sim.counters()["violations"] == 0 and sim.hazards() == []


def test_unregistering_under_a_pending_copy_is_a_violation(sim: Any, cudart: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
    t = torch.ones(N)
    assert cudart.cudaHostRegister(t.data_ptr(), t.nbytes, 0) == 0
    p, d = Program(), on_device()
    p.side_waits()
    with p.side:
        d.copy_(t, non_blocking=True)
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0
    p.main_waits()
    assert sim.counters()["violations"] == 1
    assert d.isnan().all(), "the copy did not run: the memory may be gone"


def test_refusals_leave_an_error_behind_once(sim: Any, cudart: Any) -> None:
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


def test_the_next_operator_trips_over_an_uncleared_error(sim: Any, cudart: Any) -> None:
    """As on CUDA, where the check after a kernel launch finds it."""
    d = on_device()
    assert cudart.cudaHostUnregister(1) == NOT_REGISTERED
    with pytest.raises(RuntimeError, match="713"):
        d.fill_(1)
    d.fill_(1)


def test_pin_limit(sim: Any, cudart: Any) -> None:
    held = sim.counters()["pinned"]
    sim.pin_limit(held + 1000)
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
    assert sim.counters()["pinned"] == held + kept.nbytes
    sim.pin_limit(-1)
    torch.zeros(N).pin_memory()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_a_copy_may_not_leave_the_registered_range(sim: Any, cudart: Any, non_blocking: bool) -> None:
    t, d = torch.zeros(100), on_device(100)
    assert cudart.cudaHostRegister(t.data_ptr(), 396, 0) == 0
    d[:99].copy_(t[:99], non_blocking=non_blocking)
    with pytest.raises(RuntimeError, match="ends beyond it"):
        d.copy_(t, non_blocking=non_blocking)
    assert cudart.cudaHostUnregister(t.data_ptr()) == 0


def test_transfers_are_counted_by_kind(sim: Any) -> None:
    d = on_device()
    pinned, pageable = torch.zeros(N).pin_memory(), torch.zeros(N)
    d.copy_(pinned)
    d[:10].copy_(pageable[:10])
    pinned[:100].copy_(d[:100])
    pageable[:1000].copy_(d[:1000])
    d[:5].copy_(d[5:10])
    counters = sim.counters()
    elements = {"h2d_pinned": N, "h2d_pageable": 10, "d2h_pinned": 100, "d2h_pageable": 1000, "d2d": 5}
    elements |= {"h2d": N + 10, "d2h": 1100, "h2d_async": 0, "d2h_async": 0}
    assert {name: counters[name] for name in elements} == {name: 4 * n for name, n in elements.items()}
    sim.reset()
    assert not any(sim.counters()[name] for name in elements)


# ------------------------------------------------------------------------------------------------------ time and events


def test_slow_operators_leave_the_copies_alone(sim: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
    p, d, x = Program(), on_device(), on_device()
    p.side_waits()
    sim.op_delay_us(600_000)
    p.copy(d)
    copied = p.side.record_event()
    assert not copied.query()
    start = time.perf_counter()
    x.fill_(1)
    assert time.perf_counter() - start >= 0.6
    assert copied.query(), "the copy went on meanwhile"
    with p.side:
        start = time.perf_counter()
        d.fill_(1)
        assert time.perf_counter() - start < 0.6, "only the default stream is slow"


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x + 1,
        lambda x: torch.nn.functional.conv2d(x, x),
        lambda x: torch.nn.functional.layer_norm(x, (4, 4)),
        lambda x: torch.nn.functional.group_norm(x, 2),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    ],
    ids=["fallback", "convolution", "layer_norm", "group_norm", "attention"],
)
def test_every_path_is_slow(sim: Any, operator: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(2, 2, 4, 4, device="simgpu")
    sim.op_delay_us(200_000)
    start = time.perf_counter()
    operator(x)
    assert time.perf_counter() - start >= 0.2
    sim.op_delay_us(0)
    start = time.perf_counter()
    operator(x)
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_is_the_cpus(sim: Any, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=random).to(dtype) for n in (12, 20, 20))
    masks = [None, torch.rand(2, 1, 12, 20, generator=random) > 0.3, torch.randn(12, 20, generator=random).to(dtype)]
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        for mask in masks:
            on_sim = attend(*(t.to("simgpu") for t in (q, k, v)), None if mask is None else mask.to("simgpu"), scale=0.3)
            assert torch.equal(on_sim.cpu(), attend(q, k, v, mask, scale=0.3))
        assert torch.equal(attend(*[q.to("simgpu")] * 3, is_causal=True).cpu(), attend(q, q, q, is_causal=True))
    x = q.float().to("simgpu").requires_grad_()  # a backward pass takes the operators one by one
    (made,) = torch.autograd.grad(attend(x, x, x).sum(), x)
    y = q.float().requires_grad_()
    (expected,) = torch.autograd.grad(attend(y, y, y).sum(), y)
    torch.testing.assert_close(made.cpu(), expected)


def test_attention_reads_what_it_is_given(sim: Any) -> None:
    for at in range(3):
        p, d = Program(), on_device()
        p.side_waits()
        p.copy(d)
        given = [torch.ones(1, 1, 4, 4, device="simgpu") for _ in range(3)]
        given[at] = d[:16].view(1, 1, 4, 4)
        torch.nn.functional.scaled_dot_product_attention(*given)
        assert "scaled_dot_product_attention" in str(sim.hazards()), "it has not waited for the copy"
        sim.drain()
        sim.reset()


def test_half_convolutions_are_summed_in_single_precision(sim: Any) -> None:
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*n, generator=random).half() for n in ((2, 8, 9, 9), (8, 8, 3, 3), (8,)))
    made = torch.nn.functional.conv2d(x.to("simgpu"), w.to("simgpu"), b.to("simgpu"), padding=1)
    expected = torch.nn.functional.conv2d(x.float(), w.float(), b.float(), padding=1).half()
    assert made.dtype == torch.float16 and torch.equal(made.cpu(), expected)


def test_time_between_events_of_two_streams(sim: Any) -> None:
    sim.configure(-1, SLOW, 0, 0)
    p, d = Program(), on_device()
    p.side_waits()
    start, end = (torch.Event(device="simgpu", enable_timing=True) for _ in range(2))
    start.record(p.main)
    p.copy(d)
    end.record(p.side)
    with pytest.raises(RuntimeError, match="completed"):
        start.elapsed_time(end)
    end.synchronize()
    assert 262 <= start.elapsed_time(end) < 5000  # ms
    assert end.elapsed_time(start) == -start.elapsed_time(end)
    untimed = p.main.record_event()
    with pytest.raises(ValueError, match="enable_timing"):
        start.elapsed_time(untimed)


def test_a_stream_as_a_context(sim: Any, mod: Any) -> None:
    outer, inner, before = side_stream(), side_stream(), main_stream()
    with outer:
        assert torch.accelerator.current_stream() == outer == mod.current_stream()
        with inner, inner:
            assert torch.accelerator.current_stream() == inner
        assert torch.accelerator.current_stream() == outer
    with mod.stream(inner), mod.stream(None):
        assert mod.current_stream() == inner
    assert torch.accelerator.current_stream() == before != outer


# -------------------------------------------------------------------------------------------------- the device's module


def test_memory_figures(sim: Any, mod: Any) -> None:
    base = device_bytes(sim)
    sim.configure(base + 10 * 4 * N, 0, 0, 0)
    del (d := [on_device(2 * N)])[:]
    d.append(on_device())
    for name in ("memory_allocated", "memory_reserved"):
        assert getattr(mod, name)() == getattr(mod, name)("simgpu:0") == base + 4 * N
        assert getattr(mod, f"max_{name}")() == base + 8 * N
        assert getattr(torch.accelerator, name)() == base + 4 * N
        assert getattr(torch.accelerator, f"max_{name}")() == base + 8 * N
    assert mod.mem_get_info() == (9 * 4 * N, base + 10 * 4 * N)
    if hasattr(torch.accelerator, "get_memory_info"):  # from PyTorch 2.10 on
        assert torch.accelerator.get_memory_info() == mod.mem_get_info()
    mod.reset_peak_memory_stats()
    assert mod.max_memory_allocated() == mod.max_memory_reserved() == base + 4 * N
    mod.empty_cache()
    torch.accelerator.empty_cache()
    sim.configure(base + GRANULE, 0, 0, 0)
    assert mod.mem_get_info()[0] == 0, "free memory is never negative"


@pytest.mark.parametrize("synchronize", ["module", "accelerator", "stream"])
def test_synchronize_waits(sim: Any, mod: Any, synchronize: str) -> None:
    sim.configure(-1, SLOW, 0, 0)
    p, d = Program(), on_device()
    p.side_waits()
    p.copy(d)
    assert not p.side.query()
    {"module": mod.synchronize, "accelerator": torch.accelerator.synchronize, "stream": p.side.synchronize}[
        synchronize
    ]()
    assert p.side.query()
    d.sum()
    assert sim.hazards() == []


def draw(n: int = 3, **options: Any) -> list[float]:
    return torch.randn(n, device="simgpu", **options).tolist()


@pytest.fixture
def _rng() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_rng")
@pytest.mark.parametrize("n", [3, 1000])  # the first leaves half a pair of normals in the generator
def test_state_of_the_default_generator(sim: Any, mod: Any, n: int) -> None:
    draw(n)
    host, state = torch.get_rng_state(), mod.get_rng_state("simgpu")
    first, second = draw(n), draw(n)
    assert first != second
    assert torch.equal(torch.get_rng_state(), host), "the device does not draw from the host's generator"
    torch.randn(n)
    mod.set_rng_state(state, "simgpu")
    assert [draw(n), draw(n)] == [first, second]
    assert mod.default_generators[0].device.type == "simgpu"


@pytest.mark.usefixtures("_rng")
def test_seeds(sim: Any, mod: Any) -> None:
    torch.manual_seed(5)
    expected = draw()
    for seed in (torch.manual_seed, mod.manual_seed, mod.manual_seed_all):
        assert draw() != expected
        seed(5)
        assert draw() == expected
        assert mod.initial_seed() == 5


@pytest.mark.usefixtures("_rng")
def test_fork_rng(sim: Any) -> None:
    torch.manual_seed(6)
    with torch.random.fork_rng(device_type="simgpu"):
        expected = draw()
    assert draw() == expected


def test_a_generator_of_the_device(sim: Any, mod: Any) -> None:
    g = torch.Generator("simgpu").manual_seed(7)
    default = mod.get_rng_state()
    draw(generator=g)
    state = g.get_state()
    expected = draw(generator=g)
    g.set_state(state)
    clone = g.clone_state()
    assert clone.device.type == "simgpu"
    assert draw(generator=g) == expected == draw(generator=clone)
    assert torch.equal(mod.get_rng_state(), default)


def inference(device: str) -> list[Any]:
    with torch.inference_mode():
        t = torch.arange(12.0, device=device)
        view = t.view(3, 4)
        view[1].fill_(9)
        copy = torch.empty(12, device=device).copy_(t)
        assert t.is_inference() and view.is_inference() and view[1].is_inference()
        seen = [view.t().reshape(-1).tolist(), view[:, 1:].sum().item(), copy.tolist()]
        t.set_(copy.untyped_storage(), 4, (2,))
        copy[4] = 5
    weight = torch.ones(4, device=device, requires_grad=True)
    with torch.inference_mode():
        seen.append((copy.view(3, 4) * weight).tolist())
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        t.add_(1)
    return [*seen, t.shape]


def test_inference_mode(sim: Any) -> None:
    assert inference("simgpu") == inference("cpu")


# ------------------------------------------------------------------------------------------------------------- building


def test_load_is_idempotent(sim: Any) -> None:
    assert testing.load() is sim
    assert testing.simulated_device() == torch.device("simgpu", 0)
    assert torch.get_device_module("simgpu").ext is sim


def test_importing_builds_nothing(tmp_path: Path) -> None:
    code = "import sys, torch, prefetch_offload.testing; assert not hasattr(torch, 'simgpu'), 'loaded'"
    done = python(code, XDG_CACHE_HOME=str(tmp_path), CXX="/nowhere/c++")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_no_compiler(tmp_path: Path) -> None:
    code = """
from prefetch_offload.testing import SimulatorUnavailable, load
try: load()
except SimulatorUnavailable as error: print(error)
"""
    done = python(code, XDG_CACHE_HOME=str(tmp_path), CXX="/nowhere/c++ -m64")
    assert "compiler '/nowhere/c++' was not found" in done.stdout, done.stderr
    assert "apt install g++" in done.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_no_ninja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(SimulatorUnavailable, match="pip install ninja"):
        simgpu._toolchain()


def test_no_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's extension builder imports it."""
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.delattr("torch.utils.cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)
    with pytest.raises(SimulatorUnavailable, match="pip install setuptools"):
        simgpu._toolchain()


def test_what_does_not_compile_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "simgpu.cpp"
    broken.write_text("#error no such accelerator\n")
    monkeypatch.setattr(simgpu, "_sources", lambda: [broken])
    with pytest.raises(SimulatorUnavailable, match="no such accelerator"):
        simgpu._compile(tmp_path / "simgpu_ext.so")
    assert list(tmp_path.iterdir()) == [broken]


def test_an_edited_source_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {path.name for path in simgpu._sources()}
    assert names == {"simgpu.cpp", "simgpu_device.h", "simgpu_order.h"}
    copies = [tmp_path / name for name in sorted(names)]
    for path in copies:
        path.write_bytes((simgpu._HERE / path.name).read_bytes())
    here = simgpu._build_key()
    monkeypatch.setattr(simgpu, "_HERE", tmp_path)
    assert simgpu._build_key() == here, "the same source at another place"
    for path in copies:
        path.write_text(path.read_text() + "\n")
        assert simgpu._build_key() != here
        here = simgpu._build_key()


def test_where_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    temporary, home, cache, shared = (tmp_path / name for name in ("temporary", "home", "cache", "shared"))
    for path in (temporary, shared):
        path.mkdir()
    (shared / "prefetch_offload").mkdir()
    (shared / "prefetch_offload").chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    key = simgpu._build_key()

    def built(**environment: str) -> Path:
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.setenv(name, environment.get(name, ""))
        directory = simgpu._build_directory()
        assert directory.is_dir() and directory.stat().st_mode & 0o077 == 0
        return directory

    fallback = temporary / f"prefetch_offload-{os.getuid()}" / key
    assert built(HOME=str(home)) == home / ".cache" / "prefetch_offload" / key
    assert built(HOME=str(home), XDG_CACHE_HOME=str(cache)) == cache / "prefetch_offload" / key
    assert built() == fallback
    assert built(HOME="relative") == fallback
    assert built(HOME="/dev/null") == fallback, "a home that cannot be written to"
    assert built(XDG_CACHE_HOME=str(shared)) == fallback, "others could put their code there"
    fallback.parent.chmod(0o777)
    assert built().parent == temporary and built() != fallback


def test_two_processes_build_once(sim: Any, tmp_path: Path) -> None:
    """The second waits for the first. Compiling is replaced by a slow copy of the build at hand."""
    library = simgpu._build_directory() / "simgpu_ext.so"
    code = f"""
import shutil, time, torch
from prefetch_offload.testing import simgpu
def compile(library):
    open({str(tmp_path / "log")!r}, "a").write("compiled;")
    time.sleep(2)
    shutil.copy({str(library)!r}, library)
    return simgpu._import(library)
simgpu._compile = compile
assert torch.ones(2, device=simgpu.simulated_device()).sum() == 2
"""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    builders = [subprocess.Popen([sys.executable, "-c", code], env=environ) for _ in range(2)]
    assert [builder.wait(120) for builder in builders] == [0, 0]
    assert (tmp_path / "log").read_text() == "compiled;"
