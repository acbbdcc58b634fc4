"""Joint planning over a whole call: which share of the device each component gets. Pure.

    plan = plan_call(workload, 8 << 30, Link(25.0))
    plan.prediction.call_ms, plan.bound_ms

A *strategy* is a callable ``(workload, budget_nbytes, link) -> {component: Share}``; components that it does not name keep all
of their units on the device while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .config import GIB
from .errors import BudgetError
from .simulator import Link, Prediction, Workload, simulate
from .window import Share, share_of

Strategy = Callable[[Workload, int, Link], Mapping[str, Share]]


@dataclass(frozen=True)
class CallPlan:
    """What a call of `workload` will do in `budget_nbytes` over `link`.

    Attributes:
        shares: by component, for those that stream.
        prediction: the call in its steady state.
        bound_ms: no schedule can be faster.
    """

    workload: Workload
    budget_nbytes: int
    link: Link
    shares: Mapping[str, Share]
    prediction: Prediction
    bound_ms: float


def plan_call(workload: Workload, budget_nbytes: int, link: Link, strategy: Strategy | None = None) -> CallPlan:
    """Plan a call, and predict it.

    Raises:
        BudgetError: the call cannot run in this budget; the smallest that it can run in is named.
    """
    smallest = workload.smallest_budget_nbytes
    if budget_nbytes < smallest:
        raise BudgetError(
            f"a budget of {budget_nbytes} bytes ({budget_nbytes / GIB:.2f} GiB) is too small: this call needs at least "
            f"{smallest} bytes ({smallest / GIB:.2f} GiB)."
        )
    shares = (strategy or balanced)(workload, budget_nbytes, link)
    prediction = simulate(workload, shares, budget_nbytes, link)
    return CallPlan(workload, budget_nbytes, link, shares, prediction, lower_bound_ms(workload, budget_nbytes, link))


def balanced(workload: Workload, budget_nbytes: int, link: Link) -> dict[str, Share]:
    """Shares for the shortest steady call."""
    shares: dict[str, Share] = {}
    for name, c in workload.components.items():
        limit = budget_nbytes - c.activation_nbytes
        if c.streamable and c.total_nbytes > limit:
            window = 2 * max(c.nbytes.values())
            shares[name] = share_of(c.units, c.nbytes, c.compute_ms, limit, window, c.must)
    return shares


def whole(workload: Workload, budget_nbytes: int, link: Link) -> dict[str, Share]:
    """Nothing is streamed, as under stock model offload: every component is whole on the device while it runs."""
    return {}


def lower_bound_ms(workload: Workload, budget_nbytes: int, link: Link) -> float:
    """A time that no schedule of the call can beat in its steady state."""
    return workload.compute_ms


def stock_ms(workload: Workload, h2d_gbps: float, d2h_gbps: float) -> float:
    """Stock model offload: everything is copied in and back in every call, nothing of it beside compute."""
    nbytes = sum(workload.components[name].total_nbytes for name in dict.fromkeys(n for n, _ in workload.runs))
    return workload.compute_ms + nbytes / h2d_gbps / 1e6 + nbytes / d2h_gbps / 1e6
