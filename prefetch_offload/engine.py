"""One engine per device: enters components for every pipeline enabled on it, and decides what moves when."""

from __future__ import annotations

import dataclasses
import threading

import torch

from .calls import Memory
from .component import Component
from .config import MIB, Settings
from .device import OUT_OF_MEMORY
from .errors import OffloadError
from .holdings import Client, Holdings
from .planner import EntryPlan, plan_entry
from .residency import Entered, Instruction, Load, Prefetched
from .trace import Timeline


class _Segment:
    """The time from one component's entry to the next one's, while its activations are measured."""

    def __init__(self, memory: Memory, shape: object, weight_nbytes: int, held_nbytes: int) -> None:
        self.memory, self.shape = memory, shape
        self.weight_nbytes, self.held_nbytes = weight_nbytes, held_nbytes
        self.peak_nbytes = 0  # before another thread reset the statistic


class Engine(Holdings):
    """See the module. Every public method may be called from any thread."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        super().__init__(device, settings)
        self._calls: dict[int, list[Client]] = {}  # by thread
        self._segments: dict[int, _Segment] = {}
        self.baseline = 0
        self.high_water = 0

    def _recover(self) -> None:
        super()._recover()
        self._segments.clear()

    # ------------------------------------------------------------------- entry
    def is_current(self, component: Component) -> bool:
        """Nothing is to be done: the component was the last one entered here, and is shown on the device."""
        return (
            component.bound
            and component.shown
            and self.current.get(threading.get_ident()) == component.key
            and torch.accelerator.current_stream(self.device).stream_id == component.stream_id
        )

    def enter(self, component: Component, shape: object, previous: Component | None = None) -> None:
        """Make `component` ready to run on the caller's stream, and start what comes after it.

        Args:
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
        with self._changing():
            thread = threading.get_ident()
            client = self._client(component)
            self._end_segment(thread)
            first = component.key not in client.entered
            switched = self.current.get(thread) != component.key
            if component.bound and not component.running and not (component.untouched() if first else component.shown):
                self._unbind(component)  # moved or changed by hand since it was entered
            if not component.bound:
                self._refresh(component, transient=client.calling > 0)
            if previous is not None and previous is not component and previous.bound and client.order.visits(component.key) < 2:
                self._unbind(previous)  # not for ever: two networks that take turns in every step stay shown
            client.entered.add(component.key)
            if switched:
                self.recorder.left()
                client.order.enter(component.key)
            self.current[thread] = component.key
            shape = (component.key, shape)
            client.shapes[component.key] = shape
            if first or not client.available:
                client.available = self._available(client)
            cap = client.memory.cap(shape, component.nbytes, client.available)
            if client.ceiling is not None:
                cap = max(component.nbytes, min(cap, client.ceiling))
            self._make_ready(component, client, cap)
            if not component.bound:
                component.bind()
                component.by_hand = client.watched or not client.calling
            component.stream_id = self.lanes.compute().stream_id
            self._start_segment(thread, client, component, shape)
            self.recorder.entered(component.key, component.name, self.residency.held_nbytes)

    def _client(self, component: Component) -> Client:
        stack = self._calls.get(threading.get_ident())
        if stack and component.key in stack[-1].components:
            return stack[-1]
        return component.client

    def _available(self, client: Client) -> int:
        reserve = self.settings.reserve
        if reserve is None:
            total = self.lanes.total_nbytes()
            reserve = min(max(256 * MIB, total // 25), total // 10)
        return max(0, self.residency.held_nbytes + self.lanes.free_nbytes() - reserve)

    def _protected(self, component: Component | None) -> frozenset[str]:
        """Units that a running component reads, here or in another thread."""
        thread = threading.get_ident()
        alive = {t.ident for t in threading.enumerate()}
        for gone in [t for t in self.current if t not in alive]:
            del self.current[gone]
        others = {key for t, key in self.current.items() if t != thread}
        busy = [c for c in self.live() if c is not component and (c.running or c.key in others)]
        return frozenset(u.key for c in busy for u in c.units)

    def _make_ready(self, component: Component, client: Client, cap: int) -> None:
        protected = self._protected(component)
        upcoming = client.order.upcoming()
        plan = plan_entry(
            self.residency.view(), component.key, cap, upcoming, protected, client.settings.prefetch
        )
        try:
            self._carry_out(component, client, plan)
        except OUT_OF_MEMORY:
            self.recorder.count("ladder")
            client.memory.ran_out(client.shapes[component.key])
            own = {u.key for u in component.units}
            self._drop([u for u in self.residency.held() if u not in own and u not in protected])
            self.lanes.empty_cache()
            try:
                self._carry_out(component, client, EntryPlan())
            except OUT_OF_MEMORY as error:
                raise torch.OutOfMemoryError(f"{error}\n{self._why(component)}") from error

    def _why(self, component: Component) -> str:
        return (
            f"prefetch_offload: {component.name} needs {component.nbytes / MIB:.1f} MiB for its weights. Everything else of "
            f"this device's pipelines has been dropped ({self.residency.held_nbytes / MIB:.1f} MiB are held), and "
            f"{self.lanes.free_nbytes() / MIB:.1f} MiB are free."
        )

    def _carry_out(self, component: Component, client: Client, plan: EntryPlan) -> None:
        plan = dataclasses.replace(plan, drops=self._unbind_readers(plan.drops))
        instructions = self.residency.handle(Entered(component.key, plan))
        ahead = set(plan.prefetches)
        needed = [i for i in instructions if not (isinstance(i, Load) and i.unit in ahead)]
        later = [i for i in instructions if isinstance(i, Load) and i.unit in ahead]
        missing = sum(isinstance(i, Load) for i in needed)
        self.recorder.met(component.key, len(component.units) - missing, missing)
        with self.recorder.stall(component.key, component.name, needed):
            self._run(needed, later)
            for unit in component.units:
                self.transport.wait(unit)  # for a stream that has not waited for it yet
        self._run_ahead(client, later)

    def _run_ahead(self, client: Client, instructions: list[Instruction]) -> None:
        try:
            self._run(instructions, [], ahead=True)
        except OUT_OF_MEMORY:
            self.recorder.count("prefetch refused")
            client.ceiling = self.residency.held_nbytes  # asking again would be refused again

    # ------------------------------------------------------------ measurement
    def _start_segment(self, thread: int, client: Client, component: Component, shape: object) -> None:
        if not client.memory.knows(shape):
            peak = self.lanes.peak_nbytes()
            self.high_water = max(self.high_water, peak)
            for segment in self._segments.values():  # the statistic is the device's, not the thread's
                segment.peak_nbytes = max(segment.peak_nbytes, peak)
            self.lanes.reset_peak()
            self._segments[thread] = _Segment(client.memory, shape, component.nbytes, self.residency.held_nbytes)

    def _end_segment(self, thread: int, learn: bool = True) -> None:
        segment = self._segments.pop(thread, None)
        peak = self.lanes.peak_nbytes()
        self.high_water = max(self.high_water, peak)
        if segment is not None and learn:
            needs = max(0, max(peak, segment.peak_nbytes) - segment.held_nbytes - self.baseline)
            segment.memory.learn(segment.shape, needs, segment.weight_nbytes)

    def keep_memory(self, component: Component) -> None:
        """Gradients are being recorded: the graph holds on to the weights it has seen, wherever they go."""
        with self.lock:
            for unit in component.units:
                if unit.key in self.transport.flights:
                    self.transport.keep(unit)

    def out_of_memory(self, component: Component) -> None:
        """`component` ran out of memory while it ran: drop everything that is not running, and let it run alone."""
        with self._changing():
            client = self._client(component)
            self.recorder.count("ladder")
            client.memory.ran_out(client.shapes.get(component.key))
            running = self._protected(None) | {u.key for u in component.units}
            self._drop([u for u in self.residency.held() if u not in running])
            self._segments.pop(threading.get_ident(), None)
            self.lanes.empty_cache()

    # ------------------------------------------------------------------- calls
    def start_call(self, client: Client) -> None:
        """A pipeline call begins in this thread."""
        with self._changing():
            client.calling += 1
            self._calls.setdefault(threading.get_ident(), []).append(client)
            if client.calling == 1:
                client.order.start()
                client.entered.clear()
                client.available = 0
                self.recorder.call_started(f"call {client.calls + 1}")
                if not self.residency.held_nbytes or not client.memory.activations:
                    self.baseline = max(0, self.lanes.allocated_nbytes() - self.residency.held_nbytes)
                for component in client.components.values():
                    if not component.bound:
                        self._refresh(component, sampled=False)  # sampled when it is entered

    def leave_call(self, client: Client, failed: bool) -> None:
        """The pipeline call returned or raised."""
        with self._changing():
            stack = self._calls.get(threading.get_ident(), [])
            if client not in stack:
                return  # interrupted before it began
            stack.remove(client)
            if not stack:
                del self._calls[threading.get_ident()]
            client.calling -= 1
            if not client.calling:
                self.end_call(client, failed)

    def freed(self, client: Client) -> None:
        """diffusers asks for all components to be on the host. Within a call of ours, its end does the rest."""
        with self._changing():
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
        with self._changing():
            self._return(client, learn=not failed)
            if not client.entered:
                return
            client.entered.clear()
            client.available, client.ceiling = 0, None
            client.calls += 1
            self.recorder.call_ended(failed)
            if failed:
                client.order.start()
                return
            client.order.finish()
            client.memory.commit()
            self._fill_idle(client)

    def _fill_idle(self, client: Client) -> None:
        upcoming = client.order.upcoming()
        shape = client.shapes.get(upcoming[0]) if upcoming else None
        if shape is None or not client.memory.knows(shape):
            return
        component = client.components.get(upcoming[0])
        if component is None:
            return
        cap = client.memory.cap(shape, component.nbytes, self._available(client))
        plan = plan_entry(self.residency.view(), None, cap, upcoming, self._protected(None), client.settings.prefetch)
        plan = dataclasses.replace(plan, drops=self._unbind_readers(plan.drops))
        self._run_ahead(client, self.residency.handle(Prefetched(plan)))

    def show_masters(self, components: list[Component]) -> None:
        """These components show their host weights; device copies stay."""
        with self._changing():
            for component in components:
                if component.bound and not component.running:
                    self._unbind(component)

    def refresh(self, client: Client) -> None:
        """Look at every tensor of the client's components again."""
        with self._changing():
            for component in client.components.values():
                if not component.bound:
                    self._refresh(component)

    def timeline(self) -> Timeline:
        """Everything recorded, as spans. Waits for the device."""
        with self.lock:
            return self.recorder.timeline(self.lanes.simulated)

    def evict(self, components: list[Component]) -> None:
        """Show the masters of these components and give their device memory back."""
        with self._changing():
            for component in components:
                if component.running:
                    continue
                if component.bound:
                    self._unbind(component)
                self._drop([u.key for u in component.units if u.key in self.transport.flights])
                for thread in [t for t, current in self.current.items() if current == component.key]:
                    del self.current[thread]
