r"""The quantity ``"layers"``: sharpness, mean curvature and non-uniformity of each block of parameters.

.. math:: \lambda_{\max}(P_bH_{bb}), \qquad \mathrm{tr}(H_{bb})/\#b, \qquad
    \lambda_{\max}(\Sigma_b)^{1/2}

for each block b, with the other parameters held constant. They are not parts of the joint values: the
joint sharpness is at least that of every block, and may be above their sum. Mean curvatures are those of
Wang et al., *The Sharpness Disparity Principle in Transformers for Accelerating Language Model
Pre-Training* (ICML 2025, arXiv:2502.19002).

The sharpness takes a search for each block, of products that differentiate the block's gradients alone.
Blocks cannot share these, but follow the last measurement's eigenvectors as the whole does. The mean
curvatures take 16 whole products, which serve all blocks: by Hutchinson's estimate,
:math:`E[z_b^\top(Hz)_b] = \mathrm{tr}(H_{bb})` for random signs z. The non-uniformity is measured where
that of the whole is, by structured products.
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
from stableopt.stability.layers.blocks import Block, layer_of
from stableopt.stability.layers.shares import layer_shares, sized, whole_sizes
from stableopt.stability.layers.table import Layers
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.quantities import Chart, Quantity, register
from stableopt.stability.rules.coordinates import as_seen_by
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner, StepPreconditioner
from stableopt.stability.rules.several import SeparateBlocks
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["layer_of", "layer_shares", "measured_layers"]

_PROBES = 16
"""Random signs in an estimate of the traces. A block whose curvature is one direction has a standard
error of a third, one of many equal directions a small one."""


@dataclass(frozen=True)
class _View:
    """How the update rule sees one block."""

    coordinates: Coordinates
    preconditioner: StepPreconditioner | None = None
    limit: float | None = None


def measured_layers(at: Evaluation) -> QuantityResult:
    """Measure each block; the value is the sharpness of the block that is nearest to its limit."""
    hessian = at.hessian()
    views, vectors = _views(at), at.vectors_held()
    pairs = list(zip(at.blocks, views, strict=True))
    found = [_sharpness(at, hessian, *pair, vectors=vectors) for pair in pairs]
    means, errors = _mean_curvatures(at, hessian)
    spreads = [_non_uniformity(at, *pair) for pair in pairs]
    whole = at.results.get("non_uniformity", QuantityResult())
    columns: dict[str, list[Any]] = {
        "sharpness": [None if one is None else one.value for one in found],
        "limit": [view.limit for view in views],
        "residual": [None if one is None else one.residual for one in found],
        "converged": [None if one is None else one.converged for one in found],
        "mean_curvature": means,
        "mean_curvature_error": errors,
        "non_uniformity": [None if one is None else one.value for one in spreads],
        "non_uniformity_limit": [None if one is None else whole.limit for one in spreads],
    }
    known = {
        name: tuple(values)
        for name, values in columns.items()
        if any(value is not None for value in values)
    }
    shares = _shares(at)
    layers = replace(shares, columns={**shares.columns, **known})
    return _summary(layers, [one for one in found if one is not None], spreads)


def _summary(
    layers: Layers, found: list[Measurement], spreads: list[Measurement | None]
) -> QuantityResult:
    sharpest = layers.largest(1, "ratio") or layers.largest(1, "sharpness")
    if not sharpest:
        return QuantityResult(layers=layers)
    own = next(one for one in found if one.value == sharpest[0].sharpness)
    every = [*found, *(one for one in spreads if one is not None)]
    measurement = replace(
        own,
        products=sum(one.products for one in every) + _PROBES,
        converged=all(one.converged for one in every),
        upper_bound=None,  # that of one block does not bound the others
    )
    limit = sharpest[0].limit
    return QuantityResult(own.value, limit, measurement=measurement, layers=layers)


def _shares(at: Evaluation) -> Layers:
    """Return names, sizes and shares, of the eigenvector that was found with the joint sharpness."""
    for name in ("preconditioned_sharpness", "sharpness"):
        layers = at.results.get(name, QuantityResult()).layers
        if layers is not None:
            return layers
    return sized(at.blocks, whole_sizes(at.problem.params))


def _views(at: Evaluation) -> list[_View]:
    rule, problem = at.rule, at.problem
    if rule is None or rule.unknown is None:
        return [_in_rule(at, rule, block, problem.coordinates) for block in at.blocks]
    plain = problem.transformed(sign=problem.sign).coordinates
    views = [_View(coordinates_of(plain, block.places)) for block in at.blocks]
    if not isinstance(rule.preconditioner, SeparateBlocks):
        return views
    for one in rule.preconditioner.blocks:
        if one.rule.unknown is not None:
            continue
        held = {id(p) for p in one.params}
        inside = [place for place, p in enumerate(problem.params) if id(p) in held]
        if not inside:
            continue
        part = as_seen_by(problem.restricted(one.params), one.rule, [one.optimizer]).coordinates
        for at_block, block in enumerate(at.blocks):
            if set(block.places) <= set(inside):  # else no optimizer alone has its limit
                own = coordinates_of(part, [inside.index(place) for place in block.places])
                views[at_block] = _in_rule(at, one.rule, block, own, taken=True)
    return views


def _in_rule(
    at: Evaluation,
    rule: UpdateRule | None,
    block: Block,
    coordinates: Coordinates,
    *,
    taken: bool = False,
) -> _View:
    """Return the view of one rule; ``taken`` says that the coordinates are the block's already."""
    own = coordinates if taken else coordinates_of(coordinates, block.places)
    preconditioner = None
    if rule is not None and rule.preconditioner is not None:
        params = [at.problem.params[place] for place in block.places]
        preconditioner = rule.preconditioner.over(params)
        if isinstance(preconditioner, DiagonalPreconditioner):
            preconditioner = None  # which is part of the coordinates
    return _View(own, preconditioner, None if rule is None else rule.max_sharpness)


def _sharpness(
    at: Evaluation,
    hessian: Hessian | ShardedHessian,
    block: Block,
    view: _View,
    *,
    vectors: int,
) -> Measurement | None:
    """Measure the largest eigenvalue of a block; ``None`` if it holds no number."""
    operator = PrincipalBlock(hessian, block.places, view.coordinates)
    if operator.inner_product.whole_size(operator.shape[0]) == 0:
        return None
    warm = _Warm(at, block)
    pair = top_eigenpair(
        operator,
        preconditioner=view.preconditioner,
        start=warm.start,
        keep=warm.keeps and vectors == MOST_VECTORS,
        most_vectors=vectors,
        tol=at.tol,
        max_iter=at.max_iter,
        seed=at.seed,
    )
    if pair.subspace is not None:
        warm.keep(pair.subspace)
    elif view.preconditioner is None:
        warm.keep(pair.vector[None])
    measurement = Measurement(
        pair.value,
        pair.relative_residual,
        pair.products,
        0.0,
        pair.converged,
        upper_bound=pair.upper_bound,
    )
    return measurement.within(at.error_of(hessian), at.tol)


class _Warm:
    """The subspaces of all blocks, side by side in the rows of one: blocks must not overlap."""

    def __init__(self, at: Evaluation, block: Block) -> None:
        self._at, self._block = at, block
        every = [place for each in at.blocks for place in each.places]
        self.keeps = (
            at.starts is not None and not at.problem.sharded and len(set(every)) == len(every)
        )

    def _own(self, rows: Tensor) -> list[Tensor]:
        """Return the columns of the block, as a view for each parameter."""
        parts = torch.split(rows, [shape.numel() for shape in self._at.problem.shapes], dim=1)
        return [parts[place] for place in self._block.places]

    @property
    def start(self) -> Tensor | None:
        """What the last measurement kept of the block."""
        rows = (self._at.starts or {}).get("layers") if self.keeps else None
        if rows is None:
            return None
        own = torch.cat(self._own(rows), dim=1)
        own = own[own.abs().amax(1) > 0]  # a block may have kept fewer rows than others
        return own if len(own) else None

    def keep(self, rows: Tensor) -> None:
        """Keep the ``rows`` of a search for the next measurement."""
        if not self.keeps:
            return
        held = self._at.subspaces.get("layers", rows.new_zeros(0, self._at.problem.num_params))
        if len(held) < len(rows):
            held = torch.cat([held, held.new_zeros(len(rows) - len(held), held.shape[1])])
            self._at.subspaces["layers"] = held
        own = self._own(held[: len(rows)])
        for part, piece in zip(
            own, torch.split(rows, [p.shape[1] for p in own], dim=1), strict=True
        ):
            part.copy_(piece)


def _mean_curvatures(
    at: Evaluation, hessian: Hessian | ShardedHessian
) -> tuple[list[float | None], list[float | None]]:
    """Return the mean diagonal entry of the Hessian in each block, and its standard error."""
    problem = at.problem
    plain = problem.transformed(sign=problem.sign).coordinates
    whole = PrincipalBlock(hessian, range(len(problem.params)), plain)
    sizes, inner, rows = [shape.numel() for shape in plain.shapes], whole.inner_product, []
    for draw in range(_PROBES):
        signs = inner.noise(whole, at.seed, draw).covector.sign()
        diagonal = signs * (whole @ signs)
        rows.append(torch.stack([part.sum() for part in torch.split(diagonal, sizes)]))
    table = torch.stack(rows)
    if inner.sharded_size is not None:
        table = inner.ranks.all_reduce_sum(table)
    numbers = inner.on_host(table)
    means: list[float | None] = []
    errors: list[float | None] = []
    for block, size in zip(at.blocks, _shares(at).parameters, strict=True):
        traces = numbers[:, list(block.places)].sum(1)
        means.append(float(traces.mean()) / size if size else None)
        errors.append(float(traces.std()) / math.sqrt(_PROBES) / size if size else None)
    return means, errors


def _non_uniformity(at: Evaluation, block: Block, view: _View) -> Measurement | None:
    """Measure the non-uniformity of a block, where that of the whole is from structured products."""
    if at.results.get("non_uniformity", QuantityResult()).value is None:
        return None
    if at.non_uniformity().method != "structured":
        return None
    own = view.coordinates
    part = at.problem.restricted([at.problem.params[place] for place in block.places])
    part = part.transformed(sign=own.sign, scale=own.scale, weight_decay=own.weight_decay)
    problem = require_samples(part, "the non-uniformity")
    operator = NonUniformity(problem, method="structured")
    pair = top_eigenpair(operator, tol=2 * at.tol, max_iter=at.max_iter, seed=at.seed)
    root = max(pair.value, 0.0) ** 0.5  # rounding may leave it below zero
    return Measurement(root, pair.relative_residual / 2, pair.products, 0.0, pair.converged)


register(
    Quantity(
        "layers",
        measured_layers,
        needs={"step"},
        chart=Chart("sharpest layer", r"$\max_b\lambda_{\max}(P_bH_{bb})$", tag="layer"),
    )
)
