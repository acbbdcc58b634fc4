"""Streaming: a component larger than its share keeps some units, and the others pass through a window. Pure.

    share = share_of(order, nbytes, compute_ms, limit_nbytes, window_nbytes)
    window = Window(order, nbytes, share)
    drops, loads = window.need("unet#1/7")              # before a unit is read
    drops, loads = window.done("unet#1/7", last=False)  # after its last reader in this pass
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Script:
    """What is on the device at every read of a component's run, where that was found by trying (`schedule`).

    Attributes:
        units: the component's, in order of use.
        rows: by pass and unit, the units of all components that are there, or on their way, when that unit is read; those
            that are to be loaded first come first. Passes behind the last are like it.
    """

    units: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], ...], ...]

    def first(self) -> tuple[str, ...]:
        """What is there, or on its way, when the component begins."""
        return self.rows[0][0]


@dataclass(frozen=True)
class Share:
    """What a component larger than its room may hold while it runs.

    Attributes:
        limit_nbytes: device bytes of its units at any time.
        keep: its units that stay from pass to pass. The others are streamed: loaded again in every pass.
        ahead: what fits beside `limit_nbytes` is loaded for the next components when it begins, rather than in its last
            pass: right when compute hides more than its own copies. Where a call begins with it, it is whole if that fits.
        head: its streamed units that are worth holding before it begins; None: as many of the first ones as there is
            room for. Of the others' they are dropped last, and prefetched.
        late: streamed units that do not come before the unit before them has been read: with few large units, another
            one may make better use of their room until then.
        script: all of that read by read, instead; for calls of a few large units.
    """

    limit_nbytes: int
    keep: frozenset[str]
    ahead: bool = False
    head: frozenset[str] | None = None
    late: frozenset[str] = frozenset()
    script: Script | None = None


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


def handed_over(
    order: Sequence[str], nbytes: Mapping[str, int], must: frozenset[str] = frozenset(), ahead: bool = True
) -> Share:
    """All of a component stays while it runs, but its last pass makes room for the next one unit by unit."""
    last = next((u for u in reversed(order) if u not in must), None)
    return Share(sum(nbytes[u] for u in order), frozenset(u for u in order if u != last), ahead)


def begun(
    share: Share,
    order: Sequence[str],
    nbytes: Mapping[str, int],
    must: frozenset[str],
    own_nbytes: int,
    others_nbytes: int,
    cap_nbytes: int,
) -> Share:
    """`share` as it is where a call begins with the component.

    Between calls nothing runs, and what comes next may come already. With `ahead`, that is all of the component if it fits,
    rather than what its window holds, and then what follows it. Nothing makes room for that. What is all there already, as
    after a call that had no plan, stays: what leaves would come back behind everything that is under way for others.

    Args:
        order, nbytes, must: of the component, as for `share_of`.
        own_nbytes: of the component, on the device or on their way.
        others_nbytes: that other components hold.
        cap_nbytes: device bytes that weights may take while it runs.
    """
    whole = handed_over(order, nbytes, must)
    streams = share.script is None and share.limit_nbytes < whole.limit_nbytes
    wanted = share.ahead or own_nbytes == whole.limit_nbytes
    return whole if wanted and streams and others_nbytes + whole.limit_nbytes <= cap_nbytes else share


class Window:
    """The units of a running component that do not stay, and which of them are on the device.

    Attributes:
        order: the streamed units in order of use within a pass.
        held: those that are on the device or on their way.
        held_nbytes: their bytes; at most `limit_nbytes`, unless one reader needs more at once.
        scripted: units move at every read, also of those that stay.
    """

    scripted = False

    def __init__(self, order: Sequence[str], nbytes: Mapping[str, int], share: Share) -> None:
        kept = sum(nbytes[u] for u in order if u in share.keep)
        self.order = tuple(u for u in order if u not in share.keep)
        self.limit_nbytes = share.limit_nbytes - kept
        self.held: set[str] = set()
        self.held_nbytes = 0
        self._nbytes = nbytes
        self._share = share
        self._index = {u: i for i, u in enumerate(self.order)}
        self._at = 0  # index of the unit in use, or of the next one to be used; len(order) at the end of a last pass
        self._front = -1  # the last index in order that this pass is done with
        self._from = 0  # that many units (`_run`) from index `_from` on, cyclic, are held: what `done` need not look at
        self._run = 0
        self._used: dict[str, None] = {}  # those held that have been used, the latest last

    def streams(self, unit: str) -> bool:
        return unit in self._index

    def head(self) -> tuple[str, ...]:
        """The units to hold before the first pass begins: as many of the first ones as there is room for, or its share's."""
        if self._share.head is not None:
            return tuple(u for u in self.order if u in self._share.head)
        return self.first()

    def first(self) -> tuple[str, ...]:
        """The units to hold or load when the first pass begins: the head, and in order of use what fits beside it."""
        found = [u for u in self.order if self._share.head is not None and u in self._share.head]
        held = sum(self._nbytes[u] for u in found)
        for unit in self.order:
            if unit in found or (unit in self._share.late and found):
                continue
            held += self._nbytes[unit]
            if held > self.limit_nbytes and found:
                break
            found.append(unit)
        chosen = set(found)
        return tuple(u for u in self.order if u in chosen)

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
            self._used.pop(unit, None)
            self._run = min(self._run, (self._index[unit] - self._from) % len(self.order))

    def begin(self) -> None:
        """A pass begins."""
        self.rewind()

    def rewind(self) -> None:
        """The pass stands at its beginning."""
        self._front = -1

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

        The units that are missing come in order of use, as far as they fit. A held unit makes room for one only if it has
        been used, and is used again later than that one; and nothing is dropped unless a load takes its place.
        A unit that is done with out of order, since it is read in several places, does not turn the clock back.

        Args:
            last: no further pass is expected: units before this one are not needed again.
        """
        n = len(self.order)
        at = self._front = max(self._front, self._index[unit])
        self._at = at + 1 if last else (at + 1) % n
        if unit in self.held:
            self._used.pop(unit, None)
            self._used[unit] = None
        start = (at + 1) % n
        self._run = max(0, self._run - (start - self._from) % n)
        self._from = start
        drops: list[str] = []
        loads: list[str] = []
        ahead = n - 1 - at if last else n - 1
        step = self._run
        while step < ahead:
            other = self.order[(start + step) % n]
            late = step > 0 and other in self._share.late
            if other not in self.held and not late:
                victims = self._victims(step + 1, at, last, self.held_nbytes + self._nbytes[other] - self.limit_nbytes)
                if victims is None:
                    break
                for victim in victims:
                    drops.append(victim)
                    self.left(victim)
                self.arrived(other)
                loads.append(other)
            if self._run == step and not late:
                self._run += 1
            step += 1
        return drops, loads

    def _victims(self, distance: int, at: int, last: bool, nbytes: int) -> list[str] | None:
        """Used units of `nbytes` whose next use is more than `distance` units behind index `at`; None: not that many."""
        found: list[str] = []
        for unit in reversed(self._used):
            if nbytes <= 0:
                break
            index = self._index[unit]
            if not (last and index <= at) and ((index - at) % len(self.order) or len(self.order)) <= distance:
                continue  # one that is read in several places is done with after others that are used again later
            found.append(unit)
            nbytes -= self._nbytes[unit]
        return found if nbytes <= 0 else None

    def finished(self) -> bool:
        """In a last pass: nothing more is to be loaded."""
        return all(u in self.held for u in self.order[self._at :])

    def stay(self, unit: str) -> None:
        """`unit`, which is held, turned out to be read elsewhere, too: it stays from now on, and the window is smaller."""
        if unit in self._index:
            self.left(unit)
            self.limit_nbytes -= self._nbytes[unit]
            self._at -= self._index[unit] < self._at
            self._front -= self._index[unit] <= self._front
            self.order = tuple(u for u in self.order if u != unit)
            self._index = {u: i for i, u in enumerate(self.order)}
            self._from = self._run = 0


class Scripted(Window):
    """A window that follows a script. The engine moves what a row says; the rules are for what the device refused."""

    scripted = True

    def __init__(self, order: Sequence[str], nbytes: Mapping[str, int], share: Share) -> None:
        super().__init__(order, nbytes, share)
        assert share.script is not None
        self._script = share.script
        self._place = {u: i for i, u in enumerate(share.script.units)}
        self._pass = -1
        self.take_turns(share.script.units)

    def take_turns(self, units: Iterable[str]) -> None:
        """These are the units whose reads are told of; others of the script have to be there throughout."""
        told = set(units)
        self._turn = {u: i for i, u in enumerate(u for u in self._script.units if u in told)}
        self.rewind()

    def begin(self) -> None:
        super().begin()
        self._pass += 1

    def rewind(self) -> None:
        super().rewind()
        self._due, self._before = 0, -1

    def follow(self, unit: str) -> tuple[str, ...] | None:
        """What is to be there now that `unit` is read; None: it is read besides its turn, as one with several places is.

        Its turn is when all before it have had theirs, or when it comes right behind the one before it: after others were
        left out, and when the whole is read once more within a pass.
        """
        turn = self._turn.get(unit)
        if turn is None:
            return None
        due = turn == self._due or turn == (self._before + 1) % len(self._turn)
        self._before = turn
        if not due:
            return None
        self._due = (turn + 1) % len(self._turn)
        return self.row(unit)

    def row(self, unit: str) -> tuple[str, ...] | None:
        """What is to be there when `unit` is read; None: the script does not know the unit."""
        rows = self._script.rows
        place = self._place.get(unit)
        return None if place is None else rows[min(max(self._pass, 0), len(rows) - 1)][place]

    def done(self, unit: str, last: bool) -> tuple[list[str], list[str]]:
        return [], []

    def finished(self) -> bool:
        return False  # what comes in a last pass is in the script


def window_of(order: Sequence[str], nbytes: Mapping[str, int], share: Share) -> Window:
    """The window that `share` asks for."""
    return (Window if share.script is None else Scripted)(order, nbytes, share)


def held_first(order: Sequence[str], nbytes: Mapping[str, int], share: Share, entered: bool) -> tuple[str, ...]:
    """The units that a component with this share holds before it begins, or (`entered`) when it does, in order of use."""
    window = Window(order, nbytes, share)
    chosen = {*(window.first() if entered else window.head()), *share.keep}
    return tuple(u for u in order if u in chosen)
