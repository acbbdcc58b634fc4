"""Free device memory is put together by PyTorch's allocator where it is needed, and as it was before when it no longer is.

The allocator's own part is stood in for here; `test_cuda.py` has it with the real one.
"""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DEVICE

import prefetch_offload
from prefetch_offload import SettingError, segments
from prefetch_offload.adapter import pipeline as adapter
from prefetch_offload.testing.pipelines import CASES

CUDA = torch.device("cuda", 0)


class Allocator:
    """What PyTorch's allocator was told: a new text sets back what it does not name, except for expandable segments."""

    def __init__(self, text: str = "", able: bool = True) -> None:
        self.texts = [text]
        self.able = able
        self.on = False
        self._heed(text)

    def _heed(self, text: str) -> None:
        self.max_split = -1
        for part in filter(None, text.split(",")):
            name, value = part.split(":")
            if name == "expandable_segments":
                self.on = value == "True" and self.able
            elif name == "max_split_size_mb":
                self.max_split = int(value) << 20

    def tell(self, text: str) -> None:
        self.texts.append(text)
        self._heed(text)

    def snapshot(self) -> dict[str, Any]:
        told = {"PYTORCH_CUDA_ALLOC_CONF": self.texts[-1], "max_split_size": self.max_split}
        return {"allocator_settings": told | {"expandable_segments": self.on}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes the allocator of this test."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(segments.sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(segments, "_has_virtual_memory", lambda device: True)
    monkeypatch.setattr(segments, "_maps", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=False))
    monkeypatch.setattr(segments, "is_wsl", lambda: False)
    monkeypatch.setattr(segments, "_told", None)
    monkeypatch.setattr(segments, "_restored", None)
    segments._users.clear()

    def make(text: str = "", able: bool = True) -> Allocator:
        allocator = Allocator(text, able)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", allocator.snapshot)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", allocator.tell, raising=False)
        return allocator

    yield make
    segments._users.clear()


class User:
    pass


@pytest.mark.parametrize("text", ["", "garbage_collection_threshold:0.8", "a:1,b:[2:3]"])
def test_on_while_somebody_needs_it(told: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = told()
    allocator.texts = [text]
    monkeypatch.setattr(allocator, "_heed", lambda t: setattr(allocator, "on", t.endswith("expandable_segments:True")))
    first, second = User(), User()
    for _ in range(2):  # and again after the end
        assert segments.use(first, CUDA, None) and allocator.on
        assert allocator.texts[-1] == ",".join(filter(None, [text, "expandable_segments:True"])), "the rest is as it was"
        assert segments.use(second, CUDA, None) and segments.use(first, CUDA, None)
        segments.leave(first)
        segments.leave(first)
        assert allocator.on
        segments.leave(second)
        assert not allocator.on
        assert allocator.texts[-1] == ",".join(filter(None, [text, "expandable_segments:False"]))


def test_a_user_that_is_gone_needs_it_no_longer(told: Any) -> None:
    allocator = told()
    user = User()
    assert segments.use(user, CUDA, None)
    del user
    gc.collect()
    segments.leave(None)
    assert not allocator.on


@pytest.mark.parametrize("said", ["expandable_segments:False", "expandable_segments:True"])
def test_what_somebody_has_decided_stands(told: Any, said: str) -> None:
    assert told() and segments.never(CUDA) is None
    allocator = told(said)
    assert segments.never(CUDA) == (None if said.endswith("True") else "expandable_segments:False was set")
    user = User()
    assert segments.use(user, CUDA, None) is (said.endswith("True"))
    segments.leave(user)
    assert allocator.texts == [said]


def test_asked_for_it_is_on_whatever_was_said(told: Any) -> None:
    allocator = told("expandable_segments:False,garbage_collection_threshold:0.8")
    user = User()
    assert segments.use(user, CUDA, True) and allocator.on
    segments.leave(user)
    assert not allocator.on and allocator.texts[-1] == "garbage_collection_threshold:0.8,expandable_segments:False"


def test_what_somebody_decides_meanwhile_stands(told: Any) -> None:
    allocator = told()
    user = User()
    assert segments.use(user, CUDA, None)
    allocator.tell("expandable_segments:True,garbage_collection_threshold:0.5")
    segments.leave(user)
    assert allocator.texts[-1] == "expandable_segments:True,garbage_collection_threshold:0.5"
    allocator.tell("expandable_segments:False,garbage_collection_threshold:0.5")
    assert not segments.use(user, CUDA, None)


def test_where_the_driver_cannot_it_stays_off(told: Any) -> None:
    told(able=False)
    assert not segments.use(User(), CUDA, None)
    assert not segments._users


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((torch.version, "cuda", None), "PyTorch's for CUDA"),
        ((segments.sys, "platform", "win32"), "Linux only"),
        ((torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync"), "'cudaMallocAsync'"),
        ((segments, "_has_virtual_memory", lambda device: False), "no virtual memory"),
        ((torch.cuda.memory, "_snapshot", dict), "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
    ],
    ids=["rocm", "windows", "backend", "virtual memory", "unknown"],
)
def test_where_it_cannot_be(told: Any, monkeypatch: pytest.MonkeyPatch, change: Any, why: str) -> None:
    allocator = told()
    monkeypatch.setattr(*change)
    assert not segments.use(User(), CUDA, None) and len(allocator.texts) == 1
    assert why in str(segments.never(CUDA))
    with pytest.raises(SettingError, match=why):
        segments.check(CUDA)


def test_not_where_large_blocks_are_never_split(told: Any) -> None:
    allocator = told("max_split_size_mb:128")
    assert not segments.use(User(), CUDA, True) and len(allocator.texts) == 1
    with pytest.raises(SettingError, match="max_split_size_mb"):
        segments.check(CUDA)


def test_an_older_name_for_telling_it(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = told()
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", allocator.tell)
    assert segments.use(User(), CUDA, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((segments, "is_wsl", lambda: True), "this is WSL"),
        ((torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=True)), "no memory of its own"),
    ],
    ids=["wsl", "tegra"],
)
def test_where_it_often_fails_somebody_has_to_ask_for_it(
    told: Any, monkeypatch: pytest.MonkeyPatch, change: Any, why: str
) -> None:
    allocator = told()
    monkeypatch.setattr(*change)
    user = User()
    assert why in str(segments.never(CUDA)) and not segments.use(user, CUDA, None) and len(allocator.texts) == 1
    assert segments.use(user, CUDA, True) and allocator.on


def test_off_again_where_mapping_fails_all_the_same(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = told("garbage_collection_threshold:0.8")
    monkeypatch.setattr(segments, "_maps", lambda device: False)
    assert not segments.use(User(), CUDA, True)
    assert not allocator.on and not segments._users and segments._told is None


def test_a_decision_is_remembered_when_one_pipeline_had_them_all_the_same(told: Any) -> None:
    told("expandable_segments:False")
    user = User()
    assert segments.use(user, CUDA, True)
    segments.leave(user)
    assert not segments.use(user, CUDA, None)


def test_other_settings_that_were_made_meanwhile_stay(told: Any) -> None:
    allocator = told()
    user = User()
    assert segments.use(user, CUDA, None)
    allocator.tell("garbage_collection_threshold:0.5")
    segments.leave(user)
    assert not allocator.on and allocator.texts[-1] == "garbage_collection_threshold:0.5,expandable_segments:False"


def test_a_pipeline_that_is_collected_while_another_is_enabled(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = told()
    box = [User()]
    new = User()
    assert segments.use(box[0], CUDA, None)
    read = segments._read

    def collect() -> Any:
        found = read()
        if box:
            box.clear()
            segments.leave(None)
        return found

    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(segments, "_read", collect)
            assert segments.use(new, CUDA, None) is allocator.on
        segments.leave(new)
        assert not allocator.on, number
        box.append(User())
        assert segments.use(box[0], CUDA, None)


def test_an_interrupt_while_it_is_told(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = told()
    user = User()

    def tell(text: str) -> None:
        allocator.tell(text)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_accelerator_setAllocatorSettings", tell)
        with pytest.raises(KeyboardInterrupt):
            segments.use(user, CUDA, None)
    segments.leave(user)
    assert not allocator.on


class TestOfAPipeline:
    @pytest.fixture
    def allocator(self, told: Any, monkeypatch: pytest.MonkeyPatch) -> Allocator:
        use = segments.use
        monkeypatch.setattr(segments, "use", lambda user, device, wanted: use(user, CUDA, wanted))
        made: Allocator = told()
        return made

    def test_collected_with_its_handle(self, allocator: Allocator, sim: Any) -> None:
        pipe = CASES["flux"].build()
        pipe.me = pipe
        prefetch_offload.enable(pipe, device=DEVICE, budget="stock")
        assert allocator.on
        del pipe
        gc.collect()
        assert not allocator.on

    def test_disable_after_an_interrupt_in_it(self, allocator: Allocator, enable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = CASES["flux"].build()
        offload = enable(pipe, budget="stock")
        with monkeypatch.context() as patch:
            patch.setattr(offload._engine.lanes, "empty_cache", interrupt)
            with pytest.raises(KeyboardInterrupt):
                offload.disable()
        offload.disable()
        assert not allocator.on

    def test_without_hooks(self, allocator: Allocator, enable: Any) -> None:
        pipe = CASES["flux"].build()
        enable(pipe, budget="stock")
        assert allocator.on
        pipe.remove_all_hooks()
        assert not allocator.on

    def test_a_part_with_a_budget_of_its_own(self, allocator: Allocator, enable: Any) -> None:
        pipe = CASES["kandinsky22"].build()
        offload = enable(pipe, budget="stock")
        handle = adapter.offload_of(adapter.parts_of(pipe)[0])
        assert handle is not None
        handle.budget = "stock"
        offload.disable()
        assert not allocator.on


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("answers", "has"), [((0, 0, 0, 1), True), ((0, 0, 0, 0), False), ((0, 0, 1, 1), False), ((999, 0, 0, 1), False)]
)
def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, answers: tuple[int, ...], has: bool) -> None:
    *codes, value = answers

    class Driver:
        def cuInit(self, flags: int) -> int:
            return codes[0]

        def cuDeviceGet(self, number: Any, index: int) -> int:
            number._obj.value = index + 7
            return codes[1]

        def cuDeviceGetAttribute(self, found: Any, attribute: int, number: Any) -> int:
            assert (attribute, number.value) == (102, 10)
            found._obj.value = value
            return codes[2]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert segments._has_virtual_memory(torch.device("cuda", 3)) is has


def test_without_a_driver_to_ask_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not segments._has_virtual_memory(CUDA)


def test_refused_before_anything_is_changed(enable: Any) -> None:
    pipe = CASES["flux"].build()
    with pytest.raises(SettingError, match=r"expandable_segments=True on simgpu.*simgpu has none"):
        enable(pipe, expandable_segments=True)
    assert not hasattr(pipe.transformer, "_hf_hook")


@pytest.mark.parametrize(
    ("budget", "wanted", "needed"),
    [
        ("stock", None, True),
        (0.9, None, True),
        (3.0, None, False),
        (None, None, False),
        (None, False, False),
        (0.9, False, False),
    ],
)
def test_who_needs_it(enable: Any, monkeypatch: pytest.MonkeyPatch, budget: Any, wanted: Any, needed: bool) -> None:
    """A pipeline whose weights take more than half of what it may use; from when that is so until it is not."""
    users: list[Any] = []
    monkeypatch.setattr(segments, "use", lambda user, device, wanted: users.append(user))
    monkeypatch.setattr(segments, "leave", lambda user: user in users and users.remove(user))
    pipe = CASES["flux"].build()
    weights = sum(m.nbytes for c in pipe.components.values() if isinstance(c, torch.nn.Module) for m in c.parameters())
    nbytes = int(budget * weights) if isinstance(budget, float) else budget
    offload = enable(pipe, budget=nbytes, expandable_segments=wanted, unit_min=16 << 10, unit_max=64 << 10)
    assert users == ([offload] if needed else [])
    if wanted is None:
        for value, now in ((int(0.9 * weights), True), (10 * weights, False)):
            users.clear()
            offload.budget = value
            assert users == ([offload] if now else [])
    users[:] = [offload]
    offload.disable()
    assert users == []
