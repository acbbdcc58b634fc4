"""Where a component is entered: around its call, outside of whatever torch.compile traces.

# [Note: entry points]
The hook never replaces ``forward``: traced, it would break the graph, and a module compiled earlier would not meet it.
Instead the component's class becomes a subclass of the same name, made on the spot, whose ``__call__``, ``forward``,
``encode`` and ``decode`` enter first and do nothing of the kind while torch.compile traces them. ``encode`` and
``decode`` are data descriptors, so that a compiled method assigned to the instance is entered as well.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .hooks import CpuOffload, unwrap

_METHODS = ("encode", "decode")
# These work on all weights, and on the truth: of what a lossy transport has rounded, the masters are shown first.
_OF_MASTERS = ("state_dict", "load_state_dict", "_apply", "fuse_lora", "unfuse_lora")
_classes: dict[type, type] = {}


def _hook_of(module: nn.Module) -> CpuOffload | None:
    hook = module.__dict__.get("_hf_hook")
    return hook if type(hook) is CpuOffload else None


def _show_exact(module: nn.Module) -> CpuOffload | None:
    """Let the module show its masters if it shows what a lossy transport has left of them. Returns its hook."""
    hook = _hook_of(module)
    if hook is not None:
        hook.show_exact()
    return hook


class _EntryPoint:
    """A method that enters its component first, also when it was replaced on the instance."""

    def __init__(self, name: str, base: Any) -> None:
        self.name, self.base = name, base
        self._code: Any = None

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self.base
        target = module.__dict__.get(self.name)
        replaced = target is not None  # most likely compiled
        if target is None:
            target = self.base.__get__(module, owner)

        # Not the target's __dict__: a compiled function's marks would make this one pass for compiled.
        @functools.wraps(target, updated=())
        def entered(*args: Any, **kwargs: Any) -> Any:
            hook = None if torch.compiler.is_compiling() else _hook_of(module)
            if hook is None:
                return target(*args, **kwargs)
            return hook.run(module, target, args, kwargs, replaced)

        # Dynamo keeps what it compiled by code object: where a program compiles this method, each has one of its own.
        if self._code is None:
            self._code = entered.__code__.replace(co_name=self.name)
        entered.__code__ = self._code  # type: ignore[attr-defined]
        return entered

    def __set__(self, module: nn.Module, value: Any) -> None:
        module.__dict__[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        try:
            del module.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None


def _of_masters(base: Any, name: str) -> Any:
    """The method of that name, which meets exact weights."""
    method = getattr(base, name)

    @functools.wraps(method)
    def exact(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _show_exact(self)
        return method(self, *args, **kwargs)

    return exact


def _blank(base: type) -> Any:
    """An instance before its state. Not `copyreg.__newobj__`: pickle insists that it makes the object's very class."""
    return base.__new__(base)


def entered_class(base: type) -> type:
    """The subclass of `base` whose calls enter their component; made once."""
    made = _classes.get(base)
    if made is None:
        made = _classes[base] = _make(base)
    return made


def is_entered(cls: type) -> bool:
    return "_prefetch_base" in cls.__dict__


def _make(base: Any) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.__call__(self, *args, **kwargs)
        inner = unwrap(self)
        hook = _hook_of(inner)
        if hook is None:
            return base.__call__(self, *args, **kwargs)
        return hook.run(inner, functools.partial(base.__call__, self), args, kwargs, inner is not self)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        hook = _hook_of(self)
        if hook is None:
            return base.forward(self, *args, **kwargs)
        return hook.run(self, functools.partial(base.forward, self), args, kwargs)

    # Dynamo keeps what it compiled by code object: where a program compiles this method, each class has one of its own.
    forward.__code__ = forward.__code__.replace(co_name=f"{base.__name__}_forward")

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        """Pickled, the module is what it was before."""
        _show_exact(self)
        state = {k: v for k, v in self.__dict__.items() if k != "_hf_hook"}
        return _blank, (base,), state

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A copy is offloaded like the original, from masters of its own."""
        import copy

        hook = _show_exact(self)
        made = base.__new__(base)
        memo[id(self)] = made
        made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_hf_hook"})
        if hook is not None:
            attach(made, copy.deepcopy(hook, memo))
        return made  # type: ignore[no-any-return]

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__call__": __call__,
        "_prefetch_base": base,
    }
    if not issubclass(base, torch._dynamo.OptimizedModule):
        body |= {"forward": forward, "__reduce_ex__": __reduce_ex__, "__deepcopy__": __deepcopy__}
        for name in _METHODS:
            if callable(getattr(base, name, None)):
                body[name] = _EntryPoint(name, getattr(base, name))
        body |= {name: _of_masters(base, name) for name in _OF_MASTERS if callable(getattr(base, name, None))}
    return _equal_to_base(type(base))(base.__name__, (base,), body)


@functools.cache
def _equal_to_base(meta: Any) -> Any:
    """A metaclass of classes that equal their base: `from_pipe` asks whether ``type(component) in`` the ones it accepts."""

    def plain(cls: Any) -> Any:  # a class that someone derives from one of these is its own
        return cls.__dict__.get("_prefetch_base", cls) if isinstance(cls, type) else cls

    def __eq__(cls: Any, other: object) -> bool:
        return plain(cls) is plain(other)

    def __hash__(cls: Any) -> int:
        return type.__hash__(plain(cls))

    return type(meta.__name__, (meta,), {"__eq__": __eq__, "__hash__": __hash__})


def _set_class(module: nn.Module, cls: type) -> None:
    # object's: an OptimizedModule passes attributes on to what it wraps
    object.__setattr__(module, "__class__", cls)


def attach(module: nn.Module, hook: CpuOffload) -> None:
    """Put `hook` on a module without one. Where its class cannot be changed, accelerate's way is used."""
    inner = unwrap(module)
    try:
        for part in {id(module): module, id(inner): inner}.values():
            if not is_entered(type(part)):
                _set_class(part, entered_class(type(part)))
        inner._hf_hook = hook  # type: ignore[assignment]
    except TypeError:  # object layout differs: a ScriptModule, say
        import accelerate.hooks

        restore_class(module)
        accelerate.hooks.add_hook_to_module(module, hook)


def is_cut_off(module: nn.Module, hook: CpuOffload) -> bool:
    """The module still has `hook`, whose removal was interrupted: nothing enters it."""
    own = module.__dict__.get("_hf_hook") is hook and "_old_forward" not in module.__dict__
    return own and not is_entered(type(module))


def restore_class(module: nn.Module) -> None:
    """The class, or both classes of a compiled module, as before `attach`."""
    for part in (module, unwrap(module)):
        if is_entered(type(part)):
            _set_class(part, type(part)._prefetch_base)  # type: ignore[attr-defined]
