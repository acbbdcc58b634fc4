"""The GPU suite: its parts, what it does with its time, and that it goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from benchmarks import gpu_suite, models, modes
from benchmarks.rows import read


def test_the_suite_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = tmp_path / "marks"

    def script(name: str, code: str) -> gpu_suite.Part:
        return gpu_suite.Part(name, 20, ("-c", f"open({str(marks)!r}, 'a').write({name!r} + ' '); {code}", "OUT"))

    bad, unfinished = script("bad", "raise SystemExit(1)"), script("unfinished", "raise SystemExit(3)")
    waits = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('told', flush=True)\ntime.sleep(60)"
    slow = gpu_suite.Part("slow", 4, ("-c", f"import time\nprint('begun', flush=True)\n{waits}"))
    good = script("good", "import sys; print(sys.argv[1])")
    plots = gpu_suite.Part("plots", 20, script("plots", "").command, again=True)
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: [bad, plots, slow, unfinished, good])
    monkeypatch.setattr(gpu_suite, "check", lambda device: None)
    handler = signal.getsignal(signal.SIGINT)
    for heeded in (signal.default_int_handler, signal.SIG_IGN):  # in the background, a shell has it ignored
        signal.signal(signal.SIGINT, heeded)
        try:
            with pytest.raises(typer.Exit) as ended:
                gpu_suite.main(tmp_path, "cuda", 100)
            assert signal.getsignal(signal.SIGINT) is heeded
        finally:
            signal.signal(signal.SIGINT, handler)
        assert ended.value.exit_code == 1
    state = json.loads((tmp_path / "suite.json").read_text())
    endings = {"bad": 1, "slow": "out of time", "unfinished": 3, "good": 0, "plots": 0}
    assert {name: s["ended"] for name, s in state.items()} == endings
    order = "bad unfinished good plots unfinished bad plots "
    assert marks.read_text() == order, "what is done is not done again, what failed comes last, and then the pictures"
    assert (tmp_path / "good" / "output.txt").read_text().strip() == str(tmp_path / "good")
    assert (tmp_path / "slow" / "output.txt").read_text() == "begun\ntold\n" * 2, "it is interrupted before it is killed"
    assert all(s["seconds"] < 12 for s in state.values())
    assert str(tmp_path) not in state["good"]["command"], "a command that can be quoted"
    gpu_suite.main(tmp_path, "cuda", 100, ["good"])
    assert marks.read_text().endswith("good "), "asked for by name"


def test_a_part_gets_what_is_left_or_is_left_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = gpu_suite.Part("long", 300, ("-c", "pass"))
    cut = gpu_suite.Part("cut", 300, ("-c", "import sys; print(sys.argv[1])", "SECONDS"), least=40)
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: [long, cut])
    monkeypatch.setattr(gpu_suite, "check", lambda device: None)
    with pytest.raises(typer.Exit) as ended:
        gpu_suite.main(tmp_path, "cuda", 60)
    assert ended.value.exit_code == gpu_suite.UNFINISHED
    assert "long: left for the next run" in capsys.readouterr().out
    assert not (tmp_path / "long").exists()
    assert 10 <= int((tmp_path / "cut" / "output.txt").read_text()) <= 60 - gpu_suite.MARGIN_S


class Clock:
    """Time that passes only in parts: `needs` says how long each of them works. Parts that cannot go on begin anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: list[gpu_suite.Part], needs: dict[str, float]) -> None:
        self.now, self.needs, self.ran = 0.0, dict(needs), []
        monkeypatch.setattr(gpu_suite, "parts", lambda *_: parts)
        monkeypatch.setattr(gpu_suite, "check", lambda device: None)
        monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(gpu_suite, "run", self.run)

    def run(self, part: gpu_suite.Part, out: Path, limit_s: float) -> dict[str, object]:
        self.ran.append((part.name, limit_s))
        need = self.needs.get(part.name, 1.0)
        self.now += min(need, limit_s)
        if need <= limit_s:
            return {"ended": 0, "seconds": need}
        if part.least is None:
            return {"ended": gpu_suite.OUT_OF_TIME, "seconds": limit_s}
        self.needs[part.name] -= limit_s - gpu_suite.MARGIN_S
        return {"ended": gpu_suite.UNFINISHED, "seconds": limit_s}

    def suite(self, out: Path, seconds: float = 580) -> int:
        """One run. Returns its exit code."""
        began = self.now
        try:
            gpu_suite.main(out, "cuda", seconds)
        except typer.Exit as ended:
            return ended.exit_code
        finally:
            assert self.now - began <= seconds
        return 0


def test_three_runs_get_through_all_but_what_is_more_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if each part needs nearly all of its time; pictures are made in every run. Further runs do the rest."""
    found = gpu_suite.parts("cuda")
    clock = Clock(
        monkeypatch, found, {p.name: float(p.seconds) for p in found}
    )
    codes = []
    for _ in range(3):
        clock.ran.clear()
        codes.append(clock.suite(tmp_path))
        assert clock.ran[-1][0] == "plots"
    assert codes == [gpu_suite.UNFINISHED, gpu_suite.UNFINISHED, 0]
    state = json.loads((tmp_path / "suite.json").read_text())
    assert all(state[p.name]["ended"] == 0 for p in found if not p.more)
    runs = 3
    while (
        len(json.loads((tmp_path / "suite.json").read_text())) < len(found)
        or "called again, the suite adds" in capsys.readouterr().out
    ):
        assert clock.suite(tmp_path) == 0
        runs += 1
        assert runs < 20
    assert all(s["ended"] == 0 for s in json.loads((tmp_path / "suite.json").read_text()).values())
    clock.ran.clear()
    assert clock.suite(tmp_path) == 0 and [name for name, _ in clock.ran] == ["plots"]


def test_what_ten_minutes_and_four_more_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a decision needs in the first run: SDXL beside stock and resident, the tests, Flux in every budget at both step
    counts. What follows begins in the second."""
    found = gpu_suite.parts("cuda")
    wanted = {"sdxl": 140, "tests": 80, "flux": 300}
    clock = Clock(monkeypatch, found, {"sdxl-compiled": 100.0, "sdxl-peers": 120.0, **wanted})
    assert clock.suite(tmp_path, 580) == gpu_suite.UNFINISHED
    assert [name for name, _ in clock.ran] == [*wanted, "plots"]
    state = json.loads((tmp_path / "suite.json").read_text())
    assert all(state[name]["ended"] == 0 for name in wanted)
    clock.ran.clear()
    assert clock.suite(tmp_path, 230) == gpu_suite.UNFINISHED
    assert [name for name, _ in clock.ran] == ["sdxl-compiled", "sdxl-peers", "plots"]

    flux = next(p.command for p in found if p.name == "flux")
    given = list(itertools.pairwise(flux))
    assert [v for w, v in given if w == "--steps"] == ["4", "28"], "the calls before the timed ones are the short ones"
    budgets = {"ours", *(f"ours:{b}GiB" for b in (8, 12, 16, 24))}
    assert {v for w, v in given if w == "--mode"} == {"resident", "stock", *budgets} and "--keep" in flux


def test_more_of_the_same_takes_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind what failed before, before the pictures; and nobody is sent to call again for it."""
    command = ("-c", "pass")
    parts = [
        gpu_suite.Part("more", 300, command, least=70, more=True),
        gpu_suite.Part("tests", 80, command),
        gpu_suite.Part("sdxl", 260, command, least=70),
        gpu_suite.Part("plots", 20, command, again=True),
    ]
    clock = Clock(monkeypatch, parts, {"tests": 100, "sdxl": 100, "more": 500})
    assert clock.suite(tmp_path, 400) == 1, "tests is out of time"
    assert clock.ran == [("tests", 80), ("sdxl", 260), ("more", 200), ("plots", 20)]
    clock.ran.clear()
    assert clock.suite(tmp_path, 400) == 0
    assert clock.ran == [("tests", 160), ("more", 280), ("plots", 20)], "what began anew gets more than it had"
    assert "called again, the suite adds more\n" in capsys.readouterr().out


def test_a_suite_that_is_killed_keeps_what_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of writing: the file is replaced in one go."""
    clock = Clock(monkeypatch, [gpu_suite.Part(n, 10, ("-c", "pass")) for n in ("one", "two")], {})
    real = Path.write_text

    def write_text(path: Path, text: str) -> int:
        if '"two"' in text:
            real(path, text[:5])
            raise KeyboardInterrupt
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(KeyboardInterrupt):
        clock.suite(tmp_path)
    monkeypatch.setattr(Path, "write_text", real)
    clock.ran.clear()
    assert clock.suite(tmp_path) == 0
    assert clock.ran == [("two", 10)]


def test_a_model_of_the_hub_may_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else is: what is built in, a folder, and the tests are offline."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen: list[str | None] = []

    def done(words: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        seen.append(env.get("HF_HUB_OFFLINE"))
        return SimpleNamespace(wait=lambda timeout=None: 0, kill=lambda: None)

    monkeypatch.setattr(gpu_suite.subprocess, "Popen", done)
    for model in ("owner/name", "sdxl", str(tmp_path)):
        gpu_suite.run(gpu_suite.offload("cuda", "model", 60, model, ("resident",), (4,)), tmp_path, 60)
    gpu_suite.run(gpu_suite.Part("tests", 60, ("-m", "pytest")), tmp_path, 60)
    assert seen == [None, "1", "1", "1"]


def test_a_part_on_the_simulated_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_suite.offload("simgpu", "sdxl", 200, "sdxl-small", ("resident", "ours:stock"), (1,))
    monkeypatch.setattr(gpu_suite, "parts", lambda *_: [made])
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(typer.Exit) as ended:
        gpu_suite.main(tmp_path, "simgpu", 30, None)
    assert ended.value.exit_code == gpu_suite.UNFINISHED, "nothing is begun that cannot get anywhere"
    gpu_suite.main(tmp_path, "simgpu", 300, None)
    rows = read(tmp_path / "offload" / "offload.csv")
    assert [(r.mode, r.steps, r.equal) for r in rows] == [("resident", 1, True), ("ours:stock", 1, True)]
    assert str(tmp_path) not in rows[0].command


@pytest.mark.parametrize(
    ("device", "model"), [("cuda", None), ("simgpu", None), ("cuda", "a/b"), ("simgpu", "sd3-small")]
)
def test_every_part_names_modes_that_exist(device: str, model: str | None) -> None:
    found = gpu_suite.parts(device, model)
    assert len({p.name for p in found}) == len(found)
    for part in found:
        assert part.seconds < 580, "a part that no run has time for"
        assert (part.least or 0) <= part.seconds
        named = [v for word, v in zip(part.command, part.command[1:], strict=False) if word == "--mode"]
        for mode in named:
            modes.check(mode)
        assert not named or named[0] == "resident", "what the others are compared with"
        for word in part.command:
            if word.startswith("tests/"):
                assert (Path(__file__).parents[1] / word).is_file()


def test_every_test_that_needs_cuda_is_in_a_part() -> None:
    root = Path(__file__).parents[1]
    marked = {
        f"tests/{path.name}"
        for path in (root / "tests").glob("test_*.py")
        if re.search(r"^@on_devices|^pytestmark = .*\bcuda\b|^@pytest\.mark\.cuda", path.read_text(), re.M)
    }
    assert {"tests/test_cuda.py", "tests/test_kernels_far.py"} <= marked
    assert {word for part in gpu_suite.parts("cuda") for word in part.command if word.startswith("tests/")} == marked


def test_packed_is_measured_where_it_packs(tmp_path: Path) -> None:
    """In bfloat16: float16 and float32 travel as they are."""
    for device in ("cuda", "simgpu"):
        for part in gpu_suite.parts(device):
            if any(word.endswith(":packed") for word in part.command):
                given = list(itertools.pairwise(part.command))
                assert ("--dtype", "bfloat16") in given and any(w == "--model" and v.startswith("flux") for w, v in given)


def test_the_page_names_every_part_and_its_bound() -> None:
    found = gpu_suite.parts("cuda")
    assert found[0].name == "sdxl" and found[0].command[-8:] == tuple(
        word for mode in (*gpu_suite.TELLING, "ours") for word in ("--mode", mode)
    )
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    named = {
        name: int(s) for names, s in re.findall(r"^\| ([\w, -]+) \| (\d+) \|", page, re.M) for name in names.split(", ")
    }
    bounds = {p.name: p.seconds for p in found if not p.more}
    assert named.pop("kernels") == named.pop("sanitizer") == bounds.pop("kernels") + bounds.pop("sanitizer")
    assert named == bounds
    behind = page.partition("What three calls have no room for")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| ([\w-]+) \| (?!\d)", behind, re.M)
    assert [name for name in listed if name in {p.name for p in found}] == [p.name for p in found if p.more]


def test_what_the_tables_are_about_is_measured() -> None:
    """SDXL at every step count, eager and compiled; Flux at both, in every budget; every mode; every model at full size."""
    asked = set()
    for part in gpu_suite.parts("cuda"):
        words = part.command
        if "--model" in words:
            model, compiled = (words[words.index(o) + 1] for o in ("--model", "--compile"))
            given = list(itertools.pairwise(words))
            steps, names = ([v for w, v in given if w == o] for o in ("--steps", "--mode"))
            asked |= {(model, compiled, int(s), name) for s in steps for name in names}
    for compiled in ("none", "regional", "whole"):
        for steps in (1, 4, 8, 30, 50):
            for mode in ("resident", "stock", "ours:stock"):
                assert ("sdxl", compiled, steps, mode) in asked
    for steps in (4, 28):
        for mode in ("resident", "stock", "ours", *(f"ours:{b}GiB" for b in (8, 12, 16, 24))):
            assert ("flux", "none", steps, mode) in asked
    for peer in gpu_suite.PEERS[:4]:
        assert {("flux", "none", 28, f"{peer}:{b}GiB") for b in (8, 12, 16, 24)} <= asked
    for peer in (*gpu_suite.PEERS, *gpu_suite.SLOW_PEERS):
        assert ("sdxl", "none", 4, f"{peer}:stock") in asked
    peers = {mode for mode in modes.MODES if mode not in ("resident", "stock")}
    assert peers == {*gpu_suite.PEERS, *gpu_suite.SLOW_PEERS}
    assert {model for model, *_ in asked} == set(models.PIPELINES)
