"""The simulated accelerator: time, events, operators, and the module that shows it to PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from simulated import GRANULE, SLOW, N, Program, device_bytes, main_stream, on_device, side_stream

# ------------------------------------------------------------------------------------------------------ time and events


def test_slow_operators_leave_the_copies_alone(bare: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
    p, d, x = Program(), on_device(), on_device()
    p.side_waits()
    bare.op_delay_us(600_000)
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
def test_every_path_is_slow(bare: Any, operator: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(2, 2, 4, 4, device="simgpu")
    bare.op_delay_us(200_000)
    start = time.perf_counter()
    operator(x)
    assert time.perf_counter() - start >= 0.2
    bare.op_delay_us(0)
    start = time.perf_counter()
    operator(x)
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_is_the_cpus(bare: Any, dtype: torch.dtype) -> None:
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


def test_attention_reads_what_it_is_given(bare: Any) -> None:
    for at in range(3):
        p, d = Program(), on_device()
        p.side_waits()
        p.copy(d)
        given = [torch.ones(1, 1, 4, 4, device="simgpu") for _ in range(3)]
        given[at] = d[:16].view(1, 1, 4, 4)
        torch.nn.functional.scaled_dot_product_attention(*given)
        assert "scaled_dot_product_attention" in str(bare.hazards()), "it has not waited for the copy"
        bare.drain()
        bare.reset()


def test_half_convolutions_are_summed_in_single_precision(bare: Any) -> None:
    random = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*n, generator=random).half() for n in ((2, 8, 9, 9), (8, 8, 3, 3), (8,)))
    made = torch.nn.functional.conv2d(x.to("simgpu"), w.to("simgpu"), b.to("simgpu"), padding=1)
    expected = torch.nn.functional.conv2d(x.float(), w.float(), b.float(), padding=1).half()
    assert made.dtype == torch.float16 and torch.equal(made.cpu(), expected)


def test_time_between_events_of_two_streams(bare: Any) -> None:
    bare.configure(-1, SLOW, 0, 0)
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


# --------------------------------------------------------------------------------------------------- the device's own clock
COPY_S = 4 * N / (SLOW * 1e9)


def ahead(bare: Any, op_s: float) -> tuple[Program, Callable[[], float]]:
    """A program on a link of `SLOW`, and what has passed by the device's clock since it began."""
    bare.configure(-1, SLOW, SLOW, SLOW)
    bare.op_delay_us(round(op_s * 1e6))
    bare.device_clock(True)
    began = bare.device_seconds()
    return Program(), lambda: bare.device_seconds() - began


def timed_event(stream: torch.Stream) -> torch.Event:
    event = torch.Event(device="simgpu", enable_timing=True)
    event.record(stream)
    return event


def test_on_the_devices_clock_nothing_takes_real_time_and_the_host_runs_ahead(bare: Any) -> None:
    (p, passed), d, x = ahead(bare, 10.0), on_device(), on_device()
    began = time.perf_counter()
    p.side_waits()
    start = timed_event(p.side)
    p.copy(d)
    copied = timed_event(p.side)
    x.fill_(1)
    ran = timed_event(p.main)
    x.fill_(1)
    assert passed() == 0, "the host has waited for nothing"
    assert not copied.query() and not ran.query() and not p.side.query()
    copied.synchronize()
    assert passed() == pytest.approx(COPY_S)
    assert copied.query() and not ran.query()
    assert start.elapsed_time(copied) == pytest.approx(1e3 * COPY_S)
    ran.synchronize()
    assert start.elapsed_time(ran) == pytest.approx(10e3), "one runs beside the other"
    bare.drain()
    assert passed() == pytest.approx(20)
    assert time.perf_counter() - began < 5
    assert d.cpu().equal(p.pinned)


def test_on_the_devices_clock_streams_wait_for_each_other(bare: Any) -> None:
    (p, passed), d, x = ahead(bare, 1.0), on_device(), on_device()
    x.fill_(1)
    p.side_waits()
    p.copy(d)
    second = on_device()
    p.side_waits()
    p.copy(second)
    p.main_waits()
    x.fill_(1)
    ran = timed_event(p.main)
    ran.synchronize()
    assert passed() == pytest.approx(1 + 2 * COPY_S + 1)
    assert bare.hazards() == []


@pytest.mark.parametrize("wait", ["item", "cpu", "pageable", "stream", "device"])
def test_on_the_devices_clock_the_host_waits_where_it_does_on_a_device(bare: Any, wait: str) -> None:
    (p, passed), x = ahead(bare, 1.0), on_device()
    x.fill_(1)
    assert passed() == 0
    if wait == "item":
        x[0].item()
    elif wait == "cpu":
        x.cpu()
    elif wait == "pageable":
        x.copy_(torch.zeros(N))
    elif wait == "stream":
        p.main.synchronize()
    else:
        torch.accelerator.synchronize()
    copied = COPY_S if wait in ("cpu", "pageable") else 0
    assert passed() == pytest.approx(1 + copied)
    x.fill_(1)
    assert passed() == pytest.approx(1 + copied)
    after = p.main.record_event()
    assert not after.query()


def test_the_devices_clock_goes_on_where_it_stood(bare: Any) -> None:
    (p, passed), x = ahead(bare, 1.0), on_device()
    x.fill_(1)
    before = p.main.record_event()
    bare.device_clock(True)
    assert before.query(), "what was before has happened"
    x.fill_(1)
    bare.drain()
    assert passed() == pytest.approx(2)
    bare.device_clock(False)
    bare.op_delay_us(0)
    assert p.main.record_event().query()


def test_a_stream_as_a_context(bare: Any, mod: Any) -> None:
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


def test_memory_figures(bare: Any, mod: Any) -> None:
    base = device_bytes(bare)
    bare.configure(base + 10 * 4 * N, 0, 0, 0)
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
    bare.configure(base + GRANULE, 0, 0, 0)
    assert mod.mem_get_info()[0] == 0, "free memory is never negative"


@pytest.mark.parametrize("synchronize", ["module", "accelerator", "stream"])
def test_synchronize_waits(bare: Any, mod: Any, synchronize: str) -> None:
    bare.configure(-1, SLOW, 0, 0)
    p, d = Program(), on_device()
    p.side_waits()
    p.copy(d)
    assert not p.side.query()
    {"module": mod.synchronize, "accelerator": torch.accelerator.synchronize, "stream": p.side.synchronize}[
        synchronize
    ]()
    assert p.side.query()
    d.sum()
    assert bare.hazards() == []


def draw(n: int = 3, **options: Any) -> list[float]:
    return torch.randn(n, device="simgpu", **options).tolist()


@pytest.fixture
def _rng() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.usefixtures("_rng")
@pytest.mark.parametrize("n", [3, 1000])  # the first leaves half a pair of normals in the generator
def test_state_of_the_default_generator(bare: Any, mod: Any, n: int) -> None:
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
def test_seeds(bare: Any, mod: Any) -> None:
    torch.manual_seed(5)
    expected = draw()
    for seed in (torch.manual_seed, mod.manual_seed, mod.manual_seed_all):
        assert draw() != expected
        seed(5)
        assert draw() == expected
        assert mod.initial_seed() == 5


@pytest.mark.usefixtures("_rng")
def test_fork_rng(bare: Any) -> None:
    torch.manual_seed(6)
    with torch.random.fork_rng(device_type="simgpu"):
        expected = draw()
    assert draw() == expected


def test_a_generator_of_the_device(bare: Any, mod: Any) -> None:
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


def test_inference_mode(bare: Any) -> None:
    assert inference("simgpu") == inference("cpu")
