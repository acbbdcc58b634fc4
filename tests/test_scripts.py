"""Calls of a few large units follow a script: the shortest schedule there is, carried out by the engine as it was found."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import DEVICE, settle
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import prefetch_offload
from prefetch_offload.schedule import _scripts, repeating
from prefetch_offload.simulator import Link, Workload, simulate
from prefetch_offload.window import Scripted, Share

UNITS = {"unit_min": 256, "unit_max": 2 << 20}


class Chain(nn.Module):
    """Square layers of the given widths; a vector is cut or padded to each."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w, w, bias=False) for w in widths)
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            w = layer.in_features
            x = torch.tanh(layer(nn.functional.pad(x, (0, max(0, w - x.shape[-1])))[..., :w]))
        return x


class Pair(DiffusionPipeline):
    model_cpu_offload_seq = "first->second"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, second=second)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, passes: int) -> torch.Tensor:
        x = self.first(x.to(DEVICE))
        for _ in range(passes):
            x = self.second(x)
        self.maybe_free_model_hooks()
        return x.cpu()


def build(seed: int) -> tuple[Pair, int, int]:
    """A pipeline, passes of its second component, and the bytes of its weights."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    widths = [[draw.randrange(128, 512, 32) for _ in range(n)] for n in (3, 4)]
    return Pair(*map(Chain, widths)), draw.choice([2, 3]), sum(4 * w * w for some in widths for w in some)


class Trying:
    """A strategy: the shortest schedule, for made-up times, so that measurements have no say in what is tested."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked: list[tuple[Workload, int, Mapping[str, Share]]] = []
        self.link = Link(0.3)

    def __call__(self, workload: Workload, budget_nbytes: int, link: Link) -> Mapping[str, Share]:
        draw = random.Random(self.seed)
        components = {
            name: replace(c, compute_ms={u: draw.uniform(0.1, 2.0) for u in c.units})
            for name, c in workload.components.items()
        }
        workload = Workload(components, workload.runs)
        schedule, _ = repeating(workload, budget_nbytes, self.link, 1e9, 200_000)
        assert schedule is not None
        shares = _scripts(workload, schedule)
        self.asked.append((workload, budget_nbytes, shares))
        return shares


@pytest.mark.parametrize("share", [0.55, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_copied_is_what_the_script_says(seed: int, share: float, sim: Any, enable: Any) -> None:
    pipe, passes, nbytes = build(seed)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    expected = pipe.to(DEVICE)(x, passes)
    pipe, passes, nbytes = build(seed)
    strategy = Trying(seed)
    budget = int(share * nbytes)
    offload = enable(pipe, budget=budget, strategy=strategy, fingerprints=False, **UNITS)
    copied = []
    for call in range(6):
        copied.append(copied_in_a_call(sim, offload, lambda: pipe(x, passes), expected, budget))
        if call > 0:
            assert all(isinstance(w, Scripted) for w in windows(pipe))
    assert not offload.stats.counts
    assert len(set(copied[-3:])) == 1, copied
    assert copied[-1] == planned_nbytes(strategy, offload), "bytes of a call, by the script"


def copied_in_a_call(sim: Any, offload: Any, call: Callable[[], torch.Tensor], expected: torch.Tensor, budget: int) -> int:
    """Bytes that a call copies in, which has to be right and within the budget."""
    settle(sim)
    sim.reset()
    before = offload.stats.h2d_nbytes
    assert torch.equal(call(), expected)
    assert sim.counters()["peak"] <= budget
    return int(offload.stats.h2d_nbytes - before)


def planned_nbytes(strategy: Trying, offload: Any) -> int:
    """Bytes that a call in the steady state copies in, by the last plan: what the fourth adds to three."""
    workload, room, shares = strategy.asked[-1]
    payload = {u.key: u.payload_nbytes for c in offload._session.client.components.values() for u in c.units}
    totals = []
    for calls in (3, 4):
        spans = simulate(workload, shares, room, strategy.link, calls).timeline.spans
        totals.append(sum(payload[str(s.args["unit"])] for s in spans if s.track == "copy"))
    return totals[1] - totals[0]


def windows(pipe: Pair) -> list[Any]:
    streams = [m._hf_hook.component.stream for m in (pipe.first, pipe.second)]
    return [s.window for s in streams if s is not None]


def test_a_call_of_other_passes_than_scripted(sim: Any, enable: Any) -> None:
    """More, fewer, and an exception in between: the same images, in the budget."""
    pipe, _, nbytes = build(7)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(7))
    resident = pipe.to(DEVICE)
    expected = {passes: resident(x, passes) for passes in (1, 2, 3, 6)}
    del resident
    pipe, _, nbytes = build(7)
    budget = int(0.6 * nbytes)
    offload = enable(pipe, budget=budget, strategy=Trying(7), fingerprints=False, **UNITS)
    for passes in (2, 2, 6, 1, 3, 2, 2):
        settle(sim)
        sim.reset()
        assert torch.equal(pipe(x, passes), expected[passes])
        assert sim.counters()["peak"] <= budget
    handle = pipe.second.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(x, 2)
    handle.remove()
    for passes in (2, 2, 3):
        assert torch.equal(pipe(x, passes), expected[passes])
    assert not offload.stats.counts


def test_two_pipelines_of_which_one_has_a_script(sim: Any, enable: Any) -> None:
    pipe, passes, nbytes = build(1)
    other, others_passes, _ = build(2)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    expected = pipe.to(DEVICE)(x, passes), other.to(DEVICE)(x, others_passes)
    pipe, other = build(1)[0], build(2)[0]
    enable(pipe, budget=int(0.6 * nbytes), strategy=Trying(1), fingerprints=False, **UNITS)
    enable(other, budget=int(0.6 * nbytes), fingerprints=False, **UNITS)
    for _ in range(3):
        assert torch.equal(pipe(x, passes), expected[0])
        assert torch.equal(other(x, others_passes), expected[1])
        assert torch.equal(pipe(x, passes), expected[0])


class Turns(Chain):
    """Reads its layers in the order given, some of them more than once, and a scale of its own throughout."""

    def __init__(self, widths: list[int], turns: list[int]) -> None:
        super().__init__(widths)
        self.scale = nn.Parameter(torch.ones(64))
        self.turns = turns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for turn in self.turns:
            layer = self.layers[turn]
            w = layer.in_features
            x = torch.tanh(layer(nn.functional.pad(x, (0, max(0, w - x.shape[-1])))[..., :w])) * self.scale[0]
        return x


TURNS = {"back": [0, 1, 0, 2, 3], "twice": [0, 0, 1, 2, 2, 3], "round": [0, 1, 2, 3, 0, 1, 2, 3], "last": [1, 2, 0, 3, 1]}


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("turns", TURNS)
def test_units_that_are_read_in_several_places(turns: str, share: float, sim: Any, enable: Any) -> None:
    """A script has one turn for each unit in a pass. A read besides that costs a copy where the unit has left, nothing else."""

    def made() -> Pair:
        torch.manual_seed(5)
        return Pair(Chain([256, 320, 192]), Turns([384, 256, 448, 320], TURNS[turns]))

    pipe = made()
    nbytes = sum(p.nbytes for m in (pipe.first, pipe.second) for p in m.parameters())
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    expected = pipe.to(DEVICE)(x, 3)
    pipe = made()
    strategy = Trying(3)
    budget = int(share * nbytes)
    offload = enable(pipe, budget=budget, strategy=strategy, fingerprints=False, **UNITS)
    copied = [copied_in_a_call(sim, offload, lambda: pipe(x, 3), expected, budget) for _ in range(5)]
    assert not offload.stats.counts
    assert len(set(copied[-2:])) == 1, copied
    planned = planned_nbytes(strategy, offload)
    if turns == "round":
        assert copied[-1] <= 2 * planned, "every pass is two"
    elif turns == "back":
        again = 3 * pipe.second.layers[0].weight.nbytes
        assert copied[-1] <= planned + again, "at most the one that is read twice, in each pass"
    else:
        assert copied[-1] == planned


WIDTHS = st.lists(st.integers(4, 14).map(lambda n: 32 * n), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    widths=st.tuples(WIDTHS, WIDTHS),
    passes=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    share=st.floats(0.1, 1.3),
    gbps=st.sampled_from([0.02, 0.1, 0.5, 4.0]),
)
def test_any_network_in_any_budget_over_any_link(
    sim: Any, widths: tuple[list[int], list[int]], passes: list[int], share: float, gbps: float
) -> None:
    """By the default strategy, for times as they are: right, in the budget, without a hazard, and it ends."""

    def made() -> Pair:
        torch.manual_seed(len(passes))
        return Pair(*map(Chain, widths))

    nbytes = [4 * w * w for some in widths for w in some]
    budget = max(int(share * sum(nbytes)), 2 * max(nbytes) + (32 << 10))  # activations, and the margin that is left to them
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    sim.configure(1 << 50, 0, 0, 0)
    resident = made().to(DEVICE)
    expected = [resident(x, n) for n in passes]
    del resident
    pipe = made()
    settle(sim)
    sim.configure(1 << 50, gbps, gbps, gbps)
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock in the simulator hears no signal
    try:
        with prefetch_offload.enable(pipe, device=DEVICE, budget=budget, verify=True, **UNITS) as offload:
            for n, truth in zip(passes, expected, strict=True):
                settle(sim)
                sim.reset()
                assert torch.equal(pipe(x, n), truth)
                assert sim.counters()["peak"] <= budget
                offload._engine.residency.validate()
            assert offload.stats.peak_nbytes <= budget
            assert not offload.stats.counts
            assert offload.hazards == []
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert sim.hazards() == []
