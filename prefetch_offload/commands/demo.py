"""`prefetch-offload demo`: a small SDXL from a folder, run resident, with stock offload and with ours; equal images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from rich.console import Console

from .. import report
from ..api import enable
from ..config import MIB
from ..testing import simulated_device
from ..testing.pipelines import scaled
from . import devices, picture, running

PROMPT = "a photo of a cat"
CALLS = 4
Placed = TypeVar("Placed")


@dataclass(frozen=True)
class Size:
    """What is built and called, so that it takes seconds on what it runs on.

    Attributes:
        sizes: of `testing.pipelines`' SDXL.
        inputs: of its call.
        settings: small units on small weights, so that there are several in a component.
    """

    dtype: torch.dtype
    sizes: dict[str, int]
    inputs: dict[str, int]
    settings: dict[str, int]


# 60 MB of weights.
SIMULATED = Size(
    torch.float32,
    {"width": 64, "text_width": 192, "text_layers": 8},
    {"num_inference_steps": 3, "height": 64, "width": 64},
    {"unit_min": MIB, "unit_max": 2 * MIB},
)
# Added to each simulated operator, so that a call's time is not all this CPU's, which other programs may be using too.
OP_DELAY_US = 200
# About 2 GB of weights.
REAL = Size(
    torch.float16,
    {"width": 704, "text_width": 768, "text_layers": 12, "vae_width": 64},
    {"num_inference_steps": 8, "height": 256, "width": 256},
    {},
)


class Demo:
    """One run of the demo: a model in a folder, and the ways it has been run."""

    def __init__(self, folder: Path, device: torch.device, size: Size, console: Console) -> None:
        self.folder, self.device, self.size, self.console = folder, device, size, console
        self.outcomes: list[running.Outcome] = []
        self.pipe: DiffusionPipeline | None = None

    def make(self) -> int:
        """Save the pipeline in diffusers' folder format, and see that what is loaded is what was saved. Returns its bytes."""
        made = scaled("sdxl", **self.size.sizes).build(self.size.dtype)
        made.save_pretrained(self.folder)
        loaded = self.load()
        for name in ("tokenizer", "tokenizer_2"):
            # A tokenizer that lacks a file becomes, silently, one of two tokens, and then all prompts are alike.
            if getattr(loaded, name)(PROMPT).input_ids != getattr(made, name)(PROMPT).input_ids:
                raise RuntimeError(f"{self.folder / name} was saved, but loads as another tokenizer")
        modules = [m for m in loaded.components.values() if isinstance(m, torch.nn.Module)]
        return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))

    def load(self) -> DiffusionPipeline:
        pipe = running.load(str(self.folder), self.size.dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, label: str, calls: int, place: Callable[[DiffusionPipeline], Placed]) -> Placed:
        """Load the pipeline, let `place` put it where it belongs, and call it. Returns what `place` gave.

        The pipeline lives until `forget`: a handle knows nothing of one that is gone.
        """
        pipe = self.pipe = self.load()
        devices.reset_peak(self.device)
        placed = place(pipe)
        inputs = running.inputs_for(pipe, prompt=PROMPT, **self.size.inputs)
        peak = (lambda: placed.stats.peak_nbytes) if hasattr(placed, "stats") else None
        with self.console.status(f"{label}, {calls} calls"):
            outcome = running.measure(label, pipe, self.device, inputs, tuple(range(calls)), peak)
        self.outcomes.append(outcome)
        return placed

    def forget(self) -> None:
        """Give up the pipeline that ran last, and its device memory."""
        self.pipe = None
        running.forget()

    @property
    def resident(self) -> running.Outcome:
        """The first one: what all images must equal."""
        return self.outcomes[0]


def demo(out: Path, device_name: str | None, console: Console) -> bool:
    """Run it, write `out`/image.png, timeline.png and trace.json, and say whether all images were equal.

    Raises:
        SimulatorUnavailable: there is no accelerator, and the simulated one cannot be built.
        SettingError: `device_name` is no accelerator of this machine.
    """
    picture.require()
    device = _device(device_name, console)
    running.quiet(device, progress=False)
    ext = devices.simulator(device)
    name = devices.describe(device)
    size = REAL if ext is None else SIMULATED
    out.mkdir(parents=True, exist_ok=True)
    this = Demo(out / "model", device, size, console)
    nbytes = this.make()
    console.print(
        f"Made a small SDXL in {this.folder}: {nbytes / MIB:.0f} MiB of random weights, {str(size.dtype).split('.')[1]}. "
        "What it draws is noise, the same noise each time if all is well.",
        soft_wrap=True,
    )

    try:
        if ext is not None:
            ext.configure(-1, 0, 0, 0)
            ext.op_delay_us(OP_DELAY_US)
        this.run("resident", CALLS, lambda pipe: pipe.to(device))
        this.forget()
        if ext is not None:
            _slow_link(ext, nbytes, this.resident, console)
        this.run("stock offload", CALLS, lambda pipe: pipe.enable_model_cpu_offload(device=device))
        this.forget()
        with this.run(
            "prefetch_offload, stock's memory",
            CALLS,
            lambda pipe: enable(pipe, device=device, budget="stock", **size.settings),
        ) as offload:
            timeline, stats = offload.timeline(), offload.stats
            offload.trace(out / "trace.json")
        this.forget()
        with this.run(
            "prefetch_offload, free memory", CALLS, lambda pipe: enable(pipe, device=device, **size.settings)
        ):
            pass
        this.forget()
    finally:
        if ext is not None:
            ext.configure(-1, 0, 0, 0)
            ext.op_delay_us(0)

    console.print(running.comparison(f"A small SDXL on the {name}", this.outcomes, this.resident))
    console.print("What was copied, at stock's memory:")
    console.print(report.table(stats))
    console.print(report.summary(stats), soft_wrap=True)
    running.save_image(this.resident.images[0], out / "image.png")
    picture.draw(
        timeline,
        out / "timeline.png",
        f"A small SDXL on the {name}" + ("; all times are simulated" if ext is not None else ""),
        "prefetch_offload with no more memory than stock offload, two calls",
        {o.label: o.later or o.seconds[0] for o in this.outcomes},
    )
    equal = all(running.same(outcome, this.resident) for outcome in this.outcomes)
    if equal:
        images = sum(len(outcome.images) for outcome in this.outcomes)
        console.print(f"All {images} images are equal to the resident pipeline's, bit for bit.", style="green")
    else:
        console.print("Images differ from the resident pipeline's: this is a bug.", style="bold red")
    console.print(f"Wrote image.png, timeline.png and trace.json (for ui.perfetto.dev) to {out}.", soft_wrap=True)
    return equal


def _device(name: str | None, console: Console) -> torch.device:
    if name is not None or devices.found() is not None:
        device = devices.pick(name, simulate=False)
        console.print(f"Running on the {devices.describe(device)}.")
        return device
    console.print(
        "No accelerator was found: running on the simulated one. Its kernels are this CPU's and its link is set below: "
        "times show what is hidden behind what, not how fast a GPU is.",
        soft_wrap=True,
    )
    with console.status("compiling the simulated accelerator (once on a machine)"):
        return simulated_device()


def _slow_link(ext: Any, nbytes: int, resident: running.Outcome, console: Console) -> None:
    """Make copying all weights take as long as a resident call, in each direction, from pinned memory or not."""
    took = resident.later or resident.seconds[0]
    gbps = nbytes / took / 1e9
    ext.configure(-1, gbps, gbps, gbps)
    console.print(
        f"A resident call takes {took:.2f} s, so the simulated link is set to {gbps:.3f} GB/s: copying all weights once "
        "takes as long as computing. It is as fast from ordinary memory as from pinned, which favours stock offload.",
        soft_wrap=True,
    )
