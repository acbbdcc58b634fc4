"""Where a component's units are read: the modules before which a unit has to be there.

# [Note: points]
A *point* is a module that is called, together with the units that its parameters and those of everything below it lie
in. Points are as large as they can be with a single unit: a whole transformer block where a unit holds it, its parts where
the block was split. While a unit may be missing, its points are called through a wrapper that awaits it.

The wrapper is the instance's ``_compiled_call_impl``, which ``nn.Module.__call__`` prefers to anything else. So it stands
outside of what a block's own ``.compile()`` traces, replaces neither class nor ``forward``, and is gone without a trace when
it is taken off: a resident component runs with nothing inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .loading import Unit
from .masters import modules_of

# Their forward reads weights of modules below them without calling those.
_READS_WITHIN = (nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_UNCALLED = getattr(nn.modules.module, "_forward_unimplemented", None)


class Reader(Protocol):
    """What is told of the calls of points."""

    def before(self, point: Point) -> None: ...

    def after(self, point: Point) -> None: ...


class Point:
    """A module and the units it reads when it is called.

    Attributes:
        module: the module.
        units: keys of the units, in definition order.
        number: its place in definition order.
    """

    def __init__(self, module: nn.Module, units: tuple[str, ...], number: int) -> None:
        self.module, self.units, self.number = module, units, number
        self._original: Any = None
        self._wrapper: Callable[..., Any] | None = None

    @property
    def installed(self) -> bool:
        return self._wrapper is not None and self.module.__dict__.get("_compiled_call_impl") is self._wrapper

    def install(self, reader: Reader) -> None:
        """Call `reader` around each call of the module from now on."""
        if self.installed:
            return
        original = self._original = self.module.__dict__.get("_compiled_call_impl")
        call = original if original is not None else self.module._call_impl

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            reader.before(self)
            result = call(*args, **kwargs)
            reader.after(self)
            return result

        wrapper.point_of = original  # type: ignore[attr-defined]
        self._wrapper = wrapper
        self.module.__dict__["_compiled_call_impl"] = wrapper

    def remove(self) -> None:
        """Undo `install`; what someone has put there since stays."""
        if self.installed:
            if self._original is None:
                del self.module.__dict__["_compiled_call_impl"]
            else:
                self.module.__dict__["_compiled_call_impl"] = self._original
        self._wrapper = self._original = None


def is_traced(module: nn.Module) -> bool:
    """torch.compile, or someone else's replacement, stands between a call of the module and those of the modules below."""
    call = module.__dict__.get("_compiled_call_impl")
    call = getattr(call, "point_of", call)  # what a point's wrapper stands before
    return (
        isinstance(module, torch._dynamo.OptimizedModule | torch.jit.ScriptModule)
        or call is not None
        or not _forwards_itself(module)
    )


def _forwards_itself(module: nn.Module) -> bool:
    """Its `forward` is its class's. accelerate's hooks, and so stock offload, leave that on the instance when they go."""
    found = module.__dict__.get("forward")
    if found is None:
        return True
    function = getattr(found, "__func__", None)
    return getattr(found, "__self__", None) is module and any(
        vars(c).get("forward") is function for c in type(module).__mro__
    )


def traced(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Identities of those that are traced. A glance: it is taken at every first entry."""
    marks = ("_compiled_call_impl", "forward")
    return frozenset(id(m) for m in modules if (marks[0] in m.__dict__ or marks[1] in m.__dict__) and is_traced(m))


def find_points(root: nn.Module, units: Sequence[Unit]) -> tuple[list[Point], frozenset[str]]:
    """The points of a component, in definition order, and the units that `root` itself reads.

    The latter have to be there throughout a run: units with tensors of `root`'s own or of modules that are never called,
    such as a ParameterList; and the one with the first parameter, by which pipelines and models tell where a component is
    (``unet.device``). Where `root` itself is traced, that is all of them.
    """
    readers: dict[int, set[str]] = {}
    rank = {u.key: i for i, u in enumerate(units)}
    for unit in units:
        for master in unit.masters:
            for entries, _ in master.slots:
                readers.setdefault(id(entries), set()).add(unit.key)

    below: dict[int, frozenset[str]] = {}

    def units_below(module: nn.Module) -> frozenset[str]:
        known = below.get(id(module))
        if known is None:
            below[id(module)] = frozenset()  # a module that contains itself
            found = readers.get(id(module._parameters), set()) | readers.get(id(module._buffers), set())
            for child in module._modules.values():
                if child is not None:
                    found = found | units_below(child)
            known = below[id(module)] = frozenset(found)
        return known

    def own(module: nn.Module) -> set[str]:
        """Units of tensors that the module's own forward reads."""
        found = readers.get(id(module._parameters), set()) | readers.get(id(module._buffers), set())
        for child in module._modules.values():
            if child is not None and type(child).forward is _UNCALLED:
                found = found | own(child)
        return found

    points: list[Point] = []
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        needs = units_below(module)
        if not needs:
            return
        called = type(module).forward is not _UNCALLED
        whole = len(needs) == 1 or isinstance(module, _READS_WITHIN) or is_traced(module) or bool(own(module))
        if called and whole:
            points.append(Point(module, tuple(sorted(needs, key=rank.__getitem__)), len(points)))
            return
        for child in module._modules.values():
            if child is not None:
                visit(child)

    if is_traced(root) or isinstance(root, _READS_WITHIN):
        return [], frozenset(rank)
    for child in root._modules.values():
        if child is not None:
            visit(child)
    reached = {u for point in points for u in point.units}
    first = next((readers[id(m._parameters)] for m in modules_of(root) if id(m._parameters) in readers), set())
    return points, frozenset(own(root)) | frozenset(first) | (frozenset(rank) - reached)


def least_nbytes(nbytes: Mapping[str, int], points: Sequence[Point], must: frozenset[str]) -> int:
    """The fewest bytes that a component can run with; without points, all of it."""
    if not points:
        return sum(nbytes.values())
    once = max(sum(nbytes[u] for u in p.units if u not in must) for p in points)
    return sum(nbytes[u] for u in must) + once
