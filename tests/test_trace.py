"""Timelines: their Chrome form, checked against what viewers need, and the time that spans cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefetch_offload.trace import (
    MEASURED,
    PREDICTED,
    TRACKS,
    Level,
    Span,
    Timeline,
    Track,
    busy_ms,
    overlap_ms,
    to_chrome,
    total_ms,
    within,
    write,
)

RUN = Timeline(
    spans=(
        Span("calls", "call 1", 0.0, 20.0),
        Span("compute", "unet", 2.0, 10.5, {"units": 3, "shape": "1x4x64x64"}),
        Span("copy", "vae/0:rest", 2.25, 4.0, {"nbytes": 1 << 20}),
        Span("stalls", "vae", 12.5, 0.0),
    ),
    levels=(Level(0.0, 0), Level(2.25, 3 << 19)),
    simulated=False,
    device="cuda:0",
)


def events(timeline: Timeline, phase: str) -> list[dict[str, Any]]:
    """The trace's events of one phase, as a viewer reads them: through JSON."""
    return [e for e in json.loads(json.dumps(to_chrome(timeline)))["traceEvents"] if e["ph"] == phase]


def track_names(timeline: Timeline) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in events(timeline, "M") if e["name"] == "thread_name"}


def process_name(timeline: Timeline) -> str:
    (name,) = (e["args"]["name"] for e in events(timeline, "M") if e["name"] == "process_name")
    assert isinstance(name, str)
    return name


def test_every_track_has_a_thread_of_its_name_in_the_order_of_tracks() -> None:
    names = track_names(RUN)
    assert sorted(names.values()) == sorted(TRACKS)
    order = {e["tid"]: e["args"]["sort_index"] for e in events(RUN, "M") if e["name"] == "thread_sort_index"}
    assert [names[tid] for tid in sorted(order, key=lambda tid: order[tid])] == list(TRACKS)
    assert set(TRACKS) == set(get_args(Track))


def test_spans_are_complete_events_in_microseconds_on_their_tracks() -> None:
    names = track_names(RUN)
    found = [(names[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]) for e in events(RUN, "X")]
    assert found == [
        ("calls", "call 1", 0, 20_000, {}),
        ("compute", "unet", 2_000, 10_500, {"units": 3, "shape": "1x4x64x64"}),
        ("copy", "vae/0:rest", 2_250, 4_000, {"nbytes": 1 << 20}),
        ("stalls", "vae", 12_500, 0, {}),
    ]


def test_levels_are_one_counter_in_mebibytes() -> None:
    found = [(e["name"], e["ts"], e["args"]) for e in events(RUN, "C")]
    assert found == [
        ("weights on the device (MiB)", 0, {"MiB": 0}),
        ("weights on the device (MiB)", 2_250, {"MiB": 1.5}),
    ]


def test_there_is_nothing_else_and_all_of_it_is_one_process() -> None:
    every = to_chrome(RUN)["traceEvents"]
    assert len(every) == 2 + 2 * len(TRACKS) + len(RUN.spans) + len(RUN.levels)
    assert {e["pid"] for e in every} == {1}
    assert {e["ph"] for e in every} == {"M", "X", "C"}


@pytest.mark.parametrize("simulated", [False, True])
def test_a_simulated_run_says_so_where_a_viewer_shows_it(simulated: bool) -> None:
    timeline = Timeline(RUN.spans, RUN.levels, simulated, "simgpu:0")
    assert ("simulated" in process_name(timeline)) is simulated
    assert to_chrome(timeline)["otherData"] == {"device": "simgpu:0", "simulated": simulated, "dropped": 0}


def test_what_was_predicted_is_a_process_of_its_own_on_the_same_clock() -> None:
    hoped = Timeline((Span("compute", "unet", 3.0, 9.0),), (Level(1.0, 1 << 20),), True, "predicted")
    alone, both = (json.loads(json.dumps(to_chrome(RUN, other)))["traceEvents"] for other in (None, hoped))
    assert [e for e in both if e["pid"] == MEASURED] == alone
    predicted = [e for e in both if e["pid"] == PREDICTED]
    assert len(alone) + len(predicted) == len(both)
    assert [e["args"]["name"] for e in predicted if e["name"] == "process_name"] == [
        "prefetch_offload: the last call as predicted"
    ]
    assert [e["args"]["name"] for e in predicted if e["name"] == "thread_name"] == list(TRACKS)
    assert [(e["name"], e["ts"], e["dur"]) for e in predicted if e["ph"] == "X"] == [("unet", 3_000, 9_000)]
    assert [(e["ts"], e["args"]) for e in predicted if e["ph"] == "C"] == [(1_000, {"MiB": 1})]


def test_a_part_of_a_timeline_is_told_from_elsewhere() -> None:
    spans = tuple(Span("copy", str(i), 10.0 * i, 10.0) for i in range(5))
    levels = tuple(Level(10.0 * i, i) for i in range(5))
    part = within(Timeline(spans, levels, True, "predicted", 3), 15, 30, 100)
    assert [(s.name, s.start_ms, s.duration_ms) for s in part.spans] == [("1", 110, 10), ("2", 120, 10)]
    assert part.levels == (Level(115, 1), Level(120, 2), Level(130, 3))
    assert (part.simulated, part.device, part.dropped) == (True, "predicted", 3)


def test_an_empty_run_is_a_valid_trace() -> None:
    assert events(Timeline(()), "X") == []
    assert events(Timeline(()), "C") == []
    assert process_name(Timeline(())) == "prefetch_offload"
    assert sorted(track_names(Timeline(())).values()) == sorted(TRACKS)


@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_written_is_the_trace(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "trace.json"
    write(RUN, str(path) if as_text else path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(to_chrome(RUN)))


def test_an_unknown_track_is_refused() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        to_chrome(Timeline((Span("gpu", "x", 0, 1),)))  # type: ignore[arg-type]


def test_making_a_trace_leaves_the_spans_arguments_alone() -> None:
    args = {"nbytes": 1}
    trace = to_chrome(Timeline((Span("copy", "x", 0, 1, args),)))
    next(e for e in trace["traceEvents"] if e["ph"] == "X")["args"]["nbytes"] = 2
    assert args == {"nbytes": 1}


# ------------------------------------------------------------------------------------------------------------ busy time
intervals = st.lists(st.tuples(st.integers(-20, 20), st.integers(0, 15)), max_size=8)


def spans(of: list[tuple[int, int]]) -> list[Span]:
    return [Span("copy", str(i), start, duration) for i, (start, duration) in enumerate(of)]


@settings(deadline=None, max_examples=200)
@given(intervals)
def test_busy_time_is_the_milliseconds_that_some_span_covers(of: list[tuple[int, int]]) -> None:
    covered = {ms for start, duration in of for ms in range(start, start + duration)}
    assert busy_ms(spans(of)) == len(covered)


@settings(deadline=None, max_examples=200)
@given(intervals, intervals)
def test_the_part_that_others_cover(of: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    covered = {ms for start, duration in others for ms in range(start, start + duration)}
    times, covers = ([(a, a + n) for a, n in some] for some in (of, others))
    assert overlap_ms(times, covers) == sum(len(covered & set(range(*span))) for span in times)
    assert total_ms(times) == sum(n for _, n in of)


@settings(deadline=None)
@given(intervals, st.randoms(use_true_random=False))
def test_busy_time_does_not_depend_on_the_order_of_the_spans(of: list[tuple[int, int]], random: Any) -> None:
    shuffled = spans(of)
    random.shuffle(shuffled)
    assert busy_ms(iter(shuffled)) == busy_ms(spans(of))


def test_nothing_is_busy_for_no_time() -> None:
    assert busy_ms([]) == 0
    assert busy_ms([Span("copy", "x", 5, 0)]) == 0


def test_a_span_ends_after_its_duration() -> None:
    assert Span("copy", "x", 1.5, 2.25).end_ms == 3.75
