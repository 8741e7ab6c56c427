r"""`TakenStep` and `AlongStep`: a step of the optimizers, and the probe loss along it.

:math:`\theta` are the parameters before the step, :math:`\delta` is their change by all optimizers,
after clipping, accumulation and weight decay, and L is the probe loss. A :class:`StepEndCache` passes
loss and gradient from the end of one step to the next step, which starts there.
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

__all__ = ["AlongStep", "StepEndCache", "TakenStep", "dot"]


@dataclass(frozen=True)
class StepEnd:
    """The parameters, loss and gradient at the end of a measured step.

    Attributes:
        params: the parameters.
        values: a copy of each parameter.
        loss: the probe loss.
        gradient: its gradient ``(d,)``.
    """

    params: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    loss: float
    gradient: Tensor

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether ``params`` are the same tensors, with unchanged values."""
        if len(params) != len(self.params) or any(map(operator.is_not, params, self.params)):
            return False
        return not differs([_local_view(p) for p in params], self.values)


@dataclass
class StepEndCache:
    """The end of the last measured step, for runs in which every step is measured.

    Attributes:
        end: the end, from a measurement until the next step starts.
        enabled: whether ends are kept. A step disables the cache if it does not start at the last end,
            or if the loss there has changed: something besides the parameters changes, such as the
            running statistics of batch norm or the weight of a penalty.
        used: whether an end was stored before.
    """

    end: StepEnd | None = None
    enabled: bool = True
    used: bool = False


@dataclass(frozen=True)
class TakenStep:
    """The parameters as they were before the step just taken.

    Attributes:
        params: the parameters.
        before: a copy of each, or of this rank's shard.
        cache: stores loss and gradient at the end of the step, if the next step is measured too.
        start: loss and gradient where the step started, from the last measurement; else ``None``.
    """

    params: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    cache: StepEndCache | None = None
    start: StepEnd | None = None

    @classmethod
    def begin(cls, params: Iterable[Tensor], cache: StepEndCache | None = None) -> TakenStep:
        """Copy the parameters before a step.

        >>> weight = torch.ones(1)
        >>> step = TakenStep.begin([weight])
        >>> weight += 1
        >>> step.before
        (tensor([1.]),)
        """
        params = tuple(params)
        with torch.inference_mode(False), torch.no_grad():
            if cache is not None and cache.end is not None:
                end, cache.end = cache.end, None
                if end.matches(params):
                    return cls(params, end.values, cache, end)
            return cls(params, tuple(_local_view(p).clone() for p in params), cache)

    def contains(self, params: Sequence[Tensor]) -> bool:
        """Return whether all of ``params`` were copied."""
        copied = {id(p) for p in self.params}
        return all(id(p) in copied for p in params)

    def values_before(self, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the copies of ``params``, in their order.

        Raises:
            ValueError: if one was not copied.
        """
        copies = {id(p): before for p, before in zip(self.params, self.before, strict=True)}
        missing = sum(id(p) not in copies for p in params)
        if missing:
            raise ValueError(
                f"{missing} of the parameters joined during the step: measurements along the step"
                " resume with the next one"
            )
        return tuple(copies[id(p)] for p in params)


class AlongStep:
    """The probe loss and its gradient along a step; each is computed once, on all ranks together.

    If the loss before the step equals the cached loss at the end of the last step, bit for bit, the
    cached gradient is used: a step then takes one loss and one gradient.

    Attributes:
        problem: the loss in the parameters' own coordinates.
        before: the parameters before the step, in the problem's precision.
        change: the step ``(d,)``, or this rank's shard of it.
    """

    def __init__(self, problem: MeanLoss, step: TakenStep) -> None:
        self.problem = problem.untransformed()
        self._step = step
        before = step.values_before(problem.params)
        with torch.inference_mode(False), torch.no_grad():
            self.before = tuple(t.to(problem.dtype) for t in before)
            # Subtract in the problem's precision: differences of close numbers are exact.
            pairs = zip(problem.params, self.before, strict=True)
            changes = [_local_view(p).to(problem.dtype) - t for p, t in pairs]
            self.change = self.problem.flatten(changes)
        self._known_start: tuple[float, Tensor] | None = None
        self._known_end: tuple[float, Tensor] | None = None

    @cached_property
    def moved(self) -> bool:
        """Whether the step changed any parameter, on any rank."""
        # The largest entry is ten times as fast as any().
        largest = float(torch.linalg.vector_norm(self.change, math.inf)) if len(self.change) else 0
        return self.problem.ranks.any(largest != 0)

    def _start(self) -> tuple[float, Tensor]:
        """Return loss and gradient before the step."""
        if self._known_start is None:
            self._known_start = self._cached_start()
        if self._known_start is None:
            self._known_start = self.problem.loss_and_gradient(self.before)
        return self._known_start

    def _cached_start(self) -> tuple[float, Tensor] | None:
        """Return the cached end of the last step; disable the cache if this step starts elsewhere."""
        start, cache = self._step.start, self._step.cache
        # All ranks agree on these conditions and on the loss.
        if cache is None or not cache.enabled or not cache.used:
            return None
        if not self.problem.ranks.any(start is None):
            assert start is not None
            if self._loss_before_then_end() == start.loss:
                return start.loss, start.gradient
        cache.enabled, cache.end = False, None
        return None

    def _loss_before_then_end(self) -> float:
        """Return the loss before the step; also compute the end, in the same evaluation."""
        problem = self.problem
        if not isinstance(problem, Problem) or problem.ranks.several:
            return self.loss_before
        with problem.evaluation() as again:
            loss = problem.value(self.before, evaluating=True)
            again()
            self._known_end = self._stored(problem.loss_and_gradient(evaluating=True))
        return loss

    def _end(self) -> tuple[float, Tensor]:
        """Return loss and gradient after the step."""
        if self._known_end is None:
            self._known_end = self._stored(self.problem.loss_and_gradient())
        return self._known_end

    def _stored(self, end: tuple[float, Tensor]) -> tuple[float, Tensor]:
        """Store the loss and gradient after the step in the cache, if there is one; return them."""
        cache, params = self._step.cache, tuple(self.problem.params)
        if cache is not None and cache.enabled:
            with torch.inference_mode(False), torch.no_grad():
                values = tuple(_local_view(p).clone() for p in params)
            cache.end, cache.used = StepEnd(params, values, *end), True
        return end

    @cached_property
    def loss_before(self) -> float:
        """The loss at the parameters before the step."""
        known = self._known_start
        return self.problem.value(self.before) if known is None else known[0]

    @cached_property
    def loss_after(self) -> float:
        """The loss at the present parameters."""
        cache = self._step.cache
        start_known = self._known_start is not None
        next_needs_end = start_known and cache is not None and cache.enabled
        if next_needs_end or self._known_end is not None:
            return self._end()[0]
        return self.problem.value()

    @property
    def known_slope(self) -> float | None:
        """:attr:`slope`, if the gradient before the step is already computed; else ``None``."""
        return None if self._known_start is None else self.slope

    @cached_property
    def slope(self) -> float:
        r""":math:`g^\top\delta`, with the gradient g before the step."""
        return dot(self.problem, self._start()[1], self.change)

    @cached_property
    def slope_after(self) -> float:
        r""":math:`g^\top\delta`, with the gradient g after the step."""
        return dot(self.problem, self._end()[1], self.change)

    def loss_at(self, share: float) -> float:
        """Return the loss at the parameters before the step plus ``share`` times the step."""
        if share in (0.0, 1.0):
            return self.loss_after if share else self.loss_before
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(self.before, self.problem.unflatten(self.change), strict=True)
            theta = tuple(torch.add(t, part, alpha=share) for t, part in parts)
        return self.problem.value(theta)


def dot(problem: MeanLoss, first: Tensor, second: Tensor) -> float:
    """Return the inner product of vectors ``(d,)`` of a problem, the same number on all ranks."""
    inner = InnerProduct(ranks=problem.ranks, sharded_size=1 if problem.sharded else None)
    return float(inner.on_host(inner.dot(first, second)))


def _local_view(p: Tensor) -> Tensor:
    """Return the real view of a parameter, or of this rank's shard of it."""
    return real_view(local(p.detach()))
