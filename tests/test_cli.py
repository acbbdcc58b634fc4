"""The command line, on the simulated accelerator."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from prefetch_offload import __version__
from prefetch_offload.cli import app
from prefetch_offload.commands import demo as demo_command
from prefetch_offload.commands import devices, picture, running
from prefetch_offload.commands import doctor as doctor_command
from prefetch_offload.commands.link import Link
from prefetch_offload.testing import load
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.trace import Level, Span, Timeline


@pytest.fixture
def ext(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine whose only accelerator is the simulated one; nothing may be left on it."""
    monkeypatch.setattr(devices, "found", lambda: None)
    made = load()
    gc.collect()
    made.drain()
    before = made.counters()
    yield made
    gc.collect()
    made.drain()
    made.configure(-1, 0, 0, 0)
    after = made.counters()
    assert after["allocated"] == before["allocated"], "device memory was kept"
    assert after["pinned"] == before["pinned"], "host memory stayed pinned"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL in diffusers' format."""
    made = tmp_path_factory.mktemp("model")
    CASES["sdxl"].build().save_pretrained(made)
    return made


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_on(folder: object, out: Path, *more: object) -> Result:
    return call(
        "run", "--model", folder, "--prompt", "a cat", "--out", out, "--simulate",
        "--steps", 1, "--width", 32, "--height", 32, *more,
    )  # fmt: skip


def is_error(result: Result, *parts: str) -> bool:
    """Exit code 2, one line, no traceback, and all of `parts` in it."""
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.output
    return all(part in lines[-1] for part in parts)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def not_blank(path: Path) -> bool:
    return bool(pixels(path).std() > 5)


def spans_of(path: Path) -> set[str]:
    """The tracks on which a trace has spans."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    return {tracks[e["tid"]] for e in events if e["ph"] == "X"}


# ---------------------------------------------------------------------- run
def test_run_against_stock(ext: Any, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "deep" / "trace.json"
    result = run_on(folder, tmp_path / "new" / "image.png", "--against", "stock", "--trace", trace, "--budget", "stock")
    assert result.exit_code == 0, result.output
    assert "equal to those of stock offload, bit for bit" in result.output
    assert "simulated" in result.output
    assert pixels(tmp_path / "new" / "image.png").shape == (32, 32, 3)
    assert not_blank(tmp_path / "new" / "image.png")
    assert {"copy", "compute", "calls"} <= spans_of(trace)


def test_run_against_resident_and_a_difference(
    ext: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (folder, tmp_path / "image.png", "--against", "resident", "--calls", 1, "--dtype", "bfloat16")
    assert run_on(*arguments).exit_code == 0
    measure = running.measure

    def flawed(label: str, *rest: Any) -> running.Outcome:
        made = measure(label, *rest)
        return dataclasses.replace(made, images=tuple(i + 1e-7 for i in made.images)) if label == "resident" else made

    monkeypatch.setattr(running, "measure", flawed)
    result = run_on(*arguments)
    assert result.exit_code == 1
    assert "DIFFERENT from those of resident" in result.output


def test_run_saves_the_first_frame_of_a_video(ext: Any, tmp_path: Path) -> None:
    CASES["ltx"].build().save_pretrained(tmp_path / "ltx")
    result = run_on(tmp_path / "ltx", tmp_path / "frame.png")
    assert result.exit_code == 0, result.output
    assert pixels(tmp_path / "frame.png").shape == (32, 32, 3)


def test_run_refuses_what_it_cannot_do(ext: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    assert is_error(run_on(tmp_path / "missing", out), "missing", "no such folder")
    assert is_error(run_on(tmp_path, out), "model_index.json")
    assert is_error(run_on("nobody/nothing", out), "nobody/nothing", "hub")
    assert is_error(run_on(folder, out, "--budget", "12 apples"), "12 apples", "GiB")
    assert is_error(run_on(folder, out, "--against", "nothing"), "--against nothing", "stock or resident")
    assert is_error(run_on(folder, out, "--dtype", "int8"), "--dtype int8", "bfloat16")
    assert is_error(run_on(folder, out, "--device", "cuda"), "--simulate", "--device")
    assert is_error(run_on(folder, tmp_path / "image.txt"), "image.txt", "image.png")
    assert not out.exists()


def test_run_without_an_accelerator(ext: Any, folder: Path, tmp_path: Path) -> None:
    arguments = ("run", "--model", folder, "--prompt", "a cat", "--out", tmp_path / "image.png")
    assert is_error(call(*arguments), "no accelerator", "--simulate")
    assert is_error(call(*arguments, "--device", "cuda"), "--device cuda", "no accelerator")
    assert is_error(call(*arguments, "--device", "a card"), "--device a card", "cuda:1")


def test_run_refuses_inputs_that_the_pipeline_does_not_take(ext: Any, tmp_path: Path) -> None:
    CASES["svd"].build().save_pretrained(tmp_path / "svd")
    assert is_error(run_on(tmp_path / "svd", tmp_path / "image.png"), "StableVideoDiffusionPipeline", "`prompt`")


def test_debug_shows_the_traceback(ext: Any, tmp_path: Path) -> None:
    result = run_on(tmp_path / "missing", tmp_path / "image.png", "--debug")
    assert isinstance(result.exception, ValueError)


def test_usage_errors_are_exit_code_2() -> None:
    assert call("run", "--prompt", "a cat").exit_code == 2
    assert call("run", "--steps", 0).exit_code == 2
    assert call("nothing").exit_code == 2


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert __version__ in result.output


# --------------------------------------------------------------------- demo
TINY = dataclasses.replace(
    demo_command.SIMULATED, sizes={}, inputs={"num_inference_steps": 1, "height": 32, "width": 32}
)


def test_demo(ext: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_command, "SIMULATED", TINY)
    monkeypatch.setattr(demo_command, "OP_DELAY_US", 0)
    monkeypatch.setattr(demo_command, "CALLS", 2)
    result = call("demo", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "No accelerator was found" in result.output
    assert "images are equal to the resident pipeline's, bit for bit" in result.output
    assert all(f"│ {part} " in result.output for part in ("unet", "vae", "text_encoder")), "what was copied"
    assert not_blank(tmp_path / "out" / "image.png")
    assert not_blank(tmp_path / "out" / "timeline.png")
    assert {"copy", "compute", "calls"} <= spans_of(tmp_path / "out" / "trace.json")
    assert list((tmp_path / "out" / "model" / "unet").glob("*.safetensors"))
    result = call("demo", "--out", tmp_path / "out", "--device", "cuda")
    assert is_error(result, "--device cuda")


def test_demo_says_when_images_differ(ext: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_command, "SIMULATED", TINY)
    monkeypatch.setattr(demo_command, "OP_DELAY_US", 0)
    monkeypatch.setattr(demo_command, "CALLS", 2)
    monkeypatch.setattr(running, "same", lambda a, b: a is b)
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output
    assert "this is a bug" in result.output


def test_demo_needs_matplotlib_and_says_so_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert is_error(call("demo", "--out", tmp_path / "out"), "matplotlib", "'.[plot]'")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------- doctor
def test_doctor_without_an_accelerator(ext: Any) -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert "There is no accelerator" in result.output
    assert "GB/s" not in result.output


def test_doctor_simulated_as_json(ext: Any) -> None:
    result = call("doctor", "--simulate", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["simulated"] is True
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["link"]["h2d_pinned_gbps"] > 0
    assert facts["link"]["d2h_pageable_gbps"] > 0
    assert facts["pinnable"] <= facts["host_memory"]
    assert json.loads(call("doctor", "--json").output)["link"] is None


def test_doctor_measures_the_link_and_labels_it(ext: Any) -> None:
    ext.configure(-1, 2.0, 1.0, 0.5)
    result = call("doctor", "--simulate")
    assert result.exit_code == 0, result.output
    assert "link (simulated), pinned" in result.output
    assert "link is simulated" in result.output
    facts = doctor_command.gather(simulate=True)
    assert facts.link is not None
    # Never faster than the link; how much slower is the machine's business.
    assert facts.link.h2d_pinned_gbps is not None
    assert 0.2 <= facts.link.h2d_pinned_gbps <= 2.0
    assert 0.05 <= facts.link.h2d_pageable_gbps <= 0.5
    assert facts.link.h2d_pinned_gbps > 1.2 * facts.link.h2d_pageable_gbps


def test_doctor_when_pinning_is_refused(ext: Any) -> None:
    ext.pin_limit(0)
    try:
        result = call("doctor", "--simulate")
    finally:
        ext.pin_limit(-1)
    assert result.exit_code == 0, result.output
    assert "cannot be pinned" in result.output


GIB = 1 << 30
HEALTHY = doctor_command.Facts(
    versions={"torch": "2.13.0"}, system="", wsl=False, accelerator="cuda:0", name="GPU", simulated=False,
    device_memory=24 * GIB, link=Link(25.0, 25.0, 6.0, 2.0), host_memory=64 * GIB, host_available=60 * GIB, swap_used=0,
    cgroup=None, pinnable=57 * GIB, memlock=None, compiler="c++", ninja=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"accelerator": None, "compiler": None}, "C++ compiler and ninja are installed"),
        ({"versions": {"torch": "2.8.1+cu128"}}, "2.8.1+cu128 is older"),
        ({"link": Link(None, None, 6.0, 2.0)}, "cannot be pinned"),
        ({"link": Link(3.1, 3.0, 2.0, 1.0)}, "3.1 GB/s"),
        ({"in_pieces": "PyTorch has them on Linux only"}, "since PyTorch has them on Linux only"),
        ({"wsl": True}, "WSL"),
        ({"swap_used": 2 * GIB}, "2.0 GiB are swapped out"),
        ({"cgroup": 16 * GIB, "pinnable": 14 * GIB}, "16.0 of the host's 64.0 GiB"),
    ],
)
def test_doctor_says_what_would_be_slow(change: dict[str, Any], says: str) -> None:
    assert doctor_command.findings(HEALTHY) == []
    found = doctor_command.findings(dataclasses.replace(HEALTHY, **change))
    assert len(found) == 1
    assert says in found[0].what + found[0].do


# ------------------------------------------------------------------ picture
def test_a_window_of_a_timeline_is_cut_and_told_from_its_start() -> None:
    spans = (Span("compute", "a", 0, 10), Span("copy", "b", 8, 4), Span("copy", "c", 20, 1))
    shown = picture.window(Timeline(spans, (Level(0, 5), Level(9, 7), Level(30, 1))), 9, 15)
    assert [(s.name, s.start_ms, s.duration_ms) for s in shown.spans] == [("a", 0, 1), ("b", 0, 3)]
    assert shown.levels == (Level(0.0, 7),)


def test_compute_is_drawn_without_the_waits_in_it() -> None:
    left = picture.without([Span("compute", "a", 0, 10)], [Span("stalls", "b", 2, 3), Span("stalls", "b", 9, 5)])
    assert [(s.start_ms, s.end_ms) for s in left] == [(0, 2), (5, 9)]


def test_neighbours_are_labelled_once() -> None:
    spans = [Span("copy", "a", 0, 1), Span("copy", "a", 1, 1), Span("copy", "b", 2, 1), Span("copy", "a", 3, 1)]
    assert [(s.name, s.start_ms, s.end_ms) for s in picture.joined(spans, 0.5)] == [
        ("a", 0, 2),
        ("b", 2, 3),
        ("a", 3, 4),
    ]
