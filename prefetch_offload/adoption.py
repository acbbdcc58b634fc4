"""Taking a component's tensors into slabs, tensor by tensor, so that the host never holds two copies of a model."""

from __future__ import annotations

import ctypes
import dataclasses

import torch
from torch import nn

from .config import Settings
from .encoded import TENSORS_BESIDE, EncodedUnit
from .encoding import Codec, Piece
from .errors import UnsupportedError
from .host import Pins, Slab, trim
from .loading import CarriedUnit, SlabUnit, Unit
from .masters import Master, component_nbytes, is_plain, modules_of, span_nbytes, tensor_nbytes, tensors_of
from .originals import FileSlab
from .points import find_points, least_nbytes
from .units import DEVICE_GRAIN, Extent, align, cut, device_nbytes, order_of_use


def check_tensors(name: str, module: nn.Module) -> None:
    """Refuse what cannot be offloaded, before anything has been changed.

    Raises:
        UnsupportedError: tensors on the meta device, or sharded ones (DTensor).
    """
    for key, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if tensor.device.type == "meta":
            raise UnsupportedError(
                f"{name}.{key} is on the meta device: it has a shape but no values, so there is nothing to offload. "
                "Load the weights first (`from_pretrained`, or `load_state_dict(..., assign=True)`), then enable."
            )
        if hasattr(tensor, "device_mesh"):
            raise UnsupportedError(
                f"{name}.{key} is a DTensor, sharded over several devices. Offload keeps whole components on one device: "
                "undo the parallelism (`tensor.full_tensor()`) or do not offload this pipeline."
            )


def needs_native_move(module: nn.Module) -> bool:
    """Whether the module's weights keep state outside of their tensors, so that only its own `.to()` can move them."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return any(type(p).__name__ in ("Params4bit", "Int8Params") for p in module.parameters())


@dataclasses.dataclass
class _Shared:
    """Masters whose bytes overlap, and the range [lo, hi) of addresses that they cover."""

    lo: int
    hi: int
    members: list[Master]


def _shared_ranges(masters: list[Master]) -> list[_Shared]:
    """Group masters that overlap in memory; in the order of their first member.

    By address, not by storage: in a slab each tensor has a storage of its own, overlapping or not.
    """
    ranges: dict[int, _Shared] = {}
    current: _Shared | None = None
    for master in sorted(masters, key=lambda m: m.tensor.data_ptr()):
        lo = master.tensor.data_ptr()
        hi = lo + span_nbytes(master.tensor)
        if current is None or lo >= current.hi:
            current = _Shared(lo, hi, [])
        current.hi = max(current.hi, hi)
        current.members.append(master)
        ranges[id(master)] = current
    found = list({id(r): r for m in masters for r in [ranges[id(m)]]}.values())
    for shared in found:
        # From a multiple of 16, so that a wider type further on stays aligned in its slab. It is of the same page.
        shared.lo -= shared.lo % 16 if len(shared.members) > 1 else 0
    return found


def build_units(
    prefix: str, masters: list[Master], settings: Settings, pins: Pins, codec: Codec | None = None
) -> list[Unit]:
    """Units for `masters`, whose tensors' data move into slabs. Tensor objects stay the same.

    Args:
        prefix: keys of the units are ``{prefix}/{name}``.
        masters: in definition order; every tensor on the host.
        codec: how they travel; None: as they are, which is also how units travel that it has nothing to offer for.

    Returns:
        Units in order of use as far as names tell it, carried tensors last. Slabs are pinned as far as the host allows.
    """
    plain = [m for m in masters if is_plain(m.tensor) and m.tensor.numel()]
    carried = [m for m in masters if not (is_plain(m.tensor) and m.tensor.numel())]
    ranges = _shared_ranges(plain)
    ranges = [ranges[i] for i in order_of_use([r.members[0].name for r in ranges])]
    extents = [Extent(r.members[0].name, r.hi - r.lo) for r in ranges]
    units: list[Unit] = []
    for number, layout in enumerate(cut(extents, settings.unit_min, settings.unit_max)):
        if codec is not None:
            trim()  # a model's tensors come from the heap, which keeps what the last unit has left
        slab = Slab(align(layout.nbytes, 8))
        members: list[Master] = []
        offsets: list[int] = []
        parts: list[tuple[int, int, list[Master]]] = []
        for placement in layout.placements:
            shared = ranges[placement.extent]
            _move(shared, slab, placement.offset)
            for master in shared.members:
                assert master.home is not None
                members.append(master)
                offsets.append(master.home.data_ptr() - slab.bytes.data_ptr())
            parts.append((placement.offset, shared.hi - shared.lo, shared.members))
        key = f"{prefix}/{number}:{layout.name}"
        recipes = [codec.recipe(Piece.of(*part)) for part in parts] if codec is not None else []
        if codec is not None and any(recipes):
            encoded = EncodedUnit(key, slab, members, parts, codec, pins)
            encoded.place(offsets)
            encoded.encode(recipes)
            del recipes, slab  # which hold on to the memory that the file stands in for
            encoded.put_away(settings.originals)
            units.append(encoded)
            continue
        pins_before = slab.bytes.data_ptr()
        pins.pin(slab)
        if slab.bytes.data_ptr() != pins_before:  # the backend's pinned allocator: the slab has moved
            for master, offset in zip(members, offsets, strict=True):
                master.settle(slab, offset)
        unit = SlabUnit(key, slab, members)
        unit.place(offsets)
        units.append(unit)
    if carried:
        for master in carried:
            master.home = master.twin = master.twin_data = master.unit = None
            master.look()
        units.append(CarriedUnit(f"{prefix}/carried", carried))
    trim()
    return units


def give_up(unit: Unit) -> None:
    """All of the unit's tensors are about to be taken into others: what it holds of the host besides them goes now, and what
    they lie in goes with the last of them. Nothing is being copied from it, and it is not on the device."""
    if type(unit) is EncodedUnit:
        unit.dirty = True
        unit.settle_at(None)
        unit.encoded.unpin()
        unit.table, unit.encoded = None, Slab(8)
        if isinstance(unit.slab, FileSlab):
            return
    elif type(unit) is SlabUnit:
        unit.retire()
    else:
        return
    unit.slab = Slab(8)


def _move(shared: _Shared, slab: Slab, offset: int) -> None:
    nbytes = shared.hi - shared.lo
    with torch.inference_mode(False), torch.no_grad():
        source = torch.frombuffer((ctypes.c_char * nbytes).from_address(shared.lo), dtype=torch.uint8)
        slab.view(offset, nbytes).copy_(source)
        starts = [m.tensor.data_ptr() - shared.lo for m in shared.members]
        for master, start in zip(shared.members, starts, strict=True):
            master.settle(slab, offset + start)


@dataclasses.dataclass(frozen=True)
class Least:
    """The fewest device bytes that a component can run in.

    Attributes:
        weights_nbytes: its weights, streamed.
        payloads_nbytes: what each of its units that travel encoded puts on the link.
        tables_nbytes: what its encoded units have there for good.
    """

    weights_nbytes: int
    payloads_nbytes: tuple[int, ...] = ()
    tables_nbytes: int = 0


def least_of(module: nn.Module, settings: Settings, codec: Codec | None = None) -> Least:
    """What a component needs. Nothing is moved, and no value looked at: a sketch of its units will do.

    Args:
        codec: how it travels; None: raw.
    """
    if needs_native_move(module):
        return Least(component_nbytes(module))
    module = module.__dict__.get("_orig_mod") or module._modules.get("_orig_mod") or module
    masters: dict[int, Master] = {}
    for entries, key, tensor in tensors_of(modules_of(module)):
        masters.setdefault(id(tensor), Master(tensor, "", [])).slots.append((entries, key))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        masters[id(tensor)].name = name
    ordered = list(masters.values())
    ordered = [ordered[i] for i in order_of_use([m.name for m in ordered])]
    extents = [Extent(m.name, tensor_nbytes(m.tensor)) for m in ordered]
    units = [
        Unit(f"{number}", device_nbytes(layout.nbytes), layout.nbytes, [ordered[p.extent] for p in layout.placements])
        for number, layout in enumerate(cut(extents, settings.unit_min, settings.unit_max))
    ]
    points, must = find_points(module, units)
    weights = least_nbytes({u.key: u.nbytes for u in units}, points, must)
    if codec is None:
        return Least(weights)
    sizes = [(sum(m.tensor.nbytes for m in u.masters), sum(_least_encoded(m, codec) for m in u.masters)) for u in units]
    encoded = [nbytes for whole, nbytes in sizes if nbytes < whole]
    return Least(weights, tuple(encoded), len(encoded) * TENSORS_BESIDE * DEVICE_GRAIN)


def _least_encoded(master: Master, codec: Codec) -> int:
    tensor = master.tensor
    if not is_plain(tensor) or not tensor.numel():
        return tensor.nbytes
    piece = Piece.of(0, span_nbytes(tensor), [dataclasses.replace(master, home=tensor)])
    return codec.least_nbytes(piece) if piece.tensor is not None else piece.nbytes
