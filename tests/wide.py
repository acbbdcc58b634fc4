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


class Block(nn.Module):
    """Weights that are there to be moved, and a forward that costs nothing."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(nbytes // 4 // 16) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Blocks(nn.Module):
    """`n` blocks of `nbytes` each, called in order."""

    def __init__(self, n: int, nbytes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(nbytes) for _ in range(n))
        self.dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x
