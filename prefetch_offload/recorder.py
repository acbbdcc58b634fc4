"""What happened on the device: events while it runs, spans and figures when someone asks."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .device import Lanes
from .trace import Level, Span, Timeline

if TYPE_CHECKING:
    from .transport import Flight

# Spans kept. Older ones leave the trace; the totals keep counting.
KEPT = 8192


@dataclass
class ComponentTotals:
    """What one component cost since recording began. Bytes and counts; times come from the spans."""

    entries: int = 0
    hits: int = 0  # units that were there, or on their way, when needed
    misses: int = 0  # units that had to be loaded then
    h2d_nbytes: int = 0


@dataclass(slots=True)
class _Mark:
    track: str
    name: str
    start: torch.Event
    end: torch.Event | None
    args: dict[str, object] = field(default_factory=dict)
    arrived: torch.Event | None = None  # of a unit that travels encoded: behind its copy, before what it is turned into


_NO_STALL = contextlib.nullcontext()


class _Stall:
    """See `Recorder.stall`."""

    def __init__(self, recorder: Recorder, key: str, name: str) -> None:
        self._recorder, self._mark = recorder, _Mark("stalls", name, recorder._now(), None, {"component": key})

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._mark.end = self._recorder._now()
            self._recorder._marks.append(self._mark)


class Recorder:
    """Records spans by timing events on the streams; resolving them waits for the device, so only `timeline` does.

    Attributes:
        counts: how often something noteworthy happened (``ladder``, ``prefetch refused``).
        totals: by component key.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.counts: Counter[str] = Counter()
        self.totals: dict[str, ComponentTotals] = {}
        self.owner: dict[str, tuple[str, str]] = {}  # unit key -> its component's key and name
        self._marks: deque[_Mark] = deque(maxlen=KEPT)
        self._levels: deque[tuple[torch.Event, int]] = deque(maxlen=KEPT)
        self._run: _Mark | None = None
        self._call: _Mark | None = None
        self._base: torch.Event | None = None
        self.host_base = time.perf_counter()

    def _now(self) -> torch.Event:
        event = self._lanes.record(self._lanes.compute())
        if self._base is None:
            self._base = event
            self.host_base = time.perf_counter()
        return event

    # ------------------------------------------------------------------ events
    def passed(self) -> None:
        """What runs begins a pass."""
        if self._run is not None:
            self._run.args["passes"] = int(self._run.args.get("passes", 0)) + 1  # type: ignore[call-overload]

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def call_started(self, name: str, client: int) -> None:
        self._call = _Mark("calls", name, self._now(), None, {"client": client})

    def call_ended(self, failed: bool) -> None:
        self.left()
        if self._call is not None:
            self._call.end = self._now()
            self._call.args["failed"] = failed
            self._marks.append(self._call)
            self._call = None

    def entered(self, key: str, name: str, held_nbytes: int) -> None:
        """Component `key`, called `name`, runs from now on; weights take `held_nbytes` on the device."""
        self.left()
        now = self._now()
        self._run = _Mark("compute", name, now, None, {"component": key})
        self._levels.append((now, held_nbytes))
        self.of(key).entries += 1

    def left(self) -> None:
        """What ran last does so no more: another component is being entered, or the call is over."""
        if self._run is not None:
            self._run.end = self._now()
            self._marks.append(self._run)
            self._run = None

    def of(self, key: str) -> ComponentTotals:
        """The totals of component `key`."""
        totals = self.totals.get(key)
        if totals is None:
            totals = self.totals[key] = ComponentTotals()
        return totals

    def met(self, key: str, hits: int, misses: int) -> None:
        """On entering component `key`, so many of its units were there or on their way, and so many were not."""
        totals = self.of(key)
        totals.hits += hits
        totals.misses += misses

    def copied(self, flight: Flight, ahead: bool, held_nbytes: int) -> None:
        """A unit's copy was enqueued, `ahead` of use or because it is needed now; weights take `held_nbytes` then."""
        key, name = self.owner[flight.unit.key]
        self.of(key).h2d_nbytes += flight.unit.payload_nbytes
        args = {"component": key, "unit": flight.unit.key, "nbytes": flight.unit.payload_nbytes, "prefetch": ahead}
        self._marks.append(_Mark("copy", name, flight.start, flight.ready, args, flight.arrived))
        self._levels.append((flight.start, held_nbytes))

    def stall(self, key: str, name: str, waits: bool) -> contextlib.AbstractContextManager[object]:
        """Around the waits before component `key` reads units: the time compute waits for copies is exposed transfer.

        Args:
            waits: there is something to wait for that has not happened already.
        """
        return _Stall(self, key, name) if waits else _NO_STALL

    # ----------------------------------------------------------------- figures
    def _recent(self, track: str) -> list[_Mark]:
        """Marks of the last complete call, as far as the device has come to them."""
        found = []
        ended = 0
        for mark in reversed(self._marks):
            if mark.track == "calls":
                ended += 1
                if ended > 1:
                    break
                continue
            if mark.track == track and mark.end is not None and mark.end.query():
                found.append(mark)
        return found

    def run_ms(self) -> dict[str, float]:
        """By component key, what a pass of its last call computed, without the waits for copies."""
        ms: Counter[str] = Counter()
        passes: Counter[str] = Counter()
        for mark in self._recent("compute"):
            key = str(mark.args["component"])
            ms[key] += float(mark.start.elapsed_time(mark.end))  # type: ignore[assignment]
            passes[key] += int(mark.args.get("passes", 0))  # type: ignore[call-overload]
        for mark in self._recent("stalls"):
            ms[str(mark.args["component"])] -= float(mark.start.elapsed_time(mark.end))  # type: ignore[assignment]
        return {key: max(0.0, ms[key]) / n for key, n in passes.items() if n}

    def link_gbps(self) -> float | None:
        """What the link gave in the last call's copies from pinned memory; None: there were none."""
        nbytes, ms = 0, 0.0
        for mark in self._recent("copy")[:256]:
            nbytes += int(mark.args["nbytes"])  # type: ignore[call-overload]
            ms += float(mark.start.elapsed_time(mark.arrived or mark.end))
        return nbytes / ms / 1e6 if ms > 0 and nbytes >= (1 << 16) else None

    def unpack_ms(self) -> dict[str, dict[str, float]]:
        """By component key and unit, what turning encoded bytes into the unit took in the last call: the shortest time, since
        other kernels may run beside it."""
        found: dict[str, dict[str, float]] = {}
        for mark in self._recent("copy"):
            if mark.arrived is not None:
                unit, times = str(mark.args["unit"]), found.setdefault(str(mark.args["component"]), {})
                times[unit] = min(times.get(unit, math.inf), float(mark.arrived.elapsed_time(mark.end)))
        return found

    def timeline(self, simulated: bool) -> Timeline:
        """All kept spans in milliseconds since the first event. Waits for the device."""
        self._lanes.synchronize()
        base = self._base
        if base is None:
            return Timeline((), (), simulated, str(self._lanes.device))

        def at(event: torch.Event) -> float:
            return float(base.elapsed_time(event))

        spans = []
        for mark in self._marks:
            if mark.end is not None:
                # Not the difference of two offsets: they are single precision, and coarse hours after the base event.
                duration = max(0.0, float(mark.start.elapsed_time(mark.end)))
                spans.append(Span(mark.track, mark.name, at(mark.start), duration, mark.args))  # type: ignore[arg-type]
        levels = tuple(Level(at(event), nbytes) for event, nbytes in self._levels)
        levels = tuple(sorted(levels, key=lambda level: level.start_ms))
        return Timeline(tuple(sorted(spans, key=lambda s: s.start_ms)), levels, simulated, str(self._lanes.device))
