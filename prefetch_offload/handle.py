"""`Offload`: the handle of an enabled pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import accelerate.hooks
import torch
from diffusers import DiffusionPipeline
from torch import nn

from . import segments
from . import trace as tracing
from .adapter import pipeline as adapter
from .adapter.entry import attach, is_cut_off
from .adapter.hooks import CpuOffload, Session, unwrap
from .adoption import check_tensors
from .captured import refuse
from .clients import Call, Client
from .compiling import Counts
from .component import Component
from .config import Budget, Settings, parse_budget
from .engine import Engine
from .errors import OffloadWarning, SettingError
from .hazards import Hazard
from .least import smallest_budget
from .report import render
from .stats import Plan, Stats, collect, predicted
from .stats import plan as plan_of


def hook_of(module: Any) -> CpuOffload | None:
    """Our hook on a module, compiled or not; also when someone chained another one to it."""
    hooks = [unwrap(module).__dict__.get("_hf_hook")] if isinstance(module, nn.Module) else []
    for hook in hooks:
        if type(hook) is CpuOffload:
            return hook
        hooks += getattr(hook, "hooks", ())  # accelerate's SequentialHook
    return None


_handles: weakref.WeakSet[Offload] = weakref.WeakSet()


def _enabled() -> Iterator[tuple[Offload, DiffusionPipeline]]:
    """Pipelines that are enabled, with their handles."""
    for offload in list(_handles):
        pipe = offload._pipe()
        if pipe is not None and adapter.offload_of(pipe) is offload:
            yield offload, pipe


def sharing(module: nn.Module, session: Session, pipe: DiffusionPipeline | None = None) -> list[Settings]:
    """Settings of the other enabled pipelines that offload `module`.

    Args:
        session, pipe: of the one that they are other than; it may be being enabled.
    """
    family = [pipe, *adapter.parts_of(pipe)] if pipe is not None else []
    found = []
    for offload, other in _enabled():
        if not offload.active or offload._session.client is session.client:
            continue
        if any(p is other for p in family) or any(p is pipe for p in adapter.parts_of(other)):
            continue  # a combined pipeline and what it is made of
        theirs = [m for name, m in other.components.items() if not adapter.left_out(other, name)]
        if any(isinstance(m, nn.Module) and unwrap(m) is module for m in theirs):
            found.append(offload.settings)
    return found


def _pipeline_gone(handle: weakref.ref[Offload], clients: weakref.WeakSet[Client]) -> None:
    """A handle that outlives its pipeline does not keep the components alive; nor is anything handed over to what is left of
    the pipeline where another one has its modules, whose hooks may know it still."""
    offload = handle()
    for client in list(clients):
        if offload is not None:
            offload._leftovers.update(client.components.values())
        client.components.clear()
    segments.leave(offload)


class Offload:
    """The handle of an enabled pipeline; there is one per pipeline. As a context manager it disables on exit."""

    def __init__(self, pipe: DiffusionPipeline, session: Session) -> None:
        self._pipe = weakref.ref(pipe)
        self._clients: weakref.WeakSet[Client] = weakref.WeakSet()  # the pipeline's, each time it was enabled
        self._use(session)
        self._leftovers: weakref.WeakSet[Component] = weakref.WeakSet()
        weakref.finalize(pipe, _pipeline_gone, weakref.ref(self), self._clients).atexit = False
        _handles.add(self)

    def _use(self, session: Session) -> None:
        """The pipeline was enabled, or enabled again, in this session."""
        self._session = session
        self._clients.add(session.client)

    def __repr__(self) -> str:
        pipe = self._pipe()
        return f"<Offload of {type(pipe).__name__ if pipe is not None else 'a pipeline that is gone'} on {self.device}>"

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    @property
    def settings(self) -> Settings:
        """What the pipeline was enabled with."""
        return self._session.settings

    @property
    def budget(self) -> Budget:
        """Device bytes for weights and activations, ``"stock"`` or None; can be set between calls.

        Raises:
            SettingError: it is no budget, or a call is in progress.
            BudgetError: some component's weights cannot, whatever is streamed. The budget is as it was. Activations, which
                depend on a call's inputs, are for the call to refuse.
        """
        return self._session.settings.budget

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        from .api import check_addresses, check_budget

        pipe, client = self._pipe(), self._session.client
        settings = dataclasses.replace(self.settings, budget=parse_budget(value))
        if pipe is None:
            raise SettingError("the pipeline is gone: there is nothing to set a budget for.")
        if client.calling:
            raise SettingError("the pipeline is being called: set its budget between two calls.")
        check_budget(pipe, settings, smallest_budget(self._engine, client)[0] if client.inputs else 0)
        if settings.stable_addresses:
            check_addresses(pipe, settings, self.device)
        self._session.settings = client.settings = settings
        self._engine.rebudget(client, settings.budget)
        self._suit_allocator()

    @property
    def device(self) -> torch.device:
        """Where components run."""
        return self._engine.device

    @property
    def _engine(self) -> Engine:
        return self._session.engine

    def _suit_allocator(self) -> None:
        """Free memory is put together where the pipeline does not fit well ([Note: segments])."""
        wanted, engine, client = self.settings.expandable_segments, self._engine, self._session.client
        if wanted is None:
            budget = client.memory.budget
            room = 0 if budget == "stock" else budget if isinstance(budget, int) else engine.available(client)
            needed = 2 * sum(c.nbytes for c in client.components.values()) > room
        else:
            needed = wanted
        if needed:
            segments.use(self, self.device, wanted)
        else:
            segments.leave(self)

    # ------------------------------------------------------------------ figures
    @property
    def stats(self) -> Stats:
        """A snapshot of what moved and what it cost. Waits for the device."""
        return collect(self._engine, self._session.client)

    def report(self) -> str:
        """`stats` as a table: what moved, what was hidden behind compute and what was exposed."""
        return render(self.stats)

    def timeline(self) -> tracing.Timeline:
        """Everything recorded on this device, as spans. Waits for the device."""
        return self._engine.timeline()

    def trace(self, path: str | Path) -> None:
        """Write the timeline to `path` as a Chrome trace, with what was predicted beside the last call; Perfetto opens it."""
        timeline = self.timeline()
        tracing.write(timeline, path, predicted(self._session.client, timeline))

    @property
    def plan(self) -> Plan:
        """The order expected of the next call, and what of it is on the device already."""
        return plan_of(self._engine, self._session.client)

    @property
    def hazards(self) -> list[Hazard]:
        """With ``verify=True``: accesses that the device could run in the wrong order. None is what you want."""
        return list(self._engine.lanes.hazards)

    # ------------------------------------------------------------------ control
    def release(self) -> None:
        """Give back all device memory that this pipeline's weights hold. The next call loads again."""
        self._engine.evict(list(self._session.client.components.values()))
        self._engine.lanes.empty_cache()

    def refresh(self) -> None:
        """Weights on the host were changed by hand: forget device copies, and look at every tensor again."""
        self._engine.evict(list(self._session.client.components.values()))
        self._engine.refresh(self._session.client)

    def show_masters(self) -> None:
        """Components show their host weights, as between calls; device copies stay."""
        self._engine.show_masters(list(self._session.client.components.values()))

    def disable(self) -> None:
        """Undo `enable`: weights on the host in ordinary memory, no hooks, no device memory. Again is a no-op."""
        segments.leave(self)
        pipe = self._pipe()
        engine, client = self._engine, self._session.client
        mine = [*client.components.values(), *self._leftovers]
        engine.evict([c for c in mine if engine.heir(c, client) is None])
        if pipe is None:  # gone already: components that something else keeps alive go, too
            for component in list(self._leftovers):
                self._unhook(component.module)
            return
        if adapter.offload_of(pipe) is not self:
            return
        for part in adapter.parts_of(pipe):
            segments.leave(adapter.offload_of(part))
            self._unhook_all(part)
            adapter.let_go(part)
        self._unhook_all(pipe)
        for component in list(client.components.values()):  # hooked by an override, not a component of the pipeline
            if engine.heir(component, client) is None:
                engine.remove(component)
        client.components.clear()
        adapter.let_go(pipe)
        engine.lanes.empty_cache()

    def _unhook_all(self, pipe: DiffusionPipeline) -> None:
        modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
        modules += [h.model for h in getattr(pipe, "_all_hooks", []) if h.model not in modules]
        for module in modules:
            self._unhook(module)
        for name in pipe._exclude_from_cpu_offload:  # these went to the device when the pipeline was enabled
            module = getattr(pipe, name, None)
            if isinstance(module, nn.Module) and hook_of(module) is None and not self._shared(module):
                module.to("cpu")
        pipe._all_hooks = []

    def _shared(self, module: nn.Module) -> bool:
        """Another enabled pipeline has the module, too."""
        return any(m is module for o, p in _enabled() if o is not self for m in p.components.values())

    def _unhook(self, module: nn.Module) -> None:
        """Detach our hook; where another enabled pipeline shares the module, hand it over instead."""
        hook = hook_of(module)
        if hook is None or hook.session is None:
            return
        client = self._session.client
        component = hook.component
        others = hook.session.client
        if others is not client and (component is None or component.key in others.components):
            # of a pipeline that shares it, which may have travelled as this one wants
            client.components.pop(component.key if component is not None else "", None)
            self._hand_over(module, component, hook.session)
            return
        heir = self._engine.heir(component, client) if component is not None else None
        if heir is None:
            # A part that this pipeline has may have become part of what another one had, whose hook was handed over.
            whole = component.module if component is not None else module
            for one in {id(unwrap(m)): m for m in (module, whole)}.values():
                own = hook_of(one)
                if own is not None:
                    own.detach_hook(one)
                # Those chained to it and those of its parts go, too, as when stock removes them.
                accelerate.hooks.remove_hook_from_module(unwrap(one), recurse=True)
            return
        assert component is not None
        hook.session = dataclasses.replace(self._session, client=heir, settings=heir.settings)
        component.client = heir
        del client.components[component.key]
        self._hand_over(module, component, hook.session)

    def _hand_over(self, module: nn.Module, component: Component | None, session: Session) -> None:
        """`component` serves `session` and those that share it, but no longer this pipeline: it travels as they want it."""
        if component is not None and session._engine is self._engine:
            self._engine.travel(component, session.settings, sharing(unwrap(module), session, self._pipe()))

    # ------------------------------------------------ what the pipeline's class calls
    @property
    def active(self) -> bool:
        """There are hooks: nobody has removed them all. Some overrides keep none of them in `_all_hooks`."""
        pipe = self._pipe()
        assert pipe is not None
        hooks = [getattr(p, "_all_hooks", None) for p in (pipe, *adapter.parts_of(pipe))]
        return any(hooks) or bool(self._session.client.components)

    @contextlib.contextmanager
    def calling(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
        """A call of the pipeline, with these arguments."""
        self._adopt_strays()
        client = self._session.client
        client.watched = any(map(callable, (*args, *kwargs.values())))
        call, failed = Call(client), True
        try:
            self._engine.start_call(call, self._steps(args, kwargs))
            if client.calling == 1:
                for component in list(client.components.values()):
                    if component.compiled is not None:
                        component.compiled.call = Counts()
            yield
            failed = False
        finally:
            try:
                self._engine.leave_call(call, failed)
            finally:
                call.over = True
        self._tell(5)  # past contextlib and the pipeline's class

    def _tell(self, stacklevel: int) -> None:
        """Warn of what the call that has ended took, once the engine is done with it."""
        client = self._session.client
        excess, client.excess = client.excess, ""
        if excess:
            client.warned = True
            warnings.warn(excess, OffloadWarning, stacklevel=stacklevel)

    def _steps(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """The number of denoising steps that a call asks for; None: there is no telling."""
        pipe = self._pipe()
        assert pipe is not None
        try:
            bound = inspect.signature(adapter.base_class(pipe).__call__).bind(pipe, *args, **kwargs)
        except TypeError:
            return None  # the call will say so
        bound.apply_defaults()
        steps = bound.arguments.get("num_inference_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def freed(self) -> None:
        """diffusers asks for all components to be on the host: at the end of nearly every call, or by hand."""
        self._adopt_strays()
        self._engine.freed(self._session.client)
        self._tell(4)

    def _adopt_strays(self) -> None:
        """Hook components that came, or lost their hook, without going through the pipeline's attributes."""
        pipe = self._pipe()
        assert pipe is not None
        known = self._session.client.components
        for key in [key for key in known if key not in self._engine.components]:  # removed, and interrupted behind that
            del known[key]
        for name, module in pipe.components.items():
            if not isinstance(module, nn.Module):
                continue
            hook = hook_of(module)
            if hook is None:
                self.replaced(name, None, module)
            elif is_cut_off(unwrap(module), hook):  # a `disable` was interrupted
                attach(module, hook)
            elif hook.component is not None:  # maybe hooked by a pipeline that shares it, enabled after this one
                known.setdefault(hook.component.key, hook.component)

    def replaced(self, name: str, before: nn.Module | None, after: Any) -> None:
        """The pipeline's component `name` is `after` now."""
        pipe = self._pipe()
        assert pipe is not None
        inner = unwrap(after) if isinstance(after, nn.Module) else None
        gone = before is not None and unwrap(before) is not inner and not any(m is before for m in pipe.components.values())
        leaving = [m for m in (inner, unwrap(before) if gone and before is not None else None) if m is not None]
        old = next((h for h in getattr(pipe, "_all_hooks", []) if unwrap(h.model) in leaving), None)
        if gone and before is not None:
            hook = hook_of(before)
            if hook is not None:
                if hook.component is not None:
                    self._session.client.order.forget(hook.component.key)
                    self._engine.evict([hook.component])
                self._unhook(before)
        if inner is None or name in pipe._exclude_from_cpu_offload:
            if gone:
                _stand_in(pipe, old, None)
            return
        hook = hook_of(after)
        if hook is not None:
            if inner.__dict__.get("_hf_hook") is hook:
                attach(after, hook)  # the same component, compiled by now, or another pipeline's
            if hook.component is not None:
                self._session.client.components[hook.component.key] = hook.component
                if hook.session is not None and hook.session.client is not self._session.client:
                    hook.session.engine.travel(hook.component, hook.session.settings, sharing(inner, hook.session))
            _stand_in(pipe, old, accelerate.hooks.UserCpuOffloadHook(after, hook))
            return
        check_tensors(name, after)
        refuse(name, after)
        if type(getattr(inner, "_hf_hook", None)) is accelerate.hooks.CpuOffload:  # made from ours, by its class's name
            accelerate.hooks.remove_hook_from_module(inner)
        if getattr(inner, "_hf_hook", None) is None:
            after.to("cpu")
        previous = old.hook.prev_module_hook if old is not None else None
        _, user_hook = adapter.hook_component(self._session, pipe, after, self.device, previous)
        _stand_in(pipe, old, user_hook)


def _stand_in(pipe: DiffusionPipeline, old: Any, new: Any) -> None:
    """`new` (None: nobody) takes the place of the user hook `old` (None: the end) in the pipeline's list and chain."""
    hooks = getattr(pipe, "_all_hooks", [])
    if old is None:
        if new is not None:
            hooks.append(new)
        return
    i = hooks.index(old)
    hooks[i : i + 1] = [new] if new is not None else []
    for other in hooks:
        if other.hook.prev_module_hook is old:
            other.hook.prev_module_hook = new if new is not None else old.hook.prev_module_hook
