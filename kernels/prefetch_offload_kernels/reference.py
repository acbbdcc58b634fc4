"""The same in PyTorch's own operators: the oracle of the kernel, and what runs where the kernel does not.

Works on every device that has these operators, a chunk at a time: beside the target it holds some 30 MB.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .codes import BLOCK, COPY, HEADER_NBYTES, RECORD_HEADER_NBYTES, RECORD_NBYTES, UNPACK
from .packing import fixed_nbytes, padded
from .table import Descriptor, Table

# Elements converted at a time, and blocks unpacked at a time.
_CHUNK = 1 << 20
_BLOCKS = 64
# Of temporaries for each of them: 64-bit indices, and a few of bytes.
_ELEMENT_NBYTES = 16


def cast_unit_reference(table: Table, staging: torch.Tensor, target: torch.Tensor) -> None:
    """Carries out `table` without Triton: writes `target` (uint8), reads `staging` (uint8)."""
    for d in table.descriptors:
        if not d.elements:
            continue
        if d.kind == COPY:
            _slice(target, d.target_offset, d.target_nbytes).copy_(_slice(staging, d.source_offset, d.source_nbytes))
        elif d.kind == UNPACK:
            unpack_reference(
                _slice(staging, d.source_offset, d.source_nbytes),
                d.elements,
                _slice(target, d.target_offset, d.target_nbytes),
            )
        else:
            _convert(d, staging, target)


def workspace_nbytes(table: Table) -> int:
    """Bytes of temporaries, at most."""
    sizes = [min(d.elements, _BLOCKS * BLOCK if d.kind == UNPACK else _CHUNK) for d in table.descriptors if d.kind != COPY]
    return _ELEMENT_NBYTES * max(sizes, default=0)


def _slice(buffer: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    return buffer[offset : offset + nbytes]


def _convert(d: Descriptor, staging: torch.Tensor, target: torch.Tensor) -> None:
    assert isinstance(d.source, torch.dtype)
    source = _slice(staging, d.source_offset, d.source_nbytes).view(d.source)
    result = _slice(target, d.target_offset, d.target_nbytes).view(d.target)
    if d.scale_offset is None:
        for begin in range(0, d.elements, _CHUNK):
            result[begin : begin + _CHUNK] = source[begin : begin + _CHUNK].to(d.target)
        return
    scales = _slice(staging, d.scale_offset, 4 * d.scales).view(torch.float32)
    channel = d.elements // d.scales
    source, result = source.view(d.scales, channel), result.view(d.scales, channel)
    for rows, columns in _tiles(d.scales, channel):
        value = source[rows, columns].to(torch.float32)
        result[rows, columns] = value.mul_(scales[rows, None]).to(d.target)


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cuts [rows, columns] into pieces of at most _CHUNK elements: runs of rows, or parts of one."""
    step = max(1, _CHUNK // columns)
    for row in range(0, rows, step):
        for column in range(0, columns, _CHUNK):
            yield slice(row, row + step), slice(column, column + _CHUNK)


def unpack_reference(packed: torch.Tensor, elements: int, target: torch.Tensor) -> None:
    """Unpacks `elements` bfloat16 from `packed`, exactly their bytes, into `target`, uint8 [2 * elements].

    Trusts what it reads (read_header checks it), and does not wait for the device.
    """
    full, rest = divmod(elements, BLOCK)
    escapes = (packed.numel() - fixed_nbytes(elements)) // 4
    for first in range(0, full, _BLOCKS):
        _unpack_blocks(packed, first, min(_BLOCKS, full - first), BLOCK, target)
    if rest:
        _unpack_blocks(packed, full, 1, rest, target)
    if not escapes:
        return
    counts = _records(packed, 0, full, BLOCK)[:, 24:28]
    if rest:
        counts = torch.cat((counts, _records(packed, full, 1, rest)[:, 24:28]))
    counts = counts.contiguous().view(torch.int32).view(-1)
    starts = torch.arange(counts.numel(), device=packed.device) * BLOCK
    block_start = torch.repeat_interleave(starts, counts, output_size=escapes)
    entries = packed[fixed_nbytes(elements) :].view(torch.int32)
    target.view(-1, 2)[block_start + (entries & 0xFFFF)] = entries.view(torch.uint8).view(-1, 4)[:, 2:]


def _records(packed: torch.Tensor, first: int, rows: int, size: int) -> torch.Tensor:
    """Records from number `first` on, of blocks of `size` elements: a view, uint8 [rows, bytes of each]."""
    nbytes = RECORD_HEADER_NBYTES + padded(size) * 3 // 2
    return _slice(packed, HEADER_NBYTES + first * RECORD_NBYTES, rows * nbytes).view(rows, nbytes)


def _unpack_blocks(packed: torch.Tensor, first: int, rows: int, size: int, target: torch.Tensor) -> None:
    """`rows` blocks of `size` elements from number `first` on, without their escapes."""
    records = _records(packed, first, rows, size)
    words = padded(size) // 8
    exponents = records[:, :16]
    streams = records[:, RECORD_HEADER_NBYTES:]
    # packing.py says how the quarters are interleaved; here they come apart again, into memory order
    signs = streams[:, : 8 * words].view(rows, 2, words, 2, 2).permute(0, 1, 4, 2, 3).reshape(rows, -1)[:, :size]
    pairs = streams[:, 8 * words :].view(rows, words, 4).permute(0, 2, 1)
    code = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(rows, -1)[:, :size]
    exponent = exponents.gather(1, code.long())
    result = _slice(target, 2 * BLOCK * first, 2 * rows * size).view(rows, size, 2)
    result[..., 0] = (signs & 0x7F) | (exponent << 7)  # uint8: only the exponent's lowest bit stays
    result[..., 1] = (signs & 0x80) | (exponent >> 1)
