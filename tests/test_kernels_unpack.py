"""Packed bfloat16 weights come back bit for bit, whatever they are, and take less room where they are weights.

Runs with PyTorch's operators, in Triton's interpreter and on CUDA, as test_kernels_cast.py does.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefetch_offload_kernels import (
    Descriptor,
    FormatError,
    available,
    build_table,
    cast_unit,
    codes,
    pack_bf16,
    read_header,
    survey_bf16,
    unpack,
)
from test_kernels_cast import GUARD, INTERPRETED, all_shorts, bytes_of, on_devices, run_interpreted, up

BF16 = torch.bfloat16
BLOCK = codes.BLOCK
FULL_NBYTES = codes.HEADER_NBYTES + codes.RECORD_NBYTES


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(count: int, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return (torch.randn(count, generator=seeded(seed)) * std).to(BF16)


def random_bits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-32768, 32768, (count,), generator=seeded(seed)).to(torch.int16).view(BF16)


def one_escape_per_block(count: int) -> torch.Tensor:
    """15 exponents fill a block, and one element has a sixteenth: first, last, and in between."""
    exponents = torch.arange(count) % 15 + 100
    for number, begin in enumerate(range(0, count, BLOCK)):
        size = min(BLOCK, count - begin)
        exponents[begin + (0, size - 1, size // 2, 4095 % size)[number % 4]] = 200
    return ((exponents << 7) | (torch.arange(count) & 0x7F)).to(torch.int16).view(BF16)


def every_exponent(count: int) -> torch.Tensor:
    """All 256 exponents equally often: as many escapes as there can be."""
    return (torch.arange(count) % 256 << 7).to(torch.int16).view(BF16)


WEIGHTS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": normal,
    "uniform": lambda n: (torch.rand(n, generator=seeded()) * 2 - 1).to(BF16),
    "constant": lambda n: torch.full((n,), 0.7).to(BF16),
    "zero": lambda n: torch.zeros(n, dtype=BF16),
    "negative zero": lambda n: -torch.zeros(n, dtype=BF16),
    "nan": lambda n: torch.full((n,), torch.nan).to(BF16),
    "nan payloads": lambda n: (torch.randint(0, 127, (n,), generator=seeded()) + 0x7F81).to(torch.int16).view(BF16),
    "infinite": lambda n: torch.full((n,), -torch.inf).to(BF16),
    "random bits": random_bits,
    "all patterns": lambda n: all_shorts(BF16).repeat(n // 65536 + 1)[:n],
    "one escape per block": one_escape_per_block,
    "one exponent per block": lambda n: ((torch.arange(n) // BLOCK % 256 << 7) & 0x7FFF).to(torch.int16).view(BF16),
    "every exponent": every_exponent,
}
COUNTS = (0, 1, 2, 63, 64, 65, 8190, 8191, 8192, 8193, 16384, 3 * 8192 + 4097)


def check_round_trip(weights: torch.Tensor, device: str) -> torch.Tensor:
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None and packed.dtype == torch.uint8
    assert packed.numel() == survey_bf16(weights).nbytes == read_header(packed).nbytes
    back = unpack(packed, device)
    assert back.device.type == device and back.dtype == BF16
    assert torch.equal(back.cpu().view(torch.int16), weights.view(torch.int16))
    return packed


@on_devices
@pytest.mark.parametrize("kind", WEIGHTS)
def test_round_trip(kind: str, device: str) -> None:
    assert available(device) == (device == "cuda" or INTERPRETED)
    for count in COUNTS:
        check_round_trip(WEIGHTS[kind](count), device)


@on_devices
def test_all_patterns_in_one_tensor(device: str) -> None:
    """All 65,536, in order and shuffled, so that each of them is once a coded element and once an escape."""
    patterns = all_shorts(BF16)
    check_round_trip(patterns, device)  # 16 blocks of at most 64 exponents
    shuffled = patterns[torch.randperm(65536, generator=seeded())]
    packed = check_round_trip(shuffled, device)  # every block has all exponents
    assert read_header(packed).escapes > 55_000


@on_devices
@settings(
    max_examples=15 if INTERPRETED else 60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    kind=st.sampled_from(sorted(WEIGHTS)),
    count=st.one_of(st.integers(0, 300), st.integers(8000, 17000)),
    shift=st.integers(0, 12),
    edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(-32768, 32767)), max_size=20),
)
def test_any_weights_to_any_place(device: str, kind: str, count: int, shift: int, edits: list[tuple[int, int]]) -> None:
    """Weights with strays, unpacked beside a copy and a conversion in one launch; the rest of the target stays."""
    weights = WEIGHTS[kind](count).clone()
    for position, pattern in edits if count else ():
        weights.view(torch.int16)[position % count] = pattern
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None
    raw = torch.arange(100, dtype=torch.uint8)
    begin = up(packed.numel())
    staging = torch.zeros(begin + 100, dtype=torch.uint8)
    staging[: packed.numel()] = packed
    staging[begin:] = raw
    place = 512 + 2 * shift
    after = place + 2 * count
    table = build_table(
        [
            Descriptor.of_packed(packed, 0, place, name="packed"),
            Descriptor(begin, 0, 100, torch.uint8, torch.uint8),
            Descriptor(begin, 128, 96, torch.int8, torch.float32),
        ],
        device,
    )
    target = torch.full((after + 32,), GUARD, dtype=torch.uint8, device=device)
    cast_unit(table, staging.to(device), target)
    target = target.cpu()
    assert torch.equal(target[place:after], bytes_of(weights))
    assert torch.equal(target[:100], raw)
    assert torch.equal(target[128:512].clone().view(torch.float32), raw[:96].view(torch.int8).float())
    assert (target[100:128] == GUARD).all() and (target[512:place] == GUARD).all() and (target[after:] == GUARD).all()


@on_devices
def test_damaged_escapes_stay_inside_their_block(device: str) -> None:
    """The kernel writes nowhere else, whatever an entry says; fingerprints are what notices damage."""
    if not available(device):
        pytest.skip("the reference trusts what it reads")
    weights = one_escape_per_block(BLOCK + 100)
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None
    packed[-4:] = 0xFF  # the last block's only escape
    table = build_table([Descriptor.of_packed(packed, 0, 0)], device)
    target = torch.full((1 << 18,), GUARD, dtype=torch.uint8, device=device)
    cast_unit(table, packed.to(device), target)
    got = target.cpu()
    differ = (got[: weights.nbytes].clone().view(torch.int16) != weights.view(torch.int16)).nonzero().flatten()
    assert differ.tolist() == [BLOCK + 99]
    assert (got[weights.nbytes :] == GUARD).all()


def test_weights_take_three_quarters() -> None:
    weights = normal(1 << 20)
    survey = survey_bf16(weights)
    packed = pack_bf16(weights, survey=survey)
    assert packed is not None and packed.numel() == survey.nbytes
    assert survey.ratio <= 0.755  # 12.03 bits, and an escape of 32 for one element in ten thousand
    assert packed.numel() / weights.nbytes == survey.ratio
    assert survey.exponents.nbytes + survey.escapes.nbytes <= 0.002 * weights.nbytes
    matrix = weights.view(1024, 1024)
    assert torch.equal(packed, pack_bf16(matrix))  # elements in memory order, whatever the shape


def test_what_does_not_pack_stays() -> None:
    assert pack_bf16(all_shorts(BF16)[torch.randperm(65536, generator=seeded())]) is None
    assert pack_bf16(normal(100)) is None  # the header
    assert pack_bf16(torch.empty(0, dtype=BF16)) is None
    weights = normal(10_000)
    ratio = survey_bf16(weights).ratio
    assert pack_bf16(weights, limit=ratio) is not None
    assert pack_bf16(weights, limit=ratio - 1e-6) is None


def test_format_byte_for_byte() -> None:
    """As the module says it, read here with struct alone."""
    weights = one_escape_per_block(BLOCK + 100)
    weights.view(torch.int16)[5] = -1  # 0xFFFF: sign, exponent 255, mantissa 127
    packed = pack_bf16(weights, limit=float("inf"))
    assert packed is not None
    data = packed.numpy().tobytes()
    nbytes = FULL_NBYTES + 32 + 192 + 3 * 4
    assert struct.unpack_from("<8sIIqqq", data) == (b"PFOBF16\0", 1, 8192, BLOCK + 100, nbytes, 3)
    assert data[40:64] == bytes(24) and len(data) == nbytes
    bits = [value & 0xFFFF for value in weights.view(torch.int16).tolist()]
    back = []
    for begin, size in ((0, BLOCK), (BLOCK, 100)):
        padded = -(-size // 64) * 64
        record = 64 + begin // BLOCK * 12320
        exponents = data[record : record + 15]
        counts = Counter(value >> 7 & 0xFF for value in bits[begin : begin + size])
        # commonest first, the smaller of equally common ones first
        assert list(exponents) == sorted(counts, key=lambda e: (-counts[e], e))[:15]
        assert data[record + 15] == 0
        offset, count, zero = struct.unpack_from("<qII", data, record + 16)
        assert zero == 0
        signs = data[record + 32 : record + 32 + padded]
        nibbles = data[record + 32 + padded : record + 32 + padded * 3 // 2]
        block = [0] * padded
        for half in range(2):
            for i in range(padded // 2):
                element = (2 * half + i % 2) * (padded // 4) + i // 2
                quarter, within = divmod(element, padded // 4)
                byte = nibbles[within // 2 * 4 + quarter]
                code = byte >> 4 if within % 2 else byte & 15
                sign = signs[half * padded // 2 + i]
                exponent = exponents[code] if code < 15 else 0
                block[element] = (sign & 0x80) << 8 | exponent << 7 | sign & 0x7F
        assert block[size:] == [exponents[0] << 7] * (padded - size)  # bytes of 0 read as elements
        last = -1
        for entry in range(count):
            position, value = struct.unpack_from("<HH", data, offset + 4 * entry)
            assert last < position < size
            block[position], last = value, position
        back += block[:size]
    assert back == bits


def test_packing_into_given_memory() -> None:
    weights = normal(20_000)
    survey = survey_bf16(weights)
    slab = torch.full((survey.nbytes + 10,), GUARD, dtype=torch.uint8)
    packed = pack_bf16(weights, survey=survey, out=slab)
    assert packed is not None and packed.data_ptr() == slab.data_ptr()
    assert torch.equal(packed, pack_bf16(weights)) and (slab[survey.nbytes :] == GUARD).all()
    with pytest.raises(ValueError, match=r"out is torch.uint8 \(100,\); give uint8"):
        pack_bf16(weights, out=slab[:100])
    with pytest.raises(ValueError, match=r"out is torch\.int8"):
        pack_bf16(weights, out=slab.view(torch.int8))


@on_devices
def test_packing_on_a_device_gives_the_same_bytes(device: str) -> None:
    for weights in (normal(100_000), every_exponent(70_000)):
        expected = pack_bf16(weights, limit=float("inf"))
        assert expected is not None
        packed = pack_bf16(weights, limit=float("inf"), device=device)
        assert packed is not None and packed.device.type == "cpu" and torch.equal(packed, expected)
        packed = pack_bf16(weights.to(device), limit=float("inf"))
        assert packed is not None and torch.equal(packed, expected)


def test_refused_input() -> None:
    with pytest.raises(TypeError, match=r"torch\.float16: only bfloat16 packs"):
        pack_bf16(torch.zeros(8, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"strides \(1, 64\).*not contiguous.*contiguous view"):
        survey_bf16(torch.zeros(64, 64, dtype=BF16).t())
    weights = normal(20_000)
    with pytest.raises(ValueError, match="A survey of 20000 elements for 19999"):
        pack_bf16(weights[1:], survey=survey_bf16(weights))
    with pytest.raises(ValueError, match="changed since"):
        pack_bf16(every_exponent(20_000), survey=survey_bf16(weights))


def test_refused_bytes() -> None:
    packed = pack_bf16(normal(20_000))
    assert packed is not None
    for damage, message in (
        (lambda p: p[:10], "10 bytes that begin with"),
        (lambda p: p[:-1], "should have 30.*cut short"),
        (lambda p: torch.zeros(1000, dtype=torch.uint8), "not weights packed"),
    ):
        with pytest.raises(FormatError, match=message):
            unpack(damage(packed.clone()))
    newer = packed.clone()
    newer[8] = 2
    with pytest.raises(FormatError, match=r"version 2 in blocks of 8192; this reads version 1.*Pack them again"):
        Descriptor.of_packed(newer, 0, 0)
    other = packed.clone()
    other[12:16] = torch.tensor([0, 16, 0, 0])
    with pytest.raises(FormatError, match="blocks of 4096"):
        read_header(other)
    longer = packed.clone()
    longer[16] += 1
    longer[17] += 1
    with pytest.raises(FormatError, match="should have"):
        read_header(longer)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """This file again, with the kernel in Triton's interpreter instead of the reference."""
    pytest.importorskip("triton")
    run_interpreted(Path(__file__))
