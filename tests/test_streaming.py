"""Components larger than their room: streamed block by block, bit for bit, within the budget at every instant."""

from __future__ import annotations

import gc
import itertools
import re
from functools import cache
from typing import Any

import budgets
import numpy as np
import pytest
import torch
from conftest import DEVICE, planned_once, settle, weight_nbytes
from torch import nn

import prefetch_offload
from prefetch_offload import BudgetError, OffloadWarning, SettingError
from prefetch_offload.least import need_of
from prefetch_offload.simulator import simulate
from prefetch_offload.testing import pipelines
from prefetch_offload.testing.pipelines import scaled
from prefetch_offload.trace import Timeline

# Weights next to which activations are small, as in the real models: a share of 15% leaves room for both.
CASES = {
    "sdxl": scaled("sdxl", width=96, vae_width=8, text_width=128, text_layers=6),
    "flux": scaled("flux", width=192, layers=4, text_width=192, text_layers=8, vae_width=8),
}
INPUTS = {"sdxl": {"height": 16, "width": 16}, "flux": {}}
UNITS = {"unit_min": 64 << 10, "unit_max": 512 << 10}
STEPS = (3, 3, 2)


def draw(name: str, pipe: Any, seed: int) -> np.ndarray:
    return np.asarray(CASES[name].call(pipe, seed=seed, steps=STEPS[seed], **INPUTS[name]))


@cache
def resident_images(name: str) -> tuple[np.ndarray, ...]:
    pipe = CASES[name].build().to(DEVICE)
    return tuple(draw(name, pipe, seed) for seed in range(3))


def budget_of(pipe: Any, share: float) -> int:
    return int(share * weight_nbytes(pipe))


@pytest.mark.parametrize("budget", ["stock", None])
def test_a_device_smaller_than_the_largest_component(budget: str | None, sim: Any, enable: Any) -> None:
    """Stock offload cannot run there; ours streams in what there is, also where it is to take no more than stock would."""
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    settle(sim)
    sim.configure(int(0.6 * sum(p.nbytes for p in pipe.transformer.parameters())), 0, 0, 0)
    offload = enable(pipe, budget=budget, **UNITS)
    for seed in range(3):
        assert draw("flux", pipe, seed).tobytes() == expected[seed].tobytes()
    assert "ladder" not in offload.stats.counts, "it was known, not found out by running out of memory"


@pytest.mark.parametrize("share", [0.15, 0.25, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_any_budget(name: str, share: float, sim: Any, enable: Any) -> None:
    expected = resident_images(name)
    pipe = CASES[name].build()
    budget = budget_of(pipe, share)
    offload = enable(pipe, budget=budget, **UNITS)
    for seed in range(3):
        settle(sim)
        sim.reset()
        image = draw(name, pipe, seed)
        assert image.tobytes() == expected[seed].tobytes()
        assert sim.counters()["peak"] <= budget, f"call {seed}"
        assert sim.counters()["d2h_pinned"] == 0
    assert offload.stats.d2h_nbytes == 0
    assert offload.stats.peak_nbytes <= budget
    assert not offload.stats.counts


@pytest.mark.parametrize("name", CASES)
def test_stock_cannot_where_this_can(name: str, sim: Any, enable: Any) -> None:
    expected = resident_images(name)[0]
    stock = CASES[name].build()
    sim.configure(budget_of(stock, 0.6), 0, 0, 0)  # the device has no more than that
    stock.enable_model_cpu_offload(device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        draw(name, stock, 0)
    stock.remove_all_hooks()
    stock.to("cpu")
    settle(sim)
    pipe = CASES[name].build()
    sim.configure(budget_of(pipe, 0.15), 0, 0, 0)
    enable(pipe, budget=budget_of(pipe, 0.15), **UNITS)
    for _ in range(2):
        assert draw(name, pipe, 0).tobytes() == expected.tobytes()


def test_without_a_budget_a_small_device_is_enough(sim: Any, enable: Any) -> None:
    """What is free is not said in advance, and the first guess at the activations may be wrong."""
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    sim.configure(budget_of(pipe, 0.3), 0, 0, 0)
    enable(pipe, reserve=1 << 10, **UNITS)
    for seed in range(3):
        assert draw("flux", pipe, seed).tobytes() == expected[seed].tobytes()


def test_below_the_smallest_budget(sim: Any, enable: Any) -> None:
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    message = r"is too small for \w+: streamed block by block, its weights take (\d+) bytes"
    with pytest.raises(BudgetError, match=message) as caught:
        enable(pipe, budget=1000, **UNITS)
    assert not hasattr(pipe.transformer, "_hf_hook")
    smallest = int(str(caught.value).split(" bytes")[1].split()[-1])
    offload = enable(pipe, budget=smallest, **UNITS)  # the weights fit, and nothing else
    with pytest.warns(OffloadWarning, match=r"is refused\.$"):
        draw("flux", pipe, 0)
    with pytest.raises(BudgetError, match=r"needs (\d+) bytes .* even when they are streamed") as caught:
        draw("flux", pipe, 0)
    assert f"budget={smallest} bytes" in str(caught.value)
    offload.budget = named = named_by(caught.value)
    del caught  # its frames have tensors of that call
    for seed, truth in enumerate(expected):
        settle(sim)
        sim.reset()
        assert draw("flux", pipe, seed).tobytes() == truth.tobytes()
        assert sim.counters()["peak"] <= named
    offload.budget = named - 1
    with pytest.raises(BudgetError, match="too small") as caught:
        draw("flux", pipe, 0)
    assert named_by(caught.value) == named
    with pytest.raises(BudgetError, match="too small for") as caught:
        offload.budget = 1000
    assert f"and calls like the last one {named} bytes" in str(caught.value)


def named_by(said: Any) -> int:
    """The budget that a refusal, or a warning, says is the smallest."""
    found = re.search(r"The smallest budget for (?:it|the whole call) is (\d+) bytes", str(said))
    assert found, said
    return int(found[1])


def test_a_first_call_that_takes_more_than_its_budget_says_so_once(sim: Any, enable: Any) -> None:
    """What it needs besides weights is only known when it is over."""
    expected = resident_images("flux")[0]
    pipe = CASES["flux"].build()
    with pytest.raises(BudgetError) as caught:
        enable(pipe, budget=1000, **UNITS)
    budget = int(str(caught.value).split("its weights take ")[1].split()[0])
    offload = enable(pipe, budget=budget, **UNITS)
    settle(sim)
    sim.reset()
    with pytest.warns(OffloadWarning, match="more than budget=") as warned:
        assert draw("flux", pipe, 0).tobytes() == expected.tobytes()
    assert len(warned) == 1
    assert warned[0].filename == pipelines.__file__.replace("pipelines.py", "_pipeline_parts.py"), "who called the pipeline"
    said = str(warned[0].message)
    assert f"took {offload.stats.peak_nbytes} bytes" in said
    assert f"more than budget={budget} bytes" in said
    with pytest.raises(BudgetError) as caught:
        draw("flux", pipe, 0)
    assert named_by(caught.value) == named_by(said)
    offload.budget = named_by(said)
    for _ in range(2):
        assert draw("flux", pipe, 0).tobytes() == expected.tobytes()
    CASES["flux"].call(pipe, height=16, width=16)  # smaller than was measured: nothing to say
    with pytest.warns(OffloadWarning, match="more than budget="):  # for this budget, the first time
        CASES["flux"].call(pipe, height=64, width=64)
    CASES["flux"].call(pipe, height=72, width=72)


def test_a_refusal_names_the_component_that_needs_most_and_what_is_not_known_yet(sim: Any, enable: Any) -> None:
    """Which is not the first that the budget is too small for."""
    pipe = CASES["flux"].build()
    offload = enable(pipe, **UNITS)
    draw("flux", pipe, 0)
    client = offload._session.client
    engine = offload._engine
    vae = next(c for c in client.components.values() if c.name == "vae")
    client.memory.activations[client.shapes[vae.key]] += 8 << 20  # as for a larger image
    needs = {c.name: need_of(engine, client, c, client.inputs[c.key]).nbytes for c in client.components.values()}
    offload.budget = needs["transformer"] - 1
    said = rf"transformer needs {needs['transformer']} bytes .*, for vae with the inputs that it had last"
    with pytest.raises(BudgetError, match=said) as caught:
        draw("flux", pipe, 0)
    assert named_by(caught.value) == needs["vae"] == max(needs.values())
    client.memory.activations = {s: n for s, n in client.memory.activations.items() if "transformer" in s[0]}
    with pytest.raises(BudgetError, match=r"the whole call is at least \d+ bytes"):  # of the others, only the weights
        draw("flux", pipe, 0)


def test_a_component_in_one_unit_is_refused_with_the_setting_that_cuts_it(sim: Any, enable: Any) -> None:
    expected = resident_images("flux")[0]
    pipe = CASES["flux"].build()
    offload = enable(pipe, unit_min=1 << 30, unit_max=1 << 30)
    draw("flux", pipe, 0)
    transformer = next(c for c in offload._session.client.components.values() if c.name == "transformer")
    assert len(transformer.units) == 1
    budget = transformer.nbytes + (64 << 10)
    offload.budget = budget  # the weights fit; what the call takes besides is the call's to refuse
    with pytest.raises(BudgetError, match=r"all in one unit, which a smaller `unit_min` cuts into several\. The") as caught:
        draw("flux", pipe, 0)
    assert "cannot be streamed" not in str(caught.value)
    offload.disable()  # units are cut when weights are taken in
    enable(pipe, budget=budget, **UNITS)
    assert draw("flux", pipe, 0).tobytes() == expected.tobytes()


def test_the_budget_can_be_set_between_calls(sim: Any, enable: Any) -> None:
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    offload = enable(pipe, **UNITS)
    assert offload.budget is None
    for share in (1.0, 0.25, 0.6, 0.15):
        offload.budget = budget = budget_of(pipe, share)
        assert offload.budget == offload.settings.budget == budget
        for seed in range(2):
            settle(sim)
            sim.reset()
            assert draw("flux", pipe, seed).tobytes() == expected[seed].tobytes()
            assert sim.counters()["peak"] <= budget, share
    with pytest.raises(SettingError, match="budget='much' is not a size"):
        offload.budget = "much"
    with pytest.raises(BudgetError, match="too small"):
        offload.budget = 100
    assert offload.budget == budget

    def meddle(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(SettingError, match="between two calls"):
            offload.budget = None
        return inputs

    CASES["flux"].call(pipe, callback_on_step_end=meddle)
    offload.budget = "stock"
    assert draw("flux", pipe, 2).tobytes() == expected[2].tobytes()
    offload.budget = None
    assert draw("flux", pipe, 2).tobytes() == expected[2].tobytes()


def test_a_resident_component_has_no_hooks_inside(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    enable(pipe, **UNITS)
    inside: list[int] = []

    def look(*args: Any) -> None:
        inside.append(sum("_compiled_call_impl" in m.__dict__ for m in pipe.transformer.modules()))

    handle = pipe.transformer.norm_out.register_forward_pre_hook(look)
    CASES["flux"].call(pipe, steps=3)
    handle.remove()
    assert inside[0] > 0, "its units arrive one by one in the first pass"
    assert inside[1:] == [0, 0]
    inside.clear()
    handle = pipe.transformer.norm_out.register_forward_pre_hook(look)
    CASES["flux"].call(pipe, steps=2)
    handle.remove()
    assert inside == [0, 0]
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    assert not any("_compiled_call_impl" in m.__dict__ for m in modules)


def test_two_pipelines_share_one_budget(sim: Any, enable: Any) -> None:
    expected = {name: resident_images(name) for name in CASES}  # made before there is a peak to look at
    pipes = {name: CASES[name].build() for name in CASES}
    budget = budget_of(pipes["flux"], 0.5)
    offloads = [enable(pipe, budget=budget, **UNITS) for pipe in pipes.values()]
    for seed in range(3):
        for name, pipe in pipes.items():
            settle(sim)
            sim.reset()
            assert draw(name, pipe, seed).tobytes() == expected[name][seed].tobytes()
            assert sim.counters()["peak"] <= budget, (name, seed)
    assert sum(o.stats.resident_nbytes > 0 for o in offloads)


def test_another_process_takes_memory(sim: Any, enable: Any) -> None:
    """Between calls and in the midst of one: what is left is made to do, before the device refuses."""
    expected = resident_images("flux")
    pipe = CASES["flux"].build()
    capacity = budget_of(pipe, 1.2)
    sim.configure(capacity, 0, 0, 0)
    offload = enable(pipe, reserve=1 << 10, **UNITS)
    assert draw("flux", pipe, 0).tobytes() == expected[0].tobytes()
    free = capacity - sim.counters()["allocated"]
    taken = [torch.empty(free - (100 << 10), dtype=torch.uint8, device=DEVICE)]
    assert draw("flux", pipe, 1).tobytes() == expected[1].tobytes()
    taken.clear()
    assert draw("flux", pipe, 1).tobytes() == expected[1].tobytes()
    assert "ladder" not in offload.stats.counts, "it was seen, not found out by running out of memory"

    def take(pipe: Any, step: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        if not taken:
            free = capacity - sim.counters()["allocated"]
            taken.append(torch.empty(free - (100 << 10), dtype=torch.uint8, device=DEVICE))
        return inputs

    image = np.asarray(CASES["flux"].call(pipe, seed=2, steps=2, callback_on_step_end=take))
    assert image.tobytes() == expected[2].tobytes()
    taken.clear()
    gc.collect()


def test_a_strategy_of_ones_own(sim: Any, enable: Any) -> None:
    from prefetch_offload.strategy import whole

    seen = []

    def mine(workload: Any, budget_nbytes: int, link: Any) -> Any:
        seen.append((workload, budget_nbytes, link))
        return whole(workload, budget_nbytes, link)

    pipe = CASES["flux"].build()
    budget = budget_of(pipe, 1.3)
    enable(pipe, budget=budget, strategy=mine, **UNITS)
    for seed in range(2):
        assert draw("flux", pipe, seed).tobytes() == resident_images("flux")[seed].tobytes()
    assert seen and seen[0][1] == budget
    assert {n.split("#")[0] for n in seen[0][0].components} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    with pytest.raises(SettingError, match="strategy='fast': give a callable"):
        prefetch_offload.enable(pipe, device=DEVICE, strategy="fast")



@pytest.mark.parametrize("name", CASES)
def test_the_smallest_share_over_a_slow_link(name: str, sim: Any, enable: Any) -> None:
    """Copies are late everywhere: what waits for them is right, and no more is there than the budget."""
    expected = resident_images(name)
    pipe = CASES[name].build()
    settle(sim)
    gbps = weight_nbytes(pipe) / 0.1e9  # a tenth of a second for all weights once, which most steps copy again
    sim.configure(1 << 50, gbps, gbps, gbps)
    budget = budget_of(pipe, 0.15)
    offload = enable(pipe, budget=budget, **UNITS)  # with `verify`
    for seed in range(2):
        sim.reset()
        assert draw(name, pipe, seed).tobytes() == expected[seed].tobytes()
        assert sim.counters()["peak"] <= budget
    assert offload.stats.peak_nbytes <= budget
    assert sum(c.exposed_ms for c in offload.stats.components) > 0
    assert offload.hazards == sim.hazards() == []
    assert not offload.stats.counts


@pytest.mark.slow
@pytest.mark.parametrize("name", budgets.CASES)
def test_time_on_a_slow_link(name: str, sim: Any) -> None:
    """By the device's own clock; benchmarks/test_simulated_budgets.py has more budgets."""
    outcomes = budgets.run(name, (0.15, 0.4, 0.8), sim, calls=3)
    for outcome in outcomes:
        assert outcome.same and outcome.peak_nbytes <= outcome.budget_nbytes and not outcome.hazards
        assert 1 / 1.15 <= outcome.measured / outcome.predicted <= 1.15
        assert outcome.measured / outcome.bound <= 1.15
    for less, more in itertools.pairwise(outcomes):
        assert more.measured <= 1.02 * less.measured
    assert outcomes[0].measured > 1.2 * outcomes[-1].measured, "the link is slow enough to tell"


def _copies(timeline: Timeline) -> list[str]:
    """Units in the order in which they were copied."""
    return [s.args["unit"] for s in sorted(timeline.spans, key=lambda s: s.start_ms) if s.track == "copy"]


@pytest.mark.parametrize("name", CASES)
def test_a_call_copies_what_was_predicted_in_that_order(name: str, sim: Any, enable: Any) -> None:
    """Between two calls, too, where what the next one begins with comes before what follows it."""
    pipe = CASES[name].build()
    settle(sim)
    sim.configure(-1, 0.05, 0.05, 0.05)
    sim.op_delay_us(200)
    sim.device_clock(True)  # the plan is the same on every machine
    offload = enable(pipe, budget="stock", strategy=planned_once(), **UNITS)
    counts = []
    for _ in range(5):
        draw(name, pipe, 0)
        counts.append(len(_copies(offload.timeline())))
    plan = offload._session.client.plan
    assert plan is not None
    real = _copies(offload.timeline())
    predicted = _copies(simulate(plan.workload, plan.shares, plan.budget_nbytes, plan.link, 6).timeline)
    copied = counts[-1] - counts[-2]
    assert 0 < copied < len(real)
    assert real[-copied:] == real[-2 * copied : -copied], "calls are alike by now"
    assert predicted[-copied:] == predicted[-2 * copied : -copied]
    # A call that has ended has begun the next one: what is the last is not the same.
    begins = (predicted[-copied:] + predicted[-copied:]).index(real[-copied])
    assert real[-copied:] == (predicted[-copied:] + predicted[-copied:])[begins : begins + copied]
