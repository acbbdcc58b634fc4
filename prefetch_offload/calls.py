"""What is known about a pipeline's calls: the order of its components, and what each needs besides its weights. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .config import KIB, Budget

# A call that alternates two networks for a thousand steps still fits; more is no longer an order, it is noise.
MAX_SWITCHES = 4096


class CallOrder:
    """The order in which a pipeline enters its components, learned from its last call.

    `model_cpu_offload_seq` is only the first hint: 158 of 284 pipelines visit components out of that order.
    """

    def __init__(self, hint: Sequence[str] = ()) -> None:
        self.expect(hint)
        self._current: list[str] = []
        self._current_passes: list[int] = []
        self._position = -1
        self._steps: int | None = None

    def expect(self, hint: Sequence[str]) -> None:
        """Until a call has been seen, expect this order; a component named twice counts once."""
        self.expected: tuple[str, ...] = tuple(dict.fromkeys(hint))
        self.passes: tuple[int, ...] = ()  # of each expected run, at `expected_steps` steps; empty: not seen yet
        self.expected_steps: int | None = None

    def start(self, steps: int | None = None) -> None:
        """A call begins, of so many denoising steps if that is known; an unfinished one before it teaches nothing."""
        self._current = []
        self._current_passes = []
        self._position = -1
        self._steps = steps

    def enter(self, component: str) -> None:
        """`component` is entered, and it is not the one that was entered last."""
        if len(self._current) < MAX_SWITCHES:
            self._current.append(component)
            self._current_passes.append(0)
        n = len(self.expected)
        for step in range(1, n + 1):
            if self.expected[(self._position + step) % n] == component:
                self._position = (self._position + step) % n
                return

    def passed(self) -> None:
        """The component entered last begins a pass through its units."""
        if self._current_passes:
            self._current_passes[-1] += 1

    def passes_left(self) -> int | None:
        """How many passes of the current component follow the one that has begun, by the last call; None: no telling,
        or more have begun than were expected.

        A component that took many passes in a call of so many steps takes as many more as there are more steps now.
        """
        if not self._current_passes or not self.passes or not 0 <= self._position < len(self.passes):
            return None
        if self.expected[self._position] != self._current[-1]:
            return None
        left = self.scaled(self._position) - self._current_passes[-1]
        return left if left >= 0 else None

    def scaled(self, run: int) -> int:
        """Passes expected of run number `run` in this call."""
        passes = self.passes[run]
        if passes > 1 and self._steps and self.expected_steps and self._steps != self.expected_steps:
            return max(1, round(passes * self._steps / self.expected_steps))
        return passes

    def visits(self, component: str) -> int:
        """How often `component` has been entered in this call."""
        return self._current.count(component)

    def finish(self) -> None:
        """The call ended as it should: from now on this is the order to expect."""
        if self._current:
            self.expected = tuple(self._current)
            self.passes = tuple(max(1, p) for p in self._current_passes)
            self.expected_steps = self._steps
        self.start()

    def upcoming(self) -> tuple[str, ...]:
        """The components expected next, nearest first, one cycle of them, ending with the current one."""
        after = self._position + 1
        return self.expected[after:] + self.expected[:after]

    def forget(self, component: str) -> None:
        """`component` is no longer part of the pipeline. A call in progress goes on, and is still learned from."""
        self._position -= self.expected[: self._position + 1].count(component)
        if self.passes:
            self.passes = tuple(p for c, p in zip(self.expected, self.passes, strict=True) if c != component)
        self.expected = tuple(c for c in self.expected if c != component)
        left = [(c, p) for c, p in zip(self._current, self._current_passes, strict=True) if c != component]
        self._current, self._current_passes = [c for c, _ in left], [p for _, p in left]


@dataclass
class Memory:
    """How many device bytes weights may take while a component runs.

    Peaks are measured: `learn` is told, after a component ran, how much device memory was in use beyond the weights
    (activations, inputs, whatever else lives on the device). A *shape* stands for the component together with the shapes
    of its inputs; while a shape has not been measured, a bounded budget holds nothing but the running component, as stock
    model offload would. `overhead_nbytes` are taken on the device, whatever runs, by the buffers that encoded weights arrive
    in; no measurement counts them. `spare_nbytes` is the least margin on what activations were measured to. `took_nbytes`
    is the most that was in use in the last call, weights and all, while shapes were being measured.
    """

    budget: Budget
    overhead_nbytes: int = 0
    spare_nbytes: int = 0
    activations: dict[object, int] = field(default_factory=dict)
    needs: dict[object, int] = field(default_factory=dict)
    alone: set[object] = field(default_factory=set)
    tight: set[object] = field(default_factory=set)
    took_nbytes: int = 0
    _seen: dict[object, tuple[int, int]] = field(default_factory=dict)

    def knows(self, shape: object) -> bool:
        return shape in self.activations

    def learn(self, shape: object, activation_nbytes: int, weight_nbytes: int) -> None:
        """`shape` ran with at most `activation_nbytes` besides weights; its own weights are `weight_nbytes`.

        It counts from `commit` on: a component may run several times in a call, each time with more around it.
        """
        known = self._seen.get(shape, (0, 0))[0]
        self._seen[shape] = max(known, activation_nbytes), weight_nbytes

    def commit(self) -> None:
        """A call is over: what was learned in it holds from now on."""
        for shape, (activations, weights) in self._seen.items():
            self.activations[shape] = max(self.activations.get(shape, 0), activations)
            self.needs[shape] = weights + self.activations[shape]
        self._seen.clear()

    def ran_out(self, shape: object) -> None:
        """`shape` ran out of memory: from now on it runs alone, and when it did so already, with as little as it can."""
        (self.tight if shape in self.alone else self.alone).add(shape)

    def forgive(self) -> None:
        """What ran out of memory was measured by now, and there will be more to spare: it may be planned for again."""
        self.alone -= self.activations.keys()
        self.tight -= self.activations.keys()

    def set_aside(self, shape: object) -> int:
        """Device bytes to leave to `shape`, which was measured, for all that is not weights.

        What a pipeline keeps from one call to the next (a scheduler's time steps, last outputs) was not there when it was
        measured: a small margin is. And what the allocator takes beyond what it was asked for differs from call to call.
        """
        measured = self.activations[shape]
        return measured + max(measured // 64, 16 * KIB, self.spare_nbytes) + self.overhead_nbytes

    def stock_floor(self) -> int | None:
        """A lower bound on stock model offload's peak: the largest component with its own activations."""
        return max(self.needs.values(), default=None)

    def cap(self, shape: object, weight_nbytes: int, available_nbytes: int, least_nbytes: int | None = None) -> int:
        """Device bytes for weights while `shape`, whose own weights are `weight_nbytes`, runs.

        Args:
            available_nbytes: what weights could take if nothing else ran: held by weights now, plus free, less reserve.
                A budget that is a number, too, gives no more than that.
            least_nbytes: what it can run with when its units are streamed; None: it cannot be streamed.

        Returns:
            At least `least_nbytes`: a component that runs must have that.
        """
        least = weight_nbytes if least_nbytes is None else least_nbytes
        if shape in self.tight:
            return least
        if self.budget is None:
            # Unmeasured: a quarter of what there is, the ladder for running out of memory being the safety net.
            activations = self.activations.get(shape, available_nbytes // 4)
            room = max(least, available_nbytes - activations)
            return min(room, max(least, weight_nbytes)) if shape in self.alone else room
        if self.budget == "stock":
            # Stock has no buffers for encoded weights: they take the place of weights, as far as units can be streamed.
            floor, room = self.stock_floor(), weight_nbytes - self.overhead_nbytes
            if shape in self.activations and floor is not None and shape not in self.alone:
                room = max(room, floor - self.activations[shape] - self.overhead_nbytes)
            # A device that has less than stock offload would take gives what it has.
            guess = available_nbytes // 4 if weight_nbytes > available_nbytes else 0
            return max(least, min(room, available_nbytes - self.activations.get(shape, guess)))
        if shape not in self.activations:
            # It runs alone. Half of the budget is left to whatever it needs besides, more if it has to be streamed anyway.
            return weight_nbytes if weight_nbytes <= self.budget // 2 else max(least, self.budget // 4)
        room = max(least, min(self.budget, available_nbytes) - self.set_aside(shape))  # a device may have less
        return min(room, max(least, weight_nbytes)) if shape in self.alone else room
