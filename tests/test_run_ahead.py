"""The host runs ahead of a real device: a step's kernels are enqueued long before they run. The simulated accelerator runs
operators at once, so that it cannot show what waits for too much then. What the engine enqueues is replayed here instead, in
the order of the streams and their events alone, with a host that takes no time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import weight_nbytes

from prefetch_offload.adapter import hooks
from prefetch_offload.device import Lanes
from prefetch_offload.planning import workload_of
from prefetch_offload.simulator import Link, simulate
from prefetch_offload.streaming import Stream
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.transport import Transport

LINK = Link(0.02, 0.0)  # so that copies take longer than kernels
NBYTES_A_MS = 60_000  # of weights that a kernel reads


class Replay:
    """Two streams' clocks, in milliseconds, and when events happen."""

    def __init__(self) -> None:
        self.clocks: dict[int, float] = {}
        self.events: dict[int, tuple[float, torch.Event]] = {}  # with the event: an identity lasts as long as it does

    def takes(self, stream: torch.Stream, ms: float) -> None:
        self.clocks[stream.stream_id] = self.clocks.get(stream.stream_id, 0.0) + ms

    def record(self, stream: torch.Stream, event: torch.Event) -> None:
        self.events[id(event)] = self.clocks.get(stream.stream_id, 0.0), event

    def wait(self, stream: torch.Stream, event: torch.Event) -> None:
        now = self.clocks.get(stream.stream_id, 0.0)
        self.clocks[stream.stream_id] = max(now, self.events[id(event)][0])


@pytest.mark.filterwarnings("ignore:the first call with these inputs took")
@pytest.mark.parametrize(("name", "share"), [("flux", 0.4), ("flux", 0.5), ("flux", 0.6), ("sdxl", 0.7)])
def test_with_a_host_that_is_ahead_a_call_takes_what_the_simulator_says(
    name: str, share: float, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, kernels = Replay(), dict[str, set[str]]()
    record, wait, copy, after, through = Lanes.record, Lanes.wait, Transport._copy, Stream.after, hooks._through

    def recorded(self: Lanes, stream: torch.Stream) -> torch.Event:
        event = record(self, stream)
        replay.record(stream, event)
        return event

    def waits(self: Lanes, stream: torch.Stream, event: torch.Event, why: str) -> None:
        wait(self, stream, event, why)
        replay.wait(stream, event)

    def copies(self: Transport, unit: Any, target: torch.Tensor) -> None:
        copy(self, unit, target)
        replay.takes(self.lanes.copy, LINK.copy_ms(unit.nbytes))

    def computes(component: Any, units: Any) -> None:
        done = kernels[component.key]
        for unit in component.units:
            if unit.key in units and unit.key not in done:
                done.add(unit.key)
                replay.takes(offload._engine.lanes.compute(), unit.nbytes / NBYTES_A_MS)

    def read(self: Stream, point: Any) -> None:
        computes(self.component, [u for u in point.units if self._final.get(u) is point])
        after(self, point)

    def passes(component: Any, *args: Any) -> Any:
        kernels[component.key] = set()
        result = through(component, *args)
        computes(component, {u.key for u in component.units})  # what no point told of
        return result

    for owner, attribute, value in (
        (Lanes, "record", recorded), (Lanes, "wait", waits), (Transport, "_copy", copies), (Stream, "after", read),
        (hooks, "_through", passes),
    ):
        monkeypatch.setattr(owner, attribute, value)
    case = CASES[name]
    pipe = case.build()
    offload = enable(pipe, budget=int(share * weight_nbytes(pipe)), unit_min=64 << 10, unit_max=512 << 10, verify=False)
    engine, ends = offload._engine, []
    for seed in range(5):
        case.call(pipe, seed=seed, steps=4)
        ends.append(replay.clocks[engine.lanes.compute().stream_id])
    (client,) = engine.clients
    workload = workload_of(engine, client)
    assert workload is not None and client.shares and client.plan is not None
    timed = {
        key: dataclasses.replace(c, compute_ms={u: n / NBYTES_A_MS for u, n in c.nbytes.items()})
        for key, c in workload.components.items()
    }
    workload = dataclasses.replace(workload, components=timed)
    predicted = simulate(workload, client.shares, client.plan.budget_nbytes, LINK, calls=4, every_pass=True)
    took = ends[-1] - ends[-2]
    copied = sum(predicted.copy_ms.values())
    assert sum(predicted.stalled_ms.values()) > 0 < copied, "nothing is waited for, or the test shows nothing"
    assert took == pytest.approx(predicted.call_ms, rel=0.1)
    assert took < 0.9 * (workload.compute_ms + copied), "copies run beside kernels"
