"""`Iterations`: one ``step`` of L-BFGS, with its directions, step lengths and stopping rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.optim.lbfgs.line_search import Number, Trial, quotient, shortened, strong_wolfe
from stableopt.optim.lbfgs.memory import Move, PairMemory
from stableopt.optim.lbfgs.objective import Objective, largest, wide_dot

__all__ = ["Iterations", "StepEnd"]


class StepEnd(NamedTuple):
    """The end of a step.

    Attributes:
        loss: the loss at the end, ``None`` if it was not evaluated.
        versions: the :meth:`Objective.versions` at the end.
        searched_options: the options of a line search that found no lower point; ``None`` after a move.
    """

    loss: float | None
    versions: list[tuple[int, int]]
    searched_options: list[Any] | None = None


_ROUNDINGS = 10
"""Rounding error of a loss, a sum of many terms, in units of the precision times the loss."""

SAME_LOSS = 1e-4
"""Relative difference of two losses at the same point above which the order of sums is not the cause."""

NON_FINITE = (
    "the closure's loss or gradient is not finite",
    "the parameters stay at a finite point, and the memory is emptied; a smaller lr or"
    " line_search_fn='strong_wolfe' may help",
)
NOISE = (
    "the closure returned different losses at the same point",
    "L-BFGS compares losses and gradients of different calls, above all with"
    " line_search_fn='strong_wolfe': use the same data in each call, and no dropout",
)


class Iterations:
    """The iterations of one call of ``step``.

    Args:
        objective: the loss as a function of the parameters.
        options: the options of the first group of parameters.
        rates: the learning rate of each parameter.
        state: the optimizer's state, which :meth:`run` reads and updates.
        memory: the memory of pairs.
        last_end: the end of the last step, or ``None``.
        warn: called with an event and its consequence.
    """

    def __init__(
        self,
        objective: Objective,
        options: dict[str, Any],
        rates: list[Number],
        state: dict[str, Any],
        memory: PairMemory,
        last_end: StepEnd | None,
        warn: Callable[[str, str], None],
    ) -> None:
        self.objective, self.options, self.state = objective, options, state
        self.memory, self.warn = memory, warn
        unchanged = last_end is not None and last_end.versions == objective.versions()
        self.last_end = last_end if unchanged else None
        dtype = objective.dtype
        half = dtype in (torch.float16, torch.bfloat16)
        # The two-loop recursion keeps torch's arithmetic, which overflows in half precision.
        self._compact = options["direction"] == "compact"
        self._dot = wide_dot if self._compact else Tensor.dot
        self._sum_dtype = torch.float32 if self._compact and half else dtype
        equal = all(float(rate) == float(rates[0]) for rate in rates)
        self.lr: Number = memory.numbers(rates[0])[0] if equal else max(map(float, rates))
        self._root_ratios = [] if equal else [math.sqrt(float(rate) / self.lr) for rate in rates]
        direction, gradient = state.get("d"), state.get("prev_flat_grad")
        self._searched_options: list[Any] | None = None
        self.last_move: Move | None = None
        if direction is not None and gradient is not None:
            self.last_move = Move(direction, state.get("t", 0.0), gradient, state.get("prev_loss"))

    def run(self) -> StepEnd | None:
        """Iterate, and store the last move in the state; return ``None`` without a finite point."""
        try:
            return self._iterate()
        finally:
            if self.last_move is not None:
                self.state.update(
                    d=self.last_move.direction,
                    t=self.last_move.t,
                    prev_flat_grad=self.last_move.gradient,
                    prev_loss=self.last_move.loss,
                )

    def _end(self, loss: Number | None) -> StepEnd:
        """Return the end of this step, at the present parameters."""
        loss = None if loss is None else float(loss)
        return StepEnd(loss, self.objective.versions(), self._searched_options)

    def _iterate(self) -> StepEnd | None:
        options, state = self.options, self.state
        trial = self._first_trial()
        if trial is None:
            return None
        if trial.largest <= options["tolerance_grad"]:
            return self._end(trial.loss)
        if self._already_searched(trial):
            self._searched_options = self._search_options()
            return self._end(trial.loss)
        for iteration in range(1, options["max_iter"] + 1):
            state["n_iter"] += 1
            direction, slope, size, t = self._direction(trial)
            # Its length is 0 until the parameters move: the closure may raise.
            last_move = self.last_move = Move(direction, 0.0, trial.gradient, trial.loss)
            if slope > -options["tolerance_change"]:
                # Torch stores the length although it does not move; noise could make that a pair.
                last_move.t = 0.0 if self._compact else t
                break
            start = Trial(0, trial.loss, slope, trial.gradient, trial.largest)
            if options["line_search_fn"] is None and iteration == options["max_iter"]:
                if not self.objective.stays_finite(float(t * size)):
                    return self._reset_memory(trial)
                self.objective.move(direction, t)
                last_move.t = t
                return self._end(None)
            end, stayed = self._move(start, t, size)
            if end is None:
                return self._reset_memory(trial)
            trial, last_move.t = end, end.t
            exhausted = self.objective.evaluations >= options["max_eval"]
            self._searched_options = self._search_options() if stayed and not exhausted else None
            if (
                exhausted
                or trial.largest <= options["tolerance_grad"]
                or size * trial.t <= options["tolerance_change"]
                or abs(trial.loss - last_move.loss) < options["tolerance_change"]
            ):
                break
        return self._end(trial.loss)

    def _search_options(self) -> list[Any]:
        """Return the options that a line search depends on."""
        others = [value for name, value in self.options.items() if name not in ("params", "lr")]
        return [self.lr, self._root_ratios, *others]

    def _already_searched(self, trial: Trial) -> bool:
        """Return whether the last step searched from this point, and found no lower one.

        The same search would follow: without a move the pairs and the direction are the same.
        """
        last_move, last_end = self.last_move, self.last_end
        return (
            last_move is not None
            and last_end is not None
            and last_end.searched_options == self._search_options()
            and trial.loss == last_move.loss
            and torch.equal(trial.gradient, last_move.gradient)
        )

    def _reset_memory(self, trial: Trial) -> StepEnd:
        """Warn, empty the memory, and return the end of the step at ``trial``."""
        self.warn(*NON_FINITE)
        self.memory.clear()
        self.state["n_iter"] = 0
        return self._end(trial.loss)

    def _first_trial(self) -> Trial | None:
        """Evaluate at the parameters; if the loss is not finite, shorten the last move.

        Return ``None`` without a finite point.
        """
        last_move = self.last_move
        trial = self._evaluate(0.0 if last_move is None else last_move.t, pair=True)
        last_loss = None if self.last_end is None else self.last_end.loss
        if trial.finite:
            scale = SAME_LOSS * max(abs(float(trial.loss)), abs(last_loss or 0.0))
            if last_loss is not None and abs(float(trial.loss) - last_loss) > scale:
                self.warn(*NOISE)
            return trial
        if self.last_end is None or last_loss is not None or last_move is None:
            self.warn(*NON_FINITE)
            return None
        # The end of the last move, of fixed length, was not evaluated: the move was too long.
        self.objective.move(last_move.direction, -last_move.t)
        line = _Line(self.objective, last_move.direction, 0.0)

        def evaluate(t: Number) -> Trial:
            line.set(t)
            return self._evaluate(t, pair=True)

        budget = self.options["max_eval"] - self.objective.evaluations
        with line:
            end = shortened(evaluate, trial, budget=budget)
            line.set(0.0 if end is None else end.t)
        last_move.t = 0.0 if end is None else end.t
        if end is None:
            self._reset_memory(trial)
        return end

    def _direction(self, trial: Trial) -> tuple[Tensor, Number, Number, Number]:
        """Return the direction, its slope, its largest entry and the first step length."""
        gradient, memory = trial.gradient, self.memory
        if self.state["n_iter"] > 1 and self.last_move is not None:
            products = list(trial.products)
            products = products or memory.numbers(*memory.products(self.last_move, gradient))
            memory.update(self.last_move, gradient, products, self.options["damping"])
            direction = self._scaled(memory.descent(self._scaled(gradient, copy=True)))
            slope, size = memory.numbers(self._dot(gradient, direction), largest(direction))
            if math.isfinite(slope) and math.isfinite(size) and not slope > 0:
                return direction, slope, size, self.lr
            self.state["n_iter"] = 1
        memory.clear()
        direction = self._scaled(self._scaled(gradient.neg()))
        slope, size, total = memory.numbers(
            self._dot(gradient, direction),
            largest(direction),
            gradient.abs().sum(dtype=self._sum_dtype),
        )
        return direction, slope, size, min(1.0, quotient(1.0, total)) * self.lr

    def _scaled(self, vector: Tensor, *, copy: bool = False) -> Tensor:
        """Multiply by the square roots of the groups' rates, relative to the largest."""
        if self._root_ratios:
            vector = vector.clone() if copy else vector
            for part, ratio in zip(self.objective.split(vector), self._root_ratios, strict=True):
                part.mul_(ratio)
        return vector

    def _evaluate(self, t: Number, *, slope: bool = False, pair: bool = False) -> Trial:
        """Call the closure at the parameters, which are ``t`` along the direction.

        With ``slope`` the trial has the slope along the direction, with ``pair`` the products for
        :meth:`PairMemory.update`; all numbers take one host transfer.
        """
        loss, gradient = self.objective.evaluate()
        move = self.last_move
        products: list[Tensor] = []
        if slope and move is not None:
            products.append(self._dot(gradient, move.direction))
        if pair and move is not None:
            products += self.memory.products(move, gradient)
        numbers = self.memory.numbers(loss, largest(gradient), *products)
        loss, height, others = float(numbers[0]), numbers[1], numbers[2:]
        along = others.pop(0) if slope else math.nan
        if math.isfinite(loss) and math.isfinite(height) and (not slope or math.isfinite(along)):
            return Trial(t, loss, along, gradient, height, tuple(others))
        return Trial(t, math.inf, math.nan, gradient, height)

    def _move(self, start: Trial, t: Number, size: Number) -> tuple[Trial | None, bool]:
        """Move along the direction to a finite point and return it; ``None`` if there is none.

        Also return whether a search left the parameters where they were, up to rounding.
        """
        objective = self.objective
        assert self.last_move is not None
        fixed = self.options["line_search_fn"] is None
        line = _Line(objective, self.last_move.direction, float(size))

        # As in torch, the two-loop recursion computes the pair's products only at the search's end.
        pair, latest = fixed or self._compact, start

        def evaluate(t: Number) -> Trial:
            nonlocal latest
            if not line.set(t):
                return Trial(t, math.inf, math.nan, start.gradient, math.inf)
            latest = self._evaluate(t, slope=True, pair=pair)
            return latest

        with line:
            end: Trial | None
            if fixed:
                trial = evaluate(t)
                budget = self.options["max_eval"] - objective.evaluations
                end = shortened(evaluate, trial, budget=budget)
            else:
                budget = self.options["max_eval"] - objective.evaluations
                rounding = 0.0
                if self._compact:
                    limits = torch.finfo(objective.dtype)
                    rounding = _ROUNDINGS * limits.eps * (abs(start.loss) + limits.tiny)
                end, finite = strong_wolfe(
                    evaluate, start, t, size, budget=budget, rounding=rounding
                )
                if end is start and not finite:
                    end = None
                elif end is not start and end.gradient is not latest.gradient:
                    # The memory holds the gradient change of the latest trial, not of this one.
                    end = replace(end, products=())
            line.set(0.0 if end is None else end.t)
        if end is None or fixed or not self._compact:
            return end, False
        # Parameters are compared only if the loss is the same, which is rare.
        return end, end is start or (end.loss == start.loss and line.stayed())


class _Line:
    """Moves the parameters on a line through their position; an error restores the position.

    Args:
        objective: the owner of the parameters.
        direction: the direction of the line.
        size: the largest entry of the direction, by which :meth:`set` refuses steps that overflow the
            parameters, since a loss that saturates would hide an overflow; 0 allows all steps.
    """

    def __init__(self, objective: Objective, direction: Tensor, size: float) -> None:
        self._objective, self._direction, self._size = objective, direction, size
        self._position = objective.position()
        self._t: Number = 0.0

    def set(self, t: Number) -> bool:
        """Move to ``t`` if the parameters stay finite; return whether they do."""
        if not self._objective.stays_finite(float(t) * self._size, self._position):
            return False
        if t is not self._t:
            if float(self._t):
                self._objective.restore(self._position)
            if float(t):
                self._objective.move(self._direction, t)
            self._t = t
        return True

    def stayed(self) -> bool:
        """Return whether the parameters equal their position at the start, after rounding."""
        return all(map(torch.equal, self._position, self._objective.position()))

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._objective.restore(self._position)
