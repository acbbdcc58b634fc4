"""Host memory: what control groups allow, of either version and however deep, and what may be pinned of it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from prefetch_offload import memory
from prefetch_offload.config import GIB, MIB
from prefetch_offload.memory import cgroup_limit, pinnable_nbytes, resident_nbytes

V1_UNLIMITED = 9223372036854771712


def group(folder: Path, limit: object = None, current: object = None, version: int = 2) -> Path:
    """A control group as the kernel shows it; files that are None are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, current), strict=True):
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    return folder


def member(tmp_path: Path, *lines: str) -> Path:
    """/proc/self/cgroup of a process in these groups."""
    file = tmp_path / "membership"
    file.write_text("".join(line + "\n" for line in lines))
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where control groups are mounted. The folder above it is a trap: it is not a control group."""
    group(tmp_path, 1, 1)
    return group(tmp_path / "cgroup")


def test_no_control_groups_no_limit(root: Path, tmp_path: Path) -> None:
    assert cgroup_limit(root, member(tmp_path, "0::/")) is None


def test_nothing_mounted_no_limit(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path / "nowhere", member(tmp_path, "0::/job")) is None


def test_the_own_group_limits(root: Path, tmp_path: Path) -> None:
    group(root / "job", 8 * GIB, 3 * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/job")) == (8 * GIB, 3 * GIB)


def test_a_group_may_have_a_colon_in_its_name(root: Path, tmp_path: Path) -> None:
    group(root / "vm:1/job:2", 8 * GIB, 3 * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/vm:1/job:2")) == (8 * GIB, 3 * GIB)


def test_a_group_that_is_not_ours_limits_nothing(root: Path, tmp_path: Path) -> None:
    group(root / "job", 8 * GIB, 3 * GIB)
    group(root / "other", 1 * GIB, 0)
    assert cgroup_limit(root, member(tmp_path, "0::/job")) == (8 * GIB, 3 * GIB)


def test_max_means_no_limit(root: Path, tmp_path: Path) -> None:
    group(root / "job", "max", 3 * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/job")) is None


def test_a_group_above_limits_where_ours_does_not(root: Path, tmp_path: Path) -> None:
    group(root / "user.slice", 4 * GIB, 2 * GIB)
    group(root / "user.slice/session/job", "max", 1 * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/user.slice/session/job")) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize("limits", [(8, 100), (100, 8)])
def test_the_lowest_limit_on_the_way_up_counts_however_full_the_groups_are(
    root: Path, tmp_path: Path, limits: tuple[int, int]
) -> None:
    # 8 GiB with 7 GiB to spare, and 100 GiB with 5 GiB to spare: what exists for this process is 8 GiB.
    for folder, limit in zip(("slice", "slice/job"), limits, strict=True):
        group(root / folder, limit * GIB, {8: 1, 100: 95}[limit] * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/slice/job")) == (8 * GIB, 1 * GIB)


@pytest.mark.parametrize(("limit", "current"), [(GIB, None), (None, GIB), (GIB, ""), ("what", GIB), (GIB, "-1")])
def test_files_that_are_missing_or_strange_are_passed_over(
    root: Path, tmp_path: Path, limit: object, current: object
) -> None:
    group(root, 9 * GIB, 1 * GIB)
    group(root / "job", limit, current)
    assert cgroup_limit(root, member(tmp_path, "0::/job")) == (9 * GIB, 1 * GIB)


def test_an_own_group_that_is_not_mounted_leaves_the_top_one(root: Path, tmp_path: Path) -> None:
    # In a container the host's path may be named while the container's group is what is mounted.
    group(root, 2 * GIB, 1 * GIB)
    assert cgroup_limit(root, member(tmp_path, "0::/docker/0123")) == (2 * GIB, 1 * GIB)


def test_an_unreadable_membership_leaves_the_top_one(root: Path, tmp_path: Path) -> None:
    group(root, 2 * GIB, 1 * GIB)
    assert cgroup_limit(root, tmp_path / "no such file") == (2 * GIB, 1 * GIB)


def test_version_1_at_the_top(root: Path, tmp_path: Path) -> None:
    group(root / "memory", 6 * GIB, 1 * GIB, version=1)
    assert cgroup_limit(root, member(tmp_path, "4:memory:/", "0::/")) == (6 * GIB, 1 * GIB)


def test_version_1_below_the_top(root: Path, tmp_path: Path) -> None:
    # As a batch system such as Slurm sets it up.
    group(root / "memory", V1_UNLIMITED, 90 * GIB, version=1)
    group(root / "memory/slurm/uid_1/job_2", 16 * GIB, 2 * GIB, version=1)
    lines = ["9:name=systemd:/x", "5:cpu,cpuacct:/slurm", "4:memory:/slurm/uid_1/job_2", "0::/"]
    assert cgroup_limit(root, member(tmp_path, *lines)) == (16 * GIB, 2 * GIB)


def test_version_1_with_controllers_mounted_together(root: Path, tmp_path: Path) -> None:
    group(root / "memory/job", 16 * GIB, 2 * GIB, version=1)
    assert cgroup_limit(root, member(tmp_path, "4:hugetlb,memory:/job")) == (16 * GIB, 2 * GIB)


def test_version_1_without_a_limit(root: Path, tmp_path: Path) -> None:
    group(root / "memory", V1_UNLIMITED, 1 * GIB, version=1)
    assert cgroup_limit(root, member(tmp_path, "4:memory:/")) is None


def test_both_versions_at_once_the_lower_limit(root: Path, tmp_path: Path) -> None:
    group(root / "memory/a", 5 * GIB, 1 * GIB, version=1)
    group(root / "b", 7 * GIB, 1 * GIB)
    assert cgroup_limit(root, member(tmp_path, "4:memory:/a", "0::/b")) == (5 * GIB, 1 * GIB)


def test_this_machine_gives_an_answer() -> None:
    limit = cgroup_limit()
    assert limit is None or 0 < limit[1] <= limit[0] + 64 * MIB  # usage may run over its limit for a moment


# -------------------------------------------------------------------------------------------------------------- pinning
def test_what_may_be_pinned_here_is_something_and_not_all() -> None:
    total = psutil.virtual_memory().total
    assert 0 <= pinnable_nbytes() < total
    if cgroup_limit() is None and total > 4 * GIB:
        assert pinnable_nbytes() > 0


@pytest.mark.parametrize(
    ("total", "limit", "pinnable"),
    [
        (16, None, 14),  # 2 GiB are left
        (200, None, 180),  # a tenth is left
        (200, 16, 14),  # the control group's limit is what exists
        (16, 200, 14),  # unless there is less than it allows
        (64, 2, 0),
        (1, None, 0),
    ],
)
def test_the_reserve(monkeypatch: pytest.MonkeyPatch, total: int, limit: int | None, pinnable: int) -> None:
    class Total:
        pass

    Total.total = total * GIB  # type: ignore[attr-defined]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Total)
    # how much of the limit is used makes no difference: the weights to be pinned are in memory already
    monkeypatch.setattr(memory, "cgroup_limit", lambda: None if limit is None else (limit * GIB, limit * GIB - 1))
    assert pinnable_nbytes() == pinnable * GIB


def test_the_resident_set_grows_with_what_is_touched() -> None:
    before = resident_nbytes()
    block = bytearray(os.urandom(1) * (64 * MIB))
    assert resident_nbytes() - before > 48 * MIB
    assert len(block) == 64 * MIB
