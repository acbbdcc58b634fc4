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


@dataclass(frozen=True)
class Part:
    """A command, its share of the time, and the environment variables it needs. `OUT` stands for its folder."""

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def modes(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--mode", name))


def parts(device: str) -> list[Part]:
    """In order of what they tell. On the simulated accelerator models are small."""
    if device == "simgpu":
        small = (*OFFLOAD, "--out", "OUT", "--device", device, "--rounds", "2", "--calls", "1")
        budgets = modes("resident", "stock", "ours:stock", "ours", "ours:16MiB", "ours:32MiB")
        return [
            Part("sdxl", 240, (*small, "--model", "sdxl-small", "--steps", "1", "--steps", "4", *budgets)),
            Part("flux", 240, (*small, "--model", "flux-small", "--steps", "4", *budgets)),
            Part("plots", 60, ("-m", "benchmarks", "plot", "sdxl/offload.csv")),
        ]
    gpu = (*OFFLOAD, "--out", "OUT", "--device", device)
    sdxl = (*gpu, "--model", "sdxl", "--steps", "30", "--steps", "4")
    flux = (*gpu, "--model", "flux", "--steps", "28", "--rounds", "1", "--calls", "2", "--seconds", "500")
    tests = ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
    return [
        Part("tests", 150, (*tests, "tests/test_cuda.py")),
        Part("sdxl", 280, (*sdxl, "--rounds", "2", "--calls", "2", *modes("resident", "stock", "ours:stock", "ours"))),
        Part("kernel-tests", 90, (*tests, "tests/test_kernels_cast.py", "tests/test_kernels_unpack.py")),
        Part(
            "flux",
            570,
            (*flux, *modes("resident", "ours", "ours:16GiB", "ours:8GiB", "ours:24GiB", "ours:12GiB", "stock")),
        ),
        Part("kernels", 200, ("-m", "benchmarks.kernels", "--out", "OUT", "--seconds", "150")),
        Part("sanitizer", 120, (*tests, "tests/test_cuda.py", "-k", "sanitizer"), (("TORCH_CUDA_SANITIZER", "1"),)),
        Part(
            "sdxl-steps",
            280,
            (
                *gpu,
                "--model",
                "sdxl",
                "--steps",
                "1",
                "--steps",
                "8",
                "--steps",
                "50",
                "--rounds",
                "1",
                *modes("resident", "stock", "ours:stock"),
            ),
        ),
        Part(
            "sdxl-compiled",
            400,
            (
                *sdxl,
                "--compile",
                "regional",
                "--rounds",
                "1",
                "--calls",
                "3",
                *modes("resident", "stock", "ours:stock", "ours"),
            ),
        ),
        Part(
            "sdxl-whole",
            400,
            (*sdxl, "--compile", "whole", "--rounds", "1", "--calls", "3", *modes("resident", "ours:stock")),
        ),
        Part(
            "sdxl-peers",
            500,
            (
                *gpu,
                "--model",
                "sdxl",
                "--steps",
                "30",
                "--rounds",
                "1",
                "--calls",
                "1",
                *modes(
                    "resident",
                    "group block stream",
                    "group leaf stream",
                    "group leaf stream record",
                    "cache-dit",
                    "flextensor",
                    "diffusers-mm",
                    "group block",
                    "sequential",
                ),
            ),
        ),
        Part(
            "flux-4",
            500,
            (
                *gpu,
                "--model",
                "flux",
                "--steps",
                "4",
                "--rounds",
                "1",
                "--calls",
                "2",
                "--seconds",
                "430",
                *modes("resident", "ours", "ours:16GiB", "stock", "ours:8GiB"),
            ),
        ),
    ]


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
