"""LoRA hot swap on compiled pipelines: another adapter's values in the same tensors, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same
from torch._dynamo.utils import counters

from prefetch_offload.testing.pipelines import lora_state_dict, scaled

RANKS = (4, 2, 8)
SMALL = {
    "sd": scaled("sd", layers=1),
    "flux": scaled("flux", width=64, layers=6, single_layers=1, text_width=32, vae_width=8),
}


pytestmark = pytest.mark.usefixtures("dynamo")


def whole(pipe: Any, backend: str) -> None:
    (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).compile(backend=backend, fullgraph=True)


def blocks(pipe: Any, backend: str) -> None:
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


def swaps(name: str, pipe: Any, compiled: Any, look: Any) -> list[np.ndarray]:
    """An image with each of three adapters of different rank, the first one again at the end."""
    loras = [lora_state_dict(SMALL[name].build(), rank=rank, seed=rank, scale=3.0) for rank in RANKS]
    pipe.enable_lora_hotswap(target_rank=max(RANKS))
    pipe.load_lora_weights(loras[0], adapter_name="style")
    compiled(pipe)
    images = [np.asarray(SMALL[name].call(pipe, seed=0, steps=2))]
    look(False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed, lora in ((0, loras[1]), (1, loras[2]), (0, loras[0])):
            pipe.load_lora_weights(lora, adapter_name="style", hotswap=True)
            images.append(np.asarray(SMALL[name].call(pipe, seed=seed, steps=2)))
            look(True)
    return images


@pytest.mark.parametrize(
    ("name", "how", "backend", "tight"),
    [("sd", whole, "eager", False), ("flux", blocks, "eager", False), ("flux", blocks, "aot_eager", True)],
    ids=["whole", "blocks", "streamed blocks"],
)
def test_hot_swap_keeps_slabs_graphs_and_plan(
    name: str, how: Any, backend: str, tight: bool, enable: Any, sim: Any
) -> None:
    # peft pads the first adapter on the host only: a PrivateUse1 tensor cannot be put into a parameter of the host's
    def resident(pipe: Any) -> None:
        how(pipe.to(DEVICE), backend)

    expected = swaps(name, SMALL[name].build(), resident, lambda later: None)
    torch._dynamo.reset()
    counters.clear()
    pipe = SMALL[name].build()
    settings: dict[str, Any] = {}
    if tight:
        block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
        settings = {"budget": 6 * block, "unit_min": block // 4, "unit_max": 2 * block}
    offload = enable(pipe, strict_compile=True, **settings)
    known: dict[str, Any] = {}

    def look(later: bool) -> None:
        engine, part = offload._engine, (pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
        component = part._hf_hook.component
        now = {
            "units": {key: id(unit) for key, unit in engine.units.items()},
            "slabs": [u.slab.bytes.data_ptr() for u in component.units if hasattr(u, "slab")],
            "twins": [id(m.twin) for m in component.masters],
            "order": component.order,
            "graphs": counters["stats"]["unique_graphs"],
        }
        if later:
            assert now == known, "units, slabs, twins and graphs are those of the first call"
        known.update(now)

    made = swaps(name, pipe, lambda pipe: how(pipe, backend), look)
    assert_same(made, expected)
    assert not np.array_equal(made[0], made[1]), "the adapters differ"
    assert_same(made[3:], made[:1])
    assert not counters["graph_break"]
    part = next(c for c in offload.stats.components if c.name in ("unet", "transformer"))
    assert (part.graph_breaks, part.recompiles) == (0, ()) and part.graphs == counters["stats"]["unique_graphs"]
    plan = offload._session.client.plan
    assert plan is not None
    again = np.asarray(SMALL[name].call(pipe, seed=0, steps=2))
    if tight:
        assert offload.plan.streamed["transformer"] > 0.2
    pipe.load_lora_weights(lora_state_dict(SMALL[name].build(), rank=2, seed=9), adapter_name="style", hotswap=True)
    shares = offload._session.client.plan.shares
    SMALL[name].call(pipe, seed=0, steps=2)
    assert offload._session.client.plan.shares == shares
    assert_same([again], made[:1])
