"""Units that a lossy way has rounded: what a program wrote to them on the device, told apart from what the way left.

While such a component is shown on the device, a program that reads its parameters sees rounded weights. What goes back to the
masters is what the program wrote: elements that are as they arrived are the master's, whatever was done around them.
"""

from __future__ import annotations

import torch
from prefetch_offload_kernels import build_table, cast_unit_reference

from .encoded import EncodedUnit
from .loading import Unit
from .masters import Master

_BITS = {2: torch.int16, 4: torch.int32}


def is_lossy(unit: Unit | None) -> bool:
    """What its twins show may not be what its masters have."""
    return isinstance(unit, EncodedUnit) and unit._codec is not None and not unit._codec.lossless


def written_to(master: Master, value: torch.Tensor) -> torch.Tensor:
    """The master with what was written to its twin.

    Args:
        value: what the twin has now.

    Returns:
        On the host: elements of the master where the twin's are bit for bit as they arrived, else those of `value`; `value`
        itself where nothing was rounded.
    """
    unit, home = master.unit, master.home
    if not is_lossy(unit) or home is None or not master.in_place or not home.is_floating_point():
        return value
    assert isinstance(unit, EncodedUnit)
    if (value.dtype, value.shape) != (home.dtype, home.shape) or home.itemsize not in _BITS:
        return value
    offset = home.data_ptr() - unit.slab.bytes.data_ptr()
    ours = [d for d in unit.descriptors if d.target_offset == offset]
    if not ours or ours[0].target is torch.uint8:
        return value  # it travels as it is
    bytes_ = torch.empty(offset + ours[0].target_nbytes, dtype=torch.uint8, device="cpu")  # its first pages are never touched
    cast_unit_reference(build_table(ours, "cpu"), unit.encoded.bytes, bytes_)
    arrived = bytes_[offset:].view(home.dtype).as_strided(home.shape, home.stride())
    now, bits = value.to("cpu"), _BITS[home.itemsize]
    unwritten = (now.view(bits) == arrived.view(bits)) | (now.isnan() & arrived.isnan())
    return torch.where(unwritten, home, now)
