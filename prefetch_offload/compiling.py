"""torch.compile beside offload: what was compiled while which component ran, and what would break a guard.

# [Note: compile watch]
Dynamo calls a bytecode hook for every frame it has compiled, in the thread that compiles and under Dynamo's lock. The hook
looks up which component runs in that thread. Nothing is called where nothing is compiled: eager programs pay one
thread-local assignment per call of a component. Graphs, breaks and reasons are read from Dynamo's own tables, as growth
since the last look; where a version of PyTorch lacks one, the figure is None, which reports show as "not counted".
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .errors import OffloadWarning

if TYPE_CHECKING:
    from .component import Component
    from .masters import Master


# Where a module keeps what was compiled of it.
_COMPILED = ("_compiled_call_impl", "forward", "decode", "encode")


@dataclasses.dataclass
class Counts:
    """Graphs handed to a backend, graph breaks, and the reason of each recompile."""

    graphs: int = 0
    breaks: int = 0
    recompiles: list[str] = dataclasses.field(default_factory=list)

    def add(self, graphs: int, breaks: int, recompiles: list[str]) -> None:
        self.graphs += graphs
        self.breaks += breaks
        self.recompiles += recompiles


class Signature(NamedTuple):
    """What Dynamo guards on of a parameter or buffer."""

    type: type
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    requires_grad: bool
    keys: str | None


def signature(tensor: torch.Tensor) -> Signature:
    """The tensor's. Values that it or this PyTorch does not have are None."""
    stride = tuple(tensor.stride()) if tensor.layout == torch.strided else None
    keys = getattr(torch._C, "_dispatch_keys", None)
    found = str(keys(tensor)) if keys is not None else None
    return Signature(type(tensor), tensor.dtype, tuple(tensor.shape), stride, tensor.requires_grad, found)


class Compiled:
    """One component whose code, or some of it, has been compiled.

    Attributes:
        total, call: counts since it was enabled, and in the last call of its pipeline.
        codes: identities of the code objects compiled while it ran, with the code, which so cannot be freed.
        unseen: recompiles and breaks of the run in progress.
        fresh: something has been compiled in it.
    """

    def __init__(self, component: Component) -> None:
        self.total, self.call = Counts(), Counts()
        self.codes: dict[int, CodeType] = {}
        self.unseen: list[str] = []
        self.fresh = True
        self._name = component.name
        # by a parameter's name: the twin that was last shown, and what it looked like
        self._shown: dict[str, tuple[weakref.ref[torch.Tensor], Signature]] = {}
        self._told: set[tuple[str, object, object]] = set()

    def add(self, graphs: int, breaks: int, recompiles: list[str]) -> None:
        self.total.add(graphs, breaks, recompiles)
        self.call.add(graphs, breaks, recompiles)
        self.unseen += recompiles
        self.fresh = True
        if breaks:
            self.unseen.append(f"{breaks} graph break{'s' if breaks > 1 else ''}; TORCH_LOGS=graph_breaks tells where")

    def restructured(self) -> None:
        """It has other modules now, an adapter's for example: their code is compiled anew, whatever its weights look like."""
        self._shown.clear()

    def check(self, masters: Iterable[Master]) -> None:
        """These twins are shown from now on. One that compiled code will not accept is reported, each kind once."""
        changed: dict[tuple[str, object, object], list[str]] = {}
        for master in masters:
            twin = master.twin
            if twin is None:
                continue
            known = self._shown.get(master.name)
            if known is not None and known[0]() is twin and twin.requires_grad is known[1].requires_grad:
                continue
            now = signature(twin)
            self._shown[master.name] = weakref.ref(twin), now
            if known is not None and now != known[1]:
                for guard, old, new in zip(Signature._fields, known[1], now, strict=True):
                    if old != new:
                        changed.setdefault((guard, old, new), []).append(master.name)
        for (guard, old, new), names in changed.items():
            if (guard, old, new) in self._told or (guard == "keys" and len(changed) > 1):
                continue  # keys follow from the rest
            self._told |= {(guard, old, new), (guard, new, old)}  # on the way back, what was compiled first will do
            guard = "dispatch keys" if guard == "keys" else guard
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            warnings.warn(
                f"{self._name}.{names[0]}{others}: {guard} was {old} when its code was compiled and is {new} now. The guard "
                f"on its {guard} fails, and the code is compiled again. Make such changes before the first compiled call.",
                OffloadWarning,
                stacklevel=2,
            )


class CompileWatch:
    """Attributes compilations to components. There is one: `watch`.

    A frame that Dynamo gives up on as a whole is seen when the component returns, by its graph break; if several threads
    compile at that instant it may be counted for the wrong one.

    Attributes:
        missing: why compilations cannot be counted with this PyTorch; empty: they can.
    """

    def __init__(self) -> None:
        self.missing = ""
        self._here = threading.local()
        self._lock = threading.Lock()
        self._started = False
        self._running = 0
        self._frames = self._graphs = self._breaks = 0
        # by value of the code, as Dynamo keeps it: the list of reasons that was last seen, and how long it was
        self._reasons: dict[CodeType, tuple[list[Any], int]] = {}
        # by a code's identity: the code, and the modules that it was compiled for
        self._owners: dict[int, tuple[weakref.ref[CodeType], weakref.WeakSet[nn.Module]]] = {}

    def start(self) -> None:
        """Count from now on. Again is a no-op."""
        if self._started or self.missing:
            return
        try:
            from torch._dynamo.convert_frame import register_bytecode_hook
            from torch._dynamo.utils import counters, guard_failures
        except ImportError as error:
            self.missing = f"PyTorch {torch.__version__} has no {error.name or error}"
            return
        self._counters, self._failures = counters, guard_failures
        self._rebase()
        for code, reasons in list(guard_failures.items()):
            self._reasons[code] = reasons, len(reasons)
        register_bytecode_hook(self._compiled)
        self._started = True

    # ------------------------------------------------------------ around a run
    def begin(self, component: Component) -> Component | None:
        """`component` runs in this thread from now on. Returns what did before, for `end`."""
        before: Component | None = getattr(self._here, "component", None)
        self._here.component = component
        if self._started:
            with self._lock:
                # What the program compiled meanwhile is none of ours, and it may have cleared the tables.
                if not self._running and (
                    self._count_of("frames", "total") != self._frames
                    or self._count_of("stats", "unique_graphs") != self._graphs
                ):
                    self._rebase()
                self._running += 1
        return before

    def end(self, before: Component | None) -> list[str]:
        """It returned or raised. Gives its recompiles and breaks, in words."""
        component: Component = self._here.component
        self._here.component = before
        if not self._started:
            return []
        with self._lock:
            self._running -= 1
            if self._count_of("frames", "total") != self._frames:
                self._skipped(component)
        compiled = component.compiled
        if compiled is None or not compiled.fresh:
            return []
        compiled.fresh = False
        compiled.check(component.masters)
        found, compiled.unseen = compiled.unseen, []
        return found

    # ------------------------------------------------------- Dynamo's own tables
    def _count_of(self, table: str, name: str) -> int:
        found = self._counters.get(table)
        return found.get(name, 0) if found else 0

    def _rebase(self) -> tuple[int, int]:
        """What has come since the last look: graphs and breaks."""
        graphs, breaks = self._count_of("stats", "unique_graphs"), sum(self._counters.get("graph_break", {}).values())
        # less than before: someone has cleared the tables
        grown = graphs - self._graphs if graphs >= self._graphs else graphs
        broken = breaks - self._breaks if breaks >= self._breaks else breaks
        self._graphs, self._breaks, self._frames = graphs, breaks, self._count_of("frames", "total")
        return grown, broken

    def _new_reasons(self, code: CodeType) -> list[str]:
        """Why no earlier compilation of `code` would do, since the last look."""
        reasons = self._failures.get(code)
        if not reasons:
            return []
        known, seen = self._reasons.get(code, (None, 0))
        self._reasons[code] = reasons, len(reasons)
        # Each on one line: some come with the source of a guard, or with a stack.
        return [" ".join(str(r).split()) for r in (reasons[seen:] if known is reasons else reasons)]

    def _compiled(self, code: CodeType, new: CodeType) -> None:
        """Dynamo's hook: a frame has been compiled. It must not raise, which would spoil the compilation."""
        try:
            with self._lock:
                self._count(code)
        except Exception as error:
            self.missing = f"counting stopped: {type(error).__name__}: {error}"

    def _count(self, code: CodeType) -> None:
        graphs, breaks = self._rebase()
        reasons = self._new_reasons(code)
        component: Component | None = getattr(self._here, "component", None)
        if component is None:
            return
        compiled = component.compiled
        if compiled is None:
            compiled = component.compiled = Compiled(component)
        known, owners = self._owners.get(id(code), (None, None))
        if owners is None or known is None or known() is not code:  # a code object that was freed leaves its identity
            owners = weakref.WeakSet()
            self._owners[id(code)] = weakref.ref(code), owners
        # Code that two components share, and that has been compiled for the other only, is compiled here for the first time.
        # The module counts: enabling again makes another component of it, while the first may or may not be collected yet.
        first = component.module not in owners and len(owners) > 0
        compiled.codes[id(code)] = code
        owners.add(component.module)
        compiled.add(graphs, breaks, [_told(code, reasons)] if reasons and not first else [])

    def _skipped(self, component: Component) -> None:
        """Frames that Dynamo gave up on: by a graph break of all of it, or since it was compiled too often already."""
        _, breaks = self._rebase()
        compiled = component.compiled
        lost = []
        for code in compiled.codes.values() if compiled is not None else ():
            reasons = self._new_reasons(code)
            if reasons:
                lost.append(_told(code, reasons) + "; not compiled again, it runs eagerly")
        if breaks or lost:
            if compiled is None:
                compiled = component.compiled = Compiled(component)
            compiled.add(0, breaks, lost)


def _told(code: CodeType, reasons: list[str]) -> str:
    """The last reason is about the compilation that came closest."""
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}): {'; '.join(dict.fromkeys(reasons))}"


def inductor_settings(call: Any) -> dict[str, Any] | None:
    """The settings that a call was compiled by Inductor with; None: it was not."""
    call = getattr(call, "point_of", call)
    ask = getattr(call, "get_compiler_config", None)
    if ask is None:
        return None
    try:
        found = ask()
    except Exception:
        return None  # a private matter of this PyTorch's
    return found if isinstance(found, dict) else None


def compiled_code(call: Any) -> Any:
    """The compiled code that a call runs: an OptimizedModule's lies in it."""
    return call.args[0].__dict__.get("forward") if isinstance(call, functools.partial) else call


# Where Dynamo keeps what it wraps: a call's context is in its closure, and each wrapper of the backend names the next.
_WRAPPED = ("callback", "_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "func", "__self__")
_RECORDS = "torch._dynamo.backends.cudagraphs"


def records_graphs(call: Any) -> bool:
    """A call was compiled by the backend that records CUDA graphs without Inductor (``backend="cudagraphs"``)."""
    call = getattr(call, "point_of", call)
    if _RECORDS not in sys.modules or not hasattr(call, "_torchdynamo_orig_callable"):
        return False
    cells = getattr(call, "__closure__", None) or ()
    stack = [v for c in cells if type(v := _content(c)).__module__.startswith("torch._dynamo")]
    seen: dict[int, Any] = {}
    while stack and len(seen) < 64:
        each = stack.pop()
        if id(each) in seen or isinstance(each, nn.Module):
            continue
        seen[id(each)] = each
        if _RECORDS in (getattr(each, "__module__", ""), type(each).__module__):
            return True
        stack += [found for name in _WRAPPED if (found := getattr(each, name, None)) is not None]
    return False


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def uses_cuda_graphs(module: nn.Module, call: Any) -> bool:
    """Whether `module`, or some of it, is compiled with CUDA graphs: ``mode="reduce-overhead"``, say.

    Args:
        call: what is about to run, if that is compiled code around all of the module.
    """
    if not may_be_compiled():
        return False
    calls = [call, *(part.__dict__.get(key) for part in module.modules() for key in _COMPILED)]
    return any(
        (inductor_settings(each) or {}).get("triton.cudagraphs") or records_graphs(each) for each in calls if each is not None
    )


def may_be_compiled() -> bool:
    """Something may have been compiled with CUDA graphs in this process."""
    return "torch._inductor.config" in sys.modules or _RECORDS in sys.modules


watch = CompileWatch()
