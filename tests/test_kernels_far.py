"""Every kind of the table over all bit patterns, through both of its branches; in one launch; far out in large buffers; and as
codecs ask for it.

The kernel's addresses are tried in Triton's interpreter, which computes in the types that the compiled kernel computes in, on
memory of which only what is touched exists. Otherwise as test_kernels_cast.py, which says how these files run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prefetch_offload_kernels import (
    PACKED_BF16,
    Descriptor,
    Table,
    build_table,
    cast_unit,
    cast_unit_reference,
    codes,
    launch,
    pack_bf16,
)
from prefetch_offload_kernels.table import SOURCES
from test_kernels_cast import (
    BF16,
    F32,
    INTERPRETED,
    SCALES,
    Case,
    all_bytes,
    all_shorts,
    assert_equal,
    bytes_of,
    check,
    lay_out,
    on_devices,
    run_interpreted,
    up,
)
from torch import nn

from prefetch_offload import Quantized
from prefetch_offload.codecs import codec_for
from prefetch_offload.config import Settings
from prefetch_offload.encoding import Piece, Raw, Recipe

BLOCK = codes.BLOCK
GIB = 1 << 30
DTYPES = {code: dtype for dtype, code in SOURCES.items()}
CONVERSIONS = [kind for kind in range(codes.FIRST_PLAIN, codes.KINDS) if codes.exists(kind)]
# A channel of every length that is told apart, in which all 256 bytes have room.
CHANNELS = {codes.WIDE: BLOCK + 256, codes.GROUPED: 256, codes.NARROW: 257}


def patterns(kind: int) -> torch.Tensor:
    """All that there are of the source; of 32 bits each number of the target, the middle to the next, and both beside that."""
    source, target, _ = codes.parts(kind)
    if source == codes.F32:
        exact = all_shorts(DTYPES[target]).to(F32)
        finite = exact[exact.isfinite()].sort().values
        middle = (finite[1:].double() + finite[:-1].double()).div(2).to(F32)
        return torch.cat((exact, middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1])))
    return (all_bytes if DTYPES[source].itemsize == 1 else all_shorts)(DTYPES[source])


def whole(kind: int) -> Case:
    """All patterns, with scales each under every one, in full blocks; and some of them in a tail."""
    _, target, scaling = codes.parts(kind)
    values = patterns(kind)
    if scaling == codes.UNSCALED:
        return Case(torch.cat((values.repeat(-(-BLOCK // len(values))), values[:100])), DTYPES[target])
    channel = CHANNELS[scaling]
    scales = torch.tensor(SCALES, dtype=F32)
    if scaling != codes.WIDE:
        scales = scales.repeat(4)
    row = values.repeat(channel // 256 + 1)[:channel]
    return Case(row.repeat(len(scales)), DTYPES[target], scales)


@on_devices
@pytest.mark.parametrize("kind", CONVERSIONS, ids=codes.name)
def test_every_conversion_over_all_patterns(kind: int, device: str) -> None:
    case = whole(kind)
    size = case.values.itemsize
    for shifted in (case, dataclasses.replace(case, source_shift=size, target_shift=case.target.itemsize)):
        table, _, _ = lay_out([shifted], "cpu")
        assert table.kinds == 1 << kind and case.values.numel() > BLOCK and case.values.numel() % BLOCK
        assert bool(table.rows[0, codes.KIND] >= codes.ALIGNED) == (shifted is case)  # full blocks: 16 bytes at a time
        check([shifted], device)


@on_devices
def test_copies_of_all_patterns(device: str) -> None:
    values = torch.cat((all_shorts(torch.int16), all_shorts(torch.int16)[: BLOCK + 1])).view(BF16)
    for shift in (0, 1):
        table, staging, target = lay_out([Case(values, BF16, None, shift, 3 * shift)], device)
        assert table.kinds == 1 << codes.COPY
        cast_unit(table, staging, target)
        place = target[table.descriptors[0].target_offset :][: values.nbytes]
        assert torch.equal(place.cpu(), bytes_of(values))


# ------------------------------------------------------------------------------------------------------- one launch
def packed_beside(cases: Sequence[Case], weights: torch.Tensor) -> tuple[list[Descriptor], torch.Tensor, int]:
    """Descriptors of `cases`, of one copy and of packed `weights`, what they are read from, and where the weights go."""
    table, staging, _ = lay_out(cases, "cpu")
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None
    at, place = up(staging.numel()), up(table.target_nbytes)
    joined = torch.zeros(at + packed.numel(), dtype=torch.uint8)
    joined[: staging.numel()] = staging
    joined[at:] = packed
    return [*table.descriptors, Descriptor.of_packed(packed, at, place, name="packed")], joined, place


@pytest.mark.skipif(not INTERPRETED, reason="counts the kernel's launches")
def test_a_unit_of_every_kind_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefetch_offload_kernels import kernel

    cases = [whole(kind) for kind in CONVERSIONS]
    cases = [*cases, Case(all_shorts(BF16), BF16)]
    weights = all_shorts(BF16)[torch.randperm(65536, generator=torch.Generator().manual_seed(0))][:20_000]
    descriptors, staging, place = packed_beside(cases, weights)
    table = build_table(descriptors, "cpu")
    assert table.kinds == sum(1 << kind for kind in (codes.COPY, codes.UNPACK, *CONVERSIONS))
    target = torch.zeros(table.target_nbytes, dtype=torch.uint8)
    grids = []

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return stock[grid]

    stock = kernel.unit_kernel
    monkeypatch.setattr(kernel, "unit_kernel", Counting())
    cast_unit(table, staging, target)
    assert grids == [(table.blocks.shape[0],)]
    for d, case in zip(table.descriptors, cases, strict=False):
        assert_equal(target[d.target_offset :][: d.target_nbytes].clone().view(d.target), case.expected)
    assert torch.equal(target[place:], bytes_of(weights))


# ---------------------------------------------------------------------------------------------------- large buffers
far_out = pytest.mark.skipif(
    not INTERPRETED or not sys.platform.startswith("linux"), reason="the kernel's addresses: for the interpreter"
)


class Sparse:
    """Many gigabytes of addresses. What was not written is 0 and takes no memory. Keep it as long as what `at` gave."""

    def __init__(self, nbytes: int) -> None:
        no_reserve = 0x4000  # mmap.MAP_NORESERVE, from Python 3.11 on
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def at(self, offset: int, nbytes: int = 64) -> torch.Tensor:
        """uint8 [nbytes]. Its storage is no larger, so that the interpreter looks at no more than that."""
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(self._address + offset), dtype=torch.uint8)


def launch_far(table: Table, staging: Sparse, target: Sparse) -> None:
    """As cast_unit, which wants to be shown all of the memory."""
    launch._launch(table, staging.at(0), target.at(0))


def a_few(kind: int) -> Case:
    """Two blocks or more, and a tail."""
    if kind == codes.COPY:
        return Case(all_shorts(BF16)[: 2 * BLOCK + 100], BF16)
    case = whole(kind)
    return case if case.scales is not None else dataclasses.replace(case, values=case.values[-2 * BLOCK - 100 :])


@far_out
@pytest.mark.parametrize("far", [2**31 - 40960, 2**32 - 40960], ids=["2^31", "2^32"])
def test_every_kind_at_far_offsets(far: int) -> None:
    """Source, target and scales, across a power of two."""
    source, target = Sparse(8 * GIB), Sparse(8 * GIB)
    for kind in (codes.COPY, *CONVERSIONS):
        case = a_few(kind)
        for shift in (0, 1):
            moved = dataclasses.replace(
                case, source_shift=shift * case.values.itemsize, target_shift=shift * case.target.itemsize
            )
            near, staging, _ = lay_out([moved], "cpu")
            (d,) = near.descriptors
            scale = None if d.scale_offset is None else d.scale_offset + far
            d = dataclasses.replace(
                d, source_offset=d.source_offset + far, target_offset=d.target_offset + far, scale_offset=scale
            )
            source.at(far, staging.numel()).copy_(staging)
            launch_far(build_table([d], "cpu"), source, target)
            assert_equal(target.at(d.target_offset, d.target_nbytes).clone().view(d.target), case.expected)


def last_blocks(table: Table, programs: int) -> Table:
    """Of one tensor's table, so many programs: the first of them is handed the number that it has in the whole table."""
    rows = table.rows.clone()
    rows[0, codes.FIRST] -= table.blocks.shape[0] - programs
    return dataclasses.replace(table, rows=rows, blocks=table.blocks[-programs:].clone())


# By name: a kind, elements per scale, and elements: more than 2^32, the last of them in a block of its own.
LARGE: dict[str, tuple[int, int | None, int]] = {
    "copy": (codes.COPY, None, 3 * 2**31 + 1000),
    **{
        codes.name(kind): (kind, None, 3 * 2**31 + 1000)
        for kind in CONVERSIONS
        if codes.parts(kind)[2] == codes.UNSCALED
    },
    "wide": (codes.conversion(codes.I8, codes.F32, codes.WIDE), 2**31 + 1000, 3 * (2**31 + 1000)),
    "grouped": (codes.conversion(codes.I8, codes.F32, codes.GROUPED), 16, 3 * 2**31 + 960),
    "narrow": (codes.conversion(codes.I8, codes.F32, codes.NARROW), 6, 3 * 2**31 + 960),
}


@far_out
@pytest.mark.parametrize("name", LARGE)
def test_tensors_of_more_elements_than_32_bits_count(name: str) -> None:
    """Their last blocks, two of them full, by the numbers that those have in the table of the whole tensor."""
    kind, channel, elements = LARGE[name]
    source, target = (torch.uint8, torch.uint8) if kind == codes.COPY else [DTYPES[c] for c in codes.parts(kind)[:2]]
    block = codes.COPY_BLOCK if kind == codes.COPY else BLOCK
    scales_at = up(elements * source.itemsize)
    table = build_table([Descriptor(0, 0, elements, source, target, channel and scales_at, channel)], "cpu")
    assert table.kinds == 1 << kind and table.rows[0, codes.KIND] >= codes.ALIGNED
    begin = (table.blocks.shape[0] - 3) * block
    count = elements - begin
    assert 2 * block < count < 3 * block and begin > 2**32
    bits = torch.randint(0, 256, (count * source.itemsize,), generator=torch.Generator().manual_seed(kind)).to(
        torch.uint8
    )
    staging, result = Sparse(table.staging_nbytes), Sparse(table.target_nbytes)
    staging.at(begin * source.itemsize, bits.numel()).copy_(bits)
    expected = bits.view(source)
    if channel is not None:
        number = torch.arange(begin, elements) // channel
        scales = torch.rand(int(number[-1] - number[0]) + 1, generator=torch.Generator().manual_seed(0))
        staging.at(scales_at + 4 * int(number[0]), scales.nbytes).copy_(bytes_of(scales))
        expected = expected.to(F32) * scales[number - number[0]]
    launch_far(last_blocks(table, 3), staging, result)
    got = result.at(begin * target.itemsize, count * target.itemsize).clone().view(target)
    assert_equal(got, expected.to(target))


@far_out
def test_packed_weights_of_more_elements_than_32_bits_count() -> None:
    """The last records of one, and the escapes that they list, at the places that these have in the packed whole."""
    weights = torch.cat([all_shorts(BF16)[i::7] for i in range(7)])[: 2 * BLOCK + 1000]
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None
    before = 3 * 2**31 // BLOCK  # records
    elements, shift = 3 * 2**31 + weights.numel(), before * codes.RECORD_NBYTES
    descriptor = Descriptor(
        0, 0, elements, PACKED_BF16, BF16, packed_nbytes=shift + packed.numel(), name="all but the first are not there"
    )
    for record in range(3):
        field = codes.HEADER_NBYTES + record * codes.RECORD_NBYTES + 16
        packed[field : field + 8].view(torch.int64).add_(shift)
        assert packed[field + 8 : field + 12].view(torch.int32) > 0
    staging, target = Sparse(descriptor.source_nbytes), Sparse(descriptor.target_nbytes)
    staging.at(shift + codes.HEADER_NBYTES, packed.numel() - codes.HEADER_NBYTES).copy_(packed[codes.HEADER_NBYTES :])
    launch_far(last_blocks(build_table([descriptor], "cpu"), 3), staging, target)
    assert torch.equal(target.at(2 * before * BLOCK, weights.nbytes), bytes_of(weights))


# ------------------------------------------------------------------------------------------------ what the engine asks
WAYS = ("packed", "fp8", "int8", Quantized(torch.float8_e5m2, "tensor"), torch.float16, torch.float8_e4m3fn)


@on_devices
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("stored", [F32, torch.float16, BF16], ids=str)
def test_what_codecs_make_of_a_model_arrives_as_by_pytorch(stored: torch.dtype, way: Any, device: str) -> None:
    """A unit's table as the engine builds it: weights of a convolution and of linear layers, tails, and what travels raw."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(24, 40, 3), nn.Linear(130, 67), nn.LayerNorm(67), nn.Linear(96, 192, bias=False))
    module = module.to(stored).to(memory_format=torch.channels_last)
    if stored == F32 and way == "packed":
        module[1].to(BF16).to(F32)  # 16 bits hold it
    codec = codec_for(Settings.make(transport=way), "model", module, torch.device("cpu"))
    assert codec is not None
    recipes: list[Recipe] = []
    for name, p in module.named_parameters():
        piece = Piece(name, 0, p.nbytes, p.detach(), True)
        recipes.append(codec.recipe(piece) or Raw(bytes_of(piece.flat), name))
    source = place = 0
    staging = torch.zeros(sum(up(r.nbytes, 16) for r in recipes), dtype=torch.uint8)
    descriptors = []
    for recipe, p in zip(recipes, module.parameters(), strict=True):
        recipe.write(staging[source : source + recipe.nbytes])
        descriptors.append(recipe.descriptor(source, place))
        source, place = source + up(recipe.nbytes, 16), place + up(p.nbytes)
    narrower = way != torch.float16 or stored == F32
    assert any(d.kind != codes.COPY for d in descriptors) == (narrower and not (way == "packed" and stored == torch.float16))
    tables = [build_table(descriptors, where) for where in ("cpu", device)]
    targets = [torch.full((place,), 0xA5, dtype=torch.uint8, device=t.device) for t in tables]
    cast_unit_reference(tables[0], staging, targets[0])
    cast_unit(tables[1], staging.to(device), targets[1])
    assert torch.equal(targets[0], targets[1].cpu())


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """This file again, with the kernel in Triton's interpreter instead of the reference."""
    pytest.importorskip("triton")
    run_interpreted(Path(__file__))
