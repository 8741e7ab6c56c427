"""`curvature_of`: the matrices on which a threshold is based; `step_of`: its step."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

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

FITTED = 4e-3
"""Largest part of the samples' Hessians that is not Gauss–Newton for samples that count as fitted. At
242 minima of small networks the threshold's own error was at most 1.3 times the part."""

_ROUNDING = 1e-9
"""Part up to which true Hessians, where they are few, would change nothing."""

_LOOSE = 1e-2
"""Relative residual of a direction of large curvature."""


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

    Whether samples are fitted shows in their Hessians, not in the loss: residuals matter as much as the
    curvature of the outputs that they multiply, and cancel in the mean but not between samples.

    Raises:
        ValueError: for an unknown choice, or true Hessians of a ``DualCurvature``, which has none.
    """
    if hessians not in get_args(Choice):
        raise ValueError(f"hessians={hessians!r}: expected one of {get_args(Choice)}")
    share = None
    if isinstance(problem, Problem):
        check_outputs(problem)
        # Also raises for outputs that are not one tensor with a row for each sample.
        count_outputs(problem)
    elif hessians == "true":
        raise ValueError("hessians='true': expected a Problem; a DualCurvature is Gauss–Newton")
    if isinstance(problem, Problem) and hessians != "gauss-newton":
        share = residual_share(problem, _probes(problem, seed))
        if hessians == "true" or share > FITTED or (share > _ROUNDING and few_entries(problem)):
            own = HessianCurvature.from_problem(
                problem, weight_decay=step.weight_decay, directions=directions, seed=seed
            )
            # Of samples that are nearly fitted, directions without curvature have a little of either
            # sign, which takes many steps to show.
            if hessians == "true" or share > FITTED or own.obstacle(1.0) is None:
                return own, share
    return SampleCurvature.from_problem(
        problem,
        max_rows=max_rows,
        directions=directions,
        differences=step.momentum == 0 if differences is None else differences,
        seed=seed,
    ), share


def _probes(problem: Problem, seed: int) -> Tensor:
    """Return directions in which to compare Hessians and Gauss–Newton matrices, ``(d, k)``.

    All of them, if they are few; else a random one, in which every direction has its share, and that of
    the largest curvature.
    """
    d = problem.num_params
    if d <= MAX_PARAMETERS:
        return torch.eye(d, dtype=problem.dtype, device=problem.device)
    hessian = Hessian(problem.without_weight_decay())
    inner = InnerProduct.for_operator(hessian)
    top = top_eigenpair(hessian, tol=_LOOSE, seed=seed).vector
    spread = inner.noise(hessian, seed).covector
    return torch.stack([top, spread / spread.norm()], dim=1)


def step_of(problem: Problem | DualCurvature, rule: UpdateRule | None) -> LinearStep:
    """Return the rule's coefficients, with the weight decay of the problem's coordinates."""
    rule = UpdateRule(lr=1.0) if rule is None else rule
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"update_rule={rule!r}: expected an UpdateRule")
    # A preconditioned rule's decay is in the problem's coordinates already.
    decay = rule.linear_step.weight_decay
    form = (
        momentum_of(rule.filter) if rule.filter else (rule.momentum, rule.dampening, rule.nesterov)
    )
    if form is None or not rule.noise_known:
        own = {"filter": rule.filter, "lookahead": rule.lookahead, "ascent": rule.ascent or None}
        given = ", ".join(f"{name}={value}" for name, value in own.items() if value)
        raise ValueError(
            f"update_rule has {given}: expected the step of torch.optim.SGD, whose second moments"
            " between modes are known; for a filter in one dimension, max_non_uniformity and"
            " mean_square_radius are"
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
    plain = all(isinstance(factor, float) and factor == 1.0 for factor in problem.scale)
    p = rule.preconditioner
    if p is not None and (plain or not p.diagonal or rule.unknown is not None):
        raise ValueError(
            f"update_rule has the preconditioner {p}: expected a diagonal one that is known, and"
            " problem.transformed(scale=) by its roots, in whose coordinates it is one rate for all"
        )
    undecayed = any(rule.group_weight_decays) and not any(problem.weight_decay)
    if (rule.group_lrs and plain) or undecayed:
        raise ValueError(
            "update_rule has several groups: expected problem.transformed(scale=, weight_decay=), in"
            " whose coordinates it is one learning rate for all"
        )
    return replace(step, weight_decay=decay + _shared_decay(problem))


def _shared_decay(problem: Problem) -> float:
    """Return the number that the problem's weight decay adds to every curvature."""
    if not any(problem.weight_decay):
        return 0.0
    added = [
        decay * torch.as_tensor(factor, dtype=torch.float64) ** 2
        for decay, factor in zip(problem.weight_decay, problem.scale, strict=True)
    ]
    least = min(float(part.min()) for part in added)
    most = max(float(part.max()) for part in added)
    if most - least > 1e-9 * abs(most):
        raise ValueError(
            f"weight decay adds from {least:.6g} to {most:.6g} to the curvature of different"
            " parameters: expected one number for all, or the modes of the second moments differ from"
            " those of H"
        )
    return most
