"""What is made of recorded marks: figures of the last call alone, whatever is still kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from prefetch_offload import recorder as module
from prefetch_offload.recorder import Call, Recorder


@dataclass(eq=False)
class At:
    """An event. It has happened once the device's clock has come to it."""

    ms: float
    device: Device

    def query(self) -> bool:
        return self.ms <= self.device.done_ms

    def elapsed_time(self, other: At) -> float:
        assert self.query() and other.query(), "asked too early"
        return other.ms - self.ms


@dataclass
class Device:
    """Lanes on a clock that a test sets."""

    now: float = 0.0
    done_ms: float = float("inf")
    device: str = "a device"

    def compute(self) -> None:
        pass

    def record(self, stream: object) -> At:
        return At(self.now, self)

    def synchronize(self) -> None:
        self.done_ms = float("inf")


@dataclass
class Run:
    """A recorder, and calls to tell it of."""

    device: Device = field(default_factory=Device)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.device)  # type: ignore[arg-type]
        self.last: dict[int, Call | None] = {}

    def at(self, ms: float) -> Recorder:
        self.device.now = ms
        return self.recorder

    def copy(self, key: str, start: float, end: float, nbytes: int = 1 << 20, unit: int = 0) -> None:
        name = f"{key}/{unit}"
        self.recorder.owner[name] = (key, key)
        flight = SimpleNamespace(
            unit=SimpleNamespace(key=name, payload_nbytes=nbytes),
            start=At(start, self.device), ready=At(end, self.device), arrived=None,
        )  # fmt: skip
        self.recorder.copied(flight, True, nbytes)  # type: ignore[arg-type]

    def stall(self, key: str, start: float, end: float) -> None:
        with self.at(start).stall(key, key, waits=True):
            self.device.now = end

    def begin(self, ms: float, client: int = 0, *keys: str) -> None:
        self.at(ms).call_started("call", client, keys or ("unet",))

    def end(self, ms: float, client: int = 0, *keys: str, failed: bool = False) -> Call:
        last = self.at(ms).call_ended(client, keys or ("unet",), failed, self.last.get(client))
        assert last is not None
        self.last[client] = last
        return last

    def call(self, start: float, end: float, waits: Any = (), passes: int = 1, key: str = "unet", **ended: Any) -> Call:
        client = ended.pop("client", 0)
        self.begin(start, client, key)
        self.at(start).entered(key, key, 0)
        for _ in range(passes):
            self.recorder.passed()
        for a, b in waits:
            self.stall(key, a, b)
        return self.end(end, client, key, **ended)


@pytest.fixture
def run() -> Run:
    return Run()


def test_stalls_of_an_earlier_call_are_not_taken_for_the_last_ones(run: Run) -> None:
    """A call that waited for its first copies is followed by one that waited for nothing."""
    call = run.call(0, 100, waits=[(0, 90)])
    assert run.recorder.run_ms(call) == {"unet": 10}
    call = run.call(100, 140, passes=4)
    assert run.recorder.run_ms(call) == {"unet": 10}, "40 ms in 4 passes"


def test_the_link_is_measured_by_the_last_call_and_what_follows_it(run: Run) -> None:
    run.copy("unet", 0, 1)
    run.call(0, 100)
    run.copy("unet", 100, 102)
    run.call(100, 140)
    run.copy("unet", 140, 142)
    assert run.recorder.link_gbps() == pytest.approx((2 << 20) / 4 / 1e6)


@pytest.mark.parametrize("kept", [1, 2, 7, 64, 8192])
def test_figures_of_a_call_do_not_depend_on_how_many_marks_are_kept(
    kept: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More copies and stalls than are kept, in a call that is hours away from the first event, and between calls."""
    monkeypatch.setattr(module, "KEPT", kept)
    far = 3_600_000.0
    run.call(0, 1, [(0, 1)])
    run.call(far - 50, far - 10, [(far - 40, far - 20)])
    run.copy("unet", far - 5, far + 5)
    run.begin(far)
    run.recorder.entered("unet", "unet", 0)
    for i in range(100):
        run.recorder.passed()
        run.copy("unet", far + 10 * i, far + 10 * i + 4, unit=i)
        run.stall("unet", far + 10 * i + 1, far + 10 * i + 3)
    call = run.end(far + 1000)
    run.copy("unet", far + 1000, far + 1001)  # for the call that follows
    assert run.recorder.run_ms(call) == {"unet": pytest.approx((1000 - 200) / 100)}
    times = run.recorder.times(call, "copy", "stalls", "compute")["unet"]
    assert times is not None
    assert sorted(times["copy"]) == [(-5, 5), *((10 * i, 10 * i + 4) for i in range(100))]
    assert sorted(times["stalls"]) == [(10 * i + 1, 10 * i + 3) for i in range(100)]
    assert times["compute"] == [(0, 1000)]
    before = run.recorder.times(call, "stalls", before=True)["unet"]
    assert before == {"stalls": [(-40, -20)]}
    timeline = run.recorder.timeline(True)
    n = 3 + 2 + 102 + 100 + 3  # runs, stalls of the first two, copies, stalls of the third, calls
    assert timeline.dropped == run.recorder.dropped == max(0, n - kept)
    assert len(timeline.spans) == min(kept, n)


def test_what_the_device_has_not_come_to_is_not_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be far ahead. Nothing is waited for, and nothing is lost."""
    monkeypatch.setattr(module, "KEPT", 4)
    run.device.done_ms = 0.5
    run.begin(0)
    for i in range(10):
        run.copy("unet", i, i + 1, unit=i)
    assert run.recorder.dropped == 0
    call = run.end(10)
    assert run.recorder.times(call, "copy") == {"unet": None}, "not to be measured yet"
    run.device.synchronize()
    for i in range(10):
        run.copy("unet", 20 + i, 21 + i, unit=i)
    assert len(run.recorder.timeline(True).spans) == 4
    times = run.recorder.times(call, "copy")["unet"]
    assert times is not None and sorted(times["copy"]) == [(i, i + 1) for i in range(10)]


def test_a_call_that_failed_is_no_measure(run: Run) -> None:
    call = run.call(0, 100, passes=4)
    run.begin(100)
    run.recorder.entered("unet", "unet", 0)
    run.recorder.met("unet", 1, 2)
    run.recorder.passed()
    assert run.end(500, failed=True) is call
    assert run.recorder.run_ms(call) == {"unet": 25}
    later = run.call(600, 700, passes=2)
    assert later.figures["unet"].hits == 0 and run.recorder.totals["unet"].hits == 1


def test_each_pipeline_has_a_last_call_of_its_own(run: Run) -> None:
    """Two that take turns: each was measured, though the call before is the other one's."""
    one, other = run.call(0, 100, key="unet"), run.call(100, 130, key="transformer", client=1)
    assert run.recorder.run_ms(one) == {"unet": 100}
    assert run.recorder.run_ms(other) == {"transformer": 30}


def test_what_runs_by_itself_is_no_call(run: Run) -> None:
    call = run.call(0, 100)
    run.at(200).entered("unet", "unet", 0)
    run.recorder.met("unet", 3, 0)
    assert run.at(300).call_ended(0, ("unet",), False, call) is call
    assert run.call(400, 500).figures["unet"].hits == 0


def test_a_span_has_happened_when_its_beginning_has() -> None:
    """It may have ended on another stream, which was ahead. A time between events that have not both happened is an error."""
    device = Device(done_ms=7)
    mark = module._Mark("calls", "call", At(10, device), At(5, device), {"client": 0})
    assert not mark.happened()
    recorder = Recorder(device)  # type: ignore[arg-type]
    call = Call(0, mark, {"a": module.Figures()}, {})
    assert recorder.times(call, "copy") == {"a": None}
    device.done_ms = 12
    assert mark.happened() and recorder.times(call, "copy") == {"a": {"copy": []}}
