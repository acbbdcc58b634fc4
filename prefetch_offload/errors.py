"""Every error and warning this package raises on its own account."""

from __future__ import annotations


class OffloadError(Exception):
    """Base of the errors below."""


class SettingError(OffloadError, ValueError):
    """A setting cannot be used. The message says what was given, why not, and what to do."""


class UnsupportedError(OffloadError, ValueError):
    """This pipeline, component or tensor cannot be offloaded. Nothing has been changed."""


class BudgetError(OffloadError, ValueError):
    """The budget cannot hold what must be on the device at one time. The message names the smallest that can."""


class TransitionError(OffloadError, RuntimeError):
    """An event that a unit's state does not allow: a bug in the engine. Nothing has been changed."""


class RecompileError(OffloadError, RuntimeError):
    """With ``strict_compile=True``: a component was compiled again, or in pieces, while it ran. Names it and the reasons."""


class OffloadWarning(UserWarning):
    """Something works, but not as well as it could. The message says what it costs."""
