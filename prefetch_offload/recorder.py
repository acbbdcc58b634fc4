"""What happened on the device: events while it runs, spans and figures when someone asks."""

from __future__ import annotations

import contextlib
import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from .device import Lanes
from .trace import Level, Span, Timeline, total_ms

if TYPE_CHECKING:
    from .transport import Flight

# Spans kept, each with its two or three events: a call of full-size Flux within 8 GiB, 28 steps, makes 9,300. Older ones leave
# the trace; totals and the figures of the last call keep counting.
KEPT = 16384

# (start, end) in milliseconds since a call began.
Times = list[tuple[float, float]]


@dataclass(slots=True)
class Figures:
    """What one component did in one call, and since its pipeline's call before that: copies for a call may begin when the one
    before it ends.

    Attributes:
        began: when the call did; None: it has not, or the component came later.
        hits, misses: see `Recorder.met`.
        passes: how often it was called.
        left: by track, (start, end, start, end, ...) of spans that are kept no more, in milliseconds since `began`.
        over: nobody asks any more.
    """

    began: torch.Event | None = None
    hits: int = 0
    misses: int = 0
    passes: int = 0
    left: dict[str, array[float]] = field(default_factory=dict)
    over: bool = False

    def add(self, mark: _Mark) -> None:
        """`mark`, which has happened, is kept no more."""
        self.left.setdefault(mark.track, array("d")).extend(mark.since(self.began))

    def times(self, track: str, event: torch.Event | None) -> Times:
        """Those of `left`, in milliseconds since `event`."""
        left = self.left.get(track, ())
        if not left or event is None or self.began is None or event is self.began:
            return list(zip(left[::2], left[1::2], strict=True))
        shift = float(event.elapsed_time(self.began))
        return [(start + shift, end + shift) for start, end in zip(left[::2], left[1::2], strict=True)]


class Call(NamedTuple):
    """A complete call of `client`.

    Attributes:
        mark: None: components ran by themselves.
        figures: by component key, what they did.
        before: the same of the complete call before it: copies that it began for this one may have come in this one.
    """

    client: int
    mark: _Mark | None
    figures: Mapping[str, Figures]
    before: Mapping[str, Figures]


@dataclass
class ComponentTotals:
    """What one component cost since recording began. Bytes and counts; times come from the spans."""

    entries: int = 0
    hits: int = 0  # see `Recorder.met`
    misses: int = 0
    h2d_nbytes: int = 0
    call: Figures = field(default_factory=Figures)  # of the call that is in progress, or the next one


@dataclass(slots=True)
class _Mark:
    track: str
    name: str
    start: torch.Event
    end: torch.Event | None
    args: dict[str, object] = field(default_factory=dict)
    ready: torch.Event | None = None  # of a unit that travels encoded: behind what turns it, once copied, into the unit
    call: Figures | None = None  # what it counts for

    def since(self, event: torch.Event | None) -> tuple[float, float]:
        """Start and end in milliseconds since `event`; None: it was over by then."""
        duration = self.duration_ms()
        start = float(event.elapsed_time(self.start)) if event is not None else -duration
        return start, start + duration

    def happened(self) -> bool:
        # A run may end on the stream of whoever enters next, which need not have waited for where it began.
        over = self.end is not None and self.end.query() and self.start.query()
        return over and (self.ready is None or self.ready.query())

    def duration_ms(self) -> float:
        # Not the difference of two offsets: they are single precision, and coarse hours after the base event.
        return max(0.0, float(self.start.elapsed_time(self.end)))


_NO_STALL = contextlib.nullcontext()


class _Stall:
    """See `Recorder.stall`."""

    def __init__(self, recorder: Recorder, key: str, name: str) -> None:
        call = recorder.of(key).call
        self._recorder, self._mark = recorder, _Mark("stalls", name, recorder._now(), None, {"component": key}, None, call)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._mark.end = self._recorder._now()
            self._recorder._keep(self._mark)


class Recorder:
    """Records spans by timing events on the streams; resolving them waits for the device, so only `timeline` does.

    Attributes:
        counts: how often something noteworthy happened (``ladder``, ``prefetch refused``, ``cache given back``).
        totals: by component key.
        dropped: spans that are kept no more.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.counts: Counter[str] = Counter()
        self.totals: dict[str, ComponentTotals] = {}
        self.owner: dict[str, tuple[str, str]] = {}  # unit key -> its component's key and name
        self.dropped = 0
        self._marks: deque[_Mark] = deque()
        self._levels: deque[tuple[torch.Event, int]] = deque(maxlen=KEPT)
        self._run: _Mark | None = None
        self._begun: dict[int, _Mark] = {}  # calls in progress, by client
        self._base: torch.Event | None = None
        self.host_base = time.perf_counter()

    def _now(self) -> torch.Event:
        event = self._lanes.record(self._lanes.compute())
        if self._base is None:
            self._base = event
            self.host_base = time.perf_counter()
        return event

    def _keep(self, mark: _Mark) -> None:
        """The oldest one leaves for it, unless the device has not come so far."""
        marks = self._marks
        marks.append(mark)
        for _ in range(2):  # one more than comes: what had to wait for the device goes, too
            if len(marks) <= KEPT or not marks[0].happened():
                return
            oldest = marks.popleft()
            self.dropped += 1
            if oldest.call is not None and not oldest.call.over:
                oldest.call.add(oldest)

    # ------------------------------------------------------------------ events
    def passed(self) -> None:
        """What runs begins a pass."""
        if self._run is not None:
            self._run.args["passes"] = int(self._run.args.get("passes", 0)) + 1  # type: ignore[call-overload]
            if self._run.call is not None:
                self._run.call.passes += 1

    def count(self, what: str, times: int = 1) -> None:
        self.counts[what] += times

    def call_started(self, name: str, client: int, components: Iterable[str]) -> None:
        """A call of `client` begins, which has these components."""
        now = self._now()
        self._begun[client] = _Mark("calls", name, now, None, {"client": client})
        for key in components:
            self.of(key).call.began = now

    def call_ended(self, client: int, components: Iterable[str], failed: bool, last: Call | None) -> Call | None:
        """The call of `client` is over. Returns what its components did, or `last`, the call before, if this one is no measure
        of the next: it failed, or components ran by themselves."""
        self.left()
        mark = self._begun.pop(client, None)
        if mark is not None:
            mark.end = self._now()
            mark.args["failed"] = failed
            self._keep(mark)
        figures = {key: self.of(key).call for key in components}
        for key in figures:
            self.totals[key].call = Figures()
        stays = failed or (mark is None and last is not None)
        for gone in (figures if stays else last.before if last is not None else {}).values():
            gone.over = True
        return last if stays else Call(client, mark, figures, last.figures if last is not None else {})

    def entered(self, key: str, name: str, held_nbytes: int) -> None:
        """Component `key`, called `name`, runs from now on; weights take `held_nbytes` on the device."""
        self.left()
        now, totals = self._now(), self.of(key)
        self._run = _Mark("compute", name, now, None, {"component": key}, None, totals.call)
        self._levels.append((now, held_nbytes))
        totals.entries += 1

    def left(self) -> None:
        """What ran last does so no more: another component is being entered, or the call is over."""
        if self._run is not None:
            self._run.end = self._now()
            self._keep(self._run)
            self._run = None

    def of(self, key: str) -> ComponentTotals:
        """The totals of component `key`."""
        totals = self.totals.get(key)
        if totals is None:
            totals = self.totals[key] = ComponentTotals()
        return totals

    def met(self, key: str, hits: int, misses: int) -> None:
        """So many units of component `key` were there or on their way when they were needed, and so many were not.

        A unit is needed when its component is entered, if that is to hold it then; later, when it is read for the first
        time since it left.
        """
        totals = self.of(key)
        totals.hits += hits
        totals.misses += misses
        totals.call.hits += hits
        totals.call.misses += misses

    def copied(self, flight: Flight, ahead: bool, held_nbytes: int) -> None:
        """A unit's copy was enqueued, `ahead` of use or because it is needed now; weights take `held_nbytes` then."""
        key, name = self.owner[flight.unit.key]
        totals = self.of(key)
        totals.h2d_nbytes += flight.unit.payload_nbytes
        args = {"component": key, "unit": flight.unit.key, "nbytes": flight.unit.payload_nbytes, "prefetch": ahead}
        ready = flight.ready if flight.arrived is not None else None
        self._keep(_Mark("copy", name, flight.start, flight.arrived or flight.ready, args, ready, totals.call))
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
            if mark.track == track and mark.happened():
                found.append(mark)
        return found

    def times(self, call: Call, *tracks: str, before: bool = False) -> dict[str, dict[str, Times] | None]:
        """By component key and track, the spans of `call`, those included that are kept no more; None: the device has not come
        to their end, or to the beginning of the call.

        Args:
            call: the last one of its client.
            before: those of the call before instead.
        """
        found: dict[str, dict[str, Times] | None] = {}
        keys: dict[int, str] = {}
        began = call.mark.start if call.mark is not None else None
        for key, figures in (call.before if before else call.figures).items():
            keys[id(figures)] = key
            begun = began is None or began.query()
            found[key] = {track: figures.times(track, began) for track in tracks} if begun else None
        ended = 0
        for mark in reversed(self._marks):
            if mark.track == "calls" and (ended or mark is call.mark) and mark.args["client"] == call.client:
                ended += 1
                if ended > 1 + before:
                    break  # what is older was for calls before
            key = keys.get(id(mark.call))
            if key is None or mark.track not in tracks:
                continue
            mine = found[key]
            if not mark.happened():
                found[key] = None
            elif mine is not None:
                mine[mark.track].append(mark.since(began))
        return found

    def run_ms(self, call: Call) -> dict[str, float]:
        """By component key, what a pass of it computed in `call`, without the waits for copies."""
        ms: dict[str, float] = {}
        for key, times in self.times(call, "compute", "stalls").items():
            passes = call.figures[key].passes
            if times is not None and passes:
                ms[key] = max(0.0, total_ms(times["compute"]) - total_ms(times["stalls"])) / passes
        return ms

    def link_gbps(self) -> float | None:
        """What the link gave in the last call's copies from pinned memory; None: there were none."""
        nbytes, ms = 0, 0.0
        for mark in self._recent("copy")[:256]:
            nbytes += int(mark.args["nbytes"])  # type: ignore[call-overload]
            ms += mark.duration_ms()
        return nbytes / ms / 1e6 if ms > 0 and nbytes >= (1 << 16) else None

    def unpack_ms(self) -> dict[str, dict[str, float]]:
        """By component key and unit, what turning encoded bytes into the unit took in the last call: the shortest time, since
        other kernels may run beside it."""
        found: dict[str, dict[str, float]] = {}
        for mark in self._recent("copy"):
            if mark.ready is not None and mark.end is not None:
                unit, times = str(mark.args["unit"]), found.setdefault(str(mark.args["component"]), {})
                times[unit] = min(times.get(unit, math.inf), float(mark.end.elapsed_time(mark.ready)))
        return found

    def timeline(self, simulated: bool) -> Timeline:
        """All kept spans in milliseconds since the first event. Waits for the device."""
        self._lanes.synchronize()
        base = self._base
        if base is None:
            return Timeline((), (), simulated, str(self._lanes.device), self.dropped)

        def at(event: torch.Event) -> float:
            return float(base.elapsed_time(event))

        spans = []
        for mark in self._marks:
            if mark.end is not None:
                args = mark.args
                if mark.ready is not None:
                    args = {**args, "cast_ms": float(mark.end.elapsed_time(mark.ready))}
                spans.append(Span(mark.track, mark.name, at(mark.start), mark.duration_ms(), args))  # type: ignore[arg-type]
        levels = tuple(Level(at(event), nbytes) for event, nbytes in self._levels)
        levels = tuple(sorted(levels, key=lambda level: level.start_ms))
        ordered = tuple(sorted(spans, key=lambda s: s.start_ms))
        return Timeline(ordered, levels, simulated, str(self._lanes.device), self.dropped)
