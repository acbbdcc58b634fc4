"""Joint planning over a whole call: which share of the device each component gets. Pure.

    plan = plan_call(workload, 8 << 30, Link(25.0))
    plan.prediction.call_ms, plan.bound_ms

A *strategy* is a callable ``(workload, budget_nbytes, link) -> {component: Share}``; components that it does not name keep all
of their units on the device while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from .bound import lower_bound_ms
from .config import told
from .errors import BudgetError
from .schedule import CALLS
from .search import balanced
from .simulator import Link, Prediction, Workload, simulate
from .trace import Timeline
from .window import Share

__all__ = ["CallPlan", "Strategy", "balanced", "lower_bound_ms", "plan_call", "stock_ms", "whole"]

Strategy = Callable[[Workload, int, Link], Mapping[str, Share]]


@dataclass(frozen=True)
class CallPlan:
    """What a call of `workload` will do in `budget_nbytes` over `link`.

    Attributes:
        shares: by component, for those that stream.
        found_for_ms: the compute time of the call that the shares were found for; `workload` may have been measured since.
    """

    workload: Workload
    budget_nbytes: int
    link: Link
    shares: Mapping[str, Share]
    found_for_ms: float

    @cached_property
    def bound_ms(self) -> float:
        """No schedule can be faster."""
        return lower_bound_ms(self.workload, self.budget_nbytes, self.link)

    @cached_property
    def prediction(self) -> Prediction:
        """The call in its steady state. Simulated when it is first asked for: with thousands of units that takes longer
        than planning."""
        return self._simulated(every_pass=False)

    def last_call(self) -> tuple[Timeline, float, float]:
        """The timeline of `prediction` with all passes of every call; where the last one begins, and what it takes."""
        full = self._simulated(every_pass=True)
        return full.timeline, full.start_ms, full.call_ms

    def _simulated(self, every_pass: bool) -> Prediction:
        calls = 2 if all(share.script is None for share in self.shares.values()) else CALLS
        return simulate(self.workload, self.shares, self.budget_nbytes, self.link, calls, every_pass=every_pass)


def plan_call(workload: Workload, budget_nbytes: int, link: Link, strategy: Strategy | None = None) -> CallPlan:
    """Plan a call.

    Raises:
        BudgetError: the call cannot run in this budget; the smallest that it can run in is named.
    """
    smallest = workload.smallest_budget_nbytes
    if budget_nbytes < smallest:
        raise BudgetError(
            f"a budget of {budget_nbytes} bytes ({told(budget_nbytes)}) is too small: this call needs at least "
            f"{smallest} bytes ({told(smallest)})."
        )
    shares = (strategy or balanced)(workload, budget_nbytes, link)
    return CallPlan(workload, budget_nbytes, link, shares, workload.compute_ms)


def whole(workload: Workload, budget_nbytes: int, link: Link) -> dict[str, Share]:
    """Nothing is streamed, as under stock model offload: every component is whole on the device while it runs."""
    return {}


def stock_ms(workload: Workload, h2d_gbps: float, d2h_gbps: float) -> float:
    """Stock model offload: everything is copied in and back in every call, nothing of it beside compute.

    Its components form a chain, here in the order of their first runs: entering one sends the one before it back, and the
    end of the call sends back all.
    """
    chain = list(dict.fromkeys(name for name, _ in workload.runs))
    there: set[str] = set()
    nbytes = 0  # copied in; the same number is copied back
    for name, _ in workload.runs:
        if name != chain[0]:
            there.discard(chain[chain.index(name) - 1])
        if name not in there:
            there.add(name)
            nbytes += workload.components[name].total_nbytes
    return workload.compute_ms + nbytes / h2d_gbps / 1e6 + nbytes / d2h_gbps / 1e6
