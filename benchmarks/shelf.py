"""The pipeline that goes from visit to visit, where building it and pinning it take longer than what is measured of it.

Without `keep` every visit has a pipeline of its own. With it, modes that leave their weights on the host hand the pipeline on,
and ours stays enabled while only the budget changes: Flux is then built once and pinned once for all budgets.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import prefetch_offload

from . import modes

KEEPING = ("resident", "stock", "ours")


class Shelf:
    """
    Args:
        build: makes a pipeline, on the host.
        device: where modes run it.
        keep: hand it on.
        settings: of ours, besides budget and transport.

    Attributes:
        shared: the mode that was taken last has host memory that a pipeline of its own would not have.
    """

    def __init__(
        self, build: Callable[[], DiffusionPipeline], device: torch.device, keep: bool, **settings: Any
    ) -> None:
        self._build, self._device, self._keep, self._settings = build, device, keep, settings
        self._pipe: DiffusionPipeline | None = None
        self._offload: prefetch_offload.Offload | None = None
        self._mode = ""
        self._weights: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []

    @property
    def shared(self) -> bool:
        return bool(self._weights)

    def make_room(self, mode: str) -> None:
        """Before a visit: what `mode` has no use for goes, and what stays holds no device memory."""
        name, _, transport = modes.parts(mode)
        if self._offload is not None and (name, transport) != ("ours", modes.parts(self._mode)[2]):
            self._offload.disable()
            self._offload = None
        if not self._keep or name not in KEEPING:
            self.clear()
        if self._offload is not None:
            self._offload.release()
        gc.collect()

    def take(
        self, mode: str, limit: int | None
    ) -> tuple[DiffusionPipeline, prefetch_offload.Offload | None, float | None]:
        """A pipeline in `mode`, our handle, and the seconds that it took to place it there; None: it was there, and has
        another budget now."""
        name, budget, _ = modes.parts(mode)
        if self._pipe is None:
            self._pipe = self._build()
        self._mode = mode
        if self._offload is not None:
            self._offload.budget = budget or None
            return self._pipe, self._offload, None
        if self._keep and name == "resident":
            self._weights = [
                (held, key, tensor, tensor.data)
                for module in self._pipe.components.values()
                if isinstance(module, nn.Module)
                for part in module.modules()
                for held in (part._parameters, part._buffers)
                for key, tensor in held.items()
                if tensor is not None
            ]
        start = time.perf_counter()
        self._offload = modes.place(mode, self._pipe, self._device, limit, **(self._settings if name == "ours" else {}))
        return self._pipe, self._offload, time.perf_counter() - start

    def put_back(self) -> None:
        """The end of a visit that went well."""
        name = modes.parts(self._mode)[0]
        if not self._keep or name not in KEEPING:
            self.clear()
        elif name == "resident":
            for held, key, tensor, data in self._weights:
                held[key] = tensor
                if tensor.device != data.device:
                    tensor.data = data
            self._weights = []
        elif name != "ours":
            modes.remove(self._mode, self._pipe, None)

    def clear(self) -> None:
        """The pipeline goes, also after a visit that failed."""
        pipe, offload, self._pipe, self._offload, self._weights = self._pipe, self._offload, None, None, []
        if pipe is not None:
            modes.remove(self._mode, pipe, offload)
