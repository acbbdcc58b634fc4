"""The hook that stands where accelerate's stands: same name, same base, same attributes, another engine below."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import accelerate.hooks
import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from torch import nn

from ..captured import refuse_compiled
from ..clients import Client
from ..compiling import compiled_code, watch
from ..component import Component
from ..config import Settings
from ..device import is_out_of_memory
from ..engine import Engine
from ..errors import RecompileError
from ..registry import engine_for


@dataclasses.dataclass(eq=False)
class Session:
    """What a hook needs to know of the pipeline it serves. `engine` is known once the first component is hooked."""

    client: Client
    settings: Settings
    _engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "nothing has been hooked"
        return self._engine

    def on(self, device: torch.device) -> None:
        """Components run on `device`. Raises SettingError if its engine is in use with other settings."""
        self._engine = engine_for(device, self.settings)
        self._engine.clients.add(self.client)
        watch.start()

    def on_any(self, device: torch.device | None) -> None:
        """Nothing has been hooked, as in a pipeline without models: `device`, or what PyTorch finds."""
        device = device or torch.accelerator.current_accelerator()
        if device is not None:
            self.on(device)

    @property
    def hooked(self) -> bool:
        """Some component has been."""
        return self._engine is not None


def _through(component: Component, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One pass of a component that is ready. With ``strict_compile``, compiling again is an error once the pass is over."""
    before, again = watch.begin(component), []
    try:
        stream = component.stream
        if stream is None:
            result = call(*args, **kwargs)
        else:
            result = stream.watched(call, args, kwargs)
            stream.end_pass()
    finally:
        again = watch.end(before)
    if again and component.client.settings.strict_compile:
        raise RecompileError(
            f"{component.name} was compiled again, or in pieces, and strict_compile=True:" + "".join(f"\n  {r}" for r in again)
        )
    return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, with what is in lists, tuples and dictionaries among them in place of these."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value


def shape_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """Stands for how much activation memory a call takes: shapes and dtypes of its tensors, and tiling switches."""
    tensors = [a for a in _flat([*args, *kwargs.values()]) if isinstance(a, torch.Tensor)]
    switches = tuple(bool(module.__dict__.get(name)) for name in ("use_tiling", "use_slicing", "training"))
    return tuple((tuple(t.shape), t.dtype) for t in tensors), switches


class CpuOffload(accelerate.hooks.CpuOffload):
    """Makes its module ready on the device before it runs.

    diffusers and peft test for the base class, others look the class up in `accelerate.hooks` by its name; both must
    hold. Staging is invisible until `pre_forward`; nothing is evicted in `post_forward`, since pipelines read weights of a
    component after its forward.
    """

    def __init__(
        self, execution_device: str | int | torch.device | None = None, prev_module_hook: Any = None
    ) -> None:
        super().__init__(execution_device, prev_module_hook)
        self.session: Session | None = None
        self._component: Component | None = None
        self._name = ""  # of what it served last

    @property
    def component(self) -> Component | None:
        """What this hook serves; a part of a larger component once that has been taken in."""
        while self._component is not None and self._component.absorbed_by is not None:
            self._component = self._component.absorbed_by
        return self._component

    def serve(self, module: nn.Module, session: Session, name: str, pipe: DiffusionPipeline | None = None) -> None:
        """Take `module` in, for the pipeline `pipe` if that is being enabled."""
        from ..handle import sharing

        self.session = session
        component = session.engine.component(module, session.settings, name, sharing(module, session, pipe))
        component.client = session.client
        known = session.client.components
        for key in [k for k, c in known.items() if c.absorbed_by is component]:
            del known[key]
        known[component.key] = component
        self._component = component

    # ------------------------------------------------------- what accelerate calls
    def init_hook(self, module: nn.Module) -> nn.Module:
        """The weights are on the host from here on: when hooks are chained, and in `UserCpuOffloadHook.offload()`."""
        component = self.component
        if component is None or self.session is None:
            return module.to("cpu")
        self.session.engine.evict([component])
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the module's weights ready on the current stream, and move the inputs as stock does. Idempotent."""
        if torch.compiler.is_compiling():  # before the lock, which Dynamo cannot trace
            return args, kwargs
        component = self.component
        with component.turn if component is not None else contextlib.nullcontext():
            return self._enter(module, args, kwargs, called=False)

    def _enter(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        called: bool,
        whole: bool = False,
        call: Callable[..., Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            return args, kwargs
        component = self.component
        if component is None:
            if self.session is None:
                return super().pre_forward(module, *args, **kwargs)  # type: ignore[no-any-return]
            self.serve(unwrap(module), self.session, self._name or type(module).__name__)
            component = self.component
        assert component is not None and self.session is not None
        engine = self.session.engine
        if self._is_ready(component, self.session, whole):
            return args, kwargs
        code, compiled = compiled_code(call) if whole else None, component.compiled_now()
        refuse_compiled(component, code, compiled)
        if self.session.client.settings.stable_addresses is None and not component.graphs:
            component.look_for_graphs(code, compiled)
        previous = getattr(self.prev_module_hook, "hook", None)
        previous = previous.component if isinstance(previous, CpuOffload) else None
        engine.enter(component, shape_of(module, args, kwargs), previous, called, whole)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    @staticmethod
    def _is_ready(component: Component, session: Session, whole: bool) -> bool:
        """There is nothing to enter."""
        return session.engine.is_current(component) and not (whole and component.stream is not None)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Weights stay where they are shown; masters, pins and staging are released, unless others still need them."""
        from .entry import restore_class

        component, session = self.component, self.session
        self._component = None  # interrupted from here on, the next entry takes the module in again
        if component is not None and session is not None:
            self._name = component.name
            session.engine.detach(component)
            session.client.components.pop(component.key, None)
        restore_class(module)
        return module

    # ------------------------------------------------------------- what we call
    def show_exact(self) -> None:
        """Show the masters if what the module shows on the device is what a lossy transport has left of them."""
        component, session = self.component, self.session
        if component is not None and session is not None and component.rounded:
            session.engine.show_masters([component])

    def run(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: bool = False,
    ) -> Any:
        """`call` between entry and return. Out of memory: once more, alone, with the device's generator as it was.

        Args:
            whole: `call` is compiled code around all of the module.

        One thread at a time runs a component: while units come and go, there is one window.
        """
        component = self.component
        if component is not None and not component.runs_in(threading.get_ident()):
            with component.turn:
                return self._run(module, call, args, kwargs, whole)
        return self._run(module, call, args, kwargs, whole)

    def _run(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool
    ) -> Any:
        component, session, thread = self.component, self.session, threading.get_ident()
        # Most calls are a denoiser's second and later steps, which have nothing to enter.
        if component is None or session is None or not self._is_ready(component, session, whole):
            args, kwargs = self._enter(module, args, kwargs, called=True, whole=whole, call=call)
            component, session = self.component, self.session
        if component is None or session is None or component.runs_in(thread):  # the latter: forward, within its __call__
            return call(*args, **kwargs)
        engine = session.engine
        engine.pass_begins(component)
        lanes, grad = engine.lanes, torch.is_grad_enabled()
        if grad:
            engine.keep_memory(component)
        retry = not grad and not component.running and _repeatable(args, kwargs) and not lanes.capturing()
        versions = [t._version for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)] if retry else []
        state = lanes.generator_state() if retry else None
        failed, run = 0, component.begin(thread)
        try:
            while True:
                try:
                    return _through(component, call, args, kwargs)
                except RuntimeError as error:
                    if not retry or not is_out_of_memory(error):
                        raise
                    if versions != [t._version for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]:
                        raise  # its inputs are no longer what they were
                    if failed >= (2 if component.streamable else 1) or _keeps_state(module):
                        raise
                # Out of the handler, so that the failed forward's frames and their tensors are gone.
                engine.out_of_memory(component, again=failed > 0)
                failed += 1
                lanes.set_generator_state(state)
        finally:
            run.over = True
            component.end(thread)

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuOffload:
        """A copy serves the copied module, taken in when it first runs."""
        copy = CpuOffload(self.execution_device)
        copy.session = self.session
        memo[id(self)] = copy
        return copy

    def __reduce__(self) -> Any:
        # Engines do not travel: what is unpickled is stock's hook.
        return accelerate.hooks.CpuOffload, (self.execution_device,)


_PLAIN = (torch.Tensor, str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size, type(None))


def _repeatable(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A second forward with these arguments would be the same computation, if no gradients are recorded.

    Not with objects that a forward may have changed, as a key-value cache; and not with inference tensors, whose changes
    leave no mark.
    """
    values = _flat([*args, *kwargs.values()])
    return all(isinstance(v, _PLAIN) and not (isinstance(v, torch.Tensor) and v.is_inference()) for v in values)


def _keeps_state(module: nn.Module) -> bool:
    """A forward that was broken off may have left something for the next one: diffusers' caches, which keep residuals."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook._is_stateful for registry in registries if registry is not None for hook in registry.hooks.values())


def unwrap(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    inner = module.__dict__.get("_orig_mod") or module._modules.get("_orig_mod")
    return inner if isinstance(inner, nn.Module) else module
