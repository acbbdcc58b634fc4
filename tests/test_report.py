"""The report: why a plan was made, and what a call did beside what was planned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from conftest import DEVICE, weight_nbytes

from prefetch_offload import planning
from prefetch_offload.testing.pipelines import lora_state_dict, scaled

FLUX = scaled("flux", width=64, layers=2, text_width=64, text_layers=4, vae_width=8)
UNITS = {"unit_min": 64 << 10, "unit_max": 256 << 10}
GUIDED = {"true_cfg_scale": 2.0, "negative_prompt": "a loud lake"}


def draw(pipe: Any, **inputs: Any) -> np.ndarray:
    return np.asarray(FLUX.call(pipe, **{"steps": 2, **inputs}))


def nothing(pipe: Any) -> None:
    pass


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_state_dict(FLUX.build(), rank=8))


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a busy machine are no reason."""
    monkeypatch.setattr(planning, "_COMPUTE_CHANGE", 1e9)


CHANGES: dict[str, tuple[Mapping[str, Any], Callable[[Any], None], tuple[float, float], str]] = {
    # inputs of the calls that follow, what is done to the pipeline before them, budgets before and then, and the reason
    "steps": ({"steps": 3}, nothing, (0.6, 0.6), r"other numbers of passes: 2 -> 3"),
    "size": ({"height": 16, "width": 16}, nothing, (0.6, 0.6), r"other activation memory"),
    "guidance": (GUIDED, nothing, (0.6, 0.6), r"another order of components"),
    "lora": ({}, load_lora, (0.6, 0.6), r"other weights"),
    "budget": ({}, nothing, (0.6, 0.8), r"another budget: (\d+) -> (\d+) bytes"),
    "budget, steps": ({"steps": 3}, nothing, (0.6, 0.8), r"another budget: (\d+) -> (\d+) bytes; other numbers of passes: .*"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("steady")
def test_the_report_says_why_there_is_another_plan(change: str, sim: Any, enable: Any) -> None:
    inputs, to_the_pipe, shares, reason = CHANGES[change]
    resident = FLUX.build().to(DEVICE)
    expected = [draw(resident)]
    to_the_pipe(resident)
    expected.append(draw(resident, **inputs))
    del resident
    pipe = FLUX.build()
    budgets = [int(share * weight_nbytes(pipe)) for share in shares]
    offload = enable(pipe, budget=budgets[0], **UNITS)
    for _ in range(2):
        assert draw(pipe).tobytes() == expected[0].tobytes()
    assert "(first plan)" in flat(offload.report())
    first = offload._session.client.plan
    to_the_pipe(pipe)
    if budgets[1] != budgets[0]:
        offload.budget = budgets[1]
        assert "(first plan)" in flat(offload.report()), "of the last call, which is still shown beside what was planned"
    reasons = []
    for _ in range(2):  # inputs that are new are measured in the first of them
        assert draw(pipe, **inputs).tobytes() == expected[1].tobytes()
        last = offload.stats.last_call
        assert last is not None and f"({last.planned_because})" in flat(offload.report())
        reasons.append(last.planned_because)
    found = next(filter(None, (re.fullmatch(reason, r) for r in reasons)), None)
    assert found, reasons
    assert [int(n) for n in found.groups()] in ([], budgets)
    assert offload._session.client.plan.found_for_ms != first.found_for_ms, "a new plan"


@pytest.mark.usefixtures("steady")
def test_the_same_budget_set_again_is_a_reason(sim: Any, enable: Any) -> None:
    pipe = FLUX.build()
    offload = enable(pipe, budget=int(0.6 * weight_nbytes(pipe)), **UNITS)
    for _ in range(2):
        draw(pipe)
    offload.budget = offload.budget
    draw(pipe)
    assert offload.stats.last_call.planned_because == "the budget was set again"


def flat(report: str) -> str:
    """Titles are broken into lines."""
    return " ".join(report.split())
