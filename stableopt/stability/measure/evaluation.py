"""`Evaluation`: one measurement at one point, with the operators that its quantities share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature import (
    Eigenpair,
    GaussNewton,
    Hessian,
    NonUniformity,
    Operator,
    top_eigenpair,
)
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.kept_subspace import ritz_rows
from stableopt.curvature.problem.cost import MOST_VECTORS, vectors_held
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.sharded import require_samples
from stableopt.curvature.products.sharded_hessian import ShardedHessian, hessian_of
from stableopt.stability.layers.blocks import Block
from stableopt.stability.layers.shares import Directions, full_sizes, shares_of
from stableopt.stability.layers.table import Layers
from stableopt.stability.measure.batch_sharpness import BatchSharpness, batch_sharpness
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.taken_step import AlongStep, TakenStep, dot
from stableopt.stability.rules.coordinates import outside_coordinates
from stableopt.stability.rules.preconditioner import StepPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["WARM_START_DTYPE", "Evaluation"]

WARM_START_DTYPE = torch.bfloat16
"""Precision of a large model's warm start, to which a search adds noise of a tenth of its norm."""


@dataclass
class Evaluation:
    """A problem in the coordinates of an update rule, with the settings and caches of one measurement.

    Attributes:
        problem: the problem, in the rule's coordinates.
        rule: the update rule, or ``None``.
        batch_size: samples in a step, ``None`` if not known; the data set's size for full batches.
        dataset_size: samples in the training set; ``None`` for infinitely many.
        tol: the largest relative residual.
        max_iter: the largest number of products for each quantity.
        seed: seed of the random starts.
        starts: the last measurement's subspaces by quantity, as warm starts; ``None`` without
            tracking, and then no subspaces are kept.
        taken_step: the step just taken, or ``None``.
        memory: numbers and lists that quantities keep from one measurement of a run to the next.
        window: the number of measured steps in an average along steps; ``None`` for the default.
        blocks: the blocks of parameters to measure, by default none.
        subspaces: the subspaces of this measurement by quantity.
        results: the results so far by quantity.
    """

    problem: MeanLoss
    rule: UpdateRule | None
    batch_size: int | None
    dataset_size: int | None
    tol: float
    max_iter: int
    seed: int
    starts: Mapping[str, Tensor] | None = None
    taken_step: TakenStep | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    blocks: tuple[Block, ...] = ()
    subspaces: dict[str, Tensor] = field(default_factory=dict, init=False)
    results: dict[str, QuantityResult] = field(default_factory=dict, init=False)
    _batch_sharpness: BatchSharpness | None = field(default=None, init=False)
    _along: AlongStep | None = field(default=None, init=False)
    _plain_hessian: Hessian | ShardedHessian | None = field(default=None, init=False)
    _hessian: Hessian | ShardedHessian | None = field(default=None, init=False)
    _non_uniformity: NonUniformity | None = field(default=None, init=False)
    _gauss_newton: GaussNewton | None = field(default=None, init=False)
    _loss: float | None = field(default=None, init=False)

    @property
    def preconditioned(self) -> bool:
        """Whether the rule's limit is on the preconditioned sharpness."""
        return self.rule is not None and self.rule.preconditioned

    @property
    def preconditioner(self) -> StepPreconditioner | None:
        """P, if the problem's coordinates do not include it: the step follows ``P @ hessian``."""
        return None if self.rule is None else outside_coordinates(self.rule, self.problem.params)

    def plain_hessian(self) -> Hessian | ShardedHessian:
        """Return the Hessian of the loss, without preconditioner and the groups' weight decay."""
        if not self.preconditioned:
            return self.hessian()
        if self._plain_hessian is None:
            self._plain_hessian = hessian_of(
                self.problem.untransformed(), gradient=True, lasting=False
            )
        return self._plain_hessian

    def hessian(self) -> Hessian | ShardedHessian:
        """Return the Hessian in the rule's coordinates."""
        if self._hessian is None and self._plain_hessian is not None:
            if self.preconditioner and not self.problem.coordinates.decays:
                self._hessian = self._plain_hessian
            else:
                # Drop the cached passes of the plain Hessian: two sets may not fit in memory.
                self._loss = self._plain_hessian.loss() if self._loss is None else self._loss
                self._plain_hessian = None
        if self._hessian is None:
            self._hessian = hessian_of(self.problem, gradient=True, lasting=False)
        return self._hessian

    def non_uniformity(self) -> NonUniformity:
        """Return the covariance of the per-sample Hessians, in the rule's coordinates."""
        if self._non_uniformity is None:
            self._non_uniformity = NonUniformity(
                require_samples(self.problem, "the non-uniformity")
            )
        return self._non_uniformity

    def gauss_newton(self) -> GaussNewton:
        """Return the Gauss-Newton matrix, in the rule's coordinates."""
        if self._gauss_newton is None:
            self._gauss_newton = GaussNewton(require_samples(self.problem, "Gauss-Newton"))
        return self._gauss_newton

    def batch_sharpness(self) -> BatchSharpness:
        """Return the batch sharpness, by random batches of the step's size."""
        if self._batch_sharpness is None:
            assert self.batch_size is not None
            problem = require_samples(self.problem, "batch_sharpness")
            self._batch_sharpness = batch_sharpness(
                problem, self.batch_size, rel_error=self.tol, seed=self.seed
            )
        return self._batch_sharpness

    def result(self, name: str) -> QuantityResult:
        """Return the result of a quantity that was measured before, empty without one."""
        return self.results.get(name, QuantityResult())

    def along_step(self) -> AlongStep:
        """Return losses and gradients along the step just taken.

        Raises:
            ValueError: if no step was recorded.
        """
        if self.taken_step is None:
            raise ValueError(
                "no step was recorded: quantities along a step are measured after steps that the"
                " monitor's schedule selects, by every= or max_overhead="
            )
        if self._along is None:
            self._along = AlongStep(self.problem, self.taken_step)
        return self._along

    def loss(self) -> float:
        """Return the mean loss, if possible from a Hessian's cached passes or from the step's end."""
        if self._loss is None:
            hessian = self._hessian if self._plain_hessian is None else self._plain_hessian
            if hessian is not None:
                self._loss = hessian.loss()
            elif self._along is not None:
                self._loss = self._along.loss_after
            else:
                self._loss = self.problem.value()
        return self.problem.sign * self._loss

    def top_eigenvalue(
        self,
        name: str,
        operator: Operator,
        *,
        preconditioner: StepPreconditioner | None = None,
        value: Callable[[float], float] = float,
        degree: int = 1,
        shares: bool = False,
    ) -> QuantityResult:
        """Measure the quantity ``name``, a function of the operator's largest eigenvalue.

        Args:
            name: the quantity, the key of its warm start.
            operator: its operator.
            preconditioner: P, for the eigenvalue of P times the operator.
            value: the quantity as a function of the eigenvalue.
            degree: the eigenvalue's relative error over the quantity's: 2 for a square root.
            shares: whether to add the eigenvector's shares, which takes a Hessian as operator. Layers
                have none if P has entries between parameters, as that of L-BFGS.
        """
        vectors = self.vectors_held()
        pair = top_eigenpair(
            operator,
            preconditioner=preconditioner,
            start=(self.starts or {}).get(name),
            keep=self.starts is not None and vectors == MOST_VECTORS,
            most_vectors=vectors,
            tol=degree * self.tol,
            max_iter=self.max_iter,
            seed=self.seed,
        )
        if pair.subspace is not None:
            self.subspaces[name] = pair.subspace
        elif self.starts is not None and preconditioner is None:
            self.subspaces[name] = pair.vector[None].to(WARM_START_DTYPE)
        measurement = Measurement.of_eigenpair(pair, value, degree)
        result = QuantityResult.from_measurement(
            measurement.within(self.difference_error(operator), self.tol)
        )
        if not shares:
            return result
        layers, details = self._shares(pair, operator, preconditioner)
        return dataclasses.replace(result, layers=layers, details=details)

    def _shares(
        self, pair: Eigenpair, operator: Operator, preconditioner: StepPreconditioner | None
    ) -> tuple[Layers | None, dict[str, float]]:
        """Return the eigenvector's shares by layer; those of gradient and step in its subspace."""
        problem = self.problem
        inner = InnerProduct.for_operator(operator, preconditioner)
        in_rule = operator is self._hessian and operator is not self._plain_hessian
        directions = Directions(
            pair.vector,
            pair.covector,
            None if pair.subspace is None else ritz_rows(pair.subspace, inner),
            operator.gradient if isinstance(operator, Hessian) else None,
            self._change(scaled=in_rule),
        )
        loss = operator.known_loss if isinstance(operator, Hessian) and self._loss is None else None
        layers, details, loss_on_host = shares_of(
            directions,
            self.blocks,
            [shape.numel() for shape in problem.shapes],
            inner,
            counts=full_sizes(problem.params),
            extra=loss,
        )
        if loss is not None:
            self._loss = loss_on_host
        has_shares = preconditioner is None or preconditioner.by_parameter
        return layers if has_shares else None, details

    def _change(self, *, scaled: bool) -> Tensor | None:
        """Return the step just taken ``(d,)``, ``scaled`` to the rule's coordinates; else ``None``."""
        if self.taken_step is None or not self.taken_step.contains(self.problem.params):
            return None
        along = self.along_step()
        return self.scaled_change(along) if scaled else along.change

    def scaled_change(self, along: AlongStep) -> Tensor:
        """Return the step ``(d,)`` in the rule's coordinates: divided by the root of a diagonal P."""
        if not self.preconditioned:
            return along.change
        return along.problem.flatten(list(self._scaled_parts(along)))

    def squared_length(self, along: AlongStep) -> float:
        r"""Return :math:`\delta^\top P^{-1}\delta` of the step, one parameter at a time."""
        if not self.preconditioned:
            return dot(along.problem, along.change, along.change)
        parts = (part.reshape(-1) for part in self._scaled_parts(along))
        lengths = torch.stack([InnerProduct().dot(part, part) for part in parts]).sqrt()
        return dot(along.problem, lengths, lengths)

    def _scaled_parts(self, along: AlongStep) -> Iterator[Tensor]:
        parts = along.problem.unflatten(along.change)
        for part, factor in zip(parts, self.problem.scale, strict=True):
            constant = torch.as_tensor(factor, device=part.device) == 0
            # Entries that did not move, and constant ones, have no part in the step.
            yield (part / factor).masked_fill_((part == 0) | constant, 0.0)

    def difference_error(self, operator: Operator) -> float:
        """Return the largest relative error of products by finite differences; else 0."""
        differences = operator.differences if isinstance(operator, Hessian) else None
        if differences is None:
            return 0.0
        # Each rank differentiates its own samples; all report the largest error.
        error = torch.tensor([differences.error], dtype=torch.float64, device="cpu")
        return float(self.problem.ranks.all_gather(error).max())

    def vectors_held(self) -> int:
        """Return the number of vectors of the parameters' size that a search may hold at once."""
        # Shards differ in size; the largest decides, since all ranks run the same search.
        ranks = self.problem.ranks
        largest_shard = max(ranks.all_gather_object(self.problem.num_params))
        return vectors_held(largest_shard, self.problem.dtype.itemsize)
