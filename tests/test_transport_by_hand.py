"""Components that a lossy transport has rounded and that are shown on the device outside of any call: what a program does to
them is done to the exact weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from peft import LoraConfig
from safetensors.torch import load_file
from test_transport_codecs import UNITS, build, draw, encoded_units, fp8_rounded, resident, small_chunks, weights

__all__ = ["small_chunks"]  # for every test here, too

State = dict[str, torch.Tensor]


def shown_by_hand(enable: Any) -> tuple[Any, Any, State]:
    """The pipeline, its handle, and the exact weights of the encoder that is shown on the device."""
    pipe = build("flux")
    exact = {key: p.clone() for key, p in pipe.text_encoder_2.state_dict().items()}
    offload = enable(pipe, transport="fp8", **UNITS)
    with torch.no_grad():
        pipe.text_encoder_2(torch.arange(9, device=DEVICE)[None])
    shown = dict(pipe.text_encoder_2.named_parameters())
    assert all(p.device.type == DEVICE for p in shown.values())
    assert any(not torch.equal(p.detach().cpu(), exact[key]) for key, p in shown.items()), "or the test shows nothing"
    return pipe, offload, exact


def same(found: Any, exact: State) -> bool:
    return all(torch.equal(p.detach().cpu(), exact[key]) for key, p in found.items() if key in exact) and len(found) > 10


def saved(encoder: Any, folder: Path) -> State:
    encoder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


LOOKS: dict[str, Callable[[Any, Path], Any]] = {
    "state_dict": lambda encoder, _: encoder.state_dict(),
    "save_pretrained": saved,
    "deepcopy": lambda encoder, _: dict(copy.deepcopy(encoder).named_parameters()),
    "pickle": lambda encoder, _: dict(pickle.loads(pickle.dumps(encoder)).named_parameters()),
    "to": lambda encoder, _: dict(encoder.to("cpu").named_parameters()),
    "float": lambda encoder, _: dict(copy.deepcopy(encoder).float().bfloat16().named_parameters()),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_at_all_weights_meets_the_exact_ones(look: str, sim: Any, enable: Any, tmp_path: Path) -> None:
    pipe, offload, exact = shown_by_hand(enable)
    assert same(LOOKS[look](pipe.text_encoder_2, tmp_path), exact)
    assert draw("flux", pipe) == resident("flux", fp8_rounded)[0]
    offload.disable()
    assert same(pipe.text_encoder_2.state_dict(), exact)


def test_what_is_left_on_the_device_is_exact(sim: Any, enable: Any) -> None:
    pipe, offload, exact = shown_by_hand(enable)
    with torch.no_grad():
        pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight.zero_()
    exact["encoder.block.0.layer.0.SelfAttention.q.weight"].zero_()
    pipe.remove_all_hooks()
    found = dict(pipe.text_encoder_2.named_parameters())
    assert {p.device.type for p in found.values()} == {DEVICE} and same(found, exact)
    pipe.to("cpu")
    offload.disable()
    assert same(dict(pipe.text_encoder_2.named_parameters()), exact)


def test_what_is_loaded_is_what_was_given(sim: Any, enable: Any) -> None:
    pipe, offload, exact = shown_by_hand(enable)
    given = {key: (p * 1.3).clone() for key, p in exact.items()}
    pipe.text_encoder_2.load_state_dict(given)
    offload.disable()
    assert same(dict(pipe.text_encoder_2.named_parameters()), given)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("write", ["all of it, as it was", "most rows", "moved away and back"])
def test_a_write_changes_what_it_writes_and_nothing_else(write: str, marked: bool, sim: Any, enable: Any) -> None:
    pipe, offload, exact = shown_by_hand(enable)
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    p = pipe.text_encoder_2.get_parameter(key)
    with torch.no_grad():
        target = p if marked else p.data
        if write == "most rows":
            target[3:] = 0.5
            exact[key][3:] = 0.5
        elif write == "moved away and back":
            p.data = p.data.clone()
        else:
            target.add_(0.0)
    offload.show_masters()
    assert same(dict(pipe.text_encoder_2.named_parameters()), exact)
    assert pipe.text_encoder_2.get_parameter(key).device.type == "cpu"
    draw("flux", pipe)
    offload.disable()
    assert same(dict(pipe.text_encoder_2.named_parameters()), exact)


def test_adapters_are_fused_into_the_exact_weights(sim: Any, enable: Any) -> None:
    def adapted() -> Any:
        pipe = build("flux")
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
        return pipe

    plain, pipe = adapted(), adapted()
    plain.transformer.fuse_lora()
    offload = enable(pipe, transport="fp8", **UNITS)
    hook = pipe.transformer._hf_hook
    hook.pre_forward(pipe.transformer)
    assert pipe.transformer.proj_out.weight.device.type == DEVICE
    pipe.transformer.fuse_lora()
    offload.disable()
    assert same(dict(pipe.transformer.named_parameters()), plain.transformer.state_dict())


def test_lossless_ways_are_shown_as_before(sim: Any, enable: Any) -> None:
    """What looks at the weights leaves them on the device, as stock does."""
    pipe = build("flux")
    offload = enable(pipe, transport="packed", **UNITS)
    with torch.no_grad():
        pipe.text_encoder_2(torch.arange(9, device=DEVICE)[None])
    assert {p.device.type for p in pipe.text_encoder_2.state_dict().values()} == {DEVICE}
    assert encoded_units(offload) and len(weights(pipe)) > 10
