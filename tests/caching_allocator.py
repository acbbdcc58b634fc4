"""A model of CUDA's caching allocator, as far as one stream and its default settings go: which memory a size takes, how that is
counted, and what it takes from the device for it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(eq=False)
class Block:
    """A piece of a segment, between its neighbours in it."""

    address: int
    nbytes: int
    small: bool
    before: Block | None = None
    behind: Block | None = None
    free: bool = True


class CachingAllocator:
    """See the module.

    Attributes:
        allocated, peak: bytes in use, as `torch.cuda.memory_allocated` and `max_memory_allocated` count them.
        reserved: bytes taken from the device.
    """

    def __init__(self) -> None:
        self.allocated = self.peak = self.reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._next = 0

    def take(self, nbytes: int) -> Block:
        wanted = max(512, -(-nbytes // 512) * 512)
        small = wanted <= MIB
        free = self._free[small]
        best = bisect.bisect_left(free, wanted, key=lambda entry: entry[0])
        block = free.pop(best)[2] if best < len(free) else self._segment(wanted, small)
        left = block.nbytes - wanted
        if left >= 512 if small else left > MIB:  # what is left of a large one is not worth a block of its own below that
            rest = Block(block.address + wanted, left, small, block, block.behind)
            if rest.behind is not None:
                rest.behind.before = rest
            block.behind, block.nbytes = rest, wanted
            self._keep(rest)
        block.free = False
        self.allocated += block.nbytes
        self.peak = max(self.peak, self.allocated)
        return block

    def give(self, block: Block) -> None:
        self.allocated -= block.nbytes
        for other in (block.before, block.behind):
            if other is None or not other.free:
                continue
            self._free[block.small].remove((other.nbytes, other.address, other))
            first, last = (other, block) if other is block.before else (block, other)
            block.address, block.nbytes = first.address, first.nbytes + last.nbytes
            block.before, block.behind = first.before, last.behind
            if block.before is not None:
                block.before.behind = block
            if block.behind is not None:
                block.behind.before = block
        block.free = True
        self._keep(block)

    def _segment(self, wanted: int, small: bool) -> Block:
        nbytes = 2 * MIB if small else 20 * MIB if wanted < 10 * MIB else -(-wanted // (2 * MIB)) * 2 * MIB
        self._next += 1 << 44  # no two of them are neighbours
        self.reserved += nbytes
        return Block(self._next, nbytes, small)

    def _keep(self, block: Block) -> None:
        bisect.insort(self._free[block.small], (block.nbytes, block.address, block), key=lambda entry: entry[:2])
