"""A happens-before checker: vector clocks over a recorded list of stream operations. Pure; works for any device.

A hazard is an access that a device is free to run in the wrong order, whether or not it did so this time. Operations
are listed in the order in which the host issued them. Those of one stream run in that order; between streams only
three things give an order:

- `record` an event on a stream, then `wait` for it on another: what the second stream does from there on is ordered
  after what the first had been given before the record. A wait means the event's latest record at that time.
- `host_wait` for an event: everything issued from there on, on all streams, is ordered after the record.
- `free` takes effect in the order of the stream that allocated the buffer, as in CUDA's caching allocator.

An allocation counts as a write by its stream, since kernels of that stream may still use memory given out again. The
checker of the simulated accelerator (testing/simgpu_order.h) follows the same rules on byte ranges; a differential test
holds the two against each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

OpKind = Literal["alloc", "read", "write", "record", "wait", "free", "host_wait"]
HazardKind = Literal["unordered", "freed-in-use", "use-after-free", "unrecorded-event"]


@dataclass(frozen=True)
class Op:
    """One recorded operation.

    kind: alloc, read, write and free name a `buffer`; record, wait and host_wait name an `event`.
    stream: the stream that runs it. Ignored by host_wait, and by the free of a buffer whose allocation was seen.
    buffer: a name for a whole device buffer; it may be allocated anew after a free.
    event: a number for an event; it may be recorded any number of times.
    note: what it was for; appears in messages only.
    """

    kind: OpKind
    stream: int = 0
    buffer: str | None = None
    event: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Hazard:
    """A pair of operations without an order that they need.

    kind: what is wrong:
        unordered: `op` and the earlier `other` use `buffer` on two streams, one writes, and nothing orders them;
        freed-in-use: `op` frees `buffer` before the allocating stream waits for the use `other` on another stream;
        use-after-free: `op` uses `buffer` after the free `other`, with no allocation between them;
        unrecorded-event: `op` waits for an event that was never recorded, which on a device is no wait at all.
    buffer: the buffer's name; None for an unrecorded event.
    op: the later operation. other: the earlier one; None for an unrecorded event.
    """

    kind: HazardKind
    buffer: str | None
    op: Op
    other: Op | None

    def __str__(self) -> str:
        op, other = self.op, self.other
        if other is None:
            waiter = "the host" if op.kind == "host_wait" else f"stream {op.stream}"
            return f"{waiter} waits for event {op.event}, which was never recorded{_note(op)}"
        if self.kind == "freed-in-use":
            return (
                f"{self.buffer!r} is freed{_note(op)} before the stream that allocated it waits for its "
                f"{other.kind} on stream {other.stream}{_note(other)}"
            )
        if self.kind == "use-after-free":
            return f"{_use(op)} comes after it was freed{_note(other)}"
        return f"{_use(op)} is not ordered after its {other.kind} on stream {other.stream}{_note(other)}"


def _use(op: Op) -> str:
    return f"{op.kind} of {op.buffer!r} on stream {op.stream}{_note(op)}"


def _note(op: Op) -> str:
    return f" ({op.note})" if op.note else ""


Clock = dict[int, int]  # stream -> how many of its operations are known to be over


@dataclass
class _Access:
    op: Op
    tick: int  # its number on its stream


@dataclass
class _Buffer:
    """A live buffer and the accesses that a later one can still conflict with.

    One write and one read per stream suffice: an access ordered after the last write is ordered after all that this
    write was itself checked against, and where that check failed, a hazard has been reported already.
    """

    owner: int | None  # the allocating stream; None when its allocation was not seen
    write: _Access | None = None
    reads: dict[int, _Access] = field(default_factory=dict)

    def accesses(self) -> list[_Access]:
        return [*([self.write] if self.write else []), *self.reads.values()]


class HazardChecker:
    """Finds hazards as operations are fed to it, each with work proportional to the number of streams.

    Memory: a few clocks per distinct stream, event number and buffer name, however many operations are fed. A program
    that numbers its events without end calls `forget_event` when it destroys one.
    """

    def __init__(self) -> None:
        self._ticks: Clock = {}  # operations issued so far
        self._known: dict[int, Clock] = {}  # per stream: what its next operation is ordered after
        self._host: Clock = {}  # what the host has waited for
        self._events: dict[int, Clock] = {}  # what an event's latest record stands for
        self._buffers: dict[str, _Buffer] = {}
        self._freed: dict[str, Op] = {}  # names freed and not allocated since

    def feed(self, op: Op) -> list[Hazard]:
        """Take the next operation in and return the hazards that it completes; usually none.

        A buffer that is used without having been allocated is taken to have existed, unused, from the start.
        Raises ValueError, and changes nothing, when `op` lacks the buffer or event that its kind needs, is of no known
        kind, or allocates a buffer that is live.
        """
        match op.kind:
            case "record" | "wait" | "host_wait":
                if op.event is None:
                    raise ValueError(f"{op} names no event")
                return self._synchronise(op, op.event)
            case "alloc" | "read" | "write" | "free":
                if op.buffer is None:
                    raise ValueError(f"{op} names no buffer")
                if op.kind == "alloc":
                    return self._alloc(op, op.buffer)
                if (free := self._freed.get(op.buffer)) is not None:
                    return [Hazard("use-after-free", op.buffer, op, free)]
                return self._free(op, op.buffer) if op.kind == "free" else self._access(op, op.buffer)
        raise ValueError(f"{op} is of no known kind")

    def forget_event(self, event: int) -> None:
        """Drop what is kept for a destroyed event. Waiting for this number is a hazard until it is recorded anew."""
        self._events.pop(event, None)

    def forget_buffer(self, buffer: str) -> None:
        """Drop what is kept for a buffer that lives on unwatched. Its name is as if it had never been used."""
        self._buffers.pop(buffer, None)
        self._freed.pop(buffer, None)

    def _clock(self, stream: int) -> Clock:
        """What the stream's next operation is ordered after, its own earlier ones included. Callers may mutate it."""
        clock = self._known.setdefault(stream, {})
        _merge(clock, self._host)
        clock[stream] = self._ticks.get(stream, 0)
        return clock

    def _tick(self, op: Op) -> _Access:
        tick = self._ticks[op.stream] = self._ticks.get(op.stream, 0) + 1
        return _Access(op, tick)

    def _synchronise(self, op: Op, event: int) -> list[Hazard]:
        if op.kind == "record":
            self._events[event] = dict(self._clock(op.stream))
            return []
        if (recorded := self._events.get(event)) is None:
            return [Hazard("unrecorded-event", None, op, None)]
        _merge(self._host if op.kind == "host_wait" else self._clock(op.stream), recorded)
        return []

    def _alloc(self, op: Op, name: str) -> list[Hazard]:
        if name in self._buffers:
            raise ValueError(f"{op} allocates a buffer that is live; its free is missing")
        self._freed.pop(name, None)
        self._buffers[name] = _Buffer(op.stream, self._tick(op))
        return []

    def _access(self, op: Op, name: str) -> list[Hazard]:
        buffer = self._buffers.setdefault(name, _Buffer(None))
        conflicting = buffer.accesses() if op.kind == "write" else [buffer.write] if buffer.write else []
        clock = self._clock(op.stream)
        hazards = [Hazard("unordered", name, op, access.op) for access in conflicting if not _after(clock, access)]
        access = self._tick(op)
        if op.kind == "write":
            buffer.write = access
            buffer.reads.clear()
        else:
            buffer.reads[op.stream] = access
        return hazards

    def _free(self, op: Op, name: str) -> list[Hazard]:
        buffer = self._buffers.pop(name, _Buffer(None))
        self._freed[name] = op
        clock = self._clock(op.stream if buffer.owner is None else buffer.owner)
        return [
            Hazard("freed-in-use", name, op, access.op) for access in buffer.accesses() if not _after(clock, access)
        ]


def _merge(into: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        if tick > into.get(stream, 0):
            into[stream] = tick


def _after(clock: Clock, access: _Access) -> bool:
    """Is what has this clock ordered after the access?"""
    return clock.get(access.op.stream, 0) >= access.tick


def check(ops: Iterable[Op]) -> list[Hazard]:
    """All hazards of a program, in the order of their later operations. Raises ValueError as `HazardChecker.feed`."""
    checker = HazardChecker()
    return [hazard for op in ops for hazard in checker.feed(op)]
