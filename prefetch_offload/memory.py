"""What the host is: how much memory there is to pin, and whether it is WSL. No torch."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from .config import GIB

_CGROUP_FILES = (
    # (limit, current): version 2, then version 1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def _read(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _own_cgroups(root: Path, membership: Path) -> list[Path]:
    """The version 2 and the version 1 memory group of this process; the top one where it cannot be told."""
    tops = {"": root, "memory": root / "memory"}
    own = dict(tops)
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # hierarchy:controllers:/path, with no controllers in version 2
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in tops:
                group = tops[controller] / path.lstrip("/")
                own[controller] = group if group.is_dir() else tops[controller]
    return list(own.values())


def cgroup_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[int, int] | None:
    """(limit, current) in bytes of the memory control group with the lowest limit that this process is in, or None.

    Args:
        root: where control groups are mounted.
        membership: the file that names the groups of this process.
    """
    found: list[tuple[int, int]] = []
    for group in _own_cgroups(root, membership):
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            for limit_name, current_name in _CGROUP_FILES:
                limit, current = _read(folder / limit_name), _read(folder / current_name)
                if limit is not None and current is not None and limit < 1 << 60:
                    found.append((limit, current))
    return min(found, default=None)


def pinnable_nbytes() -> int:
    """Bytes that may be pinned now without starving the host: memory that exists for this process, less a reserve.

    Pinned memory cannot be swapped or reclaimed, so 2 GiB or a tenth, whichever is more, is left to everyone else. Masters
    that are pinned replace weights that were in memory already, so the measure is what exists, not what is free now.
    """
    total: int = psutil.virtual_memory().total
    limit = cgroup_limit()
    if limit is not None:
        total = min(total, limit[0])
    return max(0, total - max(2 * GIB, total // 10))


def resident_nbytes() -> int:
    """Resident set size of this process."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def is_wsl() -> bool:
    """This is Linux within Windows, whose drivers can do less."""
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False
