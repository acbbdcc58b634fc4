"""How fast the link between host and device is, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..config import MIB


@dataclass(frozen=True)
class Link:
    """GB/s (10**9 bytes), the best of a few copies. Pinned figures are None where host memory could not be pinned."""

    h2d_pinned_gbps: float | None
    d2h_pinned_gbps: float | None
    h2d_pageable_gbps: float
    d2h_pageable_gbps: float


def measure(device: torch.device, nbytes: int = 256 * MIB, repeats: int = 3) -> Link:
    """Copy `nbytes` each way, pinned and pageable, one copy at a time on an idle device."""
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    # Written once, so that pages exist: a copy from untouched memory reads one page of zeros over and over.
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    try:
        pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        pinned = None

    def gbps(target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(repeats + 1):  # the first one warms up
            torch.accelerator.synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return nbytes / min(seconds[1:]) / 1e9

    return Link(
        gbps(there, pinned) if pinned is not None else None,
        gbps(pinned, there) if pinned is not None else None,
        gbps(there, pageable),
        gbps(pageable, there),
    )
