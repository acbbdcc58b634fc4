"""One launch casts a unit: every conversion against PyTorch's own, on the CPU (reference, interpreter) and on CUDA.

The same functions run three times: with PyTorch's operators; in Triton's interpreter, in a process of its own, since Triton
decides on import whether it interprets; and on CUDA where there is one.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefetch_offload_kernels import (
    Descriptor,
    KernelWarning,
    Table,
    TableError,
    available,
    build_table,
    cast_unit,
    cast_unit_reference,
    codes,
    launch,
    prepare,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
on_devices = pytest.mark.parametrize("device", ["cpu", CUDA])

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, I8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BYTES = (E4M3, E5M2, I8)
TARGETS = (F32, F16, BF16)
PAIRS = [(F32, F16), (F32, BF16), (F16, F32), (F16, BF16), (BF16, F32), (BF16, F16), *itertools.product(BYTES, TARGETS)]
# Ordinary, tiny enough for subnormal results, subnormal itself, overflowing, negative, and the ones that make NaN.
SCALES = (1.0, 0.1, 3.0e-5, 1.0e-8, 2.0**-130, 1.7e30, 3.0e38, -2.5, 0.0, float("inf"), float("nan"))
GUARD = 0xA5


@dataclass(frozen=True)
class Case:
    """A tensor to cast: its values, its target, its scales (one, or one per channel), and how its places are shifted."""

    values: torch.Tensor
    target: torch.dtype
    scales: torch.Tensor | None = None
    source_shift: int = 0
    target_shift: int = 0

    @property
    def expected(self) -> torch.Tensor:
        if self.scales is None:
            return self.values.to(self.target)
        scaled = self.values.to(F32).reshape(self.scales.numel(), -1) * self.scales[:, None]
        return scaled.reshape(-1).to(self.target)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except that a NaN may be any NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(got.itemsize)
    if not got.dtype.is_floating_point or integers is None:
        assert torch.equal(got, expected)
        return
    nan = expected.to(F32).isnan()
    assert torch.equal(got.to(F32).isnan(), nan)
    differ = (got.view(integers) != expected.view(integers)) & ~nan
    assert not differ.any(), f"{int(differ.sum())} differ, first at {int(differ.nonzero()[0])}"


def up(offset: int, multiple: int = 256) -> int:
    return -(-offset // multiple) * multiple


def lay_out(cases: Sequence[Case], device: str) -> tuple[Table, torch.Tensor, torch.Tensor]:
    """The table, staging with all values and scales, and a target full of guard bytes."""
    descriptors, pieces, reach, end = [], [], 0, 0
    for number, case in enumerate(cases):
        source = up(reach) + case.source_shift
        reach = source + case.values.nbytes
        pieces.append((source, case.values))
        scale = channel = None
        if case.scales is not None:
            scale = up(reach, 4)
            reach = scale + case.scales.nbytes
            pieces.append((scale, case.scales))
            if case.scales.numel() > 1:
                channel = case.values.numel() // case.scales.numel()
        place = up(end) + case.target_shift
        end = place + case.values.numel() * case.target.itemsize
        count = case.values.numel()
        descriptors.append(
            Descriptor(source, place, count, case.values.dtype, case.target, scale, channel, name=f"case {number}")
        )
    staging = torch.zeros(reach + 64, dtype=torch.uint8)
    for offset, tensor in pieces:
        staging[offset : offset + tensor.nbytes] = bytes_of(tensor)
    target = torch.full((end + 64,), GUARD, dtype=torch.uint8)
    return build_table(descriptors, device), staging.to(device), target.to(device)


def check(cases: Sequence[Case], device: str) -> None:
    """Casts all cases in one launch; compares values, and that nothing else was written."""
    assert available(device) == (device == "cuda" or INTERPRETED)
    table, staging, target = lay_out(cases, device)
    cast_unit(table, staging, target)
    written = target.cpu()
    untouched = torch.ones(written.numel(), dtype=torch.bool)
    for d, case in zip(table.descriptors, cases, strict=True):
        place = slice(d.target_offset, d.target_offset + d.target_nbytes)
        assert_equal(written[place].clone().view(d.target), case.expected)
        untouched[place] = False
    assert (written[untouched] == GUARD).all()


def all_bytes(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)


def all_shorts(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


@on_devices
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", BYTES, ids=str)
def test_all_bytes_with_every_scale(source: torch.dtype, target: torch.dtype, device: str) -> None:
    values = all_bytes(source)
    scales = torch.tensor(SCALES, dtype=F32)
    cases = [Case(values, target), *(Case(values, target, scale[None]) for scale in scales)]
    cases.append(Case(values.repeat(len(SCALES)), target, scales))  # per channel, tail
    cases.append(Case(values.repeat(4 * len(SCALES) * 8), target, scales.repeat(32)))  # per channel, full blocks
    check(cases, device)


@on_devices
@pytest.mark.parametrize(("source", "target"), PAIRS[2:6], ids=str)
def test_all_shorts(source: torch.dtype, target: torch.dtype, device: str) -> None:
    check([Case(all_shorts(source), target), Case(all_shorts(source)[1:], target, source_shift=2)], device)


@on_devices
@pytest.mark.parametrize("target", [F16, BF16], ids=str)
def test_float32_around_every_short(target: torch.dtype, device: str) -> None:
    """Every 16-bit value, the middle to its neighbour, and the float32 next to these: rounding, ties, overflow, subnormals."""
    exact = all_shorts(target).to(F32)
    exact = exact[exact.isfinite()].sort().values
    middle = (exact[1:].double() + exact[:-1].double()).div(2).to(F32)
    beyond = torch.tensor([65520.0, 65519.99, 3.3961776e38, 3.4028235e38, float("inf"), float("nan"), -0.0, 1e-45])
    values = torch.cat((exact, middle, beyond, -beyond))
    down, upwards = torch.tensor(-torch.inf), torch.tensor(torch.inf)
    check([Case(torch.cat((values, values.nextafter(down), values.nextafter(upwards))), target)], device)


@on_devices
def test_random_float32_bits(device: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    check([Case(bits.view(F32), F16), Case(bits.view(F32), BF16)], device)


@on_devices
@pytest.mark.parametrize("channel", [1, 2, 3, 7, 16, 48, 1000, 3072, 8176, 8191, 8192, 8193, 20000])
def test_channels_of_every_length(channel: int, device: str) -> None:
    """Shorter than a block, a block, longer: where one begins is found without dividing."""
    rows = max(2, 20_000 // channel)
    generator = torch.Generator().manual_seed(channel)
    values = torch.randint(-128, 128, (rows * channel,), generator=generator).to(I8)
    check([Case(values, BF16, torch.rand(rows, generator=generator))], device)


@on_devices
def test_copies_any_type_from_any_byte_to_any(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for dtype, count in ((torch.int64, 33), (torch.bool, 1), (E4M3, 40_000), (torch.complex64, 5), (BF16, 32_768)):
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), generator=generator)
        values = raw.to(torch.uint8).view(dtype)
        for source_shift, target_shift in ((0, 0), (1, 0), (0, 3), (16, 32), (5, 7)):
            cases.append(Case(values, dtype, None, source_shift, target_shift))
    table, staging, target = lay_out(cases, device)
    cast_unit(table, staging, target)
    for d, case in zip(table.descriptors, cases, strict=True):
        place = target[d.target_offset : d.target_offset + d.target_nbytes].cpu()
        assert torch.equal(place, bytes_of(case.values))  # NaN included


LENGTHS = st.one_of(st.integers(0, 80), st.sampled_from([4095, 8191, 8192, 8193, 16384, 32767, 32768, 32769]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    source, target = draw(st.sampled_from([*PAIRS, (F32, F32), (BF16, BF16), (E4M3, E4M3), (torch.int64, torch.int64)]))
    count = draw(LENGTHS)
    scales = None
    if source in BYTES and target in TARGETS and count and draw(st.booleans()):
        divisors = [d for d in range(1, min(count, 64) + 1) if count % d == 0]
        number = draw(st.sampled_from([*divisors, count]))
        scales = torch.tensor(SCALES).repeat(-(-number // len(SCALES)))[:number]
    step = 1 if source == target else source.itemsize
    shifts = st.sampled_from([0, 16, *range(step, 33, step)])
    source_shift = draw(shifts)
    target_shift = draw(st.sampled_from([0, 16, target.itemsize, 3 * target.itemsize]))
    raw = torch.randint(
        0, 256, (count * source.itemsize,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    return Case(raw.to(torch.uint8).view(source), target, scales, source_shift, target_shift)


@on_devices
@settings(
    max_examples=40 if INTERPRETED else 80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(mixed=st.lists(cases(), max_size=6))
def test_mixed_tables(device: str, mixed: list[Case]) -> None:
    check(mixed, device)


@on_devices
def test_offsets_beyond_32_bits(device: str) -> None:
    """Most of the buffers is never touched, and so takes no memory on the CPU."""
    if INTERPRETED:
        pytest.skip("the interpreter copies its arguments")
    far = (1 << 32) + (1 << 20)
    values = all_shorts(BF16)[:10_000]
    table = build_table(
        [Descriptor(far, 2 * far, values.numel(), BF16, F32), Descriptor(far, 64, 20_000, I8, I8)], device
    )
    assert table.staging_nbytes == far + 20_000 and table.target_nbytes == 2 * far + 40_000
    staging = torch.empty(table.staging_nbytes, dtype=torch.uint8, device=device)
    target = torch.empty(table.target_nbytes, dtype=torch.uint8, device=device)
    staging[far:] = bytes_of(values).to(device)
    cast_unit(table, staging, target)
    assert_equal(target[2 * far :].clone().view(F32).cpu(), values.to(F32))
    assert torch.equal(target[64:20_064].cpu(), bytes_of(values))


@on_devices
def test_kernel_and_reference_agree(device: str) -> None:
    """The reference on the same device, in pieces smaller than a tensor: rows by the million, and one long row."""
    values = all_bytes(E4M3).repeat(5000)
    cases = [Case(values, F16, torch.rand(values.numel() // 8)), Case(values, BF16, torch.rand(1)), Case(values, F32)]
    table, staging, target = lay_out(cases, device)
    cast_unit_reference(table, staging, target)
    for d, case in zip(table.descriptors, cases, strict=True):
        place = target[d.target_offset : d.target_offset + d.target_nbytes].clone().cpu()
        assert_equal(place.view(d.target), case.expected)


@on_devices
def test_nothing_to_do(device: str) -> None:
    target = torch.full((16,), GUARD, dtype=torch.uint8, device=device)
    for descriptors in ([], [Descriptor(1 << 40, 1 << 40, 0, F32, F16)]):
        table = build_table(descriptors, device)
        assert table.kinds == 0 and table.staging_nbytes == table.target_nbytes == 0
        prepare(table)
        cast_unit(table, torch.empty(0, dtype=torch.uint8, device=device), target)
    assert (target == GUARD).all()


def test_table_has_one_program_per_block() -> None:
    table = build_table(
        [Descriptor(0, 0, 100_000, E4M3, BF16, 200_000, 25_000), Descriptor(0, 200_000, 65_537, I8, I8)], "cpu"
    )
    assert table.kinds == 1 << codes.COPY | 1 << codes.conversion(codes.E4M3, codes.BF16, codes.WIDE)
    assert table.blocks[:, 0].tolist() == [0] * 13 + [1] * 3
    assert table.blocks[:13, 1].tolist() == [8192 * i // 25_000 for i in range(13)]
    assert table.rows[:, codes.FIRST].tolist() == [0, 13]
    assert table.nbytes == 2 * 64 + 16 * 8
    assert (table.staging_nbytes, table.target_nbytes) == (200_016, 265_537)
    assert [table.rows[i, codes.KIND].item() >= codes.ALIGNED for i in (0, 1)] == [True, True]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"source_offset": -4}, "source_offset=-4.*not negative"),
    ({"elements": -1}, "elements=-1"),
    ({"source": torch.int64}, "from torch.int64.*can only be copied"),
    ({"target": E4M3}, "to torch.float8_e4m3fn.*can only be copied"),
    ({"source_offset": 2}, "source_offset=2.*multiples of 4.*Move"),
    ({"target_offset": 1}, "target_offset=1.*multiples of 2"),
    ({"scale_offset": 64}, "a scale for torch.float32.*fp8 and int8"),
    ({"source": BF16, "scale_offset": 64}, "a scale for torch.bfloat16"),
    ({"source": F16, "scale_offset": 64}, "a scale for torch.float16"),
    ({"source": I8, "scale_offset": 66}, "scale_offset=66.*multiple of 4"),
    ({"source": I8, "scale_offset": 64, "channel": 3}, "channel=3 for 16 elements.*shape"),
    ({"source": I8, "scale_offset": 64, "channel": 0}, "channel=0"),
    ({"channel": 4}, "channel=4 without scale_offset"),
    ({"source": F16, "channel": 4}, "channel=4 without scale_offset"),
    ({"packed_nbytes": 64}, "packed_nbytes=64 with a source of torch.float32"),
    ({"source": "zip"}, "from 'zip'.*packed_bf16"),
    ({"source": "packed_bf16"}, "bfloat16 after"),
    ({"source": "packed_bf16", "target": BF16}, "less than their header.*of_packed"),
    ({"source": "packed_bf16", "target": BF16, "packed_nbytes": 160, "source_offset": 8}, "multiple of 16"),
    ({"source": "packed_bf16", "target": BF16, "packed_nbytes": 160, "scale_offset": 0}, "which are exact"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m[:24] for _, m in REFUSED])
def test_refused_descriptors(changes: dict[str, Any], message: str) -> None:
    fields = {
        "source_offset": 0,
        "target_offset": 0,
        "elements": 16,
        "source": F32,
        "target": F16,
        "name": "proj.weight",
    }
    with pytest.raises(TableError, match=f"^proj.weight: .*{message}"):
        Descriptor(**{**fields, **changes})


def test_refused_overlap() -> None:
    with pytest.raises(TableError, match=r"b is written up to byte 48.*a from byte 40.*place of its own"):
        build_table([Descriptor(0, 40, 8, F32, F16, name="a"), Descriptor(0, 32, 8, F32, F16, name="b")], "cpu")


def test_refused_buffers() -> None:
    table = build_table([Descriptor(0, 0, 64, F32, F16)], "cpu")
    staging, target = torch.zeros(256, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)
    for bad, message in (
        (staging[:255], "staging has 255 bytes; the table reaches to byte 256"),
        (staging.view(F32), "staging is torch.float32"),
        (staging.view(16, 16), r"\(16, 16\)"),
        (torch.zeros(512, dtype=torch.uint8)[::2], "contiguous"),
        (torch.zeros(257, dtype=torch.uint8)[1:], "not a multiple of 16"),
        (torch.zeros(256, dtype=torch.uint8, device="meta"), "staging is on meta, the table on cpu"),
    ):
        with pytest.raises(TableError, match=message):
            cast_unit(table, bad, target)
    with pytest.raises(TableError, match="target has 127 bytes"):
        cast_unit(table, staging, target[:127])
    shared = torch.zeros(384, dtype=torch.uint8)
    with pytest.raises(TableError, match="overlap"):
        cast_unit(table, shared[:256], shared[240:])
    cast_unit(table, shared[:256], shared[256:])  # side by side is fine


@pytest.mark.skipif(INTERPRETED, reason="asks for Triton's compiled function")
def test_a_device_where_triton_fails_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_probe", broken)
    asked = launch._available.__wrapped__
    with pytest.warns(KernelWarning, match="cuda:0 .*C compiler.*PyTorch's operators.*install one"):
        assert not asked(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not asked(torch.device("cuda", 0))  # below Triton's floor: no warning, nothing is wrong
    assert not asked(torch.device("meta"))


def test_a_kernel_that_finds_no_room_on_the_device_can_be_loaded_later() -> None:
    """As Triton's compiled kernels are: what it keeps of one that failed to load would be launched as if it had."""

    class Compiled:
        _run = None
        error: Exception | None = RuntimeError("Triton Error [CUDA]: out of memory")

        @property
        def run(self) -> Any:
            if self._run is None:
                self._run = "a launcher without a function"
                if self.error is not None:
                    raise self.error
            return self._run

    compiled = Compiled()
    for error, raised in (
        (compiled.error, torch.OutOfMemoryError), (RuntimeError("Triton Error [CUDA]: invalid image"), RuntimeError)
    ):  # fmt: skip
        compiled.error = error
        with pytest.raises(raised, match=r"Triton Error \[CUDA\]"):
            launch._load(compiled)
        assert compiled._run is None
    compiled.error = None
    launch._load(compiled)
    assert compiled._run is not None


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    """This file again, with the kernel in Triton's interpreter instead of the reference."""
    pytest.importorskip("triton")
    run_interpreted(Path(__file__))


def run_interpreted(file: Path) -> None:
    # NumPy, which interprets, warns of the overflows and NaN that these tests are about.
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "not cuda"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=file.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
