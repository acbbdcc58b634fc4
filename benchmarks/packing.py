"""How far bf16 weights pack: `python -m benchmarks.packing [FILE.safetensors ...]`.

Of made-up weights, and of the files' tensors made bf16: bits for each element that packs, how many elements are listed apart,
and what all of it comes to. Every tensor is unpacked again and compared bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from prefetch_offload_kernels import pack_bf16, read_header, unpack

from prefetch_offload.codecs import WORTH_PACKING
from prefetch_offload.encoding import SMALLEST

MADE_UP = 1 << 22  # elements


@dataclass(frozen=True)
class Packing:
    """What packing came to.

    Attributes:
        bits: for each element of the tensors that pack; 16 if none does.
        apart: the share of these that is listed one by one.
        whole: bytes over those of bf16, of all tensors; small ones and those that do not pack are as they were.
        raw: how many tensors these are.
    """

    bits: float
    apart: float
    whole: float
    tensors: int
    raw: int


def measure(weights: Iterable[torch.Tensor]) -> Packing:
    """Pack each as the engine does.

    Raises:
        RuntimeError: one came back different.
    """
    elements = packed_nbytes = apart = raw_nbytes = tensors = raw = 0
    for weight in weights:
        tensors += 1
        flat = weight.detach().to(torch.bfloat16).reshape(-1)
        packed = pack_bf16(flat, limit=WORTH_PACKING) if flat.numel() >= SMALLEST else None
        if packed is None:
            raw, raw_nbytes = raw + 1, raw_nbytes + flat.nbytes
            continue
        if not torch.equal(unpack(packed).view(torch.int16), flat.view(torch.int16)):
            raise RuntimeError(f"a tensor of shape {tuple(weight.shape)} did not come back bit for bit")
        elements += flat.numel()
        packed_nbytes += packed.numel()
        apart += read_header(packed).escapes
    bits = 8 * packed_nbytes / elements if elements else 16.0
    whole = (packed_nbytes + raw_nbytes) / max(1, 2 * elements + raw_nbytes)
    return Packing(bits, apart / max(1, elements), whole, tensors, raw)


def made_up() -> dict[str, torch.Tensor]:
    """Weights of every sort, by name."""
    generator = torch.Generator().manual_seed(0)
    count = torch.arange(MADE_UP)
    return {
        "normal, 0.02": torch.randn(MADE_UP, generator=generator) * 0.02,
        "uniform": torch.rand(MADE_UP, generator=generator) * 2 - 1,
        "constant": torch.full((MADE_UP,), 0.7),
        "NaN": torch.full((MADE_UP,), torch.nan),
        "a sixteenth exponent in every block": torch.exp2((count % 15 + (count % 8192 == 0) * 40).float()),
        "all exponents alike": (count % 256 << 7).to(torch.int16).view(torch.bfloat16),
    }


def table(rows: Mapping[str, Packing]) -> str:
    lines = ["| weights | tensors | stay raw | bits | apart | bytes in all |", "|---|---|---|---|---|---|"]
    lines += [f"| {n} | {r.tensors} | {r.raw} | {r.bits:.3f} | {r.apart:.4%} | {r.whole:.4f} |" for n, r in rows.items()]
    return "\n".join(lines)


def main(files: list[str]) -> None:
    """Print the table."""
    from safetensors.torch import load_file

    rows = {name: measure([weight]) for name, weight in made_up().items()}
    for file in files:
        rows[Path(file).name] = measure(t for t in load_file(file).values() if t.is_floating_point())
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
