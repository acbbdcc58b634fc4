"""One component: its masters and units, what its modules show, and what changed behind its back."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adoption import build_units
from .casting import keep_twins
from .codecs import codec_for
from .compiling import may_be_compiled, uses_cuda_graphs
from .config import Settings
from .encoded import EncodedUnit
from .host import Pins
from .masters import CarriedUnit, Master, SlabUnit, Unit, modules_of, tensors_of, version_of
from .points import Point, find_points, least_nbytes, traced
from .upcast import UpcastUnit, upcast_units

if TYPE_CHECKING:
    from .compiling import Compiled
    from .holdings import Client
    from .streaming import Stream

_numbers = itertools.count()


class Component:
    """A module whose weights are offloaded.

    Attributes:
        key: unique on its device (``unet#3``).
        name: what its pipeline calls it.
        module: held strongly, so that it is there for whoever walks over components while garbage is collected.
        units: what it needs on the device, in definition order.
        bound: its modules show twins.
        by_hand: it was bound outside of any call, or in one with a callback: a program may have written to what it saw.
        running: calls into it that have not returned.
        stream: awaits its units one by one while it runs; None: all of them are there.
        threads: those that run it.
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
        compiled: what was compiled while it ran; None: nothing was.
        d2h_nbytes: bytes written back because the device's copy had changed.
        stream_id: the stream it was last made ready for.
        client: the pipeline that it belongs to, the one enabled last if there are several.
    """

    client: Client
    compiled: Compiled | None = None
    transient_residency = False  # leaves the device when its call ends

    def __init__(
        self, module: nn.Module, name: str, device: torch.device, settings: Settings, pins: Pins
    ) -> None:
        self.key = f"{name}#{next(_numbers)}"
        self.name = name
        self.module = module
        self.device, self.settings, self._pins = device, settings, pins
        self._codec = codec_for(settings, name, module, device)
        self._recode = False
        self._rejected: set[str] = set()
        self.units: list[Unit] = []
        self.bound = False
        self.by_hand = False
        self.running = 0
        self.absorbed_by: Component | None = None
        self.stream_id = -1
        self.d2h_nbytes = 0
        self._masters: dict[int, Master] = {}
        self._modules: list[nn.Module] = []
        self._slots: list[tuple[dict[str, Any], str, Master]] = []
        self._n_entries = 0
        self._merged: list[tuple[nn.Module, tuple[str, ...]]] = []
        self._generation = itertools.count()
        self._suspended: list[SlabUnit] = []  # units whose tensors have moved away for the rest of this call
        self._placed = 0  # tensors on the device that are not ours
        self.stop_casting: Callable[[], None] = lambda: None
        self._flat: list[nn.Module] = []
        self._peft: list[nn.Module] = []
        self.stream: Stream | None = None
        self.turn = threading.RLock()
        self.threads: set[int] = set()
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

    def travel(self, settings: Settings) -> None:
        """Its pipeline was enabled again: its weights travel as `settings` say once it has been adopted anew."""
        ways = [(s.transport_of(self.name), s.transport_overflow, s.originals) for s in (self.settings, settings)]
        if ways[0] != ways[1]:
            self.settings, self._recode = settings, True
            self._codec = codec_for(settings, self.name, self.module, self.device)

    @property
    def on_trial(self) -> bool:
        """How its units travel best is to be measured."""
        return self.settings.transport_of(self.name) == "auto"

    def reject(self, units: list[str]) -> None:
        """These travel raw once it has been adopted anew."""
        self._rejected |= set(units)

    @staticmethod
    def _count(modules: list[nn.Module]) -> int:
        return sum(len(m._parameters) + len(m._buffers) for m in modules)

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
        self.least_nbytes = least_nbytes({u.key: u.nbytes for u in self.units}, self.points, self.must)
        keys = tuple(u.key for u in self.units)
        if set(keys) != set(self.order):
            self.order, self.visits, self.first_visit = keys, {}, -1
            self.unit_ms, self.pending, self.watched = {}, [], False

    def stays(self, unit: str) -> None:
        """`unit` was found to be read outside of its points."""
        self.found.add(unit)
        self.must |= {unit}
        self.least_nbytes = least_nbytes({u.key: u.nbytes for u in self.units}, self.points, self.must)

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
        ends: dict[str, int] = {}
        for number, place in sorted(self.visits.items(), key=lambda item: item[1]):
            ends |= dict.fromkeys(by_number[number].units, place)
        used = sorted(ends, key=ends.__getitem__)
        first = [u.key for u in self.units if u.key in self.must and u.key not in ends]
        # units that the pass did not read come last: an encoder's while only the decoder runs
        self.order = tuple(dict.fromkeys([*first, *used, *(u.key for u in self.units)]))

    def time_units(self) -> None:
        """Take over what the last measured pass took, if the device has come so far. The host does not wait."""
        if not self.pending or not self.pending[-1][2].query():
            return
        times: dict[str, float] = {}
        nbytes = {u.key: u.nbytes for u in self.units}
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
            try:
                written = [m for m in unit.masters if m.tensor._version != m.version]
            except RuntimeError:  # inference tensors have none
                written = [m for m in unit.masters if version_of(m.tensor) != m.version]
            for master in written:
                master.look()
            if written:
                found.append(unit)
        return found

    # ------------------------------------------------------------------- binding
    def bind(self, awaited: Callable[[Unit], bool] = lambda unit: True) -> None:
        """Let the modules show the twins of units whose copy the caller's stream has waited for, and else the masters."""
        self.bound = True
        for unit in self.units:
            if awaited(unit):
                self._show(unit)
        self._after_swap()
        self._merged = [(m, tuple(m.merged_adapters)) for m in self._peft]

    def show(self, unit: Unit) -> None:
        """While bound: the caller's stream has waited for a unit's copy."""
        self._show(unit)
        if self._flat:
            self._after_swap()

    def _show(self, unit: Unit) -> None:
        # Looked up once: looking at tensors for every use of a streamed unit costs more than showing them.
        if unit.places is None:
            unit.places, unit.checked = [], False
            for master in unit.masters:
                tensor, twin = master.tensor, master.twin
                assert twin is not None, f"{self.key}: {master.name} has no twin"
                unit.places += [(entries, key, tensor, twin, master.twin_version) for entries, key in master.slots]
        if not unit.checked:  # since it was bound
            unit.checked = True
            for _, _, tensor, twin, _ in unit.places:
                if twin.requires_grad is not tensor.requires_grad:
                    twin.requires_grad_(tensor.requires_grad)
        unit.shown = True
        for entries, key, tensor, twin, _ in unit.places:
            if entries.get(key) is tensor:
                entries[key] = twin
        if unit.fresh:
            unit.fresh = False
            if self.compiled is not None:
                self.compiled.check(unit.masters)

    def leave(self, unit: Unit) -> None:
        """While bound: a unit is about to leave the device. Its masters are shown again: a program that reads them meets
        the truth, not memory that is gone. What was written to it on the device is written back first."""
        # Looking for writes without a mark makes the host wait: only where no pipeline call is in progress.
        look = self.by_hand and not self.client.calling and isinstance(unit, SlabUnit) and unit.shown
        rewritten = unit.rewritten() if look and isinstance(unit, SlabUnit) else []
        taken = self._take_back(unit, rewritten)
        places = unit.places or []
        if taken:
            # a master may have become another object
            places = [(e, k, m.tensor, m.twin, 0) for m in unit.masters if m.twin is not None for e, k in m.slots]
            unit.places = None
        unit.shown = False
        for entries, key, tensor, twin, _ in places:
            if entries.get(key) is twin:
                entries[key] = tensor
        if self._flat:
            self._after_swap()

    def look_again(self) -> list[str]:
        """While bound, between two passes of a call whose callback may have written to it: take over what was written to
        shown units, which will leave. The host waits. Encoded units only: a raw one's next copy reads its masters anyway.

        Returns:
            Units of which the device does not have what the masters have: these were shown, and written.
        """
        encoded = [u for u in self.units if isinstance(u, EncodedUnit)]
        for unit in encoded:
            if unit.shown:
                self._take_back(unit, unit.rewritten())
        return [u.key for u in encoded if u.present and not u.shown and u.outdated(look=True)]

    def _take_back(self, unit: Unit, rewritten: list[Master]) -> bool:
        """Write back what was written to a shown unit's twins, with a mark or, as `rewritten`, without. Returns whether any."""
        written: list[Master] = []
        # Once for every use of a streamed unit: twins are no inference tensors, so they have a version.
        for *_, twin, version in unit.places or ():
            if twin._version != version:
                written = [m for m in unit.masters if m.twin is not None and m.twin._version != m.twin_version]
                break
        for master in {id(m): m for m in (*written, *rewritten)}.values():
            assert master.twin is not None
            with torch.inference_mode(False), torch.no_grad():
                master.put(master.twin.detach())
            self.d2h_nbytes += master.twin.nbytes
            master.look()
            master.twin_version = master.twin._version
        if written or rewritten:
            unit.sample()
        return bool(written or rewritten)

    def _after_swap(self) -> None:
        for module in self._flat:  # an RNN keeps a second list of its weights
            module._flat_weights = [getattr(module, n, None) for n in module._flat_weights_names]  # type: ignore[operator,union-attr]

    def unbind(self, awaited: Callable[[Unit], bool] = lambda unit: True) -> list[Unit]:
        """Let the modules show the masters again, and take over what was changed on the device.

        Args:
            awaited: the caller's stream has waited for the unit's copy; nobody has written to others.

        Returns:
            Units whose device copy no longer equals the master.
        """
        stale: list[Unit] = []
        slabs = [u for u in self.units if isinstance(u, SlabUnit) and u.present and awaited(u)] if self.by_hand else []
        rewritten = {id(m.twin) for unit in slabs for m in unit.rewritten()}
        if rewritten or not self.untouched():
            stale = self._take_over(rewritten)
        for entries, key, master in self._slots:
            entries[key] = master.tensor
        self._hide()
        self.bound = self.by_hand = False
        self._after_swap()
        return stale

    def _hide(self) -> None:
        for unit in self.units:
            unit.shown = unit.checked = False

    @property
    def shown(self) -> bool:
        """A glance at whether the modules still show twins: someone may have moved the module by hand."""
        for entries, key, master in (*self._slots[:1], *self._slots[-1:]):
            twin = entries.get(key)
            if twin is not (master.twin if master.shown else master.tensor):
                return bool(self.running)
            if master.shown and twin is not None and twin.data_ptr() != master.twin_ptr:
                return bool(self.running)
        return True

    def untouched(self) -> bool:
        """The modules show the twins that they were bound to, each where it was and unwritten."""
        modules = modules_of(self.module)
        if modules != self._modules or self._count(modules) != self._n_entries:
            return False
        if any(tuple(m.merged_adapters) != before for m, before in self._merged):
            return False
        for entries, key, master in self._slots:
            if entries.get(key) is not (master.twin if master.shown else master.tensor):
                return False
        for master in self._masters.values():
            twin = master.twin
            if master.shown and (
                twin is None or twin._version != master.twin_version or twin.data_ptr() != master.twin_ptr
            ):
                return False
        return True

    def _take_over(self, rewritten: set[int]) -> list[Unit]:
        """Write back what differs; keep whatever the modules show now that is not ours.

        Args:
            rewritten: identities of twins that were written without a mark.
        """
        merged = rewritten | {
            id(p) for m, before in self._merged if tuple(m.merged_adapters) != before for p in m.parameters()
        }
        unwritten = {u.key for u in self.units if isinstance(u, UpcastUnit) and not self.by_hand and u.unwritten()}
        by_twin = {id(m.twin): m for m in self._masters.values() if m.shown}
        done: dict[int, torch.Tensor] = {}
        moved_away: set[int] = set()
        written: set[int] = set()
        slots: list[tuple[dict[str, Any], str, Master]] = []
        with torch.inference_mode(False), torch.no_grad():
            for entries, key, shown in list(tensors_of(modules_of(self.module))):
                master = by_twin.get(id(shown))
                if master is None:
                    master = self._masters.get(id(shown))
                    if master is not None and master.tensor is shown and not master.shown:
                        slots.append((entries, key, master))  # its unit is not on the device, or was not read
                        continue
                    if shown.device == self.device:  # made or replaced while on the device
                        if id(shown) not in done:
                            done[id(shown)] = _to_host(shown)
                        entries[key] = done[id(shown)]
                    continue
                slots.append((entries, key, master))
                if id(shown) in done:
                    continue
                done[id(shown)] = shown
                moved = shown.data_ptr() != master.twin_ptr
                if moved and master.unit is not None and master.unit.key in unwritten and master.take_home(shown):
                    moved_away.add(id(master))
                    master.twin = master.twin_data = None
                elif moved or shown._version != master.twin_version or id(shown) in merged:
                    master.put(shown.detach())
                    self.d2h_nbytes += shown.nbytes
                    master.look()
                    written.add(id(master))
                    master.twin_version = shown._version
                    if moved:
                        moved_away.add(id(master))
                        master.twin = master.twin_data = None  # no longer a view into its unit: made anew when next needed
                        if master.unit is not None:
                            master.unit.places = None
        self._slots = slots
        self._n_entries = -1  # whatever was replaced is taken in at the next entry
        for unit in self.units:
            if any(id(m) in written for m in unit.masters):
                unit.sample()
        return [u for u in self.units if any(id(m) in moved_away for m in u.masters)]

    def release_twins(self) -> None:
        """Leave the weights on the device: modules keep what they show, as their own Parameters where they can."""
        for entries, key, master in self._slots:
            twin = master.twin
            if twin is not None and torch._has_compatible_shallow_copy_type(master.tensor, twin):
                if master.tensor.data_ptr() != twin.data_ptr():
                    master.tensor.data = twin.data
                entries[key] = master.tensor
        self._hide()
        self._after_swap()
        self.bound = False

    def returned(self) -> None:
        """Bring the module back to the host if someone placed it on the device, as stock does at the end of a call."""
        first = next((t for _, _, t in tensors_of(self._modules[:8])), None)
        if self._placed or (first is not None and first.device == self.device):
            self.module.to("cpu")


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its data on the host: the same object where the backend allows it."""
    data = tensor.detach().to("cpu")
    if torch._has_compatible_shallow_copy_type(tensor, data):
        tensor.data = data
        return tensor
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
