"""KeyboardInterrupt between any two lines of chosen functions of the package and of all that they call in it, and between
their calls and their first lines."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefetch_offload

PACKAGE = str(Path(prefetch_offload.__file__).parent)
Line = tuple[str, int]


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
        self._at = -1
        self.seen: list[Line] = []

    def lines(self, run: Callable[[], Any]) -> list[int]:
        """The places, by number, at which to interrupt `run`: where each line runs first, and where it runs last."""
        self._run(run, -1)
        first: dict[Line, int] = {}
        last: dict[Line, int] = {}
        for number, line in enumerate(self.seen):
            first.setdefault(line, number)
            last[line] = number
        return sorted({*first.values(), *last.values()})

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
        self._at, self._inside, self.seen = at, 0, []
        sys.settrace(self._enter)
        try:
            run()
        finally:
            sys.settrace(None)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or "testing" in code.co_filename:
            return None
        if frame.f_back is not None and frame.f_back.f_code.co_filename == weakref.__file__:
            return None  # a finalizer, whose errors nobody hears of
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

    def _step(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if event == "line":
            self._pass(frame)
        elif event == "return" and code.co_name in self._names:
            self._inside -= 1
        return self._step
