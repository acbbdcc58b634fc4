"""KeyboardInterrupt between any two lines of chosen functions of the package and of all that they call in it, and between
their calls and their first lines. Not between a with block of a stream or a lock and its exit, where Python itself never raises
it."""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import prefetch_offload

THOROUGH = False  # pytest's --thorough
PACKAGE = str(Path(prefetch_offload.__file__).parent)
Line = tuple[str, int]


def some(places: Sequence[int], every: int, first: int = 0) -> Sequence[int]:
    """Every so many of the places, beginning with the one of number `first`; with ``--thorough`` all of them."""
    return places if THOROUGH else places[first::every]


def spots(lines: list[Line]) -> list[int]:
    """Where each line ran first, and last."""
    first = {line: n for n, line in reversed(list(enumerate(lines)))}
    last = {line: n for n, line in enumerate(lines)}
    return sorted({*first.values(), *last.values()})


# What ends in these, as the last item of a with statement, has an ``__exit__`` that is no Python code.
_NO_PYTHON = ("lanes.copy", "lanes.cast", ".lock", "_lock", ".turn")


@cache
def _blocks(path: str) -> frozenset[int]:
    """Lines of the with statements that make one of the engine's streams current, or take a lock."""
    blocks = (node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.With))
    return frozenset(block.lineno for block in blocks if ast.unparse(block.items[-1]).endswith(_NO_PYTHON))


# What a with statement's line begins with when its block has ended, after a value to return or without one. Where the
# block begins, a context manager is loaded.
_EXITS = {"LOAD_CONST", "SWAP", "POP_BLOCK", "ROT_TWO"}


def leaves_a_block(frame: Any) -> bool:
    """Whether the line that is about to run calls the ``__exit__`` of a stream or a lock, with nothing raised.

    Python looks for signals after calls, at the beginnings of functions and at jumps backwards. Between the last of these in
    the block and the return of that ``__exit__``, which is no Python code, there is none.
    """
    code = frame.f_code
    return frame.f_lineno in _blocks(code.co_filename) and dis.opname[code.co_code[frame.f_lasti]] in _EXITS


def interrupt_at(number: int, run: Callable[[], Any]) -> tuple[Any, int]:
    """Run, and raise KeyboardInterrupt at line `number` of the package, counted over the run; at none if it is negative.

    Returns:
        What `run` returned, None if it was interrupted; and the lines that ran.
    """
    count = 0

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line" and not leaves_a_block(frame):
            count += 1
            if count == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def outer(frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        return local if name.startswith(PACKAGE) and "testing" not in name else None

    sys.settrace(outer)
    try:
        return run(), count
    except KeyboardInterrupt:
        if count != number:
            raise  # somebody else's
        return None, count
    finally:
        sys.settrace(None)


def interrupts(times: int, run: Callable[[], Any], before: Callable[[], object] = lambda: None) -> Iterator[tuple[int, Any]]:
    """Interrupt `run` that often, each time at a line drawn from all of the package that run.

    Runs differ in length: the first ones also plan. One that ends before its line says how far lines are drawn from then on.

    Args:
        times: interrupts, not runs.
        before: called before each run, never interrupted.

    Yields:
        After each run the line it was to stop at, and what `run` returned, None if it was interrupted.
    """
    before()
    _, lines = interrupt_at(-1, run)
    rng, made = np.random.default_rng(0), 0
    while made < times:
        number = int(rng.integers(1, lines + 1))
        before()
        result, count = interrupt_at(number, run)
        if result is None:
            made += 1
        elif count < number:
            lines = count
        yield number, result


class Interrupts:
    """Counts the package's lines that run below functions of these names, and interrupts at one of them.

    Args:
        names: of functions, any of which is entered.

    Attributes:
        seen: every place of the last run, in order.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._inside = 0
        self._finalizing = False
        self._at = -1
        self.seen: list[Line] = []

    def lines(self, run: Callable[[], Any]) -> list[int]:
        """The places, by number, at which to interrupt `run`: where each line runs first, and where it runs last."""
        self._run(run, -1)
        return spots(self.seen)

    def at(self, number: int, run: Callable[[], Any]) -> bool:
        """Run, and interrupt at that place. Whether `run` got there."""
        try:
            self._run(run, number)
        except KeyboardInterrupt:
            return True
        return False

    @property
    def last(self) -> Line:
        """The line that ran last, or did not."""
        return self.seen[-1]

    def _run(self, run: Callable[[], Any], at: int) -> None:
        self._at, self._inside, self._finalizing, self.seen = at, 0, False, []
        sys.settrace(self._enter)
        try:
            run()
        finally:
            sys.settrace(None)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or "testing" in code.co_filename:
            return None
        if self._finalizing:
            return None
        if frame.f_back is not None and frame.f_back.f_code.co_filename == weakref.__file__:
            self._finalizing = True  # nobody hears of its errors, nor of those of what it calls
            return self._finalized
        if code.co_name in self._names:
            self._inside += 1
        elif not self._inside:
            return None
        if not code.co_flags & inspect.CO_GENERATOR:  # one that is thrown away is called, too, and nobody hears of it
            self._pass(frame)
        return self._step

    def _pass(self, frame: Any) -> None:
        self.seen.append((frame.f_code.co_filename, frame.f_lineno))
        if len(self.seen) == self._at + 1:
            sys.settrace(None)
            raise KeyboardInterrupt

    def _finalized(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "return":
            self._finalizing = False
        return self._finalized

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if event == "line" and not leaves_a_block(frame):
            self._pass(frame)
        elif event == "return" and code.co_name in self._names:
            self._inside -= 1
        return self._step
