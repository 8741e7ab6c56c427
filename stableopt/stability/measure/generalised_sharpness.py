r"""`generalised_sharpness`: the sharpness in the norm in which an optimizer descends.

.. math:: S = \max_{N(d)=1} d^\top H d

In the Euclidean norm it is the sharpness :math:`\lambda_{\max}(H)`, in that of a preconditioner
:math:`\lambda_{\max}(PH)`. It limits the steps of sign descent, Lion and Muon (Islamov, Crawshaw,
Cohen & Gower, *Non-Euclidean Gradient Descent Operates at the Edge of Stability*, arXiv:2603.05002).
Two examples::

    generalised_sharpness(problem, UpdateRule.from_optimizer(muon).norm).ratio    # 1 at the edge
    generalised_sharpness(problem, SignNorm(model.parameters(), lr=1e-3))

The maximum is hard to find, and the value at any point of the ball bounds it from below. The search
replaces d by :math:`\mathrm{LMO}(Hd+\alpha d)`, which never lowers :math:`d^\top Hd` once
:math:`H+\alpha I\succeq0`. It starts at :math:`\alpha=0`, and raises :math:`\alpha` where a step would
lower the value, since small shifts have fewer fixed points.

At the edge a run goes back and forth by :math:`\eta d`, with gradients :math:`\pm\tfrac\eta2Hd` at both
ends: d reproduces itself, :math:`d=\mathrm{LMO}(Hd)`, and
:math:`\langle g,d\rangle=\tfrac\eta2d^\top Hd`. With an exact oracle such d are the local maxima. Of
Muon's approximate polar factors, which belong to no norm, they are found by repetition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature import Hessian, NonFiniteError, Operator, Problem
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.rules.norms import StepNorm

__all__ = ["GeneralisedSharpness", "generalised_sharpness", "measured_in_norm"]

_RANDOM_STARTS = 3
"""Random starts in many dimensions: on networks they seldom find more than the gradient's start."""

_FEW, _STARTS_IF_FEW = 16, 64
"""Random starts in up to 16 dimensions, where products are cheap: the maximum over all vectors of signs
was found for 99 of 100 random symmetric matrices of 16 rows, and with 32 starts for 92."""

_LEAST_SHIFT = 1e-12
"""Smallest shift, relative to the curvature along a step that failed."""

_SETTLED = 0.1
"""A start ends at a gain below this share of ``tol``: all later ones are about ten times the last."""


_REPEATS, _AVERAGED = 16, 8
"""Repetitions of an approximate oracle, and how many of the last are averaged: small singular values do
not come to rest, which moves the value by some percent."""

_RESTLESS = 0.25
"""Largest relative spread of these values that counts as converged: their mean is then right to 3 %, had
they been independent."""


@dataclass(frozen=True)
class GeneralisedSharpness:
    r"""The generalised sharpness at one point: at least ``value``.

    Attributes:
        value: the largest :math:`d^\top Hd` found in the unit ball, a bound of S from below. For a norm
            that is not ``exact``, that of the d which reproduces itself, from the gradient's on.
        dual_norm: :math:`\|g\|_\star` of the gradient.
        limit: :math:`2\|g\|_\star/\eta`, the largest S at which a full-batch step without momentum
            lowers the quadratic model of the loss; infinite for a learning rate of 0.
        maximiser: the d that attains ``value``, ``(d,)``.
        products: products with the Hessian.
        converged: whether every start reached its tolerance.
    """

    value: float
    dual_norm: float
    limit: float
    maximiser: Tensor
    products: int
    converged: bool

    @property
    def ratio(self) -> float:
        """Value over limit, Z, at least: 1 at the edge, infinite where the gradient is zero."""
        return self.value / self.limit if self.limit > 0 else float("inf")


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
    :math:`S \le 2\|g\|_\star/\eta`, where full-batch runs without momentum settle. With momentum or
    mini-batches the ratio to the limit is a diagnostic: the momentum's oracle is not the gradient's.

    Args:
        problem: the problem; parameters without a radius in ``norm`` are held fixed.
        norm: the norm in which the optimizer descends, such as ``UpdateRule.from_optimizer(muon).norm``.
        starts: random starts, in addition to the gradient's oracle; by default 3, and 64 in at most 16
            dimensions.
        tol: relative accuracy with which each start follows its ascent.
        max_iter: the largest number of products for each start; the result says if it was not enough.
        seed: seed of the random starts.

    Each start takes about six products for signs, and two dozen for singular values; an approximate
    oracle takes 16 from its only start.

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
    known: Sequence[Tensor] = (),
    starts: int | None = None,
    tol: float,
    max_iter: int,
    seed: int,
) -> GeneralisedSharpness:
    """Search with any operator; ``known`` are maximisers ``(d,)`` to start from.

    ``norm`` is over the operator's parameters, in their order.
    """
    tol, max_iter = positive("tol", tol), whole("max_iter", max_iter)
    ball = _Ball(norm, gradient)
    if starts is None:
        starts = _STARTS_IF_FEW if ball.dimensions <= _FEW else _RANDOM_STARTS
    starts = whole("starts", starts, least=0)
    inner = InnerProduct.for_operator(hessian)
    slope, dual = ball.oracle(ball.radii * gradient)
    if not bool(torch.isfinite(dual)):
        raise NonFiniteError("the gradient is not finite")
    climb = _Climb(hessian, ball, inner, tol, max_iter)
    (size,) = inner.on_host(dual[None]).tolist()
    limit = 2 * size / norm.lr if norm.lr else float("inf")
    if not norm.exact:
        end = climb.repeated(slope)
        maximiser = ball.radii * end.point
        return GeneralisedSharpness(
            end.value, size, limit, maximiser, climb.products, end.converged
        )
    firsts: list[Callable[[], Tensor]] = [lambda: slope]
    firsts += [lambda d=d: ball.oracle(ball.radii * d)[0] for d in known]  # type: ignore[misc]
    firsts += [
        lambda draw=draw: ball.oracle(inner.noise(gradient, seed, draw).vector)[0]  # type: ignore[misc]
        for draw in range(1, starts + 1)
    ]
    found = [climb.from_(first()) for first in firsts]
    best = max(found, key=lambda end: end.value)
    return GeneralisedSharpness(
        value=best.value,
        dual_norm=size,
        limit=limit,
        maximiser=ball.radii * best.point,
        products=climb.products,
        converged=all(end.converged for end in found),
    )


def measured_in_norm(at: Evaluation) -> QuantityResult:
    """Measure the quantity ``"generalised_sharpness"``, with its limit at the present gradient.

    While a run is tracked, searches start at the last maximiser; those that the eigen-solvers start at
    random also have random starts.
    """
    assert at.rule is not None
    assert at.rule.norm is not None
    name, hessian = "generalised_sharpness", at.plain_hessian()
    problem = at.problem
    known = [subspace[0] for subspace in (at.subspaces.get("sharpness"),) if subspace is not None]
    last = (at.starts or {}).get(name)
    found = search(
        hessian,
        problem.gradient(),
        at.rule.norm.over(problem.params),
        known=known if last is None else [*known, last[0]],
        starts=None if last is None else 0,
        tol=at.tol,
        max_iter=at.max_iter,
        seed=at.seed,
    )
    if at.starts is not None:
        at.subspaces[name] = found.maximiser[None]
    # An ascent has no residual.
    measurement = Measurement(found.value, 0.0, found.products, 0.0, found.converged)
    return QuantityResult(value=found.value, limit=found.limit, measurement=measurement)


class _Ball:
    """The unit ball of a norm in flat vectors, in units of the radii: d is ``radii * point``."""

    def __init__(self, norm: StepNorm, like: Tensor) -> None:
        self._norm, self._shapes = norm, [p.shape for p in norm.params]
        self._sizes = [p.numel() for p in norm.params]
        if sum(self._sizes) != len(like):
            raise ValueError(f"norm has {sum(self._sizes)} entries: expected {len(like)}")
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
        found = [self._norm.unit_oracle(part.view(shape)) for part, shape in parts]
        points = torch.cat([point.reshape(-1) for point, _ in found])
        return points, torch.stack([dual.double() for _, dual in found]).sum()


@dataclass(frozen=True)
class _End:
    """Where an ascent ended."""

    value: float
    point: Tensor
    converged: bool


class _Climb:
    """The ascent from one point, with a matrix scaled by the radii on both sides."""

    def __init__(
        self, hessian: Any, ball: _Ball, inner: InnerProduct, tol: float, max_iter: int
    ) -> None:
        self._hessian, self._ball, self._inner = hessian, ball, inner
        self._tol, self._max_iter = tol, max_iter
        self.products = 0

    def from_(self, point: Tensor) -> _End:
        """Climb while the quadratic form rises."""
        image, value = self._form(point)
        shift, spent = 0.0, 1
        while spent < self._max_iter:
            ahead, _ = self._ball.oracle(image + shift * point)
            if bool((ahead == point).all()):
                return _End(value, point, True)
            image_ahead, value_ahead = self._form(ahead)
            spent += 1
            if value_ahead > value:
                gain = value_ahead - value
                point, image, value, shift = ahead, image_ahead, value_ahead, shift / 2
                if gain <= _SETTLED * self._tol * abs(value):
                    return _End(value, point, True)
                continue
            step = ahead - point
            numbers = torch.stack([step @ (image_ahead - image), step @ step])
            bent, square = self._inner.on_host(numbers).tolist()
            if value - value_ahead <= _SETTLED * self._tol * abs(value):
                return _End(value, point, True)
            # Convex along the step once the shift exceeds minus the curvature there.
            shift = max(2 * shift, -bent / square, _LEAST_SHIFT * abs(bent / square))
        return _End(value, point, False)

    def repeated(self, point: Tensor) -> _End:
        """Replace the point by the oracle of its image; return the mean value of the last ones."""
        values: list[float] = []
        for _ in range(min(_REPEATS, self._max_iter)):
            image, value = self._form(point)
            values.append(value)
            last, (point, _) = point, self._ball.oracle(image)
        rest = values[-_AVERAGED:]
        mean = sum(rest) / len(rest)
        still = len(values) > _AVERAGED and max(rest) - min(rest) <= _RESTLESS * abs(mean)
        return _End(mean, last, still)

    def _form(self, point: Tensor) -> tuple[Tensor, float]:
        """Return the product with ``point`` and the quadratic form."""
        radii = self._ball.radii
        image = radii * (self._hessian @ (radii * point))
        self.products += 1
        (value,) = self._inner.on_host(self._inner.dot(point, image)[None]).tolist()
        if not abs(value) < float("inf"):
            raise NonFiniteError(
                f"product {self.products} of the generalised sharpness is not finite"
            )
        return image, value
