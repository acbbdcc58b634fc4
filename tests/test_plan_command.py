"""`prefetch-offload plan`: on built-in figures, on folders, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from prefetch_offload.cli import app
from prefetch_offload.commands import curve, models, picture
from prefetch_offload.commands import plan as plan_command
from prefetch_offload.commands.plan import Request, look
from prefetch_offload.config import GIB
from prefetch_offload.errors import BudgetError, SettingError
from prefetch_offload.figures import MODELS
from prefetch_offload.shapes import Block, Part
from prefetch_offload.testing.pipelines import CASES
from prefetch_offload.trace import Span, Timeline


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *(str(a) for a in arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


def is_error(result: Result, *parts: str) -> bool:
    """Exit code 2, one line, no traceback, and all of `parts` in it."""
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return all(part in lines[0] for part in parts)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SDXL in diffusers' format."""
    made = tmp_path_factory.mktemp("model")
    CASES["sdxl"].build().save_pretrained(made)
    return made


# ---------------------------------------------------------- built-in figures
@pytest.mark.parametrize("model", list(MODELS))
def test_every_built_in_model(model: str) -> None:
    made = facts("--model", model)
    rows = made["rows"]
    assert made["predicted"] is True
    assert len(rows) >= 5
    assert rows[0]["budget_nbytes"] >= made["smallest_budget_nbytes"]
    assert rows[-1]["resident_s"] == pytest.approx(rows[-1]["seconds"], rel=1e-6)
    assert rows[-1]["h2d_nbytes"] == 0
    for row in rows:
        assert row["peak_nbytes"] <= row["budget_nbytes"]
        assert row["seconds"] >= row["limit_s"] * (1 - 1e-6)
        assert row["copied_gbps"] == pytest.approx(row["h2d_nbytes"] / row["seconds"] / 1e9)
        assert row["copied_gbps"] <= row["link_gbps"] * row["link_use"] * (1 + 1e-6), "each copy takes a little longer"
        assert row["link_use"] <= 1 and (row["link_use"] > 0) == (row["copied_gbps"] > 0) == (row["h2d_nbytes"] > 0)
        assert row["gap"] == pytest.approx(row["seconds"] / row["limit_s"] - 1, abs=1e-5)
        assert (row["stock_s"] is None) == (row["budget_nbytes"] < made["stock_nbytes"])
        assert (row["resident_s"] is None) == (row["budget_nbytes"] < made["resident_nbytes"])
    stock = next(row for row in rows if row["stock_s"] is not None)
    assert stock["seconds"] < stock["stock_s"]


def test_the_table_says_what_it_rests_on() -> None:
    result = call("--model", "flux", "--budget", "8GiB", "--budget", "24GiB,40GiB", "--link", 25, "--link", "55")
    assert result.exit_code == 0, result.output
    assert "predicted: FLUX.1 dev" in result.output
    rows = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [tuple(cell.strip() for cell in row.split("│")[1:3]) for row in rows] == [
        (link, budget) for link in ("25", "55") for budget in ("8.00", "24.00", "40.00")
    ]
    assert "out of memory" in rows[0] and "out of memory" not in rows[2]
    assert rows[0].split("│")[6].strip() == "100%" and rows[2].split("│")[6].strip() == "0%"
    assert "535 ms (A100 80 GB" in result.output
    assert "28 (default)" in result.output
    assert "estimates" in result.output
    assert "waits for copies |" in result.output
    assert "3 of 28 passes of transformer shown" in result.output


def test_options_are_taken() -> None:
    made = facts(
        "--model", "sdxl", "--budget", "12GiB", "--step-ms", 230, "--steps", 4, "--encode-ms", 10, "--decode-ms", 70,
        "--activations", 2,
    )  # fmt: skip
    assert made["rows"][0]["seconds"] == pytest.approx(1.0)
    assert made["resident_nbytes"] == pytest.approx(6.937e9 + 2 * GIB, rel=1e-3)
    assert sum("given" in line for line in made["assumptions"]) == 5


def test_encode_and_decode_are_scaled_with_a_given_step() -> None:
    model = MODELS["sdxl"]
    once = model.steps * model.step_ms + model.encode_ms + model.decode_ms
    assert facts("--model", "sdxl", "--budget", "12GiB", "--step-ms", 2 * model.step_ms)["rows"][0][
        "seconds"
    ] == pytest.approx(2 * once / 1e3)


def test_a_faster_link_and_more_memory_do_not_hurt_much() -> None:
    made = facts("--model", "sdxl", "--link", "12,55")
    slow, fast = ([r["seconds"] for r in made["rows"] if r["link_gbps"] == gbps] for gbps in (12, 55))
    assert all(f <= s for s, f in zip(slow, fast, strict=True))
    assert slow[-1] < slow[0]


# ------------------------------------------------------------------- folders
def test_a_folder_is_read_without_its_weights(folder: Path) -> None:
    known = models.find(str(folder), None)
    pipe = CASES["sdxl"].build()
    assert [p.name for p in known.parts] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert [p.kind for p in known.parts] == ["encoder", "encoder", "denoiser", "decoder"]
    for part in known.parts:
        module = getattr(pipe, part.name)
        assert part.parameters == pytest.approx(sum(p.numel() for p in module.parameters()), rel=0.001)
        assert part.dtype == "float32"
    assert known.figures is None, "far from the real one's size"


def test_a_folder_through_the_command(folder: Path) -> None:
    made = facts("--model", folder, "--step-ms", 5, "--steps", 4)
    assert made["rows"][-1]["resident_s"] == pytest.approx(4 * 0.005 + 2.5 * 0.005, rel=1e-3)
    assert any("assumed" in line for line in made["assumptions"])
    result = call("--model", folder, "--step-ms", 5, "--link", 1)
    assert result.exit_code == 0, result.output
    assert "budget MiB" in result.output


def test_dtype_halves_a_folder(folder: Path) -> None:
    whole, half = (models.find(str(folder), dtype) for dtype in (None, "float16"))
    assert [p.parameters for p in whole.parts] == [p.parameters for p in half.parts]
    ratio = sum(p.total_nbytes for p in half.parts) / sum(p.total_nbytes for p in whole.parts)
    assert ratio == pytest.approx(0.5, rel=0.02)


def test_a_folder_of_about_the_size_of_built_in_figures_takes_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = models.find(str(folder), None)
    parts = tuple(
        dataclasses.replace(p, parameters=next(q.parameters for q in small.parts if q.name == p.name))
        for p in MODELS["sdxl"].parts
    )
    monkeypatch.setitem(MODELS, "sdxl", dataclasses.replace(MODELS["sdxl"], parts=parts))
    known = models.find(str(folder), None)
    assert known.figures is MODELS["sdxl"] and not known.own
    assert [p.activation_nbytes for p in known.parts] == [p.activation_nbytes for p in parts]
    assert any("built-in sdxl" in note for note in known.notes)


def test_one_copy_of_the_weights_is_taken(tmp_path: Path) -> None:
    assert models._chosen(["model.fp16.safetensors", "model.safetensors"]) == (["model.safetensors"], "")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert models._chosen([*shards, "model.fp16.safetensors"]) == (shards, "")
    assert models._chosen(["diffusion_pytorch_model.fp16.safetensors"])[1] == "fp16"
    assert models._chosen(["other.safetensors"]) == ([], "")


def test_shards_and_variants_of_a_folder(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    weights = {f"blocks.{i}.weight": torch.zeros(4, 8, dtype=torch.bfloat16) for i in range(11)}
    for old in (copied / "unet").glob("*.safetensors"):
        old.unlink()
    names = list(weights)
    for number, part in enumerate((names[:5], names[5:]), 1):
        name = f"diffusion_pytorch_model.fp16-{number:05}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, copied / "unet" / name)
    known = models.find(str(copied), None)
    unet = next(p for p in known.parts if p.name == "unet")
    assert unet.parameters == 11 * 32
    assert unet.dtype == "bfloat16"
    assert any("fp16" in note for note in known.notes)


def test_names_are_put_in_the_order_of_a_model() -> None:
    names = ["conv_out.weight", "up_blocks.0.x", "mid_block.x", "down_blocks.10.x", "down_blocks.2.x", "conv_in.weight"]
    assert sorted(names, key=models._position) == [
        "conv_in.weight", "down_blocks.2.x", "down_blocks.10.x", "mid_block.x", "up_blocks.0.x", "conv_out.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["flux", "wan", "svd", "cogvideox"])
def test_other_pipelines(case: str, tmp_path: Path) -> None:
    CASES[case].build().save_pretrained(tmp_path)
    made = facts("--model", tmp_path, "--step-ms", 3, "--budget", "1GiB")
    assert made["rows"][0]["resident_s"] is not None


# ----------------------------------------------------------------- bad input
def test_it_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    assert is_error(call("--model", "sdxk"), "sdxk", "sdxl")
    assert is_error(call("--model", tmp_path / "none"), "none", "no such folder")
    assert is_error(call("--model", tmp_path), "model_index.json")
    assert is_error(call("--model", "nobody/nothing"), "nobody/nothing", "hub", "flux")
    assert is_error(call("--model", "sdxl", "--budget", "12 apples"), "12 apples", "GiB")
    assert is_error(call("--model", "sdxl", "--budget", "8GiB,"), "budget")
    assert is_error(call("--model", "sdxl", "--link", "fast"), "--link", "fast")
    assert is_error(call("--model", "sdxl", "--link", 0), "--link 0", "positive")
    assert is_error(call("--model", "sdxl", "--link", "nan"), "--link")
    assert is_error(call("--model", "sdxl", "--step-ms", -1), "--step-ms -1")
    assert is_error(call("--model", "sdxl", "--steps", 0), "--steps 0")
    assert is_error(call("--model", "sdxl", "--activations", -1), "--activations -1")
    assert is_error(call("--model", "sdxl", "--dtype", "int3"), "--dtype int3", "bfloat16")
    assert is_error(call("--model", "sdxl", "--dtype", "float16"), "--dtype", "built-in")
    assert is_error(call("--model", folder), "--step-ms")
    taken = tmp_path / "file"
    taken.write_text("")
    assert is_error(call("--model", "sdxl", "--out", taken), "file", "folder")


def test_it_refuses_folders_that_are_not_what_they_seem(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    for text, says in (
        ("{", "JSON"),
        ("[]", "components"),
        ('{"_class_name": "StableCascadeCombinedPipeline"}', "model_cpu_offload_seq"),
        ('{"_class_name": "NoSuchPipeline"}', "NoSuchPipeline"),
        ('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}', "safetensors"),
    ):
        index.write_text(text)
        assert is_error(call("--model", tmp_path, "--step-ms", 1), says), text
    shutil.copytree(folder, tmp_path / "broken")
    next((tmp_path / "broken" / "unet").glob("*.safetensors")).write_bytes(b"12345678 nothing")
    assert is_error(call("--model", tmp_path / "broken", "--step-ms", 1), "unet/", "cannot be read")


def test_below_the_smallest_budget_the_smallest_is_named() -> None:
    smallest = facts("--model", "flux", "--budget", "8GiB")["smallest_budget_nbytes"]
    assert is_error(call("--model", "flux", "--budget", "1GiB"), str(smallest), "at least")
    assert facts("--model", "flux", "--budget", smallest)["rows"][0]["seconds"] > 0
    with pytest.raises(BudgetError, match=str(smallest)):
        look(Request("flux", (str(smallest - 1),)))


def test_the_hub_is_asked_for_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = models.Folder(folder, "x/y")
    asked: list[str] = []

    class Repository:
        label = "x/y"

        def __init__(self, repo: str) -> None:
            asked.append(repo)
            self.index, self.files, self.tensors = local.index, local.files, local.tensors

    monkeypatch.setattr(models, "Hub", Repository)
    known = models.find("x/y", None)
    assert asked == ["x/y"]
    assert known.parts == models.find(str(folder), None).parts


def test_a_repository_of_the_hub_is_listed_and_its_headers_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what `huggingface_hub` gives, in its own types; no weights are asked for."""
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    asked: list[str] = []

    def model_info(self: HfApi, repo: str) -> ModelInfo:
        assert repo == "x/y"
        return ModelInfo(id=repo, siblings=[{"rfilename": name} for name in names])

    def download(repo: str, name: str) -> str:
        asked.append(name)
        return str(folder / name)

    def header(repo: str, name: str) -> SafetensorsFileMetadata:
        asked.append(name)
        with safe_open(folder / name, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            told = {k: TensorInfo(s.get_dtype(), s.get_shape(), (0, 0)) for k, s in slices.items()}
        return SafetensorsFileMetadata({}, told)

    monkeypatch.setattr(models, "try_to_load_from_cache", lambda repo, name: None)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(models, "hf_hub_download", download)
    monkeypatch.setattr(models, "parse_safetensors_file_metadata", header)
    known = models.find("x/y", None)
    assert known.parts == models.find(str(folder), None).parts
    assert asked[0] == "model_index.json"
    assert set(asked[1:]) == {name for name in names if name.endswith(".safetensors")}
    names.remove("model_index.json")
    with pytest.raises(SettingError, match=r"x/y: the repository has no model_index\.json"):
        models.find("x/y", None)
    monkeypatch.setattr(HfApi, "model_info", lambda self, repo: 1 / 0)
    with pytest.raises(SettingError, match="the hub did not give it: division by zero"):
        models.find("x/y", None)


def test_a_cached_model_of_the_hub_needs_no_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda repo, name: str(folder / name))
    assert models.find("x/y", None).parts == models.find(str(folder), None).parts


# ------------------------------------------------------------------ pictures
def test_pictures_are_written(tmp_path: Path) -> None:
    result = call("--model", "flux", "--link", "12,25", "--out", tmp_path / "new" / "deep")
    assert result.exit_code == 0, result.output
    for name in ("curve.png", "call.png"):
        with Image.open(tmp_path / "new" / "deep" / name) as image:
            assert image.width > 800 and image.height > 400
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20, "not blank"


def test_pictures_with_json_leave_nothing_else_on_the_output(tmp_path: Path) -> None:
    assert facts("--model", "sdxl", "--out", tmp_path)["rows"]
    assert (tmp_path / "curve.png").is_file()


def test_the_text_timeline_has_a_letter_for_whoever_is_busy() -> None:
    made = look(Request("sdxl", ("4GiB",), ("12",)))
    lines = curve.text(made.plans[0], 100).splitlines()
    assert [len(line) for line in lines[:3]] == [100] * 3
    compute, waits, copies = (line.split("|")[1] for line in lines[:3])
    assert set(compute) <= set("ABCD.") and "C" in compute and compute.endswith("D")
    assert "C" in copies
    assert "C" in waits and set(waits) <= set("ABCD.")
    assert "C unet" in lines[3]


def test_the_text_curve_has_a_bar_for_each_budget_and_link() -> None:
    made = look(Request("flux", ("8GiB,16GiB,40GiB",), ("12,25",)))
    lines = curve.bars(plan_command.curve_lines(made, GIB), 100, "GiB").splitlines()
    assert [line.strip() for line in (lines[0], lines[4])] == ["12 GB/s", "25 GB/s"]
    drawn = [line.split("|")[1] for line in lines if "|" in line]
    assert [len(bar) for bar in drawn] == [69] * 6
    lengths = [len(bar.strip()) for bar in drawn]
    most = max(row.seconds for row in made.rows)
    assert lengths == [round(row.seconds / most * 69) for row in made.rows]
    assert lengths[0] == 69 > lengths[1] >= lengths[2], "the slowest fills it"
    limits = [round(row.limit_s / most * 69) for row in made.rows]
    assert [bar.count("#") for bar in drawn] == [min(pair) for pair in zip(lengths, limits, strict=True)]
    output = call("--model", "flux", "--budget", "8GiB,16GiB", "--link", 25).output
    assert "Seconds a call in so much device memory, predicted:" in output
    assert " 8.00 GiB |##" in output and "16.00 GiB |##" in output


def test_one_call_begins_with_what_it_waits_for_and_ends_with_its_last_kernel() -> None:
    plan = look(Request("flux", ("8GiB",), ("12",))).plans[0]
    shown, length_ms = curve.one_call(plan)
    assert min(s.start_ms for s in shown.spans) == 0
    assert max(s.end_ms for s in shown.spans if s.track == "compute") == pytest.approx(length_ms)
    compute = sum(s.duration_ms for s in shown.spans if s.track == "compute")
    passes = sum(min(n, 3) * plan.workload.components[name].pass_ms for name, n in plan.workload.runs)
    assert compute == pytest.approx(passes)


@pytest.mark.parametrize(("model", "gib"), [("sdxl", 4), ("flux", 12), ("wan-2.2", 16)])
def test_the_memory_that_is_drawn_is_weights_and_activations_within_the_budget(model: str, gib: int) -> None:
    plan = look(Request(model, (f"{gib}GiB",), ("12",))).plans[0]
    shown, length_ms = curve.one_call(plan)
    taken = curve.memory_of(plan, shown, length_ms)
    assert taken[0][0] == 0 and taken[-1][0] == pytest.approx(length_ms)
    assert [at for at, _, _ in taken] == sorted(at for at, _, _ in taken)
    parts = plan.workload.components
    assert {activations for _, _, activations in taken} == {parts[name].activation_nbytes for name, _ in plan.workload.runs}
    assert taken[-1][2] == parts["vae"].activation_nbytes
    most = max(weights + activations for _, weights, activations in taken)
    assert 0.9 * plan.prediction.peak_nbytes <= most <= plan.budget_nbytes


def test_a_thin_bar_has_its_own_colour() -> None:
    from matplotlib.colors import to_hex

    pyplot = picture.require()
    figure, axes = pyplot.subplots(figsize=(12, 3))
    spans = [Span("calls", "call", 0.0, 1000.0), Span("copy", "a", 0.0, 500.0), Span("copy", "a", 600.0, 0.5)]
    picture._gantt(axes, Timeline(tuple(spans), (), True, "a device"), {"a": "#4477AA"}, "")
    (copies,) = [c for c in axes.collections if len(c.get_edgecolor()) == 2]
    assert [to_hex(edge) for edge in copies.get_edgecolor()] == ["#ffffff", "#4477aa"]
    pyplot.close(figure)


# --------------------------------------------------------------------- parts
def test_the_grid_goes_from_the_smallest_to_all_and_has_stocks_memory() -> None:
    budgets = plan_command.grid(int(1.52 * GIB), int(22.63 * GIB), int(32.9 * GIB))
    assert budgets == sorted(set(budgets))
    assert int(1.52 * GIB) <= budgets[0] < 1.7 * GIB
    assert 32.9 * GIB <= budgets[-1] < 36 * GIB
    assert any(22.63 * GIB <= b < 24 * GIB for b in budgets)
    assert all(b * 8 % (1 << 27) == 0 for b in budgets), "few digits"


def test_tensors_of_unknown_types_are_refused() -> None:
    class Source:
        label = "odd"

        def index(self) -> dict[str, Any]:
            return {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}

        def files(self, component: str) -> list[str]:
            return ["model.safetensors"]

        def tensors(self, component: str, file: str) -> list[models.Tensor]:
            return [("x", "F4", (2, 2))]

    with pytest.raises(SettingError, match="F4"):
        models.read(Source(), None)


def test_a_model_of_one_unit_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("unet", "denoiser", "float16", (Block("x", (1 << 20,)),), parameters=1)
    monkeypatch.setattr(models, "find", lambda model, dtype: models.Known("tiny", "P", (part,)))
    made = look(Request("tiny", step_ms=1.0))
    assert made.rows[-1].seconds == pytest.approx(0.03)


def test_the_committed_predictions_can_be_made_again(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "predict.py"))
    script["main"](tmp_path, script["CASES"][:1])
    text = (tmp_path / "predicted.md").read_text()
    assert "Nothing here was measured by this project" in text
    assert "| predicted: prefetch_offload | 6 |" in text and "| published: resident |" in text
    rows = (tmp_path / "predicted-sdxl.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 * 3 and all(row.startswith("predicted,") for row in rows[1:])
    assert (tmp_path / "predicted-sdxl.png").stat().st_size > 10_000
