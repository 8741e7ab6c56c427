"""The operators whose top eigenvalues a measurement is of, and what of an eigenvalue is reported."""

from __future__ import annotations

import torch

from stableopt.curvature import Eigenpair, Hessian, NonUniformity, Operator, Problem
from stableopt.curvature.products.sharded_hessian import ShardedHessian, hessian_of
from stableopt.stability.limits import noise_factor
from stableopt.stability.margins import Measurement, StabilityMargins
from stableopt.stability.mean_square.theorem1 import SecondMomentExcess
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner, StepPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["DEGREE", "OperatorsAt", "measurement_of"]

DEGREE = {"non_uniformity": 2}
"""Powers of a quantity that are the eigenvalue: the relative error of a root is half of that."""


def measurement_of(name: str, pair: Eigenpair, seconds: float) -> Measurement:
    """Return the value of a quantity, of whose eigenvalue ``pair`` is."""
    value = pair.value
    if name == "non_uniformity":
        # The square root of an eigenvalue that rounding may leave below zero.
        value = max(value, 0.0) ** 0.5
    elif name == "theorem1":
        value += 1.0  # the left side of (8), of which the operator is the excess over 1
    relative = pair.relative_residual / DEGREE.get(name, 1)
    return Measurement(value, relative, pair.products, seconds, pair.converged)


class OperatorsAt:
    """The operators of one measurement, each built when it is asked for and then shared."""

    def __init__(
        self, problem: Problem, rule: UpdateRule | None, margins: StabilityMargins
    ) -> None:
        self._problem, self._rule, self._margins = problem, rule, margins
        self._built: dict[str, Operator] = {}
        self._loss: float | None = None

    def of(self, name: str) -> Operator:
        """Return the operator of a quantity."""
        if name not in self._built:
            self._built[name] = getattr(self, "_" + name)()
        return self._built[name]

    def error(self, name: str) -> float:
        """Return how far products for a quantity may be off, relative to the largest of them."""
        operator = self._built.get(name)
        differences = operator.differences if isinstance(operator, Hessian) else None
        if differences is None:
            return 0.0
        # Each rank has differenced its own samples, and all must report the same.
        found = torch.tensor([differences.error], dtype=torch.float64)
        return float(self._problem.ranks.all_gather(found).max())

    def loss(self) -> float:
        """Return the mean loss at the point, for nothing where passes are kept."""
        if self._loss is None:
            built = (self._built.get(name) for name in ("sharpness", "preconditioned_sharpness"))
            kinds = (Hessian, ShardedHessian)
            hessian = next((each for each in built if isinstance(each, kinds)), None)
            self._loss = self._problem.value() if hessian is None else hessian.loss()
        return self._loss

    def preconditioner(self, name: str) -> StepPreconditioner | None:
        """Return the P of ``P @ operator`` where it is no part of the problem's coordinates."""
        known = None if self._rule is None else self._rule.preconditioner
        if name != "preconditioned_sharpness" or known is None:
            return None
        own = known.over(self._problem.params)
        return None if isinstance(own, DiagonalPreconditioner) else own

    def _sharpness(self) -> Hessian | ShardedHessian:
        if self._rule is None or not self._rule.preconditioned:
            return hessian_of(self._problem)
        return hessian_of(self._problem.transformed(sign=self._problem.sign))

    def _preconditioned_sharpness(self) -> Hessian | ShardedHessian:
        plain = self._built.get("sharpness")
        if isinstance(plain, (Hessian, ShardedHessian)):
            if self.preconditioner("preconditioned_sharpness") and not any(
                self._problem.weight_decay
            ):
                return plain
            # One set of passes at a time is kept in memory.
            self._loss = plain.loss()
            del self._built["sharpness"]
        return hessian_of(self._problem)

    def _non_uniformity(self) -> NonUniformity:
        return NonUniformity(self._problem)

    def _theorem1(self) -> SecondMomentExcess:
        rule, margins = self._rule, self._margins
        if rule is None or (margins.batch_size is None and not rule.full_batch):
            raise ValueError(
                "quantities: theorem1 needs a learning rate and a batch size; pass optimizer= or"
                " lr=, and batch_size="
            )
        noise = 0.0
        if not rule.full_batch and margins.batch_size is not None:
            noise = noise_factor(margins.batch_size, margins.dataset_size)
        in_limit = not rule.preconditioned
        hessian = self.of("sharpness" if in_limit else "preconditioned_sharpness")
        non_uniformity = self.of("non_uniformity")
        assert isinstance(hessian, Hessian)
        assert isinstance(non_uniformity, NonUniformity)
        return SecondMomentExcess(
            hessian,
            non_uniformity,
            lr=rule.lr,
            noise=noise,
            weight_decay=rule.weight_decay if in_limit else 0.0,
        )
