"""benchmarks/kernels.py on small units and without a GPU: what it compares is equal, what it counts is right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer import Exit

from benchmarks import kernels


def once(call: Callable[[], object]) -> float:
    call()
    return 1e-3


@pytest.mark.parametrize("case", kernels.CASES)
def test_every_method_gives_the_same(case: str) -> None:
    rows = list(kernels.measure(case, kernels.MB, "cpu", once, link_gbps=10.0))
    assert rows[0].method == "kernel" and len(rows) in (2, 4)
    for row in rows:
        assert row.equal and row.tensors == 8 and row.case == case
        assert 0.9 * kernels.MB <= row.target_nbytes <= kernels.MB
        assert row.gbps == pytest.approx(row.moved_nbytes / 1e-3 / 1e9)
        assert row.of_copy == pytest.approx(1.0, rel=1e-5)  # the clock says that everything takes as long


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
