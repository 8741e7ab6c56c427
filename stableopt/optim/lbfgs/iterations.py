"""`Iterations`: one call of L-BFGS's ``step``, with its directions, step lengths and stopping rules."""

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

__all__ = ["Ending", "Iterations"]


class Ending(NamedTuple):
    """Where a step ended.

    Attributes:
        loss: the loss there, ``None`` if unknown.
        versions: of the parameters there.
        searched: the options with which a search ended without a lower point; ``None`` after a move.
    """

    loss: float | None
    versions: list[tuple[int, int]]
    searched: list[Any] | None = None


_ROUNDINGS = 10
"""Rounding errors of a loss, in units of the precision times the loss: those of a sum of terms."""

SAME_LOSS = 1e-4
"""Relative difference of two losses at one point that the order of parallel sums cannot cause."""

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
        memory: the pairs.
        ending: the ending of the last step.
        warn: called with an event and its consequence.
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
        same = ending is not None and ending.versions == objective.versions()
        self.ending = ending if same else None
        # Torch's arithmetic overflows in half precision.
        own = options["direction"] == "compact"
        self._dot = wide_dot if own else Tensor.dot
        kind = objective.dtype
        self._sum = torch.float32 if own and kind in (torch.float16, torch.bfloat16) else kind
        self._limits = torch.finfo(kind) if own else None
        equal = all(float(rate) == float(rates[0]) for rate in rates)
        self.lr: Number = memory.numbers(rates[0])[0] if equal else max(map(float, rates))
        self._ratios = [] if equal else [math.sqrt(float(rate) / self.lr) for rate in rates]
        direction, gradient = state.get("d"), state.get("prev_flat_grad")
        self._searched: list[Any] | None = None
        self.last: Move | None = None
        if direction is not None and gradient is not None:
            self.last = Move(direction, state.get("t", 0.0), gradient, state.get("prev_loss"))

    def run(self) -> Ending | None:
        """Iterate, store the last move in the state, and return the ending."""
        try:
            loss = self._run()
        finally:
            if (last := self.last) is not None:
                self.state.update(
                    d=last.direction, t=last.t, prev_flat_grad=last.gradient, prev_loss=last.loss
                )
        if loss is None:
            return None
        return Ending(loss[0], self.objective.versions(), self._searched)

    def _run(self) -> tuple[float | None] | None:
        """Return the loss at the last point, as a tuple, or ``None`` without a finite point."""
        options, state = self.options, self.state
        trial = self._first()
        if trial is None:
            return None
        if trial.largest <= options["tolerance_grad"]:
            return (float(trial.loss),)
        if self._already_searched(trial):
            self._searched = self._choices()
            return (float(trial.loss),)
        for iteration in range(1, options["max_iter"] + 1):
            state["n_iter"] += 1
            direction, slope, size, t = self._direction(trial)
            # Of length 0 until it is made: the closure may raise.
            last = self.last = Move(direction, 0.0, trial.gradient, trial.loss)
            if slope > -options["tolerance_change"]:
                # Torch stores a move that was not made, which noise could turn into a pair.
                last.t = t if options["direction"] == "two_loop" else 0.0
                break
            start = Trial(0, trial.loss, slope, trial.gradient, trial.largest)
            if options["line_search_fn"] is None and iteration == options["max_iter"]:
                if not self.objective.can_move(float(t * size)):
                    return self._start_afresh(trial)
                self.objective.move(direction, t)
                last.t = t
                return (None,)
            found, stayed = self._move(start, t, size)
            if found is None:
                return self._start_afresh(trial)
            trial, last.t = found, found.t
            spent = self.objective.evaluations >= options["max_eval"]
            self._searched = self._choices() if stayed and not spent else None
            if (
                spent
                or trial.largest <= options["tolerance_grad"]
                or size * trial.t <= options["tolerance_change"]
                or abs(trial.loss - last.loss) < options["tolerance_change"]
            ):
                break
        return (float(trial.loss),)

    def _choices(self) -> list[Any]:
        """Return what a search depends on besides the loss and the memory."""
        others = [value for name, value in self.options.items() if name not in ("params", "lr")]
        return [self.lr, self._ratios, *others]

    def _already_searched(self, trial: Trial) -> bool:
        """Return whether the last step has searched from here, and found no lower point.

        The search would be the same once more: the same direction, since a point that is not left gives
        no pair.
        """
        last, ending = self.last, self.ending
        return (
            last is not None
            and ending is not None
            and ending.searched == self._choices()
            and trial.loss == last.loss
            and torch.equal(trial.gradient, last.gradient)
        )

    def _start_afresh(self, trial: Trial) -> tuple[float | None]:
        self.warn(*NON_FINITE)
        self.memory.clear()
        self.state["n_iter"] = 0
        return (float(trial.loss),)

    def _first(self) -> Trial | None:
        """Evaluate at the parameters; shorten the last move if its loss is not finite."""
        last = self.last
        trial = self._evaluate(0.0 if last is None else last.t, pair=True)
        known = None if self.ending is None else self.ending.loss
        if trial.finite:
            scale = SAME_LOSS * max(abs(float(trial.loss)), abs(known or 0.0))
            if known is not None and abs(float(trial.loss) - known) > scale:
                self.warn(*NOISE)
            return trial
        if self.ending is None or known is not None or last is None:
            self.warn(*NON_FINITE)
            return None
        # The last step of fixed length was never evaluated: it was too long.
        self.objective.move(last.direction, -last.t)
        line = _Line(self.objective, last.direction, 0.0)

        def evaluate(t: Number) -> Trial:
            line.set(t)
            return self._evaluate(t, pair=True)

        budget = self.options["max_eval"] - self.objective.evaluations
        with line:
            found = shortened(evaluate, trial, budget=budget)
            line.set(0.0 if found is None else found.t)
        last.t = 0.0 if found is None else found.t
        if found is None:
            self._start_afresh(trial)
        return found

    def _direction(self, trial: Trial) -> tuple[Tensor, Number, Number, Number]:
        """Return the direction, its slope, its largest entry and the first step length."""
        gradient, memory = trial.gradient, self.memory
        if self.state["n_iter"] > 1 and self.last is not None:
            products = list(trial.extra)
            products = products or memory.numbers(*memory.products(self.last, gradient))
            memory.update(self.last, gradient, products, self.options["damping"])
            direction = self._scaled(memory.descent(self._scaled(gradient, copy=True)))
            slope, size = memory.numbers(self._dot(gradient, direction), largest(direction))
            if math.isfinite(slope) and math.isfinite(size) and not slope > 0:
                return direction, slope, size, self.lr
            self.state["n_iter"] = 1
        memory.clear()
        direction = self._scaled(self._scaled(gradient.neg()))
        slope, size, total = memory.numbers(
            self._dot(gradient, direction), largest(direction), gradient.abs().sum(dtype=self._sum)
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
        """Call the closure at the parameters, which are ``t`` along the direction."""
        loss, gradient = self.objective.evaluate()
        last = self.last
        products = [self._dot(gradient, last.direction)] if slope and last is not None else []
        if pair and last is not None:
            products += self.memory.products(last, gradient)
        numbers = self.memory.numbers(loss, largest(gradient), *products)
        loss, height, found = float(numbers[0]), numbers[1], numbers[2:]
        along = found.pop(0) if slope else math.nan
        if math.isfinite(loss) and math.isfinite(height) and (not slope or math.isfinite(along)):
            return Trial(t, loss, along, gradient, height, tuple(found))
        return Trial(t, math.inf, math.nan, gradient, height)

    def _move(self, start: Trial, t: Number, size: Number) -> tuple[Trial | None, bool]:
        """Move along the direction and return the point; return ``None``, and stay, without one.

        Also return whether a search found no lower point, up to rounding of the parameters.
        """
        objective = self.objective
        assert self.last is not None
        fixed = self.options["line_search_fn"] is None
        line = _Line(objective, self.last.direction, float(size))

        # Torch takes the products of a pair after a search, and of the point that it returns.
        pair, latest = fixed or self._limits is not None, start

        def evaluate(t: Number) -> Trial:
            nonlocal latest
            if not line.set(t):
                return Trial(t, math.inf, math.nan, start.gradient, math.inf)
            latest = self._evaluate(t, slope=True, pair=pair)
            return latest

        with line:
            found: Trial | None
            if fixed:
                found = evaluate(t)
                budget = self.options["max_eval"] - objective.evaluations
                found = shortened(evaluate, found, budget=budget)
            else:
                budget = self.options["max_eval"] - objective.evaluations
                rounding = 0.0
                if (limits := self._limits) is not None:
                    rounding = _ROUNDINGS * limits.eps * (abs(start.loss) + limits.tiny)
                found, finite = strong_wolfe(
                    evaluate, start, t, size, budget=budget, rounding=rounding
                )
                if found is start and not finite:
                    found = None
                elif found is not start and found.gradient is not latest.gradient:
                    found = replace(found, extra=())  # the memory has the change of the latest
            line.set(0.0 if found is None else found.t)
        if found is None or fixed or self._limits is None:
            return found, False
        # Most searches lower the loss, which is known already.
        return found, found is start or (found.loss == start.loss and line.stayed())


class _Line:
    """Parameters on a line through their present position, which an error restores.

    Args:
        objective: the owner of the parameters.
        direction: the direction of the line.
        size: the largest entry of the direction, which bounds the steps before parameters overflow;
            0 if all steps are known to be safe. A loss that saturates would hide an overflow.
    """

    def __init__(self, objective: Objective, direction: Tensor, size: float) -> None:
        self._objective, self._direction, self._size = objective, direction, size
        self._position = objective.position()
        self._at: Number = 0.0

    def set(self, t: Number) -> bool:
        """Move to ``t`` if the parameters stay finite; return whether they do."""
        if not self._objective.can_move(float(t) * self._size, self._position):
            return False
        if t is not self._at:
            if float(self._at):
                self._objective.restore(self._position)
            if float(t):
                self._objective.move(self._direction, t)
            self._at = t
        return True

    def stayed(self) -> bool:
        """Return whether the parameters are, after rounding, where the line began."""
        return all(map(torch.equal, self._position, self._objective.position()))

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._objective.restore(self._position)
