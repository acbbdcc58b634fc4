"""Encoding takes all cores, whatever OMP_NUM_THREADS says: the same bytes, one error, and nobody left at work."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from conftest import DEVICE
from test_transport_codecs import UNITS, build, draw, encoded_units, resident, small_chunks, weights

import prefetch_offload
from prefetch_offload import Codec, Quantized, codecs, crew, encoding

__all__ = ["small_chunks"]  # the fixture, for these tests too


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and however little there is to do."""
    monkeypatch.setattr(crew, "cores", lambda: 4)
    monkeypatch.setattr(encoding, "_SHARED_NBYTES", 0)


def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert crew.cores() == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(600)))
    assert crew.cores() == 16


def test_results_come_in_order_from_several_threads(four_cores: None) -> None:
    meeting = threading.Barrier(4, timeout=30)  # nobody passes before all four are at work

    def task(number: int) -> tuple[int, str, bool]:
        if number < 4:
            meeting.wait()
        return number, threading.current_thread().name, torch.is_grad_enabled()

    done = crew.together([lambda n=n: task(n) for n in range(9)], [9 - n for n in range(9)])
    assert [number for number, _, _ in done] == list(range(9))
    assert len({name for _, name, _ in done}) == 4 and not any(grad for _, _, grad in done)
    here = crew.together([lambda n=n: task(n + 4) for n in range(9)], None)
    assert {name for _, name, _ in here} == {threading.current_thread().name}


def test_the_longest_begin_first(four_cores: None) -> None:
    begun: list[int] = []
    gate = threading.Barrier(4, timeout=30)

    def task(number: int) -> None:
        begun.append(number)
        if number >= 4:
            gate.wait()

    crew.together([lambda n=n: task(n) for n in range(8)], list(range(8)))
    assert set(begun[:4]) == {4, 5, 6, 7}


def test_of_several_errors_the_first_tasks_is_raised(four_cores: None) -> None:
    gate, ran = threading.Barrier(4, timeout=30), []

    def task(number: int) -> None:
        ran.append(number)
        if number < 4:
            gate.wait()
            raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match="task 0"):
        crew.together([lambda n=n: task(n) for n in range(40)], [1] * 40)
    assert len(ran) < 40, "none is begun after that"
    assert no_crew()


def no_crew() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("prefetch_offload ")]


def test_inference_mode_goes_along(four_cores: None) -> None:
    with torch.inference_mode():
        assert all(crew.together([torch.is_inference_mode_enabled] * 5, [1] * 5))
    assert not any(crew.together([torch.is_inference_mode_enabled] * 5, [1] * 5))


def encoded_bytes(offload: Any) -> list[bytes]:
    return [bytes(u.encoded.bytes.cpu().numpy()) for u in encoded_units(offload)]


@pytest.mark.parametrize("way", ["packed", "fp8", Quantized(torch.int8, "tensor"), torch.float8_e5m2])
def test_units_are_the_same_bytes_by_one_thread_and_by_four(
    way: Any, sim: Any, enable: Any, four_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, set[str]] = {"recipe": set(), "write": set()}
    kinds = (codecs._Packing, encoding.Cast, encoding.Raw, type(Quantized(torch.int8).recipe(one_piece())))

    def watch(owner: type, step: str) -> None:
        own = getattr(owner, step)

        def watched(self: Any, *given: Any) -> Any:
            names[step].add(threading.current_thread().name)
            time.sleep(1e-4)  # lets the others have some
            return own(self, *given)

        monkeypatch.setattr(owner, step, watched)

    for codec in (codecs.Packed, Quantized, codecs.Narrowed):
        watch(codec, "recipe")
    for kind in kinds:
        watch(kind, "write")
    made = []
    for cores in (4, 1):
        monkeypatch.setattr(crew, "cores", lambda cores=cores: cores)
        for seen in names.values():
            seen.clear()
        pipe = build("flux")
        offload = enable(pipe, transport=way, **UNITS)
        made.append(encoded_bytes(offload))
        assert made[-1]
        for seen in names.values():
            assert len(seen) > 1 if cores > 1 else seen == {threading.current_thread().name}
        if cores > 1 and way == "packed":
            assert draw("flux", pipe) == resident("flux")[0]
        offload.disable()
    assert made[0] == made[1]
    assert no_crew()


def one_piece() -> encoding.Piece:
    t = torch.ones(64, 64)
    return encoding.Piece("linear.weight", 0, t.nbytes, t, True)


class Slow(Codec):
    """Interrupts the program while its threads are at work; counts what they do."""

    threads = True

    def __init__(self, at: str) -> None:
        self.at, self.begun, self.ended = at, 0, 0
        self.interrupted = threading.Event()

    def work(self) -> None:
        self.begun += 1
        if self.begun == 2:
            os.kill(os.getpid(), signal.SIGINT)
            self.interrupted.set()
        elif self.begun > 2:
            self.interrupted.wait(30)
            time.sleep(0.05)
        self.ended += 1

    def recipe(self, piece: Any) -> Any:
        made = Quantized(torch.int8).recipe(piece)
        if self.at == "recipe":
            self.work()
        if made is None:
            return None
        codec, own = self, made.write

        class Watched:
            nbytes = made.nbytes
            descriptor = staticmethod(made.descriptor)

            def write(self, out: torch.Tensor) -> None:
                if codec.at == "write":
                    codec.work()
                own(out)

        return Watched()


@pytest.mark.parametrize("at", ["recipe", "write"])
def test_an_interrupt_leaves_nobody_at_work(at: str, sim: Any, enable: Any, four_cores: None) -> None:
    pipe, slow = build("flux"), Slow(at)
    before = [(key, p.clone()) for key, p in weights(pipe)]
    with pytest.raises(KeyboardInterrupt):
        prefetch_offload.enable(pipe, device=DEVICE, transport=slow, **UNITS)
    assert no_crew()
    begun = slow.begun
    assert slow.ended == begun < len(before) / 2
    time.sleep(0.1)
    assert slow.begun == begun
    assert not hasattr(pipe.transformer, "_hf_hook") and type(pipe).__name__ == "FluxPipeline"
    assert all(torch.equal(p, dict(before)[key]) for key, p in weights(pipe))
    enable(pipe, transport="packed", **UNITS)
    assert draw("flux", pipe) == resident("flux")[0]


def test_memory_stays_bounded(four_cores: None) -> None:
    """Each thread has a chunk and what is made of it, whatever a tensor's size is."""
    t = torch.zeros(64 << 20, dtype=torch.bfloat16).view(8192, -1)
    pieces = [encoding.Piece(f"{n}.weight", 0, t.nbytes, t, True) for n in range(4)]
    recipes = encoding.recipes_of(Quantized(torch.int8), pieces)
    out = [torch.empty(r.nbytes, dtype=torch.uint8).fill_(1) for r in recipes if r is not None]
    before, peak, done = resident_nbytes(), [0], threading.Event()

    def look() -> None:
        while not done.wait(1e-3):
            peak[0] = max(peak[0], resident_nbytes())

    watching = threading.Thread(target=look)
    watching.start()
    encoding.write_all(Quantized(torch.int8), recipes, out)  # type: ignore[arg-type]
    done.set()
    watching.join()
    assert peak[0] - before < 2 * t.nbytes, "one of them as float32, and there are four under way"


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
