"""What this package raises and warns on its own account."""

from __future__ import annotations


class TableError(ValueError):
    """A table, a descriptor or a buffer that no launch can carry out. Says what was given, why not, and what to do."""


class FormatError(ValueError):
    """Bytes that are not packed weights of a version that this package reads."""


class KernelWarning(UserWarning):
    """The kernels cannot be used where they should be; PyTorch's own operators do the same, slower."""
