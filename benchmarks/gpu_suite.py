"""Everything that needs a GPU, in one command that leaves a folder of results.

    python -m benchmarks.gpu_suite --out DIR                 # the parts that fit ten minutes, the most telling first
    python -m benchmarks.gpu_suite --out DIR --part flux     # only that part; can be repeated
    python -m benchmarks.gpu_suite --out DIR --device simgpu # the same at small size on the simulated accelerator

Parts that DIR/suite.json has as done are left out, so that calling it again goes on. Each part is a process of its own,
bounded in time, and writes into a folder of its own as it goes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

OFFLOAD = ("-m", "benchmarks.offload")
PEERS = (
    "group block stream",
    "group leaf stream",
    "group leaf stream record",
    "cache-dit",
    "flextensor",
    "diffusers-mm",
    "group block",
    "sequential",
)


@dataclass(frozen=True)
class Part:
    """A command, its share of the time, and the environment variables it needs. `OUT` stands for its folder."""

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Scale:
    """The same parts at full size, and small for the simulated accelerator.

    Attributes:
        models: suffix of a built-in model's name.
        flux_budgets: from small to large; the default budget and stock's are run besides.
        rounds, calls: at most so many.
        cuda: there are kernels to time, and streams for PyTorch's sanitizer to watch.
    """

    models: str
    flux_budgets: tuple[str, ...]
    rounds: int
    calls: int
    cuda: bool


GPU = Scale("", ("8GiB", "12GiB", "16GiB", "24GiB"), 2, 3, True)
SMALL = Scale("-small", ("16MiB", "24MiB", "32MiB", "48MiB"), 1, 1, False)

ALL_STEPS = {"sdxl": (30, 4), "flux": (28,)}
FEW_STEPS = {"sdxl": (4,), "flux": (4,)}  # on the simulated accelerator, in place of those


def parts(device: str) -> list[Part]:
    """In order of what they tell."""
    small = device == "simgpu"
    scale = SMALL if small else GPU
    usual = FEW_STEPS if small else ALL_STEPS

    def offload(
        name: str,
        seconds: int,
        model: str,
        modes: tuple[str, ...],
        steps: tuple[int, ...] = (),
        rounds: int = 1,
        calls: int = 3,
        compiled: str = "none",
    ) -> Part:
        command = [*OFFLOAD, "--out", "OUT", "--device", device, "--model", model + scale.models, "--compile", compiled]
        command += [word for n in steps or usual[model] for word in ("--steps", str(n))]
        command += ["--rounds", str(min(rounds, scale.rounds)), "--calls", str(min(calls, scale.calls))]
        command += ["--seconds", str(seconds - 70)]  # what is begun by then has time to end
        return Part(name, seconds, (*command, *(word for mode in modes for word in ("--mode", mode))))

    tests = ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
    budgets = tuple(f"ours:{b}" for b in scale.flux_budgets)
    least, most_telling = budgets[0], budgets[2]
    ours = ("ours:stock", "ours")
    found = [
        Part("tests", 150, (*tests, "tests/test_cuda.py")),
        offload("sdxl", 280, "sdxl", ("resident", "stock", *ours), rounds=2, calls=2),
        Part("kernel-tests", 90, (*tests, "tests/test_kernels_cast.py", "tests/test_kernels_unpack.py")),
        offload(
            "flux", 570, "flux", ("resident", "ours", most_telling, least, budgets[3], budgets[1], "stock"), calls=2
        ),
        Part("kernels", 200, ("-m", "benchmarks.kernels", "--out", "OUT", "--seconds", "150")),
        Part("sanitizer", 120, (*tests, "tests/test_cuda.py", "-k", "sanitizer"), (("TORCH_CUDA_SANITIZER", "1"),)),
        offload("sdxl-steps", 280, "sdxl", ("resident", "stock", "ours:stock"), (1, 8) if small else (1, 8, 50)),
        offload("sdxl-compiled", 400, "sdxl", ("resident", "stock", *ours), compiled="regional"),
        offload("sdxl-whole", 400, "sdxl", ("resident", "ours:stock"), compiled="whole"),
        offload("sdxl-peers", 500, "sdxl", ("resident", *PEERS), () if small else (30,), calls=1),
        offload("sdxl-transport", 300, "sdxl", tuple(f"ours:stock:{t}" for t in ("raw", "packed", "fp8"))),
        offload("flux-4", 500, "flux", ("resident", "ours", most_telling, "stock", least), (4,), calls=2),
        *(Part(f"plot-{m}", 60, ("-m", "benchmarks", "plot", f"{m}/offload.csv")) for m in ("sdxl", "flux")),
    ]
    return [p for p in found if scale.cuda or p.name not in ("kernels", "sanitizer")]


def run(part: Part, out: Path, limit_s: float) -> dict[str, object]:
    """Run one part. Returns what it was, how long it took and how it ended; its output is in the part's folder."""
    folder = out / part.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *(str(folder) if w == "OUT" else w for w in part.command)]
    command = [str(out / w) if w.endswith("/offload.csv") else w for w in command]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    began = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=min(part.seconds, limit_s),
                env=environment,
                check=False,
            )
            ended: object = done.returncode
        except subprocess.TimeoutExpired:
            ended = "out of time"
    words = shlex.join(["python", *(w.replace(str(out), "DIR") for w in command[1:])])
    return {"command": words, "seconds": round(time.monotonic() - began, 1), "ended": ended}


def main(
    out: Annotated[Path, typer.Option(help="folder for the results")],
    device: Annotated[str, typer.Option(help="cuda, or simgpu for the simulated accelerator at small size")] = "cuda",
    seconds: Annotated[float, typer.Option(help="begin no part that may take longer than what is left of this")] = 580,
    part: Annotated[list[str] | None, typer.Option(help="only these parts")] = None,
) -> None:
    """Exit code 1: a part failed."""
    began = time.monotonic()
    known = parts(device)
    wanted = [p for p in known if part is None or p.name in part]
    if part is not None and len(wanted) < len(set(part)):
        raise typer.BadParameter(f"--part: {', '.join(p.name for p in known)}")
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "suite.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    failed = False
    for one in wanted:
        if part is None and state.get(one.name, {}).get("ended") == 0:
            continue
        left = seconds - (time.monotonic() - began)
        if left < min(one.seconds, 60):
            print(f"{one.name}: left for the next run", flush=True)
            continue
        state[one.name] = run(one, out, left)
        state_file.write_text(json.dumps(state, indent=1))
        failed |= state[one.name]["ended"] != 0
        print(f"{one.name}: {state[one.name]['ended']} after {state[one.name]['seconds']} s", flush=True)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
