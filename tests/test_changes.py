"""What holds the engine together: the lock of a change, and the mark that an interrupted one leaves."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import pytest
import torch
from interrupts import Interrupts, some
from test_adoption_faults import UNITS, assert_consistent, build

from prefetch_offload.holdings import _collected


def is_free(lock: Any) -> bool:
    """Another thread can have it."""
    found: list[bool] = []

    def take() -> None:
        found.append(lock.acquire(timeout=2))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("ending", [None, torch.OutOfMemoryError, RuntimeError])
def test_an_interrupt_at_the_edges_of_a_change_leaves_the_lock_free(
    ending: Any, sim: Any, enable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    offload = enable(pipe, **UNITS)
    expected = pipe(x, 2)
    engine = offload._engine
    repairs: list[int] = []
    recover = engine._recover
    monkeypatch.setattr(engine, "_recover", lambda: (repairs.append(1), recover()))

    def change(within: Any = lambda: None) -> None:
        with engine._held(), engine._change, engine._held(), engine._change:
            within()

    def end() -> None:
        if ending is not None:
            raise ending("it ends so")

    def run() -> None:
        try:
            change(end)
        except (torch.OutOfMemoryError, RuntimeError):
            pass

    def interrupt() -> None:
        raise KeyboardInterrupt

    interrupts = Interrupts("__enter__", "__exit__", "_held")
    interrupts.lines(run)
    places = len(interrupts.seen)
    assert places > 20
    for place in range(places):
        change()  # whatever there is to repair
        assert not engine._dirty
        assert interrupts.at(place, run)
        assert is_free(engine.lock), interrupts.last
        # and the books are right: what is interrupted now is repaired by the next, once
        with pytest.raises(KeyboardInterrupt):
            change(interrupt)
        assert is_free(engine.lock), interrupts.last
        assert engine._dirty
        repairs.clear()
        change()
        assert repairs == [1] and not engine._dirty, interrupts.last
        if place % 5 == 0:
            assert torch.equal(pipe(x, 2), expected)
            assert_consistent(offload)


def test_an_interrupt_at_the_edges_of_a_call_leaves_none_in_progress(sim: Any, enable: Any) -> None:
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    pipe = build()
    offload = enable(pipe, **UNITS)
    expected = pipe(x, 2)
    interrupts = Interrupts("calling", "start_call", "leave_call")
    places = interrupts.lines(lambda: pipe(x, 2))
    assert len(places) > 200
    for place in some(places, 4):
        interrupts.at(place, lambda: pipe(x, 2))
        assert offload._session.client.calling == 0, interrupts.last
        offload.budget = None  # refused while a call is in progress
        if place % 5 == 0:
            assert torch.equal(pipe(x, 2), expected), interrupts.last
    assert torch.equal(pipe(x, 2), expected)
    assert_consistent(offload)


def test_an_interrupt_while_a_component_is_collected_leaves_the_lock_free(sim: Any, enable: Any) -> None:
    offload = enable(build(), **UNITS)
    engine = offload._engine
    interrupts = Interrupts("_collected")
    lines, first = inspect.getsourcelines(_collected)
    last = first + next(i for i, line in enumerate(lines) if "finally:" in line)  # behind it no interrupt can come

    def collect() -> None:
        _collected(weakref.ref(engine), "nobody")

    interrupts.lines(collect)
    places = len(interrupts.seen)
    assert places > 10
    for place in range(places):
        assert interrupts.at(place, collect)
        if interrupts.last[1] > last:
            engine.lock.release()
        assert is_free(engine.lock), interrupts.last
        with engine._held(), engine._change:  # repairs
            engine._graveyard.clear()
    collect()
    assert engine._graveyard == []
    with engine._held(), engine._change:
        collect()
        assert engine._graveyard == ["nobody"]
    assert engine._graveyard == []
