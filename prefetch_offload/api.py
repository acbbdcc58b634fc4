"""The public interface: `enable`, `install` and `uninstall`."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from . import segments, virtual
from .adapter import pipeline as adapter
from .adapter.hooks import Session, unwrap
from .addresses import NO_ARENA
from .adoption import check_tensors, least_of
from .captured import refuse
from .clients import Client
from .codecs import check_transport, codec_for
from .config import Settings, told
from .errors import BudgetError, OffloadWarning, SettingError, UnsupportedError
from .handle import Offload
from .holdings import rehooking
from .masters import component_nbytes
from .originals import why_not
from .staging import staging_nbytes


def enable(
    pipe: DiffusionPipeline,
    gpu_id: int | None = None,
    device: torch.device | str | None = None,
    *,
    budget: int | str | None = None,
    **settings: Any,
) -> Offload:
    """Offload `pipe`, in place of `pipe.enable_model_cpu_offload()`.

    Args:
        pipe: any diffusers pipeline with a `model_cpu_offload_seq`. Its components move to pinned host memory.
        gpu_id, device: as in `enable_model_cpu_offload`; the same combinations are refused with the same errors.
        budget: device bytes for weights and activations together (``"12GiB"``); None: what is free, less a reserve;
            ``"stock"``: never more than stock model offload would use, nor than the device has.
        settings: the other fields of `prefetch_offload.Settings`.

    Returns:
        The handle. Calls of the pipeline go on as before. Enabling again applies the new settings and returns the same
        handle.

    Raises:
        SettingError: an unknown setting, or a value that cannot be used.
        UnsupportedError: a tensor that cannot be offloaded, or something that is not a diffusers pipeline.
        ValueError, RuntimeError, ImportError: what `enable_model_cpu_offload` raises, for the same reasons.
        Whatever is raised, a pipeline that was not enabled is left as it was, and none is left half enabled.
    """
    made = Settings.make(budget, **settings)
    if not isinstance(pipe, DiffusionPipeline):
        if any(cls.__name__ == "ModularPipeline" for cls in type(pipe).__mro__):
            raise UnsupportedError(
                f"enable() takes a DiffusionPipeline, and {type(pipe).__name__} is a modular pipeline, which is offloaded by "
                "its ComponentsManager (`enable_auto_cpu_offload`). Use the model's DiffusionPipeline if there is one."
            )
        raise UnsupportedError(
            f"enable() takes a diffusers pipeline, not a {type(pipe).__name__}: give the pipeline that the model is part of."
        )
    if device is not None and torch.device(device).type == "cpu":
        raise SettingError(
            f"device={str(device)!r}: components wait on the CPU and run on an accelerator. Name one (device='cuda'), leave "
            "`device` out to have it found, or do without offload."
        )
    check_names(pipe, made)
    check_originals(made)
    return apply(pipe, gpu_id, device, made)


def check_names(pipe: DiffusionPipeline, settings: Settings) -> None:
    """Refuse a `transport` that names what the pipeline does not have, or what has no weights; warn of what is not loaded.

    Raises:
        SettingError: with what it has.
    """
    if not isinstance(settings.transport, tuple):
        return
    with_weights = sorted(n for n, c in pipe.components.items() if isinstance(c, nn.Module))
    for name, way in settings.transport:
        if name == "default":
            continue
        if name not in pipe.components:
            raise SettingError(
                f"transport names {name!r}, which a {type(pipe).__name__} does not have: its components are "
                f"{', '.join(sorted(pipe.components))}; 'default' stands for all others."
            )
        component = pipe.components[name]
        if component is None and way != "raw":
            warnings.warn(
                f"transport names {name!r}, which this pipeline was loaded without: nothing of it travels.",
                OffloadWarning,
                stacklevel=3,
            )
        elif component is not None and not isinstance(component, nn.Module):
            raise SettingError(
                f"transport names {name!r}, a {type(component).__name__}, which has no weights to move: those that have are "
                f"{', '.join(with_weights)}. Leave it out."
            )


def check_originals(settings: Settings) -> None:
    """Refuse a directory in which originals cannot lie, if any weights are to travel encoded.

    Raises:
        SettingError: with why.
    """
    where = settings.originals
    if where in ("file", "memory") or settings.transport == "raw":
        return
    why = why_not(where)
    if why is not None:
        raise SettingError(
            f"originals={where!r}: {why}. Give a directory on a disk, 'file' to have one found, or 'memory' to keep weights in "
            "memory beside their encoded bytes."
        )


def apply(pipe: DiffusionPipeline, gpu_id: int | None, device: torch.device | str | None, settings: Settings) -> Offload:
    """`enable` with checked settings; also what an enabled pipeline's `enable_model_cpu_offload` comes to.

    diffusers' own method runs, with its own refusals, and asks for our hooks instead of accelerate's.
    """
    arguments = {k: v for k, v in (("gpu_id", gpu_id), ("device", device)) if v is not None}
    adapter.refuse_as_stock(pipe, arguments)  # its reasons first, and before anything has been changed
    check_device(gpu_id, device)
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module) and not adapter.is_sequential(module):
            check_tensors(name, module)
        if not adapter.left_out(pipe, name):
            refuse(name, module)
    offloaded = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module) and not adapter.left_out(pipe, n)}
    check_transport(offloaded, settings)
    check_budget(pipe, settings)
    if settings.stable_addresses:
        check_addresses(pipe, settings, device)
    check_segments(settings, device)
    before = adapter.offload_of(pipe)
    base = adapter.base_class(pipe)
    session = _session(before, settings)
    with rehooking() as finish:
        if before is not None:
            before.show_masters()
        try:
            with adapter.patched(session, pipe), adapter.plain_class(pipe):
                base.enable_model_cpu_offload(pipe, **arguments)
            if not session.hooked:
                adapter.check_hooks(pipe)
                session.on_any(getattr(pipe, "_offload_device", None))
        except BaseException:
            with contextlib.suppress(Exception):
                base.remove_all_hooks(pipe)
            finish()
            for part in adapter.parts_of(pipe):
                adapter.let_go(part)
            adapter.let_go(pipe)
            raise
        finish()
    offload = before if before is not None else Offload(pipe, session)
    offload._use(session)
    adapter.take_hold(pipe, offload)
    for part in adapter.parts_of(pipe):
        if adapter.offload_of(part) is None:
            adapter.take_hold(part, Offload(part, session))
    client = session.client
    if not client.order.expected:
        keys = {id(c.module): key for key, c in client.components.items()}
        hooked = [unwrap(h.model) for h in getattr(pipe, "_all_hooks", [])]
        client.order.expect([keys[id(m)] for m in hooked if id(m) in keys])
    offload._suit_allocator()
    return offload


def check_device(gpu_id: int | None, device: torch.device | str | None) -> None:
    """Refuse a device that is not there; diffusers would find out in the first call.

    Raises:
        SettingError: with what there is.
    """
    if device is None:
        return  # diffusers looks for one
    wanted = torch.device(device)
    module = getattr(torch, wanted.type, None)
    if not hasattr(module, "is_available") or not hasattr(module, "device_count"):
        return
    count = module.device_count() if module.is_available() else 0
    index = gpu_id or wanted.index or 0
    if isinstance(index, int) and index >= count:
        have = torch.accelerator.current_accelerator()
        found = f"{count} of type {wanted.type}" if count else f"one of type {have}" if have is not None else "none"
        raise SettingError(
            f"device={str(device)!r}, gpu_id={gpu_id!r}: there is no accelerator {wanted.type}:{index} here; PyTorch "
            f"finds {found}. Name one that is there, or leave `device` out to have it found."
        )


def check_budget(pipe: DiffusionPipeline, settings: Settings, measured_nbytes: int = 0) -> None:
    """Refuse a budget in which some component's weights cannot run, not even a block at a time.

    Args:
        measured_nbytes: the smallest budget for calls like the last one; 0: there was none.

    Raises:
        BudgetError: with the component and the smallest budget that can hold what it needs at once.
    """
    budget = settings.budget
    if not isinstance(budget, int):
        return
    host = torch.device("cpu")  # where "auto" packs nothing: how much it will is found out later
    least = {
        name: least_of(module, settings, codec_for(settings, name, module, host))
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module) and not adapter.left_out(pipe, name)
    }
    largest = max(least, key=lambda name: least[name].weights_nbytes, default=None)
    if largest is None:
        return
    weights = least[largest].weights_nbytes
    # All components share the staging buffers, and every encoded unit has its table.
    arriving = sum(staging_nbytes(nbytes for one in least.values() for nbytes in one.payloads_nbytes))
    beside = arriving + sum(one.tables_nbytes for one in least.values())
    if weights + beside > budget:
        besides = f", and what encoded weights arrive in {beside} bytes besides" if beside else ""
        calls = f", and calls like the last one {measured_nbytes} bytes ({told(measured_nbytes)})" if measured_nbytes else ""
        raise BudgetError(
            f"budget={budget} bytes ({told(budget)}) is too small for {largest}: streamed block by block, its weights "
            f"take {weights} bytes ({told(weights)}) at once{besides}{calls}. Give at least that much, and room for "
            "activations; smaller `unit_min` and `unit_max` make blocks smaller."
        )


def check_addresses(pipe: DiffusionPipeline, settings: Settings, device: torch.device | str | None) -> None:
    """Refuse addresses for life where they take memory for life, and more than the budget.

    Raises:
        BudgetError: with what they take.
    """
    where = torch.device(device) if device is not None else torch.accelerator.current_accelerator()
    if where is None or settings.budget is None or virtual.driver_for(where) is not None:
        return
    modules = [m for n, m in pipe.components.items() if isinstance(m, nn.Module) and not adapter.left_out(pipe, n)]
    nbytes = sum(component_nbytes(m) for m in modules)
    if settings.budget == "stock" or nbytes > settings.budget:
        raise BudgetError(
            f"stable_addresses=True on {where}: all weights, {nbytes} bytes ({told(nbytes)}), take device memory for "
            f"good, which is more than budget={settings.budget!r} allows. {NO_ARENA}"
        )


def check_segments(settings: Settings, device: torch.device | str | None) -> None:
    """Refuse ``expandable_segments=True`` where PyTorch's allocator has none.

    Raises:
        SettingError: with why.
    """
    where = torch.device(device) if device is not None else torch.accelerator.current_accelerator()
    if settings.expandable_segments and where is not None:
        segments.check(where)


def _session(before: Offload | None, settings: Settings) -> Session:
    """A pipeline's session: the one it has if the settings are the same, else a new one that knows what that one learned."""
    if before is None:
        return Session(Client(settings), settings)
    if before.settings == settings:
        return before._session
    client = Client(settings)
    old = before._session.client
    client.order, client.shapes, client.inputs = old.order, old.shapes, old.inputs
    client.memory.activations, client.memory.needs = old.memory.activations, old.memory.needs
    return Session(client, settings)


# Whose `enable_model_cpu_offload` is ours while installed, and what it was: overrides do not reach the base class's.
_stock: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def install(*, budget: int | str | None = None, **settings: Any) -> None:
    """Let `DiffusionPipeline.enable_model_cpu_offload` mean `enable`, for every pipeline, with these settings.

    Existing programs then need no edit. Classes with an `enable_model_cpu_offload` of their own are included, those that are
    defined later as well. Installing again applies the new settings to pipelines enabled from then on.

    Raises:
        SettingError: as in `enable`.
    """
    made = Settings.make(budget, **settings)
    check_originals(made)
    uninstall()

    def take_over(cls: Any) -> None:
        stock = cls.__dict__.get("enable_model_cpu_offload")
        if stock is None or "_prefetch_base" in cls.__dict__:
            return

        @functools.wraps(stock)
        def enable_model_cpu_offload(
            self: DiffusionPipeline, gpu_id: int | None = None, device: torch.device | str | None = None
        ) -> None:
            if adapter.is_patching():
                arguments = {"gpu_id": gpu_id, "device": device}  # our own call of diffusers' method; some take fewer
                stock(self, **{k: v for k, v in arguments.items() if v is not None})
            else:
                apply(self, gpu_id, device, made)

        _stock[cls] = stock
        cls.enable_model_cpu_offload = enable_model_cpu_offload

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        super(DiffusionPipeline, cls).__init_subclass__(**kwargs)
        take_over(cls)

    todo = [DiffusionPipeline]
    while todo:
        cls = todo.pop()
        take_over(cls)
        todo += cls.__subclasses__()
    DiffusionPipeline.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


def uninstall() -> None:
    """Undo `install`. Pipelines that are enabled stay enabled. Without `install` before it, a no-op."""
    if not _stock:
        return
    del DiffusionPipeline.__init_subclass__
    for cls, stock in list(_stock.items()):
        cls.enable_model_cpu_offload = stock
    _stock.clear()
