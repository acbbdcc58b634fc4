"""What has to be where while a component runs: shares, plans, windows, and what happens when memory runs out."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable

import torch

from .addresses import NO_ARENA
from .clients import Call, Client
from .component import Component
from .config import MIB, Settings, told
from .device import OUT_OF_MEMORY
from .errors import BudgetError, OffloadWarning
from .holdings import Holdings
from .least import need_of, refuse_below
from .loading import SlabUnit
from .planner import EntryPlan, follow, lasting, plan_entry
from .residency import Await, Dropped, Entered, Instruction, Load, Needed, Prefetched, State
from .streaming import Stream
from .window import Share, begun, held_first, share_of


class Moves(Holdings):
    """Makes components ready. `Engine` says when."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        super().__init__(device, settings)
        self._calls: dict[int, list[weakref.ref[Call]]] = {}  # by thread, outermost first

    def _cap(self, component: Component, client: Client) -> int:
        """Device bytes for weights while `component` runs.

        Raises:
            BudgetError: it needs more at once than the budget has.
        """
        shape = client.shapes[component.key]
        need = need_of(self, client, component, (shape,))
        refuse_below(self, client, component, need)
        least = need.weights_nbytes
        cap = max(least, client.memory.cap(shape, component.nbytes, client.available, least) - need.idle_nbytes)
        return cap if client.ceiling is None else max(least, min(cap, client.ceiling))

    def _idle_beside(self, component: Component) -> int:
        """Device bytes that others take for good without being there."""
        return self.addresses.idle_of_others(u.key for u in component.units) if self.addresses is not None else 0

    def _place(self, component: Component, client: Client) -> None:
        """Where a component's units take memory for good, take it now.

        Raises:
            BudgetError: it is more than there may be.
        """
        addresses = self.addresses
        if addresses is None or not component.fixed:
            return
        units = [u for u in component.units if isinstance(u, SlabUnit) and u.addresses is addresses]
        missing = sum(u.nbytes for u in units if not addresses.placed(u))
        if not missing:
            return
        budget, shape = client.memory.budget, client.shapes[component.key]
        wanted = addresses.pool_nbytes + missing + (client.memory.set_aside(shape) if client.memory.knows(shape) else 0)
        try:
            if budget == "stock":
                raise torch.OutOfMemoryError("budget='stock' allows no more than the largest component")
            if isinstance(budget, int) and wanted > budget:
                raise torch.OutOfMemoryError(f"budget={budget} bytes ({told(budget)}) is less")
            self._drop([u for u in self.residency.held() if u not in self._protected(component)])
            for unit in units:
                addresses.place(unit)
        except OUT_OF_MEMORY as error:
            for unit in units:
                if unit.key not in self.transport.flights:
                    addresses.forget(unit)
            if client.settings.stable_addresses is None:
                warnings.warn(
                    f"{component.name} is compiled with CUDA graphs, which are recorded again whenever its weights come to lie "
                    f"elsewhere: they cannot keep their addresses, since {error}. {NO_ARENA}",
                    OffloadWarning,
                    stacklevel=2,
                )
                component.graphs = False
                self._address(component, client)
                return
            raise BudgetError(
                f"{component.name} is to keep its addresses, and all units that do take {wanted} bytes "
                f"({told(wanted)}) of device memory for good: {error}. {NO_ARENA}"
            ) from error

    def _give_back(self) -> None:
        """Whatever nothing holds is free for anyone."""
        if self.addresses is not None:
            self.addresses.give_back()
        self.lanes.empty_cache()

    def _within(self, cap: int, at_once: bool = True) -> None:
        """Memory that weights have left is given back as far as `cap` bytes for weights demand it, now or when they load."""
        addresses = self.addresses
        if addresses is not None:
            others = (self.units[u] for u in self.transport.flights)
            addresses.limit_nbytes = cap - sum(u.nbytes for u in others if not isinstance(u, SlabUnit) or u.addresses is None)
            if at_once:
                addresses.trim()

    def _share(self, component: Component, client: Client, room: int) -> Share | None:
        """What `component` may hold in `room` bytes; None: all of its units."""
        planned = client.shares.get(component.key)
        known = {u.key for u in component.units}
        if component.fixed:
            return None
        if planned is not None and planned.limit_nbytes <= room and component.must <= planned.keep <= known:
            if planned.script is None:
                return planned if len(planned.keep) < len(known) else None
            if client.settings.prefetch and set(planned.script.units) == known:
                return planned
        if component.nbytes <= room or not component.streamable:
            return None
        nbytes = component.unit_nbytes
        room = max(room, component.least_nbytes)
        once = component.least_nbytes - sum(nbytes[u] for u in component.must)
        return share_of(component.order, nbytes, component.unit_ms, room, 2 * once, component.must)

    @staticmethod
    def _held_first(component: Component, share: Share, entered: bool) -> tuple[str, ...]:
        return held_first(component.order, component.unit_nbytes, share, entered)

    def _client(self, component: Component) -> Client:
        call = self._call()
        return call.client if call is not None and component.key in call.client.components else component.client

    def _call(self) -> Call | None:
        """This thread's innermost pipeline call."""
        stack = self._calls.get(threading.get_ident())
        while stack:
            call = stack[-1]()
            if call is not None and not call.over:
                return call
            stack.pop()
        return None

    def available(self, client: Client) -> int:
        """Device bytes that weights and activations could take if nothing ran, and no more than a budget that is a number: held
        now, plus free, less the reserve if the budget is none, and less what the client spares."""
        budget, reserve = client.memory.budget, self.settings.reserve
        if isinstance(budget, int):
            reserve = 0
        elif reserve is None:
            total = self.lanes.total_nbytes()
            reserve = min(max(256 * MIB, total // 25), total // 10)
        idle = self.addresses.idle_nbytes if self.addresses is not None else 0
        room = self.residency.held_nbytes + idle + self.lanes.free_nbytes() - reserve
        if isinstance(budget, int):
            room = min(room, budget)
        return max(0, room - client.spared_nbytes)

    def _protected(self, component: Component | None) -> frozenset[str]:
        """Units that a running component reads, here or in another thread."""
        thread = threading.get_ident()
        alive = {t.ident for t in threading.enumerate()}
        for gone in [t for t in self.current if t not in alive]:
            del self.current[gone]
        others = {key for t, key in self.current.items() if t != thread}
        busy = [c for c in self.live() if c is not component and (c.running or c.key in others)]
        found = frozenset(u.key for c in busy for u in c.units)
        if self.addresses is not None:
            found |= self.addresses.kept().difference(u.key for u in (component.units if component is not None else ()))
        return found

    def _flying(self, units: Iterable[str]) -> int:
        """Device bytes of those of `units` that are there, or on their way."""
        return sum(self.units[u].nbytes for u in units if u in self.transport.flights)

    def _make_ready(self, component: Component, client: Client, cap: int) -> None:
        protected = self._protected(component)
        self._within(cap, at_once=False)
        begins = client.calling > 0 and client.entered == {component.key} and client.order.visits(component.key) == 1
        share, plan = self._plan(component, client, cap, protected, client.order.upcoming(), begins)
        try:
            self._carry_out(component, client, plan)
        except OUT_OF_MEMORY:
            self.recorder.count("ladder")
            client.memory.ran_out(client.shapes[component.key])
            self._drop_all_but(component, protected)
            # Less is there than was thought: no more than its window, and of what has come already, too.
            share = self._share(component, client, cap - self._flying(protected))
            plan = EntryPlan()
            if share is not None and component.streamable:
                first, held = self._held_first(component, share, entered=True), self.residency.held(component.key)
                plan = EntryPlan(tuple(u for u in held if u not in first), loads=tuple(u for u in first if u not in held))
            try:
                self._carry_out(component, client, plan)
            except OUT_OF_MEMORY as error:
                raise torch.OutOfMemoryError(f"{error}\n{self._why(component)}") from error
        self._within(cap)
        self._watch_over(component, client, share)

    def _plan(
        self,
        component: Component,
        client: Client,
        cap: int,
        protected: frozenset[str],
        upcoming: tuple[str, ...],
        begins: bool,
    ) -> tuple[Share | None, EntryPlan]:
        """What `component` may hold while it runs (`_share`), and the plan for entering it, whatever else comes ahead included.

        Args:
            cap: device bytes for weights while it runs.
            upcoming: the components expected after it.
            begins: a call begins with it.
        """
        share = self._share(component, client, cap - self._flying(protected))
        scripted = self._scripted(client, component, share, cap, protected)
        if scripted is not None:
            return share, scripted
        if begins and share is not None:
            own = self._flying(component.order)
            beside = self.residency.held_nbytes - own
            share = begun(share, component.order, component.unit_nbytes, component.must, own, beside, cap)
        heads = dict(client.heads)
        heads.pop(component.key, None)
        if share is not None:
            first = heads[component.key] = self._held_first(component, share, entered=True)
            cap -= share.limit_nbytes - sum(self.units[u].nbytes for u in first)  # its window will fill up
        prefetch = client.settings.prefetch and (share is None or share.ahead)
        plan = plan_entry(
            self.residency.view(), component.key, cap, upcoming, protected, prefetch, heads, lazily=component.streamable
        )
        return share, self._lasting(client, plan, cap, upcoming)

    def fill_idle(self, client: Client) -> None:
        """No call is in progress: what the component that the next one begins with would load, and what comes behind that,
        may come already."""
        begins, *others = client.order.upcoming() or ("",)
        component, shape = client.components.get(begins), client.shapes.get(begins)
        if component is None or not client.memory.knows(shape):
            return
        cap = client.memory.cap(shape, component.nbytes, self.available(client), component.smallest_nbytes)
        cap -= self._idle_beside(component)
        self._within(cap, at_once=False)
        if not client.settings.prefetch:
            return
        _, plan = self._plan(component, client, cap, self._protected(None), (*others, begins), begins=True)
        if plan.peak_nbytes <= cap:
            loads = tuple(u for u in self._loads(component, plan) if self.units[u].prefetchable)
            drops = self._unbind_readers(plan.drops)
            self._run_ahead(client, self.residency.handle(Prefetched(EntryPlan(drops, (*loads, *plan.prefetches)))))

    def _loads(self, component: Component, plan: EntryPlan) -> tuple[str, ...]:
        """The component's own units that entering it by `plan` loads."""
        if plan.loads is not None:
            return plan.loads
        return tuple(u for u in component.order if self.residency.state(u) is State.HOST)

    def _scripted(
        self, client: Client, component: Component, share: Share | None, cap: int, protected: frozenset[str]
    ) -> EntryPlan | None:
        """What a script says about entering `component`; None: there is none, or it does not fit, as when other pipelines hold
        memory."""
        if share is None or share.script is None:
            return None
        plan = self._following(client, share.script.first(), component, protected)
        nbytes = sum(self.units[u].nbytes for u in (*self._loads(component, plan), *plan.prefetches))
        nbytes -= sum(self.units[u].nbytes for u in plan.drops)
        return plan if self.residency.held_nbytes + nbytes <= cap else None

    def _following(
        self, client: Client, target: tuple[str, ...], component: Component | None, protected: frozenset[str]
    ) -> EntryPlan:
        """Leave `target` on the device of what is the client's."""
        mine = {u.key for c in client.components.values() for u in c.units} - protected
        target = tuple(u for u in target if u in self.units)  # weights may have changed since the script was found
        held = [u for u in self.residency.held() if u in mine or u in target]
        own = component.order if component is not None else None
        plan = follow(target, held, own, component is None or component.streamable)
        ahead = tuple(u for u in plan.prefetches if self.units[u].prefetchable)
        return dataclasses.replace(plan, prefetches=ahead)

    def follow(self, client: Client, component: Component, target: tuple[str, ...]) -> None:
        """`component` is about to read a unit, and a script says what is to be there then."""
        plan = self._following(client, target, None, self._protected(component) | component.must)
        if not plan.drops and not plan.prefetches:
            return
        own = [u for u in plan.drops if self.recorder.owner[u][0] == component.key]
        others = self._unbind_readers([u for u in plan.drops if u not in own])
        cap = self._cap(component, client)
        nbytes = sum(self.units[u].nbytes for u in plan.prefetches) - sum(self.units[u].nbytes for u in plan.drops)
        if self.residency.held_nbytes + nbytes > cap:  # other pipelines hold memory
            self.make_room(client, component, cap - nbytes)
            others = tuple(u for u in others if u in self.transport.flights)
        self._leave(component, own)
        plan = EntryPlan((*own, *others), plan.prefetches)
        self._run_ahead(client, self.residency.handle(Prefetched(plan)), streamed=True)

    def _lasting(self, client: Client, plan: EntryPlan, cap: int, upcoming: tuple[str, ...]) -> EntryPlan:
        """`plan` without what would have to leave again before it is used."""
        if not plan.prefetches:
            return plan
        nbytes = {key: unit.nbytes for key, unit in self.units.items()}
        owner = {key: name for key, (name, _) in self.recorder.owner.items()}
        rooms = functools.partial(self._room_beside, client)
        return lasting(plan, self.residency.held(), cap, nbytes, owner, upcoming, rooms)

    def _room_beside(self, client: Client, key: str) -> int:
        """Bytes that others may hold while the component `key` of `client` runs; no limit where it was not measured."""
        component, shape = client.components.get(key), client.shapes.get(key)
        if component is None or not client.memory.knows(shape):
            return sys.maxsize
        share = client.shares.get(key)
        own = component.nbytes if share is None or component.fixed else share.limit_nbytes
        cap = client.memory.cap(shape, component.nbytes, client.available or self.available(client), 0)
        return cap - self._idle_beside(component) - own

    def _drop_all_but(self, component: Component, protected: frozenset[str]) -> None:
        own = {u.key for u in component.units}
        self._drop([u for u in self.residency.held() if u not in own and u not in protected])
        self._give_back()

    def _watch_over(self, component: Component, client: Client, share: Share | None) -> None:
        """Await units one by one from here on, if any is missing; what the component reads itself is awaited now."""
        keeps = component.stream is not None and component.stream.keeps
        if component.stream is not None:
            component.stream.close()
            component.stream = None
        if not component.streamable:
            return
        if share is None and self.residency.is_ready(component.key):
            return
        if component.must:
            self.await_units(component, tuple(u for u in component.order if u in component.must))
        component.stream = Stream(self, client, component, share)
        component.stream.keeps = keeps
        component.stream.open()

    def _why(self, component: Component) -> str:
        return (
            f"prefetch_offload: {component.name} needs {component.nbytes / MIB:.1f} MiB for its weights. Everything else of "
            f"this device's pipelines has been dropped ({self.residency.held_nbytes / MIB:.1f} MiB are held), and "
            f"{self.lanes.free_nbytes() / MIB:.1f} MiB are free."
        )

    def _carry_out(self, component: Component, client: Client, plan: EntryPlan) -> None:
        own = [u for u in plan.drops if component.bound and self.recorder.owner[u][0] == component.key]
        self.stream_out(component, own)
        others = tuple(u for u in plan.drops if u not in own)
        plan = dataclasses.replace(plan, drops=self._unbind_readers(others))
        instructions = self.residency.handle(Entered(component.key, plan))
        ahead = set(plan.prefetches)
        needed = [i for i in instructions if not (isinstance(i, Load) and i.unit in ahead)]
        later = [i for i in instructions if isinstance(i, Load) and i.unit in ahead]
        missing = sum(isinstance(i, Load) for i in needed)
        wanted = len(component.units) if plan.loads is None else len(self.residency.held(component.key))
        self.recorder.met(component.key, wanted - missing, missing)
        with self.recorder.stall(component.key, component.name, self._waits(needed)):
            self._run(needed, later)
            for unit in component.units:
                if self.residency.state(unit.key) is State.READY:
                    self.transport.wait(unit)  # for a stream that has not waited for it yet
        self._run_ahead(client, later)

    def _run_ahead(self, client: Client, instructions: list[Instruction], streamed: bool = False) -> None:
        try:
            self._run(instructions, [], ahead=True, streamed=streamed)
        except OUT_OF_MEMORY:
            self.recorder.count("prefetch refused")
            client.ceiling = self.residency.held_nbytes  # asking again would be refused again

    def reorder(self, component: Component) -> None:
        """The order in which `component` uses its units was learned."""
        with self._held(), self._change:
            self._register(component)

    def _waits(self, instructions: list[Instruction]) -> bool:
        """Carrying them out makes compute wait for a copy: one that is still to be enqueued, or has not arrived."""
        flights = self.transport.flights
        for i in instructions:  # no generator: this is asked for every use of a streamed unit
            if isinstance(i, Await) and ((flight := flights.get(i.unit)) is None or not flight.ready.query()):
                return True
        return False

    def stream_out(self, component: Component, units: list[str]) -> None:
        """Units of a bound component leave the device; its modules go on showing what they show."""
        if units:
            self._leave(component, units)
            self._run(self.residency.handle(Dropped(tuple(units))), [])

    def _leave(self, component: Component, units: list[str]) -> None:
        if component.stream is not None:
            component.stream.guard(units)
        for unit in units:
            component.leave(self.units[unit])

    def exchange(self, client: Client, component: Component, drops: list[str], loads: list[str]) -> list[str]:
        """Units of a bound component leave, and others of it are copied in ahead of use. Returns those that the device had
        no room for."""
        state = self.residency.state
        loads = [u for u in loads if state(u) is State.HOST]
        self._leave(component, drops)
        plan = EntryPlan(tuple(drops), tuple(loads))
        self._run_ahead(client, self.residency.handle(Prefetched(plan)), streamed=True)
        return [u for u in loads if state(u) is State.HOST]

    def await_units(self, component: Component, units: tuple[str, ...]) -> None:
        """Units are about to be read: load what is missing, and let the caller's stream wait."""
        try:
            self._await(component, units)
        except OUT_OF_MEMORY:
            self.recorder.count("ladder")
            client = self._client(component)
            client.memory.ran_out(client.shapes[component.key])
            self._drop_all_but(component, self._protected(component) | frozenset(units))
            self._await(component, units)

    def settle(self, component: Component) -> None:
        """Await all units of `component` that are there or on their way; if that is all there are, nothing is left to do in
        its calls."""
        with self._held(), self._change:
            units = tuple(u for u in component.order if self.residency.state(u) is State.LOADING)
            if units:
                self._await(component, units)
            stream = component.stream
            if stream is not None and stream.window is None and self.residency.is_ready(component.key):
                stream.close()
                component.stream = None

    def _await(self, component: Component, units: tuple[str, ...]) -> None:
        instructions = self.residency.handle(Needed(units))
        with self.recorder.stall(component.key, component.name, self._waits(instructions)):
            self._run(instructions, [], streamed=True)

    def make_room(self, client: Client, component: Component, cap: int) -> None:
        """Drop units of others until no more than `cap` bytes are held. `component` is running."""
        protected = self._protected(component) | {u.key for u in component.units}
        plan = plan_entry(self.residency.view(), None, cap, client.order.upcoming(), protected, False, client.heads)
        self._drop(list(self._unbind_readers(plan.drops)))

    def prefetch_others(self, client: Client, component: Component, unread: frozenset[str]) -> None:
        """`component` needs no more of the link: what comes after it may have it, and the room of what it has read."""
        with self._held(), self._change:
            protected = self._protected(component) | unread | component.must
            cap = self._cap(component, client)
            plan = plan_entry(
                self.residency.view(),
                None,
                cap,
                client.order.upcoming(),
                protected,
                client.settings.prefetch,
                client.heads,
            )
            plan = self._lasting(client, plan, cap, client.order.upcoming())
            own = [u for u in plan.drops if self.recorder.owner[u][0] == component.key]
            others = tuple(u for u in plan.drops if u not in own)
            self.stream_out(component, own)
            plan = dataclasses.replace(plan, drops=self._unbind_readers(others))
            self._run_ahead(client, self.residency.handle(Prefetched(plan)))
            if component.stream is not None:
                component.stream.resync()  # its own units went; and its first ones may have come, for the next call
