r"""The quantity ``"layers"``: sharpness, mean curvature and non-uniformity of each block of parameters.

.. math:: \lambda_{\max}(P_bH_{bb}), \qquad \mathrm{tr}(H_{bb})/\#b, \qquad
    \lambda_{\max}(\Sigma_b)^{1/2}

for each block b, with the other parameters held constant. The joint sharpness is at least that of every
block; it can be above their sum. Mean curvatures follow Wang et al., *The Sharpness Disparity Principle
in Transformers for Accelerating Language Model Pre-Training* (ICML 2025, arXiv:2502.19002).

The sharpness takes an eigen-search for each block, whose products differentiate only the gradient of
the block, warm-started from the last measurement. The mean curvatures take 16 products with the full
Hessian for all blocks, by Hutchinson's estimate :math:`E[z_b^\top(Hz)_b] = \mathrm{tr}(H_{bb})` with
random signs z. The non-uniformity of blocks is measured if the joint non-uniformity is, by structured
products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature import Hessian, NonUniformity, ShardedHessian, top_eigenpair
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.problem.cost import MOST_VECTORS
from stableopt.curvature.problem.sharded import require_samples
from stableopt.curvature.products.principal_block import PrincipalBlock, coordinates_of
from stableopt.stability.layers.blocks import Block
from stableopt.stability.layers.shares import full_sizes, without_columns
from stableopt.stability.layers.table import Layers
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult, root
from stableopt.stability.measure.registry import Chart, Quantity
from stableopt.stability.rules.coordinates import in_rule_coordinates
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner, StepPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["measured_layers"]

_PROBES = 16
"""Random sign vectors in an estimate of the traces. The standard error is a third for a block whose
curvature is in one direction, and small for one with many equal directions."""


@dataclass(frozen=True)
class _BlockRule:
    """Coordinates, preconditioner and sharpness limit of the update rule on one block."""

    coordinates: Coordinates
    preconditioner: StepPreconditioner | None = None
    limit: float | None = None


def measured_layers(evaluation: Evaluation) -> QuantityResult:
    """Measure each block; the value is the sharpness of the block nearest to its limit."""
    hessian = evaluation.hessian()
    rules, vectors = _block_rules(evaluation), evaluation.vectors_held()
    pairs = list(zip(evaluation.blocks, rules, strict=True))
    sharpnesses = [_sharpness(evaluation, hessian, *pair, vectors=vectors) for pair in pairs]
    means, errors = _mean_curvatures(evaluation, hessian)
    spreads = [_non_uniformity(evaluation, *pair) for pair in pairs]
    joint_limit = evaluation.result("non_uniformity").limit
    columns: dict[str, list[Any]] = {
        "sharpness": [None if m is None else m.value for m in sharpnesses],
        "limit": [rule.limit for rule in rules],
        "residual": [None if m is None else m.residual for m in sharpnesses],
        "converged": [None if m is None else m.converged for m in sharpnesses],
        "mean_curvature": means,
        "mean_curvature_error": errors,
        "non_uniformity": [None if m is None else m.value for m in spreads],
        "non_uniformity_limit": [None if m is None else joint_limit for m in spreads],
    }
    measured = {
        name: tuple(values)
        for name, values in columns.items()
        if any(value is not None for value in values)
    }
    shares = _shares(evaluation)
    layers = replace(shares, columns={**shares.columns, **measured})
    return _summary(
        layers,
        [measurement for measurement in sharpnesses if measurement is not None],
        [measurement for measurement in spreads if measurement is not None],
    )


def _summary(
    layers: Layers, sharpnesses: list[Measurement], spreads: list[Measurement]
) -> QuantityResult:
    """Return the sharpness of the block nearest to its limit, with the cost of all blocks."""
    sharpest = layers.largest(1, "ratio") or layers.largest(1, "sharpness")
    if not sharpest:
        return QuantityResult(layers=layers)
    measurement = next(m for m in sharpnesses if m.value == sharpest[0].sharpness)
    measurement = replace(
        measurement,
        products=sum(m.products for m in [*sharpnesses, *spreads]) + _PROBES,
        converged=all(m.converged for m in [*sharpnesses, *spreads]),
        upper_bound=None,  # one block's bound does not hold for the others
    )
    return QuantityResult(
        measurement.value, sharpest[0].limit, measurement=measurement, layers=layers
    )


def _shares(evaluation: Evaluation) -> Layers:
    """Return names, sizes and shares of the blocks, from the measurement of the joint sharpness."""
    name = "preconditioned_sharpness" if evaluation.preconditioned else "sharpness"
    layers = evaluation.result(name).layers
    if layers is not None:
        return layers
    return without_columns(evaluation.blocks, full_sizes(evaluation.problem.params))


def _block_rules(evaluation: Evaluation) -> list[_BlockRule]:
    """Return the update rule of each block: the common one, else that of the block's optimizer."""
    rule, problem = evaluation.rule, evaluation.problem
    if rule is None or rule.unknown is None:
        whole = problem.coordinates
        return [
            _block_rule(evaluation, rule, block, coordinates_of(whole, block.indices))
            for block in evaluation.blocks
        ]
    plain = problem.untransformed().coordinates
    block_rules = [_BlockRule(coordinates_of(plain, block.indices)) for block in evaluation.blocks]
    for part in rule.blocks:  # one for each optimizer without a joint limit
        trained = {id(p) for p in part.params}
        in_part = [index for index, p in enumerate(problem.params) if id(p) in trained]
        if part.rule.unknown is not None or not in_part:
            continue
        restricted = problem.restricted(part.params)
        whole = in_rule_coordinates(restricted, part.rule, [part.optimizer]).coordinates
        for number, block in enumerate(evaluation.blocks):
            if set(block.indices) <= set(in_part):  # otherwise no single optimizer trains the block
                coordinates = coordinates_of(whole, [in_part.index(i) for i in block.indices])
                block_rules[number] = _block_rule(evaluation, part.rule, block, coordinates)
    return block_rules


def _block_rule(
    evaluation: Evaluation, rule: UpdateRule | None, block: Block, coordinates: Coordinates
) -> _BlockRule:
    """Return ``rule`` on one block, given the ``coordinates`` of the block."""
    if rule is None:
        return _BlockRule(coordinates)
    preconditioner = None
    if rule.preconditioner is not None:
        params = [evaluation.problem.params[index] for index in block.indices]
        preconditioner = rule.preconditioner.over(params)
        if isinstance(preconditioner, DiagonalPreconditioner):
            preconditioner = None  # the coordinates include it
    return _BlockRule(coordinates, preconditioner, rule.max_sharpness)


def _sharpness(
    evaluation: Evaluation,
    hessian: Hessian | ShardedHessian,
    block: Block,
    rule: _BlockRule,
    *,
    vectors: int,
) -> Measurement | None:
    """Measure the largest eigenvalue of a block; ``None`` if its parameters are empty."""
    operator = PrincipalBlock(hessian, block.indices, rule.coordinates)
    if operator.inner_product.whole_size(operator.shape[0]) == 0:
        return None
    warm_start = _WarmStart(evaluation, block)
    pair = top_eigenpair(
        operator,
        preconditioner=rule.preconditioner,
        start=warm_start.start,
        keep=warm_start.keeps and vectors == MOST_VECTORS,
        most_vectors=vectors,
        tol=evaluation.tol,
        max_iter=evaluation.max_iter,
        seed=evaluation.seed,
    )
    if pair.subspace is not None:
        warm_start.keep(pair.subspace)
    elif rule.preconditioner is None:
        warm_start.keep(pair.vector[None])
    error = evaluation.difference_error(hessian)
    return Measurement.of_eigenpair(pair).within(error, evaluation.tol)


class _WarmStart:
    """The warm start of one block.

    The subspaces of all blocks share one matrix ``(k, d)``, each in the columns of its parameters.
    Without tracking, and for blocks that overlap or are sharded, nothing is kept.
    """

    def __init__(self, evaluation: Evaluation, block: Block) -> None:
        self._evaluation, self._block = evaluation, block
        indices = [index for other in evaluation.blocks for index in other.indices]
        disjoint = len(set(indices)) == len(indices)
        tracked = evaluation.starts is not None
        self.keeps = tracked and disjoint and not evaluation.problem.sharded

    def _columns(self, rows: Tensor) -> list[Tensor]:
        """Return the columns of the block, as a view for each parameter."""
        sizes = [shape.numel() for shape in self._evaluation.problem.shapes]
        parts = torch.split(rows, sizes, dim=1)
        return [parts[index] for index in self._block.indices]

    @property
    def start(self) -> Tensor | None:
        """The block's subspace from the last measurement, or ``None``."""
        rows = (self._evaluation.starts or {}).get("layers") if self.keeps else None
        if rows is None:
            return None
        subspace = torch.cat(self._columns(rows), dim=1)
        subspace = subspace[subspace.abs().amax(1) > 0]  # zero rows pad to the largest block's k
        return subspace if len(subspace) else None

    def keep(self, rows: Tensor) -> None:
        """Keep the subspace ``rows`` of a search for the next measurement."""
        if not self.keeps:
            return
        subspaces, size = self._evaluation.subspaces, self._evaluation.problem.num_params
        matrix = subspaces.get("layers", rows.new_zeros(0, size))
        if len(matrix) < len(rows):
            matrix = torch.cat([matrix, matrix.new_zeros(len(rows) - len(matrix), size)])
            subspaces["layers"] = matrix
        columns = self._columns(matrix[: len(rows)])
        pieces = torch.split(rows, [view.shape[1] for view in columns], dim=1)
        for view, piece in zip(columns, pieces, strict=True):
            view.copy_(piece)


def _mean_curvatures(
    evaluation: Evaluation, hessian: Hessian | ShardedHessian
) -> tuple[list[float | None], list[float | None]]:
    """Return the mean diagonal entry of the Hessian in each block, and its standard error."""
    problem = evaluation.problem
    plain = problem.untransformed().coordinates
    whole = PrincipalBlock(hessian, range(len(problem.params)), plain)
    sizes, inner = [shape.numel() for shape in plain.shapes], whole.inner_product
    estimates = []  # of the trace on each parameter, one row for each draw
    for draw in range(_PROBES):
        signs = inner.noise(whole, evaluation.seed, draw).covector.sign()
        diagonal = signs * (whole @ signs)
        estimates.append(torch.stack([part.sum() for part in torch.split(diagonal, sizes)]))
    table = torch.stack(estimates)
    if inner.sharded_size is not None:
        table = inner.ranks.all_reduce_sum(table)
    table = inner.on_host(table)
    means: list[float | None] = []
    errors: list[float | None] = []
    for block, size in zip(evaluation.blocks, _shares(evaluation).parameters, strict=True):
        traces = table[:, list(block.indices)].sum(1)
        means.append(float(traces.mean()) / size if size else None)
        errors.append(float(traces.std()) / math.sqrt(_PROBES) / size if size else None)
    return means, errors


def _non_uniformity(evaluation: Evaluation, block: Block, rule: _BlockRule) -> Measurement | None:
    """Measure the non-uniformity of a block, if the joint one was measured by structured products."""
    if evaluation.result("non_uniformity").value is None:
        return None
    if evaluation.non_uniformity().method != "structured":
        return None
    coordinates = rule.coordinates
    params = [evaluation.problem.params[index] for index in block.indices]
    problem = evaluation.problem.restricted(params).transformed(
        sign=coordinates.sign,
        scale=coordinates.scale,
        weight_decay=coordinates.weight_decay,
    )
    operator = NonUniformity(require_samples(problem, "the non-uniformity"), method="structured")
    pair = top_eigenpair(
        operator, tol=2 * evaluation.tol, max_iter=evaluation.max_iter, seed=evaluation.seed
    )
    return Measurement.of_eigenpair(pair, root, degree=2)


LAYERS = Quantity(
    "layers",
    measured_layers,
    needs={"step"},
    chart=Chart("sharpest layer", r"$\max_b\lambda_{\max}(P_bH_{bb})$", tag="layer"),
)
