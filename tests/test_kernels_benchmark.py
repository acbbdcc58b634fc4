"""benchmarks/kernels.py on small units and without a GPU: what it compares is equal, what it counts is right."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prefetch_offload_kernels.table import SCALABLE, SOURCES, TARGETS
from typer import Exit

from benchmarks import kernels


def once(call: Callable[[], object]) -> float:
    call()
    return 1e-3


PLAIN = {"loop of copy_", "_foreach_copy_", "Tensor.to"}
SCALED = {"loop of to, mul_, copy_", "_foreach_copy_, _foreach_mul_", "Tensor.to, mul_, to"}
PACKED = {"PyTorch operators", "_foreach_copy_ of the unpacked"}


@pytest.mark.parametrize("case", kernels.CASES)
def test_every_method_gives_the_same(case: str) -> None:
    rows = list(kernels.measure(case, kernels.MB, "cpu", once, link_gbps=10.0))
    source, _, scaling = kernels.CASES[case]
    others = PACKED if source == "packed" else SCALED if scaling else PLAIN
    assert rows[0].method == "kernel" and {row.method for row in rows[1:]} == others and len(rows) == len(others) + 1
    for row in rows:
        assert row.equal and row.tensors == 8 and row.case == case
        assert 0.9 * kernels.MB <= row.target_nbytes <= kernels.MB
        assert row.gbps == pytest.approx(row.moved_nbytes / 1e-3 / 1e9)
        assert row.of_copy == pytest.approx(1.0, rel=1e-5)  # the clock says that everything takes as long


def test_every_kind_of_the_table_has_a_case() -> None:
    """Every type that a kernel reads and that it writes, and each that can be scaled with and without."""
    conversions = [(source, target, scaling) for source, target, scaling in kernels.CASES.values() if source != target]
    assert {source for source, _, _ in conversions} == {*SOURCES, "packed"}
    assert {target for _, target, _ in conversions} == set(TARGETS)
    wide = {(source, target) for source, target, _ in conversions if source in TARGETS}
    assert wide == {
        (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    }  # fmt: skip
    scalings = {(source, scaling) for source, _, scaling in conversions if source in SCALABLE}
    assert scalings >= {(source, scaling) for source in SCALABLE for scaling in ("", "row")}
    assert {source for source, scaling in scalings if scaling == "tensor"} >= {torch.float8_e4m3fn, torch.int8}


@pytest.mark.parametrize("case", [name for name, (_, _, scaling) in kernels.CASES.items() if scaling])
def test_scales_are_where_the_descriptors_say(case: str) -> None:
    unit = kernels.build_unit(case, kernels.MB, "cpu")
    rows = kernels.CASES[case][2] == "row"
    for scale, source, d in zip(unit.scales, unit.sources, unit.table.descriptors, strict=True):
        assert scale.numel() == d.scales == (source.numel() // kernels.ROW if rows else 1)
        assert ((scale > 0) & (scale < 1)).all() and scale.unique().numel() == scale.numel()


def test_bytes_are_counted() -> None:
    unit = kernels.build_unit("fp8 e4m3 x row scale -> bf16", kernels.MB, "cpu")
    elements = unit.target.numel() // 2
    assert unit.moved_nbytes == 3 * elements + 4 * elements // kernels.ROW
    row = next(kernels.measure("unpack bf16", 16 * kernels.MB, "cpu", once, link_gbps=2.0))
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


def test_a_whole_run_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU: its name, its memory and its clock are made up, and units are a hundredth of the size."""
    for name, value in (
        ("is_available", True), ("get_device_name", "a GPU"), ("mem_get_info", (10_000 * kernels.MB, 0)), ("empty_cache", None)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    measure = kernels.measure
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(kernels, "measure_link", lambda: 10.0)
    monkeypatch.setattr(kernels, "measure_copy", lambda nbytes, device, timer: 2000.0)
    monkeypatch.setattr(
        kernels, "measure", lambda case, nbytes, device, timer, link: measure(case, nbytes // 100, "cpu", once, link)
    )
    kernels.main(tmp_path / "out", largest=1024)
    written = json.loads((tmp_path / "out" / "kernels.json").read_text())
    with (tmp_path / "out" / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [size for size in kernels.SIZES_MB if size < 1024]  # of the largest, 16 times its size is not free
    assert {row["case"] for row in rows} == set(kernels.CASES) and len(rows) == len(written["rows"])
    assert len({(row["case"], row["target_nbytes"]) for row in rows}) == len(kernels.CASES) * len(sizes)
    assert {row["equal"] for row in rows} == {"True"} and {row["of_copy"] for row in rows} != {""}
    assert (written["gpu"], written["link_gbps"], written["copy_gbps"]) == ("a GPU", 10.0, 2000.0)
    assert written["goals"] == {"of_copy": 0.85, "of_link, unpacking": 6.0}
    assert written["skipped"] == [f"{case}, 1024 MB" for case in kernels.CASES]
