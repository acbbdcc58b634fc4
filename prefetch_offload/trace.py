"""One schema for everything that happens on a timeline, real or simulated, and its Chrome/Perfetto form. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Track = Literal["calls", "compute", "copy", "stalls"]
TRACKS: tuple[Track, ...] = ("calls", "compute", "stalls", "copy")
MEASURED, PREDICTED = 1, 2  # processes of a Chrome trace


@dataclass(frozen=True)
class Span:
    """Something that lasted: `name` on `track`, from `start_ms` for `duration_ms`, with whatever else is known."""

    track: Track
    name: str
    start_ms: float
    duration_ms: float
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.duration_ms


@dataclass(frozen=True)
class Level:
    """Device bytes held by weights from `start_ms` on."""

    start_ms: float
    nbytes: int


@dataclass(frozen=True)
class Timeline:
    """A run. `simulated` says that no accelerator made these times, `dropped` how many earlier spans are not in it any more."""

    spans: tuple[Span, ...]
    levels: tuple[Level, ...] = ()
    simulated: bool = False
    device: str = ""
    dropped: int = 0


def to_chrome(timeline: Timeline, predicted: Timeline | None = None) -> dict[str, Any]:
    """The timeline as a Chrome trace; opens in Perfetto and chrome://tracing. One process, with a thread for each track and
    memory as a counter; a second one for what was predicted, on the same clock."""
    name = "prefetch_offload" + (" (simulated accelerator)" if timeline.simulated else "")
    events = _process(MEASURED, name, timeline)
    if predicted is not None:
        events += _process(PREDICTED, "prefetch_offload: the last call as predicted", predicted)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"device": timeline.device, "simulated": timeline.simulated, "dropped": timeline.dropped},
    }


def _process(number: int, name: str, timeline: Timeline) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": number, "name": "process_sort_index", "args": {"sort_index": number}},
    ]
    for thread, track in enumerate(TRACKS):
        about = {"ph": "M", "pid": number, "tid": thread}
        events.append({**about, "name": "thread_name", "args": {"name": track}})
        events.append({**about, "name": "thread_sort_index", "args": {"sort_index": thread}})
    for span in timeline.spans:
        events.append(
            {
                "ph": "X",
                "pid": number,
                "tid": TRACKS.index(span.track),
                "name": span.name,
                "ts": span.start_ms * 1e3,
                "dur": span.duration_ms * 1e3,
                "args": dict(span.args),
            }
        )
    for level in timeline.levels:
        events.append(
            {
                "ph": "C",
                "pid": number,
                "name": "weights on the device (MiB)",
                "ts": level.start_ms * 1e3,
                "args": {"MiB": level.nbytes / 2**20},
            }
        )
    return events


def write(timeline: Timeline, path: str | Path, predicted: Timeline | None = None) -> None:
    """Write the timeline, and what was predicted beside it, as Chrome trace JSON."""
    Path(path).write_text(json.dumps(to_chrome(timeline, predicted)))


def within(timeline: Timeline, start_ms: float, end_ms: float, shift_ms: float = 0.0) -> Timeline:
    """What overlaps [start_ms, end_ms], `shift_ms` later."""
    spans = tuple(
        replace(s, start_ms=s.start_ms + shift_ms)
        for s in timeline.spans
        if s.end_ms > start_ms and s.start_ms < end_ms
    )
    before = [replace(level, start_ms=start_ms) for level in timeline.levels if level.start_ms <= start_ms][-1:]
    levels = [*before, *(level for level in timeline.levels if start_ms < level.start_ms <= end_ms)]
    shifted = tuple(replace(level, start_ms=level.start_ms + shift_ms) for level in levels)
    return replace(timeline, spans=spans, levels=shifted)


def times_of(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """Start and end of each, in milliseconds."""
    return [(s.start_ms, s.end_ms) for s in spans]


def total_ms(times: Iterable[tuple[float, float]]) -> float:
    """From the start of each to its end."""
    return sum((end - start for start, end in times), 0.0)


def overlap_ms(times: Iterable[tuple[float, float]], others: Iterable[tuple[float, float]]) -> float:
    """The part of `times` that some of `others` covers."""
    total = 0.0
    mine, covers = sorted(times), sorted(others)
    first = 0
    for start, end in mine:
        while first < len(covers) and covers[first][1] <= start:
            first += 1
        at, i = start, first
        while i < len(covers) and covers[i][0] < end:
            a, b = covers[i]
            total += max(0.0, min(end, b) - max(at, a))
            at, i = max(at, min(end, b)), i + 1
    return total


def busy_ms(spans: Iterable[Span]) -> float:
    """Time covered by at least one of the spans."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start_ms):
        total += max(0.0, span.end_ms - max(end, span.start_ms))
        end = max(end, span.end_ms)
    return total
