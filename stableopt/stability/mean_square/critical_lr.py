r"""`critical_lr` and `critical_batch_size`: the steps with which SGD stays at a minimum.

The criterion is exact linear stability in mean square in any number of dimensions, for which Theorem 1
of Wu, Ma & E (2018) is only sufficient: that of Mulayoff & Michaeli (*Exact mean square linear stability
analysis for SGD*, COLT 2024), extended to every form of ``torch.optim.SGD``. Three examples::

    critical_lr(model, loss_fn, data, batch_size=4).value
    critical_lr(problem, 4, update_rule=UpdateRule(lr=1.0, momentum=0.9)).bracket
    critical_batch_size(problem, lr=0.1)

Where every sample is fitted its Hessian is its Gauss–Newton matrix, on whose rows the threshold is
cheap; elsewhere the samples' own Hessians are used (:func:`curvature_of` decides by a measurement).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from stableopt._support.arguments import positive, whole
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
from stableopt.stability.rules.coordinates import as_seen_by, problem_of
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["CriticalLR", "critical_batch_size", "critical_lr"]

T = TypeVar("T", int, float)

MAX_ROWS = 2048
"""Rows nC up to which all directions are used: some twenty products of 4 (nC)^3 operations."""

_SHARES = 2
"""Residual shares by which the lower end falls short of that of Gauss–Newton matrices. The threshold's
own error was at most 1.3 of them at 242 minima of small networks."""

_ON_THE_EDGE = 1e-6
"""Relative tolerance for rounding in the comparison of a learning rate with an edge."""


@dataclass(frozen=True)
class CriticalLR:
    r"""The largest learning rate at which a minimum is linearly stable in mean square.

    Attributes:
        value: :math:`\eta^*` if ``exact``, else an upper bound; above it some second moment grows. A
            search that did not converge returns a value that is too large. Infinity if no sample has
            curvature.
        lower: a learning rate up to which no second moment grows; 0 if none is known. Gauss–Newton
            matrices show it for themselves alone; for the loss it is less by twice ``residual_share``,
            an allowance that is measured and not proven. If not all directions were used it may rest
            on an eigen-solver's ``upper_bound``, which fails with a probability of at most 0.2 %.
        theorem1: the largest learning rate that the sufficient condition (8) of Wu, Ma & E allows;
            ``None`` with momentum, which it does not cover, and with too many directions.
        full_batch: the largest learning rate without noise in the directions of positive curvature,
            :math:`2/(a+\lambda)` for plain SGD; an upper bound if not all directions were used.
        sharpness: :math:`\lambda_{\max}` of the mean of the matrices that ``hessians`` names; with
            leading directions only, never above it.
        hessian_sharpness: :math:`\lambda_{\max}` of the Hessian, or ``None`` if not measured.
        exact: whether all directions of the matrices that ``hessians`` names were used, and
            ``obstacle`` is ``None``.
        converged: whether the search reached its tolerance.
        residual: residual of the last eigen-solve, relative to the eigenvalue.
        products: products in the eigen-solves.
        hessians: ``"true"`` or ``"gauss-newton"``, the matrices for which all of this holds.
        residual_share: the part of the samples' Hessians that is not Gauss–Newton
            (:func:`~stableopt.curvature.per_sample.blocks.residual_share`); ``None`` if not measured.
        obstacle: why no learning rate at all is stable, or ``None``: the Hessian has negative curvature,
            or samples have curvature where their mean has none. ``value`` is then the bound that the
            directions of positive curvature set, and ``lower`` is 0.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    >>> found = critical_lr(DualCurvature(rows @ rows.T, 3), batch_size=1)
    >>> round(found.value, 5), round(found.theorem1, 5), round(found.full_batch, 5)
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
        """A stable learning rate, or 0 if none is known, and one above which all are unstable."""
        return self.lower, self.value


@renamed_keywords(problem="model")
def critical_lr(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | int | None = None,
    data: Any = None,
    batch_size: int | None = None,
    *,
    update_rule: UpdateRule | None = None,
    dataset_size: int | None = None,
    max_rows: int = MAX_ROWS,
    directions: int = 32,
    with_hessian: bool = True,
    hessians: Choice = "auto",
    tol: float = 1e-4,
    max_iter: int = 200,
    seed: int = 0,
) -> CriticalLR:
    r"""Return the largest learning rate at which SGD can stay, :math:`\eta^*`.

    At :math:`\eta^*` the recursion of the second moments has the largest eigenvalue 1; for plain SGD

    .. math:: E[(I-\eta H_B)X(I-\eta H_B)] = X - \eta(HX+XH) + \eta^2(1-p)HXH
        + \tfrac{\eta^2p}{n}\sum_i H_iXH_i,

    and with momentum it is the recursion of the pair (weight, buffer). :math:`\eta^*` never falls as B
    grows. Where all samples are fitted :math:`H_i` is the Gauss–Newton matrix :math:`J_i^\top L_iJ_i`,
    whose rows make the threshold exact for any number of parameters. Elsewhere the samples' own
    Hessians are used, and the threshold is exact up to
    :data:`~stableopt.stability.mean_square.hessian_curvature.MAX_PARAMETERS` parameters; with more,
    ``value`` is an upper bound. Where the Hessian has negative curvature no learning rate is stable, as
    ``obstacle`` then says. Coupled weight decay adds :math:`\lambda` to every curvature.

    Args:
        model: the model, at the point in question; or, for ``model``, ``loss_fn`` and ``data``, a
            :class:`~stableopt.curvature.Problem` in the rule's coordinates or its
            :class:`~stableopt.curvature.DualCurvature`.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        batch_size: samples B in a step, drawn without replacement; ``None`` for the full batch. After
            a problem it is the second argument: ``critical_lr(problem, 4)``.
        update_rule: momentum, dampening, Nesterov's form and weight decay; its ``lr`` is ignored.
            Plain SGD by default.
        dataset_size: samples in the training set, if ``data`` is only a part of it.
        max_rows: rows nC up to which all directions of Gauss–Newton matrices are used. Above it, only
            the leading ones of the mean curvature and, without momentum, of the samples' differences
            are used; ``exact`` is then false and ``value`` an upper bound, which depends on ``seed``.
            With Nesterov's momentum it is then that of the full batch.
        directions: the number of leading directions of each kind.
        with_hessian: whether to measure ``hessian_sharpness`` for comparison.
        hessians: ``"true"``, the samples' own Hessians; ``"gauss-newton"``, their Gauss–Newton matrices,
            whose threshold is not that of the loss unless all samples are fitted; or ``"auto"``,
            Gauss–Newton if ``residual_share`` is at most
            :data:`~stableopt.stability.mean_square.choice.FITTED`.
        tol: the largest residual at the crossing, relative to the eigenvalue; the error of the
            result is about its square.
        max_iter: the largest number of products.
        seed: seed of the eigen-solver.

    Raises:
        ValueError: for arguments out of range; with Gauss–Newton matrices, for a loss that is not convex
            in the outputs; for weight decay that differs between directions, since the modes then
            differ from those of H.
        TypeError: for a model that does not return one tensor.
        NonFiniteError: if the curvature is not finite.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False).double()    # H_i = 2 and 8: 2 a / (a^2 + s^2)
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> data = x, torch.zeros(2, 1).double()
    >>> round(critical_lr(model, torch.nn.MSELoss(), data, batch_size=1).value, 6)
    0.294118
    """
    problem, batch_size = problem_and(batch_size, model, loss_fn, data, update_rule)
    step = step_of(problem, update_rule)
    tol, max_iter, seed = positive("tol", tol), whole("max_iter", max_iter), _seed(seed)
    size = _dataset_size(problem, dataset_size)
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
    found = threshold(curvature, step, noise, share=share, tol=tol, max_iter=max_iter, seed=seed)
    return replace(found, hessian_sharpness=hessian_sharpness)


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

    ``noise`` is p of (8), and ``share`` what Gauss–Newton matrices lack of the Hessians, if measured.
    """
    edge = step.max_lr(curvature.sharpness)
    obstacle = curvature.obstacle(noise)
    theorem1 = curvature.theorem1_lr(noise, step) if step.momentum == 0 else None
    found = Crossing(edge, edge, 0.0, 0, converged=True)
    if noise > 0 and not curvature.empty:
        own = curvature.in_modes(step)
        families = curvature.families(
            lambda lr, h, other: mode_weights(h, other, replace(own, lr=lr)) + noise * h * other,
            lambda lr: noise,
            edge,
            step,
        )
        found = _first(families, found, tol=tol, max_iter=max_iter, seed=seed)
    certain = curvature.certain_lr(noise, step, found)
    value = found.value
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
        converged=found.converged,
        residual=found.residual,
        products=found.products,
        hessians=curvature.hessians,
        residual_share=share,
        obstacle=obstacle,
    )


def _first(
    families: Sequence[Family], known: Crossing, *, tol: float, max_iter: int, seed: int
) -> Crossing:
    """Return the first of the families' crossings, or what is known without them."""
    found = [first_crossing(each, tol=tol, max_iter=max_iter, seed=seed) for each in families]
    if not found:
        return replace(known, lower=0.0)
    best = min(found, key=lambda crossing: crossing.value)
    return replace(best, products=sum(crossing.products for crossing in found))


@renamed_keywords(problem="model")
def critical_batch_size(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | float | None = None,
    data: Any = None,
    lr: float | None = None,
    *,
    update_rule: UpdateRule | None = None,
    dataset_size: int | None = None,
    max_rows: int = MAX_ROWS,
    directions: int = 32,
    hessians: Choice = "auto",
    tol: float = 1e-4,
    max_iter: int = 200,
    seed: int = 0,
) -> int | None:
    r"""Return the smallest batch size with which SGD can stay at the learning rate ``lr``.

    It is the smallest B whose :func:`critical_lr` is at least ``lr``. One search finds the largest
    noise p that is stable at ``lr``, which gives :math:`B = \lceil n/(1+p(n-1))\rceil`.

    Args:
        model: as for :func:`critical_lr`, like ``loss_fn``, ``data`` and all keywords.
        loss_fn: the loss.
        data: the samples.
        lr: the learning rate; that of ``update_rule`` is ignored. After a problem it is the second
            argument: ``critical_batch_size(problem, 0.1)``.
        update_rule: the rule.
        dataset_size: samples n in the training set.
        max_rows: rows nC up to which all directions are used.
        directions: the number of leading directions above that.
        hessians: the matrices, as for :func:`critical_lr`.
        tol: the largest relative residual.
        max_iter: the largest number of products.
        seed: seed of the eigen-solver.

    Returns:
        A number from 1 to n; ``None`` if even the full batch is unstable: either ``lr`` is too large, or
        the Hessian has negative curvature, where no learning rate is stable.
        ``critical_lr(...).obstacle`` tells them apart: it is ``None`` in the first case, and the reason
        in the second. If not all directions are used, a lower bound.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`critical_lr`.

    >>> import torch
    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    >>> dual = DualCurvature(rows @ rows.T, 3)
    >>> [critical_batch_size(dual, lr) for lr in (1.1, 1.2, 1.9, 2.1)]
    [1, 2, 3, None]
    """
    problem, lr = problem_and(lr, model, loss_fn, data, update_rule)
    lr, step = positive("lr", lr), step_of(problem, update_rule)
    tol, max_iter, seed = positive("tol", tol), whole("max_iter", max_iter), _seed(seed)
    size = _dataset_size(problem, dataset_size)
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
    own = curvature.in_modes(step)
    families = curvature.families(
        lambda noise, h, other: mode_weights(h, other, replace(own, lr=lr)) + noise * h * other,
        lambda noise: noise,
        1.0,
        step,
    )
    everything = Crossing(1.0, 1.0, 0.0, 0, converged=True)
    largest = _first(families, everything, tol=tol, max_iter=max_iter, seed=seed).value
    smallest = size / (1 + largest * (size - 1))
    return min(max(math.ceil(smallest * (1 - _ON_THE_EDGE)), 1), size)


def problem_and(
    number: T | None,
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Any,
    data: Any,
    rule: UpdateRule | None,
) -> tuple[Problem | DualCurvature, T | None]:
    """Return the problem, and ``number``, which after a problem is the second argument."""
    given = isinstance(model, (MeanLoss, DualCurvature))
    if given and number is None and not callable(loss_fn):
        loss_fn, number = None, loss_fn
    if isinstance(model, DualCurvature):
        if loss_fn is not None or data is not None:
            raise ValueError("a DualCurvature has its own loss_fn, data: leave them out")
        return model, number
    problem = require_samples(problem_of(model, loss_fn, data), "a Gauss–Newton matrix of samples")
    return (problem if given or rule is None else as_seen_by(problem, rule, ())), number


def _seed(seed: int) -> int:
    return whole("seed", seed, least=0)


def _dataset_size(problem: Problem | DualCurvature, dataset_size: int | None) -> int:
    given = problem.num_samples
    if dataset_size is None:
        return given
    size = whole("dataset_size", dataset_size)
    if size < given:
        raise ValueError(f"dataset_size={size}: expected at least the {given} samples given")
    return size
