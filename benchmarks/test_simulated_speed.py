"""On a link as slow as compute: `python -m pytest -s benchmarks/test_simulated_speed.py`, on an idle machine.

Times are simulated: real pipelines on the simulated accelerator, whose copies take the time the link would.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from race import on_a_slow_link

from prefetch_offload.testing import load


def test_faster_than_stock_at_its_memory_and_as_fast_as_resident_when_all_fits() -> None:
    times = on_a_slow_link(load())
    assert times["stock"] / times["ours"] >= 1.6
    assert times["default"] / times["resident"] <= 1.1
