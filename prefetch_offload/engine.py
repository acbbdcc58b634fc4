"""One engine per device: enters components for every pipeline enabled on it, and decides what moves when."""

from __future__ import annotations

import threading
import weakref

import torch

from .calls import Memory
from .clients import Call, Client
from .component import Component
from .config import Budget, Settings
from .errors import OffloadError
from .least import excess_of
from .moves import Moves
from .planner import plan_entry
from .planning import ASSUMED_GBPS, EARLY, replan, try_out
from .residency import State
from .simulator import Link
from .streaming import Stream
from .trace import Timeline

# Parts of the device that are left free, since free memory was in pieces: the first time, and at most. It doubles in between.
_SPARED, _MOST_SPARED = 32, 4
# In one call the host may wait so often for memory to be given back: that costs less than streaming what is left free.
_BORNE = 4


class _Segment:
    """The time from one component's entry to the next one's, while its activations are measured."""

    def __init__(self, memory: Memory, shape: object, component: Component, held_nbytes: int) -> None:
        self.memory, self.shape = memory, shape
        self.weight_nbytes, self.held_nbytes = component.nbytes, held_nbytes
        self.peak_nbytes = 0  # before another thread reset the statistic
        self.most_nbytes = 0  # in use at any time, weights and all
        self._found_nbytes = 0

    def needs(self, peak_nbytes: int, baseline_nbytes: int) -> int:
        """Device memory that was in use besides weights."""
        peak_nbytes = max(peak_nbytes, self.peak_nbytes)
        self.most_nbytes = max(self.most_nbytes, peak_nbytes)
        now = peak_nbytes - self.held_nbytes - baseline_nbytes
        self._found_nbytes = max(self._found_nbytes, now)
        return self._found_nbytes


class Engine(Moves):
    """See the module. Every public method may be called from any thread."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        super().__init__(device, settings)
        self._segments: dict[int, _Segment] = {}
        self.baseline = 0
        self.high_water = 0
        self.link = Link(ASSUMED_GBPS)
        self._retries = self._ladder = 0  # of the allocator's, and how often memory ran out, up to when a call began

    def _recover(self) -> None:
        super()._recover()
        self._segments.clear()

    # ------------------------------------------------------------------- entry
    def is_current(self, component: Component) -> bool:
        """Nothing is to be done: the component was the last one entered here, and is shown on the device."""
        return (
            not self._dirty  # interrupted: the next change repairs
            and component.bound
            and component.shown
            and self.current.get(threading.get_ident()) == component.key
            and self.lanes.compute().stream_id == component.stream_id
            and component.key in self._client(component).entered
        )

    def enter(
        self,
        component: Component,
        shape: object,
        previous: Component | None = None,
        called: bool = False,
        whole: bool = False,
    ) -> None:
        """Make `component` ready to run on the caller's stream, and start what comes after it.

        Args:
            called: its call follows, in which units can be awaited one by one. Otherwise those that are there, or on their
                way, can be read when this returns.
            whole: the call goes through compiled code that reads all of it.
            shape: stands for what the component is about to be given; same shape, same activation memory.
            previous: the component whose modules show their masters from now on (stock moves it to the host here).

        Raises:
            torch.OutOfMemoryError: the component does not fit even alone.
        """
        if self.lanes.capturing():
            raise OffloadError(
                f"{component.name} is entered while a CUDA graph is being captured, and its weights would have to be moved in "
                "the capture. Run it once right before capturing, on the same stream."
            )
        with self._held(), self._change:
            thread = threading.get_ident()
            client = self._client(component)
            self._end_segment(thread)
            first = component.key not in client.entered
            switched = self.current.get(thread) != component.key
            if component.bound and not component.running and not (component.untouched() if first else component.shown):
                self._unbind(component)  # moved or changed by hand since it was entered
            if not component.bound:
                self._refresh(component, transient=client.calling > 0)
            leaves = previous is not None and previous is not component and previous.bound and not previous.running
            if leaves and previous is not None and client.order.visits(component.key) < 2:
                self._unbind(previous)  # not for ever: two networks that take turns in every step stay shown
            if not client.calling and not client.entered:  # called by hand
                self._take_baseline(client)
            if component.compiled_since():
                self._register(component)
            self._address(component, client)
            component.whole = whole or id(component.module) in component.traced
            client.entered.add(component.key)
            if switched:
                self.recorder.left()
                client.order.enter(component.key)
            self.current[thread] = component.key
            self._count_besides(client)
            shape = (component.key, shape)
            client.shapes[component.key] = shape
            if first:
                client.inputs[component.key] = set()
            client.inputs[component.key].add(shape)
            if first or not client.available:
                client.available = self.available(client)
            self._place(component, client)
            self._make_ready(component, client, self._cap(component, client))
            if not component.bound:
                component.bind(lambda unit: self.residency.state(unit.key) is State.READY)
                component.by_hand = client.watched or not client.calling
            else:
                for unit in component.units:  # some may have gone, in what was broken off
                    if not unit.shown and self.residency.state(unit.key) is State.READY:
                        component.show(unit)
            component.stream_id = self.lanes.compute().stream_id
            if not called:
                self.settle(component)
            self._start_segment(thread, client, component, shape)
            self.recorder.entered(component.key, component.name, self.residency.held_nbytes)

    # --------------------------------------------------------------- streaming
    def pass_begins(self, component: Component) -> None:
        """`component`, which has been entered, is called."""
        client = self._client(component)
        order = client.order
        order.passed()
        self.recorder.passed()
        stream = component.stream
        if stream is None:
            return
        if self.lanes.capturing():
            raise OffloadError(
                f"{component.name} is called while a CUDA graph is being captured, and its weights are moved while it runs. "
                "Give it a budget in which it stays, or do not capture."
            )
        with self._held(), self._change:
            if stream.window is not None and stream.passes and component.by_hand:
                self.stream_out(component, [u for u in component.look_again() if u in self.transport.flights])
                stream.resync()
            if component.compiled_since():  # points have gone into compiled code
                stream.close()
                component.stream = None
                self._register(component)
                component.whole = id(component.module) in component.traced
                stream = self._make_ready_again(component, client)
            elif stream.spent:  # one more than was expected: there is no plan for it
                stream = self._make_ready_again(component, client)
            elif stream.window is None and self.residency.is_ready(component.key):
                stream.close()
                stream = component.stream = None
            if stream is not None:
                stream.keeps = torch.is_grad_enabled()
                stream.begin_pass(order.passes_left() == 0)

    def _make_ready_again(self, component: Component, client: Client) -> Stream | None:
        """Between two of its passes, in which its activations may be measured. Returns what awaits its units from now on."""
        weighing = self.weigh()
        self._make_ready(component, client, self._cap(component, client))
        if weighing:
            self.weighed()
        return component.stream

    def weigh(self) -> bool:
        """Units are about to move while this thread's component runs: what it took besides those that are there is learned.
        Returns whether to call `weighed` when they have."""
        segment = self._segments.get(threading.get_ident())
        if segment is None:
            return False
        with self.lock:  # other threads' segments come and go
            segment.needs(self._reset_peak(), self._besides_nbytes)
        return True

    @property
    def _besides_nbytes(self) -> int:
        """Device memory that is neither units nor anybody's activations."""
        return self.baseline + self.transport.staging.held_nbytes

    def weighed(self) -> None:
        """Units have moved: what they took on their way is nobody's activations."""
        segment = self._segments.get(threading.get_ident())
        if segment is not None:
            with self.lock:
                self._reset_peak()
                segment.most_nbytes = max(segment.most_nbytes, segment.peak_nbytes)
                segment.held_nbytes, segment.peak_nbytes = self.residency.held_nbytes, 0

    def _reset_peak(self) -> int:
        """The peak since it was last reset. The statistic is the device's, not the thread's."""
        peak = self.lanes.peak_nbytes()
        self.high_water = max(self.high_water, self.lanes.peak_taken_nbytes())
        for segment in self._segments.values():
            segment.peak_nbytes = max(segment.peak_nbytes, peak)
        self.lanes.reset_peak()
        return peak

    def _count_besides(self, client: Client) -> None:
        """What is taken on the device besides units and what activations were measured to."""
        client.memory.overhead_nbytes = self.transport.staging.overhead_nbytes
        client.memory.spare_nbytes = self.lanes.spare_nbytes

    def discard_measurement(self) -> None:
        """What this thread runs needs more than it was given: it says nothing about its activations."""
        self._segments.pop(threading.get_ident(), None)

    def rebudget(self, client: Client, budget: Budget) -> None:
        """The client has another budget from its next call on; what the new one has no room for goes now."""
        with self._held(), self._change:
            client.memory.budget = budget
            client.memory.alone.clear()
            client.memory.tight.clear()
            client.spared_nbytes = 0
            client.former, client.aside = client.plan or client.former, "the budget was set again"
            client.plan, client.shares, client.heads = None, {}, {}
            client.warned = False
            if isinstance(budget, int):
                view, protected = self.residency.view(), self._protected(None)
                plan = plan_entry(view, None, budget // 2, client.order.upcoming(), protected, False)
                self._drop(list(self._unbind_readers(plan.drops)))

    def adopt_plan(self, client: Client) -> None:
        """The client has a plan, or none any more: components that do not fit follow it from their next entry."""
        client.shares = dict(client.plan.shares) if client.plan is not None else {}
        client.heads = {}
        for key, share in client.shares.items():
            component = client.components[key]
            if len(share.keep) < len(component.units):
                client.heads[key] = self._held_first(component, share, entered=False)

    # ------------------------------------------------------------ measurement
    def _take_baseline(self, client: Client) -> None:
        """What else is on the device before anything of the client's has run is none of its doing."""
        if not self.residency.held_nbytes or not client.memory.activations:
            ours = self.residency.held_nbytes + self.transport.staging.held_nbytes
            self.baseline = max(0, self.lanes.allocated_nbytes() - ours)

    def _start_segment(self, thread: int, client: Client, component: Component, shape: object) -> None:
        known = client.memory.knows(shape)
        if not known or self.lanes.unseen_nbytes:
            self._reset_peak()
        if not known:
            self._segments[thread] = _Segment(client.memory, shape, component, self.residency.held_nbytes)

    def _end_segment(self, thread: int, learn: bool = True) -> None:
        segment = self._segments.pop(thread, None)
        peak = self.lanes.peak_nbytes()
        self.high_water = max(self.high_water, self.lanes.peak_taken_nbytes())
        if self.lanes.unseen_nbytes:  # what the allocator does not count has its peak at another time
            self._reset_peak()
        if segment is not None and learn:
            needs = segment.needs(peak, self._besides_nbytes)
            segment.memory.learn(segment.shape, needs, segment.weight_nbytes)
            if not self.lanes.unseen_nbytes:  # else the peak is only known not to have been higher
                segment.memory.took_nbytes = max(segment.memory.took_nbytes, segment.most_nbytes - self.baseline)

    def keep_memory(self, component: Component) -> None:
        """Gradients are being recorded: the graph holds on to the weights it has seen, wherever they go."""
        with self.lock:
            for unit in component.units:
                if unit.key in self.transport.flights:
                    self.transport.keep(unit)

    def out_of_memory(self, component: Component, again: bool = False) -> None:
        """`component` ran out of memory while it ran: drop all that is not running; next, it is streamed.

        Args:
            again: it did before, in the same call of it. There may be enough, but in pieces between its own units: they go as
                well, and those that it cannot do without come back.
        """
        with self._held(), self._change:
            client, thread = self._client(component), threading.get_ident()
            self.current.pop(thread, None)  # refused from here on, it is entered anew
            shape = client.shapes.get(component.key)
            self.recorder.count("ladder")
            running = self._protected(None) | {u.key for u in component.units}
            others = [u for u in self.residency.held() if u not in running]
            client.memory.ran_out(shape)
            if again or not others:
                client.memory.ran_out(shape)  # it was alone
            self._drop(others)
            if again and component.streamable and not component.fixed:
                self.stream_out(component, [u for u in component.order if u in self.transport.flights])
            self._segments.pop(threading.get_ident(), None)
            self._give_back()
            if component.streamable and shape in client.memory.tight:
                self._make_ready(component, client, self._cap(component, client))
                if component.stream is not None:
                    component.stream.begin_pass(client.order.passes_left() == 0)
            elif component.stream is not None:
                component.stream.begin_again()
            self.current[thread] = component.key

    # ------------------------------------------------------------------- calls
    def start_call(self, call: Call, steps: int | None = None) -> None:
        """A pipeline call begins in this thread, of so many denoising steps if that is known."""
        client = call.client
        with self._held(), self._change:
            client.in_progress.add(call)
            self._calls.setdefault(threading.get_ident(), []).append(weakref.ref(call))
            if client.calling == 1:
                client.order.start(steps)
                client.entered.clear()
                client.available = client.memory.took_nbytes = 0
                self._sampled.clear()
                self._retries, self._ladder = self.lanes.retries(), self.recorder.counts["ladder"]
                for component in try_out(self, client) if client.calls <= EARLY else ():
                    if not component.bound:
                        self._refresh(component, sampled=False)
                self._count_besides(client)
                replan(self, client)
                self.recorder.call_started(f"call {client.calls + 1}", client.number, client.components)
                self._take_baseline(client)
                for component in client.components.values():
                    if not component.bound:
                        self._refresh(component, sampled=False)  # sampled when it is entered

    def leave_call(self, call: Call, failed: bool) -> None:
        """The pipeline call returned or raised."""
        thread = threading.get_ident()
        for component in list(call.client.components.values()):
            component.end(thread)  # an interrupt may have come right before or behind its own end
        with self._held(), self._change:
            call.over = True
            if self._call() is None:
                self._calls.pop(thread, None)
            if call in call.client.in_progress and not call.client.calling:
                self.end_call(call.client, failed)

    def freed(self, client: Client) -> None:
        """diffusers asks for all components to be on the host. Within a call of ours, its end does the rest."""
        with self._held(), self._change:
            self._return(client)
            if not client.calling:
                self.end_call(client)

    def _return(self, client: Client, learn: bool = True) -> None:
        thread = threading.get_ident()
        self._end_segment(thread, learn)
        self.current.pop(thread, None)
        for component in client.components.values():
            if component.running:
                continue  # in another thread
            if component.bound:
                self._unbind(component)  # which brings back whatever else was on the device
            else:
                component.returned()
            if component.transient_residency:
                self._drop([u.key for u in component.units if u.key in self.transport.flights])
            if component.suspended or component.outdated:
                self._refresh(component)

    def end_call(self, client: Client, failed: bool = False) -> None:
        """Show the masters, take over what changed on the device, and use the idle link for the next call."""
        with self._held(), self._change:
            self._return(client, learn=not failed)
            if not client.entered:
                return
            client.entered.clear()
            client.available, client.ceiling = 0, None
            client.calls += 1
            client.last_call = self.recorder.call_ended(client.number, client.components, failed, client.last_call)
            retries = self.lanes.retries() - self._retries
            self._retries += retries
            if retries > 0:
                self.recorder.count("cache given back", retries)
            if failed:
                client.order.start()
                return
            short = retries > (_BORNE if self.recorder.counts["ladder"] == self._ladder else 0)
            more = short and self._spare(client)
            client.followed, client.followed_because = client.plan, client.planned_because
            client.order.finish()
            client.memory.commit()
            if more:
                client.memory.forgive()
            client.excess, client.memory.took_nbytes = excess_of(self, client), 0
            self.fill_idle(client)

    def _spare(self, client: Client) -> bool:
        """A call that went by a plan met free memory in pieces too small for it: plans leave more of what is free. False: they
        do already, as much as they may, or there was none."""
        if client.plan is None:
            return False
        before, total = client.spared_nbytes, self.lanes.total_nbytes()
        client.spared_nbytes = min(max(2 * before, total // _SPARED), total // _MOST_SPARED)
        return client.spared_nbytes > before

    def show_masters(self, components: list[Component]) -> None:
        """These components show their host weights; device copies stay."""
        with self._held(), self._change:
            for component in components:
                if component.bound and not component.running:
                    self._unbind(component)

    def refresh(self, client: Client) -> None:
        """Look at every tensor of the client's components again."""
        with self._held(), self._change:
            for component in client.components.values():
                if not component.bound:
                    for unit in component.units:
                        unit.changed()  # whatever a fingerprint says
                    self._refresh(component)

    def timeline(self) -> Timeline:
        """Everything recorded, as spans. Waits for the device."""
        with self.lock:
            return self.recorder.timeline(self.lanes.simulated)

    def evict(self, components: list[Component]) -> None:
        """Show the masters of these components and give their device memory back."""
        with self._held(), self._change:
            for component in components:
                if component.running:
                    continue
                if component.bound:
                    self._unbind(component)
                self._drop([u.key for u in component.units if u.key in self.transport.flights])
                for thread in [t for t, current in self.current.items() if current == component.key]:
                    del self.current[thread]
            if not self.residency.held():
                self.transport.staging.release()
            if self.addresses is not None:
                self.addresses.give_back()
