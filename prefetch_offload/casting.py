"""diffusers' layerwise casting, told apart from a change of the weights.

Its hook casts a leaf's weights up before the leaf runs and down again after it: the values that come back are those that
were there, in new memory. Showing the twin's own memory again instead saves the cast, keeps the weights in their unit and
leaves nothing to write back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .masters import Master

_NAME = "layerwise_casting"
Slot = tuple[dict[str, Any], str, Master]


def casting_hook(module: nn.Module) -> Any:
    """The layerwise casting hook of a leaf module, or None."""
    registry = module.__dict__.get("_diffusers_hook")
    return registry.get_hook(_NAME) if registry is not None else None


def keep_twins(modules: list[nn.Module], slots: list[Slot]) -> Callable[[], None]:
    """After each leaf with the hook, show the twins' own memory again. Returns a function that undoes this."""
    by_entries: dict[int, list[Slot]] = {}
    for slot in slots:
        by_entries.setdefault(id(slot[0]), []).append(slot)
    changed: list[tuple[Any, Callable[..., Any]]] = []
    for module in modules:
        hook = casting_hook(module)
        if hook is None:
            continue
        own = by_entries.get(id(module._parameters), []) + by_entries.get(id(module._buffers), [])
        stock = getattr(hook.fn_ref.post_forward, "stock", hook.fn_ref.post_forward)
        post_forward = functools.partial(_restore, stock, own)
        post_forward.stock = stock  # type: ignore[attr-defined]
        hook.fn_ref.post_forward = post_forward
        changed.append((hook.fn_ref, stock))

    def undo() -> None:
        for reference, stock in changed:
            reference.post_forward = stock

    return undo


def _restore(stock: Callable[..., Any], slots: list[Slot], module: nn.Module, output: Any) -> Any:
    if not all(entries.get(key) is master.twin and master.twin_data is not None for entries, key, master in slots):
        return stock(module, output)
    for entries, key, master in slots:
        assert master.twin_data is not None
        entries[key].data = master.twin_data
    return output
