"""`prefetch-offload bench`, and the benchmark suite's own parts: modes, a run, its rows."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from test_cli import call, ext, folder, is_error
from typer.testing import CliRunner, Result

from benchmarks import gpu_suite, modes, offload, watch
from benchmarks.rows import Row, read, write
from prefetch_offload.commands import bench as bench_command
from prefetch_offload.commands import running
from prefetch_offload.errors import UnsupportedError
from prefetch_offload.testing import load
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.trace import Span, Timeline, Track

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
    assert {(r["simulated"], r["device"]) for r in rows.values()} == {("True", "simulated accelerator")}
    assert {(r["model"], r["dtype"], r["calls"]) for r in rows.values()} == {(str(folder), "float32", "2")}
    assert all(f"torch {torch.__version__}" in r["versions"] for r in rows.values())
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
    for name in (*modes.MODES, *(f"{m}:8GiB" for m in modes.MODES), "ours", "ours:8GiB", "ours:stock:packed"):
        modes.check(name)
    for name in ("cache-dit:much", "stock:8GiB:fp8"):
        with pytest.raises(ValueError, match=r"budget|not known"):
            modes.check(name)
    monkeypatch.setattr(modes.util, "find_spec", lambda name: None)
    with pytest.raises(modes.NotHere, match="flextensor is not installed"):
        modes.place("flextensor", None, torch.device("cpu"))  # type: ignore[arg-type]


def test_profiling_runs_are_warm_up_or_timed() -> None:
    """FlexTensor has its plan after eleven passes of the denoiser."""
    assert [modes.warm_calls("flextensor:8GiB", steps) for steps in (30, 4, 1)] == [1, 3, 12]
    assert modes.warm_calls("flextensor profiling", 4) == 0
    assert modes.warm_calls("ours:stock", 4) == 2


def test_how_much_cache_dit_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of the largest component's layers as `KEPT` of the limit holds; none of the others. Copy streams on CUDA only."""
    asked: list[dict[str, Any]] = []
    for module in ("cache_dit", "cache_dit.offload"):
        fake = ModuleType(module)
        fake.__spec__ = ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(fake, "layerwise_cpu_offload", lambda pipe, **given: asked.append(given), raising=False)
    pipe = CASES["sdxl"].build()
    name, unet = modes.largest(pipe)
    nbytes = sum(p.nbytes for p in unet.parameters())
    layers = [m for m in unet.modules() if list(m.parameters(recurse=False))]
    for limit, share in ((nbytes, modes.KEPT), (10 * nbytes, 1.0), (None, 0.5)):
        asked.clear()
        modes.place("cache-dit kept", pipe, torch.device("cuda"), limit)
        others, largest = asked
        assert largest["module_names"] == [name] and "persistent_buckets" not in others
        assert largest["persistent_buckets"] == int(share * len(layers))
        assert sorted([*others["module_names"], name]) == sorted(
            n for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)
        )
        assert others["async_transfer"] and largest["async_transfer"]
    asked.clear()
    modes.place("cache-dit:8GiB", pipe, torch.device("cpu"), 8 << 30)
    assert not asked[0]["async_transfer"] and "persistent_buckets" not in asked[0]


def test_the_peers_are_those_of_the_extra() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    line = next(line for line in project.splitlines() if line.startswith("peers ="))
    assert sorted(re.findall(r"\"([\w-]+)==", line)) == sorted(modes.PEERS)


def test_what_a_peer_is_held_to() -> None:
    rows = [Row("sdxl", "stock", "none", steps, False, peak_reserved=n << 30) for steps, n in ((30, 9), (4, 8))]
    assert offload.limit_of("cache-dit:stock", rows) == 9 << 30
    assert offload.limit_of("cache-dit:2GiB", []) == 2 << 30
    assert offload.limit_of("ours:2GiB", rows) is None, "it has a budget of its own"
    assert offload.limit_of("stock", rows) is None
    with pytest.raises(modes.NotHere, match="stock offload has not been measured"):
        offload.limit_of("cache-dit:stock", [])
    with pytest.raises(modes.NotHere, match="CUDA"), modes.limited(torch.device("cpu"), 1 << 30):
        pass


# ------------------------------------------------------------------------------------------------------- a run
def measure(folder: Path, out: Path, *mode: str, **changes: Any) -> tuple[int, dict[tuple[str, int], Row]]:
    """One round of one call at two step counts. Returns the exit code, and the rows by mode and steps."""
    options = {"rounds": 1, "calls": 1, "height": 32, "width": 32, "dtype": "float32", "steps": [2, 1], **changes}
    code = 0
    load().configure(1 << 50, 0, 0, 0)
    try:
        offload.main(out, "simgpu", str(folder), mode=list(mode), **options)
    except typer.Exit as ended:
        code = ended.exit_code
    return code, {(r.mode, r.steps): r for r in read(out / "offload.csv")}


def test_a_run_from_end_to_end(ext: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("resident", "stock", "ours:stock", "cache-dit:stock")
    monkeypatch.setattr(modes, "versions", lambda: {"cache-dit": "1.5.3", "flextensor": None, "diffusers-mm": None})
    code, rows = measure(folder, tmp_path, *names, seconds=0)
    assert code == offload.EXIT_UNFINISHED
    assert {r.error for r in rows.values()} == {offload.LATE} and len(rows) == 8, "a row of what there was no time for"
    code, rows = measure(folder, tmp_path, *names, simulated_link=0.2)
    assert code == 0
    assert {r.link_gbps for r in rows.values()} == {rows["stock", 2].link_gbps}
    assert 0.15 < (rows["stock", 2].link_gbps or 0) <= 0.21, "the link that was asked for, measured"
    for (mode, steps), row in rows.items():
        assert row.simulated and row.gpu and row.host and row.versions and row.command and row.link_gbps
        assert (row.height, row.width, row.dtype) == (32, 32, "float32")
        if mode == "cache-dit:stock":
            assert row.error.startswith("NotHere") and row.budget == "stock"
            assert row.peer == "cache-dit 1.5.3"
            continue
        assert row.error == "" and row.equal is True and row.calls == len(row.times) == 1
        assert (row.first_s is not None) == (steps == 2), "later step counts are no first calls"
        assert row.peak_allocated and row.peak_reserved == row.peak_allocated
        assert row.driver_nbytes and row.rss_nbytes and row.pinned_nbytes is not None
        assert (row.d2h_nbytes or 0) < 1 << 18 or mode == "stock"
    assert rows["stock", 2].h2d_nbytes and rows["stock", 2].d2h_nbytes, "the simulator tells of any mode"
    assert rows["ours:stock", 2].hidden_ms is not None and rows["resident", 2].hidden_ms is None
    record = json.loads((tmp_path / "offload.json").read_text())
    assert record["runs"][0]["link"] and len(record["rows"]) == 8
    assert [p.name for p in tmp_path.glob("trace-*.json")] and "ours:stock" in (tmp_path / "reports.txt").read_text()

    visited: list[tuple[str, tuple[int, ...]]] = []
    real = offload.visit

    def visit(scenario: offload.Scenario, mode: str, some: list[Row], *rest: Any) -> None:
        visited.append((mode, tuple(r.steps for r in some)))
        real(scenario, mode, some, *rest)

    monkeypatch.setattr(offload, "visit", visit)
    code, again = measure(folder, tmp_path, "resident", "stock", "ours:stock")
    assert (code, visited) == (0, []) and again == rows, (
        "what is there is not measured again, and nothing of it is lost"
    )
    kept = read(tmp_path / "offload.csv")
    kept[2].error = offload.STOPPED  # stock, 2 steps: killed while it was measured
    kept[2].calls, kept[2].rounds, kept[2].times = 0, 0, []
    kept[5].error = "OutOfMemoryError: no"  # ours:stock, 1 step
    write(tmp_path, kept, [])
    code, again = measure(folder, tmp_path, "stock", "ours:stock")
    assert (code, visited) == (0, [("ours:stock", (1,)), ("stock", (2,))]), "what a run was stopped in comes last"
    assert again["ours:stock", 1].equal is True and again["stock", 2].calls == 1
    assert again["resident", 2].times == rows["resident", 2].times
    kept = read(tmp_path / "offload.csv")
    kept[0].gpu = "another"
    write(tmp_path, kept, [])
    assert measure(folder, tmp_path, "resident")[0] == 0
    assert visited[2:] == [("resident", (2,))], "a row of another GPU is measured anew"


def test_a_pipeline_that_is_kept(ext: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built once for three modes, enabled once for all budgets; images and peaks are those of pipelines of their own. A peer,
    or a visit that failed, leaves nothing behind."""
    built, placed = [], []
    real_build, real_place = offload.build, modes.place
    monkeypatch.setattr(offload, "build", lambda scenario: built.append(1) or real_build(scenario))
    monkeypatch.setattr(modes, "place", lambda mode, *a, **k: placed.append(mode) or real_place(mode, *a, **k))
    names = ("resident", "ours:stock", "ours:20MiB", "ours", "stock")
    alone = measure(folder, tmp_path / "alone", *names)[1]
    assert (len(built), placed) == (5, list(names))
    built.clear(), placed.clear()
    code, rows = measure(folder, tmp_path / "kept", *names, "sequential", "resident", keep=True, rounds=2)
    assert code == 0 and {r.equal for r in rows.values()} == {True} and {r.rounds for r in rows.values()} == {2}
    one = ["resident", "ours:stock", "stock", "sequential"]
    assert placed == one * 2 and len(built) == 4, "in each round, one for them and one for sequential offload"
    for key, row in alone.items():
        peaks = [(r.peak_allocated or 0, r.peak_reserved or 0) for r in (rows[key], row)]
        assert peaks[0] == pytest.approx(peaks[1], rel=0.02), key
        assert (rows[key].d2h_nbytes or 0) <= (row.d2h_nbytes or 0) + (1 << 18)
        assert (rows[key].rss_nbytes is None) == (row.mode == "resident"), "its weights are kept on the host as well"
    for name, placed_anew in (("ours:stock", True), ("ours:20MiB", False), ("ours", False)):
        assert (rows[name, 2].enable_s is not None) == (rows[name, 2].first_s is not None) == placed_anew
    assert measure(folder, tmp_path / "kept", "ours", keep=True, compile="whole")[0] == 2

    built.clear(), placed.clear()
    code, rows = measure(folder, tmp_path / "failed", "ours", "ours:1MiB", "stock", keep=True)
    assert rows["ours:1MiB", 2].error.startswith("BudgetError") and code == 1
    assert rows["stock", 2].error == "" and len(built) == 2, "a visit that failed keeps nothing"


def test_a_visit_has_had_enough(ext: Any, folder: Path, tmp_path: Path) -> None:
    rows = measure(folder, tmp_path, "resident", calls=5, enough=1e-6)[1]
    assert {r.calls for r in rows.values()} == {1}


def test_rows_are_written_as_they_come(ext: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within the visit of a mode: its first step count is there, and the rest says that it did not end."""
    real, left = offload.call, [2]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(offload, "call", call)
    with pytest.raises(KeyboardInterrupt):
        measure(folder, tmp_path, "resident")
    rows = {r.steps: r for r in read(tmp_path / "offload.csv")}
    assert rows[2].calls == 1 and rows[2].error == ""
    assert rows[1].calls == 0 and rows[1].error == offload.STOPPED


def test_time_that_is_up_within_a_visit(
    ext: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left, whoever catches what there; the mode is the last of the next run, which does not count as a failure."""

    def call(*_: Any) -> Any:
        with contextlib.suppress(Exception):
            time.sleep(60)
        raise AssertionError("the time was not up")

    monkeypatch.setattr(offload, "call", call)
    code, rows = measure(folder, tmp_path, "resident", "ours", steps=[1], seconds=8)
    assert code == offload.EXIT_UNFINISHED
    assert [r.error for r in rows.values()] == [offload.STOPPED, offload.LATE]
    monkeypatch.undo()
    monkeypatch.setattr("prefetch_offload.commands.devices.found", lambda: None)
    code, rows = measure(folder, tmp_path, "resident", "ours", steps=[1], seconds=500)
    assert (code, [r.equal for r in rows.values()]) == (0, [True, True])
    assert len(json.loads((tmp_path / "offload.json").read_text())["runs"]) == 2


def test_what_ends_a_run_badly(ext: Any, folder: Path, tmp_path: Path) -> None:
    """Ours without figures does; lossy transports are not equal, and do not."""
    code, rows = measure(folder, tmp_path, "resident", "ours:stock:float16", steps=[1])
    assert (code, rows["ours:stock:float16", 1].equal) == (0, False)
    code, rows = measure(folder, tmp_path, "ours:1KiB", steps=[1])
    assert code == 1 and "too small" in rows["ours:1KiB", 1].error
    exact = Row("sdxl", "ours:stock:packed", "none", 4, False, equal=False)
    assert offload.ours_fails(exact) and not offload.ours_fails(Row("sdxl", "stock", "none", 4, False, error="no"))
    for error, fails in (("OutOfMemoryError: no", False), ("RuntimeError: no", True)):
        assert offload.ours_fails(Row("flux", "resident", "none", 4, False, error=error)) is fails


@pytest.mark.parametrize("module", ["offload", "gpu_suite"])
def test_without_a_gpu(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefetch_offload.commands.devices.found", lambda: None)
    program = typer.Typer()
    program.command()({"offload": offload, "gpu_suite": gpu_suite}[module].main)
    result = CliRunner().invoke(program, ["--out", str(tmp_path / "out"), "--device", "cuda"])
    assert result.exit_code == 2
    assert "this machine has no accelerator" in result.stderr and "Traceback" not in result.output


# ------------------------------------------------------------------------------------------------------ its figures
def test_quartiles_lie_within_the_times() -> None:
    row = Row("sdxl", "ours", "none", 30, False)
    row.took([4.0, 1.0])
    row.took([2.0])
    assert (row.q25_s, row.median_s, row.q75_s, row.slowest_s) == (1.5, 2.0, 3.0, 4.0)
    assert (row.calls, row.rounds) == (3, 2)


def test_a_peak_between_the_readings_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    used, seen = [1], threading.Event()

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        if used[0] == 7:
            seen.set()
        return 10 - used[0], 10

    monkeypatch.setattr(watch.torch, "get_device_module", lambda device: SimpleNamespace(mem_get_info=mem_get_info))
    with watch.Peaks(torch.device("cpu")) as peaks:
        used[0] = 7
        assert seen.wait(10)
        used[0] = 2
    assert peaks.device_nbytes == 7
    assert peaks.rss_nbytes > 1 << 20


def test_copies_of_the_timed_calls_only() -> None:
    def span(track: Track, start: float, length: float, nbytes: int = 0) -> Span:
        return Span(track, "unet", start, length, {"nbytes": nbytes})

    calls = [span("calls", start, 100) for start in (0, 100, 200)]
    slow, fast = span("copy", 10, 80, 10**6), [span("copy", start, 10, 10**9) for start in (110, 210)]
    stalls = [span("stalls", 10, 80), span("stalls", 110, 2)]
    assert watch.copies(Timeline((*calls, slow, *fast, *stalls)), 2) == (1.0, 9.0, 100.0)
    lost = Timeline((*calls[1:], *fast, *stalls[1:]))  # nothing from before the second call: it may have lost some
    assert watch.copies(lost, 2) == (0.0, 10.0, 100.0)
    assert watch.copies(Timeline((*calls[2:], fast[1])), 2) is None
