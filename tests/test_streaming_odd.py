"""Programs that do odd things to a component while it streams, on a small network of ordinary blocks."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, settle
from diffusers import DiffusionPipeline
from test_scripts import Pair
from torch import nn

from prefetch_offload import BudgetError
from prefetch_offload.component import Component, in_order_of_use
from prefetch_offload.moves import Moves
from prefetch_offload.simulator import Link, Workload
from prefetch_offload.window import Share, Window, handed_over, share_of

WIDTH, BLOCKS = 128, 12
X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
UNITS = {"unit_min": 16 << 10, "unit_max": 72 << 10}


class Net(nn.Module):
    def __init__(self, reads: Callable[[Net, torch.Tensor, int], torch.Tensor] | None = None, n: int = BLOCKS) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n))
        for block in self.blocks:
            block.weight.data = torch.randn(WIDTH, WIDTH, generator=noise) / WIDTH**0.5
        self.dtype, self.config, self.passes = torch.float32, None, 0
        self.reads = reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        for i, block in enumerate(self.blocks):
            x = torch.tanh(block(x))
            if self.reads is not None:
                x = self.reads(self, x, i)
        return x


class Pipeline(DiffusionPipeline):
    model_cpu_offload_seq = "first"

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first)

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor = X, steps: int = 3, callback: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        x = x.to(self._execution_device)
        for step in range(steps):
            x = self.first(x)
            if callback is not None:
                callback(step)
        self.maybe_free_model_hooks()
        return x.cpu()


def room(share: float) -> int:
    """A budget for that share of the blocks, and for activations."""
    return int(share * BLOCKS * 66560) + (64 << 10)


def truth(net: nn.Module, steps: int = 3, x: torch.Tensor = X) -> torch.Tensor:
    """By a copy that lives on the device."""
    twin = copy.deepcopy(net).to(DEVICE)
    with torch.no_grad():
        x = x.to(DEVICE)
        for _ in range(steps):
            x = twin(x)
        return x.cpu()


def often(call: Callable[..., Any], *args: Any, times: int = 2) -> None:
    for _ in range(times):
        call(*args)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_gradients_flow_through_streamed_blocks(share: float, sim: Any, enable: Any) -> None:
    net = Net()
    plain = copy.deepcopy(net).to(DEVICE)
    x = X.to(DEVICE).requires_grad_()
    plain(x).sum().backward()
    pipe = Pipeline(net)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    enable(pipe, budget=room(share), **UNITS)
    pipe()
    for _ in range(2):
        y = X.to(DEVICE).requires_grad_()
        pipe.first(y).sum().backward()
        assert torch.equal(y.grad.cpu(), x.grad.cpu())
        pipe.maybe_free_model_hooks()
    del plain, x, y
    settle(sim)


def _reads_behind(net: Net, x: torch.Tensor, i: int) -> torch.Tensor:
    return x + nn.functional.linear(x, net.blocks[3].weight) if i == 3 else x


def _reads_ahead(net: Net, x: torch.Tensor, i: int) -> torch.Tensor:
    return x + nn.functional.linear(x, net.blocks[8].weight) if i == 1 else x


@pytest.mark.parametrize("reads", [_reads_behind, _reads_ahead])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_weight_that_is_read_outside_of_its_module(reads: Any, share: float, sim: Any, enable: Any) -> None:
    net = Net(reads)
    expected = truth(net)
    pipe = Pipeline(net)
    offload = enable(pipe, budget=room(share), **UNITS)
    for _ in range(3):
        assert same(pipe(), expected)
    pipe.first.blocks[5].compile(backend="eager")  # charted anew, and not forgotten
    for _ in range(2):
        assert same(pipe(), expected)
    offload.budget = room(share - 0.1)
    for _ in range(2):
        assert same(pipe(), expected)


def test_a_read_that_comes_late_is_right_or_an_error(sim: Any, enable: Any) -> None:
    """It is not searched for any more; the weight is shown on the host while it is not there."""

    def reads(net: Net, x: torch.Tensor, i: int) -> torch.Tensor:
        return x + nn.functional.linear(x, net.blocks[8].weight) if i == 1 and net.passes > 4 else x

    net = Net(reads)
    pipe = Pipeline(net)
    enable(pipe, budget=room(0.4), **UNITS)
    pipe()
    found = []
    with contextlib.suppress(RuntimeError):  # two devices
        found.append(pipe())
    net.passes = 3
    assert all(same(image, truth(net)) for image in found)  # where the device takes operands of the host


def test_weights_of_a_component_that_streams_can_be_looked_at(sim: Any, enable: Any) -> None:
    net = Net()
    values = {name: value.clone() for name, value in net.state_dict().items()}
    expected = truth(net)
    pipe = Pipeline(net)
    enable(pipe, budget=room(0.4), **UNITS)
    seen = []

    def look(step: int) -> None:
        state = {name: value.cpu() for name, value in pipe.first.state_dict().items()}
        assert all(torch.equal(state[name], values[name]) for name in values)
        saved = io.BytesIO()
        torch.save(pipe.first.state_dict(), saved)
        saved.seek(0)
        loaded = torch.load(saved, map_location="cpu")
        assert all(torch.equal(loaded[name], values[name]) for name in values)
        copied = copy.deepcopy(pipe.first)
        assert all(torch.equal(p.cpu(), values[name]) for name, p in copied.named_parameters())
        seen.append(sum(float(p.norm()) for p in pipe.first.parameters()))

    for _ in range(2):
        assert same(pipe(callback=look), expected)
    assert len(seen) == 6 and len(set(seen)) == 1


def test_an_edit_in_a_callback_is_kept(sim: Any, enable: Any) -> None:
    net = Net()
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for block in changed.blocks:
            block.weight.mul_(0.5)
    pipe = Pipeline(net)
    enable(pipe, budget=room(0.4), **UNITS)

    def edit(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                for block in pipe.first.blocks:
                    block.weight.mul_(0.5)

    pipe(callback=edit)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), changed.parameters(), strict=True))
    assert same(pipe(), truth(changed))


def test_compiled_while_bound(sim: Any, enable: Any) -> None:
    net = Net()
    expected = truth(net, 1)
    pipe = Pipeline(net)
    enable(pipe, budget=room(0.4), **UNITS)
    pipe()
    with torch.no_grad():
        assert same(pipe.first(X.to(DEVICE)).cpu(), expected)
        for block in pipe.first.blocks:
            block.compile(backend="eager", dynamic=False)
        for _ in range(3):
            assert same(pipe.first(X.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("way", ["in place", "assigned", "its forward"])
def test_compiled_as_one_graph_it_is_refused_with_the_way_out(way: str, dynamo: None, sim: Any, enable: Any) -> None:
    """Never run wrong, never silently eager: nothing of it runs before there is room for all of it."""
    net, ran = Net(), []
    expected = truth(net)

    def counted(module: Any, inputs: Any) -> Any:
        return lambda *args: (ran.append(1), module.forward(*args))[1]

    pipe = Pipeline(net)
    offload = enable(pipe, budget=room(0.4), **UNITS)
    options: dict[str, Any] = {"backend": counted, "fullgraph": True}
    if way == "in place":
        pipe.first.compile(**options)
    elif way == "assigned":
        pipe.first = torch.compile(pipe.first, **options)
    else:
        pipe.first.forward = torch.compile(pipe.first.forward, **options)
    with pytest.raises(BudgetError, match=r"compiled as one graph.*compile_repeated_blocks"):
        often(pipe)
    assert not ran
    offload.budget = room(1.2)
    assert same(pipe(), expected) and ran


@pytest.mark.parametrize("share", [None, 0.4])
def test_one_component_in_two_threads(share: float | None, sim: Any, enable: Any) -> None:
    net = Net()
    expected = truth(net, 1)
    pipe = Pipeline(net)
    enable(pipe, budget=None if share is None else room(share), **UNITS)
    wrong: list[Any] = []

    def work() -> None:
        x = X.to(DEVICE)
        try:
            with torch.no_grad():
                wrong.extend(i for i in range(12) if not same(pipe.first(x).cpu(), expected))
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.tail = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.tanh(self.proj(x)))


class _Tied(nn.Module):
    """One of a block's layers is the last layer, too."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Inner() for _ in range(12))
        self.out = self.blocks[at].proj
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.out(x)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_layer_that_is_used_in_two_places(at: int, sim: Any, enable: Any) -> None:
    x = X[:, :48].contiguous()
    for share in (0.25, 0.35, 0.5, 0.7):
        net = _Tied(at)
        nbytes = sum(p.nbytes for p in net.parameters())
        expected = truth(net, 4, x)
        pipe = Pipeline(net)
        offload = enable(pipe, budget=int(share * nbytes) + (48 << 10), unit_min=16 << 10, unit_max=32 << 10)
        for _ in range(4):
            assert same(pipe(x, 4), expected)
        offload.disable()


@pytest.mark.parametrize("known", [True, False])
def test_the_first_component_goes_back_to_its_window_where_the_device_has_less_than_the_budget(
    sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """By its plan it streams; a call begins with all of it, as far as anyone knows. The device says how much it has, which may
    be wrong by the time that it matters."""
    first, second = Net(), Net(n=4)
    pipe = Pair(first, second)

    def strategy(workload: Workload, budget: int, link: Link) -> dict[str, Share]:
        name, c = next(iter(workload.components.items()))
        share = share_of(c.units, c.nbytes, c.compute_ms, 7 * 66560, 2 * 66560, c.must)
        return {name: dataclasses.replace(share, ahead=True)}

    offload = enable(pipe, budget=room(1.5), strategy=strategy, **UNITS)
    expected = [pipe(X, 1) for _ in range(3)]
    component = next(iter(offload._session.client.components.values()))
    held = offload._engine.residency.held(component.key)
    assert len(held) == len(component.units), "between calls, all of it has come"
    offload.release()
    settle(sim)
    sim.configure(int(sim.counters()["allocated"]) + room(0.75), 0, 0, 0)
    if not known:
        monkeypatch.setattr(offload._engine.lanes, "free_nbytes", lambda: 1 << 40)
    for _ in range(3):
        assert same(pipe(X, 1), expected[0])
    assert (offload.stats.counts.get("ladder", 0) > 0) is not known


def test_the_first_component_stays_where_it_came_before_there_was_a_plan(sim: Any, enable: Any) -> None:
    """By its plan it streams: what has come whole is used as it is."""
    pipe = Pair(Net(), Net())

    def strategy(workload: Workload, budget: int, link: Link) -> dict[str, Share]:
        name, c = next(iter(workload.components.items()))
        share = share_of(c.units, c.nbytes, c.compute_ms, 7 * 66560, 2 * 66560, c.must)
        return {name: dataclasses.replace(share, ahead=False)}

    offload = enable(pipe, budget=room(1.25), strategy=strategy, **UNITS)
    expected = pipe(X, 1)
    component = next(iter(offload._session.client.components.values()))
    assert len(offload._engine.residency.held(component.key)) == len(component.units), "between calls, all of it has come"
    moved = offload.stats.components[0].h2d_nbytes
    within: list[int] = []
    handle = pipe.first.register_forward_hook(lambda *_: within.append(offload.stats.components[0].h2d_nbytes))
    assert same(pipe(X, 1), expected)
    assert offload._session.client.shares[component.key].limit_nbytes == 7 * 66560, "there was a plan"
    assert same(pipe(X, 1), expected)
    handle.remove()
    assert within[0] - moved <= 66560, "in the call with the first plan nothing comes again but, at its end, for the next call"
    assert within[1] - within[0] > 5 * 66560, "later it streams"


def learned(net: nn.Module, enable: Any, **settings: Any) -> Component:
    """What is known of the network after three calls, which were right."""
    expected = truth(net)
    pipe = Pipeline(net)
    offload = enable(pipe, **settings)
    for _ in range(3):
        assert same(pipe(), expected)
    (component,) = offload._session.client.components.values()
    return component


class _TakingTurns(nn.Module):
    """A block like those of diffusers' UNets: its second halves are defined before its first ones, called in turns."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.lists = first, second
        for name in (second, first):
            self.add_module(name, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(12))
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in zip(*(self.get_submodule(name) for name in self.lists), strict=True):
            x = torch.tanh(second(torch.tanh(first(x))))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.mark.parametrize(
    ("first", "second", "order"), [("former", "latter", [1, 0, 2]), ("resnets", "attentions", [0, 1, 2])]
)
def test_a_unit_that_is_read_at_both_ends_of_a_block_comes_before_it(
    first: str, second: str, order: list[int], sim: Any, enable: Any
) -> None:
    """The unit of the last of one list and the first of the other: behind the others of the block, the pass would wait for them
    all. Where names tell of the turns, there is none: each unit has what is called together."""
    net = _TakingTurns(first, second)
    two = 2 * 66560
    component = learned(net, enable, budget=5 * two + (64 << 10), unit_min=two - 1024, unit_max=two)
    assert [component.order.index(u.key) for u in component.units] == [*order, *range(3, 9)], component.order


@pytest.mark.parametrize(
    ("reads", "order"),
    [
        ("abcd", "abcd"),
        ("aabbc", "abc"),
        ("abacdef", "abcdef"),  # away for longest from its second read to the next pass
        ("abcdea", "bcdea"),  # ... from its first read to its second one: it stays from the end of a pass into the next
        ("abcabc", "abc"),
        ("babc", "bac"),
    ],
)
def test_units_come_behind_the_longest_time_without_them(reads: str, order: str) -> None:
    assert in_order_of_use(list(reads)) == list(order)


class _Backwards(Net):
    """Two inputs through the first block, then the others, the last one first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.blocks[0](x)) + torch.tanh(self.blocks[0](-x))
        for block in reversed(self.blocks[1:]):
            x = torch.tanh(block(x))
        return x


def test_the_order_is_learned_from_a_pass_that_calls_its_first_block_twice(sim: Any, enable: Any) -> None:
    net = _Backwards()
    component = learned(net, enable, budget=room(0.5), **UNITS)
    assert component.order == tuple(u.key for u in (component.units[0], *reversed(component.units[1:])))


class _Rounds(Net):
    """One block, and then rounds through the others, as a video VAE's decoder goes frame by frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.blocks[0](x))
        for _ in range(8):
            for block in self.blocks[1:]:
                x = torch.tanh(block(x))
        return x


def test_once_all_has_been_read_a_pass_looks_no_further_for_what_to_prefetch(
    sim: Any, enable: Any, monkeypatch: Any
) -> None:
    looks = []
    look = Moves.prefetch_others
    monkeypatch.setattr(Moves, "prefetch_others", lambda *args: (looks.append(args[2]), look(*args)))
    net = _Rounds()
    expected = truth(net, 1)
    pipe = Pipeline(net)

    def strategy(workload: Workload, budget: int, link: Link) -> dict[str, Share]:
        return {name: handed_over(c.units, c.nbytes, c.must) for name, c in workload.components.items()}

    offload = enable(pipe, budget=room(1.3), strategy=strategy, **UNITS)
    for _ in range(3):
        looks.clear()
        assert same(pipe(steps=1), expected)
    (component,) = offload._session.client.components.values()
    assert len(looks) <= len(component.units)


def test_a_block_whose_forward_is_called(sim: Any, enable: Any) -> None:
    """No point is called: every block is found and stays, so that a small budget is refused, and never passed over."""

    class Direct(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block.forward(x))
            return x

    net = Direct()
    expected = truth(net)
    pipe = Pipeline(net)
    offload = enable(pipe, budget=room(0.4), **UNITS)
    with pytest.raises(BudgetError, match="first needs"):
        often(pipe)
    offload.budget = room(1.1)
    for _ in range(2):
        sim.reset()
        assert same(pipe(), expected)
        assert sim.counters()["peak"] <= room(1.1)


def test_a_pipeline_called_in_the_callback_of_one_that_shares_its_component(sim: Any, enable: Any) -> None:
    net = Net()
    expected, once = truth(net), truth(net, 1)
    pipe, other = Pipeline(net), Pipeline(net)
    enable(pipe, budget=room(0.5), **UNITS)
    enable(other, budget=room(0.5), **UNITS)
    assert same(pipe(), expected)
    for at in range(3):
        inner: list[torch.Tensor] = []

        def call(step: int, at: int = at, inner: list[torch.Tensor] = inner) -> None:
            if step == at:
                inner.append(other(steps=1))

        assert same(pipe(callback=call), expected)
        assert same(inner[0], once)
    assert same(pipe(), expected)


def test_an_interrupt_between_a_decision_and_its_moves(sim: Any, enable: Any, monkeypatch: Any) -> None:
    net = Net()
    expected = truth(net, 1)
    pipe = Pipeline(net)
    enable(pipe, budget=room(0.4), **UNITS)
    pipe()
    x = X.to(DEVICE)
    done, left = Window.done, [-1]

    def interrupted(self: Window, unit: str, last: bool) -> Any:
        moves = done(self, unit, last)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return moves

    monkeypatch.setattr(Window, "done", interrupted)
    with torch.no_grad():
        for number in range(1, 12):
            left[0] = number
            with pytest.raises(KeyboardInterrupt):
                often(pipe.first, x, times=4)
            left[0] = -1
            assert same(pipe.first(x).cpu(), expected)
