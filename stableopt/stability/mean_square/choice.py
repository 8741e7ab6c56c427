"""`curvature_of`: the choice between Hessians and Gauss–Newton matrices; `step_of`: the linear step."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from stableopt._support.arguments import shown
from stableopt._support.tensors import as_tensor
from stableopt.curvature import Hessian, Problem, top_eigenpair
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.gram.gram import DualCurvature, count_outputs
from stableopt.curvature.gram.jacobian import check_outputs
from stableopt.curvature.per_sample.blocks import residual_share
from stableopt.stability.mean_square.hessian_curvature import (
    MAX_PARAMETERS,
    HessianCurvature,
    few_entries,
)
from stableopt.stability.mean_square.sample_curvature import SampleCurvature
from stableopt.stability.rules.filters import momentum_of
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["FITTED", "Choice", "curvature_of", "step_of"]

Choice = Literal["auto", "true", "gauss-newton"]

FITTED = 1.2e-2
r"""Largest residual share of samples that count as fitted.

48 minima of digits at losses of 3e-5 have shares of 0.002 to 0.011, with an MLP or a CNN; at 1e-3 they
have 0.017 and more. A small share does not bound the error of the Gauss–Newton threshold, since
residual parts decide along directions with hardly any curvature of the outputs: at 10 of 18 minima of
small networks with shares up to 0.01 the true threshold is lower, up to 12 times. What the share bounds
is how fast these directions grow: their second moment by about
:math:`\eta^2\lambda_{\max}(\frac1n\sum_i R_i^2)` per step, at most 2e-4 at the 18 minima just below the
Gauss–Newton threshold."""

_ROUNDING = 1e-9
"""Residual share up to which small problems use Gauss–Newton matrices: the Hessians would agree."""

_LOOSE = 1e-2
"""Relative residual of the eigen-solve for a direction of large curvature."""


def curvature_of(
    problem: Problem | DualCurvature,
    hessians: Choice,
    step: LinearStep,
    *,
    max_rows: int,
    directions: int,
    seed: int,
    differences: bool | None = None,
) -> tuple[SampleCurvature | HessianCurvature, float | None]:
    """Return the curvature on which a threshold is based, and the residual share if it was measured.

    The choice depends on the samples' Hessians, not on the loss: residuals are multiplied by the
    curvature of the outputs, and these products may cancel in the mean over samples.

    Raises:
        ValueError: for an unknown choice, or true Hessians of a ``DualCurvature``, which has none.
    """
    if hessians not in get_args(Choice):
        raise ValueError(f"hessians={hessians!r}: expected one of {get_args(Choice)}")
    share = None
    if isinstance(problem, Problem):
        check_outputs(problem)
        count_outputs(problem)  # raises unless the output is one tensor with a row for each sample
    elif hessians == "true":
        raise ValueError("hessians='true': expected a Problem; a DualCurvature is Gauss–Newton")
    if isinstance(problem, Problem) and hessians != "gauss-newton":
        share = _share(problem, seed)
        use_hessians = hessians == "true" or share > FITTED
        if use_hessians or (share > _ROUNDING and few_entries(problem)):
            curvature = HessianCurvature.from_problem(
                problem, weight_decay=step.weight_decay, directions=directions, seed=seed
            )
            # If samples are nearly fitted, directions without curvature have a tiny curvature of
            # either sign. A negative one takes many steps to matter, so it is not an obstacle.
            if use_hessians or curvature.obstacle(1.0) is None:
                return curvature, share
    return SampleCurvature.from_problem(
        problem,
        max_rows=max_rows,
        directions=directions,
        differences=step.momentum == 0 if differences is None else differences,
        seed=seed,
    ), share


def _share(problem: Problem, seed: int) -> float:
    """Return the residual share of the samples.

    A small problem takes all directions. Otherwise the samples' curvature is that along the top
    eigenvector, and the search for the largest residual parts starts from it and a random vector, which
    has a component along every eigenvector.
    """
    d = problem.num_params
    if d <= MAX_PARAMETERS:
        return residual_share(problem, torch.eye(d, dtype=problem.dtype, device=problem.device))
    hessian = Hessian(problem.without_weight_decay())
    top = top_eigenpair(hessian, tol=_LOOSE, seed=seed).vector
    noise = InnerProduct.for_operator(hessian).noise(hessian, seed).covector
    return residual_share(problem, top.unsqueeze(1), start=top + noise)


def step_of(problem: Problem | DualCurvature, rule: UpdateRule | None) -> LinearStep:
    """Return the rule's coefficients, with the weight decay of the problem's coordinates.

    Raises:
        TypeError: for anything but an ``UpdateRule`` or ``None``.
        ValueError: unless the step is that of ``torch.optim.SGD`` in the problem's coordinates.
    """
    rule = UpdateRule(lr=1.0) if rule is None else rule
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"update_rule={shown(rule)}: expected an UpdateRule")
    # The problem's coordinates already include a preconditioned rule's weight decay.
    decay = rule.linear_step.weight_decay
    form = (
        momentum_of(rule.filter) if rule.filter else (rule.momentum, rule.dampening, rule.nesterov)
    )
    if form is None or not rule.noise_known:
        settings = {"filter": rule.filter, "lookahead": rule.lookahead, "ascent": rule.ascent}
        given = ", ".join(f"{name}={value}" for name, value in settings.items() if value)
        raise ValueError(
            f"update_rule has {given}: expected the step of torch.optim.SGD, whose second moments are"
            " known in several dimensions; for a filter in one dimension, use max_non_uniformity or"
            " mean_square_radius"
        )
    step = LinearStep(1.0, *form, decay)
    if rule.decoupled_weight_decay or (rule.momentum and rule.momentum_share != 1):
        raise ValueError(
            f"update_rule={rule}: expected the step of torch.optim.SGD, whose second moments are known"
        )
    if not isinstance(problem, Problem):
        return step
    if rule.maximize != (problem.sign < 0):
        raise ValueError(
            f"update_rule has maximize={rule.maximize}, but problem has sign={problem.sign}; pass"
            " problem.transformed(sign=...)"
        )
    unscaled = all(isinstance(factor, float) and factor == 1.0 for factor in problem.scale)
    p = rule.preconditioner
    if p is not None and (unscaled or not p.diagonal or rule.unknown is not None):
        raise ValueError(
            f"update_rule has the preconditioner {p}: expected a known diagonal one, and the problem in"
            " its coordinates, problem.transformed(scale=roots of its entries)"
        )
    undecayed = any(rule.group_weight_decays) and not problem.coordinates.decays
    if (rule.group_lrs and unscaled) or undecayed:
        raise ValueError(
            "update_rule has several groups: expected the problem in coordinates with one learning rate"
            " for all, problem.transformed(scale=, weight_decay=)"
        )
    return replace(step, weight_decay=decay + _shared_decay(problem))


def _shared_decay(problem: Problem) -> float:
    """Return the number that the problem's weight decay adds to every curvature."""
    if not problem.coordinates.decays:
        return 0.0
    added = [
        decay * as_tensor(factor, dtype=torch.float64) ** 2
        for decay, factor in zip(problem.weight_decay, problem.scale, strict=True)
    ]
    smallest = min(float(term.min()) for term in added)
    largest = max(float(term.max()) for term in added)
    if largest - smallest > 1e-9 * abs(largest):
        raise ValueError(
            f"weight decay adds from {smallest:.6g} to {largest:.6g} to the curvature of different"
            " parameters: expected one number for all, since otherwise the modes of the second moments"
            " differ from those of H"
        )
    return largest
