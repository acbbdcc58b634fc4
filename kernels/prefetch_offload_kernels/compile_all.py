"""Compiles every variant of the kernel for every architecture, with no GPU, and writes down what came of it.

    python -m prefetch_offload_kernels.compile_all --out kernels/results/compiled.md

writes a table and a CSV file beside it: registers, spills, shared memory, and whether full blocks are read and written in
accesses of at least 16 bytes, which is read off the SASS. Rows of architectures that were not asked for are kept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import codes
from .launch import OPTIONS

# Ampere (A100, consumer), Ada, Hopper, Blackwell (data centre, consumer).
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# What an SM holds at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
REGISTERS_PER_SM = 65536

E4M3_TO_BF16 = codes.conversion(codes.E4M3, codes.BF16, codes.GROUPED)
# What units ask for together: packed weights and tensors that did not pack; fp8 weights and tensors that stay.
MIXES = ((codes.COPY, codes.UNPACK), (codes.COPY, E4M3_TO_BF16), (codes.COPY, codes.UNPACK, E4M3_TO_BF16))
VARIANTS: tuple[tuple[int, ...], ...] = (*((k,) for k in range(codes.KINDS) if codes.exists(k)), *MIXES)


@dataclass(frozen=True)
class Result:
    """One compiled variant.

    Attributes:
        kernel: fingerprint of the kernel's source.
        kinds: what the variant carries out.
        registers: per thread.
        spills: instructions in the SASS that load or store local memory.
        shared_nbytes: shared memory per program.
        warps: how many of them an SM holds, by registers.
        wide_loads: global loads of 16 bytes or more in the SASS.
        wide_stores: likewise.
        vectorised: whether these move a full block of every kind.
    """

    kernel: str
    triton: str
    arch: str
    kinds: str
    registers: int
    spills: int
    shared_nbytes: int
    warps: int
    wide_loads: int
    wide_stores: int
    vectorised: bool


def source_fingerprint() -> str:
    """Changes with the kernel's source."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in ("codes.py", "kernel.py"))).hexdigest()[:12]


def name_of(kinds: Sequence[int]) -> str:
    return " + ".join(codes.name(kind) for kind in kinds)


def block_nbytes(kind: int) -> tuple[int, int]:
    """Bytes that one thread reads and writes of a full block; of packed weights without tables and escapes."""
    per_thread = codes.BLOCK // (32 * codes.WARPS)
    if kind == codes.COPY:
        return 4 * per_thread, 4 * per_thread
    if kind == codes.UNPACK:
        return per_thread * 3 // 2, 2 * per_thread
    source, target, _ = codes.parts(kind)
    size = (4, 2, 2, 1, 1, 1)
    return size[source] * per_thread, size[target] * per_thread


def compile_variant(kinds: Sequence[int], capability: int) -> dict[str, bytes | str | int]:
    """Triton's IR, PTX, cubin and shared memory of one variant for one architecture.

    Raises:
        RuntimeError: in a process where Triton interprets.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .kernel import unit_kernel

    if not isinstance(unit_kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 is set, and an interpreted kernel cannot be compiled. Unset it.")
    pointers = {"staging": "*u8", "target": "*u8", "rows": "*i64", "blocks": "*i32"}
    signature = {**pointers, "KINDS": "constexpr", "BLOCK": "constexpr"}
    constants = {"KINDS": sum(1 << kind for kind in kinds), "BLOCK": codes.BLOCK}
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    compiled = triton.compile(
        ASTSource(unit_kernel, signature, constants, divisible),
        target=GPUTarget("cuda", capability, 32),
        options=OPTIONS,
    )
    return {**{name: compiled.asm[name] for name in ("ttir", "ptx", "cubin")}, "shared": compiled.metadata.shared}


def disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers and SASS, by the cuobjdump that Triton brings along."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [knobs.nvidia.cuobjdump.path, option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing of registers: {usage!r}")
    return int(found[1]), sass


def accesses(sass: str) -> Counter[tuple[str, int]]:
    """How often which instruction (LDG, STG, LDL, STL) accesses how many bits."""
    counts: Counter[tuple[str, int]] = Counter()
    for instruction, options in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", sass):
        width = re.search(r"\.(?:[US]?)(8|16|64|128|256)\b", options)
        counts[instruction, int(width[1]) if width else 32] += 1
    return counts


def inspect(kinds: Sequence[int], capability: int) -> Result:
    """Compiles one variant and reads off what became of it."""
    import triton

    compiled = compile_variant(kinds, capability)
    assert isinstance(compiled["cubin"], bytes) and isinstance(compiled["shared"], int)
    registers, sass = disassemble(compiled["cubin"])
    counts = accesses(sass)
    wide = {name: sum(count for (n, w), count in counts.items() if n == name and w >= 128) for name in ("LDG", "STG")}
    moved = {name: sum(w // 8 * c for (n, w), c in counts.items() if n == name and w >= 128) for name in ("LDG", "STG")}
    needed = [sum(column) for column in zip(*(block_nbytes(kind) for kind in kinds), strict=True)]
    # Registers are given out to warps in 256s.
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * codes.WARPS) * codes.WARPS
    return Result(
        kernel=source_fingerprint(),
        triton=triton.__version__,
        arch=f"sm_{capability}",
        kinds=name_of(kinds),
        registers=registers,
        spills=sum(count for (n, _), count in counts.items() if n in ("LDL", "STL")),
        shared_nbytes=compiled["shared"],
        warps=min(WARPS_PER_SM[capability], by_registers),
        wide_loads=wide["LDG"],
        wide_stores=wide["STG"],
        vectorised=moved["LDG"] >= needed[0] and moved["STG"] >= needed[1],
    )


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that `write_results` wrote; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_results(rows: Iterable[dict[str, str]], out: Path) -> None:
    """A table in Markdown at `out`: a line per variant, a column per architecture; and a CSV file beside it."""
    listed = list(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)
    architectures = sorted({row["arch"] for row in listed}, key=lambda name: int(name[3:]))
    cells = {(row["kinds"], row["arch"]): row for row in listed}
    versions = ", ".join(sorted({row["triton"] for row in listed}))
    lines = [
        "# The compiled kernel",
        "",
        "Written by `python -m prefetch_offload_kernels.compile_all`; the CSV file beside it has more columns. Each cell:",
        f"registers per thread, and warps per SM. {codes.BLOCK} elements per program, {codes.WARPS} warps; Triton {versions}. "
        f"{sum(row['spills'] != '0' for row in listed)} of {len(listed)} variants spill;",
        f"{sum(row['vectorised'] == 'True' for row in listed)} move full blocks in accesses of 16 bytes or more.",
        "",
        f"| variant | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kinds in dict.fromkeys(row["kinds"] for row in listed):
        row = (cells.get((kinds, arch)) for arch in architectures)
        lines.append(f"| {kinds} | " + " | ".join(f"{c['registers']}, {c['warps']}" if c else "" for c in row) + " |")
    out.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 1 when a variant spills or is not vectorised."""
    parser = argparse.ArgumentParser(prog="python -m prefetch_offload_kernels.compile_all", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="the table in Markdown; a CSV file is written beside it"
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args(arguments)
    results: list[Result] = []
    for capability in options.arch:
        for kinds in VARIANTS:
            result = inspect(kinds, capability)
            results.append(result)
            bad = "" if result.vectorised and not result.spills else "  <- spills or is not vectorised"
            print(f"{result.arch} {result.registers:3} registers  {result.kinds}{bad}", flush=True)
    new = {(r.kinds, r.arch): {name: str(value) for name, value in asdict(r).items()} for r in results}
    old = {(row["kinds"], row["arch"]): row for row in read_results(options.out.with_suffix(".csv"))}
    order = [(name_of(kinds), f"sm_{arch}") for arch in ARCHITECTURES for kinds in VARIANTS]
    merged = {**old, **new}
    write_results((merged[key] for key in order if key in merged), options.out)
    return int(any(r.spills or not r.vectorised for r in results))


if __name__ == "__main__":
    sys.exit(main())
