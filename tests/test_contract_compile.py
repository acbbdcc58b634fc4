"""torch.compile in every way a program asks for it, before and after `enable`: whole graphs, compiled once, and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_same, resident
from contracts import assert_right, hooked, on_host, parts, pixels

from prefetch_offload.testing.pipelines import CASES, lora_state_dict


class Backend:
    """Runs graphs as they are; counts how many were compiled and how often one ran."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return module.forward(*args)

        return run


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def _module_compile(pipe: Any, options: dict[str, Any]) -> None:
    pipe.transformer.compile(**options)


def _wrapped(pipe: Any, options: dict[str, Any]) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **options)


def _decode(pipe: Any, options: dict[str, Any]) -> None:
    pipe.vae.decode = torch.compile(pipe.vae.decode, **options)


def _blocks(pipe: Any, options: dict[str, Any]) -> None:
    pipe.transformer.compile_repeated_blocks(**options)


def _encoder(pipe: Any, options: dict[str, Any]) -> None:
    pipe.text_encoder_2.compile(**options)


MODES = [_module_compile, _wrapped, _decode, _blocks, _encoder]
Mode = Callable[[Any, dict[str, Any]], None]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", MODES, ids=lambda f: f.__name__.strip("_"))
def test_whole_graphs_compiled_once_and_used_in_every_call(
    mode: Mode, when: str, backend: Backend, sim: Any, enable: Any
) -> None:
    expected = resident("flux", torch.float32)
    pipe = CASES["flux"].build()
    options = {"backend": backend, "fullgraph": mode is not _encoder}
    if when == "before":
        mode(pipe, options)
    offload = enable(pipe)
    if when == "after":
        if mode is not _decode:  # with weights that have been on the device, and without
            assert_same([pixels("flux", pipe, steps=2)], expected[:1])
        mode(pipe, options)
    seen = []
    for seed, image in enumerate(expected):
        assert_same([np.asarray(CASES["flux"].call(pipe, seed=seed))], [image])
        seen.append((backend.graphs, backend.runs))
    assert seen[0][0] > 0
    assert seen[2][0] == seen[1][0] == seen[0][0], "nothing recompiles"
    assert 0 < seen[0][1] < seen[1][1] < seen[2][1], "the compiled code runs in every call"
    assert on_host(pipe)
    assert set(hooked(pipe)) == set(parts(pipe)) and len(pipe._all_hooks) == len(parts(pipe))
    offload.disable()
    assert not any(hasattr(m, "_hf_hook") for m in parts(pipe).values())
    runs = backend.runs
    pipe.to(DEVICE)
    assert_same([pixels("flux", pipe, steps=2)], expected[:1])
    assert backend.runs > runs, "and it is compiled still when offload is over"


def test_compiled_under_stock_then_enabled(backend: Backend, sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    pipe.to(DEVICE)
    pixels("flux", pipe)
    pipe.to("cpu")
    enable(pipe)
    runs = backend.runs
    assert_right("flux", pipe)
    assert backend.runs > runs


def test_enabling_again_and_stocks_removal_do_not_decompile(backend: Backend, sim: Any, enable: Any) -> None:
    """Under stock, removing the hook from the compiled wrapper puts the uncompiled forward on it, for good."""
    pipe = CASES["flux"].build()
    enable(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    pixels("flux", pipe)
    for change in (
        lambda: pipe.enable_model_cpu_offload(device=DEVICE),
        lambda: enable(pipe, budget="stock"),
        lambda: (pipe.remove_all_hooks(), pipe.enable_model_cpu_offload(device=DEVICE)),
        pipe.maybe_free_model_hooks,
    ):
        change()
        runs = backend.runs
        assert_same([pixels("flux", pipe, steps=2)], resident("flux", torch.float32)[:1])
        assert backend.runs > runs
        assert "_old_forward" not in vars(pipe.transformer) and "forward" not in vars(pipe.transformer._orig_mod)


def test_lora_on_a_compiled_transformer(backend: Backend, sim: Any, enable: Any) -> None:
    weights = lora_state_dict(CASES["flux"].build())
    expected = []
    for ours in (False, True):
        pipe = CASES["flux"].build()
        if ours:
            enable(pipe)
            pipe.transformer.compile(backend=backend)
            pixels("flux", pipe)
        else:
            pipe.to("cpu")
        pipe.load_lora_weights(weights)
        if not ours:
            pipe.to(DEVICE)
        made = [pixels("flux", pipe)]
        if not ours:
            pipe.to("cpu")
        pipe.fuse_lora()
        if not ours:
            pipe.to(DEVICE)
        made += [pixels("flux", pipe), pixels("flux", pipe, seed=1)]
        expected.append(made)
        del pipe
    assert_same(expected[1], expected[0])
    assert backend.runs > 1


def test_both_decode_and_the_unet_of_an_image_to_image_pipeline(backend: Backend, sim: Any, enable: Any) -> None:
    pipe = CASES["flux-img2img"].build()
    enable(pipe, budget="stock")
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend=backend)
    pipe.vae.encode = torch.compile(pipe.vae.encode, backend=backend)
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    assert_right("flux-img2img", pipe)
    graphs = backend.graphs
    assert_right("flux-img2img", pipe)
    assert backend.graphs == graphs
    del pipe.vae.decode
    assert_right("flux-img2img", pipe, 1)
