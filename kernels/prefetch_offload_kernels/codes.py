"""The numbers that the tables and the kernel share. Pure; no torch, no Triton.

A *kind* says what one row of a table asks for: a copy of bytes, the unpacking of packed bf16, or a conversion, which is
a source type, a target type and how it is scaled. The kernel is compiled for the set of kinds that a table contains, a
bit mask, so that a unit that is only unpacked does not carry the registers of fp8 decoding.
"""

from __future__ import annotations

# Source types. The first three are also target types.
F32, F16, BF16, E4M3, E5M2, I8 = range(6)
SOURCES = 6
TARGETS = 3

# How a conversion is scaled, by the number of elements that share a scale (a channel). WIDE: at least a block (one scale per
# tensor is one such channel), so that a block meets two scales at most. GROUPED: fewer, a multiple of GROUP: one look-up per
# 16-byte access. NARROW: any other number, a look-up per element.
UNSCALED, WIDE, GROUPED, NARROW = range(4)
SCALINGS = 4
GROUP = 16

# Kinds: a copy, unpacking, conversions between floating-point types, and those from one-byte types, scaled or not.
COPY = 0
UNPACK = 1
FIRST_PLAIN = 2
FIRST_BYTE = FIRST_PLAIN + E4M3 * TARGETS
KINDS = FIRST_BYTE + (SOURCES - E4M3) * TARGETS * SCALINGS

# Elements per program (8 warps, 32 elements per thread: two 16-byte loads per thread of one-byte sources, eight of
# fp32). Copies count 4 bytes as an element. It is also the block of the packed format, where it must never change.
BLOCK = 8192
COPY_BLOCK = 4 * BLOCK
WARPS = 8

# Columns of a table's rows, int64 each: the kind (and a flag, if full blocks of the tensor may be accessed 16 bytes at a
# time), its first program, its elements (bytes for copies), where it lies in staging and in the target, where its scales
# lie in staging, elements per scale, and the reciprocal of that: ceil(2^31 / channel).
KIND, FIRST, ELEMENTS, SOURCE, TARGET, SCALE, CHANNEL, RECIPROCAL = range(8)
COLUMNS = 8
ALIGNED = 1 << 8
RECIPROCAL_BITS = 31

# The packed format (packing.py describes it).
HEADER_NBYTES = 64
RECORD_HEADER_NBYTES = 32
RECORD_NBYTES = RECORD_HEADER_NBYTES + BLOCK + BLOCK // 2
ESCAPE = 15

SOURCE_NAMES = ("fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2", "int8")
SCALING_NAMES = ("", "*wide", "*grouped", "*narrow")


def conversion(source: int, target: int, scaling: int) -> int:
    """The kind of this conversion."""
    if source < E4M3:
        return FIRST_PLAIN + source * TARGETS + target
    return FIRST_BYTE + ((source - E4M3) * TARGETS + target) * SCALINGS + scaling


def parts(kind: int) -> tuple[int, int, int]:
    """Source, target and scaling of a conversion."""
    if kind < FIRST_BYTE:
        return (kind - FIRST_PLAIN) // TARGETS, (kind - FIRST_PLAIN) % TARGETS, UNSCALED
    rest = kind - FIRST_BYTE
    return E4M3 + rest // SCALINGS // TARGETS, rest // SCALINGS % TARGETS, rest % SCALINGS


def exists(kind: int) -> bool:
    """Whether tables may contain this kind: equal types are copied."""
    return kind < FIRST_PLAIN or parts(kind)[0] != parts(kind)[1]


def name(kind: int) -> str:
    """``copy``, ``unpack``, or ``fp8_e4m3fn*grouped->bf16``."""
    if kind < FIRST_PLAIN:
        return ("copy", "unpack")[kind]
    source, target, scaling = parts(kind)
    return f"{SOURCE_NAMES[source]}{SCALING_NAMES[scaling]}->{SOURCE_NAMES[target]}"
