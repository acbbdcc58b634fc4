"""One component: its masters and units, how they are read, and what changed behind its back."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adoption import build_units
from .binding import Binding
from .casting import keep_twins
from .codecs import codec_for
from .compiling import may_be_compiled, uses_cuda_graphs
from .config import Settings, Way
from .errors import OffloadWarning
from .host import Pins
from .loading import CarriedUnit, SlabUnit, Unit
from .masters import Master, modules_of, tensors_of, version_of
from .points import Point, find_points, least_nbytes, traced
from .upcast import UpcastUnit, upcast_units

if TYPE_CHECKING:
    from .streaming import Stream

_numbers = itertools.count()


def in_order_of_use(reads: Sequence[str]) -> list[str]:
    """Each unit once, where it has to come in a pass that is repeated: before the read behind the longest time without it.

    What blocks define behind one another often runs in turns, and a unit that holds the end of one block and the beginning
    of the next is read at both ends of what lies between. It comes before that, and stays; unless that is most of the pass.

    Args:
        reads: units in the order in which a pass read them.
    """
    reads = [unit for unit, _ in itertools.groupby(reads)]
    last = {unit: place - len(reads) for place, unit in enumerate(reads)}  # in the pass before
    longest: dict[str, tuple[int, int]] = {}  # without the unit, and where it is read behind that
    for place, unit in enumerate(reads):
        without = place - last[unit]
        last[unit] = place
        if unit not in longest or without > longest[unit][0]:
            longest[unit] = without, place
    return sorted(longest, key=lambda unit: longest[unit][1])


def way_of(settings: Settings, name: str) -> tuple[str | Way, bool, str]:
    """All that says how the weights of the component `name` travel."""
    return settings.transport_of(name), settings.transport_overflow, settings.originals


def agreed(name: str, settings: Settings, others: Sequence[Settings], now: Settings | None = None) -> Settings:
    """By which settings a component travels that several pipelines share. Where one of them wants it exact, it is: what a
    lossy way leaves never reaches it. Warns of the ways that are not taken therefore.

    Args:
        settings: of the pipeline that is enabled now.
        others: of the others.
        now: by which it travels.
    """
    exact = [s for s in (settings, *others) if s.is_lossless(name)]
    lossy = list(dict.fromkeys(s.transport_of(name) for s in (settings, *others) if s not in exact))
    if not exact or not lossy:
        return settings
    chosen = exact[0]
    if settings is not chosen and now is not None and any(way_of(s, name) == way_of(now, name) for s in exact):
        chosen = now
    warnings.warn(
        f"{name} is shared by pipelines that are enabled with different transports: {' and '.join(map(repr, lossy))} is not "
        f"applied to it, since another one is enabled with {chosen.transport_of(name)!r}, which promises the resident "
        "pipeline's images bit for bit. It travels so for all of them while that one is enabled. Give all of them the same "
        f"`transport` for {name}, or each a copy of its own.",
        OffloadWarning,
        stacklevel=2,
    )
    return chosen


class Component(Binding):
    """A module whose weights are offloaded. See `Binding` for what it shows.

    Attributes:
        key: unique on its device (``unet#3``).
        name: what its pipeline calls it.
        module: held strongly, so that it is there for whoever walks over components while garbage is collected.
        stream: awaits its units one by one while it runs; None: all of them are there.
        turn: held by the thread that runs it while it streams.
        points, must: see `find_points`; and units that were found to be read outside of points.
        found: those.
        traced: identities of the modules below whose calls go through compiled code.
        whole: its last call went through compiled code that reads all of it, so that nothing can be awaited inside.
        graphs: it is compiled with CUDA graphs, which need it to keep its addresses.
        stable: its units keep their addresses.
        fixed: they do, and give no memory back when they leave: nothing is gained by streaming it.
        least_nbytes: the fewest bytes of weights that it can run with: what stays, and what one point reads.
        order: keys of its units in order of use, by its last measured pass.
        visits: by number of a point, the place of its last call in that pass.
        first_visit: the number of the point that was called first in it.
        unit_ms: by unit, its compute time in that pass.
        unpack_ms: by unit, what turning what travelled into the unit was measured to take.
        pass_ms: a pass's compute time, by the last call's figures; 0: not measured.
        pending: what that pass recorded, until the device has come so far.
        watched: a streamed pass has been searched for reads outside of its points.
        absorbed_by: the larger component that it has become part of.
        stream_id: the stream it was last made ready for.
    """

    transient_residency = False  # leaves the device when its call ends

    def __init__(
        self, module: nn.Module, name: str, device: torch.device, settings: Settings, pins: Pins
    ) -> None:
        super().__init__(f"{name}#{next(_numbers)}", module, device)
        self.name = name
        self.settings, self._pins = settings, pins
        self._codec = codec_for(settings, name, module, device)
        self._recode = False
        self._rejected: set[str] = set()
        self.absorbed_by: Component | None = None
        self.stream_id = -1
        self._generation = itertools.count()
        self._suspended: list[SlabUnit] = []  # units whose tensors have moved away for the rest of this call
        self.stop_casting: Callable[[], None] = lambda: None
        self.stream: Stream | None = None
        self.turn = threading.RLock()
        self.points: list[Point] = []
        self.must: frozenset[str] = frozenset()
        self.found: set[str] = set()
        self.traced: frozenset[int] = frozenset()
        self.whole = False
        self.graphs = self.stable = self.fixed = False
        self._looked: tuple[frozenset[int], int] = frozenset(), 0  # what was compiled when CUDA graphs were last looked for
        self.least_nbytes = 0
        self.order: tuple[str, ...] = ()
        self.visits: dict[int, int] = {}
        self.first_visit = -1
        self.unit_ms: dict[str, float] = {}
        self.unpack_ms: dict[str, float] = {}
        self.pass_ms = 0.0
        self.pending: list[tuple[Point | None, torch.Event, torch.Event]] = []
        self.watched = False

    @property
    def hooked(self) -> bool:
        """A hook of ours serves it now."""
        return getattr(self.module.__dict__.get("_hf_hook"), "component", None) is self

    @property
    def nbytes(self) -> int:
        return sum(u.nbytes for u in self.units)

    @property
    def unit_nbytes(self) -> dict[str, int]:
        """Device bytes of each unit."""
        return {u.key: u.nbytes for u in self.units}

    @property
    def masters(self) -> list[Master]:
        return list(self._masters.values())

    # ------------------------------------------------------------------ adoption
    def unchanged(self) -> bool:
        """The modules show the same tensors, with their data where it was, as when last adopted."""
        modules = modules_of(self.module)
        if self._recode or self._rejected or self._placed:
            return False
        if modules != self._modules or self._count(modules) != self._n_entries:
            return False
        for entries, key, master in self._slots:
            if entries.get(key) is not master.tensor:
                return False
        for master in self._masters.values():
            tensor = master.tensor
            if tensor.data_ptr() != master.ptr or tensor.dtype is not master.dtype:
                return False
        return True

    def travel(self, settings: Settings) -> bool:
        """Its weights travel as `settings` say once it has been adopted anew. Returns whether that is another way."""
        if way_of(self.settings, self.name) == way_of(settings, self.name):
            return False
        self.settings, self._recode = settings, True
        self._codec = codec_for(settings, self.name, self.module, self.device)
        return True

    @property
    def recoding(self) -> bool:
        """None of its units will be kept when it is next adopted."""
        return self._recode

    def renew(self) -> None:
        """All its units are made anew once it has been adopted again."""
        self._recode = True

    @property
    def on_trial(self) -> bool:
        """How its units travel best is to be measured."""
        return self.settings.transport_of(self.name) == "auto"

    def reject(self, units: list[str]) -> None:
        """These travel raw once it has been adopted anew."""
        self._rejected |= set(units)

    def adopt(self, transient: bool = False) -> tuple[list[Unit], list[Unit]]:
        """Bring units and masters in line with what the modules show. The component is not bound.

        Units of which every tensor is still in place are kept; the others' tensors and new ones form new units. Interrupted
        anywhere, or refused, it leaves the component to be adopted again: what it shows is known last.

        Args:
            transient: changed tensors are carried as they are instead of being taken into new slabs: what changes within
                a call (an upcast VAE) will most likely change back before the next. Not where units are to travel otherwise.

        Returns:
            (units that are new, units that are gone). The caller drops the latter's device memory first if it is held.
        """
        modules = modules_of(self.module)
        if self.compiled is not None and modules != self._modules:
            self.compiled.restructured()
        self._n_entries = -1
        names = {id(m): n for n, m in self.module.named_modules(remove_duplicate=False)}
        seen: dict[int, Master] = {}
        slots: list[tuple[dict[str, Any], str, Master]] = []
        placed = 0
        for module in modules:
            prefix = names.get(id(module), "")
            for entries, key, tensor in tensors_of([module]):
                if tensor.device.type != "cpu":
                    placed += 1  # by someone else; left alone until it comes back
                    continue
                master = seen.get(id(tensor)) or self._masters.get(id(tensor))
                if master is None or master.tensor is not tensor:
                    master = Master(tensor, f"{prefix}.{key}".lstrip("."), [])
                if id(tensor) not in seen:
                    seen[id(tensor)] = master
                    master.slots = []
                master.slots.append((entries, key))
                slots.append((entries, key, master))
        present = set(map(id, seen.values()))
        fit = [u for u in self._all_units() if not self._recode and u.key not in self._rejected]
        kept = [u for u in fit if self._intact(u, present)]
        codec = self._codec if not self._rejected else None
        settled = {id(m) for u in kept for m in u.masters}
        fresh = [m for m in seen.values() if id(m) not in settled]
        made: list[Unit] = []
        if self._recode or self._rejected:
            transient = False  # units that are to travel otherwise do not come back
        if fresh and transient:
            for master in fresh:
                master.twin = master.twin_data = master.unit = None
                master.look()
            gone = [u for u in self._all_units() if u not in kept and isinstance(u, SlabUnit)]
            suspended = [u for u in gone if not isinstance(u, UpcastUnit)]
            name = f"{self.key}.{next(self._generation)}"
            if not self.stable:  # an address for one call is none
                made += upcast_units(name, suspended, fresh, self._pins)
            taken = {id(m) for u in made for m in u.masters}
            carried = [m for m in fresh if id(m) not in taken]
            made += [CarriedUnit(f"{name}/transient", carried)] if carried else []
        else:
            suspended = []
            if fresh:
                name = f"{self.key}.{next(self._generation)}"
                made = build_units(name, fresh, self.settings, self._pins, codec)
        leaving = [u for u in self._all_units() if u not in kept]
        # Nothing is refused from here on.
        self._recode, self._rejected = False, set()
        self._modules, self._placed = modules, placed
        self._suspended = suspended
        self.units = kept + made
        # by the tensors there are now: taking them in may have replaced an inference tensor
        self._masters = {id(m.tensor): m for m in seen.values()}
        for unit in self.units:
            unit.places = None
            for master in unit.masters:
                master.unit = unit
        self._slots = slots
        self._flat = [m for m in self._modules if isinstance(m, nn.RNNBase)]
        self._peft = [m for m in self._modules if "merged_adapters" in m.__dict__]
        self.stop_casting()
        self.stop_casting = keep_twins(self._modules, slots)
        self._chart()
        self._n_entries = self._count(modules)
        return made, leaving

    def _chart(self) -> None:
        """Find out where units are read. What was learned of the order holds while the units are the same."""
        self.traced = traced(self._modules)
        self.points, self.must = find_points(self.module, self.units)
        self.must |= self.found & {u.key for u in self.units}
        self.least_nbytes = least_nbytes(self.unit_nbytes, self.points, self.must)
        keys = tuple(u.key for u in self.units)
        if set(keys) != set(self.order):
            self.order, self.visits, self.first_visit = keys, {}, -1
            self.unit_ms, self.pending, self.watched = {}, [], False

    def stays(self, unit: str) -> None:
        """`unit` was found to be read outside of its points."""
        self.found.add(unit)
        self.must |= {unit}
        self.least_nbytes = least_nbytes(self.unit_nbytes, self.points, self.must)

    def compiled_since(self) -> bool:
        """Something below has been compiled since it was charted, or is no longer; it is charted anew."""
        if traced(self._modules) == self.traced:
            return False
        self._chart()
        return True

    def compiled_now(self) -> frozenset[int]:
        """Identities of the modules with compiled calls, as far as Inductor or CUDA graphs may be behind them."""
        return traced(self._modules) if may_be_compiled() else frozenset()

    def look_for_graphs(self, call: Any, compiled: frozenset[int]) -> None:
        """Find out whether it is compiled with CUDA graphs, if what is compiled of it has changed.

        Args:
            call: compiled code around all of it that is about to run, or None.
            compiled: see `compiled_now`.
        """
        looked = compiled, id(call)
        if (compiled or call is not None) and looked != self._looked:
            self._looked = looked
            self.graphs = uses_cuda_graphs(self.module, call)

    @property
    def streamable(self) -> bool:
        """It can run with some of its units at a time."""
        return bool(self.points) and not self.whole and not self.fixed and len(self.must) < len(self.units)

    @property
    def smallest_nbytes(self) -> int:
        """The fewest bytes of weights that it can run with, as it is called now."""
        return self.least_nbytes if self.streamable else self.nbytes

    def learn(self, visited: list[int]) -> None:
        """A pass called these points, by number, in this order."""
        # By the last call of each: units that are read in turns are done with in that order.
        self.visits = {number: place for place, number in enumerate(dict.fromkeys(reversed(visited)))}
        self.visits = {number: len(self.visits) - 1 - place for number, place in self.visits.items()}
        self.first_visit = visited[0] if visited else -1
        by_number = {p.number: p for p in self.points}
        used = in_order_of_use([u for number in visited for u in by_number[number].units])
        first = [u.key for u in self.units if u.key in self.must and u.key not in used]
        # units that the pass did not read come last: an encoder's while only the decoder runs
        self.order = tuple(dict.fromkeys([*first, *used, *(u.key for u in self.units)]))

    def time_units(self) -> None:
        """Take over what the last measured pass took, if the device has come so far. The host does not wait."""
        if not self.pending or not self.pending[-1][2].query():
            return
        times: dict[str, float] = {}
        nbytes = self.unit_nbytes
        for (point, _, went), (_, arrived, _) in itertools.pairwise(self.pending):
            if point is None or not set(point.units) <= set(nbytes):
                continue
            took = max(0.0, float(went.elapsed_time(arrived)))
            total = sum(nbytes[u] for u in point.units) or 1
            for unit in point.units:
                times[unit] = times.get(unit, 0.0) + took * nbytes[unit] / total
        self.unit_ms, self.pending = times, []

    def _all_units(self) -> list[Unit]:
        """In definition order, those whose tensors have moved away within this call included."""
        return self.units + [u for u in self._suspended if u not in self.units]

    @staticmethod
    def _intact(unit: Unit, present: set[int]) -> bool:
        if unit.key.endswith("/transient"):
            return False  # it lasts for one call
        if isinstance(unit, SlabUnit):
            return unit.intact and all(id(m) in present for m in unit.masters)
        # carried ones as long as their tensors stay what they are
        return all(id(m) in present and m.unit is unit and m.tensor.data_ptr() == m.ptr for m in unit.masters)

    @property
    def suspended_units(self) -> list[SlabUnit]:
        """Units whose tensors have moved away, kept because they will most likely come back."""
        return self._suspended

    @property
    def suspended(self) -> bool:
        """Some tensors are carried for the rest of this call only."""
        return any(u.key.endswith("/transient") for u in self.units)

    @property
    def outdated(self) -> bool:
        """What its modules show changed while it was bound, and has not been adopted yet."""
        return self._n_entries < 0

    def written(self) -> list[Unit]:
        """Units whose master was written in place since it was last looked at; looks at them."""
        found = []
        for unit in self.units:
            written = [m for m in unit.masters if version_of(m.tensor) != m.version]
            for master in written:
                master.look()
            if written:
                found.append(unit)
        return found
