"""The hook in accelerate's and diffusers' hands: what they read of it, call on it, and replace it with."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import accelerate.hooks
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from conftest import DEVICE, resident
from contracts import assert_right, differ, hooked, on_host, parts, pixels, stock_device, stocked, tensors
from diffusers import DiffusionPipeline
from torch import nn

from prefetch_offload.testing.pipelines import CASES

CHAINS = [
    "sd",
    "sdxl-ip-adapter",
    "sdxl-controlnet",
    "sd3",
    "flux-img2img",
    "wan",
    "svd",
    "kandinsky22",
    "stable-cascade",
]


def recreated(hook: Any) -> Any:
    """As peft and diffusers' quantizers do it when they replace a module."""
    cls = getattr(accelerate.hooks, type(hook).__name__)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{k: v for k, v in hook.__dict__.items() if k in known})


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class Bare(nn.Module):
    """A component without parameters; stock's next(module.parameters()) raises StopIteration on it."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


# ------------------------------------------------------------------- what is read
def test_the_hook_is_a_cpu_offload_and_nothing_else(enable: Any) -> None:
    pipe = CASES["sdxl"].build()
    enable(pipe)
    for module in parts(pipe).values():
        hook = module._hf_hook
        assert type(hook).__name__ == "CpuOffload"
        assert isinstance(hook, accelerate.hooks.CpuOffload) and isinstance(hook, ModelHook)
        assert not isinstance(hook, AlignDevicesHook) and not hasattr(hook, "offload")
        assert hook.no_grad is False
        hook.io_same_device = True  # transformers sets it on any hook
        assert "io_same_device" in vars(hook)
        assert hook.execution_device == torch.device(DEVICE, 0)
        assert isinstance(hook.execution_device, torch.device) and hook.execution_device.index == 0
        assert type(module).__name__ == type(module).__mro__[1].__name__, "the class keeps its name"
    for never in ("final_offload_hook", "unet_offload_hook", "prior_hook", "text_encoder_offload_hook"):
        assert not hasattr(pipe, never)


def _chain(pipe: Any) -> list[tuple[str, str | None]]:
    names = {id(m): n for n, m in parts(pipe).items()}
    previous = [h.hook.prev_module_hook for h in pipe._all_hooks]
    return [
        (names[id(h.model)], names[id(p.model)] if p is not None else None)
        for h, p in zip(pipe._all_hooks, previous, strict=True)
    ]


@pytest.mark.parametrize("name", CHAINS)
def test_hooks_devices_and_exclusions_equal_stocks(name: str, enable: Any) -> None:
    with stock_device():
        stock = stocked(name)
    pipe = CASES[name].build()
    enable(pipe)
    pairs = [(pipe, stock)]
    pairs += [(getattr(pipe, a), getattr(stock, a)) for a in ("prior_pipe", "decoder_pipe") if hasattr(stock, a)]
    seen = 0
    for ours, theirs in pairs:
        assert hasattr(ours, "_all_hooks") == hasattr(theirs, "_all_hooks")
        for attribute in ("_offload_device", "_offload_gpu_id"):
            assert getattr(ours, attribute, "absent") == getattr(theirs, attribute, "absent")
        assert {n for n, m in parts(ours).items() if hasattr(m, "_hf_hook")} == {
            n for n, m in parts(theirs).items() if hasattr(m, "_hf_hook")
        }
        assert {n: next(m.parameters()).device.type for n, m in parts(ours).items()} == {
            n: next(m.parameters()).device.type for n, m in parts(theirs).items()
        }
        if hasattr(theirs, "_all_hooks"):
            assert _chain(ours) == _chain(theirs)
            assert ours._execution_device == theirs._execution_device == torch.device(DEVICE, 0)
            assert ours.device == theirs.device
            seen += len(theirs._all_hooks)
    assert seen >= 3


def test_gpu_id_and_index_give_stocks_values(enable: Any) -> None:
    for arguments in ({"device": f"{DEVICE}:0"}, {"device": DEVICE, "gpu_id": 0}, {"device": torch.device(DEVICE)}):
        stock, pipe = CASES["flux"].build(), CASES["flux"].build()
        stock.enable_model_cpu_offload(**arguments)
        offload = enable(pipe, **arguments)
        assert (pipe._offload_gpu_id, pipe._offload_device) == (stock._offload_gpu_id, stock._offload_device)
        assert type(pipe._offload_gpu_id) is type(stock._offload_gpu_id)
        assert offload.device == torch.device(DEVICE, 0)


# ----------------------------------------------------------------- what is called
def test_pre_forward_by_hand_without_arguments_and_again(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    hook = pipe.unet._hf_hook
    assert hook.pre_forward(pipe.unet) == ((), {})
    assert all(t.device.type == DEVICE for t in tensors(pipe.unet))
    copied = offload.stats.h2d_nbytes
    for _ in range(3):
        assert hook.pre_forward(pipe.unet) == ((), {})
    assert offload.stats.h2d_nbytes == copied
    x = torch.arange(3.0)
    args, kwargs = hook.pre_forward(pipe.unet, x, key=[x])
    assert torch.equal(args[0].cpu(), x) and torch.equal(kwargs["key"][0].cpu(), x)
    pipe.text_encoder._hf_hook.pre_forward(pipe.text_encoder)  # the other stays: two models by hand at once
    assert all(t.device.type == DEVICE for m in (pipe.unet, pipe.text_encoder) for t in tensors(m))
    pipe.maybe_free_model_hooks()
    assert on_host(pipe)
    assert_right("sd", pipe)


def test_pre_forward_from_another_thread_and_stream(sim: Any, enable: Any) -> None:
    """Each stream that reads the weights waits for their copy: the simulator objects to any that does not."""
    sim.configure(1 << 50, 20, 0, 0)  # copies take a while
    pipe = CASES["sd"].build()
    truth = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    enable(pipe)
    sums: dict[str, dict[str, torch.Tensor]] = {}

    def enter(key: str) -> None:
        with torch.Stream(device=DEVICE):
            pipe.unet._hf_hook.pre_forward(pipe.unet)
            sums[key] = {n: (p * 1).cpu() for n, p in pipe.unet.named_parameters()}

    threads = [threading.Thread(target=enter, args=(k,)) for k in ("one", "two")]
    for thread in threads:
        thread.start()
        thread.join(60)
    enter("main, other stream")
    assert len(sums) == 3
    assert all(torch.equal(found[n], truth[n]) for found in sums.values() for n in truth)
    pipe.maybe_free_model_hooks()
    assert_right("sd", pipe)


def test_user_hook_offload_and_remove(enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pixels("sd", pipe)
    user_hook = next(h for h in pipe._all_hooks if h.model is pipe.unet)
    pipe.unet._hf_hook.pre_forward(pipe.unet)
    assert pipe.unet.device.type == DEVICE
    user_hook.offload()
    assert all(t.device.type == "cpu" for t in tensors(pipe.unet))
    components, flights = offload._session.client.components.values(), offload._engine.transport.flights
    held = {c.name: sum(u.nbytes for u in c.units if u.key in flights) for c in components}
    assert held["unet"] == 0 < held["vae"], "offload() gives this component's memory back at once, and no other's"
    user_hook.remove()
    assert not hasattr(pipe.unet, "_hf_hook")
    assert_right("sd", pipe)


def test_args_and_kwargs_move_as_stock_moves_them(enable: Any) -> None:
    stock, pipe = stocked("sd"), CASES["sd"].build()
    enable(pipe)
    x = torch.ones(2)
    inputs = {"a": x, "b": [x, {"c": x}], "d": "text", "e": (x, None)}
    for one in (stock, pipe):
        args, kwargs = one.unet._hf_hook.pre_forward(one.unet, x, 3, **inputs)
        assert args[0].device.type == DEVICE and args[1] == 3
        assert kwargs["a"].device.type == kwargs["b"][0].device.type == kwargs["b"][1]["c"].device.type == DEVICE
        assert kwargs["d"] == "text" and isinstance(kwargs["e"], tuple) and kwargs["e"][1] is None
        # The weights are there already: from the second time on inputs stay where they are.
        args, kwargs = one.unet._hf_hook.pre_forward(one.unet, x, **inputs)
        assert args[0].device.type == "cpu" and kwargs["b"][0].device.type == "cpu"


# ------------------------------------------------------------ hooks beside and over
def test_a_hook_appended_by_someone_else_works_beside_ours(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    foreign = Counting()
    add_hook_to_module(pipe.unet, foreign, append=True)
    assert isinstance(pipe.unet._hf_hook, SequentialHook)
    assert_right("sd", pipe, 1)
    assert foreign.calls >= 2
    hooks, live = len(pipe._all_hooks), len(offload.stats.components)
    assert_right("sd", pipe)
    assert len(pipe._all_hooks) == hooks == len(parts(pipe)) - 1, "hooks do not pile up"
    assert len(offload.stats.components) == live
    remove_hook_from_module(pipe.unet)
    assert not hasattr(pipe.unet, "_hf_hook") and not hasattr(pipe.unet, "_old_forward")
    assert_right("sd", pipe)
    assert type(pipe.unet._hf_hook).__name__ == "CpuOffload"


def test_a_hook_that_was_there_before_enable_goes_as_under_stock(sim: Any, enable: Any) -> None:
    pipe, foreign = CASES["sd"].build(), Counting()
    add_hook_to_module(pipe.unet, foreign)
    enable(pipe)
    assert_right("sd", pipe)
    assert foreign.calls == 0


def test_recreation_by_class_name(sim: Any, enable: Any) -> None:
    """peft, bitsandbytes and gguf: the hook's class is looked up by name, made anew, and put on a (new) module."""
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    made = recreated(pipe.unet._hf_hook)
    assert isinstance(made, accelerate.hooks.CpuOffload)
    assert made.execution_device == torch.device(DEVICE, 0)
    assert made.prev_module_hook is pipe.unet._hf_hook.prev_module_hook
    remove_hook_from_module(pipe.unet)
    add_hook_to_module(pipe.unet, made)
    assert_right("sd", pipe)
    assert len(pipe._all_hooks) == len(parts(pipe)) - 1
    assert on_host(pipe)
    assert offload.stats.d2h_nbytes == 0


# ------------------------------------------------------------------- taking over
def test_stock_takes_over_after_disable(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pixels("sd", pipe)
    offload.disable()
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert type(pipe.unet._hf_hook) is accelerate.hooks.CpuOffload
    assert_right("sd", pipe)


def test_remove_all_hooks_leaves_weights_and_enable_comes_back(sim: Any, enable: Any) -> None:
    pipe = CASES["sd"].build()
    offload = enable(pipe)
    pipe.unet._hf_hook.pre_forward(pipe.unet)
    pipe.remove_all_hooks()
    assert pipe._all_hooks == []
    assert pipe.unet.device.type == DEVICE, "weights stay where they are shown"
    assert not any(hasattr(m, "_hf_hook") or hasattr(m, "_old_forward") for m in parts(pipe).values())
    assert offload.stats.pinned_nbytes == 0
    pipe.to(DEVICE)
    assert_right("sd", pipe)
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert set(hooked(pipe)) == {n for n in parts(pipe) if n != "safety_checker"}
    assert_right("sd", pipe)


def test_sequential_offload_takes_over(sim: Any, enable: Any) -> None:
    pipe = CASES["flux"].build()
    enable(pipe)
    pixels("flux", pipe)
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    assert all(isinstance(pipe.transformer.get_submodule(n)._hf_hook, AlignDevicesHook) for n in ("", "x_embedder"))
    assert hooked(pipe) == {}
    assert_right("flux", pipe)


def test_a_component_without_parameters(sim: Any, enable: Any) -> None:
    pipe = CASES["sdxl"].build()
    DiffusionPipeline.register_modules(pipe, image_encoder=Bare())
    enable(pipe)
    assert pipe.image_encoder(torch.zeros(2, device=DEVICE)).sum() == 2
    assert_right("sdxl", pipe)
    assert differ(*resident("sdxl", torch.float32))
