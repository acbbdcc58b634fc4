"""torch.compile: regional compilation in every order, dynamic shapes, graph passes that reorder, and Inductor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from test_compile_watch import (
    ORDERS,
    PROMPTS,
    SMALL,
    Backend,
    Options,
    assigned,
    compiled_resident,
    decode,
    draw,
    entered,
    figures,
    in_place,
    its_forward,
    three,
)
from torch import nn
from torch._dynamo.utils import counters

from prefetch_offload.component import Component
from prefetch_offload.config import Settings
from prefetch_offload.host import Pins
from prefetch_offload.loading import SlabUnit
from prefetch_offload.testing.pipelines import scaled

SMALL["blocks"] = scaled("flux", width=64, layers=8, single_layers=1, text_width=32, vae_width=8)
TIGHT = 7  # blocks that the budget has room for


def blocks(pipe: Any, options: Options) -> None:
    pipe.transformer.compile_repeated_blocks(**options)


@cache
def resident(backend: str) -> list[bytes]:
    torch._dynamo.reset()
    pipe = SMALL["blocks"].build()
    blocks(pipe, {"backend": backend, "fullgraph": True})
    return three(pipe.to(DEVICE), "blocks")


def tight(pipe: Any) -> dict[str, Any]:
    block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
    return {"budget": TIGHT * block, "unit_min": block // 4, "unit_max": 2 * block}


@pytest.mark.parametrize("streamed", [False, True], ids=["fits", "streamed"])
@pytest.mark.parametrize(
    ("when", "backend"), [(w, b) for w in ("before", "after") for b in ("eager", "aot_eager")]
)
def test_repeated_blocks(
    when: str, backend: str, streamed: bool, dynamo: None, enable: Any, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = resident(backend)
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    entries = entered(monkeypatch)
    pipe = SMALL["blocks"].build()
    counted = Backend(backend)
    settings = tight(pipe) if streamed else {}
    if when == "before":
        blocks(pipe, {"backend": counted, "fullgraph": True})
    offload = enable(pipe, strict_compile=True, **settings)
    if when == "after":
        blocks(pipe, {"backend": counted, "fullgraph": True})
    counters.clear()
    assert three(pipe, "blocks") == expected
    assert counted.graphs == 2 and not counters["graph_break"]
    assert figures(offload) == {"transformer": (2, 0, 0)}
    assert counted.runs == 9 * (2 + 3 + 1), "compiled code runs for each block in each step"
    assert entries.count("transformer") == 2 * (2 + 3 + 1), "at its call, and at its forward, which is not compiled"
    assert torch._dynamo.config.recompile_limit == limit
    assert (offload.plan.streamed["transformer"] > 0.2) is streamed
    offload.disable()
    again = enable(pipe, **settings)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert draw(pipe, 1, "blocks") == expected[1]
    assert counted.graphs == 2 and figures(again) == {}


@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
def test_compiled_before_by_aot_eager(order: Any, dynamo: None, enable: Any) -> None:
    """The rest of what tests/test_compile_watch.py runs; bitwise equal to code that AOT has compiled for the resident."""
    same = assigned if order in (in_place, its_forward) else order
    expected, graphs = compiled_resident(same, "aot_eager")
    torch._dynamo.reset()
    pipe, counted = SMALL["sd"].build(), Backend("aot_eager")
    order(pipe, {"backend": counted, "fullgraph": True})
    offload = enable(pipe, strict_compile=True)
    assert three(pipe, between=offload.release) == expected
    assert counted.graphs == graphs
    assert set(figures(offload).values()) == {(graphs, 0, 0)}


@pytest.mark.parametrize(
    ("order", "when"),
    [(in_place, "after"), (assigned, "before"), (decode, "before"), (decode, "after")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_dynamic_whole_graph_in_other_sizes(order: Any, when: str, dynamo: None, enable: Any) -> None:
    """dynamic=True, fullgraph=True: sizes, prompts and step counts change, and nothing is compiled again.

    No step count is 2, as the batch is: PyTorch would take the two for one number, on the device as well.
    """
    sizes = ({}, {"height": 48, "width": 48}, {"height": 64, "width": 64})

    def image(pipe: Any, call: int) -> bytes:
        prompt, steps = PROMPTS[call][0], (5, 3, 4)[call]
        return np.asarray(SMALL["sd"].call(pipe, seed=call, prompt=prompt, steps=steps, **sizes[call])).tobytes()

    def images(pipe: Any) -> list[bytes]:
        made = [image(pipe, 0)]
        with torch.compiler.set_stance("fail_on_recompile"):
            return [*made, *(image(pipe, call) for call in (1, 2))]

    options: Options = {"fullgraph": True, "dynamic": True}
    pipe, counted = SMALL["sd"].build(), Backend("eager")
    order(pipe, {"backend": counted, **options})
    expected, graphs = images(pipe.to(DEVICE)), counted.graphs
    torch._dynamo.reset()
    pipe, counted = SMALL["sd"].build(), Backend("eager")
    if when == "before":
        order(pipe, {"backend": counted, **options})
    offload = enable(pipe, strict_compile=True)
    if when == "after":
        order(pipe, {"backend": counted, **options})
    assert images(pipe) == expected
    assert counted.graphs == graphs == 1 and figures(offload) == {ORDERS[order]: (1, 0, 0)}


def test_fluxs_single_blocks_compile_twice_wherever_they_are(dynamo: None, enable: Any, sim: Any) -> None:
    """The first is given what was made for it, the others parts of a larger tensor: two layouts, two graphs. That is the
    model's own doing, on the device and under stock offload alike; ours adds nothing, and tells why."""
    case = scaled("flux", width=64, layers=2, single_layers=3, text_width=32, vae_width=8)
    graphs = []
    for how in ("resident", "stock", "ours"):
        torch._dynamo.reset()
        counters.clear()
        pipe, counted = case.build(), Backend("eager")
        blocks(pipe, {"backend": counted, "fullgraph": True})
        if how == "resident":
            pipe.to(DEVICE)
        elif how == "stock":
            pipe.enable_model_cpu_offload(device=DEVICE)
        else:
            offload = enable(pipe)
        case.call(pipe, seed=0, steps=2)
        graphs.append(counted.graphs)
        assert counters["stats"]["unique_graphs"] == counted.graphs
    assert graphs == [3, 3, 3]
    assert figures(offload) == {"transformer": (3, 0, 1)}
    (transformer,) = (c for c in offload.stats.components if c.name == "transformer")
    assert "tensor 'hidden_states' stride mismatch" in transformer.recompiles[0]


# ------------------------------------------------------------------------------------------------- passes that reorder
class Reversing:
    """Runs what can run late first: of the nodes whose inputs are there, always the one that came last."""

    def __init__(self) -> None:
        self.moved = 0
        self.targets: set[str] = set()

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        old = list(module.graph.nodes)
        self.targets |= {str(node.target) for node in old}
        placeholders = [n for n in old if n.op == "placeholder"]
        rest = [n for n in old if n.op not in ("placeholder", "output")]
        done, order = set(placeholders), list(placeholders)
        while rest:
            node = next(n for n in reversed(rest) if all(i in done for i in n.all_input_nodes))
            rest.remove(node)
            done.add(node)
            order.append(node)
        graph = torch.fx.Graph()
        made: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in [*order, *(n for n in old if n.op == "output")]:
            made[node] = graph.node_copy(node, made.__getitem__)
        self.moved += sum(a is not b for a, b in zip(order, old, strict=False))
        return torch.fx.GraphModule(module, graph).forward


def test_a_pass_that_reorders_is_harmless(dynamo: None, enable: Any, sim: Any) -> None:
    """A block's graph reads its weights and moves none: however it is reordered, all of it is between two moves."""
    pipe = SMALL["blocks"].build()
    blocks(pipe, {"backend": Reversing(), "fullgraph": True})
    expected = three(pipe.to(DEVICE), "blocks")
    torch._dynamo.reset()
    pipe, reversing = SMALL["blocks"].build(), Reversing()
    blocks(pipe, {"backend": reversing, "fullgraph": True})
    offload = enable(pipe, strict_compile=True, **tight(pipe))
    assert three(pipe, "blocks") == expected
    assert reversing.moved > 20
    assert not any("copy_" in t or "resize" in t or "wait" in t or "record" in t for t in reversing.targets)
    assert offload.plan.streamed["transformer"] > 0.2


# ------------------------------------------------------------------------------------------------------------ Inductor
class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, width: int = 64, n: int = 24) -> None:
        super().__init__()
        self.inlet = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return x


class Mover:
    """Stands for the engine: a point's units arrive before it is called, each time elsewhere, and go after it."""

    def __init__(self, component: Component) -> None:
        self.units = {u.key: u for u in component.units}
        self.component = component
        self.addresses: dict[str, set[int]] = {}
        self.ballast: list[torch.Tensor] = []

    def before(self, point: Any) -> None:
        for key in point.units:
            unit = self.units[key]
            assert isinstance(unit, SlabUnit)
            self.ballast.append(torch.empty(unit.slab.nbytes, dtype=torch.uint8))  # so that it comes to lie elsewhere
            unit.allocate(torch.device("cpu"))
            assert unit.bytes is not None
            unit.bytes.copy_(unit.slab.bytes)
            self.addresses.setdefault(key, set()).add(unit.bytes.data_ptr())
            self.component.show(unit)

    def after(self, point: Any) -> None:
        for key in point.units:
            self.component.leave(self.units[key])
            self.units[key].free()  # no memory is left behind the twins


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's import
@pytest.mark.parametrize("mode", ["default", "dynamic", "reduce-overhead", "max-autotune"])
def test_inductor_by_twins_and_points(mode: str, dynamo: None, sim: Any) -> None:
    """Inductor has no backend for the simulated accelerator, and the CPU is no device to offload to. So the same parts (slabs,
    twins, points) are used with the CPU in place of the device: weights come, are read by Inductor's code, and go. The modes
    choose other kernels there; the CUDA graphs that two of them add on a GPU are what tests/test_virtual.py is about."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 64)
    with torch.no_grad():
        counters.clear()
        for block in model.blocks:
            block.compile(fullgraph=True, **({"dynamic": True} if mode == "dynamic" else {"dynamic": False, "mode": mode}))
        expected = [model(x), model(x * 2)]
        assert counters["stats"]["unique_graphs"] == 1
        torch._dynamo.reset()
        counters.clear()
        settings = Settings(unit_min=16 << 10, unit_max=64 << 10, pin=False)
        component = Component(model, "model", torch.device("cpu"), settings, Pins(torch.device(DEVICE), None, 1 << 20, False))
        component.adopt()
        mover = Mover(component)
        assert len(component.points) >= 24
        component.bind(lambda unit: False)
        for point in component.points:
            point.install(mover)
        made = [model(x)]
        with torch.compiler.set_stance("fail_on_recompile"):
            made += [model(x * 2), model(x)]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(np.array_equal(a, b) for a, b in zip(made, [*expected, expected[0]], strict=True))
    assert any(len(where) > 1 for where in mover.addresses.values())
    for point in component.points:
        point.remove()
    component.unbind(lambda unit: False)
