"""The Triton kernel: one launch turns a unit as it travelled into the unit as it is used.

One program handles one block of one tensor. A precomputed map gives it its row of the table, so that nothing is
searched, and programs share nothing. The kernel is bound by memory: every full block of an aligned tensor is read and
written with 16 bytes per access, everything else (tails, tensors at odd offsets) through masked accesses of one element.

Offsets are 64 bits wide, positions inside a block 32. Alignment is not promised by a hint but computed, as a number of
16-byte words times 16: a hint in Triton marks the value itself, also where the other branch uses it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codes

# Triton reads globals only if they are constexpr. Arithmetic on them stays simple: the interpreter passes a kernel's own
# constexpr arguments as plain numbers, and `number & constexpr` is not defined.
F32, F16, BF16 = tl.constexpr(codes.F32), tl.constexpr(codes.F16), tl.constexpr(codes.BF16)
E4M3, E5M2, I8 = tl.constexpr(codes.E4M3), tl.constexpr(codes.E5M2), tl.constexpr(codes.I8)
TARGETS, SCALINGS = tl.constexpr(codes.TARGETS), tl.constexpr(codes.SCALINGS)
UNSCALED, WIDE, GROUPED = tl.constexpr(codes.UNSCALED), tl.constexpr(codes.WIDE), tl.constexpr(codes.GROUPED)
GROUP = tl.constexpr(codes.GROUP)
COPY, UNPACK = tl.constexpr(codes.COPY), tl.constexpr(codes.UNPACK)
ALL_KINDS = tl.constexpr(codes.KINDS)
FIRST_PLAIN, FIRST_BYTE = tl.constexpr(codes.FIRST_PLAIN), tl.constexpr(codes.FIRST_BYTE)
COLUMNS = tl.constexpr(codes.COLUMNS)
# Triton's interpreter cuts float32 off to make bfloat16 of it; the hardware's instruction rounds.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FIRST, ELEMENTS = tl.constexpr(codes.FIRST), tl.constexpr(codes.ELEMENTS)
SOURCE, TARGET = tl.constexpr(codes.SOURCE), tl.constexpr(codes.TARGET)
SCALE, CHANNEL = tl.constexpr(codes.SCALE), tl.constexpr(codes.CHANNEL)
RECIPROCAL, RECIPROCAL_BITS = tl.constexpr(codes.RECIPROCAL), tl.constexpr(codes.RECIPROCAL_BITS)
ALIGNED = tl.constexpr(codes.ALIGNED)
HEADER_NBYTES = tl.constexpr(codes.HEADER_NBYTES)
RECORD_HEADER_NBYTES = tl.constexpr(codes.RECORD_HEADER_NBYTES)
RECORD_NBYTES = tl.constexpr(codes.RECORD_NBYTES)


@triton.jit
def _words(offset):
    """A byte offset that is known to be a multiple of 16, in a form that lets the compiler see it."""
    return (offset >> 4) * 16


@triton.jit
def _at(base, offset, TYPE: tl.constexpr):
    """The byte pointer `base` + `offset` as a pointer to TYPE."""
    return (base + offset).to(tl.pointer_type(TYPE), bitcast=True)


@triton.jit
def _load(pointers, index, size, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=index < size, other=0)


@triton.jit
def _store(pointers, index, value, size, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=index < size)


@triton.jit
def _read(staging, offset, index, size, TYPE: tl.constexpr, FULL: tl.constexpr):
    """The block's source values as float32, exactly; a NaN stays one."""
    if TYPE == F32:
        value = _load(_at(staging, offset, tl.float32) + index, index, size, FULL)
    elif TYPE == F16:
        value = _load(_at(staging, offset, tl.float16) + index, index, size, FULL).to(tl.float32)
    elif TYPE == BF16:
        # the upper half of a float32
        bits = _load(_at(staging, offset, tl.uint16) + index, index, size, FULL).to(tl.uint32) << 16
        value = bits.to(tl.float32, bitcast=True)
    elif TYPE == I8:
        value = _load(_at(staging, offset, tl.int8) + index, index, size, FULL).to(tl.float32)
    else:
        # Exponent and mantissa in float32's places are the value times 2^(bias - 127), subnormals included, and scaling by a
        # power of two is exact. What fills the exponent (e5m2) or all of it (e4m3fn) is made infinite or NaN first. The sign
        # comes along as the copies of it in front of a negative int8.
        bits = _load(_at(staging, offset, tl.int8) + index, index, size, FULL).to(tl.int32)
        if TYPE == E5M2:
            word = (bits << 21) & -0x70200000  # 0x8FE00000
            special = tl.where((bits & 0x7C) == 0x7C, 0x7F800000, 0)
            power = 5.192296858534828e33  # 2^(127 - 15)
        else:
            word = (bits << 20) & -0x78100000  # 0x87F00000
            special = tl.where((bits & 0x7F) == 0x7F, 0x7FC00000, 0)
            power = 1.329227995784916e36  # 2^(127 - 7)
        value = (word | special).to(tl.float32, bitcast=True) * power
    return value


@triton.jit
def _write(target, offset, index, value, size, TYPE: tl.constexpr, FULL: tl.constexpr):
    """Rounds to nearest, ties to even, as PyTorch does."""
    if TYPE == F32:
        _store(_at(target, offset, tl.float32) + index, index, value, size, FULL)
    elif TYPE == F16:
        _store(_at(target, offset, tl.float16) + index, index, value.to(tl.float16), size, FULL)
    elif INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FFF).to(tl.uint16)  # the others are NaN
        _store(_at(target, offset, tl.uint16) + index, index, rounded, size, FULL)
    else:
        _store(_at(target, offset, tl.bfloat16) + index, index, value.to(tl.bfloat16), size, FULL)


@triton.jit
def _channel(row, begun, position):
    """(begun + position) // channel, int32, counted from the block's first channel, `begun` elements of which came before.

    By multiplication: Granlund and Montgomery, "Division by invariant integers using multiplication" (1994). Exact here: the
    dividend is below 2^14, and the reciprocal times channel exceeds 2^31 by less than channel, which is below 2^13.
    """
    dividend = (begun.to(tl.int32) + position).to(tl.int64)
    return (dividend * tl.load(row + RECIPROCAL) >> RECIPROCAL_BITS).to(tl.int32)


@triton.jit
def _scaled(
    value,
    staging,
    row,
    channel_first,
    start,
    position,
    size,
    SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """`value` (float32) times the scales of the elements at `position` of a block that begins in channel `channel_first`."""
    scales = _at(staging, tl.load(row + SCALE), tl.float32) + channel_first
    channel = tl.load(row + CHANNEL)
    begun = start - channel_first * channel
    if SCALING == WIDE:
        left = tl.minimum(channel - begun, size).to(tl.int32)  # of the first channel in this block
        here = tl.load(scales)
        after = tl.load(scales + 1, mask=left < size, other=0.0)
        value *= tl.where(position < left, here, after)
    elif FULL and SCALING == GROUPED:
        groups = tl.load(scales + _channel(row, begun, tl.arange(0, BLOCK // GROUP) * GROUP))
        value = tl.reshape(tl.reshape(value, (BLOCK // GROUP, GROUP)) * groups[:, None], (BLOCK,))
    else:
        value *= _load(scales + _channel(row, begun, position), position, size, FULL)
    return value


@triton.jit
def _convert(staging, target, row, block, channel_first, KIND: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    # codes.parts
    PLAIN: tl.constexpr = KIND < FIRST_BYTE
    PAIR: tl.constexpr = KIND - FIRST_PLAIN if PLAIN else (KIND - FIRST_BYTE) // SCALINGS
    SOURCE_TYPE: tl.constexpr = PAIR // TARGETS if PLAIN else E4M3 + PAIR // TARGETS
    TARGET_TYPE: tl.constexpr = PAIR % TARGETS
    SCALING: tl.constexpr = UNSCALED if PLAIN else (KIND - FIRST_BYTE) % SCALINGS
    SOURCE_SIZE: tl.constexpr = 4 if SOURCE_TYPE == F32 else 2 if SOURCE_TYPE <= BF16 else 1
    TARGET_SIZE: tl.constexpr = 4 if TARGET_TYPE == F32 else 2
    STEP: tl.constexpr = BLOCK // 8
    start = block * BLOCK
    source_offset = tl.load(row + SOURCE)
    target_offset = tl.load(row + TARGET)
    if FULL:
        source_offset = _words(source_offset) + start * SOURCE_SIZE
        target_offset = _words(target_offset) + start * TARGET_SIZE
        position = tl.arange(0, BLOCK)
        value = _read(staging, source_offset, position, BLOCK, SOURCE_TYPE, FULL)
        if SCALING != UNSCALED:
            value = _scaled(value, staging, row, channel_first, start, position, BLOCK, SCALING, BLOCK, FULL)
        _write(target, target_offset, position, value, BLOCK, TARGET_TYPE, FULL)
    else:
        # Step by step, so that tails do not set the kernel's number of registers. Not a `for`: with NumPy 2.4, interpreters
        # before Triton 3.9 cannot make a range of a loaded number.
        source_offset += start * SOURCE_SIZE
        target_offset += start * TARGET_SIZE
        size = tl.minimum(tl.load(row + ELEMENTS) - start, BLOCK).to(tl.int32)
        begin = 0
        while begin < size:
            position = begin + tl.arange(0, STEP)
            value = _read(staging, source_offset, position, size, SOURCE_TYPE, FULL)
            if SCALING != UNSCALED:
                value = _scaled(value, staging, row, channel_first, start, position, size, SCALING, BLOCK, FULL)
            _write(target, target_offset, position, value, size, TARGET_TYPE, FULL)
            begin += STEP


@triton.jit
def _copy(staging, target, row, block, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """BLOCK words of 4 bytes; the row counts bytes."""
    start = block * (4 * BLOCK)
    source_offset = tl.load(row + SOURCE) + start
    target_offset = tl.load(row + TARGET) + start
    if FULL:
        index = tl.arange(0, BLOCK)
        words = tl.load(_at(staging, _words(source_offset), tl.int32) + index)
        tl.store(_at(target, _words(target_offset), tl.int32) + index, words)
    else:
        size = tl.minimum(tl.load(row + ELEMENTS) - start, 4 * BLOCK).to(tl.int32)
        begin = 0
        while begin < size:
            index = begin + tl.arange(0, BLOCK // 2)
            values = _load(staging + source_offset + index, index, size, FULL)
            _store(target + target_offset + index, index, values, size, FULL)
            begin += BLOCK // 2


@triton.jit
def _pair(exponents, signs, code_words, SHIFT: tl.constexpr):
    """Two bf16 in a word, from their sign-and-mantissa bytes (bits 0-7 and 16-23) and the codes at SHIFT and SHIFT + 4."""
    low = tl.load(exponents + ((code_words >> SHIFT) & 15)).to(tl.uint32)
    high = tl.load(exponents + ((code_words >> (SHIFT + 4)) & 15)).to(tl.uint32)
    # 0xSM * 0x101 = 0xSMSM: the sign in bit 15, the mantissa in bits 0-6; the halves do not reach into each other
    return ((signs * 0x101) & 0x807F807F) | (low << 7) | (high << 23)


@triton.jit
def _write_pairs(target, offset, begin, index, words, pairs, size, FULL: tl.constexpr):
    """Stores words `index` of the quarter of `words` words that begins at element `begin`; tails element by element."""
    if FULL:
        tl.store(_at(target, offset + begin * 2, tl.uint32) + index, pairs)
    else:
        elements = _at(target, offset, tl.uint16)
        first = begin + 2 * index
        inside = index < words
        tl.store(elements + first, pairs.to(tl.uint16), mask=inside & (first < size))
        tl.store(elements + first + 1, (pairs >> 16).to(tl.uint16), mask=inside & (first + 1 < size))


@triton.jit
def _unpack_words(record, target, target_offset, index, quarter, size, FULL: tl.constexpr):
    """Words `index` of a record's three streams: eight elements each, two in every quarter of the block."""
    words = quarter // 2
    stream = _at(record, RECORD_HEADER_NBYTES, tl.uint32)
    code_words = _load(stream + 2 * words + index, index, words, FULL)
    first = _load(stream + index, index, words, FULL)
    second = _load(stream + words + index, index, words, FULL)
    pairs = _pair(record, first & 0x00FF00FF, code_words, 0)
    _write_pairs(target, target_offset, 0, index, words, pairs, size, FULL)
    pairs = _pair(record, (first >> 8) & 0x00FF00FF, code_words, 8)
    _write_pairs(target, target_offset, quarter, index, words, pairs, size, FULL)
    pairs = _pair(record, second & 0x00FF00FF, code_words, 16)
    _write_pairs(target, target_offset, 2 * quarter, index, words, pairs, size, FULL)
    pairs = _pair(record, (second >> 8) & 0x00FF00FF, code_words, 24)
    _write_pairs(target, target_offset, 3 * quarter, index, words, pairs, size, FULL)


@triton.jit
def _unpack(staging, target, row, block, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """One record of packed bf16: packing.py describes the bytes."""
    packed = staging + _words(tl.load(row + SOURCE))
    record = packed + HEADER_NBYTES + block * RECORD_NBYTES
    start = block * BLOCK
    target_offset = tl.load(row + TARGET)
    size = tl.minimum(tl.load(row + ELEMENTS) - start, BLOCK).to(tl.int32)
    escapes = tl.load(_at(record, 16, tl.int64))
    escaped = tl.load(_at(record, 24, tl.int32))
    if FULL:
        target_offset = _words(target_offset) + start * 2
        _unpack_words(record, target, target_offset, tl.arange(0, BLOCK // 8), BLOCK // 4, size, FULL)
    else:
        target_offset += start * 2
        quarter = (size + 63) // 64 * 16
        begin = 0
        while begin < quarter // 2:
            index = begin + tl.arange(0, BLOCK // 32)
            _unpack_words(record, target, target_offset, index, quarter, size, FULL)
            begin += BLOCK // 32
    if escaped > 0:
        # Only this program writes these elements, twice: a barrier orders the stores of its threads.
        tl.debug_barrier()
        elements = _at(target, target_offset, tl.uint16)
        entries = _at(packed, escapes, tl.uint32)
        begin = 0
        while begin < escaped:
            index = begin + tl.arange(0, BLOCK // 32)
            entry = _load(entries + index, index, escaped, False)
            position = (entry & 0xFFFF).to(tl.int32)
            # the second condition keeps damaged bytes from writing elsewhere
            inside = (index < escaped) & (position < size)
            tl.store(elements + position, (entry >> 16).to(tl.uint16), mask=inside)
            begin += BLOCK // 32


@triton.jit
def unit_kernel(staging, target, rows, blocks, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """Carries out a table: every program its block.

    Args:
        staging: uint8, the unit as it travelled; its address a multiple of 16.
        target: uint8, the unit as it is used; likewise.
        rows: int64 [n, COLUMNS].
        blocks: int32 [programs, 2]: the program's row, and the channel in which its block begins.
        KINDS: bit mask of the kinds that occur in `rows`.
        BLOCK: codes.BLOCK.
    """
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(blocks + 2 * program).to(tl.int64) * COLUMNS
    channel_first = tl.load(blocks + 2 * program + 1).to(tl.int64)
    flags = tl.load(row)
    kind = flags & (ALIGNED - 1)
    block = program - tl.load(row + FIRST)
    left = tl.load(row + ELEMENTS) - block * BLOCK
    full = (flags >= ALIGNED) & (left >= BLOCK)
    for code in tl.static_range(ALL_KINDS):
        if (KINDS >> code) & 1:  # noqa: SIM102 - asked while compiling, the next line while running
            if kind == code:
                if code == COPY:
                    if (flags >= ALIGNED) & (left - block * (3 * BLOCK) >= 4 * BLOCK):
                        _copy(staging, target, row, block, BLOCK, True)
                    else:
                        _copy(staging, target, row, block, BLOCK, False)
                elif code == UNPACK:
                    if full:
                        _unpack(staging, target, row, block, BLOCK, True)
                    else:
                        _unpack(staging, target, row, block, BLOCK, False)
                elif full:
                    _convert(staging, target, row, block, channel_first, code, BLOCK, True)
                else:
                    _convert(staging, target, row, block, channel_first, code, BLOCK, False)
