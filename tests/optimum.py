"""Small calls at random, and the optimum of each: every schedule that can be repeated is tried.

It shares no code with the planner. Physics as in the simulator: a load takes its memory when it is issued, starts after
the kernels enqueued before and after the loads before it, and a kernel starts when its unit has arrived.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from prefetch_offload.simulator import ComponentLoad, Link, Workload

MB = 10**6
ROUNDS = 12
TINY = 1e-9

# What a call finds, later than its start: when the link is free, and when each unit arrives.
Lag = tuple[float, tuple[float, ...]]
# Behind a kernel: its end, the link's, and each unit's arrival if that is still to come.
State = tuple[float, float, tuple[float, ...]]


def random_case(seed: int) -> tuple[Workload, int, Link]:
    """2 or 3 components of 2 to 4 units, at most 7 in all, 1 to 4 passes each, in any budget that the call can run in."""
    draw = random.Random(seed)
    while True:
        components, runs = {}, []
        for name in "abc"[: draw.choice([2, 2, 3])]:
            units = tuple(f"{name}{i}" for i in range(draw.randint(2, 4)))
            components[name] = ComponentLoad(
                units,
                {u: draw.randint(1, 8) * MB for u in units},
                {u: draw.choice([0.5, 1, 2, 4, 8]) * draw.uniform(0.5, 1.5) for u in units},
                draw.choice([0, 0, draw.randint(1, 8) * MB]),
            )
            runs.append((name, draw.choice([1, 1, 2, 3, 4])))
        workload = Workload(components, tuple(runs))
        if sum(len(c.units) for c in components.values()) <= 7:
            break
    least = workload.smallest_budget_nbytes
    most = sum(c.total_nbytes for c in components.values()) + max(c.activation_nbytes for c in components.values())
    return workload, draw.randint(least, max(most, least + 1)), Link(draw.choice([0.5, 1, 2, 4]), draw.choice([0, 0.01, 0.1]))


def every_residency(
    held: int, unit: int, missing: list[int], size: list[int], total: list[int], cap: int
) -> list[tuple[tuple[int, ...], int]]:
    """What may be done before `unit` is read: (loads in order of next use, the set then on the device).

    Of the sets to drop only those of which every unit is needed to make room.
    """
    found = []
    others = [v for v in range(len(size)) if held >> v & 1 and v != unit]
    for r in range(len(missing) + 1):
        for loads in itertools.combinations(missing, r):
            more = sum(1 << v for v in loads)
            if not (held | more) >> unit & 1 or total[more | 1 << unit] > cap:
                continue
            need = total[held | more] - cap
            for k in range(len(others) + 1 if need > 0 else 1):
                for drops in itertools.combinations(others, k):
                    nbytes = sum(size[v] for v in drops)
                    if nbytes >= need and not any(nbytes - size[v] >= need for v in drops):
                        found.append((loads, held & ~sum(1 << v for v in drops) | more))
    return found


@dataclass
class Optimum:
    """The shortest time in which a call can be made so that it leaves the device and the link no worse than it found them.

    Before each kernel any units may be dropped and any loaded. Only what cannot help is left out: loads issued together go
    in order of next use (exchanging two never helps), and nothing is dropped without need. States are pruned when one
    with the same units is no later in anything, or when what is left must take too long.

    Attributes:
        best_ms: only schedules that take less are looked for; in the end the shortest one's time, if there was one.
    """

    workload: Workload
    budget: int
    link: Link
    best_ms: float

    def search(self) -> float:
        components = self.workload.components
        names = [u for c in components.values() for u in c.units]
        nbytes = {u: c.nbytes[u] for c in components.values() for u in c.units}
        n = self.n = len(names)
        self.size = [nbytes[u] for u in names]
        self.copy = [self.link.copy_ms(nbytes[u]) for u in names]
        self.total = [sum(self.size[v] for v in range(n) if m >> v & 1) for m in range(1 << n)]
        self.uses = [
            (names.index(u), c.compute_ms[u], self.budget - c.activation_nbytes)
            for c, passes in ((components[name], passes) for name, passes in self.workload.runs)
            for _ in range(passes)
            for u in c.units
        ]
        end = self.end = len(self.uses)
        following = [[2 * end] * n for _ in range(2 * end + 1)]  # the next use of each unit, into the next call
        rest = [0.0] * (2 * end + 1)  # at least so long from there on in this call, whatever is held
        for i in range(2 * end - 1, -1, -1):
            following[i] = [*following[i + 1]]
            following[i][self.uses[i % end][0]] = i
            rest[i] = rest[i + 1] + self.uses[i][1] if i < end else 0.0
        self.rest = rest
        self.order = [sorted(range(n), key=following[i].__getitem__) for i in range(end)]
        # what is read again in this call, behind each kernel: (unit, time from its use on)
        self.again = [
            [(v, rest[use]) for v in sorted(range(n), key=row.__getitem__) if (use := row[v]) < end]
            for row in following[1 : end + 1]
        ]
        self.choices: dict[tuple[int, int], list[tuple[tuple[int, ...], int]]] = {}
        for held in range(1 << n):
            if self.total[held] <= self.uses[-1][2]:
                self.from_set(held)
        return self.best_ms

    def from_set(self, start: int) -> None:
        """Calls that begin and end with the units `start`.

        What a repeated call finds on the link is no less than nothing; so it leaves no less than the least of what calls
        from there leave; and so on, until one leaves no more than it found, or none is left.
        """
        lags: list[Lag] = [(0.0, (0.0,) * self.n)]
        for _ in range(ROUNDS):
            left: set[Lag] = set()
            for lag in lags:
                for now, link, ready in self.call(start, lag):
                    after = (link - now, tuple(max(0.0, t - now) if start >> v & 1 else 0.0 for v, t in enumerate(ready)))
                    if now < self.best_ms:
                        left.add(after)
                        if no_more(after, lag):
                            self.best_ms = now
            lags = []
            for one in sorted(left):
                if not any(no_more(other, one) for other in lags):
                    lags.append(one)
            if not lags:
                return
        raise AssertionError("it has not come to rest")

    def call(self, start: int, lag: Lag) -> list[State]:
        """The states in which a call that begins with `start` ends, with at least the same units."""
        layer: dict[int, list[State]] = {start: [(0.0, *lag)]}
        for i, (unit, compute, cap) in enumerate(self.uses):
            found: dict[int, set[State]] = {}
            for held, states in layer.items():
                if (held, i) not in self.choices:
                    missing = [v for v in self.order[i] if not held >> v & 1]
                    self.choices[held, i] = every_residency(held, unit, missing, self.size, self.total, cap)
                for (loads, after), (now, linked, ready) in itertools.product(self.choices[held, i], states):
                    free, arrive = linked, list(ready)
                    for v in loads:
                        free = max(free, now) + self.copy[v]
                        arrive[v] = free
                    done = max(now, arrive[unit]) + compute
                    queue, late = max(free, done), done + self.rest[i + 1] >= self.best_ms
                    for v, rest in self.again[i]:
                        if late:
                            break
                        if not after >> v & 1:
                            queue += self.copy[v]
                        late = (arrive[v] if after >> v & 1 else queue) + rest >= self.best_ms
                    if not late:
                        pending = tuple(t if t > done and after >> v & 1 else 0.0 for v, t in enumerate(arrive))
                        found.setdefault(after, set()).add((done, max(free, done), pending))
            layer = {}
            for held, some in found.items():
                front: list[State] = []
                for s in sorted(some):
                    if not any(
                        f[1] <= s[1] and all(a <= max(b, s[0]) for a, b in zip(f[2], s[2], strict=True)) for f in front
                    ):
                        front.append(s)
                layer[held] = front
        return [s for held, states in layer.items() if not start & ~held for s in states]


def no_more(a: Lag, b: Lag) -> bool:
    return a[0] <= b[0] + TINY and all(x <= y + TINY for x, y in zip(a[1], b[1], strict=True))
