"""What is made of recorded marks: figures of the last call alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from prefetch_offload.recorder import Recorder, _Mark


@dataclass
class At:
    """An event that has happened."""

    ms: float

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: At) -> float:
        return other.ms - self.ms


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(SimpleNamespace())  # type: ignore[arg-type]


def mark(recorder: Recorder, track: str, start: float, end: float, **args: Any) -> None:
    recorder._marks.append(_Mark(track, track, At(start), At(end), args))  # type: ignore[arg-type]


def test_stalls_of_an_earlier_call_are_not_taken_for_the_last_ones(recorder: Recorder) -> None:
    """A call that waited for its first copies is followed by one that waited for nothing."""
    mark(recorder, "stalls", 0, 90, component="unet")
    mark(recorder, "compute", 0, 100, component="unet", passes=1)
    mark(recorder, "calls", 0, 100)
    assert recorder.run_ms() == {"unet": 10}
    mark(recorder, "compute", 100, 140, component="unet", passes=4)
    mark(recorder, "calls", 100, 140)
    assert recorder.run_ms() == {"unet": 10}, "40 ms in 4 passes"


def test_the_link_is_measured_by_the_last_call_and_what_follows_it(recorder: Recorder) -> None:
    mark(recorder, "copy", 0, 1, component="unet", nbytes=1 << 20)
    mark(recorder, "calls", 0, 100)
    mark(recorder, "copy", 100, 102, component="unet", nbytes=1 << 20)
    mark(recorder, "calls", 100, 140)
    mark(recorder, "copy", 140, 142, component="unet", nbytes=1 << 20)
    assert recorder.link_gbps() == pytest.approx((2 << 20) / 4 / 1e6)
