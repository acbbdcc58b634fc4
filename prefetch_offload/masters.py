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

from .host import Pins, Slab
from .units import align

if TYPE_CHECKING:
    from .addresses import Addresses

DEVICE_GRAIN = 512  # the caching allocator's: what a tensor allocated alone really takes
_SAMPLES = 16  # per tensor, spread evenly, first and last word included: about 1 ms per GB of SDXL-like tensors


def version_of(tensor: torch.Tensor) -> int:
    """The tensor's version counter; 0 for an inference tensor, which has none."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def is_plain(tensor: torch.Tensor) -> bool:
    """Bytes, shape and strides say all there is about it: it can live in a slab."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
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


class Unit:
    """What moves together. Subclasses say how.

    Attributes:
        key: its name on the device, unique (``unet#1/0``).
        nbytes: device bytes when resident, as the allocator counts them.
        masters: what it holds.
        prefetchable: can be copied ahead of use.
        payload_nbytes: bytes that a copy puts on the link.
        travels_encoded: they are not those that it has on the device.
        copied: after the last copy out of host memory; until it has happened that memory may not be given back.
        fresh: its twins are new objects, which the modules do not show yet.
        shown: its component's modules show its twins.
        base: the device address of what it holds, when it was last loaded; 0: its tensors lie each for itself.
        places: (dictionary, key, master's tensor, twin) of every place that shows one of them; None: to be looked up.
        versions: of the twins of its masters, when `places` were looked up.
        checked: since its component was last bound, the twins are known to require gradients where the masters do.
    """

    prefetchable = False
    travels_encoded = False

    def __init__(self, key: str, nbytes: int, payload_nbytes: int, masters: list[Master]) -> None:
        self.key, self.nbytes, self.payload_nbytes, self.masters = key, nbytes, payload_nbytes, masters
        self.copied: torch.Event | None = None
        self.fresh = False
        self.shown = self.checked = False
        self.base = 0
        self.places: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] | None = None
        self.versions: list[int] = []
        self.twins: list[torch.Tensor] = []  # those that the versions are of

    @property
    def host_nbytes(self) -> int:
        """Host memory that it holds."""
        return self.payload_nbytes

    @property
    def filed_nbytes(self) -> int:
        """Bytes that it holds in files instead."""
        return 0

    @property
    def present(self) -> bool:
        """It has device memory, and its twins show it."""
        return all(m.twin is not None for m in self.masters)

    def allocate(self, device: torch.device) -> None:
        """Take device memory, on the current stream. Raises torch.OutOfMemoryError and is as before."""
        raise NotImplementedError

    def free(self, after: torch.Event | None = None) -> None:
        """Give the device memory back to the current order of the stream it was allocated on; where that has no order of its
        own, once `after` has happened."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Leave the device memory to the twins that show it."""
        self.places = None
        for master in self.masters:
            master.twin = master.twin_data = None

    def outlived(self) -> None:
        """Its component is gone: nobody is known to need its masters."""

    def retire(self) -> None:
        """Give up what the unit holds of the host; its tensors keep their data."""

    def changed(self) -> None:
        """A master is not what it was when it last travelled: written back from the device, or by hand."""

    def sample(self) -> None:
        """Remember a fingerprint of the master bytes: device and host are equal now, or will be when the copy arrives."""

    def stale(self) -> bool:
        """The master was written since it was last sampled, without a mark that a version counter shows."""
        return False


class SlabUnit(Unit):
    """Masters in a slab, copied as one contiguous run of bytes."""

    def __init__(self, key: str, slab: Slab, masters: list[Master]) -> None:
        super().__init__(key, align(slab.nbytes, DEVICE_GRAIN), slab.nbytes, masters)
        self.slab = slab
        self.bytes: torch.Tensor | None = None  # [slab.nbytes] uint8 on the device; its storage is empty unless resident
        self.addresses: Addresses | None = None  # which give it its address for life, if it has one
        self._offsets: list[int] = []
        self._sample_index: torch.Tensor | None = None
        self._sample: torch.Tensor | None = None

    @property
    def source(self) -> Slab:
        """What travels."""
        return self.slab

    @property
    def prefetchable(self) -> bool:  # type: ignore[override]
        return self.source.pinned

    @property
    def present(self) -> bool:
        if self.addresses is not None:
            return self.addresses.holds(self)
        return self.bytes is not None and self.bytes.untyped_storage().nbytes() > 0

    @property
    def intact(self) -> bool:
        """The data of all masters is what lies in this slab. A tensor may lie in another one that nothing came of."""
        base = self.slab.bytes.data_ptr()
        return all(
            m.in_place and m.home is not None and m.home.data_ptr() == base + offset
            for m, offset in zip(self.masters, self._offsets, strict=True)
        )

    def place(self, offsets: list[int]) -> None:
        """Masters lie at these byte offsets of the slab."""
        self._offsets = offsets
        words = []
        for master, offset in zip(self.masters, offsets, strict=True):
            last = span_nbytes(master.tensor) - 1
            words += [(offset + last * i // (_SAMPLES - 1)) // 8 for i in range(_SAMPLES)]
        self._sample_index = torch.tensor(sorted(set(words)), dtype=torch.int64, device="cpu")

    def allocate(self, device: torch.device) -> None:
        if self.addresses is not None:
            self.bytes = self.addresses.map(self)
        elif self.bytes is None:
            with torch.inference_mode(False):
                self.bytes = torch.empty(self.slab.nbytes, dtype=torch.uint8, device=device)
        else:
            self.bytes.untyped_storage().resize_(self.slab.nbytes)
        self.base = self.bytes.data_ptr()
        if self.places is not None:
            return  # all twins are there, as they were last shown: the most frequent case by far
        for master, offset in zip(self.masters, self._offsets, strict=True):
            if master.twin is None:
                self._make_twin(master, offset)
            master.twin_offset = offset

    def _make_twin(self, master: Master, offset: int) -> None:
        self.fresh, self.places = True, None
        with torch.inference_mode(False):
            # Like its home: the tensor may have changed since, which the component's next entry takes in.
            master.twin_data = self._view(master.home if master.home is not None else master.tensor, offset)
            master.twin = master.wrap(master.twin_data.detach())
            master.twin_version = master.twin._version

    def _view(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        assert self.bytes is not None
        raw = self.bytes[offset : offset + span_nbytes(tensor)].view(tensor.dtype)
        # .data: a version counter of its own, which copies into the unit do not advance
        return raw.as_strided(tensor.shape, tensor.stride()).data

    def free(self, after: torch.Event | None = None) -> None:
        if self.addresses is not None:
            self.addresses.unmap(self, after)
        elif self.bytes is not None:
            self.bytes.untyped_storage().resize_(0)

    def abandon(self) -> None:
        super().abandon()
        if self.addresses is not None:
            self.addresses.hand_over(self)
        self.bytes = None

    def settle_at(self, addresses: Addresses | None) -> None:
        """Have an address for life from when it is next loaded, or none any more. The unit is not on the device; its twins are
        made anew."""
        if addresses is self.addresses:
            return
        nbytes = align(self.slab.nbytes, DEVICE_GRAIN)
        if addresses is not None:
            nbytes = addresses.rounded(self.slab.nbytes)
        if self.addresses is not None:
            self.addresses.forget(self)
        self.addresses, self.bytes, self.nbytes = addresses, None, nbytes
        super().abandon()

    def pin(self, pins: Pins) -> None:
        """Pin what travels, if it is not pinned and there is room by now. It has not travelled yet."""
        before = self.slab.bytes.data_ptr()
        if not self.source.pinned:
            pins.pin(self.source)
            self._follow(before)

    def retire(self) -> None:
        self.settle_at(None)
        before = self.slab.bytes.data_ptr()
        self.slab.unpin()
        self._follow(before)

    def _follow(self, before: int) -> None:
        """The slab lay at `before`: let the masters show where it lies now."""
        if self.slab.bytes.data_ptr() != before:  # it is the backend's pinned memory, or was: that is no place to stay
            for master, offset in self._own(before):
                master.settle(self.slab, offset)

    def _own(self, base: int) -> list[tuple[Master, int]]:
        """Masters whose data lie in the slab, which begins at address `base`, and where. Not those that another unit has taken
        in by now, even if it was interrupted before it could say so."""
        pairs = zip(self.masters, self._offsets, strict=True)
        return [(m, o) for m, o in pairs if m.unit is self and m.in_place and m.tensor.data_ptr() == base + o]

    def sample(self) -> None:
        self._sample = self._gather()

    def stale(self) -> bool:
        return self._sample is not None and not torch.equal(self._sample, self._gather())

    def _gather(self) -> torch.Tensor:
        assert self._sample_index is not None
        return self.slab.bytes.view(torch.int64)[self._sample_index]

    def rewritten(self) -> list[Master]:
        """Masters whose device copy was written without a mark (``p.data += x``). The host waits for the caller's stream."""
        return self._differing(self._sample) if self._sample is not None else []

    def _differing(self, sample: torch.Tensor) -> list[Master]:
        """Masters whose device copy differs from a fingerprint."""
        if self._sample_index is None or self.bytes is None:
            return []
        shown = self._on_device()
        words = set(self._sample_index[shown != sample].tolist())
        return [
            master
            for master, offset in zip(self.masters, self._offsets, strict=True)
            if words and not words.isdisjoint(range(offset // 8, (offset + span_nbytes(master.tensor) - 1) // 8 + 1))
        ]

    def _on_device(self) -> torch.Tensor:
        """The fingerprint's words as the device has them now. The host waits."""
        assert self.bytes is not None and self._sample_index is not None
        return self.bytes.view(torch.int64)[self._sample_index.to(self.bytes.device)].cpu()


class CarriedUnit(Unit):
    """Tensors that travel by their own ``.to()``: subclasses (torchao, GGUF), and what changed within a call."""

    def __init__(self, key: str, masters: list[Master]) -> None:
        sizes = [tensor_nbytes(m.tensor) for m in masters]
        super().__init__(key, sum(align(n, DEVICE_GRAIN) for n in sizes), sum(sizes), masters)

    def allocate(self, device: torch.device) -> None:
        made: list[torch.Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for master in self.masters:
                tensor = master.tensor
                if is_plain(tensor):
                    data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    made.append(master.wrap(data.copy_(tensor)))
                else:
                    made.append(master.wrap(tensor.to(device)))
        self.fresh, self.places = True, None
        for master, twin in zip(self.masters, made, strict=True):
            master.twin, master.twin_offset, master.twin_version = twin, twin.data_ptr(), version_of(twin)

    def free(self, after: torch.Event | None = None) -> None:
        self.abandon()


def span_nbytes(tensor: torch.Tensor) -> int:
    """Bytes from the first to past the last element, gaps included: what keeping the strides takes."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def tensor_nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a wrapper subclass, those of its inner tensors."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.itemsize


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
