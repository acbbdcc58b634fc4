"""Running a pipeline in one of several ways and measuring it: what `run` and `demo` share."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from rich.table import Table

from ..config import MIB
from ..errors import SettingError
from . import devices


@dataclass(frozen=True)
class Outcome:
    """What some calls of a pipeline took and gave.

    Attributes:
        seconds: of each call, by the host's clock, from the call until its image is on the host. Copies for the next call
            may still be under way then, as in a program that makes one image after the other.
        peak_nbytes: the highest device memory over all of them.
        images: of each call, as the pipeline's "np" output.
    """

    label: str
    seconds: tuple[float, ...]
    peak_nbytes: int
    images: tuple[np.ndarray, ...]

    @property
    def later(self) -> float | None:
        """The median of the calls after the first, which also loads kernels and, for us, learns the order."""
        return statistics.median(self.seconds[1:]) if self.seconds[1:] else None


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The type that `--dtype` asks for; of weights on the simulated accelerator float32 unless it says otherwise."""
    dtype: torch.dtype = getattr(torch, name or ("float32" if devices.simulator(device) is not None else "bfloat16"))
    return dtype


def load(model: str, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline from a folder or the hub.

    Raises:
        SettingError: there is no such folder, or it is no pipeline in diffusers' format.
        OSError, ValueError: what diffusers says of a model that it cannot fetch or load.
    """
    folder = Path(model)
    looks_local = folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not folder.is_dir():
        raise SettingError(f"--model {model}: there is no such folder.")
    if looks_local and not (folder / "model_index.json").is_file():
        raise SettingError(f"--model {model}: the folder has no model_index.json, so it holds no diffusers pipeline.")
    try:
        return DiffusionPipeline.from_pretrained(model, dtype=dtype)
    except OSError as error:
        if looks_local:
            raise
        raise SettingError(
            f"--model {model} is no folder here, and could not be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error


def inputs_for(
    pipe: DiffusionPipeline, defaults: Mapping[str, Any] = MappingProxyType({}), **wanted: Any
) -> dict[str, Any]:
    """The inputs that were given, after a check that this pipeline takes them, and of `defaults` those that it takes.

    Raises:
        SettingError: it does not, or it needs others.
    """
    takes = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in takes:
            raise SettingError(
                f"{type(pipe).__name__} takes no `{name}`: leave it out, or call the pipeline from Python "
                "(prefetch_offload.enable(pipe))."
            )
    given = {name: value for name, value in defaults.items() if name in takes} | given
    missing = [p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    missing = [name for name in missing if name not in given]
    if missing:
        raise SettingError(
            f"{type(pipe).__name__} needs `{'`, `'.join(missing)}`, which is no option here: call the pipeline from Python "
            "(prefetch_offload.enable(pipe))."
        )
    if "output_type" in takes:
        given["output_type"] = "np"
    return given


def measure(
    label: str,
    pipe: DiffusionPipeline,
    device: torch.device,
    inputs: dict[str, Any],
    seeds: tuple[int, ...],
    peak: Callable[[], int] | None = None,
    done: Callable[[], None] = lambda: None,
) -> Outcome:
    """Call `pipe` once for each seed. `done` is told after each call; `peak` says the peak where the allocator cannot."""
    seconds, images = [], []
    torch.accelerator.synchronize(device)
    for seed in seeds:
        start = time.perf_counter()
        output = pipe(**inputs, **_generator(pipe, seed))
        seconds.append(time.perf_counter() - start)
        images.append(np.asarray(output[0]))
        done()
    peak_nbytes = peak() if peak is not None else devices.peak_nbytes(device)
    return Outcome(label, tuple(seconds), peak_nbytes, tuple(images))


def _generator(pipe: DiffusionPipeline, seed: int) -> dict[str, torch.Generator]:
    # On the CPU, so that the same noise comes out whatever the device.
    takes = "generator" in inspect.signature(pipe.__call__).parameters
    return {"generator": torch.Generator("cpu").manual_seed(seed)} if takes else {}


def quiet(device: torch.device, progress: bool) -> None:
    """Silence what third parties say about the simulated accelerator, and without `progress` their progress bars."""
    if devices.simulator(device) is not None:
        warnings.filterwarnings("ignore", message=".*appears to be a view operator.*")  # true, and nothing to act on
    if not progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def forget() -> None:
    """After the last reference to a pipeline is gone: give its device memory back."""
    gc.collect()
    torch.accelerator.empty_cache()


def same(a: Outcome, b: Outcome) -> bool:
    """Are the images equal, bit for bit, as far as both have them?"""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a.images, b.images, strict=False)
    )


def check_image_path(path: Path) -> None:
    """Before anything runs.

    Raises:
        SettingError: images are not written under such a name.
    """
    if path.suffix.lower() not in Image.registered_extensions() or path.is_dir():
        raise SettingError(f"--out {path}: images have names like image.png.")


def save_image(array: np.ndarray, path: Path) -> None:
    """The first image, or the first frame of the first video. What is no number becomes black.

    Raises:
        SettingError: the output is no image.
    """
    frame = array
    while frame.ndim > 3:
        frame = frame[0]
    if frame.ndim != 3 or frame.shape[-1] not in (1, 3, 4):
        raise SettingError(f"the pipeline's output is no image but an array of shape {tuple(array.shape)}.")
    pixels = (np.nan_to_num(frame.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def comparison(title: str, outcomes: list[Outcome], reference: Outcome | None) -> Table:
    """A row for each way of running."""
    made = Table(title=title)
    made.add_column("")
    for heading in ("first call s", "later calls s", "peak MiB", "images"):
        made.add_column(heading, justify="right")
    for outcome in outcomes:
        if reference is None or outcome is reference:
            verdict = "reference" if reference is not None else "-"
        else:
            verdict = "equal" if same(outcome, reference) else "DIFFERENT"
        made.add_row(
            outcome.label,
            f"{outcome.seconds[0]:.2f}",
            "-" if outcome.later is None else f"{outcome.later:.2f}",
            f"{outcome.peak_nbytes / MIB:.1f}",
            verdict,
        )
    return made
