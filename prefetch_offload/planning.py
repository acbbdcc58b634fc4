"""From what a pipeline's calls were measured to do, to the plan of the next one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .component import Component
from .errors import BudgetError
from .simulator import ComponentLoad, Link, Workload
from .strategy import CallPlan, plan_call

if TYPE_CHECKING:
    from .clients import Client
    from .engine import Engine

# A link as fast as this has not been measured yet: PCIe 4.0 x16, pinned (benchmarks of the field: 24.8 GB/s).
ASSUMED_GBPS = 24.8
# Planning anew costs milliseconds: only when compute changed by more than measurements jitter.
_COMPUTE_CHANGE = 1.25
# Looking through a call's events costs a few microseconds each: in each of the first calls, then now and then.
EARLY, _OFTEN = 4, 8


def measure(engine: Engine, client: Client) -> None:
    """Take over what the device has measured by now: times of units and of passes, and the link."""
    for component in client.components.values():
        component.time_units()
    for key, ms in engine.recorder.run_ms(client.last_call).items() if client.last_call is not None else ():
        component = client.components.get(key)  # type: ignore[assignment]
        if component is not None:
            component.pass_ms = ms
    for key, unit_ms in engine.recorder.unpack_ms().items():
        if key in client.components:
            client.components[key].unpack_ms |= unit_ms
    gbps = engine.recorder.link_gbps()
    if gbps is not None:
        engine.link = Link(gbps)


def try_out(engine: Engine, client: Client) -> list[Component]:
    """With ``transport="auto"``: components of which some units came no sooner packed than they would have come raw, by the
    last call's events. These units travel raw once the components have been adopted anew."""
    gbps = engine.recorder.link_gbps() if any(c.on_trial for c in client.components.values()) else None
    if gbps is None:
        return []
    found = []
    for key, times in engine.recorder.unpack_ms().items():
        component = client.components.get(key)
        if component is None or not component.on_trial:
            continue
        raw = {u.key: u for u in component.units if u.travels_encoded and u.key in times}
        slower = [k for k, u in raw.items() if times[k] >= (u.nbytes - u.payload_nbytes) / gbps / 1e6]
        if slower:
            component.reject(slower)
            found.append(component)
    return found


def load_of(component: Component, activation_nbytes: int) -> ComponentLoad:
    """The component as a planner sees it: the units' measured shares of the time that a pass takes.

    Where it takes memory for good, that counts with what is left to activations, beside whatever runs: no unit of it takes
    or gives any.
    """
    nbytes = component.unit_nbytes
    measured = sum(component.unit_ms.values())
    if measured > 0:
        scale = (component.pass_ms or measured) / measured
        compute = {u: component.unit_ms.get(u, 0.0) * scale for u in component.order}
    else:
        total = sum(nbytes.values()) or 1
        compute = {u: component.pass_ms * nbytes[u] / total for u in component.order}
    if component.fixed:
        nbytes = dict.fromkeys(nbytes, 0)
    return ComponentLoad(
        units=component.order,
        nbytes=nbytes,
        compute_ms=compute,
        activation_nbytes=activation_nbytes,
        must=component.must,
        streamable=component.streamable,
        copy_nbytes={u.key: u.payload_nbytes for u in component.units if u.travels_encoded},
        unpack_ms={u.key: component.unpack_ms.get(u.key, 0.0) for u in component.units if u.travels_encoded},
        apart=all(sum(u not in component.must for u in p.units) <= 1 for p in component.points),
    )


def workload_of(engine: Engine, client: Client) -> Workload | None:
    """The call that is expected next; None while there is none that has been measured."""
    addresses = engine.addresses
    fixed = addresses.pool_nbytes if addresses is not None and addresses.permanent else 0
    order = client.order
    if not order.passes:
        return None
    loads: dict[str, ComponentLoad] = {}
    for key in dict.fromkeys(order.expected):
        component, shape = client.components.get(key), client.shapes.get(key)
        if component is None or not component.units or not client.memory.knows(shape):
            return None
        loads[key] = load_of(component, set_aside(client, shape) + fixed)
    runs = tuple((key, order.scaled(i)) for i, key in enumerate(order.expected))
    return Workload(loads, runs)


def set_aside(client: Client, shape: object) -> int:
    """Device bytes to leave to everything but weights while `shape` runs."""
    memory = client.memory
    if isinstance(memory.budget, int):
        return memory.set_aside(shape)
    overhead = memory.overhead_nbytes if memory.budget == "stock" else 0  # of the others, what is free knows of it
    return memory.activations[shape] + overhead


def budget_of(engine: Engine, client: Client) -> int | None:
    """Device bytes for weights and activations; None: not known yet."""
    budget = client.memory.budget
    if budget == "stock":
        floor = client.memory.stock_floor()
        return None if floor is None else min(floor, engine.available(client))
    return engine.available(client)


def replan(engine: Engine, client: Client) -> None:
    """Plan the call that begins, if it is not the one that was planned for.

    Sets the client's `plan`, `shares`, `heads` and `planned_because`.
    """
    measured = client.calls <= EARLY or client.calls % _OFTEN == 0
    if measured:
        measure(engine, client)
    workload, budget = workload_of(engine, client), budget_of(engine, client)
    if workload is None or budget is None:
        return
    why = _reason(client, workload, budget)
    if not why:
        if client.plan is not None and measured:  # the same shares; what they come to is by the latest figures
            client.plan = dataclasses.replace(client.plan, workload=workload, link=engine.link)
        return
    client.planned_because = why
    try:
        client.plan = plan_call(workload, budget, engine.link, client.settings.strategy)
    except BudgetError:
        client.former, client.aside = client.plan or client.former, "the last call did not fit"
        client.plan = None  # the component that does not fit says so when it is entered
    engine.adopt_plan(client)


def _reason(client: Client, workload: Workload, budget: int) -> str:
    """Why a plan is to be made; empty: there is one for this."""
    if client.plan is not None:
        return _difference(client.plan, workload, budget)
    former = client.former
    if former is None:
        return "first plan"
    same = dataclasses.replace(former, budget_nbytes=budget)
    reasons = [_budgets(former, budget), _difference(same, workload, budget)]
    return "; ".join(filter(None, reasons)) or client.aside


def _budgets(plan: CallPlan, budget: int) -> str:
    return "" if _near(plan.budget_nbytes, budget, 1.02) else f"another budget: {plan.budget_nbytes} -> {budget} bytes"


def _difference(plan: CallPlan, workload: Workload, budget: int) -> str:
    """What a plan was not made for; empty: nothing."""
    before, now = plan.workload.components, workload.components
    if [n for n, _ in plan.workload.runs] != [n for n, _ in workload.runs]:
        return "another order of components"
    if {n: c.nbytes for n, c in before.items()} != {n: c.nbytes for n, c in now.items()}:
        return "other weights"
    if {n: c.copy_nbytes for n, c in before.items()} != {n: c.copy_nbytes for n, c in now.items()}:
        return "weights that travel otherwise"
    if plan.workload.runs != workload.runs:
        passes = zip(plan.workload.runs, workload.runs, strict=True)
        return "other numbers of passes: " + ", ".join(f"{was} -> {p}" for (_, was), (_, p) in passes if was != p)
    if any(not _near(before[n].activation_nbytes, now[n].activation_nbytes, 1.05) for n in now):
        return "other activation memory"
    if other := _budgets(plan, budget):
        return other
    if not all(before[n].units == now[n].units and before[n].must == now[n].must for n in now):
        return "another order of units"
    if not _near(plan.found_for_ms, workload.compute_ms, _COMPUTE_CHANGE):
        return f"compute takes {workload.compute_ms:.0f} ms instead of {plan.found_for_ms:.0f}"
    return ""


def _near(a: float, b: float, ratio: float) -> bool:
    return max(a, b) <= ratio * min(a, b) or a == b

