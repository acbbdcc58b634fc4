"""Lossless packing of bfloat16 weights: about 12.03 bits instead of 16, exact for every bit pattern.

Trained weights, like samples of a normal distribution, use few of bfloat16's 256 exponents: the 15 commonest of a block
cover all but about one element in ten thousand. A 4-bit code stands for the exponent; sign and mantissa, which look
like noise, stay as a byte. (Ideas of this family: DFloat11, arXiv:2504.11651; ZipNN, arXiv:2411.05239; NeuZip,
arXiv:2410.20650. A fixed code of 4 bits costs about a bit more than an entropy code, and unpacks in a handful of
instructions per element without reading anything twice.)

Not for float16: its exponent has 5 bits, of which normal weights use most values, so that a 4-bit code would save one bit
in sixteen before its overhead. Its other 11 bits do not pack at all.

Format, version 1, all numbers little-endian::

    header, 64 bytes
      0   8 bytes   magic, b"PFOBF16\\0"
      8   uint32    version, 1
      12  uint32    elements per block, 8192
      16  int64     elements, n
      24  int64     bytes in all, with header and escapes
      32  int64     escapes in all
      40  24 bytes  0
    one record per block of 8192 elements, one after the other; the last one may be shorter
      0   15 bytes  the exponents of codes 0 to 14, commonest first, the smaller first where equally common
      15  1 byte    0
      16  int64     where the block's escapes begin, in bytes from the start of the header
      24  uint32    how many there are
      28  uint32    0
      32  p/2 bytes sign-and-mantissa bytes of quarters 0 and 1, in the order q0[0] q1[0] q0[1] q1[1] q0[2] ...
          p/2 bytes of quarters 2 and 3, likewise
          p/2 bytes codes, a byte for two elements, the earlier in the low nibble: q0[0:2] q1[0:2] q2[0:2] q3[0:2] q0[2:4] ...
    escapes, 4 bytes each, by block and position
      0   uint16    position in the block
      2   uint16    the element

p is the number of elements in the block rounded up to a multiple of 64, a quarter is p/4 of them, and padding is 0. The sign is
bit 7 of its byte. Code 15 means that the element is an escape. The interleaving lets a 4-byte word of each stream become
words of two neighbouring elements by masks and shifts alone, with 16-byte loads and stores.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .codes import BLOCK, ESCAPE, HEADER_NBYTES, RECORD_HEADER_NBYTES, RECORD_NBYTES
from .errors import FormatError

MAGIC = b"PFOBF16\0"
VERSION = 1
_HEADER = struct.Struct("<8sIIqqq24x")

# Blocks packed at a time: half a million elements, whose intermediates stay in a core's cache.
_CHUNK = 64
# Of temporaries for each of them, on the device that packs: measured 12, and for allocators' rounding.
_ELEMENT_NBYTES = 16


@dataclass(frozen=True)
class PackedHeader:
    """What the first 64 bytes of packed weights say."""

    elements: int
    nbytes: int
    escapes: int


@dataclass(frozen=True)
class Survey:
    """What packing a tensor would give: the first of two passes. About 0.2 per cent of the tensor's size.

    Attributes:
        elements: of the tensor.
        exponents: uint8 [blocks, 15]: the tables.
        escapes: int64 [blocks]: elements outside of the block's table.
    """

    elements: int
    exponents: torch.Tensor
    escapes: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Exact size of the packed weights."""
        return fixed_nbytes(self.elements) + 4 * int(self.escapes.sum())

    @property
    def ratio(self) -> float:
        """Packed bytes per byte; of an empty tensor infinite."""
        return self.nbytes / (2 * self.elements) if self.elements else float("inf")


def padded(elements: int) -> int:
    """Elements that a record of so many holds: a multiple of 64."""
    return -(-elements // 64) * 64


def fixed_nbytes(elements: int) -> int:
    """Bytes before the escapes."""
    full, rest = divmod(elements, BLOCK)
    last = RECORD_HEADER_NBYTES + padded(rest) * 3 // 2 if rest else 0
    return HEADER_NBYTES + full * RECORD_NBYTES + last


def packing_workspace_nbytes(elements: int) -> int:
    """Bytes that packing a tensor of so many elements takes meanwhile where it is computed, at most."""
    return _ELEMENT_NBYTES * min(elements, _CHUNK * BLOCK) + (64 << 10)


def read_header(packed: torch.Tensor) -> PackedHeader:
    """The header of packed weights in host memory.

    Raises:
        FormatError: when they are not, are cut short, or are of another version.
    """
    data = packed[:HEADER_NBYTES].cpu().numpy().tobytes()
    if len(data) < HEADER_NBYTES or data[:8] != MAGIC:
        raise FormatError(f"{packed.numel()} bytes that begin with {data[:8]!r}: not weights packed by pack_bf16.")
    _, version, block, elements, nbytes, escapes = _HEADER.unpack(data)
    if (version, block) != (VERSION, BLOCK):
        raise FormatError(
            f"Packed weights of version {version} in blocks of {block}; this reads version {VERSION} in blocks of {BLOCK}. "
            "Pack them again."
        )
    if nbytes != fixed_nbytes(elements) + 4 * escapes or packed.numel() < nbytes:
        raise FormatError(
            f"{packed.numel()} bytes of packed weights that should have {nbytes}: cut short. Pack them again."
        )
    return PackedHeader(elements, nbytes, escapes)


def survey_bf16(tensor: torch.Tensor, device: torch.device | str | None = None) -> Survey:
    """Counts exponents, a chunk at a time, on `device` (None: where the tensor is).

    Raises:
        TypeError: for another type than bfloat16.
        ValueError: when the tensor is not contiguous: the caller knows in which order its memory is to be packed.
    """
    flat = _flat(tensor)
    blocks = -(-flat.numel() // BLOCK)
    exponents = torch.empty((blocks, ESCAPE), dtype=torch.uint8)
    escapes = torch.empty(blocks, dtype=torch.int64)
    for first, chunk in _chunks(flat, device):
        rows, size = chunk.shape
        counts = torch.bincount(_exponent_index(chunk), minlength=rows * 256).view(rows, 256)
        # Unique keys, so that the choice does not depend on the device's way of sorting equal ones.
        keys = counts * 256 + torch.arange(255, -1, -1, device=chunk.device)
        top = keys.topk(ESCAPE, dim=1).indices
        exponents[first : first + rows] = top.to(torch.uint8).cpu()
        escapes[first : first + rows] = (size - counts.gather(1, top).sum(1)).cpu()
    return Survey(flat.numel(), exponents, escapes)


def pack_bf16(
    tensor: torch.Tensor,
    *,
    limit: float = 0.95,
    device: torch.device | str | None = None,
    survey: Survey | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Packs a contiguous bfloat16 tensor, a chunk at a time.

    Beside the result it holds about 20 MB. The same input gives the same bytes on every device.

    Args:
        tensor: any shape; elements are taken in memory order.
        limit: give up when the result would have more than so many bytes per byte.
        device: where to compute; None: where the tensor is. An accelerator does it at about its link's speed.
        survey: of this tensor, when there is one already.
        out: uint8 [at least survey.nbytes], to be filled; None: new host memory.

    Returns:
        uint8 [nbytes] (a view of `out` if it was given), or None above the limit.

    Raises:
        TypeError, ValueError: as survey_bf16.
        ValueError: when `out` is too small, or `survey` is not one of this tensor.
    """
    flat = _flat(tensor)
    survey = survey_bf16(flat, device) if survey is None else survey
    if survey.elements != flat.numel():
        raise ValueError(f"A survey of {survey.elements} elements for {flat.numel()}. Survey this tensor.")
    if survey.ratio > limit:
        return None
    if out is None:
        out = torch.empty(survey.nbytes, dtype=torch.uint8)
    elif out.dtype != torch.uint8 or out.dim() != 1 or out.numel() < survey.nbytes:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}; give uint8 [{survey.nbytes}] or more (survey.nbytes)."
        )
    out = out[: survey.nbytes]
    header = _HEADER.pack(MAGIC, VERSION, BLOCK, flat.numel(), survey.nbytes, int(survey.escapes.sum()))
    out[:HEADER_NBYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    listed = fixed_nbytes(flat.numel()) + 4 * torch.cumsum(survey.escapes, 0)  # where each block's escapes end
    for first, chunk in _chunks(flat, device):
        rows = chunk.shape[0]
        counts = survey.escapes[first : first + rows]
        ends = listed[first : first + rows]
        records, escapes = _pack_chunk(chunk, survey.exponents[first : first + rows].to(chunk.device))
        if escapes.numel() != int(counts.sum()):
            raise ValueError("The survey is not one of this tensor, or the tensor has changed since. Survey it again.")
        nbytes = records.shape[1]
        begin = HEADER_NBYTES + first * RECORD_NBYTES
        placed = out[begin : begin + rows * nbytes].view(rows, nbytes)
        placed.copy_(records)
        fields = torch.zeros((rows, 2), dtype=torch.int64)
        fields[:, 0] = ends - 4 * counts
        fields[:, 1] = counts
        placed[:, 16:32] = fields.view(torch.uint8)
        begin = int(ends[0] - 4 * counts[0])
        out[begin : int(ends[-1])] = escapes.view(torch.uint8)
    return out


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.bfloat16:
        raise TypeError(
            f"A tensor of {tensor.dtype}: only bfloat16 packs (fp16's exponents do not). Leave it as it is."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"A tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}, which is not contiguous. "
            "Pass its memory as a contiguous view."
        )
    return tensor.detach().reshape(-1)


def _chunks(flat: torch.Tensor, device: torch.device | str | None) -> Iterator[tuple[int, torch.Tensor]]:
    """(first block, int16 bit patterns [blocks, elements each]) of runs of whole blocks, and of the last partial one."""
    bits = flat.view(torch.int16)
    full, rest = divmod(flat.numel(), BLOCK)
    for first in range(0, full, _CHUNK):
        last = min(first + _CHUNK, full)
        yield first, bits[first * BLOCK : last * BLOCK].to(device or flat.device).view(last - first, BLOCK)
    if rest:
        yield full, bits[full * BLOCK :].to(device or flat.device).view(1, rest)


def _exponent_index(chunk: torch.Tensor) -> torch.Tensor:
    """256 * row + exponent, int32 [elements], of the int16 bit patterns [rows, size]."""
    exponents = (chunk >> 7).to(torch.uint8)  # cuts the sign off
    rows = torch.arange(chunk.shape[0], dtype=torch.int32, device=chunk.device) * 256
    return exponents.to(torch.int32).add_(rows[:, None]).view(-1)


def _pack_chunk(chunk: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Records uint8 [rows, nbytes] without the fields about escapes; and the escapes, int32, of int16 bits [rows, size]."""
    rows, size = chunk.shape
    codes = torch.full((rows, 256), ESCAPE, dtype=torch.uint8, device=chunk.device)
    order = torch.arange(ESCAPE, dtype=torch.uint8, device=chunk.device).expand(rows, ESCAPE)
    codes.scatter_(1, exponents.long(), order)
    code = codes.view(-1).index_select(0, _exponent_index(chunk)).view(rows, size)
    fill = padded(size) - size
    if fill:
        chunk = torch.nn.functional.pad(chunk, (0, fill))
        code = torch.nn.functional.pad(code, (0, fill))
    row, position = _find_escapes(code)
    escapes = position.to(torch.int32) | (chunk[row, position].to(torch.int32) << 16)
    words = padded(size) // 8
    records = torch.zeros((rows, RECORD_HEADER_NBYTES + 12 * words), dtype=torch.uint8, device=chunk.device)
    records[:, :ESCAPE] = exponents
    streams = records[:, RECORD_HEADER_NBYTES:]
    # Two quarters side by side, as the bytes of 16-bit words: an int16 per pair is quicker than moving bytes.
    signs = ((chunk >> 8) & 0x80) | (chunk & 0x7F)
    quarters = signs.view(rows, 2, 2, 2 * words)
    halves = streams[:, : 8 * words].view(torch.int16).view(rows, 2, 2 * words)
    torch.bitwise_or(quarters[:, :, 0], quarters[:, :, 1] << 8, out=halves)
    pairs = code.view(torch.int16)  # little-endian: the earlier code in the low byte
    nibbles = (pairs | (pairs >> 4)).to(torch.uint8).view(rows, 4, words)
    streams[:, 8 * words :].view(rows, words, 4).copy_(nibbles.permute(0, 2, 1))
    return records, escapes


def _find_escapes(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions, in order, of code 15 in uint8 [rows, a multiple of 8]; eight codes at a time, as few are."""
    marks = (code.view(torch.int64) + 0x0101010101010101) & 0x1010101010101010
    row, word = marks.nonzero(as_tuple=True)
    found, byte = (code.view(code.shape[0], -1, 8)[row, word] == ESCAPE).nonzero(as_tuple=True)
    return row[found], word[found] * 8 + byte
