"""The happens-before checker: each hazard beside its ordered twin, an oracle, and the simulator's checker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefetch_offload import testing
from prefetch_offload.hazards import Hazard, HazardChecker, Op, check

# -------------------------------------------------------------------------------------------------- a terse vocabulary


def program(text: str) -> list[Op]:
    """One operation a word: `write:b@1` and `record:7@1` on stream 1, `host_wait:7`. Its position becomes its note."""
    ops = []
    for i, word in enumerate(text.split()):
        kind, _, rest = word.partition(":")
        name, _, stream = rest.partition("@")
        where = {"event": int(name)} if name.isdigit() else {"buffer": name}
        ops.append(Op(kind, int(stream or 0), note=str(i), **where))  # type: ignore[arg-type]
    return ops


def found(text: str) -> list[tuple[str, int, int | None]]:
    """The hazards of a program: kind, position of the later and of the earlier operation."""
    return [(h.kind, int(h.op.note), int(h.other.note) if h.other else None) for h in check(program(text))]


# ---------------------------------------------------------------------------------------------------------- unit cases

PREFETCH = "alloc:w@0 record:1@0 wait:1@1 write:w@1 record:2@1 "  # allocated on 0, copied in on 1


@pytest.mark.parametrize(
    ("text", "hazards"),
    [
        ("", []),
        ("alloc:w@0 write:w@0 read:w@0 free:w@0 alloc:w@0 read:w@0", []),
        # read after write, write after read, write after write, each on another stream
        (PREFETCH + "wait:2@0 read:w@0", []),
        (PREFETCH + "read:w@0", [("unordered", 5, 3)]),
        (PREFETCH + "wait:1@0 read:w@0", [("unordered", 6, 3)]),
        (PREFETCH + "wait:2@0 read:w@0 record:3@0 wait:3@1 write:w@1", []),
        (PREFETCH + "wait:2@0 read:w@0 write:w@1", [("unordered", 7, 6)]),
        (PREFETCH + "write:w@0", [("unordered", 5, 3)]),
        # reads do not conflict
        (PREFETCH + "wait:2@0 read:w@0 read:w@1 wait:2@2 read:w@2", []),
        # an allocation is a write
        ("alloc:w@0 write:w@1", [("unordered", 1, 0)]),
        ("record:1@0 alloc:w@0 wait:1@1 write:w@1", [("unordered", 3, 1)]),
        ("alloc:w@0 record:1@0 wait:1@1 write:w@1", []),
        # the order is transitive, over a stream that uses nothing
        ("alloc:w@0 record:1@0 wait:1@2 record:2@2 wait:2@1 write:w@1", []),
        # a wait means the latest record so far, not a later one
        ("record:1@0 wait:1@1 alloc:w@0 record:1@0 write:w@1", [("unordered", 4, 2)]),
        ("record:1@0 alloc:w@0 record:1@0 wait:1@1 write:w@1", []),
        # an older event takes nothing away from what a newer one gave
        ("record:1@0 alloc:w@0 record:2@0 wait:2@1 wait:1@1 write:w@1", []),
        ("record:1@0 alloc:w@0 record:2@0 host_wait:2 host_wait:1 write:w@1", []),
        # the host's wait orders what follows on all streams, not what is pending
        (PREFETCH + "host_wait:2 read:w@0 read:w@2", []),
        (PREFETCH + "host_wait:1 read:w@0", [("unordered", 6, 3)]),
        # free: in the order of the allocating stream, whichever stream is current
        (PREFETCH + "wait:2@0 free:w@1", []),
        (PREFETCH + "free:w@1", [("freed-in-use", 5, 3)]),
        (PREFETCH + "host_wait:2 free:w@0", []),
        (PREFETCH + "wait:2@0 read:w@0 wait:2@2 read:w@2 free:w@0", [("freed-in-use", 9, 8)]),
        (PREFETCH + "wait:2@0 read:w@0 wait:2@2 read:w@2 record:3@2 wait:3@0 free:w@0", []),
        # use after free, until it is allocated anew, possibly by another stream
        ("alloc:w@0 free:w@0 read:w@0", [("use-after-free", 2, 1)]),
        ("alloc:w@0 free:w@0 free:w@0", [("use-after-free", 2, 1)]),
        ("alloc:w@0 free:w@0 alloc:w@1 read:w@1 free:w@1", []),
        ("alloc:w@0 free:w@0 alloc:w@1 read:w@0", [("unordered", 3, 2)]),
        # an event nobody recorded
        ("wait:5@1", [("unrecorded-event", 0, None)]),
        ("host_wait:5", [("unrecorded-event", 0, None)]),
        ("record:5@0 wait:5@1 host_wait:5", []),
        # what was there before the recording began
        ("read:w@1 read:w@0", []),
        ("read:w@1 write:w@0", [("unordered", 1, 0)]),
        ("read:w@1 free:w@0", [("freed-in-use", 1, 0)]),
        ("read:w@0 free:w@0", []),
        # every hazard of an operation is named
        (
            "alloc:w@0 record:1@0 wait:1@1 wait:1@2 read:w@1 read:w@2 write:w@0",
            [("unordered", 6, 4), ("unordered", 6, 5)],
        ),
        # buffers do not touch each other
        ("alloc:a@0 alloc:b@1 write:a@0 write:b@1", []),
    ],
)
def test_case(text: str, hazards: list[tuple[str, int, int | None]]) -> None:
    assert found(text) == hazards


def test_the_checker_is_incremental() -> None:
    *before, last = program(PREFETCH + "read:w@0")
    checker = HazardChecker()
    assert all(checker.feed(op) == [] for op in before)
    (hazard,) = checker.feed(last)
    assert hazard == Hazard("unordered", "w", last, before[3])


def test_sentences() -> None:
    copy, use = Op("write", 1, "w", note="prefetch unet.3"), Op("read", 0, "w", note="unet")
    free = Op("free", 0, "w")
    assert [str(hazard) for hazard in check([copy, use, Op("free", 0, "w"), use, Op("wait", 1, event=4)])] == [
        "read of 'w' on stream 0 (unet) is not ordered after its write on stream 1 (prefetch unet.3)",
        "'w' is freed before the stream that allocated it waits for its write on stream 1 (prefetch unet.3)",
        "read of 'w' on stream 0 (unet) comes after it was freed",
        "stream 1 waits for event 4, which was never recorded",
    ]
    assert str(Hazard("use-after-free", "w", free, free)) == "free of 'w' on stream 0 comes after it was freed"
    assert (
        str(*check([Op("host_wait", event=4, note="sync")]))
        == "the host waits for event 4, which was never recorded (sync)"
    )


@pytest.mark.parametrize(
    "op", [Op("read"), Op("alloc", event=1), Op("wait", buffer="w"), Op("copy", buffer="w"), Op("alloc", 1, "live")]
)
def test_a_malformed_operation_changes_nothing(op: Op) -> None:
    checker = HazardChecker()
    ops = program("alloc:live@0 record:1@0")
    assert not [hazard for known in ops for hazard in checker.feed(known)]
    with pytest.raises(ValueError, match="Op\\("):
        checker.feed(op)
    assert checker.feed(Op("write", 0, "live")) == []


def size(thing: Any) -> int:
    """Number of objects held, at any depth."""
    if isinstance(thing, dict):
        return sum(size(key) + size(value) for key, value in thing.items())
    return 1 + (size(vars(thing)) if hasattr(thing, "__dict__") and not isinstance(thing, Op) else 0)


def test_memory_stays_bounded() -> None:
    checker = HazardChecker()
    step = program(PREFETCH + "wait:2@0 read:w@0 read:w@1 record:3@0 wait:3@1 record:4@1 wait:4@0 free:w@0")
    sizes = []
    for _ in range(50):
        assert not [hazard for op in step for hazard in checker.feed(op)]
        sizes.append(size(checker))
    assert sizes[1] == sizes[-1]


def test_events_without_end_can_be_forgotten() -> None:
    checker = HazardChecker()
    sizes = []
    for event in range(50):
        checker.feed(Op("record", 0, event=event))
        assert checker.feed(Op("wait", 1, event=event)) == []
        checker.forget_event(event)
        checker.forget_event(event)
        sizes.append(size(checker))
    assert sizes[1] == sizes[-1]
    assert checker.feed(Op("wait", 1, event=0))[0].kind == "unrecorded-event"


# ------------------------------------------------------------------------------------------------------------ an oracle
# Builds the happens-before graph with one node per operation, closes it, and compares every pair.


def oracle(ops: list[Op]) -> set[tuple[str, int, int | None]]:
    n = len(ops)
    before = [[False] * n for _ in ops]
    latest: dict[int, int] = {}
    owner: dict[str, int] = {}
    life = dict.fromkeys((op.buffer for op in ops), 0)  # how often its name has been allocated
    lives: list[int] = []
    stream: list[int | None] = []  # on which stream a node lies; the host's lie on none
    hazards: set[tuple[str, int, int | None]] = set()
    freed: dict[str, int] = {}
    host_waits: list[int] = []
    for j, op in enumerate(ops):
        if op.buffer is not None:
            if op.kind == "alloc":
                life[op.buffer] += 1
                owner[op.buffer] = op.stream
                freed.pop(op.buffer, None)
            elif op.buffer in freed:
                hazards.add(("use-after-free", j, freed[op.buffer]))
            elif op.kind == "free":
                freed[op.buffer] = j
        lives.append(life[op.buffer])
        stream.append(
            None
            if op.kind == "host_wait"
            else owner.get(op.buffer or "", op.stream)
            if op.kind == "free"
            else op.stream
        )
        for i in range(j):
            before[i][j] |= stream[i] == stream[j] is not None
        for i in host_waits:
            before[i][j] = True
        if op.kind == "record" and op.event is not None:
            latest[op.event] = j
        elif op.kind in ("wait", "host_wait") and op.event is not None:
            if op.event in latest:
                before[latest[op.event]][j] = True
                host_waits += [j] if op.kind == "host_wait" else []
            else:
                hazards.add(("unrecorded-event", j, None))
    for k, i, j in product(range(n), repeat=3):
        before[i][j] |= before[i][k] and before[k][j]
    after_free = {j for kind, j, _ in hazards if kind == "use-after-free"}
    for i, j in product(range(n), repeat=2):
        a, b = ops[i], ops[j]
        uses = a.kind in ("alloc", "read", "write") and b.kind in ("read", "write", "free")
        same = a.buffer == b.buffer and lives[i] == lives[j] and i < j and not {i, j} & after_free
        if uses and same and not before[i][j] and not a.kind == b.kind == "read":
            hazards.add(("freed-in-use" if b.kind == "free" else "unordered", j, i))
    return hazards


STREAMS = st.integers(0, 2)
BUFFERS = st.sampled_from("ab")
EVENTS = st.integers(0, 2)
OPS = st.one_of(
    st.builds(Op, st.sampled_from(["alloc", "read", "write", "read", "write", "free"]), STREAMS, buffer=BUFFERS),
    st.builds(Op, st.sampled_from(["record", "wait", "record", "wait", "host_wait"]), STREAMS, event=EVENTS),
)


@st.composite
def programs(draw: st.DrawFn) -> list[Op]:
    """Any operations in any order, less the allocations of what is live."""
    ops: list[Op] = []
    used: set[str | None] = set()
    for op in draw(st.lists(OPS, max_size=24)):
        if op.kind == "alloc" and op.buffer in used:
            continue
        (used.discard if op.kind == "free" else used.add)(op.buffer)
        ops.append(Op(op.kind, op.stream, op.buffer, op.event, note=str(len(ops))))
    return ops


@given(programs())
@settings(max_examples=500, deadline=None)
def test_agrees_with_the_oracle(ops: list[Op]) -> None:
    hazards = {(h.kind, int(h.op.note), int(h.other.note) if h.other else None) for h in check(ops)}
    true = oracle(ops)
    assert bool(hazards) == bool(true)
    assert hazards <= true, "a false alarm"
    first = min((j for _, j, _ in true), default=None)
    assert min((j for _, j, _ in hazards), default=None) == first, "noticed late"


@given(programs())
@settings(max_examples=100, deadline=None)
def test_more_order_never_adds_a_hazard(ops: list[Op]) -> None:
    """A host that waits for everything before each operation leaves nothing unordered."""
    event = 99
    synchronised = [
        op
        for next_op in ops
        for op in [
            *(o for s in range(3) for o in (Op("record", s, event=event), Op("host_wait", event=event))),
            next_op,
        ]
    ]
    assert not [h for h in check(synchronised) if h.kind in ("unordered", "freed-in-use")]


# --------------------------------------------------------------------------------------- against the simulated device


@st.composite
def device_programs(draw: st.DrawFn) -> list[Op]:
    """Programs that a device can run: live buffers only, and waits for recorded events only."""
    ops: list[Op] = []
    live: set[str] = set()
    recorded: set[int] = set()
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=8, max_size=24)):
        stream = draw(STREAMS)
        if kind == "alloc" and (dead := sorted({"a", "b"} - live)):
            live.add(name := draw(st.sampled_from(dead)))
            ops.append(Op("alloc", stream, name))
        elif kind in ("read", "write", "free") and live:
            name = draw(st.sampled_from(sorted(live)))
            live -= {name} if kind == "free" else set()
            ops.append(Op(kind, stream, name))
        elif kind == "record":
            recorded.add(event := draw(EVENTS))
            ops.append(Op("record", stream, event=event))
        elif kind in ("wait", "host_wait") and recorded:
            ops.append(Op(kind, stream, event=draw(st.sampled_from(sorted(recorded)))))
    return ops


KINDS: list[Any] = ["alloc", "alloc", "read", "write", "record", "record", "wait", "wait", "host_wait", "free"]


def run_on(ext: Any, ops: list[Op], paced: bool) -> list[str]:
    """Run a program on the simulated device and return what its checker says. Mutates the device's counters."""
    ext.drain()
    ext.reset()
    ext.configure(-1, 0.1 if paced else 0, 0, 0)
    source = torch.ones(1 << 14).pin_memory()
    streams = [torch.accelerator.current_stream(), *(torch.Stream(device="simgpu") for _ in range(2))]
    buffers: dict[str | None, torch.Tensor] = {}
    events: dict[int | None, torch.Event] = {}
    for op in ops:
        with streams[op.stream]:
            match op.kind:
                case "alloc":
                    buffers[op.buffer] = torch.empty(1 << 14, device="simgpu")
                case "write":
                    buffers[op.buffer].copy_(source, non_blocking=True)
                case "read":
                    buffers[op.buffer].sum()
                case "free":
                    del buffers[op.buffer]
                case "record":
                    events.setdefault(op.event, torch.Event(device="simgpu")).record()
                case "wait":
                    streams[op.stream].wait_event(events[op.event])
                case "host_wait":
                    events[op.event].synchronize()
    ext.drain()
    messages: list[str] = ext.hazards()
    buffers.clear()
    ext.configure(-1, 0, 0, 0)
    ext.reset()
    return messages


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    ext = testing.load()
    yield ext
    gc.collect()
    ext.drain()
    ext.reset()


@pytest.mark.parametrize("paced", [False, True], ids=["unpaced", "paced"])
def test_agrees_with_the_simulator(simulator: Any, paced: bool) -> None:
    verdicts = []

    @given(device_programs())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def agree(ops: list[Op]) -> None:
        hazards, messages = check(ops), run_on(simulator, ops, paced)
        assert bool(hazards) == bool(messages), (hazards, messages)
        for kind, phrase in (("freed-in-use", "freed while in use"), ("unordered", "not ordered after")):
            if hazards and hazards[0].kind == kind:
                assert any(phrase in message for message in messages), (hazards, messages)
        verdicts.append(bool(hazards))

    agree()
    assert 0.05 < sum(verdicts) / len(verdicts) < 0.95, "the programs are all alike"


@pytest.mark.parametrize(
    "text", [PREFETCH + "wait:2@0 read:w@0 record:3@0 wait:3@1 write:w@1 record:4@1 wait:4@0 free:w@0"]
)
def test_both_miss_each_wait(simulator: Any, text: str) -> None:
    """The mutation check in small: without any one of its waits, both checkers object to an ordered program."""
    ops = program(text)
    assert check(ops) == run_on(simulator, ops, paced=False) == []
    for op in ops:
        if op.kind == "wait":
            mutant = [other for other in ops if other is not op]
            assert check(mutant), op
            assert run_on(simulator, mutant, paced=False), op
