"""benchmarks/kernels.py on small units and without a GPU: what it compares is equal, what it counts is right."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefetch_offload_kernels import codes
from typer import Exit

from benchmarks import kernel_cases, kernels, packing
from benchmarks.kernel_cases import CASES, MB, ROW, SHORT_ROW, build_unit


def once(call: Callable[[], object]) -> float:
    call()
    return 1e-3


PLAIN = {"loop of copy_", "_foreach_copy_", "Tensor.to"}
SCALED = {"loop of to, mul_, copy_", "_foreach_copy_, _foreach_mul_", "Tensor.to, mul_, to"}
PACKED = {"PyTorch operators", "_foreach_copy_ of the unpacked"}


@pytest.mark.parametrize("case", CASES)
def test_every_method_gives_the_same(case: str) -> None:
    rows = list(kernels.measure(case, 1, "cpu", once, link_gbps=10.0))
    kinds = CASES[case]
    others = PACKED if any(k.source == "packed" for k in kinds) else SCALED if kinds[0].scaling else PLAIN
    assert rows[0].method == "kernel" and {row.method for row in rows[1:]} == others and len(rows) == len(others) + 1
    for row in rows:
        assert row.equal and row.tensors == 8 and (row.case, row.size_mb) == (case, 1)
        assert 0.9 * MB <= row.target_nbytes <= MB
        assert row.gbps == pytest.approx(row.moved_nbytes / 1e-3 / 1e9)
        assert row.of_copy == pytest.approx(1.0, rel=1e-5)  # the clock says that everything takes as long


def kinds_of(case: str) -> set[int]:
    """The kinds that the kernel is compiled for."""
    return {kind for kind in range(codes.KINDS) if build_unit(case, MB, "cpu").table.kinds >> kind & 1}


def test_every_way_to_travel_has_a_case() -> None:
    """Each type that is read with each that is written, and each way to scale. A unit that has several is one of the cases."""
    kinds = [kinds_of(case) for case in CASES]
    found = set().union(*kinds)
    assert {codes.COPY, codes.UNPACK} <= found
    parts = [codes.parts(kind) for kind in found if kind >= codes.FIRST_PLAIN]
    wanted = {(s, t) for s in range(codes.SOURCES) for t in range(codes.TARGETS) if s != t}
    assert {(source, target) for source, target, _ in parts} == wanted
    for source in (codes.E4M3, codes.E5M2, codes.I8):
        assert {scaling for s, _, scaling in parts if s == source} >= {codes.UNSCALED, codes.WIDE, codes.GROUPED}
    assert codes.NARROW in {scaling for _, _, scaling in parts}
    assert {target for s, target, scaling in parts if (s, scaling) == (codes.E4M3, codes.GROUPED)} == {*range(codes.TARGETS)}
    assert max(map(len, kinds)) == 3 and sum(len(k) > 1 for k in kinds) == 1


@pytest.mark.parametrize("case", [name for name, kinds in CASES.items() if any(k.scaling for k in kinds)])
def test_scales_are_where_the_descriptors_say(case: str) -> None:
    unit = build_unit(case, MB, "cpu")
    channels = {"row": ROW, "short row": SHORT_ROW}
    for index, (scale, source, d) in enumerate(zip(unit.scales, unit.sources, unit.table.descriptors, strict=True)):
        kind = CASES[case][index % len(CASES[case])]
        if not kind.scaling:
            assert scale is None
            continue
        assert scale is not None
        assert scale.numel() == d.scales == source.numel() // channels.get(kind.scaling, source.numel())
        assert ((scale > 0) & (scale < 1)).all() and scale.unique().numel() > 0.99 * scale.numel()


def test_bytes_are_counted() -> None:
    unit = build_unit("fp8 e4m3 x row scale -> bf16", MB, "cpu")
    elements = unit.target.numel() // 2
    assert unit.moved_nbytes == 3 * elements + 4 * elements // ROW
    row = next(kernels.measure("unpack bf16", 16, "cpu", once, link_gbps=2.0))
    assert row.of_link == pytest.approx((row.moved_nbytes - row.target_nbytes) / 1e-3 / 1e9 / 2.0)
    assert (row.moved_nbytes - row.target_nbytes) / row.target_nbytes <= 0.77


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exit) as refused:
        kernels.main(tmp_path / "out")
    assert refused.value.exit_code == 2
    assert "there is none here. Run it where there is one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Gpu:
    """What a run asks of a GPU, made up: its name, its memory, its clock. Units are small ones of the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.measured = 0.0, list[tuple[str, int]]()
        self.monkeypatch = monkeypatch
        for name, value in (
            ("is_available", True), ("get_device_name", "a GPU"), ("mem_get_info", (10_000 * MB, 0)), ("empty_cache", None)
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        measure = kernels.measure

        def measured(case: str, size: int, device: str, timer: Any, link: float) -> Iterator[kernels.Row]:
            self.now += 1.0
            self.measured.append((case, size))
            return (dataclasses.replace(row, size_mb=size) for row in measure(case, 1, "cpu", once, link))

        for name, stub in (
            ("available", lambda device: True),
            ("measure_link", lambda: 10.0),
            ("measure_copy", lambda nbytes, device, timer: 2000.0),
            ("measure", measured),
            ("time", SimpleNamespace(monotonic=lambda: self.now)),
        ):
            monkeypatch.setattr(kernels, name, stub)

    def run(self, out: Path, seconds: float = 1e9, size: list[int] | None = None) -> int:
        """The exit code of a run as if from the command line."""
        self.measured.clear()
        self.monkeypatch.setattr("sys.argv", ["kernels.py", "--out", str(out)])
        try:
            kernels.main(out, seconds, size)
        except Exit as ended:
            return ended.exit_code
        return 0


def test_a_whole_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(kernels.origin, "told_by", lambda *_: "")
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    out = tmp_path / "out"
    assert gpu.run(out) == 0
    written = json.loads((out / "kernels.json").read_text())
    with (out / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [size for size in kernels.SIZES_MB if size < 1024]  # of the largest, 16 times its size is not free
    assert [(row["case"], row["size_mb"]) for row in rows] == [(row["case"], str(row["size_mb"])) for row in written["rows"]]
    assert {(row["case"], int(row["size_mb"])) for row in rows} == {(case, size) for case in CASES for size in sizes}
    assert {row["equal"] for row in rows} == {"True"} and {row["of_copy"] for row in rows} != {""}
    assert (written["gpu"], written["link_gbps"], written["copy_gbps"]) == ("a GPU", 10.0, 2000.0)
    assert written["goals"] == {"of_copy": 0.85, "of_link, unpacking": 6.0}
    assert written["skipped"] == [f"{case}, 1024 MB" for case in CASES]
    assert (written["commit"], written["command"]) == ("abc", "python -m benchmarks.kernels --out OUT")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of time, or killed in the middle of a case: what was measured stays, and is not measured again."""
    gpu, cases = Gpu(monkeypatch), list(CASES)
    assert gpu.run(tmp_path, 4.5, [64, 4]) == kernels.UNFINISHED
    assert gpu.measured == [(case, 64) for case in cases[:5]]
    assert len(json.loads((tmp_path / "kernels.json").read_text())["skipped"]) == 2 * len(cases) - 5
    measure = kernels.measure

    def killed(case: str, *rest: Any) -> Iterator[kernels.Row]:
        if case == cases[7]:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(kernels, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(tmp_path, size=[64, 4])
    assert gpu.measured == [(case, 64) for case in cases[5:7]]
    monkeypatch.setattr(kernels, "measure", measure)
    assert gpu.run(tmp_path, size=[64, 4]) == 0
    assert gpu.measured == [*((case, 64) for case in cases[7:]), *((case, 4) for case in cases)]
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert {(row["case"], row["size_mb"]) for row in written["rows"]} == {(case, size) for case in cases for size in (64, 4)}
    assert written["skipped"] == []
    assert gpu.run(tmp_path, size=[64]) == 0 and not gpu.measured
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert gpu.run(tmp_path, size=[64]) == 0 and len(gpu.measured) == len(cases), "rows of another GPU are no use"


def test_a_result_that_differs_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(kernel_cases, "cast_unit", lambda table, staging, target: target.zero_())
    assert gpu.run(tmp_path, size=[1]) == 1


def test_packing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of what packs, and all bytes; what comes back different is an error."""
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02
    alone = packing.measure([normal])
    assert 12.0 < alone.bits < 12.1 and 0 < alone.apart < 0.001 and alone.raw == 0
    assert alone.whole == pytest.approx(alone.bits / 16)
    beside = packing.measure([normal, normal[:900], (torch.arange(100_000) % 256 << 7).to(torch.int16).view(torch.bfloat16)])
    assert (beside.tensors, beside.raw, beside.bits) == (3, 2, alone.bits)
    assert beside.whole == pytest.approx((alone.whole * 100_000 + 900 + 100_000) / 200_900)
    assert packing.measure([]).bits == 16.0
    monkeypatch.setattr(packing, "unpack", lambda packed: torch.zeros(100_000, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="did not come back bit for bit"):
        packing.measure([normal])


def test_the_committed_packing_is_what_the_format_gives() -> None:
    """Of the made-up weights whose sizes follow from the format; small ones say what large ones do."""
    committed = (Path(__file__).parents[1] / "benchmarks" / "results" / "packing.md").read_text()
    rows = {name: packing.measure([weight[: 1 << 18]]) for name, weight in packing.made_up().items() if name != "normal, 0.02"}
    for name in ("constant", "NaN", "a sixteenth exponent in every block", "all exponents alike"):
        told = next(line for line in committed.splitlines() if line.startswith(f"| {name} |"))
        assert float(told.split("|")[4]) == pytest.approx(rows[name].bits, abs=0.003)
