"""What the modules of a component show: twins while it is on the device, masters else; and what a program wrote to either."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .encoded import EncodedUnit
from .loading import SlabUnit, Unit
from .lossy import is_lossy, written_to
from .masters import PLAIN_TYPES, Master, modules_of, tensors_of
from .upcast import UpcastUnit

if TYPE_CHECKING:
    from .clients import Client
    from .compiling import Compiled


_version = operator.attrgetter("_version")


class Run:
    """A call into a component. Whoever makes it holds it, so that one that was interrupted anywhere ends all the same.

    Attributes:
        over: it has ended.
    """

    over = False


class Binding:
    """Shows a component's units to its modules and takes back what was written to them. `Component` says what these are.

    Attributes:
        units: what it needs on the device, in definition order.
        bound: its modules show twins.
        by_hand: it was bound outside of any call, or in one with a callback: a program may have written to what it saw.
        compiled: what was compiled while it ran; None: nothing was.
        d2h_nbytes: bytes written back because the device's copy had changed.
        client: the pipeline that it belongs to, the one enabled last if there are several.
    """

    client: Client
    compiled: Compiled | None = None

    def __init__(self, key: str, module: nn.Module, device: torch.device) -> None:
        self.key, self.module, self.device = key, module, device
        self.units: list[Unit] = []
        self.bound = False
        self.by_hand = False
        self._runs: dict[int, weakref.ref[Run]] = {}
        self.d2h_nbytes = 0
        self._masters: dict[int, Master] = {}
        self._modules: list[nn.Module] = []
        self._slots: list[tuple[dict[str, Any], str, Master]] = []
        self._n_entries = 0
        self._merged: list[tuple[nn.Module, tuple[str, ...]]] = []
        self._placed = 0  # tensors on the device that are not ours
        self._flat: list[nn.Module] = []
        self._peft: list[nn.Module] = []

    @property
    def running(self) -> bool:
        """There are calls into it that have not ended."""
        return bool(self._runs) and any(map(self.runs_in, list(self._runs)))

    def runs_in(self, thread: int) -> bool:
        """There is one in this thread."""
        run = (ref := self._runs.get(thread)) and ref()
        return run is not None and not run.over

    def begin(self, thread: int) -> Run:
        """A call into it begins in `thread`."""
        run = Run()
        self._runs[thread] = weakref.ref(run)
        return run

    def end(self, thread: int) -> None:
        """None is in progress in `thread` any more."""
        self._runs.pop(thread, None)

    @staticmethod
    def _count(modules: list[nn.Module]) -> int:
        return sum(len(m._parameters) + len(m._buffers) for m in modules)

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
            unit.twins = [m.twin for m in unit.masters if m.twin is not None]
            unit.versions = [m.twin_version for m in unit.masters if m.twin is not None]
            for master in unit.masters:
                tensor, twin = master.tensor, master.twin
                assert twin is not None, f"{self.key}: {master.name} has no twin"
                unit.places += [(entries, key, tensor, twin) for entries, key in master.slots]
        if not unit.checked:  # since it was bound
            unit.checked = True
            for _, _, tensor, twin in unit.places:
                if twin.requires_grad is not tensor.requires_grad:
                    twin.requires_grad_(tensor.requires_grad)
        unit.shown = True
        for entries, key, tensor, twin in unit.places:
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
            places = [(e, k, m.tensor, m.twin) for m in unit.masters if m.twin is not None for e, k in m.slots]
            unit.places = None
        for entries, key, tensor, twin in places:
            if entries.get(key) is twin:
                entries[key] = tensor
        unit.shown = False  # last: of a unit that is not shown, whatever modules show in place of its masters is a change
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
        if unit.places is None or list(map(_version, unit.twins)) != unit.versions:
            written = [m for m in unit.masters if m.twin is not None and m.twin._version != m.twin_version]
        if not (written or rewritten):
            return False
        for master in {id(m): m for m in (*written, *rewritten)}.values():
            assert master.twin is not None
            with torch.inference_mode(False), torch.no_grad():
                master.put(written_to(master, master.twin.detach()))
            self.d2h_nbytes += master.twin.nbytes
            master.look()
            master.twin_version = master.twin._version
        unit.sample()
        return True

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
                return self.running
            if master.shown and twin is not None and twin.data_ptr() != master.twin_ptr:
                return self.running
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
        upcast = [u for u in self.units if isinstance(u, UpcastUnit) and not self.by_hand]
        unwritten = {id(m) for u in upcast for m in u.unwritten()}
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
                    if master is not None and master.tensor is shown:
                        slots.append((entries, key, master))  # its unit is not on the device, was not read, or was leaving
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
                if moved and master.unit is not None and id(master) in unwritten and master.take_home(shown):
                    moved_away.add(id(master))
                    master.twin = master.twin_data = master.unit.places = None
                elif moved or shown._version != master.twin_version or id(shown) in merged:
                    master.put(written_to(master, shown.detach()))
                    self.d2h_nbytes += shown.nbytes
                    master.look()
                    written.add(id(master))
                    master.twin_version = shown._version
                    if master.unit is not None:
                        master.unit.places = None
                    if moved:
                        moved_away.add(id(master))
                        master.twin = master.twin_data = None  # no longer a view into its unit: made anew when next needed
        self._slots = slots
        self._n_entries = -1  # whatever was replaced is taken in at the next entry
        for unit in self.units:
            if any(id(m) in written for m in unit.masters):
                unit.sample()
        return [u for u in self.units if any(id(m) in moved_away for m in u.masters)]

    @property
    def rounded(self) -> list[SlabUnit]:
        """Units whose twins are shown, and are what a lossy way has left of the masters."""
        return [u for u in self.units if u.shown and isinstance(u, SlabUnit) and is_lossy(u)] if self.bound else []

    def make_exact(self, unit: SlabUnit) -> None:
        """Let a shown unit have on the device what its masters have, with what was written to it there."""
        self._take_back(unit, unit.rewritten())
        with torch.inference_mode(False), torch.no_grad():
            for master in unit.masters:
                twin, tensor = master.twin, master.tensor.detach()
                if twin is not None and twin.data_ptr() == master.twin_ptr and twin.shape == tensor.shape:
                    twin.data.copy_(tensor)

    def release_twins(self) -> None:
        """Leave the weights on the device: modules keep what they show, as their own Parameters where they can."""
        for entries, key, master in self._slots:
            twin = master.twin
            if twin is None:
                continue
            if type(twin) not in PLAIN_TYPES:
                entries[key] = twin  # a wrapper has no address by which to tell, and takes no other data
            elif torch._has_compatible_shallow_copy_type(master.tensor, twin):
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
    # Subclasses refuse other data (torchao's), or keep what their own state says of the old.
    if type(tensor) in PLAIN_TYPES and torch._has_compatible_shallow_copy_type(tensor, data):
        tensor.data = data
        return tensor
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
