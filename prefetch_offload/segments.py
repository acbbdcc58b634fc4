"""PyTorch's allocator for CUDA is told to put free pieces together while pipelines are enabled that do not fit.

# [Note: segments]
By itself the allocator takes memory from the device in segments, one for each large tensor, and what is free in one cannot
be put together with what is free in another. Weights of many sizes that come and go among activations leave free memory in
pieces that are too small: near the limit of the card the allocator gives segments back again and again, for which the host
waits, and in the end there is none that is large enough. With expandable segments there is one range of addresses for all,
whose free parts grow together, and pages are given back out of its middle. Full-size SDXL in 5 GiB, in PyTorch's own
allocator over a stand-in for the driver: 8.1 GiB reserved without, 6.1 with; on a device of 5.5 GiB memory ran out within
four of six calls without, within one of them with (benchmarks/results/pieces.md).

They are a setting of the process, so it is changed only where it is needed, nothing is known to speak against it, and nobody
has decided otherwise; and changed back when the last pipeline that needed it is disabled. Segments that are there stay what
they are.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from .errors import SettingError
from .memory import is_wsl

_NAME = "expandable_segments"
_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


@dataclass(frozen=True)
class _State:
    """What the allocator was told last, as text; what holds now; and whether blocks above a size are never split."""

    text: str
    on: bool
    splits: bool


@dataclass
class _Told:
    """What was changed: from which text, to which."""

    before: str
    after: str


_lock = threading.RLock()
_users: weakref.WeakSet[Any] = weakref.WeakSet()
_told: _Told | None = None  # while there are users
_restored: _Told | None = None  # the last change back: that text is ours, not a decision of the user's


def _read() -> _State:
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    return _State(str(found["PYTORCH_CUDA_ALLOC_CONF"]), bool(found[_NAME]), int(found["max_split_size"]) < 0)


def _write(text: str) -> None:
    # A new text sets back whatever it does not name, except for expandable segments.
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    tell(text)


def _has_virtual_memory(device: torch.device) -> bool:
    """The driver can map memory on `device`, which not all virtual GPUs can. PyTorch does not ask: allocations would fail."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    number, has = ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), index)
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(has), _VIRTUAL_MEMORY, number)
    except (OSError, AttributeError):
        return False
    return not failed and has.value == 1


def _maps(device: torch.device) -> bool:
    """An allocation, made as the allocator has been told to, succeeds."""
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # where nothing is cached that it could be taken from
            torch.empty(1, dtype=torch.uint8, device=device)
    except RuntimeError:
        return False
    return True


def _look(device: torch.device) -> _State | str:
    """The allocator's state, or why free pieces cannot be put together on `device`."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device.type} has none: they are PyTorch's for CUDA"
    if sys.platform != "linux":
        return "PyTorch has them on Linux only"
    if torch.cuda.get_allocator_backend() != "native":
        return f"PyTorch's own allocator is not in use, but {torch.cuda.get_allocator_backend()!r}"
    try:
        state = _read()
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"this PyTorch does not tell: set PYTORCH_CUDA_ALLOC_CONF={_NAME}:True"
    if not state.on and not _has_virtual_memory(device):
        return "its driver has no virtual memory for it"
    if not state.on and not state.splits:
        return "max_split_size_mb is set, with which they do not give memory back (PyTorch's issue 123548)"
    return state


def put_together() -> bool:
    """PyTorch's allocator for CUDA puts free pieces together now."""
    return _read().on


def never(device: torch.device) -> str | None:
    """Why `use` will not put them together unless it is asked to; None: it will, or they are."""
    found = _look(device)
    if isinstance(found, str):
        return found
    return None if found.on else _unwise(device) or (f"{_NAME}:False was set" if _NAME in _said(found) else None)


def _unwise(device: torch.device) -> str | None:
    """Why not to have them unless somebody says so."""
    # Mapping fails there with many drivers (PyTorch's issue 192330).
    if is_wsl():
        return "this is WSL, where drivers fail to map memory"
    if getattr(torch.cuda.get_device_properties(device), "is_integrated", False):
        return "the GPU has no memory of its own"  # Tegra, where mapping fails as well
    return None


def _said(state: _State) -> str:
    """What others have told the allocator last."""
    return _restored.before if _restored is not None and state.text == _restored.after else state.text


def check(device: torch.device) -> None:
    """Refuse to put free pieces together where that cannot be.

    Raises:
        SettingError: with why.
    """
    why = _look(device)
    if isinstance(why, str):
        raise SettingError(f"expandable_segments=True on {device}: {why}. Leave it out, to have it where it can be.")


def use(user: object, device: torch.device, wanted: bool | None) -> bool:
    """`user` needs free pieces put together.

    Args:
        user: until `leave(user)`, or until it is gone.
        wanted: True: whatever was said elsewhere; None: unless somebody has decided otherwise.

    Returns:
        Whether they are put together now.
    """
    global _told
    with _lock:
        _users.add(user)  # first: what is collected meanwhile may be the last other one that needed it
        state = _look(device)
        if isinstance(state, _State) and state.on:
            return True
        if isinstance(state, str) or (wanted is None and (_NAME in _said(state) or _unwise(device) is not None)):
            _users.discard(user)
            return False
        before = _said(state)
        _told = _Told(before, _with(before, True))  # before it is so: who is interrupted in between can undo it
        _write(_told.after)
        if _read().on and _maps(device):
            return True
        _users.discard(user)
        _undo()
        return False


def leave(user: object | None) -> None:
    """`user` needs it no longer; None: one that is gone. With the last one, the allocator is told what it was told before."""
    with _lock:
        if user is not None:
            _users.discard(user)
        if next(iter(_users), None) is None:  # one that is being collected counts in its length
            _undo()


def _undo() -> None:
    """Tell the allocator what it was told before, unless somebody has told it something else about them since."""
    global _told, _restored
    if _told is None:
        return
    text = _read().text
    if text == _told.after or _NAME not in text:
        before = _told.before if text == _told.after else text
        _restored = _Told(before, _with(before, False))
        _write(_restored.after)
    _told = None


def _with(text: str, on: bool) -> str:
    """The settings in `text`, with expandable segments on or off."""
    return ",".join([*filter(None, [_without(text)]), f"{_NAME}:{on}"])


def _without(text: str) -> str:
    """The settings in `text`, less that of expandable segments."""
    return ",".join(part for part in text.split(",") if part.split(":")[0].strip() != _NAME and part.strip())
