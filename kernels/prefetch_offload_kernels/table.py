"""What one launch is to do: a descriptor per tensor, and the table that the kernel reads.

A unit travels as one run of bytes, the *staging* buffer, and is used as another, the *target*. Scales travel with the unit:
they are float32 numbers somewhere in staging.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from . import codes
from .errors import TableError
from .packing import read_header

PACKED_BF16 = "packed_bf16"
"""The source "type" of weights that `pack_bf16` has packed."""

SOURCES = {
    torch.float32: codes.F32,
    torch.float16: codes.F16,
    torch.bfloat16: codes.BF16,
    torch.float8_e4m3fn: codes.E4M3,
    torch.float8_e5m2: codes.E5M2,
    torch.int8: codes.I8,
}
TARGETS = {dtype: code for dtype, code in SOURCES.items() if code < codes.TARGETS}
SCALABLE = frozenset(dtype for dtype, code in SOURCES.items() if code >= codes.E4M3)


@dataclass(frozen=True)
class Descriptor:
    """How one tensor gets from staging into its place.

    Equal types without a scale are copied, whatever they are, from and to any offset. Otherwise an offset has to be a
    multiple of its type's size; 16-byte accesses need both to be multiples of 16.

    Attributes:
        source_offset: bytes from the start of staging. For packed weights a multiple of 16.
        target_offset: bytes from the start of the target.
        elements: how many; 0 is allowed and does nothing.
        source: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8 or `PACKED_BF16`.
        target: float32, float16 or bfloat16; for a copy anything.
        scale_offset: where the float32 scales lie in staging, a multiple of 4; None: not scaled. Only for fp8 and int8:
            ``(value.to(float32) * scale).to(target)``.
        channel: elements that share a scale, one after the other: ``numel // shape[0]`` for one scale per row of dim 0.
            None: one scale for the whole tensor.
        packed_nbytes: bytes of the packed weights in staging; 0 for anything else.
        name: for messages.

    Raises:
        TableError: when no launch can do it.
    """

    source_offset: int
    target_offset: int
    elements: int
    source: torch.dtype | str
    target: torch.dtype
    scale_offset: int | None = None
    channel: int | None = None
    packed_nbytes: int = 0
    name: str = "a tensor"
    kind: int = field(init=False)

    def __post_init__(self) -> None:
        for label in ("source_offset", "target_offset", "elements", "scale_offset"):
            value = getattr(self, label)
            if value is not None and value < 0:
                raise TableError(f"{self.name}: {label}={value}. It counts from 0; give a number that is not negative.")
        object.__setattr__(self, "kind", self._kind())

    @classmethod
    def of_packed(
        cls, packed: torch.Tensor, source_offset: int, target_offset: int, name: str = "a tensor"
    ) -> Descriptor:
        """For weights packed by `pack_bf16`, of which `packed` is a copy on the host that lies at `source_offset`."""
        header = read_header(packed)
        return cls(
            source_offset,
            target_offset,
            header.elements,
            PACKED_BF16,
            torch.bfloat16,
            packed_nbytes=header.nbytes,
            name=name,
        )

    @property
    def source_nbytes(self) -> int:
        """Bytes read at `source_offset`."""
        return self.packed_nbytes if isinstance(self.source, str) else self.elements * self.source.itemsize

    @property
    def target_nbytes(self) -> int:
        """Bytes written at `target_offset`."""
        return self.elements * self.target.itemsize

    @property
    def scales(self) -> int:
        """How many float32 numbers lie at `scale_offset`."""
        if self.scale_offset is None or not self.elements:
            return 0
        return self.elements // (self.channel or self.elements)

    def _kind(self) -> int:
        if isinstance(self.source, str):
            return self._packed_kind()
        if self.packed_nbytes:
            raise TableError(
                f"{self.name}: packed_nbytes={self.packed_nbytes} with a source of {self.source}. Leave it out."
            )
        if self.source == self.target and self.scale_offset is None:
            if self.channel is not None:
                raise TableError(
                    f"{self.name}: channel={self.channel} without scale_offset. Leave it out, or say where."
                )
            return codes.COPY
        if self.source not in SOURCES or self.target not in TARGETS:
            raise TableError(
                f"{self.name}: from {self.source} to {self.target}. Kernels turn {', '.join(map(str, SOURCES))} into "
                f"{', '.join(map(str, TARGETS))}; anything else can only be copied: give the same type twice."
            )
        for label, offset, dtype in (
            ("source_offset", self.source_offset, self.source),
            ("target_offset", self.target_offset, self.target),
        ):
            if offset % dtype.itemsize:
                raise TableError(
                    f"{self.name}: {label}={offset} for {dtype}, whose elements lie at multiples of {dtype.itemsize} bytes. "
                    "Move the tensor; multiples of 16 are the fastest."
                )
        return codes.conversion(SOURCES[self.source], TARGETS[self.target], self._scaling())

    def _scaling(self) -> int:
        if self.scale_offset is None:
            if self.channel is not None:
                raise TableError(
                    f"{self.name}: channel={self.channel} without scale_offset. Leave it out, or say where."
                )
            return codes.UNSCALED
        if self.source not in SCALABLE:
            raise TableError(
                f"{self.name}: a scale for {self.source}. Scales belong to fp8 and int8; leave scale_offset out."
            )
        if self.scale_offset % 4:
            raise TableError(
                f"{self.name}: scale_offset={self.scale_offset}. Scales are float32: give a multiple of 4 bytes."
            )
        if self.channel is None:
            return codes.WIDE
        if self.channel < 1 or self.elements % self.channel:
            raise TableError(
                f"{self.name}: channel={self.channel} for {self.elements} elements, which is not a whole number of channels. "
                "Give numel // shape[0] for one scale per row."
            )
        if self.channel >= min(codes.BLOCK, self.elements):
            return codes.WIDE
        return codes.NARROW if self.channel % codes.GROUP else codes.GROUPED

    def _packed_kind(self) -> int:
        if self.source != PACKED_BF16 or self.target != torch.bfloat16:
            raise TableError(
                f"{self.name}: from {self.source!r} to {self.target}. Packed weights are {PACKED_BF16!r}, and bfloat16 after."
            )
        if self.scale_offset is not None or self.channel is not None:
            raise TableError(
                f"{self.name}: a scale for packed weights, which are exact. Leave scale_offset and channel out."
            )
        if self.source_offset % 16 or self.target_offset % 2:
            raise TableError(
                f"{self.name}: source_offset={self.source_offset}, target_offset={self.target_offset}. Packed weights begin "
                "at a multiple of 16 bytes, bfloat16 ones at a multiple of 2; move them."
            )
        if self.packed_nbytes < codes.HEADER_NBYTES:
            raise TableError(
                f"{self.name}: packed_nbytes={self.packed_nbytes} is less than their header. Use Descriptor.of_packed."
            )
        return codes.UNPACK


@dataclass(frozen=True)
class Table:
    """What `cast_unit` carries out in one launch.

    Attributes:
        descriptors: one per tensor.
        rows: int64 [len(descriptors), codes.COLUMNS], on the device.
        blocks: int32 [programs, 2], on the device: each program's row, and the channel in which its block begins.
        kinds: bit mask of the kinds that occur; the kernel is compiled for it.
        staging_nbytes: bytes of staging that are read, counted from its start.
        target_nbytes: bytes of the target up to the last that is written.
    """

    descriptors: tuple[Descriptor, ...]
    rows: torch.Tensor
    blocks: torch.Tensor
    kinds: int
    staging_nbytes: int
    target_nbytes: int

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def nbytes(self) -> int:
        """Device bytes of the table itself: 64 per tensor, and 8 for every 8192 elements."""
        return self.rows.nbytes + self.blocks.nbytes


def build_table(descriptors: Iterable[Descriptor], device: torch.device | str) -> Table:
    """The table of a unit, on `device`. Done once: it serves every transfer of the unit.

    Sources may overlap (tied weights). Raises TableError when targets do, since programs run in any order.
    """
    listed = tuple(descriptors)
    _check_disjoint(listed)
    rows = np.zeros((len(listed), codes.COLUMNS), dtype=np.int64)
    blocks, kinds, first = [np.zeros((0, 2), dtype=np.int32)], 0, 0
    for index, d in enumerate(listed):
        if not d.elements:
            continue
        channel = d.channel or d.elements
        block = codes.BLOCK
        elements = d.elements
        if d.kind == codes.COPY:
            block, elements = codes.COPY_BLOCK, d.source_nbytes
        programs = -(-elements // block)
        aligned = d.source_offset % 16 == 0 and d.target_offset % 16 == 0
        rows[index] = (
            d.kind | (codes.ALIGNED if aligned else 0),
            first,
            elements,
            d.source_offset,
            d.target_offset,
            d.scale_offset or 0,
            channel,
            -(-(1 << codes.RECIPROCAL_BITS) // channel),
        )
        starts = np.arange(programs, dtype=np.int64) * block
        own = np.empty((programs, 2), dtype=np.int32)
        own[:, 0] = index
        own[:, 1] = starts // channel if d.scale_offset is not None else 0
        blocks.append(own)
        kinds |= 1 << d.kind
        first += programs
    if first >= 1 << 31 or any(d.scales >= 1 << 31 for d in listed):
        raise TableError(
            f"{first} blocks, or as many scales: more than 2^31 - 1 in one launch. Cut the unit into several."
        )
    used = [d for d in listed if d.elements]
    return Table(
        descriptors=listed,
        rows=torch.from_numpy(rows).to(device),
        blocks=torch.from_numpy(np.concatenate(blocks)).to(device),
        kinds=kinds,
        staging_nbytes=max((_reads_to(d) for d in used), default=0),
        target_nbytes=max((d.target_offset + d.target_nbytes for d in used), default=0),
    )


def _reads_to(d: Descriptor) -> int:
    return max(d.source_offset + d.source_nbytes, (d.scale_offset or 0) + 4 * d.scales)


def _check_disjoint(descriptors: tuple[Descriptor, ...]) -> None:
    placed = sorted((d for d in descriptors if d.elements), key=lambda d: d.target_offset)
    for before, after in pairwise(placed):
        end = before.target_offset + before.target_nbytes
        if end > after.target_offset:
            raise TableError(
                f"{before.name} is written up to byte {end} of the target, and {after.name} from byte "
                f"{after.target_offset}: programs run in any order. Give every tensor a place of its own."
            )
