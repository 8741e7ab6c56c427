"""`Evaluation`: one measurement in progress, with the operators that its quantities share."""

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
from stableopt.stability.layers.blocks import Block, blocks_of
from stableopt.stability.layers.shares import Directions, of_directions, whole_sizes
from stableopt.stability.layers.table import Layers
from stableopt.stability.measure.batch_sharpness import BatchSharpness
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.taken_step import AlongStep, TakenStep, dot
from stableopt.stability.rules.coordinates import outside_coordinates
from stableopt.stability.rules.preconditioner import StepPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["ROUNDED", "Evaluation"]

ROUNDED = torch.bfloat16
"""Of a warm start of a large model: noise of a tenth of its norm is added to it anyway."""


@dataclass
class Evaluation:
    """A problem in the coordinates of an update rule, and how its quantities are measured.

    Attributes:
        problem: the problem, in the rule's coordinates.
        rule: the update rule, or ``None``.
        batch_size: samples in a step, where known; for a full batch those of the data set.
        dataset_size: samples in the training set; ``None`` for infinitely many.
        tol: the largest relative residual.
        max_iter: the largest number of products for each quantity.
        seed: of the random starts.
        starts: the subspaces of an earlier measurement by quantity, as warm starts; ``None`` for
            none, and then none are kept.
        subspaces: the subspaces of this measurement by quantity.
        results: the results so far by quantity.
        over_batches: the averages over batches, once a quantity has drawn them.
        taken: the step just taken, where there is one.
        memory: what quantities keep from one measurement of a run to the next: plain numbers and lists.
        window: the steps over which quantities of single steps are averaged; ``None`` for the default.
        blocks: the blocks whose shares and values are measured; the layers by default.
    """

    problem: MeanLoss
    rule: UpdateRule | None
    batch_size: int | None
    dataset_size: int | None
    tol: float
    max_iter: int
    seed: int
    starts: Mapping[str, Tensor] | None = None
    subspaces: dict[str, Tensor] = field(default_factory=dict, init=False)
    results: Mapping[str, QuantityResult] = field(default_factory=dict, init=False)
    over_batches: BatchSharpness | None = field(default=None, init=False)
    taken: TakenStep | None = field(default=None, init=False)
    memory: dict[str, Any] = field(default_factory=dict, init=False)
    window: int | None = field(default=None, init=False)
    blocks: tuple[Block, ...] = field(default=(), init=False)
    _along: AlongStep | None = field(default=None, init=False)
    _plain: Hessian | ShardedHessian | None = field(default=None, init=False)
    _own: Hessian | ShardedHessian | None = field(default=None, init=False)
    _non_uniformity: NonUniformity | None = field(default=None, init=False)
    _gauss_newton: GaussNewton | None = field(default=None, init=False)
    _loss: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        problem = self.problem
        self.blocks = blocks_of(problem.model, problem.names, problem.params)

    @property
    def preconditioned(self) -> bool:
        """Whether the rule's limit is on the preconditioned sharpness."""
        return self.rule is not None and self.rule.preconditioned

    @property
    def preconditioner(self) -> StepPreconditioner | None:
        """The P of ``P @ hessian`` where the problem's coordinates do not contain it."""
        return None if self.rule is None else outside_coordinates(self.rule, self.problem.params)

    def plain_hessian(self) -> Hessian | ShardedHessian:
        """Return the Hessian of the loss, without preconditioner and weight decay of groups."""
        if not self.preconditioned:
            return self.hessian()
        if self._plain is None:
            self._plain = hessian_of(
                self.problem.transformed(sign=self.problem.sign), gradient=True, lasting=False
            )
        return self._plain

    def hessian(self) -> Hessian | ShardedHessian:
        """Return the Hessian in the rule's coordinates."""
        if self._own is None and self._plain is not None:
            if self.preconditioner and not any(self.problem.weight_decay):
                self._own = self._plain
            else:
                # One set of linearized passes at a time is kept in memory.
                self._loss = self._plain.loss() if self._loss is None else self._loss
                self._plain = None
        if self._own is None:
            self._own = hessian_of(self.problem, gradient=True, lasting=False)
        return self._own

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

    def along_step(self) -> AlongStep:
        """Return losses and gradients along the step just taken.

        Raises:
            ValueError: if none was recorded.
        """
        if self.taken is None:
            raise ValueError(
                "no step was recorded to measure along: this takes a step after which the monitor's"
                " schedule measures, by every= or max_overhead="
            )
        if self._along is None:
            self._along = AlongStep(self.problem, self.taken)
        return self._along

    def loss(self) -> float:
        """Return the mean loss, from a Hessian's cached passes or along the step if it is known."""
        if self._loss is None:
            hessian = self._own if self._plain is None else self._plain
            if hessian is not None:
                self._loss = hessian.loss()
            else:
                self._loss = self.problem.value() if self._along is None else self._along.loss_after
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
            name: the quantity, by which warm starts are found.
            operator: its operator.
            preconditioner: P, for the eigenvalue of P times the operator.
            value: the quantity as a function of the eigenvalue.
            degree: powers of the quantity in the eigenvalue: a root has half its relative error.
            shares: whether the result says where the eigenvector lies; the operator is a Hessian.
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
            self.subspaces[name] = pair.vector[None].to(ROUNDED)
        residual = pair.relative_residual / degree
        bound = None if pair.upper_bound is None else value(pair.upper_bound)
        found = Measurement(
            value(pair.value), residual, pair.products, 0.0, pair.converged, upper_bound=bound
        )
        result = QuantityResult.from_measurement(found.within(self.error_of(operator), self.tol))
        if not shares:
            return result
        layers, details = self._shares(pair, operator, preconditioner)
        return dataclasses.replace(result, layers=layers, details=details)

    def _shares(
        self, pair: Eigenpair, operator: Operator, preconditioner: StepPreconditioner | None
    ) -> tuple[Layers, dict[str, float]]:
        """Return what the eigenvector says of layers, gradient and step, at no further product."""
        problem = self.problem
        inner = InnerProduct.for_operator(operator, preconditioner)
        own = operator is self._own and operator is not self._plain
        directions = Directions(
            pair.vector,
            pair.covector,
            None if pair.subspace is None else ritz_rows(pair.subspace, inner),
            operator.gradient if isinstance(operator, Hessian) else None,
            self._change(scaled=own),
        )
        sizes, counts = [shape.numel() for shape in problem.shapes], whole_sizes(problem.params)
        loss = operator.known_loss if isinstance(operator, Hessian) and self._loss is None else None
        layers, details, read = of_directions(
            directions, self.blocks, sizes, inner, counts=counts, also=loss
        )
        self._loss = self._loss if loss is None else read
        return layers, details

    def _change(self, *, scaled: bool) -> Tensor | None:
        """Return the step just taken ``(d,)``, if known; if ``scaled`` in the rule's coordinates."""
        if self.taken is None or not self.taken.holds(self.problem.params):
            return None
        along = self.along_step()
        return self.in_own_coordinates(along) if scaled else along.change

    def in_own_coordinates(self, along: AlongStep) -> Tensor:
        """Return the step ``(d,)`` in the rule's coordinates, divided by the root of a diagonal P."""
        if not self.preconditioned:
            return along.change
        return along.problem.flatten(list(self._own_parts(along)))

    def squared_length(self, along: AlongStep) -> float:
        r"""Return :math:`\delta^\top P^{-1}\delta` of the step, a parameter at a time."""
        if not self.preconditioned:
            return dot(along.problem, along.change, along.change)
        flat = (part.reshape(-1) for part in self._own_parts(along))
        lengths = torch.stack([InnerProduct().dot(part, part) for part in flat]).sqrt()
        return dot(along.problem, lengths, lengths)

    def _own_parts(self, along: AlongStep) -> Iterator[Tensor]:
        parts = along.problem.unflatten(along.change)
        for part, factor in zip(parts, self.problem.scale, strict=True):
            # 0 / 0: a parameter that never moved
            yield (part / factor).masked_fill_(part == 0, 0.0)

    def error_of(self, operator: Operator) -> float:
        """Return the largest relative error of products by finite differences; else 0."""
        differences = operator.differences if isinstance(operator, Hessian) else None
        if differences is None:
            return 0.0
        # Each rank takes differences of its own samples, and all must report the same error.
        found = torch.tensor([differences.error], dtype=torch.float64)
        return float(self.problem.ranks.all_gather(found).max())

    def vectors_held(self) -> int:
        """Return the number of vectors of the parameters' size that a search may hold at once."""
        # Ranks hold different parts of a sharded problem, and must run the same search.
        ranks = self.problem.ranks
        most = max(ranks.all_gather_object(self.problem.num_params))
        return vectors_held(most, self.problem.dtype.itemsize)
