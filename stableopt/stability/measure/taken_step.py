r"""`TakenStep` and `AlongStep`: a step of the optimizers, and the probe loss along it.

With :math:`\theta` the parameters before the step, :math:`\delta` their whole change,
after clipping, accumulation and weight decay, of all optimizers, and the probe loss L.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local

__all__ = ["AlongStep", "TakenStep"]


@dataclass(frozen=True)
class TakenStep:
    """The parameters as they were before the step just taken.

    Attributes:
        params: the parameters.
        before: a copy of each, of this rank's part where they are sharded.
    """

    params: tuple[Tensor, ...]
    before: tuple[Tensor, ...]

    @classmethod
    def begins(cls, params: Iterable[Tensor]) -> TakenStep:
        """Copy the parameters, now that a step begins.

        >>> weight = torch.ones(1)
        >>> step = TakenStep.begins([weight])
        >>> weight += 1
        >>> step.before
        (tensor([1.]),)
        """
        params = tuple(params)
        with torch.inference_mode(False), torch.no_grad():
            return cls(params, tuple(real_view(local(p.detach())).clone() for p in params))

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

    Attributes:
        problem: the loss in the parameters' own coordinates.
        before: the parameters before the step, in the problem's precision.
        change: the step ``(d,)``, of this rank's parts where parameters are sharded.
    """

    def __init__(self, problem: MeanLoss, step: TakenStep) -> None:
        self.problem = problem.transformed(sign=problem.sign)
        before = step.of(problem.params)
        with torch.inference_mode(False), torch.no_grad():
            self.before = tuple(t.to(problem.dtype) for t in before)
            # Taken in the precision of the problem: close numbers subtract without rounding.
            pairs = zip(problem.params, self.before, strict=True)
            self.change = self.problem.flatten(
                [real_view(local(p.detach())).to(problem.dtype) - t for p, t in pairs]
            )

    @property
    def moved(self) -> bool:
        """Whether the step changed any parameter, on any rank."""
        return self.problem.ranks.any(bool(self.change.any()))

    @cached_property
    def _first(self) -> tuple[float, Tensor]:
        return self.problem.loss_and_gradient(self.before)

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
        return self.problem.value()

    @property
    def known_slope(self) -> float | None:
        """:attr:`slope`, if the gradient was computed already."""
        return self.slope if self._has_gradient else None

    @cached_property
    def slope(self) -> float:
        r""":math:`g^\top\delta`, with the gradient g before the step."""
        return self.dot(self._first[1], self.change)

    @cached_property
    def slope_after(self) -> float:
        r""":math:`g^\top\delta`, with the gradient after the step."""
        return self.dot(self.problem.gradient(), self.change)

    def loss_at(self, share: float) -> float:
        """Return the loss after ``share`` times the step: 0 before it, 1 after it."""
        if share in (0.0, 1.0):
            return self.loss_after if share else self.loss_before
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(self.before, self.problem.unflatten(self.change), strict=True)
            at = tuple(torch.add(t, part, alpha=share) for t, part in parts)
        return self.problem.value(at)

    def dot(self, one: Tensor, other: Tensor) -> float:
        """Return the inner product of vectors ``(d,)``, the same number on all ranks."""
        ranks = self.problem.ranks
        inner = InnerProduct(ranks=ranks, sharded_size=1 if self.problem.sharded else None)
        return float(inner.on_host(inner.dot(one, other)))
