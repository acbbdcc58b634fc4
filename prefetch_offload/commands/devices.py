"""Which accelerator a command runs on, and what it is called."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import SettingError


def found() -> torch.device | None:
    """The machine's accelerator, with an index; None without one. The simulated one is not the machine's."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or simulator(device) is not None:
        return None
    return torch.device(device.type, torch.accelerator.current_device_index())


def pick(name: str | None, simulate: bool) -> torch.device:
    """The device that `--device` and `--simulate` ask for.

    Raises:
        SettingError: there is no such device, or none at all.
        SimulatorUnavailable: the simulated accelerator cannot be built here.
    """
    if simulate:
        if name is not None:
            raise SettingError(
                f"--simulate runs on the simulated accelerator and --device on {name}: give one of them."
            )
        from ..testing import simulated_device  # it imports the C++ build tools: only who asks for it pays

        return simulated_device()
    here = found()
    if name is None:
        if here is None:
            raise SettingError("no accelerator was found: --simulate runs on a simulated one.")
        return here
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(f"--device {name} is not a device: write it like cuda or cuda:1.") from None
    if here is None or device.type != here.type:
        has = "no accelerator" if here is None else f"{here.type} devices only"
        raise SettingError(f"--device {name}: this machine has {has}.")
    count = torch.accelerator.device_count()
    index = here.index if device.index is None else device.index
    if index >= count:
        raise SettingError(f"--device {name}: this machine has {count} of them, numbered from 0.")
    return torch.device(device.type, index)


def simulator(device: torch.device) -> Any | None:
    """The simulator's extension if `device` is simulated, else None."""
    try:
        return getattr(torch.get_device_module(device), "ext", None)
    except RuntimeError:  # a backend without a module
        return None


def describe(device: torch.device) -> str:
    """For titles: the name of the device, or that it is simulated."""
    if simulator(device) is not None:
        return "simulated accelerator"
    module: Any = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def reset_peak(device: torch.device) -> None:
    """Start the peak of device memory anew."""
    ext = simulator(device)
    if ext is not None:
        ext.reset()
    else:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_nbytes(device: torch.device) -> int:
    """The highest device memory since `reset_peak`."""
    ext = simulator(device)
    return int(
        ext.counters()["peak"] if ext is not None else torch.get_device_module(device).max_memory_allocated(device)
    )
