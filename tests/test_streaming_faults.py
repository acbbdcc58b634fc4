"""What can go wrong while units come and go: an error between two blocks, a refused allocation, an interrupt, a program that
reads what is not there."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, plan_anew, refuse_each, settle
from contracts import assert_equal
from interrupts import interrupts
from test_streaming import CASES, UNITS, budget_of, draw, resident_images
from torch import nn

from prefetch_offload.adapter.hooks import CpuOffload
from prefetch_offload.points import find_points
from prefetch_offload.testing.pipelines import lora_state_dict, scaled

SHARE = 0.25


class _Boom(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [_Boom, KeyboardInterrupt])
@pytest.mark.parametrize("block", [0, 2, -1])
def test_an_error_between_two_blocks(block: int, error: type, when: str, sim: Any, enable: Any) -> None:
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    offload = enable(pipe, budget=budget_of(pipe, SHARE), **UNITS)
    for calls in range(2):  # in the first call ever, and in one that was planned

        def fail(*args: Any) -> None:
            raise error("in the middle")

        module = pipe.transformer.single_transformer_blocks[block]
        handle = module.register_forward_pre_hook(fail) if when == "before" else module.register_forward_hook(fail)
        with pytest.raises(error, match="in the middle"):
            draw("flux", pipe, 0)
        handle.remove()
        assert all(p.device.type == "cpu" for p in pipe.transformer.parameters())
        assert not any("_compiled_call_impl" in m.__dict__ for m in pipe.transformer.modules())
        assert draw("flux", pipe, calls).tobytes() == expected[calls].tobytes()
    assert offload.stats.d2h_nbytes == 0


def test_a_refused_allocation_anywhere(sim: Any, enable: Any) -> None:
    expected = resident_images("flux")[2].tobytes()
    pipe = CASES["flux"].build()
    offload = enable(pipe, budget=budget_of(pipe, SHARE), verify=False, **UNITS)
    draw("flux", pipe, 2)
    sim.reset()
    assert draw("flux", pipe, 2).tobytes() == expected

    def attempt() -> None:
        assert draw("flux", pipe, 2).tobytes() == expected

    indices = range(0, int(sim.counters()["allocs"]), 61)
    saved, raised = refuse_each(sim, offload, indices, attempt, lambda _: plan_anew(offload))
    attempt()
    assert saved > 4 * raised
    assert offload.stats.counts["ladder"] > 0


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupt_where_a_component_begins_and_ends(sim: Any, enable: Any, nth: int) -> None:
    """It does not count as running for ever: then others would go on leaving it its memory, and show what it shows."""
    expected = resident_images("flux")[2].tobytes()
    pipe = CASES["flux"].build()
    offload = enable(pipe, budget=budget_of(pipe, SHARE), verify=False, **UNITS)
    draw("flux", pipe, 2)
    source, first = inspect.getsourcelines(CpuOffload._run)
    stopped = 0
    for line in range(first, first + len(source)):
        times = 0

        def step(frame: Any, event: str, arg: Any, line: int = line) -> Any:
            nonlocal times
            if event == "line" and frame.f_lineno == line:
                times += 1
                if times == nth:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return step

        sys.settrace(lambda frame, event, arg, step=step: step if frame.f_code is CpuOffload._run.__code__ else None)
        try:
            draw("flux", pipe, 2)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.settrace(None)
        assert not any(c.running for c in offload._session.client.components.values()), source[line - first]
        assert all(p.device.type == "cpu" for p in pipe.transformer.parameters())
        assert draw("flux", pipe, 2).tobytes() == expected, source[line - first]
    assert stopped >= 12


def test_an_interrupt_at_any_line(sim: Any, enable: Any) -> None:
    expected = resident_images("flux")[2].tobytes()
    pipe = CASES["flux"].build()
    offload = enable(pipe, budget=budget_of(pipe, SHARE), verify=False, **UNITS)
    draw("flux", pipe, 2)
    for number, image in interrupts(24, lambda: draw("flux", pipe, 2).tobytes()):
        assert not offload._engine.lock._is_owned(), number
        assert image in (None, expected)
        assert draw("flux", pipe, 2).tobytes() == expected, number
        offload._engine.residency.validate()
    assert offload.stats.d2h_nbytes == 0


def test_more_and_fewer_passes_than_expected(sim: Any, enable: Any) -> None:
    case = CASES["flux"]
    alone = case.build().to(DEVICE)
    pipe = case.build()
    budget = budget_of(pipe, SHARE)
    enable(pipe, budget=budget, **UNITS)
    for steps in (2, 5, 1, 3, 3):
        truth = np.asarray(case.call(alone, seed=1, steps=steps))
        assert np.asarray(case.call(pipe, seed=1, steps=steps)).tobytes() == truth.tobytes(), steps

    def stop(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1  # the call ends earlier than it said
        return inputs

    truth = np.asarray(case.call(alone, seed=1, steps=4, callback_on_step_end=stop))
    for _ in range(2):
        assert np.asarray(case.call(pipe, seed=1, steps=4, callback_on_step_end=stop)).tobytes() == truth.tobytes()
    del alone
    settle(sim)


def test_parts_called_by_hand_in_any_order(sim: Any, enable: Any) -> None:
    """Blocks, encoders and the decoder alone, after and between calls, as pipelines and programs do."""
    plain, pipe = CASES["sdxl"].build().to(DEVICE), CASES["sdxl"].build()
    enable(pipe, budget=budget_of(pipe, SHARE), **UNITS)
    tokens = torch.arange(9, device=DEVICE)[None]
    latents = torch.ones(1, 4, 8, 8, device=DEVICE)

    def perform(pipe: Any) -> list[Any]:
        made: list[Any] = []
        with torch.no_grad():
            for _ in range(2):
                hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
                made += [hidden, pipe.text_encoder.final_layer_norm(hidden)]
                picture = torch.ones(1, 3, 16, 16, device=DEVICE)
                made += [pipe.vae.decode(latents).sample, pipe.vae.encode(picture).latent_dist.mean]
                made += [draw("sdxl", pipe, 1), pipe.vae.decode(latents, return_dict=False)[0]]
                pipe.maybe_free_model_hooks()
        return made

    expected = perform(plain)
    assert_equal(perform(pipe), expected)
    del plain, expected
    settle(sim)


def test_weights_read_outside_of_their_modules(sim: Any, enable: Any) -> None:
    """A forward that reads a weight of a block without calling the block: noticed in the first pass, and kept."""
    plain, pipe = CASES["flux"].build(), CASES["flux"].build()
    for one in (plain, pipe):
        transformer = one.transformer
        spied = transformer.single_transformer_blocks[5].proj_mlp.weight

        def peek(module: nn.Module, args: Any, one: Any = one) -> None:
            weight = one.transformer.single_transformer_blocks[5].proj_mlp.weight
            one.peeked = float(weight.abs().sum().cpu())

        del spied
        transformer.transformer_blocks[1].register_forward_pre_hook(peek)
    plain.to(DEVICE)
    expected = [draw("flux", plain, seed) for seed in range(2)]
    enable(pipe, budget=budget_of(pipe, SHARE), **UNITS)
    for seed in range(2):
        assert draw("flux", pipe, seed).tobytes() == expected[seed].tobytes()
        assert pipe.peeked == plain.peeked
    del plain
    settle(sim)


def test_lora_while_streaming(sim: Any, enable: Any) -> None:
    plain, pipe = CASES["flux"].build().to(DEVICE), CASES["flux"].build()
    enable(pipe, budget=budget_of(pipe, 0.4), **UNITS)
    weights = lora_state_dict(plain, scale=0.2)

    def perform(pipe: Any) -> list[Any]:
        made = [draw("flux", pipe, 0)]
        pipe.load_lora_weights(dict(weights), adapter_name="one")
        made += [draw("flux", pipe, 0), draw("flux", pipe, 1)]
        pipe.fuse_lora()
        made += [draw("flux", pipe, 0)]
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        return [*made, draw("flux", pipe, 0)]

    expected = perform(plain)
    assert_equal(perform(pipe), expected)
    assert expected[0].tobytes() != expected[1].tobytes()
    del plain
    settle(sim)


def test_two_networks_in_turns(sim: Any, enable: Any) -> None:
    """A ControlNet and a UNet that do not fit together take turns in every step."""
    case = scaled("sdxl-controlnet", width=48)
    plain, pipe = case.build().to(DEVICE), case.build()
    expected = [np.asarray(case.call(plain, seed=seed)) for seed in range(2)]
    offload = enable(pipe, unit_min=64 << 10, unit_max=256 << 10)
    case.call(pipe, seed=0)
    needs = {c.name: c for c in offload.stats.components}
    activations = max(c.activation_nbytes or 0 for c in needs.values())
    offload.budget = budget = activations + needs["unet"].nbytes // 2 + (64 << 10)
    for seed in range(2):
        settle(sim)
        sim.reset()
        assert np.asarray(case.call(pipe, seed=seed)).tobytes() == expected[seed].tobytes()
        assert sim.counters()["peak"] - weights_on(plain) <= budget
    del plain
    settle(sim)


def weights_on(pipe: Any) -> int:
    """Device bytes of a pipeline that lives there."""
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    return sum(-(-t.nbytes // 512) * 512 for m in modules for t in (*m.parameters(), *m.buffers()))


# ------------------------------------------------------------------------------------- points
class _Reads(nn.Module):
    """Reads a parameter of its own, one in a list, and its children's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.table = nn.ParameterList([torch.ones(64)])
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.attention = nn.MultiheadAttention(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) * self.scale + self.table[0]
        return self.attention(x, x, x)[0]


def test_points_are_the_largest_modules_of_one_unit_each() -> None:
    from prefetch_offload.loading import Unit
    from prefetch_offload.masters import Master, modules_of, tensors_of

    module = _Reads()
    masters = [Master(tensor, "", [(entries, key)]) for entries, key, tensor in tensors_of(modules_of(module))]
    units = [Unit(str(i), m.tensor.nbytes, m.tensor.nbytes, [m]) for i, m in enumerate(masters)]
    points, must = find_points(module, units)
    by_module = {p.module: [units[int(u)].masters[0].tensor.shape for u in p.units] for p in points}
    assert set(by_module) == {*module.blocks, module.attention}, "a linear layer of two units is one point"
    assert {tuple(units[int(u)].masters[0].tensor.shape) for u in must} == {(64,)} and len(must) == 2
    assert len(by_module[module.attention]) == 4, "its output projection's weights are read without a call of it"
    module.blocks[1].compile(backend="eager")
    module.blocks[2].forward = torch.compile(module.blocks[2].forward, backend="eager")
    assert {p.module for p in find_points(module, units)[0]} == set(by_module)
    module.compile(backend="eager")
    assert find_points(module, units) == ([], frozenset(u.key for u in units))


@pytest.mark.parametrize(("share", "call"), [(None, 0), (0.7, 1)])
def test_a_second_try_begins_the_pass_anew(share: float | None, call: int, sim: Any, enable: Any) -> None:
    """What the first try had begun to read it has not read: the pass is learned from the second, and its window moves on."""
    expected = resident_images("flux")
    undisturbed, pipe = CASES["flux"].build(), CASES["flux"].build()
    for one in (undisturbed, pipe):
        enable(one, budget=None if share is None else budget_of(one, share), **UNITS)
        assert [draw("flux", one, seed).tobytes() for seed in range(call)] == [e.tobytes() for e in expected[:call]]
    assert draw("flux", undisturbed, call).tobytes() == expected[call].tobytes()
    points = [point.module for point in pipe.transformer._hf_hook.component.points]
    tries: list[int] = []
    active: list[int] = []

    def fail(*args: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("simgpu out of memory")

    def look(*args: Any) -> None:
        stream = pipe.transformer._hf_hook.component.stream
        active.append(len(stream.active) if stream is not None else 0)

    handles = [points[48].register_forward_pre_hook(fail), points[24].register_forward_pre_hook(look)]
    assert draw("flux", pipe, call).tobytes() == expected[call].tobytes()
    component, other = (p.transformer._hf_hook.component for p in (pipe, undisturbed))
    assert bool(component.client.memory.tight) is (share is not None), "or there were others to drop"
    assert len(tries) > 1 and max(active) == 1
    assert component.visits == other.visits and component.first_visit == other.first_visit
    assert [u.partition("/")[2] for u in component.order] == [u.partition("/")[2] for u in other.order]
    assert [point and point.number for point, _, _ in component.pending] == [
        point and point.number for point, _, _ in other.pending
    ]
    for handle in handles:
        handle.remove()
    assert draw("flux", pipe, 1).tobytes() == expected[1].tobytes()
