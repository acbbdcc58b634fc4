"""Components that only their own `.to()` can move: bitsandbytes weights, whose state lies outside of their tensors, and
TorchScript modules. They are offloaded as stock does it, whole and synchronously, within the same budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import nn

from .component import Component
from .config import Settings
from .host import Pins
from .loading import Unit
from .masters import component_nbytes, modules_of, tensors_of


class NativeUnit(Unit):
    """A whole module, moved by itself."""

    def __init__(self, key: str, module: nn.Module) -> None:
        nbytes = component_nbytes(module)
        super().__init__(key, nbytes, nbytes, [])
        self._module = weakref.ref(module)

    def _to(self, device: torch.device | str) -> None:
        module = self._module()
        if module is not None:
            module.to(device)

    def allocate(self, device: torch.device) -> None:
        try:
            self._to(device)
        except BaseException:  # half of it may have moved
            self._to("cpu")
            raise

    def free(self, after: torch.Event | None = None) -> None:
        self._to("cpu")

    def abandon(self) -> None:
        pass


class NativeComponent(Component):
    """A component of one `NativeUnit`. It shows its weights where they are, and leaves the device with its call."""

    transient_residency = True

    def __init__(self, module: nn.Module, name: str, device: torch.device, settings: Settings, pins: Pins) -> None:
        super().__init__(module, name, device, settings, pins)
        self.units = [NativeUnit(f"{self.key}.0/native", module)]
        self.order = tuple(u.key for u in self.units)
        self.must = frozenset(self.order)
        self.least_nbytes = self.nbytes

    def unchanged(self) -> bool:
        return True

    def _moved(self) -> bool:
        """Someone else has brought it back to the host, or as much of it as is looked at."""
        first = next((t for _, _, t in tensors_of(modules_of(self.module)[:8])), None)
        return first is not None and first.device != self.device

    @property
    def shown(self) -> bool:
        return self.running or not (self.bound and self._moved())

    def written(self) -> list[Unit]:
        return list(self.units) if self._moved() else []

    def adopt(self, transient: bool = False) -> tuple[list[Unit], list[Unit]]:
        return list(self.units), []

    def bind(self, awaited: Callable[[Unit], bool] = lambda unit: True) -> None:
        self.bound = True

    def unbind(self, awaited: Callable[[Unit], bool] = lambda unit: True) -> list[Unit]:
        self.bound = False
        return []

    def show(self, unit: Unit) -> None:
        pass

    def leave(self, unit: Unit) -> None:
        pass

    def release_twins(self) -> None:
        self.bound = False

    def returned(self) -> None:
        pass
