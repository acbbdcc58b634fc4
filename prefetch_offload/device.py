"""Streams, events and memory figures of one accelerator, through ``torch.accelerator``: CUDA, XPU and PrivateUse1 alike.

# [Note: stream order]
Order on the device is by events only. Every record and wait of the engine goes through `Lanes`, each with its reason:

1. COPY_AFTER_ALLOCATION: a buffer is allocated on the compute stream, whose earlier kernels may still use that memory;
   the copy stream waits for an event recorded there after the allocation.
2. USE_AFTER_COPY: the compute stream waits for a unit's ready event before its first read.
3. FREE_AFTER_LAST_USE: memory goes back to the order of the stream it was allocated on; another stream that read it is
   waited for first.
4. FREE_AFTER_UNUSED_COPY: a unit that is dropped before anyone waited for it: its copy is waited for before the free.
5. STAGE_AFTER_COPY (the host waits): a half of the pinned ring is refilled only after the copy out of it.
6. WRITE_BACK_AFTER_USE: what another stream may have changed is read back only behind it.
7. RETIRE_AFTER_COPY (the host waits): host memory is unpinned or given back only after the last copy out of it.

Where units travel encoded ([Note: encoded units]):

8. CAST_AFTER_COPY: what has arrived in a staging buffer is turned into the unit on the cast stream, behind its copy.
9. STAGE_AFTER_CAST: the copy stream writes to a staging buffer again only after what was in it has been cast.

And where units keep their addresses ([Note: stable addresses]):

10. COPY_AFTER_REUSE: memory that a unit has left is written again only after that unit's last use.
11. UNMAP_AFTER_USE (the host waits, or asks): nothing is unmapped that may still be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .hazards import Hazard, HazardChecker, Op, OpKind

COPY_AFTER_ALLOCATION = "copy after allocation"
USE_AFTER_COPY = "use after copy"
FREE_AFTER_LAST_USE = "free after last use"
FREE_AFTER_UNUSED_COPY = "free after unused copy"
STAGE_AFTER_COPY = "stage after copy"
RETIRE_AFTER_COPY = "retire after copy"
WRITE_BACK_AFTER_USE = "write back after use"
CAST_AFTER_COPY = "cast after copy"
STAGE_AFTER_CAST = "stage after cast"
COPY_AFTER_REUSE = "copy after reuse"
UNMAP_AFTER_USE = "unmap after use"

_HOST = -1  # the host thread, as a stream of the checker's
_ENQUEUED = -1  # the event that orders the copy stream behind it

# CUDA's caching allocator splits nothing off a block of more than 1 MiB that would be smaller than 1 MiB. Small pipelines met
# up to 1.6 MiB in all (PyTorch's own allocator over a stand-in for the runtime); of large ones a margin of 1/64 is more.
_LEFT_OF_BLOCKS = 2 << 20

OUT_OF_MEMORY: tuple[type[BaseException], ...] = (torch.OutOfMemoryError,)


_SAID_OTHERWISE = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def is_out_of_memory(error: BaseException) -> bool:
    """The device had no memory left, whoever says so: PyTorch's allocator, a library's workspace, or a module's load."""
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID_OTHERWISE)
    )


class Lanes:
    """The streams of one device, and what was ordered on them.

    Attributes:
        device: with an index.
        unseen_nbytes: device bytes that weights take and PyTorch's allocator does not count.
        copy: the copy stream; it exists so that host-to-device copies run beside compute. There is one, since one
            engine serves the link in each direction and two would only interleave.
        cast: the stream on which encoded units are cast out of a staging buffer, while the next one is copied into another.
            Its priority is high: a cast is short, and the copy after the next waits behind it. With that of compute it would
            stand behind all blocks of the kernel that is running, and the link idle for as long.
        hazards: what the checker objected to, when `verify` is on.
    """

    def __init__(self, device: torch.device, verify: bool = False) -> None:
        self.device = device
        self.module: Any = torch.get_device_module(device)
        self.copy, self.cast = torch.Stream(device=device), torch.Stream(device=device, priority=-1)
        self.hazards: list[Hazard] = []
        self._checker = HazardChecker() if verify else None
        self._events: dict[int, tuple[int, torch.Event]] = {}
        self._besides = self._most_besides = self.unseen_nbytes = self._most_unseen = 0

    @property
    def simulated(self) -> bool:
        """The device is the simulated accelerator of `prefetch_offload.testing`."""
        return getattr(self.module, "ext", None) is not None

    def compute(self) -> torch.Stream:
        """The stream that the caller's kernels go to."""
        return torch.accelerator.current_stream(self.device.index)  # an index is found at once, a device is looked up

    def capturing(self) -> bool:
        """The current stream is being captured into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # ------------------------------------------------------------------ ordering
    def record(self, stream: torch.Stream) -> torch.Event:
        """An event on `stream`, after all that was put there so far. It can be timed."""
        event = torch.Event(device=self.device, enable_timing=True)
        event.record(stream)
        if self._checker is not None:
            self._note_event("record", stream, event)
        return event

    def wait(self, stream: torch.Stream, event: torch.Event, why: str) -> None:
        """What is put on `stream` from now on runs after `event`. The host does not wait."""
        stream.wait_event(event)
        if self._checker is not None:
            self._note_event("wait", stream, event, why)

    def host_wait(self, event: torch.Event, why: str) -> None:
        """The host waits for `event`."""
        event.synchronize()
        self._note_event("host_wait", self.copy, event, why)

    def happened(self, event: torch.Event, why: str) -> bool:
        """Whether `event` has happened. If so, it is as if the host had waited for it."""
        if not event.query():
            return False
        self._note_event("host_wait", self.copy, event, why)
        return True

    def synchronize(self) -> None:
        """The host waits for everything on the device: only in teardown and recovery."""
        for stream in (self.copy, self.cast, self.compute()):
            self.host_wait(self.record(stream), "synchronize")
        torch.accelerator.synchronize(self.device)

    # ------------------------------------------------------- what happens to memory
    def note(self, kind: OpKind, stream: torch.Stream, buffer: str) -> None:
        """Tell the checker of an access: ``alloc``, ``read``, ``write`` or ``free`` of `buffer` on `stream`."""
        if self._checker is not None:
            self._feed(Op(kind, stream.stream_id, buffer))

    def note_host(self, kind: OpKind, buffer: str) -> bool:
        """The same of the host thread, behind whose accesses everything is enqueued later on. Returns whether the buffer is
        there now."""
        if self._checker is not None:
            self._feed(Op(kind, _HOST, buffer))
            self._feed(Op("record", _HOST, event=_ENQUEUED))
            self._feed(Op("wait", self.copy.stream_id, event=_ENQUEUED))
        return kind != "free"

    def forget(self, buffer: str) -> None:
        """It is somebody else's from here on; the name may be given again."""
        if self._checker is not None:
            self._checker.forget_buffer(buffer)

    def _note_event(self, kind: OpKind, stream: torch.Stream, event: torch.Event, why: str = "") -> None:
        if self._checker is not None:
            # Kept: an identity is reused once its event is gone.
            number = self._events.setdefault(id(event), (len(self._events), event))[0]
            self._feed(Op(kind, stream.stream_id, event=number, note=why))

    def _feed(self, op: Op) -> None:
        assert self._checker is not None
        self.hazards += self._checker.feed(op)

    # -------------------------------------------------------------------- memory
    @property
    def spare_nbytes(self) -> int:
        """What activations may take beyond what they were measured to, from one call to the next: a caching allocator counts
        what is left of a block and not split off, and gives other blocks each time. 0: the allocator has none."""
        return _LEFT_OF_BLOCKS if hasattr(self.module, "memory_stats_as_nested_dict") else 0

    def _figures(self) -> Mapping[str, Any]:
        """What PyTorch's allocator counts, where the backend shows it; empty: nothing was allocated yet. Not `memory_stats`, by
        which `memory_allocated` goes: it puts two hundred names together and sorts them."""
        ask = getattr(self.module, "memory_stats_as_nested_dict", None)
        return ask(self.device) if ask is not None else {}

    def _figure(self, name: str, when: str) -> int:
        """Bytes that are, or at most were, ``allocated`` or ``reserved``."""
        found = self._figures().get(f"{name}_bytes")
        if found is not None:
            return int(found["all"][when])
        return int(getattr(self.module, f"{'max_' if when == 'peak' else ''}memory_{name}")(self.device))

    def retries(self) -> int:
        """How often the allocator has found no memory in one piece, and so gave back what it had cached to try again. The host
        waits for the device then."""
        return int(self._figures().get("num_alloc_retries", 0))

    def free_nbytes(self) -> int:
        """Bytes that can be allocated now: free on the device, plus cached and unused by PyTorch's allocator."""
        free, total = self.module.mem_get_info(self.device)
        reserved, allocated = self.reserved_nbytes(), self._figure("allocated", "current")
        free = min(free, total * self._fraction() - reserved)
        return max(0, int(free + reserved - allocated))

    def total_nbytes(self) -> int:
        """What the device has, or as much of it as this process may take."""
        total = int(self.module.mem_get_info(self.device)[1])
        return int(total * self._fraction())

    def _fraction(self) -> float:
        ask = getattr(self.module, "get_per_process_memory_fraction", None)
        return float(ask(self.device)) if ask is not None else 1.0

    def counts_besides(self, unseen_nbytes: int, idle_nbytes: int) -> None:
        """So many bytes of the device are taken that PyTorch's allocator does not count; and of all that is taken, so many
        hold no weights, and will again or are about to be given back."""
        self.unseen_nbytes, self._besides = unseen_nbytes, unseen_nbytes - idle_nbytes
        self._most_unseen = max(self._most_unseen, self.unseen_nbytes)
        self._most_besides = max(self._most_besides, self._besides)

    def allocated_nbytes(self) -> int:
        """What is in use."""
        return self._figure("allocated", "current") + self._besides

    def reserved_nbytes(self) -> int:
        """What PyTorch's allocator has taken from the device."""
        return self._figure("reserved", "current")

    def peak_nbytes(self) -> int:
        """The peak of `allocated_nbytes` since it was last reset; at most, where the allocator does not count all."""
        return self._figure("allocated", "peak") + self._most_besides

    def peak_taken_nbytes(self) -> int:
        """The same of what was taken, in use or not."""
        return self._figure("allocated", "peak") + self._most_unseen

    def reset_peak(self) -> None:
        self._most_besides, self._most_unseen = self._besides, self.unseen_nbytes
        self.module.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        if hasattr(self.module, "empty_cache"):
            self.module.empty_cache()

    def generator_state(self) -> torch.Tensor | None:
        """State of the device's default generator, where the backend shows it."""
        generators = getattr(self.module, "default_generators", None)
        if generators:  # what `get_rng_state` comes to, without finding the device first: it is asked for in every call
            return generators[self.device.index].get_state()  # type: ignore[no-any-return]
        get = getattr(self.module, "get_rng_state", None)
        return get(self.device) if get is not None else None

    def set_generator_state(self, state: torch.Tensor | None) -> None:
        if state is not None:
            self.module.set_rng_state(state, self.device)
