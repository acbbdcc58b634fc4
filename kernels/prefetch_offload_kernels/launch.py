"""Where the kernel runs, and the one entry point that decides between it and the reference."""

from __future__ import annotations

import contextlib
import os
import warnings
from functools import cache
from typing import Any

import torch

from . import codes, reference
from .errors import KernelWarning, TableError
from .packing import read_header
from .table import Descriptor, Table, build_table

# What the kernel is compiled with. Fused multiply-add would be inexact; nothing here adds, but Triton 3.9 wants it said.
OPTIONS = {"num_warps": codes.WARPS, "enable_fp_fusion": False}


def available(device: torch.device | str) -> bool:
    """Whether the kernel serves this device; asked once per device, and remembered.

    It does on CUDA devices from compute capability 8.0 on (and AMD's), and on the CPU while TRITON_INTERPRET=1. The first call
    for a CUDA device compiles and runs a small launch, which takes a second or two and waits for the device: ask at set-up.
    A device that should be served and is not (no C compiler, for one) is warned about once.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device
    return _available(device)


@cache
def _available(device: torch.device) -> bool:
    if device.type not in ("cpu", "cuda"):
        return False
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return False  # without importing Triton, which takes a while
    try:
        from triton.runtime import JITFunction

        from .kernel import unit_kernel
    except ImportError:
        return False
    if device.type == "cpu":
        return not isinstance(unit_kernel, JITFunction)  # Triton decides on import whether it interprets
    if not torch.cuda.is_available():
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # Triton's own floor
    try:
        _probe(device)
    except Exception as error:
        warnings.warn(
            f"Triton does not work on {device} ({type(error).__name__}: {error}). PyTorch's operators cast and unpack instead, "
            "with more launches. A missing C compiler is the usual reason: install one, or set CC.",
            KernelWarning,
            stacklevel=3,
        )
        return False
    return True


def _probe(device: torch.device) -> None:
    """A small launch. Raises when it fails, or does not do what it should."""
    source = torch.arange(64, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    _launch(build_table([Descriptor(0, 0, 64, torch.uint8, torch.uint8)], device), source, target)
    if not torch.equal(source.cpu(), target.cpu()):
        raise RuntimeError("a copy of 64 bytes came out different")


def prepare(table: Table) -> None:
    """Compiles the kernel for the table's kinds (about a second each; Triton keeps it on disk), loads it, and runs nothing.

    Otherwise the first `cast_unit` with these kinds does. Without the kernel it does nothing.

    Raises:
        torch.OutOfMemoryError: the device has no room for it. It can be tried again.
    """
    if table.device.type == "cuda" and available(table.device):
        from .kernel import unit_kernel

        with torch.cuda.device(table.device):
            compiled = unit_kernel.warmup(
                torch.uint8,
                torch.uint8,
                torch.int64,
                torch.int32,
                KINDS=table.kinds,
                BLOCK=codes.BLOCK,
                grid=(1,),
                **OPTIONS,
            )
            _load(compiled)


def _load(compiled: Any) -> None:
    """Bring a compiled kernel onto the device, which Triton otherwise does in its first launch."""
    try:
        _ = compiled.run  # a property that loads
    except RuntimeError as error:
        # Triton takes it for loaded from now on, and would launch nothing.
        compiled._run = None
        if "out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from error


def cast_unit(table: Table, staging: torch.Tensor, target: torch.Tensor) -> None:
    """Turns a unit as it travelled into the unit as it is used: one launch, on the current stream.

    Every value is what PyTorch gives: ``value.to(target)``, or ``(value.to(float32) * scale).to(target)``, rounded to nearest,
    ties to even; infinities, subnormals and -0 included. A NaN stays NaN; its sign and payload are those of the device, as
    PyTorch's own are (they differ between its CPU and CUDA). Copies and packed weights are exact bit for bit, NaN included.

    Mutates `target`: the bytes of the descriptors' targets and no others. Does not wait for the device. The caller orders it
    behind the copy into `staging`, and keeps both buffers until it is done.

    Args:
        table: of build_table, on the buffers' device.
        staging: uint8 [at least table.staging_nbytes].
        target: uint8 [at least table.target_nbytes]; shares no byte with `staging`.

    Raises:
        TableError: for buffers of another kind, size, alignment or device. Nothing has been written.
    """
    _check("staging", staging, table.staging_nbytes, table)
    _check("target", target, table.target_nbytes, table)
    if (
        staging.data_ptr() < target.data_ptr() + target.numel()
        and target.data_ptr() < staging.data_ptr() + staging.numel()
    ):
        raise TableError("staging and target overlap: programs run in any order. Give the unit a place of its own.")
    if available(table.device):
        _launch(table, staging, target)
    else:
        reference.cast_unit_reference(table, staging, target)


def workspace_nbytes(table: Table) -> int:
    """Device bytes that `cast_unit` takes while it runs, at most: none with the kernel."""
    return 0 if available(table.device) else reference.workspace_nbytes(table)


def unpack(packed: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Weights packed by `pack_bf16`, as bfloat16 [elements] on `device` (None: where the packed ones are).

    For one tensor; a unit's go through `cast_unit` together. Raises FormatError for other bytes.
    """
    device = torch.device(device) if device is not None else packed.device
    header = read_header(packed)
    staging = packed.to(device)
    if staging.data_ptr() % 16:
        staging = staging.clone()
    target = torch.empty(2 * header.elements, dtype=torch.uint8, device=device)
    cast_unit(build_table([Descriptor.of_packed(packed, 0, 0)], device), staging, target)
    return target.view(torch.bfloat16)


def _check(label: str, buffer: torch.Tensor, nbytes: int, table: Table) -> None:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise TableError(f"{label} is {buffer.dtype} {tuple(buffer.shape)}. Give contiguous bytes: uint8 [n].")
    if buffer.device != table.device:
        raise TableError(
            f"{label} is on {buffer.device}, the table on {table.device}. Build the table for that device."
        )
    if buffer.numel() < nbytes:
        raise TableError(f"{label} has {buffer.numel()} bytes; the table reaches to byte {nbytes}. Give a larger one.")
    if buffer.data_ptr() % 16:
        raise TableError(
            f"{label} begins at an address that is not a multiple of 16. Begin it at one, and move the offsets."
        )


def _launch(table: Table, staging: torch.Tensor, target: torch.Tensor) -> None:
    from .kernel import unit_kernel

    programs = table.blocks.shape[0]
    if not programs:
        return
    on_device: Any = torch.cuda.device(table.device) if table.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        unit_kernel[(programs,)](
            staging, target, table.rows, table.blocks, KINDS=table.kinds, BLOCK=codes.BLOCK, **OPTIONS
        )
