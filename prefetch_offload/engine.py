"""One engine per device: holds the units of every pipeline enabled on it, and carries out what the core decides."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .adoption import needs_native_move
from .calls import CallOrder, Memory
from .component import Component
from .config import MIB, Settings
from .device import OUT_OF_MEMORY, Lanes
from .host import Pins
from .errors import SettingError
from .masters import Unit, modules_of
from .native import NativeComponent
from .planner import EntryPlan, plan_entry
from .recorder import Recorder
from .residency import Await, Drop, Dropped, Entered, Instruction, Load, LoadFailed, Prefetched, Residency
from .trace import Timeline
from .transport import Transport


class Client:
    """What the engine knows of one pipeline.

    Attributes:
        components: the pipeline's, by key.
        order: the order in which its calls enter components.
        memory: its budget and what its components were measured to need.
        calls: how many calls have ended.
        calling: depth of pipeline calls in progress.
        entered: components entered in this call, by key.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.components: dict[str, Component] = {}
        self.order = CallOrder()
        self.memory = Memory(settings.budget)
        self.calls = 0
        self.calling = 0
        self.entered: set[str] = set()
        self.shapes: dict[str, object] = {}
        self.available = 0


class _Segment:
    """The time from one component's entry to the next one's, while its activations are measured."""

    def __init__(self, memory: Memory, shape: object, weight_nbytes: int, held_nbytes: int) -> None:
        self.memory, self.shape = memory, shape
        self.weight_nbytes, self.held_nbytes = weight_nbytes, held_nbytes


class Engine:
    """See the module. Every public method may be called from any thread."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self.clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self.lanes = Lanes(device, settings.verify)
        self.pins = Pins(device, settings.pinned_limit, settings.staging, settings.pin)
        self.transport = Transport(self.lanes, self.pins)
        self.residency = Residency()
        self.recorder = Recorder(self.lanes)
        self.lock = threading.RLock()
        self.components: dict[str, weakref.ref[Component]] = {}
        self._by_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Component]] = weakref.WeakKeyDictionary()
        self.units: dict[str, Unit] = {}
        self.current: dict[int, str] = {}  # by thread: the key of the component entered last
        self._calls: dict[int, list[Client]] = {}  # by thread
        self._segments: dict[int, _Segment] = {}
        self._dirty = False
        self._graveyard: list[str] = []
        self._depth = 0
        self.baseline = 0
        self.high_water = 0

    # ------------------------------------------------------------- consistency
    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock over a change. An interrupt inside it leaves a mark, and the next change repairs first."""
        with self.lock:
            outermost = not self._depth
            self._depth += 1
            try:
                if outermost:
                    if self._dirty:
                        self._recover()
                    self._dirty = True
                yield
                if outermost:
                    self._bury()
                    self._dirty = False
            except Exception:
                # An orderly failure: every step below either happened or did not.
                if outermost:
                    self._dirty = False
                raise
            finally:
                self._depth -= 1

    def _recover(self) -> None:
        """After an interrupt anywhere in the engine: wait for the device, show masters, hold nothing."""
        self.lanes.synchronize()
        for component in self.live():
            with contextlib.suppress(AssertionError):
                component.unbind()
        self.transport.reset(list(self.units.values()))
        residency = Residency()
        for unit in self.units.values():
            residency.add_unit(unit.key, unit.nbytes, unit.prefetchable)
        self.residency = residency
        for component in self.live():
            self._register(component)
        self.current.clear()
        self._segments.clear()

    # -------------------------------------------------------------- components
    def component(self, module: nn.Module, settings: Settings, name: str) -> Component:
        """The component of `module`, taken in as `name` if it is new."""
        with self._changing():
            ref = self._by_module.get(module)
            component = ref() if ref is not None else None
            if component is None:
                inside = set(map(id, modules_of(module)))
                for other in self.live():  # some pipelines hook a model and its parts: the largest serves them all
                    if module in modules_of(other.module):
                        return other
                parts = [c for c in self.live() if id(c.module) in inside]
                kind = NativeComponent if needs_native_move(module) else Component
                component = kind(module, name, self.device, settings, self.pins)
                for part in parts:
                    part.absorbed_by = component
                    self.remove(part)
                self.components[component.key] = weakref.ref(component)
                self._by_module[module] = weakref.ref(component)
                finalizer = weakref.finalize(component, _collected, weakref.ref(self), component.key)
                finalizer.atexit = False
            if not component.bound:
                self._refresh(component)
            return component

    def detach(self, component: Component) -> None:
        """`component` lost its hook: remove it, or, while hooks are being replaced, see later whether it got a new one."""
        orphans = getattr(_local, "orphans", None)
        if orphans is None:
            self.remove(component)
        else:
            orphans.append((self, component))

    def heir(self, component: Component, leaving: Client) -> Client | None:
        """Another pipeline's client that uses `component`, if there is one."""
        with self.lock:
            for client in list(self.clients):
                if client is not leaving and component.key in client.components:
                    return client
            return None

    def live(self) -> list[Component]:
        """Components taken in and not given up."""
        return [c for ref in self.components.values() if (c := ref()) is not None]

    def remove(self, component: Component) -> None:
        """Stop offloading: weights stay where they are shown now; device copies, pins and masters are given up."""
        with self._changing():
            if component.key not in self.components:
                return
            bound = component.bound
            if bound:
                component.release_twins()
            self._drop([u.key for u in component.units if u.key in self.transport.flights], keep_memory=bound)
            component.stop_casting()
            self._forget(component.key, [*component.units, *component.suspended_units])
            self._by_module.pop(component.module, None)

    def _forget(self, key: str, units: list[Unit]) -> None:
        self.residency.remove_component(key)
        for unit in units:
            self._forget_unit(unit)
        del self.components[key]
        self.recorder.totals.pop(key, None)
        for thread in [t for t, current in self.current.items() if current == key]:
            del self.current[thread]
        if not self.components:
            self.pins.release_ring()

    def _forget_unit(self, unit: Unit) -> None:
        self.residency.remove_unit(unit.key)
        del self.units[unit.key]
        self.recorder.owner.pop(unit.key, None)
        self.transport.retire(unit)

    def _bury(self) -> None:
        while self._graveyard:
            key = self._graveyard.pop()
            units = [u for name, u in self.units.items() if name.startswith(key + ".")]
            if key in self.components:
                self._drop([u.key for u in units if u.key in self.transport.flights])
                self._forget(key, units)

    def _refresh(self, component: Component, transient: bool = False) -> None:
        """Bring the component in line with what its modules show; drop device copies that are no longer true."""
        if not component.unchanged() or component.key not in self.residency.view().components:
            made, gone = component.adopt(transient)
            self._drop([u.key for u in gone if u.key in self.transport.flights])
            for unit in gone:
                if unit not in component.suspended_units:
                    self._forget_unit(unit)
            for unit in component.units:
                if unit.key not in self.units:
                    self.units[unit.key] = unit
                    self.residency.add_unit(unit.key, unit.nbytes, unit.prefetchable)
                    self.recorder.owner[unit.key] = (component.key, component.name)
            self._register(component)
        stale = component.written()
        if component.settings.fingerprints:
            stale += [u for u in component.units if u.key in self.transport.flights and u not in stale and u.stale()]
        self._drop([u.key for u in stale if u.key in self.transport.flights])

    def _register(self, component: Component) -> None:
        self.residency.set_component(component.key, [u.key for u in component.units])

    # ------------------------------------------------------------------- entry
    def is_current(self, component: Component) -> bool:
        """Nothing is to be done: the component was the last one entered here, and is shown on the device."""
        return (
            component.bound
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
        with self._changing():
            thread = threading.get_ident()
            client = self._client(component)
            self._end_segment(thread)
            first = component.key not in client.entered
            switched = self.current.get(thread) != component.key
            if not component.bound:
                self._refresh(component, transient=client.calling > 0)
            if first and previous is not None and previous is not component and previous.bound:
                self._unbind(previous)
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
            self._make_ready(component, client, cap)
            if not component.bound:
                component.bind()
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
            self._carry_out(component, plan)
        except OUT_OF_MEMORY:
            self.recorder.count("ladder")
            client.memory.ran_out(client.shapes[component.key])
            own = {u.key for u in component.units}
            self._drop([u for u in self.residency.held() if u not in own and u not in protected])
            self.lanes.empty_cache()
            try:
                self._carry_out(component, EntryPlan())
            except OUT_OF_MEMORY as error:
                raise torch.OutOfMemoryError(f"{error}\n{self._why(component)}") from error

    def _why(self, component: Component) -> str:
        return (
            f"prefetch_offload: {component.name} needs {component.nbytes / MIB:.1f} MiB for its weights. Everything else of this "
            f"device's pipelines has been dropped ({self.residency.held_nbytes / MIB:.1f} MiB are held), and "
            f"{self.lanes.free_nbytes() / MIB:.1f} MiB are free."
        )

    def _carry_out(self, component: Component, plan: EntryPlan) -> None:
        self._unbind_readers(plan.drops)
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
        try:
            self._run(later, [], ahead=True)
        except OUT_OF_MEMORY:
            self.recorder.count("prefetch refused")

    def _run(self, instructions: list[Instruction], after: list[Instruction], ahead: bool = False) -> None:
        """Carry out, in order. Out of memory: tell the core what did not happen, `after` included, and raise."""
        for i, instruction in enumerate(instructions):
            unit = self.units[instruction.unit]
            if isinstance(instruction, Load):
                try:
                    self.recorder.copied(self.transport.load(unit), ahead)
                except BaseException:
                    undone = (*instructions[i + 1 :], *after)
                    self.residency.handle(LoadFailed(instruction.unit, undone))
                    raise
            elif isinstance(instruction, Await):
                self.transport.wait(unit)
            else:
                self.transport.drop(unit)

    def _unbind_readers(self, units: tuple[str, ...] | list[str]) -> None:
        """Nobody shows a unit that is about to go."""
        going = set(units)
        for component in self.live():
            if component.bound and any(u.key in going for u in component.units):
                self._unbind(component)

    def _drop(self, units: list[str], keep_memory: bool = False) -> None:
        if not units:
            return
        self._unbind_readers(units)
        # unbinding may have dropped some of them
        units = [u for u in units if u in self.transport.flights]
        for instruction in self.residency.handle(Dropped(tuple(units))):
            assert isinstance(instruction, Drop)
            if keep_memory:
                self.transport.abandon(self.units[instruction.unit])
            else:
                self.transport.drop(self.units[instruction.unit])

    def _unbind(self, component: Component) -> None:
        for unit in component.units:
            if unit.key in self.transport.flights:
                self.transport.reads(unit)
        stale = component.unbind()
        self._drop([u.key for u in stale if u.key in self.transport.flights])

    # ------------------------------------------------------------ measurement
    def _start_segment(self, thread: int, client: Client, component: Component, shape: object) -> None:
        if not client.memory.knows(shape):
            self.high_water = max(self.high_water, self.lanes.peak_nbytes())
            self.lanes.reset_peak()
            self._segments[thread] = _Segment(client.memory, shape, component.nbytes, self.residency.held_nbytes)

    def _end_segment(self, thread: int, learn: bool = True) -> None:
        segment = self._segments.pop(thread, None)
        peak = self.lanes.peak_nbytes()
        self.high_water = max(self.high_water, peak)
        if segment is not None and learn:
            needs = max(0, peak - segment.held_nbytes - self.baseline)
            segment.memory.learn(segment.shape, needs, segment.weight_nbytes)

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
            self._calls.setdefault(threading.get_ident(), []).append(client)
            client.calling += 1
            if client.calling == 1:
                client.order.start()
                client.entered.clear()
                client.available = 0
                self.recorder.call_started(f"call {client.calls + 1}")
                if not self.residency.held_nbytes or not client.memory.activations:
                    self.baseline = max(0, self.lanes.allocated_nbytes() - self.residency.held_nbytes)
                for component in client.components.values():
                    if not component.bound:
                        self._refresh(component)

    def leave_call(self, client: Client, failed: bool) -> None:
        """The pipeline call returned or raised."""
        with self._changing():
            stack = self._calls[threading.get_ident()]
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
            if component.bound:
                self._unbind(component)
            component.returned()
            if component.transient_residency:
                self._drop([u.key for u in component.units if u.key in self.transport.flights])
            if component.suspended:
                self._refresh(component)

    def end_call(self, client: Client, failed: bool = False) -> None:
        """Show the masters, take over what changed on the device, and use the idle link for the next call."""
        with self._changing():
            self._return(client, learn=not failed)
            if not client.entered:
                return
            client.entered.clear()
            client.available = 0
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
        self._unbind_readers(plan.drops)
        try:
            self._run(self.residency.handle(Prefetched(plan)), [], ahead=True)
        except OUT_OF_MEMORY:
            self.recorder.count("prefetch refused")

    def show_masters(self, components: list[Component]) -> None:
        """These components show their host weights; device copies stay."""
        with self._changing():
            for component in components:
                if component.bound:
                    self._unbind(component)

    def refresh(self, client: Client) -> None:
        """Look at every tensor of the client's components again."""
        with self._changing():
            for component in client.components.values():
                self._refresh(component)

    def timeline(self) -> Timeline:
        """Everything recorded, as spans. Waits for the device."""
        with self.lock:
            return self.recorder.timeline(self.lanes.simulated)

    def evict(self, components: list[Component]) -> None:
        """Show the masters of these components and give their device memory back."""
        with self._changing():
            for component in components:
                if component.bound:
                    self._unbind(component)
                self._drop([u.key for u in component.units if u.key in self.transport.flights])
                for thread in [t for t, current in self.current.items() if current == component.key]:
                    del self.current[thread]


_engines: dict[torch.device, Engine] = {}
_local = threading.local()
# What concerns the device as a whole, and so all pipelines on it.
_SHARED = ("pin", "pinned_limit", "staging", "reserve", "verify")


def engine_for(device: torch.device, settings: Settings) -> Engine:
    """The engine of `device`, shared by all pipelines on it.

    Raises:
        SettingError: pipelines are enabled there with other settings that concern the device as a whole.
    """
    engine = _engines.get(device)
    if engine is not None:
        differing = [n for n in _SHARED if getattr(engine.settings, n) != getattr(settings, n)]
        if not differing:
            return engine
        if engine.live():
            name = differing[0]
            raise SettingError(
                f"{name}={getattr(settings, name)!r} concerns all of {device}, where a pipeline is enabled with "
                f"{name}={getattr(engine.settings, name)!r}: use the same, or disable that one first."
            )
    engine = _engines[device] = Engine(device, settings)
    return engine


@contextlib.contextmanager
def rehooking() -> Iterator[Callable[[], None]]:
    """While a pipeline's hooks are replaced: components that get a new hook keep their slabs and device copies.

    Yields a function that gives up those that did not; it is also called on leaving.
    """
    outer = getattr(_local, "orphans", None)
    orphans: list[tuple[Engine, Component]] = []
    _local.orphans = orphans if outer is None else outer

    def finish() -> None:
        while orphans:
            engine, component = orphans.pop()
            if not component.hooked:
                engine.remove(component)

    try:
        yield finish
    finally:
        _local.orphans = outer
        finish()


def _collected(engine_ref: weakref.ref[Engine], key: str) -> None:
    """A component was garbage collected, maybe in the middle of an engine step: bury it now or at that step's end."""
    engine = engine_ref()
    if engine is None:
        return
    engine._graveyard.append(key)
    if engine.lock.acquire(blocking=False):
        try:
            if not engine._depth:
                with engine._changing():
                    pass
        finally:
            engine.lock.release()
