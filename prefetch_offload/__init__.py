"""Prefetching model offload for diffusers pipelines: `enable(pipe)` in place of `pipe.enable_model_cpu_offload()`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import enable, install, uninstall
    from .config import Settings
    from .encoding import Codec
    from .errors import BudgetError, OffloadError, OffloadWarning, RecompileError, SettingError, UnsupportedError
    from .handle import Offload
    from .quantizing import Quantized

__all__ = [
    "BudgetError",
    "Codec",
    "Offload",
    "OffloadError",
    "OffloadWarning",
    "Quantized",
    "RecompileError",
    "SettingError",
    "Settings",
    "UnsupportedError",
    "enable",
    "install",
    "uninstall",
]

_HOME = {
    "enable": ".api", "install": ".api", "uninstall": ".api", "Offload": ".handle", "Settings": ".config",
    "Codec": ".encoding", "Quantized": ".quantizing",
    "BudgetError": ".errors", "OffloadError": ".errors", "OffloadWarning": ".errors",
    "RecompileError": ".errors", "SettingError": ".errors", "UnsupportedError": ".errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazily: the pure modules are imported without torch, and `import prefetch_offload` stays fast.
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
