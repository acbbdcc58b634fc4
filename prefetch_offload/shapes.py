"""What a planner needs to know about a pipeline it has never run: units, passes, times. Pure.

workload = workload_of(parts, steps=28, step_ms=535, encode_ms=30, decode_ms=150)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .simulator import ComponentLoad, Workload

Kind = Literal["encoder", "denoiser", "decoder"]


@dataclass(frozen=True)
class Block:
    """Units that repeat.

    Attributes:
        name: of the first unit: the block in which it begins, or ``rest``.
        nbytes: of the units of one repetition, in order of use.
        idle: nothing of them is computed with: token tables, or an image encoder in a call that encodes no image.
    """

    name: str
    nbytes: tuple[int, ...]
    repeat: int = 1
    idle: bool = False

    @property
    def total_nbytes(self) -> int:
        return sum(self.nbytes) * self.repeat


@dataclass(frozen=True)
class Part:
    """A component.

    Attributes:
        parameters: how many; 0: not counted.
        activation_nbytes: device memory besides weights while it runs.
        passes_per_step: of a denoiser: forward passes in one step (2: guidance in two passes).
        step_share: of a denoiser: the part of all steps that it does.
    """

    name: str
    kind: Kind
    dtype: str
    blocks: tuple[Block, ...]
    parameters: int = 0
    activation_nbytes: int = 0
    passes_per_step: int = 1
    step_share: float = 1.0

    @property
    def total_nbytes(self) -> int:
        return sum(b.total_nbytes for b in self.blocks)


@dataclass(frozen=True)
class Model:
    """A pipeline, in the order in which its parts run.

    Attributes:
        pipeline: its diffusers class.
        output: what one call makes; times and activations are for that.
        step_ms: one step of the denoiser, all of its passes; `step_source` says on which GPU, and who says so.
        encode_ms, decode_ms: all encoders, and the decoder.
        times_source: where the last two come from.
    """

    name: str
    title: str
    pipeline: str
    output: str
    parts: tuple[Part, ...]
    steps: int
    step_ms: float
    step_source: str
    encode_ms: float
    decode_ms: float
    times_source: str


_TABLES = re.compile(
    r"(^|\.)(shared|embed_tokens|embeddings|token_embedding|position_embedding|visual|vision_model)(\.|$)"
)


def idle(kind: Kind, names: Sequence[str]) -> bool:
    """Whether a unit with tensors of these names is loaded, but not computed with."""
    if kind == "denoiser":
        return False
    unused = ("encoder.", "quant_conv.")
    return all(n.startswith(unused) if kind == "decoder" else _TABLES.search(n) is not None for n in names)


def workload_of(
    parts: Sequence[Part],
    steps: int,
    step_ms: float,
    encode_ms: float,
    decode_ms: float,
    activations: Mapping[Kind, int] | None = None,
) -> Workload:
    """A call as the planner sees it.

    Compute time is spread over the units of a part, and `encode_ms` over encoders, by their bytes: an approximation.

    Args:
        activations: by kind, device bytes besides weights, instead of each part's own.
    """
    busy = {p.name: sum(b.total_nbytes for b in p.blocks if not b.idle) for p in parts}
    of_kind = {kind: sum(busy[p.name] for p in parts if p.kind == kind) for kind in ("encoder", "decoder")}
    components: dict[str, ComponentLoad] = {}
    runs: list[tuple[str, int]] = []
    done = 0.0  # the share of all steps that denoisers so far have done
    for part in parts:
        passes = 1
        if part.kind == "denoiser":
            # Counted from the totals, so that shares add up to all steps, and a share of 1 starts anew: a second stage.
            before = 0.0 if done >= 1 else done
            done = min(1.0, before + part.step_share)
            passes = max(1, round(steps * done) - round(steps * before)) * part.passes_per_step
            pass_ms = step_ms / part.passes_per_step
        else:
            total_ms = encode_ms if part.kind == "encoder" else decode_ms
            pass_ms = total_ms * busy[part.name] / max(1, of_kind[part.kind])
        nbytes: dict[str, int] = {}
        compute_ms: dict[str, float] = {}
        for block in part.blocks:
            for i in range(block.repeat):
                for size in block.nbytes:
                    unit = f"{part.name}/{len(nbytes)}:{block.name}" + (f"+{i}" if i else "")
                    nbytes[unit] = size
                    compute_ms[unit] = 0.0 if block.idle else pass_ms * size / max(1, busy[part.name])
        activation = (activations or {}).get(part.kind, part.activation_nbytes)
        components[part.name] = ComponentLoad(tuple(nbytes), nbytes, compute_ms, activation)
        runs.append((part.name, passes))
    return Workload(components, tuple(runs))


def blocks_of(units: Sequence[tuple[str, int, bool]], longest: int = 12) -> tuple[Block, ...]:
    """Blocks of (name, bytes, idle) units, with what repeats folded: at most `longest` units in a repetition."""
    keys = [(nbytes, unused) for _, nbytes, unused in units]
    blocks: list[Block] = []
    at = 0
    while at < len(units):
        best, repeat = 1, 1
        for length in range(1, longest + 1):
            pattern = keys[at : at + length]
            times = 1
            while keys[at + times * length : at + (times + 1) * length] == pattern:
                times += 1
            alike = len({unused for _, unused in pattern}) == 1  # a block is idle or it is not
            if alike and times > 1 and (times - 1) * length > (repeat - 1) * best:
                best, repeat = length, times
        blocks.append(Block(units[at][0], tuple(n for n, _ in keys[at : at + best]), repeat, units[at][2]))
        at += best * repeat
    return tuple(blocks)
