"""What tests of the simulated accelerator have in common."""

from __future__ import annotations

from typing import Any

import torch

N = 1 << 16  # float32 elements: 256 KiB
GRANULE = 512  # bytes
SLOW = 0.001  # GB/s: a copy of N elements takes 262 ms, so that it is surely pending when the test looks


def device_bytes(ext: Any) -> int:
    return ext.counters()["allocated"]


def on_device(n: int = N) -> torch.Tensor:
    return torch.empty(n, device="simgpu")


def side_stream() -> torch.Stream:
    return torch.Stream(device="simgpu")


def main_stream() -> torch.Stream:
    return torch.accelerator.current_stream()


class Program:
    """Two streams and a pinned tensor: the vocabulary of the hazard cases."""

    def __init__(self) -> None:
        self.pinned = torch.randn(N).pin_memory()
        self.side, self.main = side_stream(), main_stream()

    def side_waits(self) -> None:
        self.side.wait_event(self.main.record_event())

    def main_waits(self) -> None:
        self.main.wait_event(self.side.record_event())

    def copy(self, d: torch.Tensor) -> None:
        with self.side:
            d.copy_(self.pinned, non_blocking=True)

    def allocated_on_side(self) -> torch.Tensor:
        with self.side:
            return on_device()
