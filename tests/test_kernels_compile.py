"""The kernel compiles without a GPU, does not spill, moves full blocks 16 bytes at a time; and the committed table says so."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from prefetch_offload_kernels import codes, compile_all
from prefetch_offload_kernels.compile_all import ARCHITECTURES, VARIANTS, Result

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
)

TABLE = Path(__file__).parent.parent / "kernels" / "results" / "compiled.csv"
GROUPED = codes.conversion(codes.E4M3, codes.BF16, codes.GROUPED)
FEW = (
    (codes.COPY,),
    (codes.UNPACK,),
    (codes.conversion(codes.F32, codes.BF16, codes.UNSCALED),),
    (codes.conversion(codes.BF16, codes.F32, codes.UNSCALED),),
    (codes.conversion(codes.I8, codes.F16, codes.WIDE),),
    (codes.COPY, codes.UNPACK, GROUPED),
)


def check(kinds: Sequence[int], capability: int) -> None:
    result = compile_all.inspect(kinds, capability)
    assert result.spills == 0, result
    assert result.vectorised, result
    assert 16 <= result.registers <= 96, result  # 96: 20 of an SM's warps, what memory latency needs at least
    assert result.arch == f"sm_{capability}"
    committed = {(row["kinds"], row["arch"]): row for row in compile_all.read_results(TABLE)}[result.kinds, result.arch]
    if committed["triton"] == result.triton:  # another one has another ptxas
        assert committed == {name: str(value) for name, value in dataclasses.asdict(result).items()}


@pytest.mark.parametrize("kinds", FEW, ids=compile_all.name_of)
def test_few_variants(kinds: tuple[int, ...]) -> None:
    check(kinds, 90)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_fp8_on_every_architecture(capability: int) -> None:
    """By integers: e4m3 has no type of its own on sm_80 and sm_86, and nothing may flush what is subnormal to zero."""
    check((GROUPED,), capability)
    ptx = compile_all.compile_variant((GROUPED,), capability)["ptx"]
    assert isinstance(ptx, str)
    assert f".target sm_{capability}" in ptx
    assert "e4m3" not in ptx and ".ftz" not in ptx and "fma" not in ptx
    assert "cvt.rn.bf16x2.f32" in ptx  # rounds to nearest, ties to even


def test_escapes_are_stored_behind_a_barrier() -> None:
    """The interpreter runs one thread, so that only the code says whether stores of several are ordered."""
    ptx = compile_all.compile_variant((codes.UNPACK,), 90)["ptx"]
    assert isinstance(ptx, str)
    full, tail = (m.start() for m in re.finditer(r"\bbar(rier)?\.sync", ptx))  # one in either branch
    last_vector_store = ptx.rindex("st.global.v4.b32")
    assert last_vector_store < full < tail
    assert "st.global.b16" in ptx[full:tail] and "st.global.b16" in ptx[tail:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 120])
def test_more_variants(capability: int) -> None:
    for kinds in VARIANTS[::5]:
        check(kinds, capability)


@pytest.mark.slow
def test_every_kind_rounds_as_pytorch_and_computes_addresses_in_64_bits() -> None:
    """All of them in one kernel, for the oldest architecture."""
    compiled = compile_all.compile_variant([k for k in range(codes.KINDS) if codes.exists(k)], 80)
    ptx, ttir = compiled["ptx"], compiled["ttir"]
    assert isinstance(ptx, str) and isinstance(ttir, str)
    assert ".ftz" not in ptx and "e4m3" not in ptx and "e5m2" not in ptx and not re.search(r"\bfma|mad\.\w*\.?f32", ptx)
    narrowing = set(re.findall(r"\bcvt\.[\w.]*?b?f16(?:x2)?\.f32", ptx))
    assert narrowing == {f"cvt.rn.{to}.f32" for to in ("f16", "f16x2", "bf16", "bf16x2")}
    assert set(re.findall(r"\bmul\.[\w.]*f32", ptx)) == {"mul.rn.f32"}
    # What moves a whole block's pointer is 64 bits wide, or a number in the source; positions in one record of packed weights
    # and in one block have 32.
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    moved = re.findall(r"tt\.addptr ([%\w#]+), ([%\w#]+) : !tt\.ptr<\w+>, (i\d+)", ttir)
    narrow = {base for base, offset, width in moved if width != "i64" and offset not in constants}
    assert len(moved) > 100 and all(re.fullmatch(r"%stream(_\d+)?", base) for base in narrow)


def test_accesses_are_read_off_the_sass() -> None:
    sass = """
        /*0000*/ LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/ @!P0 LDG.E.U8 R5, desc[UR4][R2.64] ;
        /*0020*/ STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*0030*/ STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0040*/ STL.64 [R1], R8 ;
        /*0050*/ LDL.LU R8, [R1] ;
        /*0060*/ LDG.E R8, desc[UR4][R2.64+0x128] ;
    """
    assert compile_all.accesses(sass) == {
        ("LDG", 128): 1,
        ("LDG", 8): 1,
        ("STG", 256): 1,
        ("STG", 16): 1,
        ("STL", 64): 1,
        ("LDL", 32): 1,
        ("LDG", 32): 1,
    }


def test_kinds_are_numbered_without_gaps_or_doubles() -> None:
    names = [codes.name(kind) for kind in range(codes.KINDS)]
    assert len(set(names)) == codes.KINDS < 63  # the mask of kinds fits a signed 64-bit number
    for kind in range(codes.FIRST_PLAIN, codes.KINDS):
        assert codes.conversion(*codes.parts(kind)) == kind
    assert sum(map(codes.exists, range(codes.KINDS))) == 2 + 6 + 3 * 3 * 4
    assert compile_all.block_nbytes(codes.UNPACK) == (48, 64)
    assert compile_all.block_nbytes(GROUPED) == (32, 64)


def test_committed_table_is_complete_and_of_this_kernel() -> None:
    """After a change of the kernel: python -m prefetch_offload_kernels.compile_all --out kernels/results/compiled.md"""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {(compile_all.name_of(kinds), f"sm_{arch}") for kinds in VARIANTS for arch in ARCHITECTURES}
    assert {(row["kinds"], row["arch"]) for row in rows} == expected and len(rows) == len(expected)
    assert {row["kernel"] for row in rows} == {compile_all.source_fingerprint()}
    assert {row["spills"] for row in rows} == {"0"}
    assert {row["vectorised"] for row in rows} == {"True"}


def test_table_keeps_other_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(kinds: Sequence[int], capability: int) -> Result:
        return Result("k", "3.9", f"sm_{capability}", compile_all.name_of(kinds), capability, 0, 0, 64, 1, 1, True)

    monkeypatch.setattr(compile_all, "inspect", fake)
    monkeypatch.setattr(compile_all, "VARIANTS", VARIANTS[:2])
    out = tmp_path / "new" / "table.md"
    assert compile_all.main(["--out", str(out), "--arch", "90"]) == 0
    assert compile_all.main(["--out", str(out), "--arch", "80", "120"]) == 0
    assert [row["arch"] for row in compile_all.read_results(out.with_suffix(".csv"))] == ["sm_80"] * 2 + [
        "sm_90"
    ] * 2 + ["sm_120"] * 2
    text = out.read_text()
    assert "| variant | sm_80 | sm_90 | sm_120 |" in text
    assert "| copy | 80, 64 | 90, 64 | 120, 64 |" in text


def test_a_spill_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spilled = Result("k", "3.9", "sm_80", "copy", 255, 4, 0, 8, 1, 1, True)
    monkeypatch.setattr(compile_all, "inspect", lambda kinds, capability: spilled)
    monkeypatch.setattr(compile_all, "VARIANTS", VARIANTS[:1])
    assert compile_all.main(["--out", str(tmp_path / "table.md"), "--arch", "80"]) == 1
    assert "spills" in capsys.readouterr().out
