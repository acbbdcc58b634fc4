"""One schema for everything that happens on a timeline, real or simulated, and its Chrome/Perfetto form. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Track = Literal["calls", "compute", "copy", "stalls", "memory"]
TRACKS: tuple[Track, ...] = ("calls", "compute", "stalls", "copy", "memory")


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
    """A run. `simulated` says that no accelerator made these times."""

    spans: tuple[Span, ...]
    levels: tuple[Level, ...] = ()
    simulated: bool = False
    device: str = ""


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """The timeline as a Chrome trace, one thread a track; opens in Perfetto and chrome://tracing."""
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "pid": 1,
            "name": "process_name",
            "args": {"name": "prefetch_offload" + (" (simulated accelerator)" if timeline.simulated else "")},
        }
    ]
    for number, track in enumerate(TRACKS):
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}})
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
    for span in timeline.spans:
        events.append(
            {
                "ph": "X",
                "pid": 1,
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
                "pid": 1,
                "name": "weights on the device (MiB)",
                "ts": level.start_ms * 1e3,
                "args": {"MiB": level.nbytes / 2**20},
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"device": timeline.device, "simulated": timeline.simulated},
    }


def write(timeline: Timeline, path: str | Path) -> None:
    """Write the timeline as Chrome trace JSON."""
    Path(path).write_text(json.dumps(to_chrome(timeline)))


def busy_ms(spans: Iterable[Span]) -> float:
    """Time covered by at least one of the spans."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start_ms):
        total += max(0.0, span.end_ms - max(end, span.start_ms))
        end = max(end, span.end_ms)
    return total
