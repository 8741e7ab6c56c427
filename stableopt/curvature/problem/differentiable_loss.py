"""`DifferentiableLoss`: a mean loss that is checked for first and second derivatives."""

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
from stableopt.curvature.autodiff import saved_bytes
from stableopt.curvature.errors import DifferenceError, SecondDerivativeError
from stableopt.curvature.problem.cost import Cost, expected_costs
from stableopt.curvature.problem.data.batches import cut, map_tensors
from stableopt.curvature.problem.derivatives.derivative_checks import check_derivatives
from stableopt.curvature.problem.derivatives.graphs import has_custom_function, has_kinks
from stableopt.curvature.problem.loss_checks import CHECKED_SAMPLES, runs_alike
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta
from stableopt.distributed.collectives import Ranks

__all__ = ["LARGE", "DifferentiableLoss"]

P = TypeVar("P", bound="DifferentiableLoss")

LARGE = 2**25
"""Parameters from which derivatives are checked in the problem's own precision."""

_MUCH = 32 * 2**20
"""Bytes saved for a backward pass of a few samples from which derivatives are checked on one."""


@dataclass(frozen=True)
class _Found:
    """What the checks found.

    Attributes:
        obstacle: why the model cannot be differentiated twice, or ``None``.
        kinked: with an obstacle, whether the gradient jumps.
        doubles: whether the model can be evaluated in double precision.
        known: whether second derivatives were checked.
    """

    obstacle: SecondDerivativeError | None = None
    kinked: bool = False
    doubles: bool = False
    known: bool = False

    def agreed(self, ranks: Ranks) -> _Found:
        """Return what holds for all ranks together."""
        if not ranks.several:
            return self
        found = ranks.all_gather_object((self.obstacle is not None, self.kinked, self.doubles))
        obstacle = self.obstacle
        failed = [rank for rank, (has, _, _) in enumerate(found) if has]
        if failed and obstacle is None:
            reason = RuntimeError(f"rank {failed[0]} found it so")
            obstacle = SecondDerivativeError(None, reason)
        kinked = any(kinked for _, kinked, _ in found)
        return _Found(obstacle, kinked, all(doubles for *_, doubles in found), self.known)


class DifferentiableLoss(MeanLoss):
    """What :class:`~stableopt.curvature.Problem` knows of its derivatives.

    Without ``second_derivatives``, second ones are checked when they are first asked for, on all ranks
    together.
    """

    _found = _Found()
    _in_call = False
    """Whether gradients are taken while the model holds the parameters."""
    _samples_apart = False
    """Whether samples are known not to see each other."""

    @property
    def large(self) -> bool:
        """Whether copies of all parameters are too many bytes to spare."""
        return self.num_params > LARGE

    def zeros(self) -> Tensor:
        """Return zeros ``(d,)``; of a large model they take host memory as they are added to."""
        if self.large and self.device.type == "cpu":
            kind = np.float64 if self.dtype == torch.float64 else np.float32
            return torch.from_numpy(np.zeros(self.num_params, dtype=kind))
        return torch.zeros(self.num_params, dtype=self.dtype, device=self.device)

    @abc.abstractmethod
    def loss(self, theta: Theta, batch: Any) -> Tensor:
        """Return the mean loss of ``batch`` at ``theta``, times ``sign``: a differentiable scalar."""

    def _check_derivatives(self, batch: Any, size: int, *, twice: bool) -> None:
        """Check the derivatives of the loss of a batch; ``twice``: whether there are second ones."""
        batch = cut(batch, 0, self._checked_samples(batch, size))
        refused = None
        try:
            self._found = self._derivatives(batch, twice=twice)
            if self._found.obstacle is None:
                return
        except ValueError as error:
            refused = error
        value = self._evaluated(self.theta(), batch)
        if has_custom_function(value):
            # Its backward may run the model, which must then have the parameters of its forward pass.
            self._in_call, obstacle = True, self._found.obstacle
            found = self._derivatives(batch, twice=twice)
            kinked = found.kinked or (found.obstacle is not None and has_kinks(value))
            self._found = replace(found, obstacle=obstacle or found.obstacle, kinked=kinked)
        elif refused is not None:
            raise refused

    def _derivatives(self, batch: Any, *, twice: bool) -> _Found:
        twin = self.in_double()
        # Several copies of a large model, in double precision, would be more than a training step has.
        doubles = not self.large and self._runs_in(twin, batch)
        judge = twin if doubles else self
        obstacle = check_derivatives(
            lambda at: self._evaluated(at, batch),
            self.theta(),
            self.model,
            lambda: judge.loss(judge.theta(), judge._cast(batch)),
            (lambda at: twin._evaluated(at, twin._cast(batch))) if doubles else None,
            twice=twice,
        )
        error, kinked = obstacle or (None, False)
        if self.large and kinked:
            doubles = self._runs_in(twin, batch)
        return _Found(error, kinked, doubles, known=twice)

    def _runs_in(self: P, twin: P, batch: Any) -> bool:
        """Return whether the loss can be evaluated in the precision of ``twin``."""
        value = float(self._evaluated(self.theta(), batch).detach())
        return runs_alike(twin.theta(), lambda at: twin._evaluated(at, twin._cast(batch)), value)

    def _checked_samples(self, batch: Any, size: int) -> int:
        """Return on how many samples derivatives are checked: one where several are much work."""
        # All of them, in double precision, would take more memory than a training step.
        count = min(size, CHECKED_SAMPLES // 2)
        if count == 1 or not self._samples_apart:
            return count
        try:
            theta = self.theta()
            saved = saved_bytes(lambda: self._evaluated(theta, cut(batch, 0, count)))
        except RuntimeError:  # torch.func within the model excludes saved tensor hooks
            return count
        return count if saved <= _MUCH else 1

    def cost(self, *, tol: float = 1e-3) -> dict[str, Cost]:
        """Return what quantities are expected to take, to about a factor of two, before they are paid.

        From the time of one gradient over at most 64 samples, and from counts. Those of single samples,
        such as the non-uniformity, are not estimated.

        Args:
            tol: the largest residual of a search, relative to the eigenvalue.

        Returns:
            A :class:`~stableopt.curvature.Cost` for each quantity, and for one ``"gradient"``.

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
        self._found = self._found.agreed(self.ranks)

    def _known(self) -> _Found:
        """Return what is known once second derivatives are checked; all ranks ask together."""
        if not self._found.known:

            def check() -> None:
                with self.evaluation():
                    self._check_derivatives(*next(self.chunks()), twice=True)

            self.ranks.raise_together(check)
            self._agree_on_derivatives()
        return self._found

    @property
    def obstacle(self) -> SecondDerivativeError | None:
        """Why the model cannot be differentiated twice, or ``None``."""
        return self._known().obstacle

    @property
    def kinked(self) -> bool:
        """With an obstacle, whether the gradient jumps."""
        return self._known().kinked

    def _way(self) -> tuple[str, bool]:
        if not self._found.known:
            return "first derivatives", False
        return super()._way() if self.obstacle is None else ("central differences", self.kinked)

    def _evaluated(self, at: Sequence[Tensor], batch: Any) -> Tensor:
        """Return the loss in a fresh evaluation, so that state kept between passes has no effect."""
        with self.evaluation():
            return self.loss(tuple(at), map_tensors(Tensor.clone, batch))

    def _cast(self, batch: Any) -> Any:
        return map_tensors(lambda t: self.precision.cast(t.clone()), batch)

    def differenced(self: P) -> P:
        """Return the problem that central differences are taken of: in double precision if kinked.

        Raises:
            DifferenceError: with kinks, if the model cannot be evaluated in double precision.
        """
        if not self.kinked:
            return self
        if not self._known().doubles or self.precision.autocast is not None:
            raise DifferenceError(
                f"the gradient jumps, as behind ReLU or max-pooling, and steps in {self.dtype} are too"
                " long to avoid it: expected a model and loss that can be evaluated in double"
                " precision, a smooth twin of the model, or operations that torch can differentiate"
                " twice"
            )
        return self.in_double()

    def in_double(self: P) -> P:
        """Return the same problem in double precision throughout, also inside the model."""
        other = copy.copy(self)
        other.precision = self.precision.in_double()
        other.dtype, other._notes = other.precision.dtype, set()
        return other

    def check_twice(self) -> None:
        """Raise ``SecondDerivativeError`` if the model cannot be differentiated twice."""
        if self.obstacle is not None:
            raise self.obstacle.with_traceback(None)
