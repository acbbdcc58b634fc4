"""Streams, figures and errors of a device, where the simulated one would not show a mistake."""

from __future__ import annotations

import ctypes
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE

from prefetch_offload import host
from prefetch_offload.device import Lanes


def test_what_casts_a_unit_goes_before_the_kernel_that_is_running(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal priority it waits for all blocks of that one, and the copy after the next with it."""
    made: dict[torch.Stream, dict[str, Any]] = {}
    stream = torch.Stream

    def recorded(**how: Any) -> torch.Stream:
        one = stream(**how)
        made[one] = how
        return one

    monkeypatch.setattr(torch, "Stream", recorded)
    lanes = Lanes(torch.device(DEVICE, 0))
    assert made == {lanes.copy: {"device": lanes.device}, lanes.cast: {"device": lanes.device, "priority": -1}}


def test_the_allocators_figures_are_asked_for_once_and_unsorted(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`memory_allocated` and its like put all names together and sort them, for one figure of two hundred."""
    lanes = Lanes(torch.device(DEVICE, 0))
    assert lanes.spare_nbytes == 0, "no such allocator"

    def figures(device: torch.device) -> dict[str, Any]:
        assert device == lanes.device
        return {
            "allocated_bytes": {"all": {"current": 300, "peak": 700}},
            "reserved_bytes": {"all": {"current": 1000, "peak": 2000}},
            "num_alloc_retries": 5,
        }

    monkeypatch.setattr(
        lanes, "module", SimpleNamespace(memory_stats_as_nested_dict=figures, mem_get_info=lambda device: (4000, 9000))
    )
    assert (lanes.allocated_nbytes(), lanes.peak_nbytes(), lanes.reserved_nbytes(), lanes.retries()) == (300, 700, 1000, 5)
    assert lanes.free_nbytes() == 4000 + 1000 - 300
    assert lanes.spare_nbytes == 2 << 20
    # before anything has been allocated there are none
    plain = {"memory_allocated": 1, "max_memory_allocated": 2, "memory_reserved": 3}
    asked = {name: lambda device, nbytes=nbytes: nbytes for name, nbytes in plain.items()}
    monkeypatch.setattr(lanes, "module", SimpleNamespace(memory_stats_as_nested_dict=lambda device: {}, **asked))
    assert (lanes.allocated_nbytes(), lanes.peak_nbytes(), lanes.reserved_nbytes(), lanes.retries()) == (1, 2, 3, 0)


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_what_was_refused_is_forgotten_by_the_runtime_that_is_loaded(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's binding has no `cudaGetLastError`; the next kernel launch would raise what pinning left behind."""
    asked: list[str] = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    folder = "/home/a user/lib"
    line = f"7f00-7f01 r-xp 00000000 08:01 123                        {folder}/libcudart.so.12\n"
    maps = line + line + "7f02-7f03 rw-p 00000000 00:00 0\n"
    monkeypatch.setattr(host, "open", lambda path: io.StringIO(maps), raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(cudaGetLastError=lambda: asked.append(path)))
    host.clear_last_error(SimpleNamespace())
    assert asked == [f"{folder}/libcudart.so.12" if platform == "linux" else "cudart64_12.dll"]
