"""The pipeline's side: a subclass made on the spot that keeps our hooks in place through everything diffusers does."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import accelerate
import accelerate.hooks
import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from .. import segments
from ..errors import UnsupportedError
from ..holdings import rehooking
from .entry import attach
from .hooks import CpuOffload, Session, unwrap

if TYPE_CHECKING:
    from ..api import Offload

_classes: dict[type, type] = {}
_patching = threading.RLock()
_patch = threading.local()
HANDLE = "_prefetch_offload"
_OURS = (HANDLE, "_all_hooks")  # a copy has its own


def offload_of(pipe: DiffusionPipeline) -> Offload | None:
    """The handle of an enabled pipeline."""
    return pipe.__dict__.get(HANDLE)


def base_class(pipe: DiffusionPipeline) -> type[DiffusionPipeline]:
    """The pipeline's class as its author wrote it."""
    return getattr(type(pipe), "_prefetch_base", type(pipe))


def hook_component(session: Session, pipe: DiffusionPipeline, module: nn.Module, device: Any, previous: Any) -> Any:
    """What `accelerate.cpu_offload_with_hook` does, with our hook. Returns accelerate's (module, user hook)."""
    device = torch.device(device)
    if device.index is None:
        device = torch.device(device.type, 0)  # some overrides leave the index out
    session.on(device)
    hook = CpuOffload(execution_device=device, prev_module_hook=previous)
    inner = unwrap(module)
    if getattr(inner, "_hf_hook", None) is not None:
        hook.session = session  # someone else's hook is there: stand beside it, as accelerate would
        accelerate.hooks.add_hook_to_module(module, hook, append=True)
    else:
        hook.serve(inner, session, name_of(pipe, module), pipe)
        attach(module, hook)
    return module, accelerate.hooks.UserCpuOffloadHook(module, hook)


def name_of(pipe: DiffusionPipeline, module: nn.Module) -> str:
    """What the pipeline calls the module; its class name when it is only a part of a component."""
    for name, component in pipe.components.items():
        if component is module:
            return name
    return type(module).__name__


@contextlib.contextmanager
def patched(session: Session, pipe: DiffusionPipeline) -> Iterator[None]:
    """While diffusers' own `enable_model_cpu_offload` runs, the hooks it asks accelerate for are ours.

    That method decides what is hooked, excluded, skipped and refused, and it is imported from at call time: running it,
    overrides in subclasses included, keeps all of its behaviour.
    """
    with _hooking(functools.partial(hook_component, session, pipe)):
        yield


@contextlib.contextmanager
def _hooking(hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """In this thread `accelerate.cpu_offload_with_hook` is `hook`."""
    thread = threading.get_ident()
    with _patching:
        stock = accelerate.cpu_offload_with_hook
        outer = getattr(_patch, "active", False)
        _patch.active = True

        def ours(model: nn.Module, execution_device: Any = None, prev_module_hook: Any = None) -> Any:
            if threading.get_ident() != thread:
                return stock(model, execution_device, prev_module_hook)
            return hook(model, execution_device, prev_module_hook)

        accelerate.cpu_offload_with_hook = ours
        try:
            yield
        finally:
            accelerate.cpu_offload_with_hook = stock
            _patch.active = outer


class _Accepted(Exception):
    """diffusers' method has passed its own refusals."""


def refuse_as_stock(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> None:
    """Raise what diffusers' own `enable_model_cpu_offload` would refuse the pipeline with, if it would. Nothing changes."""

    def accepted(*args: Any, **kwargs: Any) -> Any:
        raise _Accepted

    before = [(part.__dict__, dict(part.__dict__)) for part in (pipe, *parts_of(pipe))]
    for attributes, _ in before:
        # Instance attributes stand before the methods that would begin to change something.
        attributes |= {"remove_all_hooks": lambda: None, "to": accepted}
    try:
        with plain_class(pipe), _hooking(accepted), contextlib.suppress(_Accepted):
            base_class(pipe).enable_model_cpu_offload(pipe, **arguments)
    finally:
        for attributes, content in before:
            attributes.clear()
            attributes |= content


def check_hooks(pipe: DiffusionPipeline) -> None:
    """diffusers' method has run, and has not asked for any of our hooks: it had nothing to hook.

    Raises:
        UnsupportedError: they are accelerate's, which this diffusers does not ask for in the way that `patched` meets.
    """
    modules = {name: unwrap(m) for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    hooks = {name: module.__dict__.get("_hf_hook") for name, module in modules.items()}
    stock = [name for name, hook in hooks.items() if type(hook) is accelerate.hooks.CpuOffload]
    if stock:
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has put accelerate's own hooks on {', '.join(stock)} instead of asking for "
            f"ours: how {base_class(pipe).__name__}.enable_model_cpu_offload() works is not known to this version of "
            "prefetch_offload. Use the latest one, or a diffusers that it was tested with."
        )


def is_sequential(module: nn.Module) -> bool:
    """Sequential offload keeps its weights elsewhere and meta tensors in their place; removing its hooks brings them back."""
    return any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in module.modules())


def left_out(pipe: DiffusionPipeline, name: str) -> bool:
    """diffusers moves the component to the device instead of hooking it: excluded, and not named by the sequence."""
    return name in pipe._exclude_from_cpu_offload and name not in (pipe.model_cpu_offload_seq or "").split("->")


def is_patching() -> bool:
    """This thread is inside `patched`."""
    return getattr(_patch, "active", False)


def parts_of(pipe: DiffusionPipeline) -> list[DiffusionPipeline]:
    """Pipelines inside of a combined one."""
    return [p for p in pipe.__dict__.values() if isinstance(p, DiffusionPipeline)]


def take_hold(pipe: DiffusionPipeline, offload: Offload) -> None:
    """From now on the pipeline's calls go through `offload`."""
    base = base_class(pipe)
    if base not in _classes:
        _classes[base] = _make(base)
    pipe.__class__ = _classes[base]
    pipe.__dict__[HANDLE] = offload


def let_go(pipe: DiffusionPipeline) -> None:
    """The pipeline is of its own class again."""
    pipe.__class__ = base_class(pipe)
    pipe.__dict__.pop(HANDLE, None)


@contextlib.contextmanager
def plain_class(pipe: DiffusionPipeline) -> Iterator[None]:
    """While diffusers' own methods run on it, the pipeline and those inside of it are of their own classes."""
    swapped = [(p, type(p)) for p in (pipe, *parts_of(pipe))]
    for part, _ in swapped:
        part.__class__ = base_class(part)
    try:
        yield
    finally:
        for part, cls in swapped:
            part.__class__ = cls


def _make(base: Any) -> type:
    @functools.wraps(base.__call__)
    def __call__(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        offload = offload_of(self)
        if offload is None or not offload.active:
            return base.__call__(self, *args, **kwargs)
        with offload.calling(args, kwargs):
            return base.__call__(self, *args, **kwargs)

    @functools.wraps(base.enable_model_cpu_offload)
    def enable_model_cpu_offload(
        self: DiffusionPipeline, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        from ..api import apply

        offload = offload_of(self)
        assert offload is not None
        # Textual inversion re-enables with the text encoder's device, which is the CPU: the accelerator stays.
        if (device is None and gpu_id is None) or (device is not None and torch.device(device).type == "cpu"):
            device = offload.device
        elif device is None:
            device = offload.device.type
        apply(self, gpu_id, device, offload.settings)

    @functools.wraps(base.maybe_free_model_hooks)
    def maybe_free_model_hooks(self: DiffusionPipeline) -> None:
        offload = offload_of(self)
        if offload is None or not getattr(self, "_all_hooks", None):
            base.maybe_free_model_hooks(self)
            return
        for component in self.components.values():
            if hasattr(component, "_reset_stateful_cache"):
                component._reset_stateful_cache()
        offload.freed()

    @functools.wraps(base.remove_all_hooks)
    def remove_all_hooks(self: DiffusionPipeline) -> None:
        segments.leave(offload_of(self))
        base.remove_all_hooks(self)  # detaching a hook takes its component out of the engine
        for part in parts_of(self):
            base_class(part).remove_all_hooks(part)

    def __setattr__(self: DiffusionPipeline, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        base.__setattr__(self, name, value)
        offload = offload_of(self)
        if offload is None or before is value or not getattr(self, "_all_hooks", None):
            return
        # One that comes back after having been None is a component, too; other attributes may be any module.
        if isinstance(before, nn.Module) or (before is None and isinstance(value, nn.Module) and name in self.config):
            offload.replaced(name, before, value)

    def __copy__(self: DiffusionPipeline) -> DiffusionPipeline:
        """A pipeline of its own over the same components, enabled like the original."""
        made = base.__new__(base)
        made.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _OURS})
        return _enabled_like(self, made)

    def __deepcopy__(self: DiffusionPipeline, memo: dict[int, Any]) -> DiffusionPipeline:
        """A copy is enabled like the original."""
        with _without_hooks(self):
            made = base.__new__(base)
            memo[id(self)] = made
            made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in _OURS})
        return _enabled_like(self, made)

    def __reduce_ex__(self: DiffusionPipeline, protocol: Any) -> Any:
        """Pickled, the pipeline is what it was before."""
        state = {k: v for k, v in self.__dict__.items() if k not in _OURS}
        return _rebuild, (base,), state

    body = {f.__name__: f for f in (
        __call__, enable_model_cpu_offload, maybe_free_model_hooks, remove_all_hooks, __setattr__, __copy__, __deepcopy__,
        __reduce_ex__,
    )}  # fmt: skip
    body |= {name: _keeping(base, name) for name in _REHOOKING if callable(getattr(base, name, None))}
    names: dict[str, Any] = {k: getattr(base, k) for k in ("__module__", "__qualname__", "__doc__")}
    return type(base)(base.__name__, (base,), {**names, **body, "_prefetch_base": base})


# diffusers takes all hooks off for these, and puts them on again.
_REHOOKING = ("load_lora_weights", "load_textual_inversion")


def _keeping(base: Any, name: str) -> Any:
    """The method of that name, during which components keep their slabs while they have no hook."""
    method = getattr(base, name)

    @functools.wraps(method)
    def keeping(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        offload = offload_of(self)
        if offload is None or not offload.active:
            return method(self, *args, **kwargs)
        with rehooking():
            offload.show_masters()
            return method(self, *args, **kwargs)

    return keeping


def _enabled_like(pipe: DiffusionPipeline, made: DiffusionPipeline) -> DiffusionPipeline:
    from ..api import apply

    offload = offload_of(pipe)
    if offload is not None and getattr(pipe, "_all_hooks", None):
        apply(made, None, offload.device, offload.settings)
    return made


def _rebuild(base: type) -> Any:
    return base.__new__(base)


@contextlib.contextmanager
def _without_hooks(pipe: DiffusionPipeline) -> Iterator[None]:
    """Components look like plain modules: so that copies of them are."""
    hooks = {}
    for module in pipe.components.values():
        if isinstance(module, nn.Module) and isinstance(unwrap(module).__dict__.get("_hf_hook"), CpuOffload):
            hooks[unwrap(module)] = unwrap(module).__dict__.pop("_hf_hook")
    try:
        yield
    finally:
        for module, hook in hooks.items():
            module.__dict__["_hf_hook"] = hook
