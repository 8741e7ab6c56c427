"""The iterations of one step of L-BFGS: direction, length, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stableopt.optim.lbfgs.line_search import Number, Trial, quotient, shortened, strong_wolfe
from stableopt.optim.lbfgs.memory import PairMemory
from stableopt.optim.lbfgs.objective import Objective, largest

__all__ = ["Ending", "Iterations"]

Ending = tuple[float | None, list[tuple[int, int]]]
"""The loss where a step ended, ``None`` if unknown, and the versions of the parameters there."""

SAME_LOSS = 1e-4
"""Relative difference of two losses at one point that parallel sums do not explain."""

NON_FINITE = (
    "the closure's loss or gradient is not finite",
    "the parameters stay where they were finite, and the memory starts afresh; a smaller lr or"
    " line_search_fn='strong_wolfe' may help",
)
NOISE = (
    "the closure returned different losses at the same point",
    "L-BFGS compares losses and gradients of different calls, line_search_fn='strong_wolfe' most of"
    " all: give it the same data each time, and no dropout",
)


class Iterations:
    """One call of ``step``, with what its iterations share.

    Args:
        objective: the loss as a function of the parameters.
        options: those of the first group of parameters.
        rates: the learning rate of each parameter.
        state: the optimizer's, which :meth:`run` reads and updates.
        memory: the pairs.
        ending: where the last step ended.
        warn: takes what happened and why it matters.
    """

    def __init__(
        self,
        objective: Objective,
        options: dict[str, Any],
        rates: list[Number],
        state: dict[str, Any],
        memory: PairMemory,
        ending: Ending | None,
        warn: Callable[[str, str], None],
    ) -> None:
        self.objective, self.options, self.state = objective, options, state
        self.memory, self.warn = memory, warn
        self.ending = ending if ending is not None and ending[1] == objective.versions() else None
        equal = all(float(rate) == float(rates[0]) for rate in rates)
        self.lr: Number = memory.numbers(rates[0])[0] if equal else max(map(float, rates))
        self._ratios = [] if equal else [math.sqrt(float(rate) / self.lr) for rate in rates]
        # The last move: `previous` is the gradient where it began.
        self.direction: Tensor | None = state.get("d")
        self.t: Number = state.get("t", 0.0)
        self.previous: Tensor | None = state.get("prev_flat_grad")
        self.previous_loss: Number = state.get("prev_loss")

    def run(self) -> Ending | None:
        """Iterate; leave the state as the next call wants it, and return where it ended."""
        try:
            loss = self._run()
        finally:
            moved = {
                "d": self.direction,
                "t": self.t,
                "prev_flat_grad": self.previous,
                "prev_loss": self.previous_loss,
            }
            self.state.update(moved if self.direction is not None else {})
        return None if loss is None else (loss[0], self.objective.versions())

    def _run(self) -> tuple[float | None] | None:
        """Return the loss of the last point, in brackets, or ``None`` where there is no such point."""
        options, state = self.options, self.state
        trial = self._first()
        if trial is None:
            return None
        if trial.largest <= options["tolerance_grad"]:
            return (float(trial.loss),)
        for iteration in range(1, options["max_iter"] + 1):
            state["n_iter"] += 1
            direction, slope, size, t = self._direction(trial)
            self.direction, self.previous, self.previous_loss = (
                direction,
                trial.gradient,
                trial.loss,
            )
            if slope > -options["tolerance_change"]:
                # Torch notes a move that was not made, which noise could turn into a pair.
                self.t = t if options["direction"] == "two_loop" else 0.0
                break
            # If the closure raises, no move was made.
            self.t = 0.0
            start = Trial(0, trial.loss, slope, trial.gradient, trial.largest)
            if options["line_search_fn"] is None and iteration == options["max_iter"]:
                if not self.objective.can_move(float(t * size)):
                    return self._start_afresh(trial)
                self.objective.move(direction, t)
                self.t = t
                return (None,)
            found = self._move(start, t, size)
            if found is None:
                return self._start_afresh(trial)
            trial, self.t = found, found.t
            if (
                self.objective.evaluations >= options["max_eval"]
                or trial.largest <= options["tolerance_grad"]
                or size * trial.t <= options["tolerance_change"]
                or abs(trial.loss - self.previous_loss) < options["tolerance_change"]
            ):
                break
        return (float(trial.loss),)

    def _start_afresh(self, trial: Trial) -> tuple[float | None]:
        self.warn(*NON_FINITE)
        self.memory.clear()
        self.state["n_iter"] = 0
        return (float(trial.loss),)

    def _first(self) -> Trial | None:
        """Evaluate where the parameters are; go back, if the last move led to no finite loss."""
        trial = self._evaluate(self.t, pair=True)
        known = None if self.ending is None else self.ending[0]
        if trial.finite:
            scale = SAME_LOSS * max(abs(float(trial.loss)), abs(known or 0.0))
            if known is not None and abs(float(trial.loss) - known) > scale:
                self.warn(*NOISE)
            return trial
        if self.ending is None or known is not None or self.direction is None:
            self.warn(*NON_FINITE)
            return None
        # The last step of fixed length was never evaluated: it was too long.
        self.objective.move(self.direction, -self.t)
        line = _Line(self.objective, self.direction, 0.0)

        def evaluate(t: Number) -> Trial:
            line.set(t)
            return self._evaluate(t, pair=True)

        budget = self.options["max_eval"] - self.objective.evaluations
        with line:
            found = shortened(evaluate, trial, budget=budget)
            line.set(0.0 if found is None else found.t)
        if found is None:
            self.t = 0.0
            self.warn(*NON_FINITE)
            self.memory.clear()
            self.state["n_iter"] = 0
        else:
            self.t = found.t
        return found

    def _direction(self, trial: Trial) -> tuple[Tensor, Number, Number, Number]:
        """Return the direction, its slope, its largest entry and the first step length."""
        gradient, memory = trial.gradient, self.memory
        if self.state["n_iter"] > 1 and self.direction is not None and self.previous is not None:
            pair = (gradient, self.previous, self.direction)
            products = list(trial.extra) or memory.numbers(*memory.products(*pair))
            memory.update(*pair, self.t, products, self.options["damping"])
            direction = self._scaled(memory.descent(self._scaled(gradient, copy=True)))
            slope, size = memory.numbers(gradient.dot(direction), largest(direction))
            if math.isfinite(slope) and math.isfinite(size) and not slope > 0:
                return direction, slope, size, self.lr
            self.state["n_iter"] = 1
        memory.clear()
        direction = self._scaled(self._scaled(gradient.neg()))
        slope, size, total = memory.numbers(
            gradient.dot(direction), largest(direction), gradient.abs().sum()
        )
        return direction, slope, size, min(1.0, quotient(1.0, total)) * self.lr

    def _scaled(self, vector: Tensor, *, copy: bool = False) -> Tensor:
        """Multiply by the square roots of the groups' rates, relative to the largest."""
        if self._ratios:
            vector = vector.clone() if copy else vector
            for part, ratio in zip(self.objective.split(vector), self._ratios, strict=True):
                part.mul_(ratio)
        return vector

    def _evaluate(self, t: Number, *, slope: bool = False, pair: bool = False) -> Trial:
        """Call the closure where the parameters are, ``t`` along the direction."""
        loss, gradient = self.objective.evaluate()
        asked = [gradient.dot(self.direction)] if slope and self.direction is not None else []
        if pair and self.direction is not None and self.previous is not None:
            asked += self.memory.products(gradient, self.previous, self.direction)
        numbers = self.memory.numbers(loss, largest(gradient), *asked)
        loss, height, found = float(numbers[0]), numbers[1], numbers[2:]
        along = found.pop(0) if slope else math.nan
        if math.isfinite(loss) and math.isfinite(height) and (not slope or math.isfinite(along)):
            return Trial(t, loss, along, gradient, height, tuple(found))
        return Trial(t, math.inf, math.nan, gradient, height)

    def _move(self, start: Trial, t: Number, size: Number) -> Trial | None:
        """Move along the direction, to a point that is returned; ``None``, and stay, if none will do."""
        objective, direction = self.objective, self.direction
        assert direction is not None
        fixed = self.options["line_search_fn"] is None
        line = _Line(objective, direction, float(size))

        def evaluate(t: Number) -> Trial:
            if not line.set(t):
                return Trial(t, math.inf, math.nan, start.gradient, math.inf)
            return self._evaluate(t, slope=True, pair=fixed)

        with line:
            found: Trial | None
            if fixed:
                found = evaluate(t)
                budget = self.options["max_eval"] - objective.evaluations
                found = shortened(evaluate, found, budget=budget)
            else:
                budget = self.options["max_eval"] - objective.evaluations
                found, finite = strong_wolfe(evaluate, start, t, size, budget=budget)
                if found is start and not finite:
                    found = None
            line.set(0.0 if found is None else found.t)
        return found


class _Line:
    """The parameters on a line, set from where they were; an error puts them back there.

    Args:
        objective: whose parameters move.
        direction: where to.
        size: its largest entry, 0 where the way is known to be safe. Beyond some step parameters would
            overflow, which a loss that saturates may not tell.
    """

    def __init__(self, objective: Objective, direction: Tensor, size: float) -> None:
        self._objective, self._direction, self._size = objective, direction, size
        self._position = objective.position()
        self._at: Number = 0.0

    def set(self, t: Number) -> bool:
        """Move to ``t``; return whether that is possible."""
        if not self._objective.can_move(float(t) * self._size, self._position):
            return False
        if t is not self._at:
            if float(self._at):
                self._objective.restore(self._position)
            if float(t):
                self._objective.move(self._direction, t)
            self._at = t
        return True

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._objective.restore(self._position)
