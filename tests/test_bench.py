"""`prefetch-offload bench`, and the benchmark suite's own parts: modes, comparison, pictures, the GPU suite's bookkeeping."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import call, ext, folder, is_error
from typer.testing import CliRunner, Result

from benchmarks import gpu_suite, modes
from benchmarks.__main__ import app
from benchmarks.compare import compare
from benchmarks.offload import Row, write
from benchmarks.plots import draw
from prefetch_offload.commands import bench as bench_command
from prefetch_offload.commands import running
from prefetch_offload.errors import UnsupportedError
from prefetch_offload.testing.pipelines import CASES

__all__ = ["ext", "folder"]


# ------------------------------------------------------------------------------------------------ the users' command
def test_bench_is_a_table_a_file_and_a_curve(ext: Any, folder: Path, tmp_path: Path) -> None:
    result = call(
        "bench", "--model", folder, "--simulate", "--steps", 1, "--width", 32, "--height", 32, "--calls", 2,
        "--budget", "7MiB,1KiB", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {row["way"]: row for row in csv.DictReader((tmp_path / "results.csv").read_text().splitlines())}
    assert list(rows) == [
        "resident",
        "stock offload",
        "prefetch_offload, stock's memory",
        "prefetch_offload, default",
        "prefetch_offload, 7MiB",
        "prefetch_offload, 1KiB",
    ]
    assert rows["resident"]["images"] == "reference"
    assert {r["images"] for w, r in rows.items() if w != "resident" and "1KiB" not in w} == {"equal"}
    assert "too small" in rows["prefetch_offload, 1KiB"]["error"]
    assert int(rows["prefetch_offload, 7MiB"]["peak_nbytes"]) <= 7 << 20
    assert float(rows["prefetch_offload, 7MiB"]["bound_s"]) > 0
    assert {r["simulated"] for r in rows.values()} == {"True"}
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert "simulated" in result.output


def small_bench(folder: Path, *more: object) -> Result:
    return call(
        "bench", "--model", folder, "--simulate", "--steps", 1, "--width", 32, "--height", 32, "--calls", 2, *more,
    )  # fmt: skip


def verdict(result: Result, way: str) -> str:
    """The last cell of a way's row."""
    row = next(line for line in result.output.splitlines() if line.startswith(f"│ {way} "))
    return row.split("│")[-2].strip()


def test_bench_says_what_does_not_fit(ext: Any, folder: Path) -> None:
    ext.configure(6 << 20, 0, 0, 0)
    result = small_bench(folder, "--budget", "5632KiB")
    assert result.exit_code == 0, result.output
    assert verdict(result, "resident") == "does not fit"
    assert "prefetch_offload, 5632KiB: " in result.output


def test_bench_where_nothing_fits_has_no_curve(ext: Any, folder: Path, tmp_path: Path) -> None:
    ext.configure(1 << 20, 0, 0, 0)
    result = small_bench(folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("does not fit") == 4
    assert "No way could run, so there is no curve." in result.output
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(row["error"] and not row["later_s"] for row in rows)
    assert not (tmp_path / "curve.png").exists()


def test_bench_tells_a_refusal_from_a_lack_of_memory(ext: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enable = bench_command.enable

    def refusing(pipe: Any, **given: Any) -> Any:
        if given["budget"] == "stock":
            raise UnsupportedError("the unet is a DTensor.\nAnd more.")
        return enable(pipe, **given)

    monkeypatch.setattr(bench_command, "enable", refusing)
    result = small_bench(folder, "--no-resident", "--budget", "1KiB")
    assert result.exit_code == 0, result.output
    assert "prefetch_offload, stock's memory: the unet is a DTensor." in result.output
    assert verdict(result, "prefetch_offload, stock's memory") == "refused"
    assert verdict(result, "prefetch_offload, 1KiB") == "does not fit"


def test_bench_shows_the_median_of_the_calls_after_the_second() -> None:
    def later_s(*seconds: float) -> float | None:
        return bench_command.Result("", running.Outcome("", seconds, 0, ())).later_s

    assert later_s(9.0, 5.0, 2.0, 4.0, 3.0) == 3.0
    assert later_s(9.0, 5.0) == 5.0
    assert bench_command.Result("", None).later_s is None


def test_bench_gives_a_prompt_only_to_pipelines_that_take_one(ext: Any, tmp_path: Path) -> None:
    CASES["svd"].build().save_pretrained(tmp_path)
    assert is_error(small_bench(tmp_path), "StableVideoDiffusionPipeline", "needs `image`", "from Python")
    assert is_error(small_bench(tmp_path, "--prompt", "a cat"), "takes no `prompt`")


def test_bench_refuses_before_it_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "load", lambda *_: pytest.fail("it was loaded"))
    assert is_error(call("bench", "--model", folder, "--simulate", "--budget", "much"), "much")
    assert is_error(call("bench", "--model", folder, "--simulate", "--dtype", "int3"), "int3", "float16")
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        assert is_error(call("bench", "--model", folder, "--simulate", "--out", out), "that is a file; give a folder")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert is_error(call("bench", "--model", folder, "--simulate", "--out", tmp_path), "matplotlib", "'.[plot]'")


# ---------------------------------------------------------------------------------------------------- modes
def test_modes_that_are_not_known_or_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'fast' is not known: resident, stock"):
        modes.check("fast")
    for name in (*modes.MODES, "ours", "ours:8GiB", "ours:stock:packed"):
        modes.check(name)
    monkeypatch.setattr(modes.util, "find_spec", lambda name: None)
    with pytest.raises(modes.NotHere, match="flextensor is not installed"):
        modes.place("flextensor", None, torch.device("cpu"))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ comparing results
def result_of(path: Path, **changes: Any) -> Path:
    """A result of two modes; `changes` are of the second."""
    rows = [Row("sdxl", mode, "none", 30, False) for mode in ("resident", "ours")]
    for row in rows:
        row.took([10.0, 10.1, 9.9])
        row.peak_allocated, row.image, row.equal = 8 << 30, "abc", True
    for name, value in changes.items():
        setattr(rows[1], name, value)
    path.mkdir()
    write(path, rows, {}, 1)
    return path / "offload.csv"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"median_s": 10.4}, []),
        ({"median_s": 10.6}, ["sdxl, ours, compile none, 30 steps: time 10.000 s -> 10.600 s (noise: 5.0%)"]),
        ({"median_s": 10.6, "q25_s": 9.0, "q75_s": 11.0}, []),
        ({"median_s": 9.0}, []),
        ({"peak_allocated": 9 << 30}, ["peak 8192.0 MiB -> 9216.0 MiB"]),
        ({"image": "abd", "equal": False}, ["its image is not the resident one's any more: abc -> abd"]),
        ({"error": "OutOfMemoryError: no"}, ["fails: ran -> OutOfMemoryError: no"]),
    ],
)
def test_what_got_worse(changes: dict[str, Any], found: list[str], tmp_path: Path) -> None:
    old, new = result_of(tmp_path / "old"), result_of(tmp_path / "new", **changes)
    findings, n_rows = compare(old, new)
    assert n_rows == 2
    assert len(findings) == len(found)
    for finding, text in zip(findings, found, strict=True):
        assert text in str(finding)
    done = CliRunner().invoke(app, ["compare", str(old), str(new)])
    assert done.exit_code == bool(found), done.output
    assert f"2 rows compared, {len(found)} worse" in done.output


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    old = result_of(tmp_path / "old")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert CliRunner().invoke(app, ["compare", str(old), str(tmp_path / "other.csv")]).exit_code == 2
    new = result_of(tmp_path / "new")
    new.write_text(new.read_text().replace(",False,", ",True,", 1).replace(",30,", ",4,"))
    with pytest.raises(ValueError, match="no row in common"):
        compare(old, new)


def test_pictures(tmp_path: Path) -> None:
    made = draw(result_of(tmp_path / "a", median_s=12.0))
    assert [p.name for p in made] == ["sdxl-none-memory.png", "sdxl-none-steps.png"]
    assert all(p.stat().st_size > 10_000 for p in made)


# ---------------------------------------------------------------------------------------------------- the GPU suite
def test_the_suite_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = tmp_path / "marks"

    def script(name: str, code: str) -> gpu_suite.Part:
        return gpu_suite.Part(name, 20, ("-c", f"open({str(marks)!r}, 'a').write({name!r} + ' '); {code}", "OUT"))

    bad = script("bad", "raise SystemExit(3)")
    slow = gpu_suite.Part("slow", 2, ("-c", "import time; print('begun', flush=True); time.sleep(60)"))
    monkeypatch.setattr(gpu_suite, "parts", lambda device: [script("good", "import sys; print(sys.argv[1])"), bad, slow])
    for _ in range(2):
        with pytest.raises(gpu_suite.typer.Exit):
            gpu_suite.main(tmp_path, "cuda", 100, None)
    state = json.loads((tmp_path / "suite.json").read_text())
    assert {name: s["ended"] for name, s in state.items()} == {"good": 0, "bad": 3, "slow": "out of time"}
    assert marks.read_text() == "good bad bad ", "what was done is not done again"
    assert (tmp_path / "good" / "output.txt").read_text().strip() == str(tmp_path / "good")
    assert (tmp_path / "slow" / "output.txt").read_text() == "begun\n", "what it wrote before its time was over"
    assert str(tmp_path) not in state["good"]["command"], "a command that can be quoted"
    gpu_suite.main(tmp_path, "cuda", 100, ["good"])
    assert marks.read_text().endswith("good "), "asked for by name"


def test_a_part_that_does_not_fit_is_left_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite, "parts", lambda device: [gpu_suite.Part("long", 300, ("-c", "pass"))])
    gpu_suite.main(tmp_path, "cuda", 20, None)
    assert "long: left for the next run" in capsys.readouterr().out
    assert not (tmp_path / "long").exists()


@pytest.mark.parametrize("device", ["cuda", "simgpu"])
def test_every_part_names_modes_that_exist(device: str) -> None:
    found = gpu_suite.parts(device)
    assert len({p.name for p in found}) == len(found)
    for part in found:
        assert part.seconds < 600
        for word, value in zip(part.command, part.command[1:], strict=False):
            if word == "--mode":
                modes.check(value)
            if word.startswith("tests/"):
                assert (Path(__file__).parents[1] / word).is_file()
