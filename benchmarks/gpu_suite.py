"""Everything that needs a GPU, in one command that leaves a folder of results.

    python -m benchmarks.gpu_suite --out DIR                 # what fits ten minutes, the most telling first; again: the rest
    python -m benchmarks.gpu_suite --out DIR --part flux     # only that part, even if it is done
    python -m benchmarks.gpu_suite --out DIR --model FOLDER  # modes, compiled and peers, of another model
    python -m benchmarks.gpu_suite --out DIR --device simgpu # the same at small size on the simulated accelerator

Parts that DIR/suite.json has as done are left out, so that calling it again goes on; parts that failed or were killed come last
then. Each part is a process of its own that is given no more time than is left. All rows of `benchmarks.offload` are in
DIR/offload, so that a part that was stopped keeps its rows, and none measures what another one has. The bounds of all parts
come to no more than three runs of ten minutes, but for those that have `more` of the same: they take what time is left behind
the others, and go on in further runs. Tables and pictures are made at the end of every run, from what there is by then.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

OUT_OF_TIME = "out of time"
UNFINISHED = 3  # the exit code of a part that goes on when it is called again
SIMULATED_GBPS = 0.1  # a small model's weights, back and forth, take about as long as a few of its steps
MARGIN_S = 30  # of a part's time: to start Python, and to end
GRACE_S = 8  # of a part's time: what is interrupted says what it has found so far, such as the tests that failed

TELLING = ("resident", "stock", "ours:stock")
PEERS = (
    "cache-dit kept",
    "group leaf stream",
    "flextensor",
    "diffusers-mm",
    "group block stream",
    "flextensor profiling",
)
SLOW_PEERS = (
    "group leaf stream record",
    "group block stream record",
    "group leaf",
    "group block",
    "sequential",
    "cache-dit",
)
TESTS = ("-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
KERNELS = ("-m", "benchmarks.kernels", "--out", "DIR/kernels", "--seconds", "SECONDS")


@dataclass(frozen=True)
class Part:
    """A command and its share of the time.

    Attributes:
        seconds: at most; less where less is left.
        command: `DIR` stands for the suite's folder, `OUT` for the part's own, `SECONDS` for the time it may use.
        least: not begun with less than this: what a part that keeps what it has needs to get anywhere; None: all of `seconds`.
        more: of what other parts have the most telling of: comes behind them, and nobody has to run the suite again for it.
        again: also when it is done: what it reads has changed. The others leave its time to it.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    least: int | None = None
    more: bool = False
    again: bool = False


def offload(
    device: str,
    name: str,
    seconds: int,
    model: str,
    modes: tuple[str, ...],
    steps: tuple[int, ...],
    calls: int = 1,
    rounds: int = 1,
    compiled: str = "none",
    more: bool = False,
    dtype: str | None = None,
    keep: bool = False,
    enough: int | None = None,
) -> Part:
    """Modes of a model. At small size: one call in each of two rounds, and the time of a busy machine.

    Steps are given with the fewest first: the calls before the timed ones are then the short ones.
    """
    small = device == "simgpu"
    calls, rounds, seconds = (1, 2, 300) if small else (calls, rounds, seconds)
    command = ["-m", "benchmarks.offload", "--out", "DIR/offload", "--device", device, "--model", model]
    command += ["--compile", compiled, "--rounds", str(rounds), "--calls", str(calls), "--seconds", "SECONDS"]
    command += ["--simulated-link", str(SIMULATED_GBPS)] if small else []
    command += ["--dtype", dtype] if dtype is not None else []
    command += ["--keep"] if keep else []
    command += ["--enough", str(enough)] if enough is not None else []
    command += [word for n in steps for word in ("--steps", str(n))]
    command += [word for mode in modes for word in ("--mode", mode)]
    least = min(seconds, 45 if small else 110 if "flux" in model else 70)
    return Part(name, seconds, tuple(command), least=least, more=more and not small)


def peers(device: str, budget: str, names: tuple[str, ...] = PEERS) -> tuple[str, ...]:
    """Modes of these peers in `budget`; there is no memory to take away on the simulated accelerator."""
    return names if device == "simgpu" else tuple(f"{name}:{budget}" for name in names)


def parts(device: str, model: str | None = None) -> list[Part]:
    """In order of what they tell. Bounds are by what an H200 is expected to need. The first run has the tests, SDXL at stock's
    memory, and Flux in every budget; who has time for a second one of four minutes gets the start of what follows."""
    small = device == "simgpu"
    suffix = "-small" if small else ""
    sdxl, flux = f"sdxl{suffix}", f"flux{suffix}"
    few = (2,) if small else (4,)
    usual, long = (few, few) if small else ((4, 30), (4, 28))
    most = usual[-1:]
    budgets = ("16MiB", "24MiB", "32MiB", "48MiB") if small else ("8GiB", "12GiB", "16GiB", "24GiB")
    middle = budgets[2]
    ours = tuple(f"ours:{b}" for b in budgets)

    plots = Part("plots", 40, ("-m", "benchmarks", "plot", "DIR/offload/offload.csv"), least=20, again=True)
    if model is not None:
        return [
            offload(device, "model", 400, model, (*TELLING, "ours"), usual, calls=2, keep=True),
            offload(device, "model-compiled", 400, model, TELLING, usual, compiled="regional"),
            offload(device, "model-peers", 500, model, (*TELLING, *peers(device, "stock")), usual),
            plots,
        ]
    # Stock comes last: its calls of Flux are the longest by far, and the goals are about resident.
    all_flux = ("resident", ours[2], ours[0], "ours", ours[1], ours[3], "stock")
    found = [
        offload(device, "sdxl", 170, sdxl, (*TELLING, "ours"), usual, calls=2, rounds=2, keep=True),
        Part("tests", 150 if small else 80, (*TESTS, "tests/test_cuda.py")),
        offload(device, "flux", 330, flux, all_flux, long, calls=2, keep=True, enough=12),
        offload(device, "sdxl-compiled", 120, sdxl, TELLING, usual, compiled="regional"),
        offload(device, "sdxl-peers", 130, sdxl, (*TELLING, *peers(device, "stock")), usual),
        offload(device, "flux-peers", 230, flux, ("resident", ours[2], *peers(device, middle, PEERS[:4])), long),
        offload(device, "sdxl-whole", 120, sdxl, ("resident", "ours:stock"), most, compiled="whole"),
        offload(device, "sdxl-steps", 80, sdxl, TELLING, (1, 4) if small else (1, 8, 50), keep=True),
        # bfloat16 is what `packed` is for; it is what Flux has at full size. At small size it halves the weights: less room.
        offload(
            device,
            "flux-transport",
            130,
            flux,
            ("resident", *(f"ours:{budgets[0] if small else middle}{t}" for t in ("", ":packed", ":fp8"))),
            few,
            dtype="bfloat16",
            keep=True,
        ),
        Part("tests-kernels", 60, (*TESTS, "tests/test_kernels_cast.py", "tests/test_kernels_unpack.py")),
        Part("kernels", 60, (*KERNELS, "--size", "1024"), least=45),
        Part("sanitizer", 40, (*TESTS, "tests/test_cuda.py", "-k", "sanitizer"), (("TORCH_CUDA_SANITIZER", "1"),)),
        *further(device),
        plots,
    ]
    # Without a GPU there is nothing to see of tests but that they are found and skipped: once is enough.
    return [p for p in found if not small or p.name not in ("tests-kernels", "kernels", "sanitizer")]


def further(device: str) -> list[Part]:
    """What three runs on a GPU have no room for, the most telling first. At small size only what shows another thing."""
    small = device == "simgpu"

    def part(name: str, model: str, modes: tuple[str, ...], steps: tuple[int, ...], **other: Any) -> Part:
        shown, counted = (f"{model}-small", (2,)) if small else (model, steps)
        return offload(device, name, 300, shown, modes, counted, more=True, **other)

    def flux_peers(budget: str) -> Part:
        modes = ("resident", f"ours:{budget}", *peers(device, budget, PEERS[:4]))
        return part(f"flux-peers-{budget}", "flux", modes, (4, 28))

    stock_peers = (*TELLING, *peers(device, "stock"))
    found = [
        # Whether a budget holds where the device has no more, which no card as large as an H200 would show by itself.
        Part("pieces", 100, ("-m", "benchmarks.pieces", "--calls", "4"), more=True),
        Part("tests-far", 120, (*TESTS, "tests/test_kernels_far.py"), more=True),
        Part("kernels-sizes", 120, KERNELS, least=45, more=True),
        # Decoding 1024 x 1024 in float32 takes 3 GiB of activations by estimate, twice what figures.py has for 16 bits.
        part("sdxl-budgets", "sdxl", ("resident", "ours:5GiB", "ours:6GiB", "ours:8GiB"), (4, 30), keep=True),
        # Another round for rows that have some: the turns that tell drift from a difference.
        part("sdxl-again", "sdxl", (*TELLING, "ours"), (4, 30), calls=2, rounds=3, keep=True),
        flux_peers("12GiB"),
        flux_peers("8GiB"),
        flux_peers("24GiB"),
        part("sd3", "sd3", (*TELLING, "ours"), (4, 28), calls=2, keep=True),
        part("sdxl-slow-peers", "sdxl", (*TELLING, *peers(device, "stock", SLOW_PEERS)), (4,)),
        # float16, which `packed` leaves as it is
        part("sdxl-transport", "sdxl", (*TELLING, "ours:stock:fp8"), (4, 30), keep=True),
        part("sdxl-compiled-steps", "sdxl", TELLING, (1, 8, 50), compiled="regional"),
        part("sdxl-whole-steps", "sdxl", ("resident", "stock", "ours:stock"), (4, 30, 1, 8, 50), compiled="whole"),
        part("sdxl-compiled-peers", "sdxl", stock_peers, (30,), compiled="regional"),
        part("flux-compiled", "flux", ("resident", "stock", "ours", "ours:16GiB"), (28,), compiled="regional"),
        part("flux-again", "flux", ("resident", "ours:16GiB", "ours", "stock"), (4, 28), calls=2, rounds=2, keep=True),
        part("flux-slow-peers", "flux", ("resident", "ours:16GiB", *peers(device, "16GiB", (*PEERS[4:], *SLOW_PEERS))), (4,)),
        part("sdxl-whole-peers", "sdxl", stock_peers, (30,), compiled="whole"),
        part("sdxl-peers-again", "sdxl", stock_peers, (4, 30), rounds=2),
    ]
    return [p for p in found if not small or p.name in ("sd3", "sdxl-slow-peers", "sdxl-transport")]


def from_hub(words: list[str]) -> bool:
    """Whether the command's model may have to be fetched: it is neither built in nor a folder."""
    model = words[words.index("--model") + 1] if "--model" in words else ""
    return "/" in model and not Path(model).is_dir()


def run(part: Part, out: Path, limit_s: float) -> dict[str, object]:
    """Run one part, for `limit_s` at most. Returns what it was, how long it took, how it ended. Its output is in its folder."""
    folder = out / part.name
    folder.mkdir(parents=True, exist_ok=True)
    names = {"OUT": str(folder), "SECONDS": str(int(limit_s - MARGIN_S))}
    words = [names.get(w, str(out / w[4:]) if w.startswith("DIR/") else w) for w in part.command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(part.environment)}
    if not from_hub(words):
        environment["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    with (folder / "output.txt").open("a") as output:
        heeded = signal.getsignal(signal.SIGINT)
        if heeded is signal.SIG_IGN:  # as a shell starts what is to run in the background, and what that starts inherits it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, env=environment)
        if heeded is signal.SIG_IGN:
            signal.signal(signal.SIGINT, heeded)
        grace_s = min(GRACE_S, limit_s / 2)
        try:
            ended: object = process.wait(limit_s - grace_s)
        except subprocess.TimeoutExpired:
            ended = OUT_OF_TIME
            process.send_signal(signal.SIGINT)
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                pass
        finally:
            process.kill()
            process.wait()
    command = shlex.join(["python", *(w.replace(str(out), "DIR") for w in words)])
    return {"command": command, "seconds": round(time.monotonic() - began, 1), "ended": ended}


def check(device: str) -> None:
    """Exits with a message if there is no such device: not every part has to find that out."""
    if device == "simgpu":
        return
    from prefetch_offload.commands import devices  # imports torch
    from prefetch_offload.errors import SettingError

    try:
        devices.pick(device, simulate=False)
    except SettingError as error:
        typer.echo(f"{error} `--device simgpu` runs all parts at small size on the simulated one.", err=True)
        raise typer.Exit(2) from None


def main(
    out: Annotated[Path, typer.Option(help="folder for the results; what is in it is completed")],
    device: Annotated[str, typer.Option(help="cuda, or simgpu for the simulated accelerator at small size")] = "cuda",
    seconds: Annotated[
        float, typer.Option(help="take no longer: a part gets what is left, or is left for the next run")
    ] = 580,
    part: Annotated[list[str] | None, typer.Option(help="only these parts, also if they are done")] = None,
    model: Annotated[
        str | None, typer.Option(help="a folder or hub id, or a built-in model, in place of all parts")
    ] = None,
) -> None:
    """Exit code 1: a part failed; 3: none did, but some are left for the next run; 2: it could not begin. Parts for which three
    runs have no room change no exit code when they are left: a line names them."""
    began = time.monotonic()
    known = parts(device, model)
    wanted = [p for p in known if part is None or p.name in part]
    if part is not None and len(wanted) < len(set(part)):
        raise typer.BadParameter(f"--part: {', '.join(p.name for p in known)}")
    check(device)
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "suite.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}

    def ended(one: Part) -> object:
        return state.get(one.name, {}).get("ended")

    def save() -> None:
        whole = out / ".suite.json"
        whole.write_text(json.dumps(state, indent=1))
        os.replace(whole, state_file)  # who is killed meanwhile leaves the one before

    wanted.sort(key=lambda p: (p.again, p.more, ended(p) not in (None, 0, UNFINISHED)))
    failed = left_over = False
    more_left: list[str] = []
    for number, one in enumerate(wanted):
        if part is None and ended(one) == 0 and not one.again:
            continue
        left = seconds - (time.monotonic() - began)
        left -= sum(p.seconds for p in wanted[number + 1 :] if p.again)
        if left < (one.seconds if one.least is None else one.least):
            print(f"{one.name}: left for the next run", flush=True)
            more_left += [one.name] if one.more else []
            left_over |= not one.more
            continue
        # What had too little time, and cannot go on where it stopped, needs more than it had.
        bound = one.seconds * 2 if ended(one) == OUT_OF_TIME else one.seconds
        state[one.name] = {"ended": "killed"}  # what stays if the suite is
        save()
        state[one.name] = run(one, out, min(bound, left))
        save()
        more_left += [one.name] if one.more and ended(one) == UNFINISHED else []
        left_over |= not one.more and ended(one) == UNFINISHED
        failed |= ended(one) not in (0, UNFINISHED)
        how = {0: "done", UNFINISHED: "goes on in the next run"}.get(ended(one), f"failed ({ended(one)})")  # type: ignore[call-overload]
        print(f"{one.name}: {how} after {state[one.name]['seconds']} s", flush=True)
    if more_left and not left_over:
        print(f"what three runs have room for is there; called again, the suite adds {', '.join(more_left)}", flush=True)
    if failed or left_over:
        raise typer.Exit(1 if failed else UNFINISHED)


if __name__ == "__main__":
    typer.run(main)
