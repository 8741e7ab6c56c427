r"""`generalised_sharpness`: the sharpness in the norm in which an optimizer descends.

.. math:: S = \max_{N(d)=1} d^\top H d

In the Euclidean norm it is the sharpness :math:`\lambda_{\max}(H)`, in that of a preconditioner
:math:`\lambda_{\max}(PH)`. It limits the steps of sign descent, Lion and Muon (Islamov, Crawshaw,
Cohen & Gower, *Non-Euclidean Gradient Descent Operates at the Edge of Stability*, arXiv:2603.05002).
Two examples::

    generalised_sharpness(problem, UpdateRule.from_optimizer(muon).norm).ratio    # 1 at the edge
    generalised_sharpness(problem, SignNorm(model.parameters(), lr=1e-3))

The maximum is hard to find; :math:`d^\top Hd` at any d of the unit ball is a lower bound. The search is
that of Frank and Wolfe: it moves d towards :math:`\mathrm{LMO}(Hd)`, with the linear maximisation oracle
(LMO) of the ball, to the maximum on this line. If H is positive semidefinite, that is the oracle itself,
a vertex. Where the curvature along the line is negative, the maximum is on a face of the ball.

At the edge of stability a run oscillates by :math:`\eta d`, with gradients :math:`\pm\tfrac\eta2Hd` at
the two ends: :math:`d=\mathrm{LMO}(Hd)` is a fixed point, and
:math:`\langle g,d\rangle=\tfrac\eta2d^\top Hd`. Muon's oracle is approximate and belongs to no norm; its
fixed point is found by iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature import Hessian, NonFiniteError, Operator, Problem
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult, ratio_to_limit
from stableopt.stability.rules.norms import StepNorm

__all__ = ["GeneralisedSharpness", "generalised_sharpness", "measured_generalised_sharpness"]

_RANDOM_STARTS = 3
"""Random starts in many dimensions: on networks they rarely exceed the start at the gradient."""

_LOW_DIMENSION, _STARTS_IN_LOW_DIMENSION = 16, 64
"""Random starts in up to 16 dimensions, where products are cheap. For signs, 64 starts find the maximum
for 120 of 120 random symmetric matrices of 2 to 7 rows."""

_SETTLED = 0.1
"""An ascent ends at a gain below this share of ``tol``: later gains sum to about ten times the last."""

_REPEATS, _AVERAGED = 16, 8
"""Iterations of an approximate oracle, and how many of the last are averaged: small singular values keep
fluctuating, which moves the value by some percent."""

_RESTLESS = 0.25
"""Largest relative spread of these values that counts as converged: if they were independent, their mean
would be accurate to 3 %."""


@dataclass(frozen=True)
class GeneralisedSharpness:
    r"""The generalised sharpness at one point.

    Attributes:
        value: the largest :math:`d^\top Hd` found in the unit ball, a lower bound of S. For a norm
            that is not ``exact``, the mean of :math:`d^\top Hd` over the oracle's last iterations.
        dual_norm: :math:`\|g\|_\star` of the gradient.
        limit: :math:`2\|g\|_\star/\eta`, the largest S at which a full-batch step without momentum
            lowers the quadratic model of the loss; infinite for a learning rate of 0.
        maximiser: the d ``(d,)`` that attains ``value``; zero if no d with a positive one was found.
        products: the number of Hessian-vector products.
        converged: whether the ascent from every start reached its tolerance.
    """

    value: float
    dual_norm: float
    limit: float
    maximiser: Tensor
    products: int
    converged: bool

    @property
    def ratio(self) -> float:
        """Value over limit: 1 at the edge, infinite at zero gradient; a lower bound, as ``value``."""
        return ratio_to_limit(self.value, self.limit)


def generalised_sharpness(
    problem: Problem,
    norm: StepNorm,
    *,
    starts: int | None = None,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
) -> GeneralisedSharpness:
    r"""Return the largest :math:`d^\top Hd` found in the unit ball of ``norm``, and its limit.

    The step :math:`-\eta\,\mathrm{LMO}(g)` lowers the quadratic model of the loss if
    :math:`S \le 2\|g\|_\star/\eta`; full-batch runs without momentum settle at this limit. With
    momentum or mini-batches the ratio is only a diagnostic, since steps are not the oracle of g.

    Args:
        problem: the problem; parameters without a radius in ``norm`` are held fixed.
        norm: the norm in which the optimizer descends, such as ``UpdateRule.from_optimizer(muon).norm``.
        starts: the number of random starts, in addition to the gradient's oracle; by default 3, and 64
            in at most 16 dimensions.
        tol: relative accuracy of each ascent.
        max_iter: the largest number of products for each start; ``converged`` says if it sufficed.
        seed: seed of the random starts.

    On networks each start takes about eight products for signs, and two dozen for singular values. An
    approximate oracle has one start, and takes 16.

    Raises:
        ValueError: for arguments out of range, and if no parameter has a radius above 0.
        NonFiniteError: if a product or the gradient is not finite.

    >>> from stableopt.stability import SignNorm
    >>> model = torch.nn.Linear(2, 1, bias=False).double()     # f = (w_1 + 2 w_2)^2 / 2
    >>> torch.nn.init.ones_(model.weight).requires_grad
    True
    >>> data = torch.tensor([[1.0, 2.0]]).double() / 2**0.5, torch.zeros(1, 1).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), data)
    >>> found = generalised_sharpness(problem, SignNorm(model.parameters(), lr=0.5))
    >>> round(found.value, 6), round(found.limit, 6)             # (1 + 2)^2, and 2 (3 + 6) / 0.5
    (9.0, 36.0)
    """
    hessian = Hessian(problem)
    return search(
        hessian,
        problem.gradient(),
        norm.over(problem.params),
        starts=starts,
        tol=tol,
        max_iter=max_iter,
        seed=seed,
    )


def search(
    hessian: Operator,
    gradient: Tensor,
    norm: StepNorm,
    *,
    warm_starts: Sequence[Tensor] = (),
    starts: int | None = None,
    tol: float,
    max_iter: int,
    seed: int,
) -> GeneralisedSharpness:
    """Search with any operator; ``warm_starts`` are further directions ``(d,)`` to start from.

    ``norm`` is over the operator's parameters, in their order.
    """
    tol, max_iter = positive("tol", tol), whole("max_iter", max_iter)
    ball = _Ball(norm, gradient)
    if starts is None:
        starts = _STARTS_IN_LOW_DIMENSION if ball.dimensions <= _LOW_DIMENSION else _RANDOM_STARTS
    starts = whole("starts", starts, least=0)
    inner = InnerProduct.for_operator(hessian)
    first, dual = ball.oracle(ball.radii * gradient)
    (size,) = inner.on_host(dual[None]).tolist()
    if not math.isfinite(size):
        raise NonFiniteError("the gradient is not finite")
    if size == 0:  # an approximate oracle maps a zero gradient to zero
        first, _ = ball.oracle(inner.noise(gradient, seed, 0).vector)
    ascent = _Ascent(hessian, ball, inner, tol, max_iter)
    limit = 2 * size / norm.lr if norm.lr else float("inf")
    if not norm.exact:
        end = ascent.repeat_oracle(first)
        maximiser = ball.radii * end.point
        return GeneralisedSharpness(
            end.value, size, limit, maximiser, ascent.products, end.converged
        )
    ends = [ascent.ascend(first)]
    for direction in warm_starts:
        ends.append(ascent.ascend(ball.oracle(ball.radii * direction)[0]))
    for draw in range(1, starts + 1):
        ends.append(ascent.ascend(ball.oracle(inner.noise(gradient, seed, draw).vector)[0]))
    ends.append(_AscentEnd(0.0, torch.zeros_like(first), True))  # the centre of the ball
    best = max(ends, key=lambda end: end.value)
    return GeneralisedSharpness(
        value=best.value,
        dual_norm=size,
        limit=limit,
        maximiser=ball.radii * best.point,
        products=ascent.products,
        converged=all(end.converged for end in ends),
    )


def measured_generalised_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the quantity ``"generalised_sharpness"``, with its limit at the present gradient.

    The search also starts at this measurement's top eigenvector and at the last maximiser. It has
    random starts only without a last maximiser, as in a cold start.
    """
    assert evaluation.rule is not None
    assert evaluation.rule.norm is not None
    name, hessian = "generalised_sharpness", evaluation.plain_hessian()
    problem = evaluation.problem
    eigenvectors = evaluation.subspaces.get("sharpness")
    last = (evaluation.starts or {}).get(name)
    result = search(
        hessian,
        problem.gradient(),
        evaluation.rule.norm.over(problem.params),
        warm_starts=[rows[0] for rows in (eigenvectors, last) if rows is not None],
        starts=None if last is None else 0,
        tol=evaluation.tol,
        max_iter=evaluation.max_iter,
        seed=evaluation.seed,
    )
    if evaluation.starts is not None:
        evaluation.subspaces[name] = result.maximiser[None]
    measurement = Measurement(result.value, None, result.products, result.converged)
    return QuantityResult(value=result.value, limit=result.limit, measurement=measurement)


class _Ball:
    """The unit ball of a norm, in flat vectors scaled by the radii: d is ``radii * point``."""

    def __init__(self, norm: StepNorm, like: Tensor) -> None:
        self._norm, self._shapes = norm, [p.shape for p in norm.params]
        self._sizes = [p.numel() for p in norm.params]
        if sum(self._sizes) != len(like):
            raise ValueError(
                f"norm has {sum(self._sizes)} entries: expected the {len(like)} of the parameters"
            )
        parts = zip(norm.radii, self._sizes, strict=True)
        self.radii = torch.cat(
            [
                r.reshape(-1).to(like) if isinstance(r, Tensor) else like.new_full((size,), r)
                for r, size in parts
            ]
        )
        self.dimensions = int((self.radii > 0).sum())
        if self.dimensions == 0:
            raise ValueError(
                "norm: no parameter of the problem has a radius above 0: expected the norm of an"
                " optimizer that trains them"
            )

    def oracle(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point with the largest inner product with ``vector``, and that product."""
        parts = zip(torch.split(vector, self._sizes), self._shapes, strict=True)
        oracles = [self._norm.unit_oracle(part.view(shape)) for part, shape in parts]
        points = torch.cat([point.reshape(-1) for point, _ in oracles])
        return points, torch.stack([dual.double() for _, dual in oracles]).sum()


@dataclass(frozen=True)
class _AscentEnd:
    """Where an ascent ended."""

    value: float
    point: Tensor
    converged: bool


class _Ascent:
    """Ascents of ``d @ H @ d`` in the ball, with the Hessian scaled by the radii on both sides."""

    def __init__(
        self, hessian: Any, ball: _Ball, inner: InnerProduct, tol: float, max_iter: int
    ) -> None:
        self._hessian, self._ball, self._inner = hessian, ball, inner
        self._tol, self._max_iter = tol, max_iter
        self.products = 0

    def ascend(self, point: Tensor) -> _AscentEnd:
        """Ascend from ``point`` until the gain is small."""
        image, value = self._product_and_form(point)
        # Where no curvature is positive, the values tend to zero, so gains need another scale.
        largest, is_vertex, converged = abs(value), True, False
        for _ in range(1, self._max_iter):
            vertex, _ = self._ball.oracle(image)
            vertex_image = self._image(vertex)
            step, step_image = vertex - point, vertex_image - image
            slope, curvature = self._numbers(
                self._inner.dot(step, image), self._inner.dot(step, step_image)
            )
            # Along the step the form is value + 2 t slope + t^2 curvature, for t up to 1.
            length = slope / -curvature if curvature < -slope < 0 else 1.0
            gain = length * (2 * slope + length * curvature)
            # At a fixed point the slope is zero, up to the sign of a rounding error.
            if slope <= 0 or gain <= _SETTLED * self._tol * largest:
                converged = True
                break
            is_vertex = length == 1.0
            point = vertex if is_vertex else point + length * step
            image = vertex_image if is_vertex else image + length * step_image
            value += gain
            largest = max(largest, abs(value))
        if not is_vertex:  # the sum of gains has their rounding errors
            _, value = self._product_and_form(point)
        return _AscentEnd(value, point, converged)

    def repeat_oracle(self, point: Tensor) -> _AscentEnd:
        """Iterate the oracle from ``point``; return the mean value of the last iterations."""
        values: list[float] = []
        for _ in range(min(_REPEATS, self._max_iter)):
            image, value = self._product_and_form(point)
            values.append(value)
            last, (point, _) = point, self._ball.oracle(image)
        latest = values[-_AVERAGED:]
        mean = sum(latest) / len(latest)
        settled = max(latest) - min(latest) <= _RESTLESS * abs(mean)
        return _AscentEnd(mean, last, settled and len(values) > _AVERAGED)

    def _product_and_form(self, point: Tensor) -> tuple[Tensor, float]:
        """Return the scaled Hessian times ``point``, and the quadratic form at ``point``."""
        image = self._image(point)
        (value,) = self._numbers(self._inner.dot(point, image))
        return image, value

    def _image(self, point: Tensor) -> Tensor:
        """Return the scaled Hessian times ``point``."""
        radii = self._ball.radii
        self.products += 1
        image: Tensor = radii * (self._hessian @ (radii * point))
        return image

    def _numbers(self, *forms: Tensor) -> list[float]:
        """Return forms of the latest product on the host, by one transfer; all must be finite."""
        numbers: list[float] = self._inner.on_host(torch.stack(forms)).tolist()
        if not all(map(math.isfinite, numbers)):
            raise NonFiniteError(
                f"product {self.products} of the generalised sharpness is not finite"
            )
        return numbers
