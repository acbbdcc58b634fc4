"""The command line: `prefetch-offload run | demo | bench | doctor | plan`. Options here, what they do in `commands`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import __version__
from .commands.errors import reported

# What is not used here would otherwise be missed aloud: packages by transformers, CUDA by PyTorch's C++ build tools.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# commands.* are imported by the commands that need them: `--help` should not wait for torch.

app = typer.Typer(
    name="prefetch-offload",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str | None, typer.Option(help="Where to run, like cuda or cuda:1. Default: the accelerator there is.")
]
Simulate = Annotated[bool, typer.Option("--simulate", help="Use the simulated accelerator.")]


def _console() -> Console:
    # The tables need more than the 80 columns that rich assumes of a pipe.
    console = Console()
    return console if console.is_terminal else Console(width=118)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prefetch_offload {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prefetching model offload for diffusers pipelines."""


def _finish(equal: bool) -> None:
    if not equal:
        raise typer.Exit(1)


@app.command()
@reported
def run(
    model: Annotated[str, typer.Option(help="A folder in diffusers' format, or a model of the hub.")],
    prompt: Annotated[str, typer.Option(help="What to make a picture of.")],
    out: Annotated[Path, typer.Option(help="The image; of a video, its first frame.")],
    budget: Annotated[
        str | None,
        typer.Option(
            help="Device memory for weights and activations, like 8GiB; 'stock': what stock model offload would use."
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Run 'stock' or 'resident' first, and compare.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps.")] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: bfloat16, simulated float32.")
    ] = None,
    device: Device = None,
    simulate: Simulate = False,
    trace: Annotated[Path | None, typer.Option(help="Write what happened here, for ui.perfetto.dev.")] = None,
    calls: Annotated[int | None, typer.Option(min=1, help="How often. Default: once, with --against twice.")] = None,
    debug: Debug = False,
) -> None:
    """Make an image with prefetching offload. Exit code 1: it differs from the one it was compared with."""
    from .commands.run import Request
    from .commands.run import run as _run

    request = Request(
        model, prompt, out, budget, against, steps, width, height, seed, dtype, device, simulate, trace, calls
    )
    _finish(_run(request, _console()))


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option(help="Where the model, the image, the timeline and the trace go.")] = Path(
        "demo-output"
    ),
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Run a small SDXL resident, with stock offload and with this package, on the GPU or a simulated one.

    Exit code 1: the images differ.
    """
    from .commands.demo import demo as _demo

    _finish(_demo(out, device, _console()))


@app.command()
@reported
def bench(
    model: Annotated[str, typer.Option(help="A folder in diffusers' format, or a model of the hub.")],
    prompt: Annotated[
        str | None, typer.Option(help="What to make a picture of. Default: a lake, where the pipeline takes a prompt.")
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="Ours in these budgets, too, like 8GiB or 8GiB,12GiB; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps.")] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. Default: bfloat16, simulated float32.")
    ] = None,
    device: Device = None,
    simulate: Simulate = False,
    calls: Annotated[int, typer.Option(min=2, help="Of each way. The median of those after the second is shown.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write results.csv and curve.png into this folder.")] = None,
    resident: Annotated[bool, typer.Option(help="Also with everything on the device; skip it where it cannot fit.")] = True,
    debug: Debug = False,
) -> None:
    """Your model on your GPU: resident, stock offload, and this package in each budget. Exit code 1: images differ."""
    from .commands.bench import Request
    from .commands.bench import bench as _bench

    request = Request(
        model, prompt, tuple(budget or ()), steps, width, height, dtype, device, simulate, calls, out, resident
    )
    _finish(_bench(request, _console()))


@app.command()
@reported
def doctor(
    simulate: Simulate = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the accelerator, the link's speed, host memory and versions, and what would be slow here."""
    from .commands.doctor import doctor as _doctor

    _doctor(simulate, as_json, _console())


@app.command()
@reported
def plan(
    model: Annotated[
        str,
        typer.Option(help="sdxl, sd3, flux, qwen-image, wan-2.2 or ltx; a folder in diffusers' format; a model of the hub."),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Device memory for weights and activations, like 8GiB or 8GiB,12GiB; may be repeated."),
    ] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(help="GB/s from pinned memory to the device, like 25 or 12,25,55; may be repeated. Default: 25."),
    ] = None,
    step_ms: Annotated[
        float | None, typer.Option(help="Time of one denoising step on your GPU. Default: a published one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    encode_ms: Annotated[float | None, typer.Option(help="Time of all text encoders.")] = None,
    decode_ms: Annotated[float | None, typer.Option(help="Time of the decoder.")] = None,
    activations: Annotated[
        float | None, typer.Option(help="GiB that the denoiser takes besides its weights.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16: count weights as loaded in it. Default: as stored.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write curve.png and call.png into this folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Predict what a call takes within budgets and over links. No device is used."""
    from .commands.plan import Request
    from .commands.plan import plan as _plan

    request = Request(
        model, tuple(budget or ()), tuple(link or ()), steps, step_ms, encode_ms, decode_ms, activations, dtype, out
    )
    _plan(request, as_json, _console())


if __name__ == "__main__":
    app()
