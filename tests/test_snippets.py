"""The Python of README.md and getting-started.md runs as it stands, on the simulated accelerator with small pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
from conftest import DEVICE
from diffusers.pipelines import pipeline_utils
from test_docs import ROOT, split
from typer.testing import CliRunner

import prefetch_offload
from prefetch_offload.adapter.pipeline import offload_of
from prefetch_offload.cli import app
from prefetch_offload.testing.pipelines import CASES

# What the pages load from the hub, and what stands for it here.
STANDS_FOR = {"black-forest-labs/FLUX.1-dev": "flux", "stabilityai/stable-diffusion-xl-base-1.0": "sdxl"}
PAGES = ["README.md", "docs/getting-started.md"]


@pytest.fixture
def machine(sim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with one accelerator, the simulated one, and with the hub's models."""
    monkeypatch.chdir(tmp_path)  # traces are written here
    monkeypatch.setattr(pipeline_utils, "get_device", lambda: DEVICE)

    def from_pretrained(name: str, dtype: Any) -> Any:
        pipe = CASES[STANDS_FOR[name]].build(dtype)
        pipe.default_sample_size = 8  # the pages do not say how large an image
        return pipe

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    yield sim
    prefetch_offload.uninstall()


def test_the_predicted_example_is_what_its_command_predicts() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    command, said = re.findall(
        r"prefetch-offload (plan [^`]*?) ``` FLUX.1 dev [^*]*\*\*Predicted\*\*, (.*?)\. Stock", text
    )[0]
    figures = [float(n) for n in re.findall(r"[\d.]+(?= s\b)", said)]
    result = CliRunner().invoke(app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)["rows"]
    assert figures == [round(row[name], 1) for name in ("seconds", "exposed_s", "limit_s")]
    assert row["stock_s"] is None and row["resident_s"] is None, "out of memory"


@pytest.mark.parametrize(
    ("page", "options", "behind", "stock"),
    [
        ("docs/choosing-a-budget.md", "--model flux --budget 14GiB", " 825 ms", False),
        ("README.md", "--model flux --budget 7GiB", " Stock offload", False),
        ("README.md", "--model sdxl --budget 7GiB", " It prints", True),
    ],
)
def test_the_predicted_cards_are_what_their_commands_predict(page: str, options: str, behind: str, stock: bool) -> None:
    """Each figure in seconds, in the order of the links; stock offload's last, where it fits."""
    text = " ".join((ROOT / page).read_text().split())
    command, said = re.findall(rf"prefetch-offload (plan {options} [^`]*?) ``` \*\*Predicted\*\*, (.*?){behind}", text)[0]
    figures = [float(n) for n in re.findall(r"[\d.]+(?= s\b)", said)]
    result = CliRunner().invoke(app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["rows"]
    expected = [round(row[name], 1) for row in rows for name in ("seconds", "exposed_s")]
    assert figures == [*expected, *(round(row["stock_s"], 1) for row in rows if stock)]
    assert all((row["stock_s"] is not None) is stock and row["resident_s"] is None for row in rows), "out of memory"


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [b for b in split(ROOT / page)[1] if b.language == "python"]
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile("\n" * block.line + block.text, ROOT / page, "exec"), names)
        offload = offload_of(names["pipe"]) if "pipe" in names else None
        assert offload is None or offload is names["offload"], f"{page}:{block.line}"
    assert offload is not None, "the last snippet, the simulator's, runs with prefetch_offload"
    assert offload.device.type == DEVICE
    assert "to the device" in capsys.readouterr().out, "the report"
    offload.disable()
