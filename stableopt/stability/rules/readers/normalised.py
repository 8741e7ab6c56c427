"""Readers of optimizers whose steps have a length that does not depend on the gradient's.

Each descends in a norm (:mod:`~stableopt.stability.rules.norms`), so that the rule has no limit on the
sharpness, and its generalised sharpness has one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stableopt.stability.rules.norms import NewtonSchulzNorm, NormedStep, SignNorm, SpectralNorm
from stableopt.stability.rules.readers.param_groups import one, params_of
from stableopt.stability.rules.readers.pytorch_optimizer import special
from stableopt.stability.rules.update_rule import UpdateRule, maximizes

__all__ = ["read_lion", "read_muon", "read_rprop"]


_CONVERGED = 0.01
"""Largest distance from 1 of singular values after an iteration that counts as exact: in bfloat16, which
Muon computes in, numbers are right to 0.4 %."""


def read_muon(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Muon``: polar factors times ``adjust_lr_fn`` of their shapes.

    With coefficients whose iteration does not converge, as its own, they are what it makes of the
    singular values. Decoupled weight decay is not a part of the norm.
    """
    groups = optimizer.param_groups
    lr = max(float(group["lr"]) for group in groups)
    radii = [
        (float(group["lr"]) / lr if lr else 1.0) * _muon_radius(group["adjust_lr_fn"], p)
        for group in groups
        for p in group["params"]
    ]
    coefficients, steps = (
        one(key, [group[key] for group in groups]) for key in ("ns_coefficients", "ns_steps")
    )
    norm: SpectralNorm = NewtonSchulzNorm(
        params_of(optimizer), radii, lr=lr, coefficients=tuple(coefficients), steps=int(steps)
    )
    # Smaller singular values are hardly a part of a step.
    if float((norm.mapped(torch.linspace(0.02, 1.0, 50)) - 1).abs().max()) < _CONVERGED:  # type: ignore[attr-defined]
        norm = SpectralNorm(norm.params, norm.radii, lr=lr)
    momentum, nesterov = (one(key, [g[key] for g in groups]) for key in ("momentum", "nesterov"))
    return UpdateRule(
        lr=lr,
        momentum=float(momentum),
        nesterov=bool(nesterov and momentum),
        preconditioner=NormedStep(norm, type(optimizer).__name__),
    )


def _muon_radius(adjust_lr_fn: str | None, p: Tensor) -> float:
    rows, columns = p.shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def read_rprop(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Rprop``: signs times ``step_size``, one for each entry, as of the last step.

    An entry whose gradient has just changed its sign pauses for a step, which the norm does not show.
    """
    groups = optimizer.param_groups
    radii = [
        optimizer.state.get(p, {}).get("step_size", torch.full_like(p, float(group["lr"]))).detach()
        for group in groups
        for p in group["params"]
    ]
    return UpdateRule(
        lr=max(float(group["lr"]) for group in groups),
        maximize=bool(one("maximize", [group["maximize"] for group in groups])),
        preconditioner=NormedStep(
            SignNorm(params_of(optimizer), [r.clone() for r in radii], lr=1.0),
            type(optimizer).__name__,
        ),
    )


def read_lion(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read Lion (Chen et al., 2023): signs of an average; decay is not a part of the norm."""
    if (other := special(optimizer)) is not None:
        return other
    groups = optimizer.param_groups
    lr = max(float(group["lr"]) for group in groups)
    radii = [float(group["lr"]) / lr if lr else 1.0 for group in groups for _ in group["params"]]
    norm = SignNorm(params_of(optimizer), radii, lr=lr)
    return UpdateRule(
        lr=lr,
        maximize=one("maximize", maximizes(optimizer)),
        preconditioner=NormedStep(norm, type(optimizer).__name__),
    )
