"""How a component is cut into units, and where each tensor lies in its unit. Specs in, specs out; no torch.

A *unit* is the smallest thing moved together. It is one contiguous range of bytes on the host and, while it is
resident, one on the device, so that moving it is one copy. A unit is a child of a ModuleList (a transformer or resnet
block) or what lies between two of them; small neighbours are joined and large ones split at tensor boundaries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# CUDA's caching allocator hands out multiples of 512 bytes; cuBLASLt distinguishes alignments up to 256. With 256 a
# tensor inside a unit meets the same kernels as one allocated alone, and takes no more memory.
ALIGNMENT = 256

# CUDA's caching allocator again: what is smaller than `_SEGMENT_FROM` is cut out of larger segments; what is not gets one of
# its own, a multiple of `_SEGMENT`, and all of that unless more than `_LEFT` of it would be over.
DEVICE_GRAIN = 512
_SEGMENT_FROM, _SEGMENT, _LEFT = 10 << 20, 2 << 20, 1 << 20


@dataclass(frozen=True)
class Extent:
    """A run of bytes that must stay together: one tensor, or several that share storage.

    Attributes:
        name: the qualified name of its first tensor (``down_blocks.0.resnets.1.conv1.weight``).
        nbytes: its size.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class Placement:
    """Extent number `extent` lies at byte `offset` of its unit."""

    extent: int
    offset: int


@dataclass(frozen=True)
class UnitLayout:
    """One unit: `nbytes` bytes, a multiple of ALIGNMENT, holding `placements` in ascending, disjoint order."""

    name: str
    nbytes: int
    placements: tuple[Placement, ...]


def align(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def device_nbytes(nbytes: int) -> int:
    """Bytes that CUDA's caching allocator takes, and counts, for a tensor of `nbytes` that comes from new memory.

    Asking for as many takes no more, and any memory that is used again for them counts the same: blocks of these sizes replace
    one another without a remainder that nobody could use.
    """
    cut_out = align(nbytes, DEVICE_GRAIN)
    alone = align(nbytes, _SEGMENT)
    return alone if cut_out >= _SEGMENT_FROM and alone - cut_out <= _LEFT else cut_out


_BLOCK = re.compile(r"^((?:.*\.)?\d+)\.")


def block_of(name: str) -> str:
    """The innermost numbered child in a qualified name (``blocks.3``), or ``""`` for a tensor outside of any."""
    match = _BLOCK.match(name)
    return match.group(1) if match else ""


# What diffusers' blocks define list by list, and call in turns: the first of each list, then the second of each.
_TURNS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
# What is defined in another order than it is called in: a U-Net's middle, and that of a VAE's decoder.
_MIDDLE, _BEHIND = "mid_block", "up_blocks"


def order_of_use(names: Sequence[str]) -> list[int]:
    """Indices of a component's tensors in the order in which they are used, as far as names tell; else as they are given.

    In that order, a unit with the end of one block and the beginning of another is read once in a pass, and can leave. In
    the order of definition a U-Net's would hold the end of its last attention and its first resnet, and stay for all
    that comes in between.

    Args:
        names: qualified, in definition order.
    """
    places: dict[tuple[str, ...], int] = {}  # of a module, or of all that its parent calls in turns, among its siblings
    for name in names:
        path = name.split(".")
        for depth, part in enumerate(path):
            places.setdefault(_place(path, depth, part), len(places))

    def key(name: str) -> list[tuple[float, ...]]:
        path = name.split(".")
        found: list[tuple[float, ...]] = []
        for depth, part in enumerate(path):
            place: float = places[_place(path, depth, part)]
            if part == _MIDDLE:
                place = min(place, places.get(_place(path, depth, _BEHIND), math.inf) - 0.5)
            if part not in _TURNS:
                found.append((place,))
                continue
            number = path[depth + 1] if depth + 1 < len(path) else ""
            found.append((place, int(number) if number.isdigit() else -1, _TURNS.index(part)))
        return found

    keys = [key(name) for name in names]
    return sorted(range(len(names)), key=keys.__getitem__)


def _place(path: Sequence[str], depth: int, part: str) -> tuple[str, ...]:
    """Of `part`, which is or could be at this depth of the path; the same for all that is called in turns."""
    return (*path[:depth], _TURNS[0] if part in _TURNS else part)


def _runs(extents: Sequence[Extent], unit_max: int) -> Iterable[tuple[str, list[int]]]:
    """Neighbours of one block, none larger than `unit_max` unless it is a single extent."""
    run: list[int] = []
    run_name, run_nbytes = "", 0
    for i, extent in enumerate(extents):
        name = block_of(extent.name)
        if run and (name != run_name or run_nbytes + align(extent.nbytes) > unit_max):
            yield run_name, run
            run, run_nbytes = [], 0
        run_name = name
        run.append(i)
        run_nbytes += align(extent.nbytes)
    if run:
        yield run_name, run


def cut(extents: Sequence[Extent], unit_min: int, unit_max: int) -> tuple[UnitLayout, ...]:
    """Units of a component, in the order of `extents`.

    Args:
        extents: in order of use (`order_of_use`); empty ones (0 bytes) are allowed and take no room.
        unit_min: neighbouring blocks are joined until a unit has this many bytes.
        unit_max: no unit is larger, unless a single extent is.

    Returns:
        Layouts in which every extent lies exactly once. No extents: no units.
    """
    units: list[UnitLayout] = []
    pending: list[int] = []
    pending_name, pending_nbytes = "", 0

    def close() -> None:
        nonlocal pending, pending_nbytes
        if not pending:
            return
        offset, placements = 0, []
        for i in pending:
            placements.append(Placement(i, offset))
            offset += align(extents[i].nbytes)
        units.append(UnitLayout(pending_name or "rest", max(offset, ALIGNMENT), tuple(placements)))
        pending, pending_nbytes = [], 0

    for name, run in _runs(extents, unit_max):
        nbytes = sum(align(extents[i].nbytes) for i in run)
        if pending and (pending_nbytes >= unit_min or pending_nbytes + nbytes > unit_max):
            close()
        if not pending:
            pending_name = name
        pending += run
        pending_nbytes += nbytes
    close()
    return tuple(units)
