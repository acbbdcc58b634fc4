"""What an engine knows of each pipeline, and of the calls in progress."""

from __future__ import annotations

import itertools
import weakref

from .calls import CallOrder, Memory
from .component import Component
from .config import Settings
from .recorder import Call as RecordedCall
from .strategy import CallPlan
from .window import Share

_clients = itertools.count()


class Call:
    """A pipeline call in progress. Whoever makes it holds it, so that one that was interrupted anywhere ends all the same.

    Attributes:
        client: the pipeline.
        over: it has ended.
    """

    def __init__(self, client: Client) -> None:
        self.client, self.over = client, False


class Client:
    """What the engine knows of one pipeline.

    Attributes:
        components: the pipeline's, by key.
        order: the order in which its calls enter components.
        memory: its budget and what its components were measured to need.
        calls: how many calls have ended.
        number: tells clients apart in a trace.
        in_progress: pipeline calls that have begun.
        watched: the call was given a callback, which may write to weights.
        entered: components entered in this call, by key.
        shapes: the last shape of each component, by key.
        inputs: all shapes that each had in the last call that entered it, by key.
        available: device bytes that weights could take in this call if nothing ran.
        ceiling: no more than this, since the device refused more in this call; None: it did not.
        shares: by component key, what components that do not fit may hold.
        heads: by component key, the units that those begin with.
        plan: what the shares come from; None before a call has been measured.
        planned_because: why it was made, or made anew.
        last_call: what was recorded of the last complete call.
        followed, followed_because: the plan that it ran by, and why that was made; None: it had none.
        former: the plan before, while there is none: it was put aside, since `aside`.
        excess: to be told: a call took more than the budget while it was measured.
        warned: it has been, for this budget.
        spared_nbytes: plans leave so much of what is free, since that was in pieces too small.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.components: dict[str, Component] = {}
        self.order = CallOrder()
        self.memory = Memory(settings.budget)
        self.calls = 0
        self.in_progress: weakref.WeakSet[Call] = weakref.WeakSet()
        self.watched = False
        self.entered: set[str] = set()
        self.shapes: dict[str, object] = {}
        self.inputs: dict[str, set[object]] = {}
        self.available = 0
        self.ceiling: int | None = None
        self.shares: dict[str, Share] = {}
        self.heads: dict[str, tuple[str, ...]] = {}
        self.plan: CallPlan | None = None
        self.planned_because = ""
        self.last_call: RecordedCall | None = None
        self.followed: CallPlan | None = None
        self.followed_because = ""
        self.former: CallPlan | None = None
        self.aside = ""
        self.excess, self.warned = "", False
        self.spared_nbytes = 0
        self.number = next(_clients)

    @property
    def calling(self) -> int:
        """Pipeline calls in progress, one within another or in several threads."""
        return sum(not call.over for call in self.in_progress)
