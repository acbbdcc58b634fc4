"""`prefetch-offload run`: a prompt in, an image and a table of what moved out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from .. import report
from ..api import enable
from ..config import Settings
from ..errors import SettingError
from . import devices, models, running

WAYS = {"stock": "stock offload", "resident": "resident"}


@dataclass(frozen=True)
class Request:
    """The command's options. `against`: a key of WAYS."""

    model: str
    prompt: str
    out: Path
    budget: str | None = None
    against: str | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    simulate: bool = False
    trace: Path | None = None
    calls: int | None = None


def run(request: Request, console: Console) -> bool:
    """Load, call, save and print. False: the images differ from those of the way it was run against.

    Raises:
        SettingError, ValueError, OSError: something was asked for that cannot be had.
    """
    Settings.make(request.budget)  # a typing error should not wait for the model to load
    if request.against is not None and request.against not in WAYS:
        raise SettingError(f"--against {request.against}: give stock or resident.")
    models.check_dtype(request.dtype)
    running.check_image_path(request.out)
    device = devices.pick(request.device, request.simulate)
    running.quiet(device, progress=sys.stderr.isatty())
    dtype = running.dtype_of(request.dtype, device)
    calls = request.calls or (2 if request.against else 1)  # a fair comparison needs a call that is not the first
    console.print(f"Running on the {devices.describe(device)}, {str(dtype).split('.')[1]}.")

    outcomes = []
    if request.against is not None:
        pipe = running.load(request.model, dtype)
        devices.reset_peak(device)
        if request.against == "stock":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        outcomes.append(_measure(WAYS[request.against], pipe, device, request, calls))
        del pipe
        running.forget()

    pipe = running.load(request.model, dtype)
    devices.reset_peak(device)
    with enable(pipe, device=device, budget=request.budget) as offload:
        outcome = _measure("prefetch_offload", pipe, device, request, calls, lambda: offload.stats.peak_nbytes)
        outcomes.append(outcome)
        stats = offload.stats
        if request.trace is not None:
            request.trace.parent.mkdir(parents=True, exist_ok=True)
            offload.trace(request.trace)
    del pipe
    running.forget()

    running.save_image(outcome.images[0], request.out)
    if not all(np.isfinite(image).all() for image in outcome.images):
        console.print("The image has values that are no numbers: try --dtype bfloat16 or float32.", style="yellow")
    console.print(report.table(stats))
    console.print(report.summary(stats), soft_wrap=True)
    reference = outcomes[0] if request.against is not None else None
    console.print(running.comparison(f"{calls} calls each, on the {devices.describe(device)}", outcomes, reference))
    wrote = [str(request.out)] + ([f"{request.trace} (for ui.perfetto.dev)"] if request.trace is not None else [])
    console.print(f"Wrote {' and '.join(wrote)}.", soft_wrap=True)
    if reference is None:
        return True
    equal = running.same(outcome, reference)
    console.print(
        f"The images are {'equal to' if equal else 'DIFFERENT from'} those of {reference.label}, bit for bit.",
        style="green" if equal else "bold red",
    )
    return equal


def _measure(
    label: str,
    pipe: DiffusionPipeline,
    device: torch.device,
    request: Request,
    calls: int,
    peak: Callable[[], int] | None = None,
) -> running.Outcome:
    pipe.set_progress_bar_config(desc=label, leave=False, disable=not sys.stderr.isatty())
    inputs = running.inputs_for(
        pipe, prompt=request.prompt, num_inference_steps=request.steps, width=request.width, height=request.height
    )
    return running.measure(label, pipe, device, inputs, (request.seed,) * calls, peak)
