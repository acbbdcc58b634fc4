"""Which engine serves a device."""

from __future__ import annotations

import torch

from .config import Settings
from .engine import Engine
from .errors import SettingError

engines: dict[torch.device, Engine] = {}
# What concerns the device as a whole, and so all pipelines on it.
_SHARED = ("pin", "pinned_limit", "staging", "reserve", "verify")


def engine_for(device: torch.device, settings: Settings) -> Engine:
    """The engine of `device`, shared by all pipelines on it.

    Raises:
        SettingError: pipelines are enabled there with other settings that concern the device as a whole.
    """
    engine = engines.get(device)
    if engine is None or not engine.live():  # figures and hazards of pipelines that are gone go with their engine
        engine = engines[device] = Engine(device, settings)
        return engine
    for name in _SHARED:
        if getattr(engine.settings, name) != getattr(settings, name):
            raise SettingError(
                f"{name}={getattr(settings, name)!r} concerns all of {device}, where a pipeline is enabled with "
                f"{name}={getattr(engine.settings, name)!r}: use the same, or disable that one first."
            )
    return engine
