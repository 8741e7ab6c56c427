r"""`TakenStep` and `AlongStep`: a step of the optimizers, and the probe loss along it.

With :math:`\theta` the parameters before the step, :math:`\delta` their whole change,
after clipping, accumulation and weight decay, of all optimizers, and the probe loss L. A
:class:`Trail` hands loss and gradient at the end of a step to the next one, which begins there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.problem.loss_checks import differs
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.parameters import real_view
from stableopt.curvature.problem.problem import Problem
from stableopt.distributed.fsdp import local

__all__ = ["AlongStep", "TakenStep", "Trail", "dot"]


@dataclass(frozen=True)
class Reached:
    """The end of a measured step.

    Attributes:
        params: the parameters.
        values: a copy of each.
        loss: the probe loss there.
        gradient: its gradient ``(d,)``.
    """

    params: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    loss: float
    gradient: Tensor

    def is_at(self, params: Sequence[Tensor]) -> bool:
        """Whether ``params`` are the same ones, and have not changed since."""
        if len(params) != len(self.params) or any(map(operator.is_not, params, self.params)):
            return False
        return not differs([_own(p) for p in params], self.values)


@dataclass
class Trail:
    """The end of the last measured step, for a run whose every step is measured.

    Attributes:
        end: the end, from a measurement until the next step begins.
        useful: whether steps begin where the last one ended, at the loss that it had there. Not so
            where something else changes too, such as the running statistics of batch norm or the weight
            of a penalty: after the first such step nothing is kept.
        begun: whether an end was kept before.
    """

    end: Reached | None = None
    useful: bool = True
    begun: bool = False


@dataclass(frozen=True)
class TakenStep:
    """The parameters as they were before the step just taken.

    Attributes:
        params: the parameters.
        before: a copy of each, of this rank's part where they are sharded.
        trail: takes loss and gradient at the end of the step, if the next step is measured too.
        known: loss and gradient where the step began, as of the last measurement.
    """

    params: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    trail: Trail | None = None
    known: Reached | None = None

    @classmethod
    def begins(cls, params: Iterable[Tensor], trail: Trail | None = None) -> TakenStep:
        """Copy the parameters, now that a step begins.

        >>> weight = torch.ones(1)
        >>> step = TakenStep.begins([weight])
        >>> weight += 1
        >>> step.before
        (tensor([1.]),)
        """
        params = tuple(params)
        with torch.inference_mode(False), torch.no_grad():
            if trail is not None and trail.end is not None:
                end, trail.end = trail.end, None
                if end.is_at(params):
                    return cls(params, end.values, trail, end)
            return cls(params, tuple(_own(p).clone() for p in params), trail)

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Return whether all of ``params`` were copied."""
        held = {id(p) for p in self.params}
        return all(id(p) in held for p in params)

    def of(self, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the copies of ``params``, in their order.

        Raises:
            ValueError: if one was not copied.
        """
        held = {id(p): before for p, before in zip(self.params, self.before, strict=True)}
        missing = sum(id(p) not in held for p in params)
        if missing:
            raise ValueError(
                f"{missing} of the parameters joined during the step: it is measured from the next"
                " step on"
            )
        return tuple(held[id(p)] for p in params)


class AlongStep:
    """The probe loss and its gradient along a step; each is computed once, on all ranks together.

    On the trail of the last step, its gradient there is taken once the loss is found to be the same, bit
    for bit: a step then takes one loss and one gradient.

    Attributes:
        problem: the loss in the parameters' own coordinates.
        before: the parameters before the step, in the problem's precision.
        change: the step ``(d,)``, of this rank's parts where parameters are sharded.
    """

    def __init__(self, problem: MeanLoss, step: TakenStep) -> None:
        self.problem = problem.transformed(sign=problem.sign)
        self._step = step
        before = step.of(problem.params)
        with torch.inference_mode(False), torch.no_grad():
            self.before = tuple(t.to(problem.dtype) for t in before)
            # Taken in the precision of the problem: close numbers subtract without rounding.
            pairs = zip(problem.params, self.before, strict=True)
            self.change = self.problem.flatten([_own(p).to(problem.dtype) - t for p, t in pairs])

    @cached_property
    def moved(self) -> bool:
        """Whether the step changed any parameter, on any rank."""
        # Ten times as fast as any().
        own = self.change.numel() and float(torch.linalg.vector_norm(self.change, math.inf)) != 0
        return self.problem.ranks.any(bool(own))

    @cached_property
    def _first(self) -> tuple[float, Tensor]:
        known, trail = self._step.known, self._step.trail
        if trail is not None and trail.useful and trail.begun:
            # The same on all ranks, as is the loss.
            if not self.problem.ranks.any(known is None):
                assert known is not None
                if self._through_both_ends() == known.loss:
                    return known.loss, known.gradient
            trail.useful, trail.end = False, None
        return self.problem.loss_and_gradient(self.before)

    def _through_both_ends(self) -> float:
        """Return the loss before the step, and keep loss and gradient after it."""
        problem = self.problem
        if not isinstance(problem, Problem) or problem.ranks.several:
            return self.loss_before
        with problem.evaluation() as again:
            loss = problem.value(self.before, evaluating=True)
            again()
            self._last = self._kept(problem.loss_and_gradient(evaluating=True))
        return loss

    @cached_property
    def _last(self) -> tuple[float, Tensor]:
        return self._kept(self.problem.loss_and_gradient())

    def _kept(self, last: tuple[float, Tensor]) -> tuple[float, Tensor]:
        """Leave loss and gradient after the step on the trail, if there is one."""
        trail, params = self._step.trail, tuple(self.problem.params)
        if trail is not None and trail.useful:
            with torch.inference_mode(False), torch.no_grad():
                values = tuple(_own(p).clone() for p in params)
            trail.end, trail.begun = Reached(params, values, *last), True
        return last

    @property
    def _has_gradient(self) -> bool:
        return "_first" in vars(self)

    @cached_property
    def loss_before(self) -> float:
        """The loss at the parameters before the step."""
        return self._first[0] if self._has_gradient else self.problem.value(self.before)

    @cached_property
    def loss_after(self) -> float:
        """The loss at the parameters as they are."""
        trail = self._step.trail
        continues = self._has_gradient and trail is not None and trail.useful
        return self._last[0] if continues or "_last" in vars(self) else self.problem.value()

    @property
    def known_slope(self) -> float | None:
        """:attr:`slope`, if the gradient was computed already."""
        return self.slope if self._has_gradient else None

    @cached_property
    def slope(self) -> float:
        r""":math:`g^\top\delta`, with the gradient g before the step."""
        return dot(self.problem, self._first[1], self.change)

    @cached_property
    def slope_after(self) -> float:
        r""":math:`g^\top\delta`, with the gradient after the step."""
        return dot(self.problem, self._last[1], self.change)

    def loss_at(self, share: float) -> float:
        """Return the loss after ``share`` times the step: 0 before it, 1 after it."""
        if share in (0.0, 1.0):
            return self.loss_after if share else self.loss_before
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(self.before, self.problem.unflatten(self.change), strict=True)
            at = tuple(torch.add(t, part, alpha=share) for t, part in parts)
        return self.problem.value(at)


def dot(problem: MeanLoss, one: Tensor, other: Tensor) -> float:
    """Return the inner product of vectors ``(d,)`` of a problem, the same number on all ranks."""
    inner = InnerProduct(ranks=problem.ranks, sharded_size=1 if problem.sharded else None)
    return float(inner.on_host(inner.dot(one, other)))


def _own(p: Tensor) -> Tensor:
    """Return the real view of this rank's part of a parameter."""
    return real_view(local(p.detach()))
