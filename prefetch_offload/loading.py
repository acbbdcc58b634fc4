"""Units: what moves together, and how it takes device memory. See [Note: host masters] in masters.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .host import Pins, Slab
from .masters import Master, inner_tensors, is_plain, span_nbytes, tensor_nbytes, version_of
from .units import device_nbytes

if TYPE_CHECKING:
    from .addresses import Addresses

_SAMPLES = 16  # per tensor, spread evenly, first and last word included: about 1 ms per GB of SDXL-like tensors


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

    def lend(self, stream: torch.Stream) -> None:
        """What holds on to the device memory may read it on `stream` once the unit has gone: the allocator waits for what is
        there by the time that the last of them lets go."""
        for master in self.masters:
            if master.twin is not None:
                for tensor in inner_tensors(master.twin):
                    tensor.record_stream(stream)

    def abandon(self) -> None:
        """Leave the device memory to those who hold on to its twins."""
        self.places, self.twins, self.versions = None, [], []
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
        super().__init__(key, device_nbytes(slab.nbytes), slab.nbytes, masters)
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
                self.bytes = torch.empty(self.nbytes, dtype=torch.uint8, device=device)[: self.slab.nbytes]
        else:
            self.bytes.untyped_storage().resize_(self.nbytes)
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

    def lend(self, stream: torch.Stream) -> None:
        # Memory behind an address for life is not the allocator's; it is unmapped when the device has done everything.
        if self.addresses is None and self.bytes is not None:
            self.bytes.record_stream(stream)

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
        nbytes = device_nbytes(self.slab.nbytes)
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
        super().__init__(key, sum(map(device_nbytes, sizes)), sum(sizes), masters)

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
