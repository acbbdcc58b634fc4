"""The committed predictions are what the code predicts."""

from __future__ import annotations

import csv
import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from prefetch_offload.commands.plan import look
from prefetch_offload.config import GIB

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PREDICT = runpy.run_path(str(BENCHMARKS / "predict.py"))
CASES = {case.name: case for case in PREDICT["CASES"]}


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize("place", [0, 5, 13, -1])
def test_a_committed_row(name: str, place: int) -> None:
    """`python -m benchmarks.predict` makes them all again."""
    with (BENCHMARKS / "results" / f"predicted-{name}.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))[place]
    gib, link = int(committed["budget_nbytes"]) / GIB, committed["link_gbps"]
    request = dataclasses.replace(CASES[name].request, budgets=(f"{gib:g}GiB",), links=(link,))
    (row,) = look(request).rows
    for column, value in dataclasses.asdict(row).items():
        said = committed[column]
        assert said == ("" if value is None else str(round(value, 4) if isinstance(value, float) else value)), column


def test_the_committed_text_has_the_same_figures() -> None:
    text = (BENCHMARKS / "results" / "predicted.md").read_text()
    for name in ("sdxl", "flux"):
        with (BENCHMARKS / "results" / f"predicted-{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                assert f"{float(row['seconds']):.2f} ({float(row['limit_s']):.2f})" in text, row


@pytest.mark.parametrize(("name", "gib"), [("flux", 1), ("flux-a100", 0.53)])
def test_where_others_need_less_than_ours_can_the_text_says_so(name: str, gib: float) -> None:
    text = (BENCHMARKS / "results" / "predicted.md").read_text()
    part = text.partition(f"## {CASES[name].title}")[2].partition("\n## ")[0]
    smallest = look(dataclasses.replace(CASES[name].request, budgets=("2GiB",), links=("25",))).workload.smallest_budget_nbytes
    assert gib * GIB < smallest
    assert f"| predicted: prefetch_offload | {gib:g} | not feasible: at least {smallest / GIB:.2f} GiB |" in part


def test_what_pages_quote_is_in_the_committed_text() -> None:
    """test_snippets.py has the pages' figures from the same commands."""
    text = (BENCHMARKS / "results" / "predicted.md").read_text()
    assert "\n".join(PREDICT["quoted"]()).rstrip() in text
    root = BENCHMARKS.parent
    pages = "\n".join(path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md")))
    commands = re.findall(r"prefetch-offload (plan [^`\n]*)\s+```[^`]*?\*\*Predicted\*\*, by this command", pages)
    assert sorted(commands) == sorted(PREDICT["QUOTED"]) and len(commands) == pages.count("by this command")
    for command, request in PREDICT["QUOTED"].items():
        words = ["--budget", ",".join(request.budgets), "--link", ",".join(request.links), "--step-ms", f"{request.step_ms:g}"]
        assert command.split() == ["plan", "--model", request.model, *words]
