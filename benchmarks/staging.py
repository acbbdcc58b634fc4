"""What a second staging buffer is worth: `python -m benchmarks.staging`. Simulated; no device is used.

Flux in 8 GiB, its weights encoded, as the planner plans it: with two buffers, so that the link goes on while a unit is cast,
and with one on one stream, where a copy takes the link for as long as its cast as well. The second buffer's memory is taken off
the budget of the former.
"""

from __future__ import annotations

import dataclasses

from prefetch_offload.config import GIB
from prefetch_offload.figures import MODELS
from prefetch_offload.shapes import workload_of
from prefetch_offload.simulator import ComponentLoad, Link, Workload
from prefetch_offload.strategy import plan_call

LINK = Link(24.8)  # PCIe 4.0 x16, pinned
CAST_GBPS = 800.0  # read and written, of a consumer GPU whose memory has 1 TB/s
WAYS = {"fp8": 0.5, "packed": 0.752}  # of bf16's bytes


def encoded(load: ComponentLoad, share: float, two: bool) -> ComponentLoad:
    """`load`, of whose bytes `share` travel, with two staging buffers or one."""
    copy = {u: int(share * n) for u, n in load.nbytes.items()}
    cast_ms = {u: (n + copy[u]) / CAST_GBPS / 1e6 for u, n in load.nbytes.items()}
    if not two:
        copy = {u: n + int(cast_ms[u] * LINK.gbps * 1e6) for u, n in copy.items()}
        cast_ms = {}
    return dataclasses.replace(load, copy_nbytes=copy, unpack_ms=cast_ms)


def call_s(way: str, step_ms: float, two: bool, budget_nbytes: int = 8 * GIB) -> float:
    """Predicted seconds of a call of Flux of 28 steps."""
    model = MODELS["flux"]
    call = workload_of(model.parts, 28, step_ms, model.encode_ms, model.decode_ms)
    largest = max(n for c in call.components.values() for n in c.nbytes.values())
    buffers = (2 if two else 1) * int(WAYS[way] * largest)
    loads = {name: encoded(load, WAYS[way], two) for name, load in call.components.items()}
    return plan_call(Workload(loads, call.runs), budget_nbytes - buffers, LINK).prediction.call_ms / 1e3


def main() -> None:
    """Print the table."""
    print("| step | way | one buffer | two |\n|---|---|---|---|")
    for step_ms in (250, 500, 900):
        for way in WAYS:
            one, two = (call_s(way, step_ms, two) for two in (False, True))
            print(f"| {step_ms} ms | {way} | {one:.1f} s | {two:.1f} s, {1 - two / one:.0%} less |")


if __name__ == "__main__":
    main()
