"""torch.compile: one graph per compiled function, no breaks and no recompiles, counted by the watch and independently."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from prefetch_offload import OffloadWarning, RecompileError, UnsupportedError
from prefetch_offload.adapter.hooks import CpuOffload
from prefetch_offload.compiling import CompileWatch, signature, watch
from prefetch_offload.testing.pipelines import scaled

Options = dict[str, Any]
SMALL = {
    "sd": scaled("sd", layers=1),
    # Double blocks: of the single ones the first sees other strides than the rest, which costs a recompile anywhere.
    "flux": scaled("flux", width=64, layers=24, single_layers=1, text_width=32, vae_width=8),
}
PROMPTS = (("a cat", 2), ("a dog on the moon, in oil", 3), ("", 1))


class Backend:
    """Another one's graphs, counted when they are made and when they run."""

    def __init__(self, name: str) -> None:
        self.make = lookup_backend(name)
        self.graphs = self.runs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled = self.make(module, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return compiled(*args)

        return run


def in_place(pipe: Any, options: Options) -> None:
    pipe.unet.compile(**options)


def assigned(pipe: Any, options: Options) -> None:
    pipe.unet = torch.compile(pipe.unet, **options)


def its_forward(pipe: Any, options: Options) -> None:
    pipe.unet.forward = torch.compile(pipe.unet.forward, **options)


def decode(pipe: Any, options: Options) -> None:
    pipe.vae.decode = torch.compile(pipe.vae.decode, **options)


def encoder(pipe: Any, options: Options) -> None:
    pipe.text_encoder = torch.compile(pipe.text_encoder, **options)


ORDERS = {in_place: "unet", assigned: "unet", its_forward: "unet", decode: "vae", encoder: "text_encoder"}


def draw(pipe: Any, call: int, name: str = "sd", **extra: Any) -> bytes:
    prompt, steps = PROMPTS[call]
    return np.asarray(SMALL[name].call(pipe, seed=call, prompt=prompt, steps=steps, **extra)).tobytes()


def three(pipe: Any, name: str = "sd", between: Callable[[], Any] = lambda: None) -> list[bytes]:
    """Three calls; in the second and third, compiling again is an error of PyTorch's."""
    images = [draw(pipe, 0, name)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for call in (1, 2):
            between()
            images.append(draw(pipe, call, name))
    return images


@cache
def compiled_resident(order: Callable[[Any, Options], None], backend: str) -> tuple[list[bytes], int]:
    """Images, and how many graphs they took."""
    torch._dynamo.reset()
    pipe = SMALL["sd"].build()
    counted = Backend(backend)
    order(pipe, {"backend": counted, "fullgraph": True})
    return three(pipe.to(DEVICE)), counted.graphs


def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of components, each time one's hook fires from now on."""
    entries: list[str] = []
    run = CpuOffload.run
    monkeypatch.setattr(CpuOffload, "run", lambda self, *a: (entries.append(self.component.name), run(self, *a))[1])
    return entries


def figures(offload: Any) -> dict[str, tuple[int, int, int]]:
    return {c.name: (c.graphs, c.graph_breaks, len(c.recompiles)) for c in offload.stats.components if c.graphs}


@pytest.mark.parametrize(("when", "backend"), [("before", "eager"), ("after", "eager"), ("after", "aot_eager")])
@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
def test_each_order(
    order: Any, when: str, backend: str, dynamo: None, enable: Any, sim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = assigned if order in (in_place, its_forward) else order  # the same code of PyTorch's, so the same graph
    expected, graphs = compiled_resident(same, backend)
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    entries = entered(monkeypatch)
    pipe = SMALL["sd"].build()
    counted = Backend(backend)
    options = {"backend": counted, "fullgraph": True}
    if when == "before":
        order(pipe, options)
    offload = enable(pipe, strict_compile=True)
    if when == "after":
        order(pipe, options)
    counters.clear()
    assert three(pipe, between=offload.release) == expected, "with all weights off the device between the calls"
    part_nbytes = next(c.nbytes for c in offload.stats.components if c.name == ORDERS[order])
    assert next(c.h2d_nbytes for c in offload.stats.components if c.name == ORDERS[order]) >= 2.9 * part_nbytes
    assert counted.graphs == graphs == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    part = ORDERS[order]
    assert figures(offload) == {part: (graphs, 0, 0)}
    assert f"compiled: {part}: {graphs} graphs, 0 breaks, 0 recompiles; in the last call 0, 0, 0" in offload.report()
    # at each step; with guidance the encoder runs twice in a call
    assert entries.count(part) >= {"unet": 6, "vae": 3, "text_encoder": 3}[part]
    assert torch._dynamo.config.recompile_limit == limit
    if when == "after" and backend == "eager":
        offload.disable()
        again = enable(pipe)
        runs = counted.runs
        assert draw(pipe, 1) == expected[1]
        assert counted.runs > runs and counted.graphs == graphs
        assert figures(again) == {}, "nothing was compiled since"


def test_dynamic_shapes_and_another_size(dynamo: None, enable: Any) -> None:
    """One graph for all sizes if that was asked for; else each further one costs a recompile, which is counted."""
    for dynamic in (True, False):
        torch._dynamo.reset()
        pipe = SMALL["sd"].build()
        offload = enable(pipe)
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager", fullgraph=True, dynamic=dynamic)
        draw(pipe, 2)
        draw(pipe, 2, height=48, width=48)
        if dynamic:
            assert figures(offload) == {"vae": (1, 0, 0)}
            continue
        assert figures(offload) == {"vae": (2, 0, 1)}
        (vae,) = (c for c in offload.stats.components if c.name == "vae")
        (reason,) = vae.recompiles
        assert "decode" in reason and "size mismatch at index 2. expected 16, actual 24" in reason
        assert vae.compiled_in_call is not None and vae.compiled_in_call.recompiles == (reason,)
        assert reason in offload.report() and "1 recompiles; in the last call 1, 0, 1" in offload.report()
        draw(pipe, 2)
        assert "1 recompiles; in the last call 0, 0, 0" in offload.report()
        held = list(offload._session.client.components.values())  # as if not collected yet
        offload.disable()
        enable(pipe, strict_compile=True)
        draw(pipe, 2)
        with pytest.raises(RecompileError, match=r"vae was compiled again.*:\n  decode.*size mismatch at index 2.*actual 32"):
            draw(pipe, 2, height=64, width=64)
        assert draw(pipe, 2, height=64, width=64), "it has been compiled by then"
        assert held


def test_each_reason_is_one_line(dynamo: None, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the figures, in the report and in the error, however PyTorch lays them out."""
    pipe = SMALL["sd"].build()
    offload = enable(pipe, strict_compile=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager", fullgraph=True)
    draw(pipe, 2)
    failures, told = watch._failures, "0/0: ___check(L['z'])  # in decode\n    user stack:\n      File one\n"
    new = CompileWatch._new_reasons

    def wordy(self: CompileWatch, code: Any) -> list[str]:
        if failures.get(code):
            failures[code][-1] = told
        return new(self, code)

    monkeypatch.setattr(CompileWatch, "_new_reasons", wordy)
    with pytest.raises(RecompileError) as error:
        draw(pipe, 2, height=48, width=48)
    line = "0/0: ___check(L['z']) # in decode user stack: File one"
    assert len(str(error.value).splitlines()) == 2 and str(error.value).endswith(line)
    (vae,) = (c for c in offload.stats.components if c.name == "vae")
    assert [r.split("): ")[1] for r in vae.recompiles] == [line]
    assert [text for text in offload.report().splitlines() if line in text] == [f"  recompiled: {vae.recompiles[0]}"]


def test_another_dtype_is_reported_with_the_parameter_and_the_guard(dynamo: None, enable: Any) -> None:
    pipe = SMALL["sd"].build()
    offload = enable(pipe)
    pipe.text_encoder.compile(backend="eager")
    draw(pipe, 2)
    graphs = figures(offload)["text_encoder"][0]
    pipe.text_encoder.to(torch.bfloat16)
    with pytest.warns(OffloadWarning, match=r"text_encoder\..*dtype was torch.float32 .* is torch.bfloat16 now"):
        pipe.encode_prompt("a", DEVICE, 1, False)
    after = figures(offload)["text_encoder"]
    assert after[0] > graphs and after[2] > 0
    pipe.text_encoder.to(torch.float32)
    draw(pipe, 2)


def test_breaks_are_counted_and_strict(dynamo: None, enable: Any) -> None:
    pipe = SMALL["sd"].build()
    offload = enable(pipe)
    forward = type(pipe.vae.post_quant_conv).forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(pipe.vae.post_quant_conv, x)

    pipe.vae.post_quant_conv.forward = broken
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    counters.clear()
    draw(pipe, 2)
    graphs, breaks, recompiles = figures(offload)["vae"]
    assert graphs == counters["stats"]["unique_graphs"] > 1
    assert breaks == sum(counters["graph_break"].values()) > 0
    assert not recompiles
    torch._dynamo.reset()
    offload.disable()
    enable(pipe, strict_compile=True)
    with pytest.raises(RecompileError, match=r"vae was compiled again, or in pieces.*:\n  .*graph break"):
        draw(pipe, 2)
    del pipe.vae.post_quant_conv.forward


def test_what_dynamo_guards_on_is_as_on_the_device(enable: Any, sim: Any) -> None:
    """Twins are made once, and look like what `.to()` makes of the masters."""
    moved = SMALL["sd"].build().unet.to(DEVICE)
    expected = {n: signature(t) for n, t in [*moved.named_parameters(), *moved.named_buffers()]}
    pipe = SMALL["sd"].build()
    enable(pipe)
    seen: list[dict[str, Any]] = []
    pipe.unet.conv_out.register_forward_pre_hook(lambda *a: seen.append(dict(pipe.unet.named_parameters())))
    draw(pipe, 0)
    draw(pipe, 2)
    assert {n: signature(t) for n, t in seen[0].items()} == expected
    assert all(seen[0][n] is seen[-1][n] for n in expected)


@pytest.mark.parametrize(("when", "backend"), [("before", "aot_eager"), ("after", "eager")])
def test_24_blocks_through_three_slots(when: str, backend: str, dynamo: None, enable: Any, sim: Any) -> None:
    case = SMALL["flux"]
    options: Options = {"fullgraph": True}
    pipe = case.build()
    pipe.transformer.compile_repeated_blocks(backend=Backend(backend), **options)
    expected = three(pipe.to(DEVICE), "flux")
    pipe = case.build()
    torch._dynamo.reset()
    block = sum(p.nbytes for p in pipe.transformer.transformer_blocks[0].parameters())
    counted = Backend(backend)
    if when == "before":
        pipe.transformer.compile_repeated_blocks(backend=counted, **options)
    offload = enable(pipe, budget=12 * block, unit_min=block // 4, unit_max=2 * block, strict_compile=True)
    if when == "after":
        pipe.transformer.compile_repeated_blocks(backend=counted, **options)
    most = 0

    def look(*args: Any) -> None:
        nonlocal most
        most = max(most, offload.stats.resident_nbytes)

    handle = pipe.transformer.norm_out.register_forward_pre_hook(look)
    assert three(pipe, "flux") == expected
    handle.remove()
    assert counted.graphs == 2, "one for the 24 blocks, one for the single one"
    assert figures(offload) == {"transformer": (2, 0, 0)}
    assert offload.plan.streamed["transformer"] > 0.5
    assert most <= 12 * block


def frozen(pipe: Any) -> None:
    pipe.unet.compile(options={"freezing": True})


def frozen_copy(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, options={"freezing": True})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's import
@pytest.mark.parametrize("compiled", [frozen, frozen_copy])
def test_freezing_is_refused(compiled: Any, dynamo: None, enable: Any) -> None:
    pipe = SMALL["sd"].build()
    enable(pipe)
    pipe.unet.compile()
    import torch._inductor.config as inductor

    with (
        inductor.patch(freezing=True),
        pytest.raises(UnsupportedError, match=r"unet is compiled by Inductor with freezing.*freezing = False"),
    ):
        draw(pipe, 2)
    pipe = SMALL["sd"].build()
    compiled(pipe)
    with pytest.raises(UnsupportedError, match="unet is compiled by Inductor with freezing"):
        enable(pipe)
    pipe = SMALL["sd"].build()
    enable(pipe)
    with pytest.raises(UnsupportedError, match="unet is compiled by Inductor with freezing"):
        (compiled(pipe), draw(pipe, 2))


class Constant(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.hidden = [torch.ones(4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.hidden[0]


def test_what_has_captured_its_weights_is_refused(enable: Any, sim: Any) -> None:
    pipe = SMALL["sd"].build()
    pipe.vae.encoder = torch.export.export(Constant(), (torch.zeros(1, 4),)).module()
    with pytest.raises(UnsupportedError, match=r"vae.encoder: the exported graph holds the tensor `\w+` as a constant"):
        enable(pipe)

    class AOTICompiledModel:
        def __call__(self, *args: Any) -> Any: ...

    AOTICompiledModel.__module__ = "torch.export.pt2_archive._package"
    pipe = SMALL["sd"].build()
    pipe.unet.forward = AOTICompiledModel()
    with pytest.raises(UnsupportedError, match=r"unet is an AOTInductor package.*compile_repeated_blocks"):
        enable(pipe)
    assert not hasattr(pipe.unet, "_hf_hook")
    del pipe.unet.forward
    enable(pipe)
    pipe.unet.forward = AOTICompiledModel()
    with pytest.raises(UnsupportedError, match="unet is an AOTInductor package"):
        draw(pipe, 2)


def test_a_package_can_stay_on_the_device(enable: Any, sim: Any) -> None:
    """As the error says: excluded and out of the sequence. Excluded only, it would be hooked all the same, and is refused."""
    expected = draw(SMALL["sd"].build().to(DEVICE), 2)

    class AOTICompiledModel:
        def __init__(self, module: Any) -> None:
            self.run = type(module).forward.__get__(module)  # its own weights, for want of a compiler

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    AOTICompiledModel.__module__ = "torch.export.pt2_archive._package"
    pipe = SMALL["sd"].build()
    pipe.unet.forward = AOTICompiledModel(pipe.unet)
    pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "unet"]
    advice = r"_exclude_from_cpu_offload` and take it out of `pipe.model_cpu_offload_seq`"
    with pytest.raises(UnsupportedError, match=rf"unet is an AOTInductor package.*{advice}"):
        enable(pipe)
    pipe.model_cpu_offload_seq = "text_encoder->vae"
    enable(pipe)
    assert pipe.unet.device.type == DEVICE and pipe.vae.device.type == "cpu"
    assert draw(pipe, 2) == expected
    assert pipe.unet.device.type == DEVICE and not hasattr(pipe.unet, "_hf_hook")


def test_without_dynamos_tables_nothing_is_counted(enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SMALL["sd"].build()
    offload = enable(pipe)
    draw(pipe, 2)
    assert "compiled:" not in offload.report()
    monkeypatch.setattr(watch, "missing", "nothing there")
    assert offload.stats.components[0].graphs is None
    assert "compiled: not counted" in offload.report()
