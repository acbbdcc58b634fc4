"""Host memory that is pinned again: after a refusal, after an edit, and made under inference mode."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from conftest import DEVICE, assert_same, images_of, resident
from torch import nn

from prefetch_offload import OffloadWarning
from prefetch_offload.host import Pins, Slab
from prefetch_offload.loading import SlabUnit
from prefetch_offload.testing.pipelines import CASES


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("way", ["raw", "packed"])
def test_what_is_made_under_inference_mode_can_be_written_outside_of_it(
    way: str, registers: bool, sim: Any, enable: Any, monkeypatch: Any
) -> None:
    """The ring, and the slabs of what is encoded anew."""
    if not registers:
        monkeypatch.delattr(torch.get_device_module(DEVICE), "cudart")
    expected = resident("flux", torch.bfloat16)
    pipe = CASES["flux"].build(dtype=torch.bfloat16)
    with pytest.warns(OffloadWarning, match="limit of"):
        offload = enable(pipe, transport=way, pinned_limit=64 << 10, staging=32 << 10, unit_min=1 << 10, unit_max=64 << 10)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.neg_()
    with torch.inference_mode():
        assert images_of("flux", pipe)[0].tobytes() != expected[0].tobytes()
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.neg_()
    offload.release()
    assert_same(images_of("flux", pipe), expected)
    units = [u for c in offload._session.client.components.values() for u in c.units if isinstance(u, SlabUnit)]
    assert not any(u.slab.bytes.is_inference() or u.source.bytes.is_inference() for u in units)
    assert not any(slot.is_inference() for slot in offload._engine.pins.ring().slots)


@pytest.mark.parametrize("who", ["limit", "host", "host by allocator"])
def test_what_was_refused_is_pinned_once_there_is_room(who: str, sim: Any, enable: Any, monkeypatch: Any) -> None:
    """Encoded anew, a unit keeps its pin; and units that become smaller get one."""
    if who == "host by allocator":
        monkeypatch.delattr(torch.get_device_module(DEVICE), "cudart")
    pipe = CASES["flux"].build(dtype=torch.float32)
    nbytes = {n: sum(p.nbytes for p in m.parameters()) for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    room = sum(nbytes.values()) - nbytes["transformer"] // 4
    settings = {"unit_min": 1 << 10, "unit_max": 64 << 10, "staging": 8 << 10}
    limited: dict[str, Any] = {**settings, "pinned_limit": room} if who == "limit" else settings
    if who != "limit":
        sim.pin_limit(room)
    with pytest.warns(OffloadWarning, match="could not pin"):
        offload = enable(pipe, transport="raw", **limited)
    images_of("flux", pipe)

    def pinned() -> int:
        units = [u for c in offload._session.client.components.values() for u in c.units if isinstance(u, SlabUnit)]
        return sum(u.source.nbytes for u in units if u.source.pinned)

    assert room - (64 << 10) <= pinned() + (16 << 10) <= room + (16 << 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OffloadWarning)  # while the old and the new units of a component are there
        enable(pipe, transport=torch.float16, **limited)
    assert pinned() < room and all(c.pinned for c in offload.stats.components), "all of it fits now"
    before = pinned()
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.mul_(1.5)
    offload.release()
    images_of("flux", pipe)
    assert pinned() == before
    sim.pin_limit(-1)


def test_after_an_edit_of_all_weights_as_much_is_pinned_as_before(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build(dtype=torch.bfloat16)
    room = sum(p.nbytes for p in pipe.transformer.parameters())
    with pytest.warns(OffloadWarning, match="limit of"):
        offload = enable(
            pipe, transport="fp8", pinned_limit=room // 2, staging=8 << 10, unit_min=1 << 10, unit_max=64 << 10
        )
    images_of("flux", pipe)
    before = offload.stats.pinned_nbytes
    with torch.no_grad():
        for m in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            for p in m.parameters():
                p.mul_(1.5)
    offload.release()
    images_of("flux", pipe)
    assert offload.stats.pinned_nbytes == before


def test_a_host_that_has_refused_is_not_asked_for_what_it_cannot_have() -> None:
    asked: list[int] = []
    held: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            asked.append(nbytes)
            if sum(held.values()) + nbytes > 3 * 4096:
                return 2
            held[address] = nbytes
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            del held[address]
            return 0

        def cudaGetLastError(self) -> int:
            return 0

    pins = Pins(torch.device(DEVICE, 0), limit=1 << 20)
    pins._cudart = Runtime()
    slabs = [Slab(4096) for _ in range(6)]
    with pytest.warns(OffloadWarning, match="registering memory failed with code 2") as caught:
        assert [pins.pin(slab) for slab in slabs] == [True] * 3 + [False] * 3
    assert len(caught) == 1 and len(asked) == 4, "the first refusal is believed"
    slabs[0].unpin()
    assert not pins.pin(Slab(8192)) and len(asked) == 4, "more than was given up"
    assert [pins.pin(slab) for slab in slabs] == [True] * 3 + [False] * 3 and len(asked) == 5
    del slabs[1]
    gc.collect()
    assert pins.pin(slabs[3]) and len(asked) == 6
    for slab in slabs:
        slab.unpin()
    assert pins.nbytes == 0 == len(held)
