"""What reads the benchmark suite's rows: comparison, tables, pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import tables
from benchmarks.__main__ import app
from benchmarks.compare import compare
from benchmarks.plots import _memory, draw, rows_of, timeline_of
from benchmarks.rows import Row, write
from prefetch_offload.trace import Level, Span, Timeline
from prefetch_offload.trace import write as write_trace


def result_of(path: Path, **changes: Any) -> Path:
    """A result of two modes; `changes` are of the second."""
    rows = [Row("sdxl", mode, "none", 30, False) for mode in ("resident", "ours")]
    for row in rows:
        row.took([10.0, 10.1, 9.9])
        row.peak_allocated, row.peak_reserved, row.image, row.equal = 8 << 30, 9 << 30, "abc", True
        row.first_s, row.d2h_nbytes, row.recompiles, row.gpu, row.host = 20.0, 0, 0, "a GPU", "a host"
    for name, value in changes.items():
        setattr(rows[1], name, value)
    path.mkdir()
    write(path, rows[: 1 if changes.get("mode") == "gone" else 2], [])
    return path / "offload.csv"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"median_s": 10.4}, []),
        ({"median_s": 10.6}, ["sdxl, ours, compile none, 30 steps: time 10.000 s -> 10.600 s (noise: 5.0%)"]),
        ({"median_s": 10.6, "q25_s": 9.0, "q75_s": 11.0}, []),
        ({"median_s": 9.0}, []),
        ({"median_s": 12.0, "calls": 1, "times": [12.0]}, []),
        ({"median_s": 13.0, "calls": 1, "times": [13.0]}, ["time 10.000 s -> 13.000 s (noise: 25.0%)"]),
        ({"peak_allocated": 9 << 30}, ["peak 8192.0 MiB -> 9216.0 MiB"]),
        ({"image": "abd", "equal": False}, ["its image is not the resident one's any more: abc -> abd"]),
        ({"error": "OutOfMemoryError: no"}, ["fails: ran -> OutOfMemoryError: no"]),
        ({"median_s": 13.0, "q25_s": 1.0, "q75_s": 19.0}, ["time 10.000 s -> 13.000 s (noise: 25.0%)"]),
        ({"median_s": None, "q25_s": None, "q75_s": None}, ["has no figures any more: 10.000 s -> nothing"]),
        ({"first_s": 24.0}, []),
        ({"first_s": 26.0}, ["first call 20.000 s -> 26.000 s"]),
        ({"d2h_nbytes": 5 << 30}, ["written back 0.0 MiB -> 5120.0 MiB"]),
        ({"recompiles": 40}, ["recompiles 0.0 -> 40.0"]),
        ({"peak_reserved": 18 << 30}, ["peak reserved 9216.0 MiB -> 18432.0 MiB"]),
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
    assert f"2 rows compared, {len(found)} worse. Noise: 5.0% of a time" in done.output


def test_a_row_that_is_gone(tmp_path: Path) -> None:
    findings, n_rows = compare(result_of(tmp_path / "old"), result_of(tmp_path / "new", mode="gone"))
    assert n_rows == 1
    assert [str(f) for f in findings] == ["sdxl, ours, compile none, 30 steps: is gone: ran -> no row (noise: 0.0%)"]


def test_links_that_differ_are_told(tmp_path: Path) -> None:
    old = result_of(tmp_path / "old", link_gbps=24.0)
    for gbps, told in ((25.0, False), (12.0, True)):
        done = CliRunner().invoke(app, ["compare", str(old), str(result_of(tmp_path / str(gbps), link_gbps=gbps))])
        assert done.exit_code == 0 and ("The links differ, 24 and 12 GB/s" in done.output) is told


@pytest.mark.parametrize("column", ["gpu", "host"])
def test_results_of_different_machines(column: str, tmp_path: Path) -> None:
    files = [str(result_of(tmp_path / "old")), str(result_of(tmp_path / "new", **{column: "another"}))]
    refused = CliRunner().invoke(app, ["compare", *files])
    assert refused.exit_code == 2 and "another" in refused.stderr and "--any-machine" in refused.stderr
    assert CliRunner().invoke(app, ["compare", *files, "--any-machine"]).exit_code == 0
    assert "Noise: 5.0%" in CliRunner().invoke(app, ["compare", "--help"]).output


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    old = result_of(tmp_path / "old")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert CliRunner().invoke(app, ["compare", str(old), str(tmp_path / "other.csv")]).exit_code == 2
    new = result_of(tmp_path / "new")
    new.write_text(new.read_text().replace(",False,", ",True,", 1).replace(",30,", ",4,"))
    with pytest.raises(ValueError, match="no row in common"):
        compare(old, new)


def test_pictures(tmp_path: Path) -> None:
    """Several files in one picture, of each model; and the timelines."""
    one, two = result_of(tmp_path / "a"), result_of(tmp_path / "b", mode="ours:8GiB")
    spans = (Span("calls", "call", 0, 100), Span("compute", "unet", 0, 90), Span("copy", "unet", 5, 20, {"nbytes": 9}))
    timeline = Timeline(spans, (Level(0.0, 1 << 20),), True, "simgpu")
    write_trace(timeline, two.parent / "trace-sdxl-ours.json")
    assert timeline_of(two.parent / "trace-sdxl-ours.json") == timeline
    assert [r.mode for r in rows_of([one, two])] == ["resident", "ours", "ours:8GiB"]
    made = draw([one, two])
    assert [p.name for p in made] == ["sdxl-none-memory-30.png", "timeline-sdxl-ours.png"], "of one step count"
    assert all(p.stat().st_size > 10_000 and p.parent == one.parent for p in made)
    done = CliRunner().invoke(app, ["plot", str(one), str(two)])
    assert done.exit_code == 0 and len(done.output.splitlines()) == 3
    assert CliRunner().invoke(app, ["table", str(one), str(two)]).output == (one.parent / "tables.md").read_text()


def test_names_in_a_picture_do_not_lie_on_each_other() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(8, 5))
    points = [("resident", 54.0, 0.35), ("ours", 54.2, 0.34), ("ours:48MiB", 54.0, 0.36), ("stock", 30.0, 1.7)]
    rows = []
    for mode, mib, seconds in points:
        rows.append(Row("flux", mode, "none", 4, False, peak_allocated=int(mib * 2**20)))
        rows[-1].took([seconds])
    _memory(axes, rows)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [mode for mode, _, _ in points]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plt.close(figure)


def test_the_curve_of_memory_is_drawn_for_every_step_count(tmp_path: Path) -> None:
    """Not for the largest alone, at which few modes may have been measured."""
    rows = [Row("sdxl", mode, "none", 30, False) for mode in ("resident", "stock", "ours:8GiB", "ours:12GiB")]
    rows += [Row("sdxl", mode, "none", 4, False) for mode in ("resident", "stock")]
    rows += [Row("sdxl", "resident", "none", 50, False), Row("sdxl", "resident", "whole", 30, False)]
    for number, row in enumerate(rows):
        row.took([1.0 + number, 2.0 + number])
        row.peak_allocated = (8 + number) << 30
    write(tmp_path, rows, [])
    made = draw([tmp_path / "offload.csv"])
    assert [p.name for p in made] == ["sdxl-none-memory-4.png", "sdxl-none-memory-30.png", "sdxl-none-steps.png"]


def test_a_table_says_all_that_a_row_has_and_which_goals_are_met(tmp_path: Path) -> None:
    def row(mode: str, steps: int, seconds: float, **figures: Any) -> Row:
        made = Row("sdxl", mode, "none", steps, figures.pop("simulated", False), gpu="a GPU", host="a host", equal=True)
        made.took([seconds] * (1 if mode.startswith("cache-dit") else 2))
        for name, value in {"peak_allocated": 8 << 30, "link_gbps": 50.0, "commit": "c" * 40, **figures}.items():
            setattr(made, name, value)
        return made

    rows = [row("resident", 30, 10.0), row("stock", 30, 21.0), row("resident", 4, 2.0), row("stock", 4, 8.0)]
    ours = {"h2d_nbytes": 1 << 30, "d2h_nbytes": 0, "exposed_ms": 12.0, "copy_gbps": 49.5, "graphs": 1, "recompiles": 0}
    rows += [row("ours:stock", 30, 10.4, **ours), row("ours:stock", 4, 3.0), row("cache-dit:stock", 4, 2.5)]
    rows += [Row("sdxl", "flextensor:stock", "none", 4, False, gpu="a GPU", host="a host", error="NotHere: a | b")]
    write(tmp_path, rows, [])
    text = CliRunner().invoke(app, ["table", str(tmp_path / "offload.csv")]).output
    lines = text.splitlines()
    assert "Sizes are in GiB." in lines
    assert "a GPU, link 50 to 50 GB/s; ; commit cccccccccccc; host a host" in lines
    cells = next(line for line in lines if line.startswith("| ours:stock | 30 |")).strip("| ").split(" | ")
    assert dict(zip(tables.HEADINGS, cells, strict=True)).items() >= {
        ("median s", "10.400"), ("x resident", "1.04"), ("x faster than stock", "2.02"), ("peak", "8.00"),
        ("in, back", "1.00, 0.00"), ("exposed ms", "12.0"), ("GB/s", "49.5"), ("graphs, recompiles", "1, 0"),
        ("image", "equal"),
    }  # fmt: skip
    assert any(line.startswith("| flextensor:stock | 4 | NotHere: a / b |") for line in lines), "never dropped"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    why = "; trace-sdxl-ours-stock-none-*.json shows why"
    assert [line for line in lines if line.startswith("- ")] == [
        "- met: 30 steps at stock's memory, x resident: 1.04, the goal is at most 1.05",
        "- met: 30 steps at stock's memory, x faster than stock: 2.02, the goal is at least 2",
        "- **MISSED**: 4 steps at stock's memory, x resident: 1.50, the goal is at most 1.35" + why,
        "- **MISSED**: 4 steps at stock's memory, x faster than stock: 2.67, the goal is at least 5" + why,
        "- **MISSED**: 4 steps ahead of every peer in stock (the best of 1: cache-dit:stock), x faster: 0.83 by one call, "
        "the goal is at least 1" + why,
    ]
    write(tmp_path, [row("resident", 4, 2.0, simulated=True), row("ours:stock", 4, 3.0, simulated=True)], [])
    text = CliRunner().invoke(app, ["table", str(tmp_path / "offload.csv")]).output
    assert "simulated" in text and "goal" not in text
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert CliRunner().invoke(app, ["table", str(tmp_path / "other.csv")]).exit_code == 2


def test_the_goals_of_flux() -> None:
    def row(mode: str, steps: int, seconds: float, copy_gbps: float | None = None, simulated: bool = False) -> Row:
        made = Row("flux", mode, "none", steps, simulated, gpu="a GPU", link_gbps=50.0, copy_gbps=copy_gbps)
        made.took([seconds, seconds])
        return made

    rows = [row("resident", 28, 10.0), row("ours:8GiB", 28, 15.0, 46.0), row("ours:16GiB", 28, 10.4, 20.0)]
    rows += [row("ours:8GiB", 4, 4.0, 44.0), row("ours:16GiB", 4, 2.0), row("resident", 4, 1.0), row("ours", 4, 1.0, 9.0)]
    why = "; trace-flux-ours-{}-none-*.json shows why"
    assert tables.goals(rows) == [
        "- met: 28 steps in 8GiB, streaming, of the pinned link: 0.92, the goal is at least 0.9",
        "- met: 28 steps in 16GiB, x resident: 1.04, the goal is at most 1.05",
        "- **MISSED**: 4 steps in 8GiB, streaming, of the pinned link: 0.88, the goal is at least 0.9" + why.format("8GiB"),
        "- **MISSED**: 4 steps in 16GiB, x resident: 2.00, the goal is at most 1.05" + why.format("16GiB"),
    ]
    assert tables.goals([row("ours:8GiB", 28, 15.0), row("ours:16GiB", 28, 10.4)]) == [], "nothing to hold them against"
    assert tables.goals([row("ours:8GiB", 28, 15.0, 9.0, simulated=True)]) == []
