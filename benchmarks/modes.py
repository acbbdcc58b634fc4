"""Ways to run a pipeline: resident, diffusers' own, peers from the package index, and ours. Each is one name.

place("group leaf stream", pipe, device)
place("ours:8GiB", pipe, device)             # budget
place("ours:stock", pipe, device)
place("ours:8GiB:packed", pipe, device)      # budget and transport
place("cache-dit:8GiB", pipe, device, limit) # a peer on a device that has 8 GiB free; `stock`: what stock offload took
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from importlib import util
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import prefetch_offload
from prefetch_offload.commands.doctor import version_of
from prefetch_offload.config import parse_budget

Place = Callable[[DiffusionPipeline, torch.device, "int | None"], Any]
PROFILING = 12  # passes after which FlexTensor 0.5.0 goes by its plan: one of discovery, ten of profiling, one more

# cache-dit keeps a number of layers on the device, not of bytes. So much of the limit; the rest is for activations and for what
# passes through.
KEPT = 0.6
BINS = 8

# What each peer is called on the package index, and what is imported.
PEERS = {"cache-dit": "cache_dit", "flextensor": "flextensor", "diffusers-mm": "diffusers_mm"}


class NotHere(Exception):
    """A mode cannot run here: its package is not installed, or the device cannot be limited."""


def largest(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """The component with the most weights: what peers that work on one model are given."""
    found = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    name = max(found, key=lambda n: sum(p.numel() * p.itemsize for p in found[n].parameters()))
    return name, found[name]


def _resident(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    pipe.to(device)


def _stock(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    pipe.enable_model_cpu_offload(device=device)


def _sequential(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _group(level: str, stream: bool = False, record: bool = False) -> Place:
    def place(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        pipe.enable_group_offload(
            onload_device=device, offload_type=level, use_stream=stream, record_stream=record, **blocks
        )

    return place


def _cache_dit(pipe: DiffusionPipeline, device: torch.device, limit: int | None, **more: Any) -> None:
    """Every component of the pipeline, copies on streams of its own, which are for CUDA only."""
    offload = importlib.import_module("cache_dit.offload")
    streams = device.type == "cuda"
    offload.layerwise_cpu_offload(
        pipe, onload_device=device, async_transfer=streams, transfer_buckets=2, prefetch_limit=streams, **more
    )


def _cache_dit_kept(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    """The same, and of the largest component as many layers stay on the device, evenly spread, as take `KEPT` of the limit."""
    name, model = largest(pipe)
    nbytes = sum(p.nbytes for p in model.parameters())
    share = 0.5 if limit is None else min(1.0, KEPT * limit / nbytes)
    layers = sum(any(True for _ in m.parameters(recurse=False)) for m in model.modules())
    others = [n for n, m in pipe.components.items() if isinstance(m, nn.Module) and n != name]
    _cache_dit(pipe, device, limit, module_names=others)
    kept = {"persistent_buckets": int(share * layers), "persistent_bins": BINS}
    _cache_dit(pipe, device, limit, module_names=[name], **kept)


def _flextensor(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    """It takes one model; the other components stay on the device."""
    flextensor = importlib.import_module("flextensor")
    name, model = largest(pipe)
    for other, module in pipe.components.items():
        if isinstance(module, nn.Module) and other != name:
            module.to(device)
    own = {}
    if limit is not None:
        own["max_gpu_mem_fraction"] = limit / torch.get_device_module(device).mem_get_info(device)[1]
    setattr(pipe, name, flextensor.offload(model, flextensor.OffloadConfig(gpu_device=device.index or 0, **own)))


def _diffusers_mm(pipe: DiffusionPipeline, device: torch.device, limit: int | None) -> None:
    """It goes by the free memory of the device."""
    importlib.import_module("diffusers_mm").managed(pipe, device=device)


MODES: dict[str, Place] = {
    "resident": _resident,
    "stock": _stock,
    "group leaf stream": _group("leaf_level", stream=True),
    "group leaf stream record": _group("leaf_level", stream=True, record=True),
    "group block stream": _group("block_level", stream=True),
    "group block stream record": _group("block_level", stream=True, record=True),
    "cache-dit": _cache_dit,
    "cache-dit kept": _cache_dit_kept,
    "flextensor": _flextensor,
    "flextensor profiling": _flextensor,
    "diffusers-mm": _diffusers_mm,
    "group leaf": _group("leaf_level"),
    "group block": _group("block_level"),
    "sequential": _sequential,
}


def parts(mode: str) -> tuple[str, str, str]:
    """Name, budget and transport; empty where not given."""
    name, budget, transport = (*mode.split(":"), "", "")[:3]
    return name, budget, transport


def warm_calls(mode: str, steps: int) -> int:
    """Calls of a visit before the first timed one. The second of ours is the first with a plan; where profiling counts there
    are none."""
    name = parts(mode)[0]
    if name == "flextensor profiling":
        return 0
    return {"ours": 2, "flextensor": math.ceil(PROFILING / steps)}.get(name, 1)


def check(mode: str) -> None:
    """Raises ValueError if there is no such mode, or no such budget."""
    name, budget, transport = parts(mode)
    if name != "ours" and (name not in MODES or transport):
        raise ValueError(
            f"mode {mode!r} is not known: {', '.join(MODES)}, each with or without :BUDGET, "
            "ours, ours:BUDGET or ours:BUDGET:TRANSPORT"
        )
    parse_budget(budget or None)


@contextlib.contextmanager
def limited(device: torch.device, limit: int | None) -> Iterator[int]:
    """Leave `limit` bytes of the device free, as on a smaller one: it binds every mode alike, also those that have no setting
    for it. Gives the bytes taken away.

    Raises:
        NotHere: this device has no memory that could be taken away, or less than that is free.
    """
    if limit is None:
        yield 0
        return
    if device.type != "cuda":
        raise NotHere(f"a limit of memory needs a CUDA device, not {device.type}")
    spare = torch.cuda.mem_get_info(device)[0] - limit
    if spare < 0:
        raise NotHere(f"less than {limit} bytes are free")
    held = torch.empty(spare, dtype=torch.uint8, device=device)
    try:
        yield spare
    finally:
        del held
        torch.cuda.empty_cache()


def place(
    mode: str, pipe: DiffusionPipeline, device: torch.device, limit: int | None = None, **settings: Any
) -> prefetch_offload.Offload | None:
    """Make `pipe` run in `mode` on `device`. Returns our handle, if it is ours.

    Args:
        limit: bytes, for a peer that has a setting for it. The caller sees to it that no more is free (`limited`).
        settings: for ours, as for `prefetch_offload.enable`.

    Raises:
        NotHere: the peer is not installed.
    """
    check(mode)
    name, budget, transport = parts(mode)
    if name != "ours":
        package = package_of(name)
        if package and util.find_spec(PEERS[package]) is None:
            raise NotHere(f"{package} is not installed")
        MODES[name](pipe, device, limit)
        return None
    if transport:
        settings["transport"] = transport
    return prefetch_offload.enable(pipe, device=device, budget=budget or None, **settings)


def package_of(name: str) -> str | None:
    """What a peer is called on the package index; None: it is diffusers' own, or ours."""
    return next((p for p in PEERS if name.split(" ")[0] == p), None)


def remove(mode: str, pipe: DiffusionPipeline, offload: prefetch_offload.Offload | None) -> None:
    """The end of a mode, before its pipeline goes."""
    name = parts(mode)[0]
    if offload is not None:
        offload.disable()
    elif name in ("stock", "sequential"):
        pipe.remove_all_hooks()
    elif package_of(name) == "flextensor" and "flextensor" in sys.modules:
        with contextlib.suppress(Exception):  # the figures are there; what it keeps shows in the peaks of the next
            sys.modules["flextensor"].release(preserve_model=False)


def versions() -> dict[str, str | None]:
    """Of the peers; None: not installed."""
    return {name: version_of(name) for name in PEERS}
