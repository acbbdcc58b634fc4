"""Refusals: stock's, in stock's words and order, and ours. After each the pipeline is unhooked, and works."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate.hooks
import pytest
import torch
from conftest import DEVICE
from contracts import assert_right, hooked, on_host, parts, pixels, stock_device
from diffusers import (
    AudioLDM2Pipeline,
    DiffusionPipeline,
    FluxPipeline,
    ModularPipeline,
    StableCascadeCombinedPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.hooks.tensor_parallel import _check_tp_supported
from torch import nn

import prefetch_offload
from prefetch_offload import BudgetError, OffloadError, SettingError, UnsupportedError
from prefetch_offload.registry import engines
from prefetch_offload.testing.pipelines import CASES

Spoil = Callable[[Any, dict[str, Any]], None]


def _group(pipe: Any, arguments: dict[str, Any]) -> None:
    apply_group_offloading(pipe.vae, onload_device=torch.device(DEVICE), offload_type="leaf_level")


def _tensor_parallel(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe.transformer._parallel_config = SimpleNamespace(tensor_parallel_config=object())


def _device_map(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe.hf_device_map = {"transformer": 0, "vae": "cpu"}


def _no_sequence(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe.model_cpu_offload_seq = None


def _index_twice(pipe: Any, arguments: dict[str, Any]) -> None:
    arguments |= {"gpu_id": 1, "device": f"{DEVICE}:0"}


def _no_accelerator(pipe: Any, arguments: dict[str, Any]) -> None:
    arguments.pop("device")


STOCK: dict[str, Spoil] = {
    "group": _group,
    "tensor parallel": _tensor_parallel,
    "device map": _device_map,
    "no sequence": _no_sequence,
    "index twice": _index_twice,
    "no accelerator": _no_accelerator,
}


def _meta(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe.transformer.x_embedder.to("meta")


def _sharded(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe.transformer.x_embedder.weight.device_mesh = "as a DTensor has"


def _small_budget(pipe: Any, arguments: dict[str, Any]) -> None:
    arguments["budget"] = 1000


OURS: dict[str, Spoil] = {"meta": _meta, "sharded": _sharded, "small budget": _small_budget}


def spoiled(*ways: str) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = CASES["flux"].build(), {"device": DEVICE}
    for way in ways:
        (STOCK | OURS)[way](pipe, arguments)
    return pipe, arguments


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- which one, is compared
        call(*args, **kwargs)
    return caught.value


def assert_untouched(pipe: Any) -> None:
    assert type(pipe) is FluxPipeline and "_prefetch_offload" not in pipe.__dict__
    assert hooked(pipe) == {} and not getattr(pipe, "_all_hooks", None)
    assert not any(hasattr(m, "_hf_hook") for m in parts(pipe).values())
    assert not any("prefetch" in str(vars(type(m))) for m in parts(pipe).values())
    assert not {"to", "remove_all_hooks", "enable_model_cpu_offload"} & set(vars(pipe))
    assert all(not engine.live() and not engine.pins.nbytes for engine in engines.values())


@pytest.mark.parametrize("way", STOCK)
def test_stocks_refusals_and_what_is_left(way: str, sim: Any) -> None:
    stock, arguments = spoiled(way)
    theirs = refusal(stock.enable_model_cpu_offload, **arguments)
    for call in (prefetch_offload.enable, _installed):
        pipe, arguments = spoiled(way)
        ours = refusal(call, pipe, **arguments)
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        assert_untouched(pipe)
        assert set(vars(pipe)) <= set(vars(stock))
    if way == "group":  # stays offloaded in its own way; PyTorch cannot run that one on this device
        assert _is_group_offload_enabled(pipe.vae)
        return
    pipe.transformer._parallel_config = pipe.hf_device_map = None  # take the obstacle away
    vars(pipe).pop("model_cpu_offload_seq", None)
    with prefetch_offload.enable(pipe, device=DEVICE):
        assert_right("flux", pipe)


def _installed(pipe: Any, **arguments: Any) -> None:
    prefetch_offload.install()
    try:
        pipe.enable_model_cpu_offload(**arguments)
    finally:
        prefetch_offload.uninstall()


def test_of_two_obstacles_stock_names_the_same(sim: Any) -> None:
    for ways in itertools.combinations(STOCK, 2):
        if ways == ("index twice", "no accelerator"):
            continue  # there is no index without a device
        stock, arguments = spoiled(*ways)
        theirs = refusal(stock.enable_model_cpu_offload, **arguments)
        pipe, arguments = spoiled(*ways)
        ours = refusal(prefetch_offload.enable, pipe, **arguments)
        assert (type(ours), str(ours)) == (type(theirs), str(theirs)), ways
        assert_untouched(pipe)


@pytest.mark.parametrize("own", OURS)
def test_stocks_reasons_come_before_ours(own: str, sim: Any) -> None:
    for way in STOCK:
        stock, arguments = spoiled(way)
        theirs = refusal(stock.enable_model_cpu_offload, **arguments)
        pipe, arguments = spoiled(way, own)
        before = dict(vars(pipe))
        ours = refusal(prefetch_offload.enable, pipe, **arguments)
        assert (type(ours), str(ours)) == (type(theirs), str(theirs)), way
        assert vars(pipe) == before, "nothing has been changed"
        assert_untouched(pipe)


# ---------------------------------------------------------------------------- ours
def test_meta_tensors_are_named(sim: Any) -> None:
    pipe, arguments = spoiled("meta")
    with pytest.raises(
        UnsupportedError, match=r"transformer\.x_embedder\.weight is on the meta device.*Load the weights"
    ):
        prefetch_offload.enable(pipe, **arguments)
    assert_untouched(pipe)
    pipe.transformer.load_state_dict(CASES["flux"].build().transformer.state_dict(), assign=True)
    with prefetch_offload.enable(pipe, **arguments):
        assert_right("flux", pipe)


def test_sharded_tensors_are_named(sim: Any) -> None:
    pipe, arguments = spoiled("sharded")
    with pytest.raises(UnsupportedError, match=r"transformer\.x_embedder\.weight is a DTensor.*full_tensor"):
        prefetch_offload.enable(pipe, **arguments)
    assert_untouched(pipe)


def test_a_budget_that_cannot_hold_one_block_of_weights_names_what_it_takes(sim: Any) -> None:
    pipe, arguments = spoiled("small budget")
    arguments |= {"unit_min": 4 << 10, "unit_max": 64 << 10}
    with pytest.raises(
        BudgetError, match=r"budget=1000 bytes .* is too small for (\w+): streamed .* take (\d+) bytes"
    ) as caught:
        prefetch_offload.enable(pipe, **arguments)
    assert_untouched(pipe)
    words = str(caught.value).split()
    name, nbytes = words[words.index("for") + 1].rstrip(":"), int(words[words.index("take") + 1])
    sizes = {n: sum(t.nbytes for t in {*m.parameters(), *m.buffers()}) for n, m in parts(pipe).items()}
    assert 0 < nbytes < sizes[name], "a part of it is enough"
    arguments["budget"] = nbytes - 1
    assert isinstance(refusal(prefetch_offload.enable, pipe, **arguments), BudgetError)
    arguments["budget"] = nbytes  # accepted: what else a call needs shows when it runs
    prefetch_offload.enable(pipe, **arguments).disable()
    assert not hooked(pipe)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_the_cpu_is_no_accelerator(device: Any, sim: Any) -> None:
    pipe = CASES["flux"].build()
    with pytest.raises(SettingError, match=r"components wait on the CPU and run on an accelerator.*device='cuda'"):
        prefetch_offload.enable(pipe, device=device)
    assert_untouched(pipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:99"}, r"device='cuda:99', gpu_id=None: there is no accelerator cuda:99 here; PyTorch finds"),
        (
            {"device": f"{DEVICE}:3"},
            rf"no accelerator {DEVICE}:3 here; PyTorch finds 1 of type {DEVICE}.*leave `device` out",
        ),
        ({"device": DEVICE, "gpu_id": 1}, rf"gpu_id=1: there is no accelerator {DEVICE}:1"),
    ],
    ids=["cuda", "index", "gpu_id"],
)
def test_a_device_that_is_not_there(arguments: dict[str, Any], message: str, sim: Any) -> None:
    pipe = CASES["flux"].build()
    with pytest.raises(SettingError, match=message):
        prefetch_offload.enable(pipe, **arguments)
    assert_untouched(pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefech": False}, r"no setting `prefech`.*Did you mean `prefetch`"),
        ({"zzz": 1}, r"no setting `zzz`.*Known settings: .*budget|no setting `zzz`.*Known settings: .*pin"),
        ({"budget": "twelve"}, r"budget='twelve' is not a size"),
        ({"budget": 0}, r"budget=0 is less than one byte"),
        ({"pin": "yes"}, r"pin='yes': give True or False"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_settings(settings: dict[str, Any], message: str, sim: Any) -> None:
    pipe = CASES["flux"].build()
    with pytest.raises(SettingError, match=message):
        prefetch_offload.enable(pipe, device=DEVICE, **settings)
    assert_untouched(pipe)
    with pytest.raises(SettingError, match=message):
        prefetch_offload.install(**settings)


@pytest.mark.parametrize("thing", ["module", "class", "dict", "none"])
def test_not_a_pipeline(thing: str) -> None:
    given: Any = {"module": nn.Linear(2, 2), "class": FluxPipeline, "dict": {}, "none": None}[thing]
    with pytest.raises(UnsupportedError, match=f"takes a diffusers pipeline, not a {type(given).__name__}"):
        prefetch_offload.enable(given)


def test_a_modular_pipeline_is_told_what_offloads_it() -> None:
    with pytest.raises(UnsupportedError, match=r"is a modular pipeline, .*enable_auto_cpu_offload"):
        prefetch_offload.enable(ModularPipeline.__new__(ModularPipeline))  # type: ignore[arg-type]


def test_a_diffusers_that_asks_for_its_hooks_in_another_way(sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were that not noticed, the pipeline would be offloaded by stock."""
    bound_early = accelerate.cpu_offload_with_hook

    def enable_model_cpu_offload(self: Any, gpu_id: Any = None, device: Any = None) -> None:
        self.to("cpu")
        self._all_hooks = [bound_early(m, torch.device(DEVICE, 0))[1] for m in parts(self).values()]

    monkeypatch.setattr(DiffusionPipeline, "enable_model_cpu_offload", enable_model_cpu_offload)
    pipe = CASES["flux"].build()
    with pytest.raises(UnsupportedError, match=r"accelerate's own hooks on .*transformer.* instead of asking for ours"):
        prefetch_offload.enable(pipe, device=DEVICE)
    assert_untouched(pipe)


def test_a_refused_second_enable_leaves_the_first_or_nothing(sim: Any, enable: Any) -> None:
    """Refusals that come before stock would remove its hooks leave the pipeline enabled, as under stock."""
    pipe = CASES["flux"].build()
    enable(pipe)
    hooks = set(hooked(pipe))
    for call in (
        lambda: prefetch_offload.enable(pipe, device=DEVICE, budget=1000),
        lambda: prefetch_offload.enable(pipe, device="cpu"),
        lambda: prefetch_offload.enable(pipe, device=DEVICE, pin=False),
    ):
        with pytest.raises(OffloadError):
            call()
        if hooked(pipe):
            assert set(hooked(pipe)) == hooks
        else:
            prefetch_offload.enable(pipe, device=DEVICE, verify=True)
        assert_right("flux", pipe)
    pipe.model_cpu_offload_seq = None
    with pytest.raises(ValueError, match="no `model_cpu_offload_seq`"):
        pipe.enable_model_cpu_offload()
    del pipe.model_cpu_offload_seq
    prefetch_offload.enable(pipe, device=DEVICE, verify=True)
    assert_right("flux", pipe)
    pipe._prefetch_offload.disable()


def test_sequential_offload_is_taken_over_as_stock_does(sim: Any, enable: Any) -> None:
    stock, pipe = CASES["flux"].build(), CASES["flux"].build()
    for one in (stock, pipe):
        one.enable_sequential_cpu_offload(device=DEVICE)
        assert next(one.transformer.parameters()).device.type == "meta"
    stock.enable_model_cpu_offload(device=DEVICE)
    enable(pipe)
    assert not any(
        isinstance(getattr(m, "_hf_hook", None), accelerate.hooks.AlignDevicesHook) for m in pipe.vae.modules()
    )
    for one in (stock, pipe):
        assert_right("flux", one)
    assert on_host(pipe)


def test_group_offload_and_tensor_parallel_are_refused_on_an_enabled_pipeline_as_under_stock(
    sim: Any, enable: Any
) -> None:
    stock, pipe = CASES["flux"].build(), CASES["flux"].build()
    stock.enable_model_cpu_offload(device=DEVICE)
    enable(pipe)
    theirs, ours = (
        refusal(apply_group_offloading, p.vae, onload_device=torch.device(DEVICE), offload_type="leaf_level")
        for p in (stock, pipe)
    )
    assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    theirs, ours = (refusal(_check_tp_supported, p.transformer) for p in (stock, pipe))
    assert type(ours) is type(theirs)
    pixels("flux", pipe)


def test_install_means_enable_and_uninstall_means_stock(sim: Any) -> None:
    pipe = CASES["flux"].build()
    with stock_device():
        prefetch_offload.install(budget="stock")
        try:
            pipe.enable_model_cpu_offload()
            assert pipe._prefetch_offload.settings.budget == "stock"
            assert_right("flux", pipe)
        finally:
            prefetch_offload.uninstall()
        prefetch_offload.uninstall()
        assert_right("flux", pipe, 1)
        pipe._prefetch_offload.disable()
        pipe.enable_model_cpu_offload()
    assert type(pipe.vae._hf_hook) is accelerate.hooks.CpuOffload


class _OwnWay(FluxPipeline):
    def enable_model_cpu_offload(self, gpu_id: int = 0) -> None:
        super().enable_model_cpu_offload(gpu_id=gpu_id or None, device=DEVICE)


def test_install_reaches_classes_with_a_method_of_their_own(sim: Any) -> None:
    """AudioLDM2's does not go through the base class's, whose replacement it would not meet."""
    own = _OwnWay.enable_model_cpu_offload
    overrides = {c: c.enable_model_cpu_offload for c in (AudioLDM2Pipeline, StableCascadeCombinedPipeline, _OwnWay)}
    prefetch_offload.install(budget="stock")
    try:

        class Later(_OwnWay):
            def enable_model_cpu_offload(self) -> None:  # type: ignore[override]
                super().enable_model_cpu_offload()

        later = Later.enable_model_cpu_offload
        assert all(c.enable_model_cpu_offload is not stock for c, stock in overrides.items())
        prefetch_offload.install(budget="8GiB")
        for cls in (_OwnWay, Later):
            pipe = cls(**CASES["flux"].build().components)
            pipe.set_progress_bar_config(disable=True)
            pipe.enable_model_cpu_offload()
            assert pipe._prefetch_offload.settings.budget == 8 << 30
            assert_right("flux", pipe, 1)
            pipe._prefetch_offload.disable()
    finally:
        prefetch_offload.uninstall()
    assert all(c.enable_model_cpu_offload is stock for c, stock in overrides.items())
    assert _OwnWay.enable_model_cpu_offload is own and Later.enable_model_cpu_offload is not later
    assert "__init_subclass__" not in vars(DiffusionPipeline)

    class After(FluxPipeline):
        def enable_model_cpu_offload(self) -> None:  # type: ignore[override]
            """Nobody's but its own."""

    assert After.enable_model_cpu_offload.__doc__ == "Nobody's but its own."
    assert not hasattr(After.enable_model_cpu_offload, "__wrapped__")


def test_a_refused_device_mapped_pipeline_keeps_its_dispatch(sim: Any) -> None:
    """Its hooks are not ours to remove."""
    pipe, arguments = CASES["flux"].build(), {"device": DEVICE}
    for module in parts(pipe).values():
        accelerate.dispatch_model(module, {"": DEVICE}, force_hooks=True)
    _device_map(pipe, arguments)
    with pytest.raises(ValueError, match="activated a device mapping strategy"):
        prefetch_offload.enable(pipe, **arguments)
    assert all(isinstance(m._hf_hook, accelerate.hooks.AlignDevicesHook) for m in parts(pipe).values())
    assert_right("flux", pipe)
    pipe.reset_device_map()
    assert not any(hasattr(m, "_hf_hook") for m in parts(pipe).values())
    with prefetch_offload.enable(pipe, **arguments):
        assert_right("flux", pipe)
