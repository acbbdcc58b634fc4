"""A component whose units arrive while it runs: each is awaited when it is first read, and those that do not stay pass
through a window, ahead of use, in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .component import Component
from .loading import Unit
from .points import Point, is_traced
from .residency import State
from .window import Scripted, Share, Window, window_of

if TYPE_CHECKING:
    from .clients import Client
    from .engine import Engine


class Stream:
    """Told of the calls of a running component's points, it moves units. It ends when nothing more is to be awaited.

    Attributes:
        share: what the component may hold; None: all of it, and only its first pass is awaited unit by unit.
        window: the units that do not stay; None as above.
        passes: how many have begun.
        keeps: gradients are recorded: their graph holds on to weights, wherever those go.
        active: the points that are being called, outermost first.
    """

    def __init__(self, engine: Engine, client: Client, component: Component, share: Share | None) -> None:
        self.engine, self.client, self.component, self.share = engine, client, component, share
        self.units: Mapping[str, Unit] = {u.key: u for u in component.units}
        self.window: Window | None = None
        if share is not None:
            self.window = window_of(component.order, component.unit_nbytes, share)
        self.passes = 0
        self._last = False
        self._turned = 0
        self._followed = ""  # the unit that the script was asked about last
        self._before = -1  # the number of the point that was called last
        self._place = {key: i for i, key in enumerate(component.order)}
        self._readers: dict[str, list[Point]] = {}
        for point in component.points:
            for unit in point.units:
                self._readers.setdefault(unit, []).append(point)
        if isinstance(self.window, Scripted):
            self.window.take_turns(self._readers)
        self._cap = engine._cap(component, client)
        self._final: dict[str, Point] = {}  # of each unit, the point that is its last reader in a pass
        self._visited: list[Point] = []
        self._marks: list[tuple[Point, torch.Event, torch.Event]] = []  # arrived at, and went on from
        self._read: set[str] = set()  # units whose last reader in this pass has been called
        self._met: set[str] = set()  # units that were counted when the component was entered, and not read since
        self._measuring = False
        self._watch: Watch | None = None
        self.active: list[Point] = []  # those that are being called, outermost first
        self.keeps = False

    # ---------------------------------------------------------------- lifetime
    def open(self) -> None:
        """Stand before the points."""
        visits = self.component.visits
        for point in sorted(self.component.points, key=lambda p: visits.get(p.number, -1) if visits else p.number):
            for unit in point.units:
                self._final[unit] = point
        for point in self.component.points:
            point.install(self)
        self._met.update(self.engine.residency.held(self.component.key))
        if self.window is not None:
            for unit in self.window.order:
                if self.engine.residency.state(unit) is not State.HOST:
                    self.window.arrived(unit)

    def close(self) -> None:
        """Stand aside: from now on nothing is awaited inside."""
        for point in self.component.points:
            point.remove()

    def guard(self, units: Iterable[str]) -> None:
        """These units are about to go: whoever reads them waits for them again."""
        for unit in units:
            for point in self._readers.get(unit, ()):
                point.install(self)

    @property
    def spent(self) -> bool:
        """The pass that was thought to be the last has begun: there is no plan for another."""
        return self._last

    def begin_pass(self, last: bool) -> None:
        """The component is called again; `last`: no further call of it is expected."""
        self.passes += 1
        if self.passes > 1:
            self._met.clear()
        self._last = last
        self._measuring = self.passes == 1
        if self.window is not None:
            self.window.begin()
        self.begin_again()
        if last and self.window is not None:
            self.guard(self.units)  # every unit that has been read may make room for the next component's

    def begin_again(self) -> None:
        """Nothing of the pass has been: it begins, or is called once more after an error in it."""
        self._turned = 0
        self._followed, self._before = "", -1
        self._visited.clear()
        self._marks.clear()
        self._read.clear()
        self.active.clear()
        if self.window is not None:
            self.window.rewind()

    def end_pass(self) -> None:
        """The call returned. The first one taught in which order units are used."""
        if self._measuring:
            self._measuring = False
            self._learn()
        if self.window is None:
            self.engine.settle(self.component)  # also what this pass did not read: programs may

    def watched(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pass itself; the first one in which units may be missing is searched for reads outside of points."""
        component = self.component
        if self.window is None or component.watched or any(is_traced(m) for m in component.module.modules()):
            return call(*args, **kwargs)
        try:
            with Watch(self) as self._watch:
                result = call(*args, **kwargs)
        finally:
            self._watch = None
        component.watched = True
        return result

    # ------------------------------------------------------------------ points
    def before(self, point: Point) -> None:
        """`point` is about to be called: its units have to be there."""
        engine, window = self.engine, self.window
        self.active.append(point)
        arrived = engine.lanes.record(engine.lanes.compute()) if self._measuring else None
        state = engine.residency.state
        weighing = engine.weigh()
        if isinstance(window, Scripted):
            self._count(point.units)  # as they are before the script's turn
            self._follow(window, point)
        for unit in point.units:
            if state(unit) is not State.READY:
                if window is None or not window.scripted:
                    self._count(point.units)
                with engine._held(), engine._change:
                    self._fetch(point.units)
                break
        if weighing:
            engine.weighed()
        before, self._before = self._before, point.number
        if window is not None and point.number == self.component.first_visit and before != point.number and self._read:
            self._last = False  # round again within one call, as a tiled VAE's decoder goes
            if not window.scripted:  # a script knows calls; within one, it tells turns apart by itself
                window.begin()
        if arrived is not None:
            self._visited.append(point)
            self._marks.append((point, arrived, engine.lanes.record(engine.lanes.compute())))
        elif window is None or not (self._last or window.scripted or any(map(window.streams, point.units))):
            point.remove()  # it stays: nothing to await from now on

    def _follow(self, window: Scripted, point: Point) -> None:
        for unit in point.units:
            row = None
            if unit != self._followed:
                row, self._followed = window.follow(unit), unit
            if row is not None:
                with self.engine._held(), self.engine._change:
                    self.engine.follow(self.client, self.component, row)
                    self.resync()

    def _count(self, units: tuple[str, ...]) -> None:
        """These are about to be read: those that have not been since they left, or never, are hits or misses, unless they were
        counted when the component was entered."""
        hits = misses = 0
        for unit in units:
            state = self.engine.residency.state(unit)
            if state is State.READY:
                continue
            if unit in self._met:
                self._met.remove(unit)
            elif state is State.HOST:
                misses += 1
            else:
                hits += 1
        if hits or misses:
            with self.engine.lock:  # other threads count, too
                self.engine.recorder.met(self.component.key, hits, misses)

    def _fetch(self, units: tuple[str, ...]) -> None:
        engine, window = self.engine, self.window
        if window is not None and len(units) == 1 and units[0] in window.held:  # the most frequent case by far
            window.need(units[0])
        elif window is not None:
            for unit in units:
                if window.streams(unit):
                    drops, loads = window.need(unit, frozenset(units))
                    engine.stream_out(self.component, drops)
                    self._make_room(loads)
        state = engine.residency.state
        gone = [u for u in units if state(u) is State.HOST and not (window is not None and window.streams(u))]
        if gone and self.passes:  # what stays has left in the last pass, and is called for again
            self._make_room(gone)
        engine.await_units(self.component, units)
        if self._watch is not None:
            self._watch.know([self.units[u] for u in units])

    def after(self, point: Point) -> None:
        """`point` has been called: a unit that it was the last to read in this pass may make room."""
        while self.active and self.active.pop() is not point:
            pass  # an exception inside, which someone caught
        window = self.window
        if window is None:
            return
        weighing = self.engine.weigh()
        self._done_with(window, point)
        if weighing:
            self.engine.weighed()

    def _done_with(self, window: Window, point: Point) -> None:
        for unit in sorted(point.units, key=self._place.__getitem__) if len(point.units) > 1 else point.units:
            if self._final.get(unit) is not point or (self.active and any(unit in p.units for p in self.active)):
                continue
            self._read.add(unit)
            with self.engine._held(), self.engine._change:  # an interrupt between the decision and the moves has to be repaired
                if window.streams(unit):
                    drops, loads = window.done(unit, self._last)
                    if drops or loads:
                        self._exchange(drops, loads)
                if self._last and window.finished() and self._is_turn():
                    self.engine.prefetch_others(self.client, self.component, frozenset(self.units) - self._read)

    def _is_turn(self) -> bool:
        """Some sixteen times in a last pass, and at its end, there is a look at what else to prefetch."""
        place = len(self._read)
        ended = place == len(self._final)
        if place == self._turned or (not ended and place - self._turned < max(1, len(self._place) // 16)):
            return False
        self._turned = place
        return True

    def _exchange(self, drops: list[str], loads: list[str]) -> None:
        """Units go, and others come ahead of use, as far as they can travel by themselves and the device has room."""
        window = self.window
        assert window is not None
        ahead = []
        for unit in loads:
            if self.units[unit].prefetchable:
                ahead.append(unit)
            else:
                window.left(unit)
        gained = sum(self.units[u].nbytes for u in drops)
        self._make_room(ahead, gained)
        for unit in self.engine.exchange(self.client, self.component, drops, ahead):
            window.left(unit)

    def _make_room(self, units: list[str], gained_nbytes: int = 0) -> None:
        """Others may have come into the room of what had been read. So many bytes of its own go besides."""
        nbytes = sum(self.units[u].nbytes for u in units) - gained_nbytes
        if self.engine.residency.held_nbytes + nbytes > self._cap:
            self.engine.make_room(self.client, self.component, self._cap - nbytes)

    def found(self, unit: str) -> None:
        """`unit` is read outside of its points: it has to stay while the component runs."""
        component, engine = self.component, self.engine
        component.stays(unit)
        engine.discard_measurement()
        self._count((unit,))
        with engine._held(), engine._change:
            self._fetch((unit,))
            if self.window is not None:
                self.window.stay(unit)

    def resync(self) -> None:
        """After a recovery: what is held is what the engine says."""
        if self.window is not None:
            for unit in self.window.order:
                held = self.engine.residency.state(unit) is not State.HOST
                (self.window.arrived if held else self.window.left)(unit)

    # ---------------------------------------------------------------- learning
    def _learn(self) -> None:
        """Take the order of the pass as the order of use. Times follow when the device has come so far."""
        now = self.engine.lanes.record(self.engine.lanes.compute())
        self.component.learn([p.number for p in self._visited])
        self.component.pending = [*self._marks, (None, now, now)]
        self.engine.reorder(self.component)


class Watch(TorchDispatchMode):
    """While a component streams for the first time: a unit that is read outside of its points is noticed, and fetched."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream
        self._owner: dict[int, str] = {}
        self.know(stream.component.units)

    def know(self, units: Iterable[Unit]) -> None:
        """These are the tensors that the units' readers see."""
        for unit in units:
            for master in unit.masters:
                for tensor in (master.tensor, master.twin):
                    self._owner[id(tensor)] = unit.key

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = [v for value in (*args, *kwargs.values()) for v in (value if isinstance(value, tuple | list) else (value,))]
        strays = {id(v): unit for v in values if isinstance(v, torch.Tensor) and (unit := self._stray(v)) is not None}
        if not strays:
            return func(*args, **kwargs)
        for unit in set(strays.values()):
            self._stream.found(unit)
        twins = {id(m.tensor): m.twin for u in set(strays.values()) for m in self._stream.units[u].masters}

        def twin_of(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(twin_of(v) for v in value)
            return twins.get(id(value), value) if isinstance(value, torch.Tensor) else value

        return func(*map(twin_of, args), **{k: twin_of(v) for k, v in kwargs.items()})

    def _stray(self, tensor: torch.Tensor) -> str | None:
        """The unit of a weight that is read by none of the points being called, if it has not been found already."""
        unit = self._owner.get(id(tensor))
        if unit is None or unit in self._stream.component.must:
            return None
        return None if any(unit in point.units for point in self._stream.active) else unit
