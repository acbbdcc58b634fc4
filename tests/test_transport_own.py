"""A codec that the package does not know: no line of the engine is touched for it. And the one in the documentation."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weight_nbytes
from prefetch_offload_kernels import Descriptor
from test_transport_codecs import UNITS, build, draw, encoded_units, resident, small_chunks, weights
from torch import nn

import prefetch_offload
from prefetch_offload import Codec, SettingError

__all__ = ["small_chunks"]  # the fixture, for these tests too


@dataclasses.dataclass(frozen=True)
class ToyRecipe:
    """Int8 in steps of a 20th of the mean, a scale in front of them."""

    piece: Any
    scale: float

    @property
    def nbytes(self) -> int:
        return 16 + self.piece.flat.numel()

    def write(self, out: torch.Tensor) -> None:
        out[:16].view(torch.float32).fill_(self.scale)
        out[16:].view(torch.int8).copy_((self.piece.flat.float() / self.scale).round().clamp(-100, 100))

    def descriptor(self, source: int, target: int) -> Descriptor:
        elements, dtype = self.piece.flat.numel(), self.piece.tensor.dtype
        return Descriptor(source + 16, target, elements, torch.int8, dtype, scale_offset=source, name=self.piece.name)


class Toy(Codec):
    name = "toy"

    def recipe(self, piece: Any) -> ToyRecipe | None:
        if piece.tensor is None or piece.tensor.dtype != torch.bfloat16 or piece.tensor.dim() < 2:
            return None
        return ToyRecipe(piece, float(piece.flat.float().abs().mean()) / 20)


def toy_rounded(pipe: Any, components: tuple[str, ...] = ()) -> None:
    for name, p in weights(pipe):
        if p.dim() > 1 and (not components or name.split(".")[0] in components):
            step = torch.tensor(float(p.float().abs().mean()) / 20)
            p.copy_(((p.float() / float(step)).round().clamp(-100, 100) * step).to(p.dtype))


def only_the_transformer(pipe: Any) -> None:
    toy_rounded(pipe, ("transformer",))


@pytest.mark.parametrize("share", [None, 0.4])
def test_a_codec_of_ones_own(share: float | None, sim: Any, enable: Any) -> None:
    expected = resident("flux", toy_rounded)
    assert expected[0] != resident("flux")[0], "or the test shows nothing"
    pipe = build("flux")
    before = {key: p.clone() for key, p in weights(pipe)}
    budget = None if share is None else int(share * weight_nbytes(pipe))
    offload = enable(pipe, transport=Toy(), budget=budget, **UNITS)
    assert [draw("flux", pipe, seed) for seed in range(3)] == expected
    stats = offload.stats
    assert share is not None or 0.5 <= stats.h2d_nbytes / sum(c.nbytes for c in stats.components) <= 0.56
    offload.disable()
    assert all(torch.equal(before[key], p) for key, p in weights(pipe)), "the host's weights are exact"


def test_a_codec_of_ones_own_for_a_component(sim: Any, enable: Any) -> None:
    pipe, toy = build("flux"), Toy()
    offload = enable(pipe, transport={"transformer": toy, "default": "packed"}, **UNITS)
    expected = resident("flux", only_the_transformer)
    assert [draw("flux", pipe, seed) for seed in range(3)] == expected
    before = [u.key for u in encoded_units(offload)]
    enable(pipe, transport={"default": "packed", "transformer": toy}, **UNITS)
    assert draw("flux", pipe) == expected[0]
    assert [u.key for u in encoded_units(offload)] == before, "the same setting: nothing is encoded anew"
    enable(pipe, transport={"transformer": "raw"}, **UNITS)
    assert draw("flux", pipe) == resident("flux")[0]
    assert not encoded_units(offload)


def test_what_it_says_of_overflow_is_refused(sim: Any) -> None:
    class Strict(Toy):
        def overflows(self, piece: Any) -> int:
            return 5 if piece.name.endswith("proj_out.weight") else 0

    with pytest.raises(SettingError, match=r"transport='toy': \d+ finite weights of transformer in \d+ tensors \(the most, 5"):
        prefetch_offload.enable(build("flux"), device="simgpu", transport={"transformer": Strict()}, **UNITS)


def test_it_is_told_what_it_is_for(sim: Any, enable: Any) -> None:
    asked: list[tuple[nn.Module, torch.device]] = []

    class Asking(Toy):
        def on(self, module: nn.Module, device: torch.device) -> Codec:
            asked.append((module, device))
            return self

    pipe = build("flux")
    enable(pipe, transport={"vae": Asking()}, **UNITS)
    draw("flux", pipe)
    assert {id(module) for module, _ in asked} == {id(pipe.vae)}
    assert {device.type for _, device in asked} == {"cpu", "simgpu"}, "checked beforehand, then used"


def test_the_documented_one(sim: Any, enable: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "transport.md").read_text()
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    assert "prefetch_offload.enable(pipe, " in code
    pipe = build("flux")
    names: dict[str, Any] = {"pipe": pipe, "enable": functools.partial(enable, **UNITS)}
    exec(code.replace("prefetch_offload.enable(", "enable("), names)
    expected = resident("flux")
    assert draw("flux", pipe) not in expected
    moved = {c.name: c.link_nbytes / c.nbytes for c in names["offload"].stats.components}
    assert 0.5 <= moved["transformer"] <= 0.56 and all(r >= 0.99 for n, r in moved.items() if n != "transformer")
    names.clear()
