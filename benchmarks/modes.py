"""Ways to run a pipeline: resident, diffusers' own, peers from the package index, and ours. Each is one name.

place("group leaf stream", pipe, device)
place("ours:8GiB", pipe, device)             # budget
place("ours:stock", pipe, device)
place("ours:8GiB:packed", pipe, device)      # budget and transport
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import prefetch_offload

# What each peer is called on the package index, and what is imported.
PEERS = {"cache-dit": "cache_dit", "flextensor": "flextensor", "diffusers-mm": "diffusers_mm"}


class NotHere(Exception):
    """A mode cannot run: its package is not installed."""


def largest(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """The component with the most weights: what peers that work on one model are given."""
    found = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    name = max(found, key=lambda n: sum(p.numel() * p.itemsize for p in found[n].parameters()))
    return name, found[name]


def _resident(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.to(device)


def _stock(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def _sequential(pipe: DiffusionPipeline, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _group(level: str, stream: bool = False, record: bool = False) -> Callable[[DiffusionPipeline, torch.device], None]:
    def place(pipe: DiffusionPipeline, device: torch.device) -> None:
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        pipe.enable_group_offload(
            onload_device=device, offload_type=level, use_stream=stream, record_stream=record, **blocks
        )

    return place


def _cache_dit(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Every component of the pipeline, copies on streams of its own."""
    offload = importlib.import_module("cache_dit.offload")
    offload.layerwise_cpu_offload(
        pipe, onload_device=device, async_transfer=True, transfer_buckets=2, prefetch_limit=True
    )


def _flextensor(pipe: DiffusionPipeline, device: torch.device) -> None:
    """It takes one model; the other components stay on the device. Its profiling runs are part of the first call."""
    flextensor = importlib.import_module("flextensor")
    name, model = largest(pipe)
    for other, module in pipe.components.items():
        if isinstance(module, nn.Module) and other != name:
            module.to(device)
    setattr(pipe, name, flextensor.offload(model, flextensor.OffloadConfig(gpu_device=device.index or 0)))


def _diffusers_mm(pipe: DiffusionPipeline, device: torch.device) -> None:
    importlib.import_module("diffusers_mm").managed(pipe, device=device)


MODES: dict[str, Callable[[DiffusionPipeline, torch.device], Any]] = {
    "resident": _resident,
    "stock": _stock,
    "sequential": _sequential,
    "group block": _group("block_level"),
    "group block stream": _group("block_level", stream=True),
    "group leaf stream": _group("leaf_level", stream=True),
    "group leaf stream record": _group("leaf_level", stream=True, record=True),
    "cache-dit": _cache_dit,
    "flextensor": _flextensor,
    "diffusers-mm": _diffusers_mm,
}


def check(mode: str) -> None:
    """Raises ValueError if there is no such mode."""
    if mode not in MODES and mode.split(":")[0] != "ours":
        raise ValueError(f"mode {mode!r} is not known: {', '.join(MODES)}, ours, ours:BUDGET or ours:BUDGET:TRANSPORT")


def place(mode: str, pipe: DiffusionPipeline, device: torch.device, **settings: Any) -> prefetch_offload.Offload | None:
    """Make `pipe` run in `mode` on `device`. Returns our handle, if it is ours.

    Args:
        settings: for ours, as for `prefetch_offload.enable`.

    Raises:
        NotHere: the peer is not installed.
    """
    check(mode)
    if mode in MODES:
        if mode in PEERS and util.find_spec(PEERS[mode]) is None:
            raise NotHere(f"{mode} is not installed")
        MODES[mode](pipe, device)
        return None
    _, budget, transport = (*mode.split(":"), "", "")[:3]
    if transport:
        settings["transport"] = transport
    return prefetch_offload.enable(pipe, device=device, budget=budget or None, **settings)


def versions() -> dict[str, str | None]:
    """Of the peers; None: not installed."""
    installed = {d.name: d.version for d in metadata.distributions()}
    return {name: installed.get(name) for name in PEERS}
