"""The smallest budget that a pipeline's calls work in: what refuses a smaller one, and says when a first call took more."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from .addresses import NO_ARENA
from .component import Component
from .config import told
from .errors import BudgetError

if TYPE_CHECKING:
    from .clients import Client
    from .moves import Moves


@dataclasses.dataclass(frozen=True)
class Need:
    """The fewest device bytes in which a component can run.

    Attributes:
        nbytes: all of them.
        weights_nbytes: of its weights, streamed if they can be.
        idle_nbytes: kept by units of other components that take their memory for good.
        measured: activations are among them; else it needs more.
    """

    nbytes: int
    weights_nbytes: int
    idle_nbytes: int
    measured: bool


def need_of(moves: Moves, client: Client, component: Component, shapes: Collection[object]) -> Need:
    """What `component` needs at the least in a call of the client's, with inputs of these shapes."""
    memory = client.memory
    besides = [memory.set_aside(shape) for shape in shapes if memory.knows(shape)]
    idle = moves._idle_beside(component)
    least = component.smallest_nbytes
    nbytes = least + idle + max(besides, default=memory.overhead_nbytes)
    return Need(nbytes, least, idle, bool(besides) and len(besides) == len(shapes))


def smallest_budget(moves: Moves, client: Client) -> tuple[int, Component | None, bool]:
    """The smallest budget for calls like the last one, the component that needs it, and whether it is known to be enough: all
    components that are expected in a call have been measured."""
    keys = dict.fromkeys((*client.order.expected, *client.entered))
    components = [client.components[k] for k in keys if k in client.components]
    needs = [(need_of(moves, client, c, client.inputs.get(c.key, ())), c) for c in components if c.units]
    if not needs:
        return 0, None, False
    most, component = max(needs, key=lambda n: n[0].nbytes)
    return most.nbytes, component, len(needs) == len(keys) and all(n.measured for n, _ in needs)


def _named(nbytes: int, enough: bool) -> str:
    return f"{'' if enough else 'at least '}{nbytes} bytes ({told(nbytes)})"


def refuse_below(moves: Moves, client: Client, component: Component, need: Need) -> None:
    """Refuse the client's budget if it is less than `component`, which is about to run, needs.

    Raises:
        BudgetError: with the smallest that the whole call works in.
    """
    budget = client.memory.budget
    if not isinstance(budget, int) or need.nbytes <= budget:
        return
    how = "even when they are streamed block by block" if component.streamable else "which cannot be streamed"
    if component.points and not component.whole and len(component.units) == 1:
        how = "all in one unit, which a smaller `unit_min` cuts into several"
    if component.whole:
        how += ": it is compiled as one graph. Compile its blocks instead (`compile_repeated_blocks()`)"
    if need.idle_nbytes:
        how += f"; {need.idle_nbytes} bytes are kept by units with stable addresses. {NO_ARENA}"
    smallest, most, enough = smallest_budget(moves, client)
    most_of_all = "" if most is None or most is component else f", for {most.name} with the inputs that it had last"
    raise BudgetError(
        f"budget={budget} bytes ({told(budget)}) is too small: with these inputs {component.name} needs "
        f"{need.nbytes} bytes ({told(need.nbytes)}), {need.weights_nbytes} of them for weights, {how}. The smallest budget for "
        f"the whole call is {_named(smallest, enough)}{most_of_all}. Give that much, or use smaller inputs, tiling or slicing."
    )


def excess_of(moves: Moves, client: Client) -> str:
    """What there is to say of a call that has ended, and took more than its budget while what it needs was being measured;
    empty: nothing."""
    budget, took = client.memory.budget, client.memory.took_nbytes
    if not isinstance(budget, int) or took <= budget or client.warned:
        return ""
    smallest, _, enough = smallest_budget(moves, client)
    then = "the next call like it is refused" if smallest > budget else "the next call like it stays within the budget"
    return (
        f"the first call with these inputs took {took} bytes ({told(took)}) of device memory, more than budget={budget} bytes "
        f"({told(budget)}): what it needs besides weights was not known before. The smallest budget for it is "
        f"{_named(smallest, enough)}; {then}."
    )
