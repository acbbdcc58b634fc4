"""The report: why a plan was made, and what a call did beside what was planned."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DEVICE, planned_once, settle, weight_nbytes

from benchmarks.plots import timeline_of
from prefetch_offload import Offload, planning, recorder
from prefetch_offload.recorder import Recorder, _Mark
from prefetch_offload.simulator import ComponentLoad, Link, Workload, simulate
from prefetch_offload.stats import COMPARED
from prefetch_offload.strategy import balanced
from prefetch_offload.testing.pipelines import lora_state_dict, scaled
from prefetch_offload.trace import overlap_ms

FLUX = scaled("flux", width=64, layers=2, text_width=64, text_layers=4, vae_width=8)
UNITS = {"unit_min": 64 << 10, "unit_max": 256 << 10}
GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "a loud lake"}


def draw(pipe: Any, **inputs: Any) -> np.ndarray:
    return np.asarray(FLUX.call(pipe, **{"steps": 2, **inputs}))


def nothing(pipe: Any) -> None:
    pass


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_state_dict(FLUX.build(), rank=8))


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a busy machine are no reason."""
    monkeypatch.setattr(planning, "_COMPUTE_CHANGE", 1e9)


CHANGES: dict[str, tuple[Mapping[str, Any], Callable[[Any], None], tuple[float, float], str]] = {
    # inputs of the calls that follow, what is done to the pipeline before them, budgets before and then, and the reason
    "steps": ({"steps": 3}, nothing, (0.6, 0.6), r"other numbers of passes: 2 -> 3"),
    "size": ({"height": 16, "width": 16}, nothing, (0.6, 0.6), r"other activation memory"),
    "guidance": (GUIDED, nothing, (0.6, 0.6), r"another order of components"),
    "lora": ({}, load_lora, (0.6, 0.6), r"other weights"),
    "budget": ({}, nothing, (0.6, 0.8), r"another budget: (\d+) -> (\d+) bytes"),
    "budget, steps": ({"steps": 3}, nothing, (0.6, 0.8), r"another budget: (\d+) -> (\d+) bytes; other numbers of passes: .*"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("steady")
def test_the_report_says_why_there_is_another_plan(change: str, sim: Any, enable: Any) -> None:
    inputs, to_the_pipe, shares, reason = CHANGES[change]
    resident = FLUX.build().to(DEVICE)
    expected = [draw(resident)]
    to_the_pipe(resident)
    expected.append(draw(resident, **inputs))
    del resident
    pipe = FLUX.build()
    budgets = [int(share * weight_nbytes(pipe)) for share in shares]
    offload = enable(pipe, budget=budgets[0], **UNITS)
    for _ in range(2):
        assert draw(pipe).tobytes() == expected[0].tobytes()
    assert "(first plan)" in flat(offload.report())
    first = offload._session.client.plan
    to_the_pipe(pipe)
    if budgets[1] != budgets[0]:
        offload.budget = budgets[1]
        assert "(first plan)" in flat(offload.report()), "of the last call, which is still shown beside what was planned"
    reasons = []
    for _ in range(2):  # inputs that are new are measured in the first of them
        assert draw(pipe, **inputs).tobytes() == expected[1].tobytes()
        last = offload.stats.last_call
        assert last is not None and f"({last.planned_because})" in flat(offload.report())
        reasons.append(last.planned_because)
    found = next(filter(None, (re.fullmatch(reason, r) for r in reasons)), None)
    assert found, reasons
    assert [int(n) for n in found.groups()] in ([], budgets)
    assert offload._session.client.plan.found_for_ms != first.found_for_ms, "a new plan"


@pytest.mark.usefixtures("steady")
def test_the_same_budget_set_again_is_a_reason(sim: Any, enable: Any) -> None:
    pipe = FLUX.build()
    offload = enable(pipe, budget=int(0.6 * weight_nbytes(pipe)), **UNITS)
    for _ in range(2):
        draw(pipe)
    offload.budget = offload.budget
    draw(pipe)
    assert offload.stats.last_call.planned_because == "the budget was set again"


def flat(report: str) -> str:
    """Titles are broken into lines."""
    return " ".join(report.split())


# ------------------------------------------------------------------------------------ the last call beside its prediction
BLOCKS = {
    "sdxl": scaled("sdxl", width=96, vae_width=8, text_width=128, text_layers=6),
    "flux": scaled("flux", width=128, layers=4, text_width=128, text_layers=6, vae_width=8),
}


@pytest.fixture
def stream(sim: Any, enable: Any) -> Callable[[str], tuple[Any, Offload]]:
    """Three calls that stream over a slow link, by the same shares however fast the machine is."""
    def run(name: str) -> tuple[Any, Offload]:
        pipe = BLOCKS[name].build()
        settle(sim)
        sim.configure(-1, 0.05, 0.05, 0.05)
        sim.op_delay_us(50)
        sim.device_clock(True)  # the plan is the same on every machine
        offload = enable(pipe, budget="stock", strategy=planned_once(), unit_min=64 << 10, unit_max=512 << 10)
        for _ in range(3):
            BLOCKS[name].call(pipe, steps=5, height=16, width=16)  # five passes: two of them repeat in a prediction
        return pipe, offload

    return run


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_call_is_compared_with_what_was_predicted(name: str, stream: Any, tmp_path: Path) -> None:
    _pipe, offload = stream(name)
    stats, plan = offload.stats, offload._session.client.followed
    last = stats.last_call
    assert last is not None and plan is not None and last.predicted_ms == plan.prediction.call_ms
    assert sum(c.copies for c in last.components) > 0 < sum(c.hits + c.misses for c in last.components)
    for c in last.components:
        assert (c.copies, c.hits, c.misses) == (c.predicted_copies, c.predicted_hits, c.predicted_misses), c.name
    key = {c.name: key for key, c in offload._session.client.components.items()}
    for c in last.components:
        copy_ms, waited_ms = (of.get(key[c.name], 0.0) for of in (plan.prediction.copy_ms, plan.prediction.stalled_ms))
        assert c.predicted_hidden_ms + c.predicted_exposed_ms == pytest.approx(copy_ms)
        assert c.predicted_stalled_ms == waited_ms
    waited = sum(c.stalled_ms for c in last.components)
    assert 0 <= waited < last.ms
    assert sum(c.exposed_ms for c in last.components) <= waited * (1 + 1e-6)
    # Nothing but copies is waited for in a prediction.
    stalled, exposed = (sum(getattr(c, f"predicted_{w}_ms") for c in last.components) for w in ("stalled", "exposed"))
    assert exposed == pytest.approx(stalled)
    shown = json.loads(stats.to_json())["last_call"]["components"]
    assert shown == [dataclasses.asdict(c) for c in last.components]

    report = offload.report().split("the last call")[1].splitlines()
    headings = next(line for line in report if "streamed MiB" in line)
    assert [h.strip() for h in headings.strip("┃ ").split("┃")][3:] == [what.replace("_", " ") for what in COMPARED]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in report if line.startswith("│")]
    assert len(rows) == 2 * len(last.components)
    for c, measured, planned in zip(last.components, rows[::2], rows[1::2], strict=True):
        assert measured[:2] == [c.name, "measured"] and planned[:2] == ["", "planned"]
        assert measured[3] == planned[3] == str(c.copies) and measured[-2:] == planned[-2:] == [str(c.hits), str(c.misses)]
        assert planned[6] == f"{c.predicted_stalled_ms:.1f}" and measured[6] == f"{c.stalled_ms:.1f}"

    offload.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "prefetch_offload (simulated accelerator)", 2: "prefetch_offload: the last call as predicted"}
    for pid in processes:
        tracks = {e["tid"]: e["args"]["name"] for e in events if e["pid"] == pid and e["name"] == "thread_name"}
        used = {tracks[e["tid"]] for e in events if e["pid"] == pid and e["ph"] == "X"}
        assert used == {*tracks.values()} == {"calls", "compute", "stalls", "copy"}
        assert {e["name"] for e in events if e["pid"] == pid and e["ph"] == "C"} == {"weights on the device (MiB)"}
    begins = [e["ts"] for e in events if e["pid"] == 1 and e["ph"] == "X" and e["tid"] == 0][-1]
    (predicted,) = (e for e in events if e["pid"] == 2 and e["ph"] == "X" and e["tid"] == 0)
    assert predicted["ts"] == pytest.approx(begins) and predicted["name"] == "call 3, predicted"
    assert predicted["dur"] == pytest.approx(1e3 * last.predicted_ms), "all passes are drawn"
    waits = [e["dur"] for e in events if e["pid"] == 2 and e["ph"] == "X" and e["tid"] == 2]
    assert sum(waits) == pytest.approx(1e3 * stalled)
    timeline = timeline_of(tmp_path / "trace.json")
    assert len(timeline.spans) == len(offload.timeline().spans), "what was measured, and nothing else"
    assert {e["name"] for e in events if e["pid"] == 2 and e["ph"] == "X" and e["tid"] == 1} == {*key}


def test_figures_of_the_last_call_do_not_depend_on_how_many_spans_are_kept(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[_Mark] = []
    keep = Recorder._keep

    def record(self: Recorder, mark: _Mark) -> None:
        kept.append(mark)
        keep(self, mark)

    monkeypatch.setattr(Recorder, "_keep", record)
    monkeypatch.setattr(recorder, "KEPT", 16)
    _pipe, offload = stream("flux")
    stats, client = offload.stats, offload._session.client
    timeline = offload.timeline()
    assert stats.dropped_spans == timeline.dropped == len(kept) - len(timeline.spans) > 0
    assert f"without the {stats.dropped_spans} oldest spans" in offload.report()
    ends = [i for i, mark in enumerate(kept) if mark.track == "calls"]
    inside = kept[ends[-2] + 1 : ends[-1] + 1]
    assert 0 < len(timeline.spans) < len(kept[ends[-3] + 1 :]), "16, and what the device had not come to"
    assert stats.last_call.ms == kept[ends[-1]].duration_ms()
    of = {c.name: c for c in stats.last_call.components}
    took = offload._engine.recorder.run_ms(client.last_call)
    for key, component in client.components.items():
        ms = {t: sum(m.duration_ms() for m in inside if m.track == t and m.args["component"] == key)
              for t in ("copy", "stalls", "compute")}  # fmt: skip
        shown = of[component.name]
        assert shown.copies == sum(m.track == "copy" and m.args["component"] == key for m in inside)
        assert shown.stalled_ms == pytest.approx(ms["stalls"], abs=1e-3)
        passes = dict(zip(client.order.expected, client.order.passes, strict=True))[key]
        assert took[key] == pytest.approx((ms["compute"] - ms["stalls"]) / passes, abs=1e-3)
    before = kept[ends[-3] + 1 : ends[-1] + 1]
    start = kept[ends[-1]].start
    waits = [m.since(start) for m in inside if m.track == "stalls"]
    exposed = overlap_ms((m.since(start) for m in before if m.track == "copy"), waits)
    assert sum(c.exposed_ms for c in stats.last_call.components) == pytest.approx(exposed, abs=1e-2)


def test_a_call_that_failed_is_not_the_last_one(stream: Any) -> None:
    pipe, offload = stream("flux")
    before = offload.stats.last_call

    def fail(*args: Any) -> None:
        raise RuntimeError("in the midst of it")

    with pytest.raises(RuntimeError, match="midst"):
        BLOCKS["flux"].call(pipe, steps=5, height=16, width=16, callback_on_step_end=fail)
    assert offload.stats.last_call == before
    assert offload.stats.calls == 4


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 1.2])
def test_a_prediction_is_what_its_timeline_shows(share: float) -> None:
    """Passes that are left out of the timeline are counted in; with all of them, figures are those of the spans."""
    sizes = {"text": 3, "unet": 8, "vae": 2}
    loads = {
        name: ComponentLoad(tuple(f"{name}{i}" for i in range(n)), {f"{name}{i}": 100 << 20 for i in range(n)},
                            {f"{name}{i}": 3.0 + i for i in range(n)}, 10 << 20)
        for name, n in sizes.items()
    }  # fmt: skip
    workload = Workload(loads, (("text", 1), ("unet", 9), ("vae", 1)))
    budget, link = max(int(share * (1300 << 20)), workload.smallest_budget_nbytes), Link(25.0)
    shares = balanced(workload, budget, link)
    short, full = (simulate(workload, shares, budget, link, 3, every_pass=every) for every in (False, True))
    assert len(full.timeline.spans) > len(short.timeline.spans)
    for field in dataclasses.fields(short):
        if field.name in ("timeline", "start_ms"):
            continue
        mine, theirs = getattr(short, field.name), getattr(full, field.name)
        assert mine == (pytest.approx(theirs) if "ms" in field.name else theirs), field.name
    end_ms = full.start_ms + full.call_ms
    inside = [s for s in full.timeline.spans if s.track != "copy" and full.start_ms - 1e-6 <= s.start_ms < end_ms - 1e-6]
    waits = [(s.start_ms, s.end_ms) for s in inside if s.track == "stalls"]
    copies = [s for s in full.timeline.spans if s.track == "copy"]
    every = simulate(workload, shares, budget, link, 2, every_pass=True).timeline.spans
    for name in sizes:
        mine = [(s.start_ms, s.end_ms) for s in copies if s.name == name]
        assert full.exposed_ms.get(name, 0.0) == pytest.approx(overlap_ms(mine, waits), abs=1e-6)
        assert full.stalled_ms.get(name, 0.0) == pytest.approx(sum(s.duration_ms for s in inside
                                                               if s.track == "stalls" and s.name == name))  # fmt: skip
        assert full.copies.get(name, 0) == len(mine) - sum(s.track == "copy" and s.name == name for s in every)
        assert full.copies.get(name, 0) <= full.hits[name] + full.misses[name]
    assert full.link_gbps == pytest.approx(sum(full.copies.values()) * (100 << 20) / full.call_ms / 1e6)
    assert 0 <= full.link_gbps <= 25 * full.link_use <= 25
    assert (full.link_use > 0) == (share < 1.2)
