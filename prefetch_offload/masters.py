"""Masters: the live host tensors of a component, the slabs they lie in, and their twins on the device.

# [Note: host masters]
The live CPU parameter IS the master: its data lies in a slab, so an in-place edit, a LoRA fuse or a `state_dict` sees and
changes the truth. Device memory is a cache of it. While a component runs its modules show *twins*: persistent device
Parameters, views into their unit's device bytes, put into ``module._parameters``. A unit's device bytes are one storage
that is resized to nothing and back, so that twins are made once and dropping or loading a unit touches no tensor object.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .host import Slab

if TYPE_CHECKING:
    from .loading import Unit


PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version counter; 0 for an inference tensor, which has none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def is_plain(tensor: torch.Tensor) -> bool:
    """Bytes, shape and strides say all there is about it: it can live in a slab."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.device.type == "cpu"
    )


@dataclasses.dataclass(eq=False, slots=True)
class Master:
    """One live host tensor, however many modules show it (tied parameters are one master).

    Attributes:
        tensor: the object the modules show between calls. Held strongly: an identity is only worth comparing while its
            object cannot be freed and reused.
        name: its first qualified name.
        slots: (dictionary, key) of every place that shows it.
        home: its view in a slab, kept so that the address cannot be reused while it is compared; None when carried.
        ptr, version, dtype: where its data lay, its version and its type when last looked at.
        twin: what the modules show while the component runs; None until first needed.
        twin_data: the twin's view into its unit's device bytes, should something else be put into the twin.
        unit: what it moves with.
        twin_offset: of the twin, from its unit's `base`.
        twin_version: as `version`, of the twin, when its unit was loaded or it was last written back.
    """

    tensor: torch.Tensor
    name: str
    slots: list[tuple[dict[str, Any], str]]
    home: torch.Tensor | None = None
    ptr: int = 0
    version: int = 0
    dtype: torch.dtype = torch.float32
    twin: torch.Tensor | None = None
    twin_data: torch.Tensor | None = None
    twin_offset: int = 0
    twin_version: int = 0
    unit: Unit | None = None

    @property
    def shown(self) -> bool:
        """The modules show the twin."""
        return self.unit is not None and self.unit.shown

    @property
    def twin_ptr(self) -> int:
        """Where the twin's data lay when its unit was loaded."""
        return self.twin_offset + (self.unit.base if self.unit is not None else 0)

    def look(self) -> None:
        """Remember where the data lies, which version and of which type it is."""
        tensor = self.tensor
        self.ptr, self.version, self.dtype = tensor.data_ptr(), version_of(tensor), tensor.dtype

    @property
    def in_place(self) -> bool:
        """The tensor's data is still what lies in the slab, with the same type, shape and strides."""
        home, tensor = self.home, self.tensor
        return (
            home is not None
            and tensor.data_ptr() == home.data_ptr()
            and tensor.dtype == home.dtype
            and tensor.shape == home.shape
            and tensor.stride() == home.stride()
        )

    def wrap(self, data: torch.Tensor) -> torch.Tensor:
        """`data`, dressed as the master is: a Parameter or a plain tensor, same requires_grad and attributes."""
        if isinstance(self.tensor, nn.Parameter) and not isinstance(data, nn.Parameter):
            twin: torch.Tensor = nn.Parameter(data, requires_grad=self.tensor.requires_grad)
        else:
            twin = data
            if twin.requires_grad != self.tensor.requires_grad and twin.is_leaf:
                twin.requires_grad_(self.tensor.requires_grad)
        if type(twin) is type(self.tensor):
            for name, value in self.tensor.__dict__.items():
                twin.__dict__.setdefault(name, value)  # a subclass has moved its inner tensors already
        return twin

    def settle(self, slab: Slab, offset: int) -> None:
        """Let the tensor show its bytes at `offset` of `slab`, where they are already. Same object, strides kept."""
        tensor = self.tensor
        with torch.inference_mode(False):
            raw = slab.view(offset, span_nbytes(tensor)).view(tensor.dtype)
            self.home = raw.as_strided(tensor.shape, tensor.stride())
            if tensor.is_inference():
                # An inference tensor cannot be versioned or guarded like the others: make it a normal one.
                self.tensor = self.wrap(self.home.data)
                for entries, key in self.slots:
                    entries[key] = self.tensor
            else:
                tensor.data = self.home
        self.twin = self.twin_data = None
        if self.unit is not None:
            self.unit.places = None
        self.look()

    def take_home(self, shown: torch.Tensor) -> bool:
        """The tensor was cast up, and `shown`, its twin, has been cast back unwritten: its data is what lies in the slab.
        False: it is of another type or layout."""
        home = self.home
        if home is None or (shown.dtype, shown.shape, shown.stride()) != (home.dtype, home.shape, home.stride()):
            return False
        self.tensor.data = home
        self.look()
        return True

    def put(self, value: torch.Tensor) -> None:
        """Take `value`, from the device or from a changed twin, as the new truth: home in the slab where it fits."""
        home = self.home
        if (
            home is not None
            and value.dtype == home.dtype
            and value.shape == home.shape
            and value.stride() == home.stride()
        ):
            home.copy_(value)
            data = home
        else:
            data = value.detach().to("cpu", copy=True)
        if is_plain(self.tensor) or type(self.tensor) is type(data):
            self.tensor.data = data
        else:
            self.tensor = self.wrap(data)
            if self.unit is not None:
                self.unit.places = None
        if self.unit is not None:
            self.unit.changed()


def span_nbytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to past the last element, gaps included: what keeping the strides takes."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Those that have the data: the tensor itself, or what a wrapper subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from inner_tensors(getattr(tensor, name))
    else:
        yield tensor


def tensor_nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a wrapper subclass, those of its inner tensors."""
    return sum(t.numel() * t.itemsize for t in inner_tensors(tensor))


def component_nbytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, tied ones once."""
    tensors = {id(t): t for _, _, t in tensors_of(modules_of(module))}
    return sum(map(tensor_nbytes, tensors.values()))


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Every distinct module below and including `module`, parents first, in definition order."""
    found, seen, stack = [], {id(module)}, [module]
    while stack:
        current = stack.pop()
        found.append(current)
        if not current._modules:
            continue
        for child in reversed(current._modules.values()):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                stack.append(child)
    return found


def tensors_of(modules: list[nn.Module]) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every (dictionary, key, tensor) that `modules` show as parameter or buffer, non-persistent buffers included."""
    for module in modules:
        for entries in (module._parameters, module._buffers):
            for key, tensor in entries.items():
                if tensor is not None:
                    yield entries, key, tensor
