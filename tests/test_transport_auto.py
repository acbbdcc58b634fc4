"""`transport="auto"`'s criterion: a unit travels raw once unpacking took as long as its smaller copy saved."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from prefetch_offload.planning import try_out

GBPS = 20.0
NBYTES = {"a": (80_000_000, 60_000_000), "b": (8_000_000, 6_000_000), "raw": (40_000_000, 40_000_000)}
SAVED_MS = {"a": 1.0, "b": 0.1}  # 20 MB, and 2 MB, at 20 GB/s


def tried(times: dict[str, float], gbps: float | None = GBPS, on_trial: bool = True) -> tuple[list[str], list[Any]]:
    """Units that are to travel raw, and the components that `try_out` says have such, after a call with these times."""
    rejected: list[str] = []
    units = [
        SimpleNamespace(key=k, nbytes=n, payload_nbytes=p, travels_encoded=k != "raw") for k, (n, p) in NBYTES.items()
    ]
    component = SimpleNamespace(on_trial=on_trial, units=units, reject=rejected.extend)
    recorder = SimpleNamespace(link_gbps=lambda: gbps, unpack_ms=lambda: {"c#0": times, "gone#0": {"x": 1e6}})
    engine, client = SimpleNamespace(recorder=recorder), SimpleNamespace(components={"c#0": component})
    found = try_out(engine, client)  # type: ignore[arg-type]
    assert found in ([], [component])
    return rejected, found


@pytest.mark.parametrize("unit", ["a", "b"])
def test_a_unit_is_rejected_from_where_nothing_is_saved(unit: str) -> None:
    other = {k: 0.0 for k in SAVED_MS if k != unit}
    below, above = math.nextafter(SAVED_MS[unit], 0), math.nextafter(SAVED_MS[unit], 2)
    assert tried({unit: below * (1 - 1e-12), **other}) == ([], [])
    for times in (SAVED_MS[unit], above * (1 + 1e-12)):
        rejected, found = tried({unit: times, **other})
        assert rejected == [unit] and len(found) == 1


def test_each_unit_by_its_own_bytes() -> None:
    assert tried({"a": 0.5, "b": 0.5})[0] == ["b"]
    assert tried({"a": 1.5, "b": 0.05})[0] == ["a"]
    assert tried({"a": 1.5, "b": 0.5})[0] == ["a", "b"]


def test_a_faster_link_leaves_less_to_save() -> None:
    assert tried({"a": 0.6}, gbps=30.0)[0] == []
    assert tried({"a": 0.6}, gbps=40.0)[0] == ["a"]


def test_what_is_not_measured_or_not_on_trial_stays() -> None:
    assert tried({"raw": 1e6}) == ([], []), "it travels raw already"
    assert tried({}) == ([], [])
    assert tried({"a": 1e6}, gbps=None) == ([], []), "no copy has told the link's speed"
    assert tried({"a": 1e6}, on_trial=False) == ([], []), 'transport="packed" means it'
