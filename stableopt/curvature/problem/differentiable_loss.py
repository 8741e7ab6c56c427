"""`DifferentiableLoss`: a mean loss whose first and second derivatives are checked."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from stableopt._support.arguments import positive
from stableopt.curvature.autodiff import dense, saved_bytes
from stableopt.curvature.errors import DifferenceError, SecondDerivativeError
from stableopt.curvature.problem.cost import Cost, expected_costs
from stableopt.curvature.problem.data.batches import cut, map_tensors
from stableopt.curvature.problem.derivatives.derivative_checks import check_derivatives
from stableopt.curvature.problem.derivatives.graphs import has_custom_function, has_kinks
from stableopt.curvature.problem.derivatives.second_derivative import alias_leaves
from stableopt.curvature.problem.loss_checks import CHECKED_SAMPLES, runs_alike
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.parameters import trains_on_batch_statistics
from stableopt.distributed.collectives import Ranks

__all__ = ["LARGE", "DifferentiableLoss"]

P = TypeVar("P", bound="DifferentiableLoss")

LARGE = 2**25
"""Number of parameters above which derivatives are checked in the problem's own precision."""

_CANCELLED = 1e-3
"""Gradient in training, relative to that with running statistics, of a bias in front of batch norm: zero
up to rounding."""

_NORM_SAMPLES = 64
"""Samples whose gradient shows which parameters batch norm cancels."""

_NAMES = Memo[frozenset[str]]()

_MANY_BYTES = 32 * 2**20
"""Bytes that autograd saves for a few samples above which derivatives are checked on one sample."""


@dataclass(frozen=True)
class _DerivativeFacts:
    """Results of the checks of derivatives.

    Attributes:
        obstacle: why the model cannot be differentiated twice, or ``None``.
        kinked: with an obstacle, whether the gradient jumps.
        runs_in_double: whether the model can be evaluated in double precision.
        checked_twice: whether second derivatives were checked.
    """

    obstacle: SecondDerivativeError | None = None
    kinked: bool = False
    runs_in_double: bool = False
    checked_twice: bool = False

    def agreed(self, ranks: Ranks) -> _DerivativeFacts:
        """Return the facts that hold for all ranks together."""
        if not ranks.several:
            return self
        facts = (self.obstacle is not None, self.kinked, self.runs_in_double)
        failed, kinked, in_double = zip(*ranks.all_gather_object(facts), strict=True)
        obstacle = self.obstacle
        if any(failed) and obstacle is None:
            reason = RuntimeError(f"rank {failed.index(True)} found it so")
            obstacle = SecondDerivativeError(None, reason)
        return _DerivativeFacts(obstacle, any(kinked), all(in_double), self.checked_twice)


class DifferentiableLoss(MeanLoss):
    """A mean loss that checks, and reports, whether it can be differentiated twice.

    Without ``second_derivatives``, second derivatives are checked at their first use, on all ranks
    together.
    """

    _facts = _DerivativeFacts()
    _in_call = False
    """Whether gradients are taken inside the functional call, while the model holds the parameters."""
    _random = False
    """Whether the loss draws random numbers that matter."""
    _needs_leaves = False
    """Whether the loss can be evaluated only at parameters that require gradients."""
    _samples_independent = False
    """Whether the check of the weights has excluded that samples see each other."""

    @property
    def large(self) -> bool:
        """Whether copies of all parameters would take too much memory."""
        return self.num_params > LARGE

    def zeros(self) -> Tensor:
        """Return zeros ``(d,)``; on a CPU, a large vector takes memory only where it is written."""
        if self.large and self.device.type == "cpu":
            dtype = np.float64 if self.dtype == torch.float64 else np.float32
            return torch.from_numpy(np.zeros(self.num_params, dtype=dtype))
        return torch.zeros(self.num_params, dtype=self.dtype, device=self.device)

    @abc.abstractmethod
    def loss(self, theta: Theta, batch: Any) -> Tensor:
        """Return the mean loss of ``batch`` at ``theta``, times ``sign``: a differentiable scalar."""

    def _loss_value(self, point: Theta, batch: Any) -> Tensor:
        """Return the loss of ``batch`` at ``point``, without its derivatives."""
        # A graph from leaves takes memory, so most losses are evaluated at constants.
        return self.loss(tuple(alias_leaves(point)) if self._needs_leaves else point, batch)

    def _fails_at_constants(self, batch: Any) -> bool:
        """Return whether the loss itself differentiates, as gradient penalties and meta-gradients do."""
        try:
            self._evaluated([t.detach() for t in self.theta()], batch)
        except RuntimeError:
            return True
        return False

    @property
    def cancelled(self) -> frozenset[str]:
        """Names of parameters that batch norm cancels in training: the biases in front of it.

        Batch statistics leave them without a gradient. With the running statistics of a measurement they
        have one, and a curvature that training does not have.
        """
        known = _NAMES.of(self)
        if "cancelled" not in known:
            names = self._without_gradient_in_training()
            known["cancelled"] = frozenset.intersection(*self.ranks.all_gather_object(names))
        return known["cancelled"]

    def _without_gradient_in_training(self) -> frozenset[str]:
        if self._batch_statistics or not trains_on_batch_statistics(self.model):
            return frozenset()
        in_training = copy.copy(self)
        in_training._batch_statistics = True
        try:
            norms, trained_norms = (each._gradient_norms() for each in (self, in_training))
        except (ValueError, RuntimeError):  # a single sample has no batch statistics
            return frozenset()
        return frozenset(
            name
            for name, norm, trained in zip(self.names, norms, trained_norms, strict=True)
            if trained < _CANCELLED * norm
        )

    def _gradient_norms(self) -> list[float]:
        """Return the norm of each parameter's gradient on some samples."""
        theta = self.theta()
        with self.evaluation():
            batch, size = next(self.chunks())
            loss = self.loss(theta, cut(batch, 0, min(size, _NORM_SAMPLES)))
            gradients = torch.autograd.grad(loss, theta, allow_unused=True)
        return [0.0 if g is None else float(dense(g).norm()) for g in gradients]

    def _check_derivatives(self, batch: Any, size: int, *, twice: bool) -> None:
        """Check the derivatives of the loss of a batch; with ``twice`` also second derivatives."""
        batch = cut(batch, 0, self._num_checked_samples(batch, size))
        self._needs_leaves = self._fails_at_constants(batch)
        gradient_error = None
        try:
            self._facts = self._derivative_facts(batch, twice=twice)
            if self._facts.obstacle is None:
                return
        except ValueError as error:
            gradient_error = error
        value = self._evaluated(self.theta(), batch)
        if has_custom_function(value):
            # Its backward may run the model, which then needs the parameters of its forward pass.
            self._in_call, obstacle = True, self._facts.obstacle
            facts = self._derivative_facts(batch, twice=twice)
            kinked = facts.kinked or (facts.obstacle is not None and has_kinks(value))
            self._facts = replace(facts, obstacle=obstacle or facts.obstacle, kinked=kinked)
        elif gradient_error is not None:
            raise gradient_error

    def _derivative_facts(self, batch: Any, *, twice: bool) -> _DerivativeFacts:
        twin = self.in_double()
        # Several double-precision copies of a large model would exceed a training step's memory.
        in_double = not self.large and self._runs_in(twin, batch)
        judge = twin if in_double else self
        obstacle = check_derivatives(
            lambda point: self._evaluated(point, batch),
            self.theta(),
            self.model,
            lambda: judge.loss(judge.theta(), judge._cast(batch)),
            (lambda point: twin._evaluated(point, twin._cast(batch))) if in_double else None,
            twice=twice,
        )
        error, kinked = obstacle or (None, False)
        if self.large and kinked:
            in_double = self._runs_in(twin, batch)
        return _DerivativeFacts(error, kinked, in_double, checked_twice=twice)

    def _runs_in(self: P, twin: P, batch: Any) -> bool:
        """Return whether the loss can be evaluated in the precision of ``twin``."""
        # A generator draws other numbers in another precision, so random losses are not compared.
        random = self._random
        value = None if random else float(self._evaluated(self.theta(), batch).detach())
        return runs_alike(
            twin.theta(), lambda point: twin._evaluated(point, twin._cast(batch)), value
        )

    def _num_checked_samples(self, batch: Any, size: int) -> int:
        """Return the number of samples to check derivatives on: one if several need much memory."""
        # More, in double precision, would take more memory than a training step.
        count = min(size, CHECKED_SAMPLES // 2)
        if count == 1 or not self._samples_independent:
            return count
        try:
            theta = self.theta()
            saved = saved_bytes(lambda: self._evaluated(theta, cut(batch, 0, count)))
        except RuntimeError:  # torch.func within the model excludes saved tensor hooks
            return count
        return count if saved <= _MANY_BYTES else 1

    def cost(self, *, tol: float = 1e-3) -> dict[str, Cost]:
        """Return the expected cost of quantities, to about a factor of two, before they are computed.

        The estimate uses the time of one gradient over at most 64 samples, and counts of products.
        Per-sample quantities, such as the non-uniformity, are not estimated.

        Args:
            tol: the largest residual of a search, relative to the eigenvalue.

        Returns:
            A :class:`~stableopt.curvature.Cost` by the name of the quantity, and that of a
            ``"gradient"``.

        Raises:
            ValueError: for a tolerance that is not positive.

        >>> from torch import nn, ones, zeros
        >>> from stableopt.curvature import Problem
        >>> problem = Problem(nn.Linear(50, 1), nn.MSELoss(), (ones(4, 50), zeros(4, 1)))
        >>> problem.cost(tol=0.03)["sharpness"].products
        17
        """
        return expected_costs(self, self.loss, positive("tol", tol))

    def _agree_on_derivatives(self) -> None:
        self._facts = self._facts.agreed(self.ranks)

    def _checked_facts(self) -> _DerivativeFacts:
        """Return the facts after a check of second derivatives. Call it on all ranks."""
        if not self._facts.checked_twice:

            def check() -> None:
                with self.evaluation():
                    self._check_derivatives(*next(self.chunks()), twice=True)

            self.ranks.raise_together(check)
            self._agree_on_derivatives()
        return self._facts

    @property
    def obstacle(self) -> SecondDerivativeError | None:
        """Why the model cannot be differentiated twice, or ``None``."""
        return self._checked_facts().obstacle

    @property
    def kinked(self) -> bool:
        """With an obstacle, whether the gradient jumps."""
        return self._checked_facts().kinked

    def _hessian_method(self) -> tuple[str, bool]:
        if not self._facts.checked_twice:
            return "first derivatives", False
        if self.obstacle is not None:
            return "central differences", self.kinked
        return super()._hessian_method()

    def _evaluated(self, point: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the loss in a fresh evaluation, unaffected by state kept between passes."""
        with self.evaluation():
            return self.loss(tuple(point), map_tensors(Tensor.clone, batch))

    def _cast(self, batch: Any) -> Any:
        return map_tensors(lambda t: self.precision.cast(t.clone()), batch)

    def differenced(self: P) -> P:
        """Return the problem to take central differences of: in double precision if kinked.

        Raises:
            DifferenceError: with kinks, if the model cannot be evaluated in double precision.
        """
        if not self.kinked:
            return self
        if not self._checked_facts().runs_in_double or self.precision.autocast is not None:
            raise DifferenceError(
                f"the gradient jumps, as behind ReLU or max-pooling, and steps in {self.dtype} are too"
                " long to stay between jumps: expected a model and loss that can be evaluated in double"
                " precision, a smooth twin of the model, or operations that torch can differentiate"
                " twice"
            )
        return self.in_double()

    def in_double(self: P) -> P:
        """Return the same problem in double precision throughout, also inside the model."""
        other = copy.copy(self)
        other.precision = self.precision.in_double()
        other.dtype, other._replaced_operations = other.precision.dtype, set()
        return other

    def check_twice(self) -> None:
        """Raise ``SecondDerivativeError`` if the model cannot be differentiated twice."""
        if self.obstacle is not None:
            raise self.obstacle.with_traceback(None)
