"""Where results come from: what a row says of the program that measured it, the same for every benchmark."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path


def told_by(*command: str) -> str:
    """What a program prints; nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def commit() -> str:
    """The commit that is checked out, with ``-dirty`` behind it where files differ; what BENCHMARK_COMMIT says in a copy of the
    files, which has no history."""
    found = told_by("git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return found or os.environ.get("BENCHMARK_COMMIT", "")


def command(module: str, out: Path) -> str:
    """The command line of this process, without the place of its results."""
    return shlex.join(["python", "-m", module, *("OUT" if word == str(out) else word for word in sys.argv[1:])])


def driver() -> str:
    """The version of NVIDIA's driver."""
    return told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
