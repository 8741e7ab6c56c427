r"""`critical_lr`, `critical_batch_size`: the largest stable learning rate, the smallest stable batch.

The criterion is exact mean-square linear stability in any number of dimensions. Theorem 1 of Wu, Ma & E
(2018) is a sufficient condition for it. For plain SGD the criterion is due to Mulayoff & Michaeli
(*Exact mean square linear stability analysis for SGD*, COLT 2024). Here it covers every form of
``torch.optim.SGD``. Three examples::

    critical_lr(model, loss_fn, data, batch_size=4).value
    critical_lr(problem, 4, update_rule=UpdateRule(lr=1.0, momentum=0.9)).bracket
    critical_batch_size(problem, lr=0.1)

The Hessian of a fitted sample is its Gauss–Newton matrix, whose low rank makes the threshold cheap. If
samples are not fitted, their own Hessians are used; :func:`curvature_of` decides by a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from stableopt._support.arguments import finite_size, positive, whole
from stableopt._support.deprecation import renamed_keywords
from stableopt.curvature import Hessian, Problem, top_eigenpair
from stableopt.curvature.gram.gram import DualCurvature
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.mean_square.choice import Choice, curvature_of, step_of
from stableopt.stability.mean_square.crossing import Crossing, Family, first_crossing
from stableopt.stability.mean_square.hessian_curvature import HessianCurvature
from stableopt.stability.mean_square.sample_curvature import SampleCurvature
from stableopt.stability.mean_square.second_moments import mode_weights
from stableopt.stability.rules.coordinates import in_rule_coordinates, problem_of
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["CriticalLR", "critical_batch_size", "critical_lr"]

T = TypeVar("T", int, float)

MAX_ROWS = 2048
"""Rows nC up to which all directions are used: about twenty products of 4 (nC)^3 operations."""

_SHARES = 2
"""Residual shares by which the lower bound of Gauss–Newton matrices is reduced. It allows for errors
along directions with curvature of their own; for others see
:data:`~stableopt.stability.mean_square.choice.FITTED`."""

_ON_THE_EDGE = 1e-6
"""Relative rounding error up to which a learning rate equals a limit."""


@dataclass(frozen=True)
class CriticalLR:
    r"""The largest learning rate at which a minimum is linearly stable in mean square.

    Attributes:
        value: :math:`\eta^*` if ``exact``, else an upper bound: above it some second moment grows. If
            the search did not converge, ``value`` is too large. Infinity if no sample has curvature.
        lower: a learning rate up to which no second moment grows; 0 if none is known. With Gauss–Newton
            matrices it is reduced by twice ``residual_share``, an allowance for the true Hessians that
            is measured, not proven, and does not cover slow growth along directions with hardly any
            curvature. If not all directions were used it may rest on an eigen-solver's
            ``upper_bound``, which fails with a probability of at most 0.2 %.
        theorem1: the largest learning rate that the sufficient condition (8) of Wu, Ma & E allows;
            ``None`` with momentum, which it does not cover, and with too many directions.
        full_batch: the largest stable learning rate without noise, over directions of positive
            curvature: :math:`2/(a+\lambda)` for plain SGD. An upper bound if not all directions were
            used.
        sharpness: :math:`\lambda_{\max}` of the mean of the matrices that ``hessians`` names; a lower
            bound of it if only leading directions were used.
        hessian_sharpness: :math:`\lambda_{\max}` of the Hessian, or ``None`` if not measured.
        exact: whether all directions of the matrices that ``hessians`` names were used, and
            ``obstacle`` is ``None``.
        converged: whether the search reached its tolerance.
        residual: residual of the last eigen-solve, relative to the eigenvalue.
        products: products in the eigen-solves.
        hessians: ``"true"`` or ``"gauss-newton"``, the matrices of all results.
        residual_share: the part of the samples' Hessians that is not Gauss–Newton
            (:func:`~stableopt.curvature.per_sample.blocks.residual_share`); ``None`` if not measured.
        obstacle: why no learning rate is stable, or ``None``. Either the Hessian has negative curvature,
            or samples have curvature along a direction in which their mean has none. ``value`` is then
            the limit from the directions of positive curvature, and ``lower`` is 0.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    >>> result = critical_lr(DualCurvature(rows @ rows.T, 3), batch_size=1)
    >>> round(result.value, 5), round(result.theorem1, 5), round(result.full_batch, 5)
    (1.10102, 1.0, 2.0)
    """

    value: float
    lower: float
    theorem1: float | None
    full_batch: float
    sharpness: float
    hessian_sharpness: float | None
    exact: bool
    converged: bool
    residual: float
    products: int
    hessians: str = "gauss-newton"
    residual_share: float | None = None
    obstacle: str | None = None

    @property
    def bracket(self) -> tuple[float, float]:
        """``(lower, value)``: a stable learning rate or 0, and one above which all are unstable."""
        return self.lower, self.value


@renamed_keywords(problem="model")
def critical_lr(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | int | None = None,
    data: Any = None,
    batch_size: int | None = None,
    *,
    update_rule: UpdateRule | None = None,
    dataset_size: float | None = None,
    max_rows: int = MAX_ROWS,
    directions: int = 32,
    with_hessian: bool = True,
    hessians: Choice = "auto",
    tol: float = 1e-4,
    max_iter: int = 200,
    seed: int = 0,
) -> CriticalLR:
    r"""Return the largest learning rate at which SGD stays at a minimum, :math:`\eta^*`.

    At :math:`\eta^*` the recursion of second moments has the largest eigenvalue 1. For plain SGD it is

    .. math:: E[(I-\eta H_B)X(I-\eta H_B)] = X - \eta(HX+XH) + \eta^2(1-p)HXH
        + \tfrac{\eta^2p}{n}\sum_i H_iXH_i.

    With momentum the recursion is that of the pair (weight, buffer). :math:`\eta^*` never falls as B
    grows. If all samples are fitted, :math:`H_i` is the Gauss–Newton matrix :math:`J_i^\top L_iJ_i`,
    whose low rank makes the threshold exact for any number of parameters. Otherwise the samples' own
    Hessians are used. The threshold is then exact up to
    :data:`~stableopt.stability.mean_square.hessian_curvature.MAX_PARAMETERS` parameters, and ``value``
    is an upper bound with more. Under negative curvature of the Hessian no learning rate is stable, and
    ``obstacle`` says so. Coupled weight decay adds :math:`\lambda` to every curvature.

    Args:
        model: the model, at the point in question. Instead of ``model``, ``loss_fn`` and ``data``, a
            :class:`~stableopt.curvature.Problem` in the rule's coordinates, or its
            :class:`~stableopt.curvature.DualCurvature`.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        batch_size: samples B in a step, drawn without replacement; ``None`` for the full batch. After
            a problem it is the second argument: ``critical_lr(problem, 4)``.
        update_rule: momentum, dampening, Nesterov's form and weight decay; its ``lr`` is ignored.
            Plain SGD by default.
        dataset_size: samples in the training set, if ``data`` is only a part of it; ``math.inf`` for an
            endless stream.
        max_rows: rows nC up to which all directions of Gauss–Newton matrices are used. Above it, only
            leading directions of the mean curvature and, without momentum, of :math:`\Sigma` are used.
            ``exact`` is then false, and ``value`` an upper bound that depends on ``seed``; with
            Nesterov's momentum it is ``full_batch``.
        directions: the number of leading directions of each matrix.
        with_hessian: whether to measure ``hessian_sharpness`` for comparison.
        hessians: ``"true"``, the samples' own Hessians; ``"gauss-newton"``, their Gauss–Newton matrices,
            whose threshold equals that of the loss only if all samples are fitted; or ``"auto"``,
            Gauss–Newton if ``residual_share`` is at most
            :data:`~stableopt.stability.mean_square.choice.FITTED`.
        tol: the largest residual at the crossing, relative to the eigenvalue; the error of the
            result is about its square.
        max_iter: the largest number of products.
        seed: seed of the eigen-solver.

    Raises:
        ValueError: for arguments out of range; for weight decay that differs between directions, since
            the modes then differ from those of H; with Gauss–Newton matrices, for a loss that is not
            convex in the outputs.
        TypeError: for a model that does not return one tensor.
        NonFiniteError: if the curvature is not finite.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False).double()    # H_i = 2 and 8: 2 a / (a^2 + s^2)
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> data = x, torch.zeros(2, 1).double()
    >>> round(critical_lr(model, torch.nn.MSELoss(), data, batch_size=1).value, 6)
    0.294118
    """
    problem, batch_size = problem_and_number(batch_size, model, loss_fn, data, update_rule)
    step = step_of(problem, update_rule)
    tol, max_iter, seed = positive("tol", tol), whole("max_iter", max_iter), _seed(seed)
    size = finite_size(dataset_size, problem.num_samples, least=problem.num_samples)
    noise = 0.0 if batch_size is None else noise_factor(batch_size, size)
    curvature, share = curvature_of(
        problem,
        hessians,
        step,
        max_rows=whole("max_rows", max_rows),
        directions=whole("directions", directions),
        seed=seed,
    )
    hessian_sharpness = None
    if with_hessian and isinstance(problem, Problem):
        without_decay = problem.without_weight_decay()
        hessian_sharpness = top_eigenpair(Hessian(without_decay), tol=1e-2, seed=seed).value
    result = threshold(curvature, step, noise, share=share, tol=tol, max_iter=max_iter, seed=seed)
    return replace(result, hessian_sharpness=hessian_sharpness)


def threshold(
    curvature: SampleCurvature | HessianCurvature,
    step: LinearStep,
    noise: float,
    *,
    share: float | None = None,
    tol: float = 1e-4,
    max_iter: int = 200,
    seed: int = 0,
) -> CriticalLR:
    """Return the critical learning rate from known curvature.

    ``noise`` is p of (8), and ``share`` the residual share, if measured.
    """
    edge = step.max_lr(curvature.sharpness)
    obstacle = curvature.obstacle(noise)
    theorem1 = curvature.theorem1_lr(noise, step) if step.momentum == 0 else None
    crossing = Crossing(edge, edge, 0.0, 0, converged=True)
    if noise > 0 and not curvature.empty:
        mode_step = curvature.in_modes(step)

        def weights(lr: float, h: Tensor, other: Tensor) -> Tensor:
            return mode_weights(h, other, replace(mode_step, lr=lr)) + noise * h * other

        families = curvature.families(weights, lambda lr: noise, edge, step)
        crossing = _first(families, crossing, tol=tol, max_iter=max_iter, seed=seed)
    certain = curvature.certain_lr(noise, step, crossing)
    value = crossing.value
    if isinstance(curvature, SampleCurvature):
        value = min(value, curvature.bulk_lr(noise, step))
    lower = min(max(certain, theorem1 or 0.0), value)
    if share is not None and curvature.hessians == "gauss-newton":
        lower *= max(0.0, 1 - _SHARES * share)
    return CriticalLR(
        value=value,
        lower=lower,
        theorem1=theorem1,
        full_batch=edge,
        sharpness=curvature.sharpness,
        hessian_sharpness=None,
        exact=curvature.exact and obstacle is None,
        converged=crossing.converged,
        residual=crossing.residual,
        products=crossing.products,
        hessians=curvature.hessians,
        residual_share=share,
        obstacle=obstacle,
    )


def _first(
    families: Sequence[Family], limit: Crossing, *, tol: float, max_iter: int, seed: int
) -> Crossing:
    """Return the first of the families' crossings, or ``limit`` without families."""
    crossings = [
        first_crossing(family, tol=tol, max_iter=max_iter, seed=seed) for family in families
    ]
    if not crossings:
        return replace(limit, lower=0.0)
    first = min(crossings, key=lambda crossing: crossing.value)
    return replace(first, products=sum(crossing.products for crossing in crossings))


@renamed_keywords(problem="model")
def critical_batch_size(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | float | None = None,
    data: Any = None,
    lr: float | None = None,
    *,
    update_rule: UpdateRule | None = None,
    dataset_size: float | None = None,
    max_rows: int = MAX_ROWS,
    directions: int = 32,
    hessians: Choice = "auto",
    tol: float = 1e-4,
    max_iter: int = 200,
    seed: int = 0,
) -> int | None:
    r"""Return the smallest batch size at which SGD with the learning rate ``lr`` stays at a minimum.

    It is the smallest B whose :func:`critical_lr` is at least ``lr``. One search finds the largest
    noise p that is stable at ``lr``, and :math:`B = \lceil n/(1+p(n-1))\rceil`.

    Args:
        model: as for :func:`critical_lr`, like ``loss_fn``, ``data`` and all keywords.
        loss_fn: the loss.
        data: the samples.
        lr: the learning rate; that of ``update_rule`` is ignored. After a problem it is the second
            argument: ``critical_batch_size(problem, 0.1)``.
        update_rule: the rule.
        dataset_size: samples n in the training set, or ``math.inf``.
        max_rows: rows nC up to which all directions are used.
        directions: the number of leading directions above that.
        hessians: the matrices, as for :func:`critical_lr`.
        tol: the largest relative residual.
        max_iter: the largest number of products.
        seed: seed of the eigen-solver.

    Returns:
        A number from 1 to n; a lower bound if not all directions are used. ``None`` if every batch size
        is unstable: either ``lr`` is too large, or the Hessian has negative curvature.
        ``critical_lr(...).obstacle`` is ``None`` in the first case, and the reason in the second.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`critical_lr`.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    >>> dual = DualCurvature(rows @ rows.T, 3)
    >>> [critical_batch_size(dual, lr) for lr in (1.1, 1.2, 1.9, 2.1)]
    [1, 2, 3, None]
    """
    problem, lr = problem_and_number(lr, model, loss_fn, data, update_rule)
    lr, step = positive("lr", lr), step_of(problem, update_rule)
    tol, max_iter, seed = positive("tol", tol), whole("max_iter", max_iter), _seed(seed)
    size = finite_size(dataset_size, problem.num_samples, least=problem.num_samples)
    curvature, _ = curvature_of(
        problem,
        hessians,
        step,
        max_rows=whole("max_rows", max_rows),
        directions=whole("directions", directions),
        seed=seed,
    )
    edge = step.max_lr(curvature.sharpness)
    if lr > edge * (1 + _ON_THE_EDGE) or curvature.obstacle(0.0) is not None:
        return None
    if lr >= edge * (1 - _ON_THE_EDGE) or curvature.obstacle(1.0) is not None:
        return size
    if curvature.empty:
        return 1
    mode_step = replace(curvature.in_modes(step), lr=lr)

    def weights(noise: float, h: Tensor, other: Tensor) -> Tensor:
        return mode_weights(h, other, mode_step) + noise * h * other

    families = curvature.families(weights, lambda noise: noise, 1.0, step)
    full_noise = Crossing(1.0, 1.0, 0.0, 0, converged=True)
    max_noise = _first(families, full_noise, tol=tol, max_iter=max_iter, seed=seed).value
    min_batch = 1 / max_noise if size is None else size / (1 + max_noise * (size - 1))
    batch_size = max(math.ceil(min_batch * (1 - _ON_THE_EDGE)), 1)
    return batch_size if size is None else min(batch_size, size)


def problem_and_number(
    number: T | None,
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Any,
    data: Any,
    rule: UpdateRule | None,
) -> tuple[Problem | DualCurvature, T | None]:
    """Return the problem in the rule's coordinates, and ``number``.

    After a problem ``number`` is the second argument, in the place of ``loss_fn``.
    """
    has_problem = isinstance(model, (MeanLoss, DualCurvature))
    if has_problem and number is None and not callable(loss_fn):
        number, loss_fn = loss_fn, None
    if isinstance(model, DualCurvature):
        if loss_fn is not None or data is not None:
            raise ValueError("a DualCurvature has its own loss_fn and data: leave them out")
        return model, number
    problem = require_samples(problem_of(model, loss_fn, data), "a Gauss–Newton matrix of samples")
    if not has_problem and rule is not None:
        problem = in_rule_coordinates(problem, rule, ())
    return problem, number


def _seed(seed: int) -> int:
    return whole("seed", seed, least=0)
