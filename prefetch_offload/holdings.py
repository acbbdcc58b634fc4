"""What is taken in, and what of it is on the device: components, their units, and the steps that keep both true."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import nn

from .addresses import Addresses, addresses_for
from .adoption import give_up, needs_native_move
from .clients import Client
from .component import Component, agreed
from .config import Settings
from .device import OUT_OF_MEMORY, Lanes
from .errors import OffloadError, OffloadWarning
from .host import Pins
from .loading import SlabUnit, Unit
from .masters import modules_of
from .native import NativeComponent
from .planner import EntryPlan
from .recorder import Recorder
from .residency import Await, Drop, Dropped, Instruction, Load, LoadFailed, Needed, Prefetched, Residency, State
from .transport import Transport

# Every step either happened or did not. After any other exception the next change repairs first.
_ORDERLY = (*OUT_OF_MEMORY, OffloadError)

_local = threading.local()


class _Change:
    """See `Holdings._held`. Entered for every use of a streamed unit: a generator would cost three times as much."""

    def __init__(self, holdings: Holdings) -> None:
        self._of = weakref.ref(holdings)

    def __enter__(self) -> None:
        of = self._of()
        assert of is not None
        if of._part._is_owned():
            return
        if of._dirty:
            of._recover()
        of._dirty = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        of = self._of()
        assert of is not None
        if of._part._is_owned():
            return
        if kind is None:
            of._bury()
            of._dirty = False
        elif issubclass(kind, _ORDERLY):
            of._dirty = False


class Holdings:
    """The components and units of one device. `Engine` decides what moves when."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device, self.settings = device, settings
        self.clients: weakref.WeakSet[Client] = weakref.WeakSet()
        self.lanes = Lanes(device, settings.verify)
        self.pins = Pins(device, settings.pinned_limit, settings.staging, settings.pin)
        self.transport = Transport(self.lanes, self.pins)
        self.residency = Residency()
        self.recorder = Recorder(self.lanes)
        self.lock = threading.RLock()
        self._part = threading.RLock()  # see `_held`; only who has `lock` takes it
        self.addresses: Addresses | None = None  # where some component's units keep theirs
        self.components: dict[str, weakref.ref[Component]] = {}
        self._by_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Component]] = weakref.WeakKeyDictionary()
        self.units: dict[str, Unit] = {}
        self.current: dict[int, str] = {}  # by thread: the key of the component entered last
        self._dirty = False
        self._graveyard: list[str] = []
        self._sampled: set[str] = set()  # units whose bytes were sampled since a call began
        self._change = _Change(self)

    # ------------------------------------------------------------- consistency
    def _held(self) -> contextlib.AbstractContextManager[bool]:
        """The lock to hold over a change: ``with self._held(), self._change``. An interrupt inside it leaves a mark, and the
        next change repairs first.

        An interrupt between any two steps of `_Change` leaves the lock free: the interpreter takes and gives a lock of its
        own in one step with entering and leaving the block. And nothing has to be counted that could then be wrong: within a
        change a second lock is held for each that is part of it, and locks know whether they are.
        """
        return self._part if self.lock._is_owned() else self.lock  # as threading.Condition asks

    def _recover(self) -> None:
        """After an interrupt anywhere in the engine: wait for the device, show masters, hold nothing.

        What runs in another thread right now is left as it is: it was ready before, and no step takes it away.
        """
        self.lanes.synchronize()
        running = [c for c in self.live() if c.running and c.bound]
        kept = [u.key for c in running for u in c.units if u.key in self.transport.flights]
        for component in self.live():
            if component not in running:
                if component.stream is not None:
                    component.stream.close()
                    component.stream = None
                component.unbind()
        self.transport.reset([u for u in self.units.values() if u.key not in kept])
        self._recount()
        self.residency.handle(Prefetched(EntryPlan((), tuple(kept))))  # carried out before, and so was this:
        self.residency.handle(Needed(tuple(u for u in kept if self.transport.flights[u].readers)))
        for component in running:
            if component.stream is not None:
                component.stream.resync()
        names = {c.key for c in running}
        self.current = {t: key for t, key in self.current.items() if key in names}

    def _recount(self) -> None:
        """Know the units that live components have, and no others. Nobody holds any besides those in the transport."""
        for key in [key for key, ref in self.components.items() if ref() is None]:
            del self.components[key]
        live = self.live()
        theirs = {u.key for c in live for u in (*c.units, *c.suspended_units)}
        self.residency = Residency()
        for unit in [u for u in self.units.values() if u.key not in theirs]:
            self._forget_unit(unit)
        for unit in self.units.values():
            self.residency.add_unit(unit.key, unit.nbytes, unit.prefetchable)
        for component in live:
            if component.outdated:
                component._chart()  # its units may have become others since
            self._enrol(component)

    # -------------------------------------------------------------- components
    def component(self, module: nn.Module, settings: Settings, name: str, others: Sequence[Settings] = ()) -> Component:
        """The component of `module`, taken in as `name` if it is new.

        Args:
            others: settings of the other pipelines that share it.
        """
        with self._held(), self._change:
            ref = self._by_module.get(module)
            component = ref() if ref is not None else None
            if component is None:
                inside = set(map(id, modules_of(module)))
                for other in self.live():  # some pipelines hook a model and its parts: the largest serves them all
                    if module in modules_of(other.module):
                        return other
                parts = [c for c in self.live() if id(c.module) in inside]
                kind = NativeComponent if needs_native_move(module) else Component
                component = kind(module, name, self.device, agreed(name, settings, others), self.pins)
                for part in parts:
                    part.absorbed_by = component
                    self.remove(part)
                try:
                    self._refresh(component)
                except BaseException:  # no memory for its slabs, or an interrupt: as if it had never come
                    self._forget(component.key)
                    raise
                self.components[component.key] = weakref.ref(component)
                self._by_module[module] = weakref.ref(component)
                finalizer = weakref.finalize(component, _collected, weakref.ref(self), component.key)
                finalizer.atexit = False
            else:
                self.travel(component, settings, others)
            return component

    def travel(self, component: Component, settings: Settings, others: Sequence[Settings] = ()) -> None:
        """A pipeline that has `component` is enabled, or disabled, with it: let it travel as those that have it now agree.

        Args:
            settings: of the one that it serves.
            others: of the others.
        """
        with self._held(), self._change:
            if component.key not in self.components:
                return
            changed = component.travel(agreed(component.name, settings, others, component.settings))
            if component.running:
                return  # once it has been shown its masters again
            if component.bound and changed:
                self._unbind(component)
            if not component.bound:
                self._refresh(component)

    def detach(self, component: Component) -> None:
        """`component` lost its hook: remove it, or, while hooks are being replaced, see later whether it got a new one."""
        orphans = getattr(_local, "orphans", None)
        if orphans is None:
            self.remove(component)
        else:
            with self._held(), self._change:
                if component.bound and not component.running:  # moved to the host as it is shown now, it would be a change
                    self._unbind(component)
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
        """Stop offloading: weights stay where they are shown now, what a lossy way rounded as the masters have it; device
        copies, pins and masters are given up."""
        with self._held(), self._change:
            if component.key not in self.components:
                return
            component.renew()  # an interrupt may leave it without some of what its units have
            self._by_module.pop(component.module, None)
            if component.stream is not None:
                self._unbind(component)  # some of it is not on the device, where the rest would stay
            bound = component.bound
            for unit in component.rounded:
                self.transport.read_back(unit)
                component.make_exact(unit)
                self.lanes.note("write", self.lanes.compute(), unit.key)
            if bound:
                component.release_twins()
            self._drop([u.key for u in component.units if u.key in self.transport.flights], keep_memory=bound)
            component.stop_casting()
            self._forget(component.key)

    def _forget(self, key: str) -> None:
        for unit in self._units_of(key):
            self._forget_unit(unit)
        self.residency.remove_component(key)
        self.components.pop(key, None)
        self.recorder.totals.pop(key, None)
        for thread in [t for t, current in self.current.items() if current == key]:
            del self.current[thread]
        if not self.components:
            self.pins.start_over()

    def _units_of(self, key: str) -> list[Unit]:
        """All units of a component, those suspended for the rest of a call included."""
        return [unit for name, unit in self.units.items() if name.startswith(key + ".")]

    def _forget_unit(self, unit: Unit) -> None:
        """Known in `units` until nothing else of it is left: what was interrupted can be done again."""
        if self.residency.knows_unit(unit.key):
            self.residency.remove_unit(unit.key)
        self.recorder.owner.pop(unit.key, None)
        self.transport.retire(unit)
        del self.units[unit.key]

    def _enrol(self, component: Component) -> None:
        """Make a component's new units known, in `units` last."""
        for unit in component.units:
            if unit.key not in self.units:
                if component.stable and isinstance(unit, SlabUnit):
                    unit.settle_at(self.addresses)
                self.residency.add_unit(unit.key, unit.nbytes, unit.prefetchable)
                self.recorder.owner[unit.key] = (component.key, component.name)
                self.transport.admit(unit)
                self.units[unit.key] = unit
        self._register(component)

    def _bury(self) -> None:
        while self._graveyard:
            key = self._graveyard.pop()
            if key in self.components:
                self._drop([u.key for u in self._units_of(key) if u.key in self.transport.flights])
                for unit in self._units_of(key):
                    unit.outlived()
                self._forget(key)

    def _refresh(self, component: Component, transient: bool = False, sampled: bool = True) -> None:
        """Bring the component in line with what its modules show; drop device copies that are no longer true.

        Args:
            transient: see `Component.adopt`.
            sampled: compare fingerprints, too.
        """
        if not self.residency.knows(component.key) or not component.unchanged():
            if component.recoding:
                self._give_up(component)
            _, gone = component.adopt(transient)
            self._drop([u.key for u in gone if u.key in self.transport.flights])
            for unit in gone:
                if unit not in component.suspended_units:
                    self._forget_unit(unit)
            for unit in component.units:
                if unit.key not in self.units and isinstance(unit, SlabUnit):
                    unit.pin(self.pins)  # refused, maybe, while what has just gone was pinned
            self._enrol(component)
        stale = component.written()
        if sampled and component.settings.fingerprints:
            stale += [u for u in component.units if u.key in self.transport.flights and u not in stale and u.stale()]
        self._drop([u.key for u in stale if u.key in self.transport.flights])

    def _give_up(self, component: Component) -> None:
        """Before all its units are made anew: the host never holds two copies of it, nor are two pinned."""
        for unit in self._units_of(component.key):
            if unit.key in self.transport.flights:
                self._drop([unit.key])
            self.transport.finish_copies(unit)
            give_up(unit)

    def _register(self, component: Component) -> None:
        self.residency.set_component(component.key, component.order)

    def _address(self, component: Component, client: Client) -> None:
        """Let the component's units have addresses for life, or none any more, as the client wants it."""
        wanted = client.settings.stable_addresses
        stable = component.graphs if wanted is None else wanted
        if stable is component.stable or component.running:
            return
        if stable and self.addresses is None:
            self.addresses = addresses_for(self.lanes)
        if component.bound:
            self._unbind(component)
        units = [u for u in self._units_of(component.key) if isinstance(u, SlabUnit)]
        if not units:
            component.stable = stable
            return
        self._drop([u.key for u in units if u.key in self.transport.flights])
        component.stable = stable
        component.fixed = stable and self.addresses is not None and self.addresses.permanent
        for unit in units:
            unit.settle_at(self.addresses if stable else None)
            self.residency.remove_unit(unit.key)
            self.residency.add_unit(unit.key, unit.nbytes, unit.prefetchable)
        component._chart()
        self._register(component)
        carried = [m.name for u in component.units if not isinstance(u, SlabUnit) for m in u.masters if m.tensor.numel()]
        if carried and wanted:
            warnings.warn(
                f"{component.name}.{carried[0]}{f' (and {len(carried) - 1} more)' if len(carried) > 1 else ''} is moved by its "
                "own .to(), and gets another address each time: a CUDA graph that reads it is recorded again.",
                OffloadWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------- moves
    def _run(
        self, instructions: list[Instruction], after: list[Instruction], ahead: bool = False, streamed: bool = False
    ) -> None:
        """Carry out, in order. Out of memory: tell the core what did not happen, `after` included, and raise.

        Args:
            ahead: nothing of it is needed now.
            streamed: the units were on the device in this call before; what was sampled then still stands.
        """
        for i, instruction in enumerate(instructions):
            unit = self.units[instruction.unit]
            if isinstance(instruction, Load):
                try:
                    component = self._component_of(unit)
                    sample = not streamed or unit.key not in self._sampled
                    if unit.travels_encoded and component is not None and component.by_hand:
                        sample = True  # a raw unit's copy reads what was written since; what was encoded before does not
                    self._sampled.add(unit.key)
                    flight = self.transport.load(unit, sample)
                    if component is not None and component.stream is not None and component.stream.keeps:
                        self.transport.keep(unit)
                    self.recorder.copied(flight, ahead, self.residency.held_nbytes)
                except BaseException:
                    undone = (*instructions[i + 1 :], *after)
                    self.residency.handle(LoadFailed(instruction.unit, undone))
                    raise
            elif isinstance(instruction, Await):
                self.transport.wait(unit)
                component = self._component_of(unit)
                if component is not None and component.bound:
                    component.show(unit)
            else:
                self.transport.drop(unit)

    def _component_of(self, unit: Unit) -> Component | None:
        ref = self.components.get(self.recorder.owner[unit.key][0])
        return ref() if ref is not None else None

    def _unbind_readers(self, units: tuple[str, ...] | list[str]) -> tuple[str, ...]:
        """Nobody shows a unit that is about to go. Returns those still there: taking a change over drops units, too."""
        going = set(units)
        for component in self.live():
            if component.bound and any(u.key in going for u in component.units):
                self._unbind(component)
        return tuple(u for u in units if u in self.transport.flights)

    def _drop(self, units: list[str], keep_memory: bool = False) -> None:
        if not units:
            return
        for instruction in self.residency.handle(Dropped(self._unbind_readers(units))):
            assert isinstance(instruction, Drop)
            if keep_memory:
                self.transport.abandon(self.units[instruction.unit])
            else:
                self.transport.drop(self.units[instruction.unit])

    def _unbind(self, component: Component) -> None:
        if component.stream is not None:
            component.stream.close()
            component.stream = None
        for unit in component.units:
            if unit.key in self.transport.flights:
                self.transport.read_back(unit)
        stale = component.unbind(lambda unit: self.residency.state(unit.key) is State.READY)
        self._drop([u.key for u in stale if u.key in self.transport.flights])


@contextlib.contextmanager
def rehooking() -> Iterator[Callable[[], None]]:
    """While a pipeline's hooks are replaced: components that get a new hook keep their slabs and device copies.

    Yields a function that gives up those that did not; it is also called on leaving.
    """
    outer = getattr(_local, "orphans", None)
    orphans: list[tuple[Holdings, Component]] = []
    _local.orphans = orphans if outer is None else outer

    def finish() -> None:
        while orphans:
            holdings, component = orphans.pop()
            if not component.hooked:
                holdings.remove(component)

    try:
        yield finish
    finally:
        _local.orphans = outer
        finish()


def _collected(holdings_ref: weakref.ref[Holdings], key: str) -> None:
    """A component was garbage collected, maybe in the middle of an engine step: bury it now or at that step's end."""
    holdings = holdings_ref()
    if holdings is None:
        return
    holdings._graveyard.append(key)
    lock = holdings.lock
    if lock._is_owned():
        return
    try:
        if lock.acquire(blocking=False) and not holdings._dirty:
            with holdings._change:
                holdings._bury()
    finally:  # from here to the release the interpreter looks for no interrupt
        try:
            lock.release()
        except RuntimeError:
            pass  # another thread has it
