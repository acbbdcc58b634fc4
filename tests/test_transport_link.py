"""What encoded units put on the link and launch, what plans know of it, and what they give where there is no Triton."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import settle, weight_nbytes
from test_transport_codecs import UNITS, build, draw, encoded_units, fp8_rounded, resident, small_chunks, weights

from prefetch_offload import transport, upcast
from prefetch_offload.device import STAGE_AFTER_CAST, Lanes
from prefetch_offload.loading import SlabUnit
from prefetch_offload.planning import workload_of
from prefetch_offload.staging import Staging, staging_nbytes
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.transport import Transport
from prefetch_offload.units import align

__all__ = ["small_chunks"]  # for every test here, too


def as_fp8(pipe: Any) -> int:
    """Bytes of all weights as they travel: those that rounding changes as one byte each, and a scale for every row."""
    before = {key: p.clone() for key, p in weights(pipe)}
    fp8_rounded(pipe)
    sizes = {key: p.numel() + 4 * p.shape[0] if not torch.equal(before[key], p) else p.nbytes for key, p in weights(pipe)}
    return sum(sizes.values())


@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_a_streamed_call_puts_the_payloads_on_the_link_and_launches_once_for_each(
    way: str, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the whole model: half of bf16 as fp8 but for scales and what travels raw, norms with all that is below them."""
    pipe = build("flux")
    nbytes = sum(p.nbytes for _, p in weights(pipe))
    least = as_fp8(build("flux")) if way == "fp8" else 0.74 * nbytes
    offload = enable(pipe, transport=way, budget=int(0.4 * weight_nbytes(pipe)), **UNITS)
    draw("flux", pipe)
    expected = draw("flux", pipe)
    loads: Counter[str] = Counter()
    launches: list[int] = []
    load, cast = Transport.load, transport.cast_unit

    def counted(self: Transport, unit: Any, sample: bool = True) -> Any:
        loads[unit.key] += 1
        return load(self, unit, sample)

    def launched(table: Any, staged: torch.Tensor, target: torch.Tensor) -> None:
        launches.append(staged.numel())
        cast(table, staged, target)

    monkeypatch.setattr(Transport, "load", counted)
    monkeypatch.setattr(transport, "cast_unit", launched)
    settle(sim)
    sim.reset()
    assert draw("flux", pipe) == expected
    settle(sim)
    units = {u.key: u for c in offload._session.client.components.values() for u in c.units}
    assert max(loads.values()) >= 2, "it streams"
    encoded = {u.key for u in encoded_units(offload)}
    assert len(launches) == sum(n for key, n in loads.items() if key in encoded) > len(encoded) / 2
    assert sum(launches) == sum(n * units[key].source.nbytes for key, n in loads.items() if key in encoded)
    assert all(isinstance(units[key], SlabUnit) for key in loads)
    assert sim.counters()["h2d_pinned"] == sum(n * units[key].source.nbytes for key, n in loads.items())
    stats = offload.stats
    whole = sum(c.link_nbytes for c in stats.components)
    assert least <= whole <= 1.06 * least
    assert whole < (0.67 if way == "fp8" else 0.79) * nbytes


def test_plans_are_made_of_what_travels_and_of_what_unpacking_took(sim: Any, enable: Any) -> None:
    pipe = build("flux")
    ways = {"default": "packed", "vae": "raw"}
    offload = enable(pipe, transport=ways, budget=int(0.4 * weight_nbytes(pipe)), **UNITS)
    for seed in range(3):
        draw("flux", pipe, seed)
    client = offload._session.client
    workload = workload_of(offload._engine, client)
    assert workload is not None and len(workload.components) == 4
    for key, load in workload.components.items():
        travelling = {u.key: u.source.nbytes for u in client.components[key].units if u.travels_encoded}
        assert load.copy_nbytes == travelling and bool(travelling) == (not key.startswith("vae"))
        assert all(load.link_nbytes(u) < load.nbytes[u] for u in travelling)
        assert set(load.unpack_ms) == set(travelling) and all(ms > 0 for ms in load.unpack_ms.values())
    copies = [s for s in offload.timeline().spans if s.track == "copy"]
    assert {s.args["unit"] for s in copies if "cast_ms" in s.args} == {u.key for u in encoded_units(offload)}
    assert all(s.args["cast_ms"] > 0 for s in copies if "cast_ms" in s.args), "beside the copy, not part of it"


_WITHOUT_TRITON = """
    import sys
    sys.modules["triton"] = None
    import hashlib
    sys.path[:0] = sys.argv[1:]
    from test_transport_codecs import DEVICE, UNITS, build, draw
    import prefetch_offload
    from prefetch_offload.testing import load
    from prefetch_offload_kernels import available
    load()
    pipe = build("flux")
    with prefetch_offload.enable(pipe, device=DEVICE, transport="fp8", **UNITS):
        assert not available(DEVICE)
        print(hashlib.sha256(draw("flux", pipe)).hexdigest())
"""


def test_without_triton_the_images_are_the_same(sim: Any) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_WITHOUT_TRITON), os.path.dirname(__file__)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    expected = hashlib.sha256(resident("flux", fp8_rounded)[0]).hexdigest()
    assert run.stdout.split()[-1] == expected


def test_the_link_goes_on_while_a_unit_is_cast(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the cast of the unit before the last one, whose buffer it takes, and no cast before."""
    pipe = build("flux")
    offload = enable(pipe, transport="packed", budget=int(0.4 * weight_nbytes(pipe)), **UNITS)
    draw("flux", pipe)
    lanes, moves = offload._engine.lanes, offload._engine.transport
    assert lanes.cast not in (lanes.copy, lanes.compute())
    awaited: list[Any] = []
    ready: list[Any] = []
    wait, load = Lanes.wait, Transport.load

    def waiting(self: Lanes, stream: torch.Stream, event: torch.Event, why: str) -> None:
        if why == STAGE_AFTER_CAST:
            assert stream == lanes.copy
            awaited.append(event)
        wait(self, stream, event, why)

    def loading(self: Transport, unit: Any, sample: bool = True) -> Any:
        flight = load(self, unit, sample)
        if unit.travels_encoded:
            ready.append(flight.ready)
        return flight

    monkeypatch.setattr(Lanes, "wait", waiting)
    monkeypatch.setattr(Transport, "load", loading)
    assert draw("flux", pipe) == resident("flux")[0]
    payloads = sorted((u.payload_nbytes for u in encoded_units(offload)), reverse=True)
    assert [s.bytes.numel() for s in moves.staging.buffers if s is not None] == [align(n, 512) for n in payloads[:2]]
    assert len(ready) == len(awaited) > 1.5 * len(payloads), "it streams"
    turns = sum(event is ready[at - 2] for at, event in enumerate(awaited) if at >= 2)
    again = [at for at, event in enumerate(awaited) if at and event is ready[at - 1]]
    assert turns > 0.8 * len(ready) and len(again) <= sum(n > payloads[1] for n in payloads) * 3


def test_staging_is_for_the_largest_unit_and_for_most_others() -> None:
    mib = 1 << 20
    assert staging_nbytes([]) == (0, 0)
    assert staging_nbytes([5]) == (5, 0)
    assert staging_nbytes([5, 9, 7]) == (9, 7)
    assert staging_nbytes(iter([700 * mib, 128 * mib, 700 * mib, 100 * mib])) == (700 * mib, 128 * mib)
    assert staging_nbytes([700 * mib, 600 * mib]) == (700 * mib, 0), "two embeddings of a text encoder take turns in one"


def test_what_is_cast_up_for_a_call_has_one_buffer(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more memory for the default than before, where a VAE's activations are."""
    monkeypatch.setattr(upcast, "_PAYLOAD", 1 << 10)
    case = CASES["sdxl-upcast"]
    pipe = case.build()
    transport = enable(pipe, **UNITS)._engine.transport
    sizes: list[tuple[int, int]] = []
    take = Staging.take

    def asked(self: Staging, payload_nbytes: int) -> Any:
        sizes.append(self.sizes)
        return take(self, payload_nbytes)

    monkeypatch.setattr(Staging, "take", asked)
    case.call(pipe)
    assert len(sizes) > 3 and all(first and not second for first, second in sizes)
    assert transport.staging.buffers[1] is None


def test_without_room_for_a_second_buffer_one_does(sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("flux")
    offload = enable(pipe, transport="packed", **UNITS)
    buffer = Staging._buffer

    def only_the_first(self: Staging, number: int, nbytes: int, least_nbytes: int) -> Any:
        if number == 1:
            raise torch.OutOfMemoryError("no room")
        return buffer(self, number, nbytes, least_nbytes)

    monkeypatch.setattr(Staging, "_buffer", only_the_first)
    assert draw("flux", pipe) == resident("flux")[0]
    assert offload._engine.transport.staging.buffers[1] is None and not offload.stats.counts


def test_a_second_buffer_is_worth_its_memory_where_the_link_is_short() -> None:
    """And costs nothing where it is not: what benchmarks/staging.py prints."""
    from benchmarks.staging import call_s

    assert call_s("fp8", 250, two=True) < 0.95 * call_s("fp8", 250, two=False)
    assert call_s("fp8", 900, two=True) <= 1.002 * call_s("fp8", 900, two=False)
