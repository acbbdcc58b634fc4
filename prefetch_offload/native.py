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
from .masters import component_nbytes


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
