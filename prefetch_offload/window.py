"""Streaming: a component larger than its share keeps some units, and the others pass through a window. Pure.

    share = share_of(order, nbytes, compute_ms, limit_nbytes, window_nbytes)
    window = Window(order, nbytes, share)
    drops, loads = window.need("unet#1/7")              # before a unit is read
    drops, loads = window.done("unet#1/7", last=False)  # after its last reader in this pass
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """What a component larger than its room may hold while it runs.

    Attributes:
        limit_nbytes: device bytes of its units at any time.
        keep: its units that stay from pass to pass. The others are streamed: loaded again in every pass.
    """

    limit_nbytes: int
    keep: frozenset[str]


def share_of(
    order: Sequence[str],
    nbytes: Mapping[str, int],
    compute_ms: Mapping[str, float],
    limit_nbytes: int,
    window_nbytes: int,
    must: frozenset[str] = frozenset(),
) -> Share:
    """Which units stay within `limit_nbytes`, when `window_nbytes` of it are for those that do not.

    Units that are streamed are spread evenly over a pass's compute time, so that each copy has as much of it to hide
    behind as the others.

    Args:
        order: the component's units in order of use, each once.
        nbytes, compute_ms: of every unit in `order`; zero times mean "not measured" and count bytes instead.
        limit_nbytes: device bytes that the component may hold.
        window_nbytes: of these, what streamed units pass through.
        must: units that have to stay: read throughout the component's run, or in several places.
    """
    total = sum(nbytes[u] for u in order)
    if total <= limit_nbytes:
        return Share(limit_nbytes, frozenset(order))
    room = limit_nbytes - window_nbytes
    stream_nbytes = max(0, total - max(room, 0))
    measured = sum(compute_ms.get(u, 0.0) for u in order)
    # Bresenham: credit grows with compute time, and whichever unit finds enough of it is streamed.
    streamed: list[str] = []
    credit = 0.0
    for unit in order:
        part = compute_ms.get(unit, 0.0) / measured if measured > 0 else nbytes[unit] / total
        credit += part * stream_nbytes
        if unit not in must and credit >= nbytes[unit] / 2:
            streamed.append(unit)
            credit -= nbytes[unit]
    streams = set(streamed)
    keep = [u for u in order if u not in streams]
    held = sum(nbytes[u] for u in keep)
    while held > room:
        loose = [u for u in keep if u not in must]
        if not loose:
            break
        # the smallest that is enough, or the largest
        enough = [u for u in loose if nbytes[u] >= held - room]
        unit = min(enough, key=nbytes.__getitem__) if enough else max(loose, key=nbytes.__getitem__)
        keep.remove(unit)
        held -= nbytes[unit]
    kept = set(keep)
    for unit in sorted((u for u in order if u not in kept), key=lambda u: -nbytes[u]):
        if held + nbytes[unit] <= room:
            kept.add(unit)
            held += nbytes[unit]
    return Share(limit_nbytes, frozenset(kept))


class Window:
    """The units of a running component that do not stay, and which of them are on the device.

    Attributes:
        order: the streamed units in order of use within a pass.
        held: those that are on the device or on their way.
        held_nbytes: their bytes; at most `limit_nbytes`, unless one reader needs more at once.
    """

    def __init__(self, order: Sequence[str], nbytes: Mapping[str, int], share: Share) -> None:
        kept = sum(nbytes[u] for u in order if u in share.keep)
        self.order = tuple(u for u in order if u not in share.keep)
        self.limit_nbytes = share.limit_nbytes - kept
        self.held: set[str] = set()
        self.held_nbytes = 0
        self._nbytes = nbytes
        self._index = {u: i for i, u in enumerate(self.order)}
        self._at = 0  # index of the unit in use, or of the next one when none has been used in this pass

    def streams(self, unit: str) -> bool:
        return unit in self._index

    def head(self) -> tuple[str, ...]:
        """The units to hold before the first pass begins: as many of the first ones as there is room for."""
        found: list[str] = []
        held = 0
        for unit in self.order:
            held += self._nbytes[unit]
            if held > self.limit_nbytes and found:
                break
            found.append(unit)
        return tuple(found)

    def arrived(self, unit: str) -> None:
        """`unit` is on the device or on its way, by whatever instruction."""
        if unit not in self.held:
            self.held.add(unit)
            self.held_nbytes += self._nbytes[unit]

    def left(self, unit: str) -> None:
        """`unit` is not on the device any more."""
        if unit in self.held:
            self.held.remove(unit)
            self.held_nbytes -= self._nbytes[unit]

    def need(self, unit: str, together: frozenset[str] = frozenset()) -> tuple[list[str], list[str]]:
        """`unit` is about to be read, and with it those of `together`. Returns (drops, loads): none if it is held."""
        self._at = self._index[unit]
        if unit in self.held:
            return [], []
        drops: list[str] = []
        n = len(self.order)
        # what is used last goes first: going backwards from the unit itself
        for step in range(1, n):
            if self.held_nbytes + self._nbytes[unit] <= self.limit_nbytes:
                break
            victim = self.order[(self._at - step) % n]
            if victim in self.held and victim not in together:
                drops.append(victim)
                self.left(victim)
        self.arrived(unit)
        return drops, [unit]

    def done(self, unit: str, last: bool) -> tuple[list[str], list[str]]:
        """The last reader of `unit` in this pass has been enqueued. Returns (drops, loads).

        Args:
            last: no further pass is expected: units before this one are not needed again.
        """
        n, at = len(self.order), self._index[unit]
        drops: list[str] = []
        loads: list[str] = []
        ahead = range(at + 1, n) if last else range(at + 1, at + n)
        missing = [u for i in ahead if (u := self.order[i % n]) not in self.held]
        if not missing:
            return drops, loads
        if unit in self.held:
            drops.append(unit)
            self.left(unit)
        for other in missing:
            if self.held_nbytes + self._nbytes[other] > self.limit_nbytes:
                break
            self.arrived(other)
            loads.append(other)
        return drops, loads

    def finished(self) -> bool:
        """In a last pass: nothing more is to be loaded."""
        return all(u in self.held for u in self.order[self._at + 1 :])
