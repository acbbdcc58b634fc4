"""`prefetch-offload doctor`: what is here, how fast the link is, and what would be slow and why."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import shutil
import sys
from importlib import metadata, util
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from .. import segments
from ..config import GIB, MIB
from ..memory import cgroup_limit, is_wsl, pinnable_nbytes
from . import devices, link

PACKAGES = ("torch", "diffusers", "accelerate", "transformers", "safetensors", "triton", "peft")
OLDEST_TORCH = (2, 9)
# GB/s from pinned memory: PCIe 3 x16 gives 12.2, PCIe 4 x16 24.8 (published figures). Less means fewer lanes, an older
# slot, or a card in power saving.
SLOW_LINK_GBPS = 10.0

SIMULATED_PROBE = 32 * MIB


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found. Sizes in bytes; None: does not apply, or cannot be told.

    Attributes:
        accelerator: its device, or None.
        simulated: the accelerator is the simulated one.
        pinnable: how much this package would pin.
        memlock: RLIMIT_MEMLOCK; None: unlimited.
        compiler, ninja: what the simulated accelerator is built with.
        in_pieces: why PyTorch's allocator for CUDA will not put free pieces of device memory together (`expandable_segments`);
            None: it does where `enable` asks for it, or there is no CUDA.
    """

    versions: dict[str, str | None]
    system: str
    wsl: bool
    accelerator: str | None
    name: str | None
    simulated: bool
    device_memory: int | None
    link: link.Link | None
    host_memory: int
    host_available: int
    swap_used: int
    cgroup: int | None
    pinnable: int
    memlock: int | None
    compiler: str | None
    ninja: bool
    in_pieces: str | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that would be slow or impossible here: `what`, and what to `do` about it."""

    what: str
    do: str


def gather(simulate: bool) -> Facts:
    """Look around. Measures the link when there is an accelerator, or with `simulate` the simulated one's.

    Raises:
        SimulatorUnavailable: `simulate`, and it cannot be built here.
    """
    device = devices.pick(None, True) if simulate else devices.found()
    simulated = device is not None and devices.simulator(device) is not None
    memory = psutil.virtual_memory()
    limit = cgroup_limit()
    return Facts(
        versions={name: version_of(name) for name in PACKAGES}
        | {"torch": torch.__version__},  # with the build: +cpu, +cu130
        system=f"Python {platform.python_version()}, {platform.system()} {platform.release()}",
        wsl=is_wsl(),
        accelerator=None if device is None else str(device),
        name=None if device is None else devices.describe(device),
        simulated=simulated,
        # The simulated device's capacity is a setting, not a fact.
        device_memory=None if device is None or simulated else _memory_of(device),
        link=None if device is None else link.measure(device, SIMULATED_PROBE if simulated else 256 * MIB),
        host_memory=memory.total,
        host_available=memory.available,
        swap_used=psutil.swap_memory().used,
        cgroup=None if limit is None else limit[0],
        pinnable=pinnable_nbytes(),
        memlock=_memlock(),
        compiler=shutil.which((shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]),
        ninja=util.find_spec("ninja") is not None or shutil.which("ninja") is not None,
        in_pieces=segments.never(device) if device is not None and device.type == "cuda" else None,
    )


def _memory_of(device: torch.device) -> int | None:
    module: Any = torch.get_device_module(device)
    return int(module.mem_get_info(device)[1]) if hasattr(module, "mem_get_info") else None


def version_of(package: str) -> str | None:
    """What is installed of a package, whichever way its name is spelled; None: nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memlock() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def findings(facts: Facts) -> list[Finding]:
    """What would be slow with these facts, the worst first."""
    found = []

    def note(what: str, do: str) -> None:
        found.append(Finding(what, do))

    if facts.accelerator is None:
        builds = facts.compiler is not None and facts.ninja
        note(
            "There is no accelerator, so there is nothing to offload from.",
            "`--simulate` and `prefetch-offload demo` run on a simulated one"
            + ("." if builds else ", once a C++ compiler and ninja are installed."),
        )
    torch_version = facts.versions.get("torch") or "0.0"
    if tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        note(f"PyTorch {torch_version} is older than this package supports.", "Install PyTorch 2.9 or newer.")
    measured = facts.link
    if measured is not None and measured.h2d_pinned_gbps is None:
        note(
            "Host memory cannot be pinned: every weight is waited for, nothing is prefetched.",
            "Raise `ulimit -l` and the container's memory limit."
            + (" Under WSL, raise its memory." if facts.wsl else ""),
        )
    elif measured is not None and not facts.simulated and (measured.h2d_pinned_gbps or 0) < SLOW_LINK_GBPS:
        note(
            f"The link is slow: {measured.h2d_pinned_gbps:.1f} GB/s from pinned memory, where PCIe 3 x16 gives 12.",
            "See that the card sits in an x16 slot (`nvidia-smi -q -d PCIE`); prefer budgets that keep more on the device.",
        )
    if facts.in_pieces is not None:
        note(
            f"PyTorch's allocator leaves free device memory in the pieces that it came in, since {facts.in_pieces}. Near the "
            "limit of the card it gives some back again and again, for which the host waits.",
            "Plans leave more free after calls in which that happened; a smaller `budget` does from the first. See `What the "
            "driver shows` in docs/choosing-a-budget.md.",
        )
    if facts.wsl:
        note(
            "This is WSL, which may pin as little as 0.5 to 1 GiB.",
            "Weights beyond that are not prefetched; native Linux does.",
        )
    if facts.swap_used > 256 * MIB:
        note(
            f"{facts.swap_used / GIB:.1f} GiB are swapped out: host memory is short, and pinning makes it shorter.",
            "Close other programs, use smaller or quantised weights, or set pinned_limit.",
        )
    if facts.cgroup is not None and facts.cgroup < facts.host_memory:
        note(
            f"The container may use {facts.cgroup / GIB:.1f} of the host's {facts.host_memory / GIB:.1f} GiB.",
            f"Weights beyond {facts.pinnable / GIB:.1f} GiB are not pinned, and so not prefetched; raise the limit if need be.",
        )
    return found


def doctor(simulate: bool, as_json: bool, console: Console) -> None:
    """Print what `gather` finds, as tables or as JSON."""
    facts = gather(simulate)
    notes = findings(facts)
    if as_json:
        record: dict[str, Any] = dataclasses.asdict(facts) | {"findings": [dataclasses.asdict(n) for n in notes]}
        console.print_json(data=record)
        return
    console.print(_table(facts))
    if facts.simulated:
        console.print("The link is simulated: it is as fast as this CPU copies memory, and says nothing of a GPU's.")
    elif not notes:
        console.print("Nothing here should be slow.", style="green")
    for note in notes:
        console.print(f"[yellow]![/yellow] {note.what}\n  {note.do}", soft_wrap=True, highlight=False)


def _table(facts: Facts) -> Table:
    made = Table(title="prefetch_offload doctor", show_header=False, title_justify="left")
    made.add_column(style="bold")
    made.add_column()
    if facts.accelerator is None:
        made.add_row("accelerator", "none")
    else:
        size = "" if facts.device_memory is None else f", {facts.device_memory / GIB:.1f} GiB"
        made.add_row("accelerator", f"{facts.name} ({facts.accelerator}{size})")
    if facts.link is not None:
        label = "link (simulated)" if facts.simulated else "link"
        made.add_row(f"{label}, pinned", _ways(facts.link.h2d_pinned_gbps, facts.link.d2h_pinned_gbps))
        made.add_row(f"{label}, pageable", _ways(facts.link.h2d_pageable_gbps, facts.link.d2h_pageable_gbps))
    made.add_row("host memory", f"{facts.host_memory / GIB:.1f} GiB, {facts.host_available / GIB:.1f} GiB available")
    made.add_row("container limit", "none" if facts.cgroup is None else f"{facts.cgroup / GIB:.1f} GiB")
    memlock = "unlimited" if facts.memlock is None else f"{facts.memlock / MIB:.0f} MiB"
    made.add_row("would be pinned", f"up to {facts.pinnable / GIB:.1f} GiB (ulimit -l: {memlock})")
    made.add_row("system", facts.system + (" under WSL" if facts.wsl else ""))
    made.add_row("packages", ", ".join(f"{name} {version or '-'}" for name, version in facts.versions.items()))
    builds = "can be built" if facts.compiler and facts.ninja else "needs a C++ compiler and ninja"
    made.add_row(
        "simulated accelerator",
        f"{builds} (compiler: {facts.compiler or 'none'}, ninja: {'yes' if facts.ninja else 'no'})",
    )
    return made


def _ways(up: float | None, down: float | None) -> str:
    if up is None or down is None:
        return "refused"
    return f"{up:.1f} GB/s to the device, {down:.1f} GB/s back"
