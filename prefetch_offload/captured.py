"""Compiled code that has taken the weights themselves into it: offload has nothing to move there, and says so."""

from __future__ import annotations

import functools
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .compiling import inductor_settings
from .config import MIB
from .errors import UnsupportedError

if TYPE_CHECKING:
    from .component import Component

# An AOTInductor package once loaded; its home has moved between versions of PyTorch.
_PACKAGES = ("AOTICompiledModel", "AOTIModelPackageLoader", "AOTIModelContainerRunner")
# What diffusers leaves alone; see `adapter.pipeline.left_out`.
_LEAVE_OUT = (
    "let the component stay on the device: before enabling, name it in `pipe._exclude_from_cpu_offload` and take it out of "
    "`pipe.model_cpu_offload_seq`, whose components are offloaded even if they are excluded"
)


def refuse(name: str, part: Any) -> None:
    """Refuse a component, module or not, whose compiled code holds its weights.

    Raises:
        UnsupportedError: with what to do instead.
    """
    if is_package(part):
        raise UnsupportedError(_package(name))
    if not isinstance(part, nn.Module):
        return
    for path, module in part.named_modules():
        where = ".".join(p for p in (name, path.removeprefix("_orig_mod").lstrip(".")) if p)
        for key in ("forward", "_compiled_call_impl", "decode", "encode", "__call__"):
            call = module.__dict__.get(key)
            if call is not None and is_package(call):
                raise UnsupportedError(_package(where))
        if isinstance(module, torch.fx.GraphModule):
            constant = _captured(module)
            if constant is not None:
                raise UnsupportedError(
                    f"{where}: the exported graph holds the tensor `{constant}` as a constant, not as a parameter or buffer, "
                    "so it cannot be moved with the others. Export a module that registers it (torch.export.export "
                    "of an nn.Module whose weights are parameters and buffers), or use torch.compile instead of export."
                )
    refuse_frozen(name, part)


def is_package(call: Any) -> bool:
    """Something loaded from an AOTInductor package, or a call of one."""
    seen = 0
    while call is not None and seen < 8:
        kind = type(call)
        if kind.__name__ in _PACKAGES and kind.__module__.startswith("torch"):
            return True
        if isinstance(call, functools.partial):
            call = call.func
        else:
            call = getattr(call, "__self__", None) or getattr(call, "__wrapped__", None)
            if isinstance(call, nn.Module):
                return False
        seen += 1
    return False


def _package(where: str) -> str:
    return (
        f"{where} is an AOTInductor package, which holds weights of its own on the device: there is nothing to offload, and "
        "what the pipeline's weights are changed to has no effect. Use torch.compile or compile_repeated_blocks() instead, or "
        f"{_LEAVE_OUT}."
    )


def _captured(module: torch.fx.GraphModule) -> str | None:
    """A tensor that the graph reads and that no `.to()` would move: on the host, or large. Scalars mix with any device."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        *path, last = str(node.target).split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, None)
        value = owner.__dict__.get(last) if isinstance(owner, nn.Module) else None
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        if value.device.type == "cpu" or value.numel() * value.itemsize >= MIB:
            return str(node.target)
    return None


_looked: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def refuse_frozen(name: str, module: nn.Module, compiled: frozenset[int] | None = None) -> None:
    """Refuse Inductor's freezing for a component with compiled code: it folds the weights into the graph.

    Args:
        compiled: identities of its modules with compiled calls; unless they have changed there is nothing to look for.

    Raises:
        UnsupportedError: with what to do instead.
    """
    config = sys.modules.get("torch._inductor.config")
    if config is None:
        return  # Inductor has compiled nothing, and nobody has set anything
    if not getattr(config, "freezing", False) and compiled is not None and _looked.get(module) == compiled:
        return
    for part in module.modules():
        for key in ("_compiled_call_impl", "forward", "decode", "encode"):
            _refuse_frozen_call(name, part.__dict__.get(key))
    if compiled is not None:
        _looked[module] = compiled


def _refuse_frozen_call(name: str, call: Any) -> None:
    settings = inductor_settings(call)
    if settings is None:
        return
    if settings.get("freezing") or getattr(sys.modules.get("torch._inductor.config"), "freezing", False):
        raise UnsupportedError(
            f"{name} is compiled by Inductor with freezing, which folds the weights that it finds on the device into the "
            "graph: offloaded weights would be ignored from then on, and their memory never given back. Set "
            "torch._inductor.config.freezing = False (TORCHINDUCTOR_FREEZING=0, or no 'freezing' in the options of "
            f"torch.compile) and compile again, or {_LEAVE_OUT}."
        )


def refuse_compiled(component: Component, call: Any, compiled: frozenset[int]) -> None:
    """Before a component is entered that may have been compiled since it was enabled. Quick where it was not.

    Args:
        call: compiled code around all of the module, if that is what is about to run.
        compiled: see `refuse_frozen`.

    Raises:
        UnsupportedError: as `refuse`.
    """
    name, module = component.name, component.module
    for each in (call, module.__dict__.get("forward")):
        if each is not None and is_package(each):
            raise UnsupportedError(_package(name))
    if call is not None:
        _refuse_frozen_call(name, call)
    if compiled:
        refuse_frozen(name, module, compiled)
