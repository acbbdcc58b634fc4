"""What can be told of any mode from outside: peaks by sampling, compiles by Dynamo's counters, pinned and copied bytes."""

from __future__ import annotations

import threading
from typing import Any

import psutil
import torch

from prefetch_offload.commands import devices
from prefetch_offload.commands.picture import calls_of
from prefetch_offload.trace import Timeline, busy_ms, overlap_ms, times_of

EVERY_S = 0.02


class Peaks:
    """While the block runs, a thread samples the device memory in use by the driver's figure, and the process's own.

    Attributes:
        device_nbytes: the highest; None where the driver does not tell.
        rss_nbytes: the highest.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_nbytes: int | None = None
        self.rss_nbytes = 0
        self._device, self._module = device, torch.get_device_module(device)
        self._process, self._over = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _sample(self) -> None:
        self.rss_nbytes = max(self.rss_nbytes, self._process.memory_info().rss)
        if hasattr(self._module, "mem_get_info"):
            free, total = self._module.mem_get_info(self._device)
            self.device_nbytes = max(self.device_nbytes or 0, total - free)

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            self._sample()

    def __enter__(self) -> Peaks:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        if exc[0] is None:
            self._sample()


def compiles() -> tuple[int, int] | None:
    """Graphs handed to a backend, and recompiles, so far; None: this PyTorch does not tell."""
    try:
        from torch._dynamo.utils import counters, guard_failures
    except ImportError:
        return None
    return counters["stats"]["unique_graphs"], sum(len(reasons) for reasons in guard_failures.values())


def pinned_nbytes(device: torch.device) -> int | None:
    """Host memory in use in PyTorch's pinned allocator; None: this PyTorch does not tell."""
    simulator = devices.simulator(device)
    if simulator is not None:
        return int(simulator.counters()["pinned"])
    stats = getattr(torch.get_device_module(device), "host_memory_stats", None)
    return stats().get("active_bytes.current") if stats is not None else None


def copied_nbytes(device: torch.device) -> tuple[int, int] | None:
    """To the device and back so far; only the simulated one counts."""
    simulator = devices.simulator(device)
    if simulator is None:
        return None
    counters = simulator.counters()
    return counters["h2d"], counters["d2h"]


def copies(timeline: Timeline, calls: int) -> tuple[float, float, float | None] | None:
    """Of the last `calls` calls: copy milliseconds a call in which compute waited, those in which it did not, and GB/s while
    copies ran.

    The timeline keeps the last few thousand spans: calls that have lost some are left out. None: all have.
    """
    spans = timeline.spans
    whole = [c for c in calls_of(timeline)[-calls:] if any(s.start_ms < c.start_ms for s in spans)]
    if not whole:
        return None
    inside = [s for s in spans if whole[0].start_ms <= s.start_ms < whole[-1].end_ms]
    moved = [s for s in inside if s.track == "copy"]
    copy_ms = busy_ms(moved)
    exposed_ms = overlap_ms(times_of(moved), times_of(s for s in inside if s.track == "stalls"))
    nbytes = sum(int(s.args["nbytes"]) for s in moved)
    gbps = nbytes / copy_ms / 1e6 if copy_ms > 0 else None
    return exposed_ms / len(whole), max(0.0, copy_ms - exposed_ms) / len(whole), gbps


def settle(device: torch.device) -> None:
    """Give back what the mode before has cached: device memory, and pinned host memory, which is as large as the model."""
    module: Any = torch.get_device_module(device)
    module.empty_cache()
    if device.type == "cuda" and hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()
