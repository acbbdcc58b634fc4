"""Work on the host shared by all cores: PyTorch's operators let other threads of Python run, and many use one core each."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_MOST = 16  # threads: past that, memory is the limit, and each has temporaries of its own


def cores() -> int:
    """How many cores this process may use, whatever OMP_NUM_THREADS says."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST)


def together(tasks: list[Callable[[], T]], sizes: list[int] | None) -> list[T]:
    """What each task returns, in their order.

    They run on other threads, which are gone when this returns or raises. Whoever waits here can be interrupted at any time:
    no task is begun after that, and those that are under way are waited for. Of several errors the first task's is raised.

    Args:
        sizes: how long each takes, in any measure: the longest begin first. None: they run here, one after the other.
    """
    number = min(cores(), len(tasks))
    if sizes is None or number < 2:
        return [task() for task in tasks]
    crew = _Crew(tasks, sorted(range(len(tasks)), key=lambda i: -sizes[i]))
    threads = [threading.Thread(target=crew.work, name=f"prefetch_offload {i}", daemon=True) for i in range(number)]
    try:
        with crew.open:  # a lock, which no interrupt can leave closed: tasks are begun only while it is held here
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        for thread in threads:
            if thread.is_alive():
                thread.join()
    if crew.errors:
        raise crew.errors[min(crew.errors)]
    return [crew.results[i] for i in range(len(tasks))]


class _Crew:
    def __init__(self, tasks: list[Callable[[], Any]], order: list[int]) -> None:
        self.tasks, self.order = tasks, order
        self.open = threading.Lock()
        self.next = itertools.count()
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.inference = torch.is_inference_mode_enabled()

    def work(self) -> None:
        with torch.inference_mode(self.inference), torch.no_grad():
            while self.open.locked() and not self.errors:
                at = next(self.next)
                if at >= len(self.order):
                    return
                try:
                    self.results[self.order[at]] = self.tasks[self.order[at]]()
                except BaseException as error:  # of any kind: who waits raises it
                    self.errors[self.order[at]] = error
