"""A pipeline of many small parameters whose components compute nothing: what is left is the host's cost."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn


class Wide(nn.Module):
    """Many small parameters and a forward that costs nothing."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LayerNorm(8) for _ in range(n // 2))
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class WidePipeline(DiffusionPipeline):
    model_cpu_offload_seq = "first->second"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, second=second)
