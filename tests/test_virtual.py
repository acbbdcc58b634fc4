"""Addresses for life (`stable_addresses`): by virtual memory, with a stand-in for the driver, and by an arena."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident, settle, weight_nbytes
from torch._dynamo.backends.registry import lookup_backend
from virtual_memory import GRAIN, FakeCuda

import prefetch_offload
from prefetch_offload import BudgetError, OffloadError, OffloadWarning, virtual
from prefetch_offload.addresses import Arena
from prefetch_offload.device import COPY_AFTER_ALLOCATION, Lanes
from prefetch_offload.simulator import Link, Workload
from prefetch_offload.strategy import balanced
from prefetch_offload.testing.pipelines import CASES, scaled
from prefetch_offload.virtual import Driver
from prefetch_offload.window import Share

BIG = scaled("sdxl", width=64)
UNITS = {"unit_min": 32 << 10, "unit_max": 128 << 10}


@pytest.fixture
def cuda(sim: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The stand-in, used for the simulated accelerator. Afterwards nothing of it is left."""
    fake = FakeCuda()
    monkeypatch.setattr(virtual, "driver_for", lambda device: Driver(fake, 0))
    yield fake
    settle(sim)
    assert not fake.behind and not fake.memories and fake.used == 0
    assert not fake.ranges, "addresses are given back when nothing shows them any more"


def pointers(pipe: Any) -> dict[str, dict[str, int]]:
    """By component, where its parameters and buffers lie, looked at while it runs."""
    seen: dict[str, dict[str, int]] = {}

    def look(name: str, module: Any, root: Any) -> None:
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.device.type == DEVICE:
                seen.setdefault(name, {})[f"{id(module)}.{key}"] = tensor.data_ptr()

    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for module in part.modules():
                module.register_forward_pre_hook(lambda m, _args, name=name, part=part: look(name, m, part))
    return seen


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["evicted", "streamed"])
def test_addresses_are_equal_over_five_calls(share: float, cuda: FakeCuda, enable: Any, sim: Any) -> None:
    whole = BIG.build().to(DEVICE)
    expected = [np.asarray(BIG.call(whole, seed=seed)) for seed in range(5)]
    del whole
    settle(sim)
    sim.reset()
    pipe = BIG.build()
    largest = max(sum(p.nbytes for p in m.parameters()) for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    budget = int(largest * share) + (14 << 20)
    offload = enable(pipe, budget=budget, stable_addresses=True, **UNITS)
    seen = pointers(pipe)
    taken: list[int] = []  # by the driver's count and the device's own, before each module runs
    for part in (m for m in pipe.components.values() if isinstance(m, torch.nn.Module)):
        for module in part.modules():
            module.register_forward_pre_hook(lambda *_: taken.append(cuda.used + sim.counters()["allocated"]))
    first: dict[str, dict[str, int]] = {}
    loads = 0
    for call in range(5):
        assert_same([np.asarray(BIG.call(pipe, seed=call))], [expected[call]])
        if call == 0:
            first = {name: dict(where) for name, where in seen.items()}
            loads = cuda.names().count("cuMemMap")
        assert seen == first
        assert max(taken) <= offload.stats.peak_nbytes <= budget
        assert cuda.peak <= budget
    assert set(seen) == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert cuda.names().count("cuMemMap") > 1.5 * loads, "they leave in between"
    assert cuda.names().count("cuMemAddressReserve") == len(offload._engine.units), "one range each, for life"
    assert offload.stats.pool_nbytes == cuda.used > 0
    offload.release()
    assert offload.stats.pool_nbytes == cuda.used == 0, "what is left is free for anyone"
    assert offload.stats.resident_nbytes == 0
    offload.disable()
    assert cuda.used == offload.stats.pool_nbytes == 0


def test_pool_bytes_are_those_of_the_driver(cuda: FakeCuda, enable: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    assert_same(images_of("flux", pipe), resident("flux", torch.float32))
    engine = offload._engine
    assert all(unit.nbytes % GRAIN == 0 for unit in engine.units.values())
    assert engine.residency.held_nbytes == cuda.used == offload.stats.pool_nbytes >= weight_nbytes(pipe)
    assert engine.lanes.allocated_nbytes() >= cuda.used
    shapes = offload._session.client.memory.activations
    assert all(n < 4 << 20 for n in shapes.values()), "weights are not taken for activations"


def test_the_order_of_the_drivers_calls(cuda: FakeCuda, enable: Any) -> None:
    """A unit: reserve, create, map, allow access; unmap, release; and the range goes last."""
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, prefetch=False, **UNITS)
    with torch.no_grad(), offload.calling():
        pipe.text_encoder(torch.ones(1, 77, dtype=torch.long, device=DEVICE))
    offload.disable()
    gc.collect()
    state: dict[int, list[str]] = {}
    handles: dict[int, int] = {}
    reserved = []
    for name, args in cuda.calls:
        if name in ("cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemAddressFree"):
            state.setdefault(args[0], []).append(name)
            if name == "cuMemMap":
                handles[args[3]] = args[0]
        elif name == "cuMemRelease":
            state[handles[args[0]]].append(name)
        elif name == "cuMemAddressReserve":
            reserved.append(args)
    life = ["cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"]
    assert len(state) == len(reserved) > 1
    assert all(calls == life for calls in state.values())
    names = cuda.names()
    assert names.index("cuMemAddressReserve") < names.index("cuMemCreate") < names.index("cuMemMap")


def two_streams(pipe: Any, offload: Any) -> None:
    """Read on a slow stream, and wanted back at once."""
    ids = torch.ones(1, 77, dtype=torch.long, device=DEVICE)
    with torch.no_grad(), offload.calling(), torch.Stream(device=DEVICE) as stream:
        pipe.text_encoder(ids)
        offload.release()
        pipe.text_encoder(ids)
        offload.release()
    torch.accelerator.current_stream().wait_event(stream.record_event())


@pytest.mark.parametrize("reason", [None, "COPY_AFTER_REUSE", "UNMAP_AFTER_USE"])
def test_without_a_wait_the_checker_objects(reason: str | None, sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(virtual, "driver_for", lambda device: Driver(fake, 0))
    value = vars(prefetch_offload.device).get(reason or "")
    wait, host_wait = Lanes.wait, Lanes.host_wait
    seen = []

    def patched(original: Any) -> Any:
        def waits(self: Any, *args: Any) -> None:
            seen.append(args[-1])
            if args[-1] != value:
                original(self, *args)

        return waits

    monkeypatch.setattr(Lanes, "happened", lambda *args: False)  # everything takes long
    monkeypatch.setattr(Lanes, "wait", patched(wait))
    monkeypatch.setattr(Lanes, "host_wait", patched(host_wait))
    pipe = CASES["flux"].build()
    offload = prefetch_offload.enable(pipe, device=DEVICE, verify=True, stable_addresses=True, prefetch=False, **UNITS)
    if reason == "COPY_AFTER_REUSE":
        from_another_stream(pipe, offload)
    else:
        two_streams(pipe, offload)
    found = [h for h in offload.hazards if h.buffer and ("mapping" in h.buffer or "memory" in h.buffer)]
    assert value is None or value in seen
    assert bool(found) is (reason is not None), found
    torch.accelerator.synchronize()
    offload.disable()
    sim.reset()
    del offload, pipe
    settle(sim)


def from_another_stream(pipe: Any, offload: Any) -> None:
    """What one stream has read is written for another, which has not waited for the first."""
    ids = torch.ones(1, 77, dtype=torch.long, device=DEVICE)
    streams = [torch.Stream(device=DEVICE) for _ in range(2)]
    with torch.no_grad(), offload.calling():
        for stream in streams:
            with stream:
                pipe.text_encoder(ids)
                engine, component = offload._engine, pipe.text_encoder._hf_hook.component
                with engine._held(), engine._change:
                    engine._drop([u.key for u in component.units])
    for stream in streams:
        torch.accelerator.current_stream().wait_event(stream.record_event())


def untimed(workload: Workload, budget_nbytes: int, link: Link) -> Mapping[str, Share]:
    """The same plan on every machine, however busy: as if each unit computed for a millisecond."""
    components = {n: replace(c, compute_ms=dict.fromkeys(c.units, 1.0)) for n, c in workload.components.items()}
    return balanced(Workload(components, workload.runs), budget_nbytes, Link(1.0))


def test_memory_is_passed_on_to_units_of_the_same_size(
    cuda: FakeCuda, enable: Any, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is unmapped before it is wanted for something else, however far the host is ahead of the device."""
    monkeypatch.setattr(Lanes, "happened", lambda *args: False)
    case = scaled("flux", width=64, layers=12, single_layers=1, text_width=32, vae_width=8)
    pipe = case.build()
    block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
    offload = enable(
        pipe, budget=10 * block, unit_min=block // 4, unit_max=2 * block, stable_addresses=True, strategy=untimed
    )
    whole = case.build().to(DEVICE)
    expected = [np.asarray(case.call(whole, seed=0, steps=steps)) for steps in (2, 6)]
    del whole
    settle(sim)
    sim.reset()
    assert_same([np.asarray(case.call(pipe, seed=0, steps=2))], expected[:1])
    before = cuda.names().count("cuMemCreate"), cuda.names().count("cuMemMap")
    assert_same([np.asarray(case.call(pipe, seed=0, steps=6))], expected[1:])
    created, mapped = (cuda.names().count(n) - b for n, b in zip(("cuMemCreate", "cuMemMap"), before, strict=True))
    monkeypatch.undo()
    assert offload.plan.streamed["transformer"] > 0.3
    assert mapped > 20 and created < mapped * 0.6
    assert offload.stats.peak_nbytes <= 10 * block


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemAddressReserve"])
@pytest.mark.parametrize("error", [2, 999])
def test_errors_of_the_driver_are_unwound(call: str, error: int, cuda: FakeCuda, enable: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    used = cuda.used
    for after in (0, 2) if call != "cuMemAddressReserve" else (2,):
        cuda.fail = {call: (after, error)}
        if error == 2:  # the ladder: everything else goes, and it is tried again
            assert_same(images_of("flux", pipe)[:1], resident("flux", torch.float32)[:1])
        else:
            with pytest.raises(OffloadError, match=rf"the CUDA driver refused {call}: 999.*stable_addresses=False"):
                CASES["flux"].call(pipe)
        assert cuda.fail[call][0] < 0, "it was met"
        cuda.fail = {}
        offload.release()
        assert cuda.used == used == 0
    assert_same(images_of("flux", pipe), resident("flux", torch.float32))


def test_activations_get_what_weights_have_left(
    cuda: FakeCuda, enable: Any, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in a forward: what was dropped is unmapped before it runs again, however far the device has come."""
    monkeypatch.setattr(Lanes, "happened", lambda *args: False)
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    assert_same(images_of("flux", pipe)[:1], resident("flux", torch.float32)[:1])
    failed: list[int] = []

    def fail(module: Any, args: Any) -> None:
        if not failed:
            failed.append(offload._engine.addresses.pool_nbytes)
            raise torch.OutOfMemoryError("activations")
        failed.append(offload._engine.addresses.idle_nbytes)

    handle = pipe.vae.decoder.register_forward_pre_hook(fail)
    assert_same([np.asarray(CASES["flux"].call(pipe, seed=0))], resident("flux", torch.float32)[:1])
    handle.remove()
    assert failed[0] > 0 and failed[1] == 0
    assert offload.stats.counts["ladder"] == 1


def test_no_memory_at_all(cuda: FakeCuda, enable: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    cuda.capacity = 3 * GRAIN
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        CASES["flux"].call(pipe)
    cuda.capacity = 1 << 50
    assert_same(images_of("flux", pipe), resident("flux", torch.float32))
    offload.disable()


def test_weights_left_on_the_device_keep_their_memory(cuda: FakeCuda, enable: Any) -> None:
    """Removing a hook while the component is shown leaves its weights where they are, until nothing shows them."""
    pipe = CASES["flux"].build()
    enable(pipe, stable_addresses=True, **UNITS)
    ids = torch.ones(1, 77, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        truth = pipe.text_encoder(ids)[0].cpu()
        pipe.remove_all_hooks()
        held = [p for p in pipe.text_encoder.parameters() if p.device.type == DEVICE]
        assert held and cuda.used
        assert torch.equal(pipe.text_encoder(ids)[0].cpu(), truth)
    pipe.text_encoder.to("cpu")
    held.clear()
    gc.collect()


def test_gradients_hold_on_to_what_they_have_seen(cuda: FakeCuda, enable: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    ids = torch.ones(1, 77, dtype=torch.long, device=DEVICE)
    out = pipe.text_encoder(ids)[0].sum()
    offload.release()
    out.backward()
    assert offload.stats.resident_nbytes == 0
    offload.disable()
    del out
    pipe.text_encoder.zero_grad()
    gc.collect()


# ------------------------------------------------------------------------------------------------------------- arena
def test_an_arena_holds_everything_for_good(enable: Any, sim: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, stable_addresses=True, **UNITS)
    seen = pointers(pipe)
    first: dict[str, dict[str, int]] = {}
    for seed in range(5):
        made = np.asarray(CASES["flux"].call(pipe, seed=seed % 3))
        assert_same([made], [resident("flux", torch.float32)[seed % 3]])
        first = first or {name: dict(where) for name, where in seen.items()}
        assert seen == first and len(first) == 4
        offload.release()
        assert offload.stats.resident_nbytes == 0
        assert offload.stats.pool_nbytes >= weight_nbytes(pipe)
    moved = offload.stats.h2d_nbytes
    np.asarray(CASES["flux"].call(pipe))
    assert offload.stats.h2d_nbytes > moved
    offload.disable()
    assert sim.counters()["allocated"] < weight_nbytes(pipe)


def test_an_arena_counts_in_the_budget(enable: Any, sim: Any) -> None:
    need = weight_nbytes(CASES["flux"].build())
    pipe = CASES["flux"].build()
    with pytest.raises(BudgetError, match=r"stable_addresses=True.*device memory for good.*cuda-bindings"):
        prefetch_offload.enable(pipe, device=DEVICE, budget=need * 9 // 10, stable_addresses=True)
    assert not hasattr(pipe.transformer, "_hf_hook")
    with pytest.raises(BudgetError, match=r"stable_addresses=True.*budget='stock'"):
        prefetch_offload.enable(pipe, device=DEVICE, budget="stock", stable_addresses=True)
    budget = need + (4 << 20)
    offload = enable(pipe, budget=budget, stable_addresses=True, **UNITS)
    for seed in range(3):
        made = np.asarray(CASES["flux"].call(pipe, seed=seed))
        assert_same([made], [resident("flux", torch.float32)[seed]])
        assert offload.stats.peak_nbytes <= budget
    with pytest.raises(BudgetError):
        offload.budget = need * 9 // 10
    sim.reset()
    assert offload.stats.resident_nbytes >= need, "nothing leaves: nothing would be gained"


@pytest.mark.parametrize("first", [True, False], ids=["placed", "left"])
def test_an_arenas_memory_waits_for_the_stream_that_used_it(first: bool, sim: Any) -> None:
    """It is given out in the order of one stream, maybe still at work on what lay there, and written for another."""
    sim.op_delay_us(2000)
    lanes = Lanes(torch.device(DEVICE, 0), verify=True)
    arena, unit = Arena(lanes), SimpleNamespace(key="unit", slab=SimpleNamespace(nbytes=1 << 16))
    with torch.Stream(device=DEVICE):
        before = torch.ones(1 << 16, dtype=torch.uint8, device=DEVICE)
        copy = before.clone()
        if first:
            del before
            arena.place(unit)
        else:
            shown = arena.map(unit)
            copy.add_(shown)
            arena.unmap(unit, lanes.record(lanes.compute()))
    shown = arena.map(unit)
    lanes.wait(lanes.copy, lanes.record(lanes.compute()), COPY_AFTER_ALLOCATION)
    with lanes.copy:
        shown.fill_(7)
    torch.accelerator.synchronize()
    assert sim.hazards() == []


def test_an_arena_of_one_component_counts_beside_the_others(enable: Any, sim: Any) -> None:
    """Plans are made for what the arena leaves, so that they can be followed; what is taken is never above the budget."""
    pipe = CASES["flux"].build()
    sizes = {n: sum(p.nbytes for p in m.parameters()) for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    budget = sizes["transformer"] + sizes["text_encoder_2"] // 2 + (1 << 20)
    resident("flux", torch.float32)
    settle(sim)
    sim.reset()
    offload = enable(pipe, budget=budget, **UNITS)
    pipe.transformer._hf_hook.component.graphs = True  # as if it were compiled with CUDA graphs
    engine, client = offload._engine, offload._session.client
    for seed in range(3):
        assert_same([np.asarray(CASES["flux"].call(pipe, seed=seed))], [resident("flux", torch.float32)[seed]])
        assert sim.counters()["peak"] <= budget, "by the device's own count"
        assert offload.stats.peak_nbytes <= budget
    assert pipe.transformer._hf_hook.component.fixed and engine.addresses.pool_nbytes >= sizes["transformer"]
    for key, component in client.components.items():
        share = client.plan.shares.get(key)
        limit = component.nbytes if share is None else share.limit_nbytes
        left = budget - engine.addresses.pool_nbytes - client.memory.set_aside(client.shapes[key])
        assert component.fixed or limit <= left, f"{key} is promised what the arena has"
    assert offload.plan.streamed["vae"] > 0


def test_two_pipelines_share_what_an_arena_leaves(enable: Any, sim: Any) -> None:
    """What one pipeline's arena takes is not there for the other's weights."""
    first, second = CASES["sd"].build(), CASES["flux"].build()
    arena = enable(first, stable_addresses=True, **UNITS)
    CASES["sd"].call(first)
    arena.release()
    need = weight_nbytes(second)
    other = enable(second, budget=arena.stats.pool_nbytes + need * 3 // 4, **UNITS)
    sim.reset()
    for seed in range(2):
        assert_same([np.asarray(CASES["flux"].call(second, seed=seed))], [resident("flux", torch.float32)[seed]])
    assert other.stats.resident_nbytes < need


def test_turned_off_and_on_again(cuda: FakeCuda, enable: Any) -> None:
    pipe = CASES["flux"].build()
    for stable in (True, False, True):
        offload = enable(pipe, stable_addresses=stable, **UNITS)
        assert_same(images_of("flux", pipe), resident("flux", torch.float32))
        assert (offload.stats.pool_nbytes > 0) is stable


# --------------------------------------------------------------------------------------------------- found out by itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's import
@pytest.mark.parametrize(
    "how",
    ["in place", "assigned", "decode", "blocks", "options", "default", "max-autotune", "max-autotune-no-cudagraphs"]
    + ["cudagraphs", "cudagraphs partly", "aot_eager"],
)
def test_components_compiled_with_cuda_graphs(how: str, cuda: FakeCuda, enable: Any, sim: Any) -> None:
    """Not run: there are no CUDA graphs here. What is asked of an entry is whether its units have addresses for life."""
    import torch._inductor.config

    pipe = CASES["flux"].build()
    offload = enable(pipe, **UNITS)
    part = pipe.vae if how == "decode" else pipe.transformer
    graphs: dict[str, Any] = {"mode": "reduce-overhead"} if how != "options" else {"options": {"triton.cudagraphs": True}}
    if how == "assigned":
        pipe.transformer = torch.compile(pipe.transformer, **graphs)
    elif how == "decode":
        pipe.vae.decode = torch.compile(pipe.vae.decode, **graphs)
    elif how == "blocks":
        pipe.transformer.compile_repeated_blocks(**graphs)
    elif how in ("cudagraphs", "aot_eager"):
        part.compile(backend=how)
    elif how.startswith("max-autotune"):
        part.compile(mode=how)
    elif how == "cudagraphs partly":
        pipe.transformer.transformer_blocks[1].compile(backend=functools.partial(lookup_backend("cudagraphs")))
    else:
        part.compile(**({} if how == "default" else graphs))
    hook, torch._dynamo.config.disable = part._hf_hook, True
    try:
        if how == "assigned":
            call = type(pipe.transformer)._prefetch_base.__call__
            hook._enter(part, (), {}, True, True, functools.partial(call, pipe.transformer))
        elif how == "decode":
            hook._enter(part, (), {}, True, True, part.__dict__["decode"])
        else:
            hook._enter(part, (), {}, True)
    finally:
        torch._dynamo.config.disable = False
    component = hook.component
    assert component.stable is component.graphs is (how not in ("default", "aot_eager", "max-autotune-no-cudagraphs"))
    assert all((u.addresses is not None) is component.stable for u in component.units)
    assert not any(c.stable for c in offload._session.client.components.values() if c is not component)
    offload.disable()


def test_an_arena_for_cuda_graphs_that_does_not_fit_is_done_without(enable: Any, sim: Any) -> None:
    pipe = CASES["flux"].build()
    offload = enable(pipe, budget="stock", **UNITS)
    component = pipe.transformer._hf_hook.component
    component.graphs = True
    with pytest.warns(OffloadWarning, match=r"transformer is compiled with CUDA graphs.*budget='stock'.*cuda-bindings"):
        CASES["flux"].call(pipe)
    assert not component.stable
    assert_same(images_of("flux", pipe), resident("flux", torch.float32))
    assert offload.stats.pool_nbytes == 0
