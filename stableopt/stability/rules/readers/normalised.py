"""Readers of Muon, Rprop and Lion, whose step length does not depend on the gradient's length.

Each descends in a norm (:mod:`~stableopt.stability.rules.norms`). The rule limits the generalised
sharpness in this norm, not the sharpness.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stableopt.stability.rules.norms import NewtonSchulzNorm, NormedStep, SignNorm, SpectralNorm
from stableopt.stability.rules.readers.param_groups import common_value, params_of
from stableopt.stability.rules.readers.pytorch_optimizer import unknown_option
from stableopt.stability.rules.update_rule import UpdateRule, maximizes

__all__ = ["read_lion", "read_muon", "read_rprop"]


_CONVERGED = 0.01
"""Distance from 1 of the singular values up to which Newton–Schulz counts as exact: Muon computes in
bfloat16, whose relative precision is 0.4 %."""


def read_muon(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Muon``: polar factors times ``adjust_lr_fn`` of their shapes.

    With coefficients whose Newton–Schulz iteration does not converge, such as the default ones, the norm
    is a :class:`NewtonSchulzNorm`. Decoupled weight decay is not a part of the norm.
    """
    groups = optimizer.param_groups
    lr = max(float(group["lr"]) for group in groups)
    radii = [
        (float(group["lr"]) / lr if lr else 1.0) * _muon_radius(group["adjust_lr_fn"], p)
        for group in groups
        for p in group["params"]
    ]
    coefficients, steps = (
        common_value(key, [group[key] for group in groups])
        for key in ("ns_coefficients", "ns_steps")
    )
    iterated = NewtonSchulzNorm(
        params_of(optimizer), radii, lr=lr, coefficients=tuple(coefficients), steps=int(steps)
    )
    norm: SpectralNorm = iterated
    # Singular values below 0.02 hardly contribute to a step.
    values = torch.linspace(0.02, 1.0, 50, device="cpu")
    if float((iterated.mapped(values) - 1).abs().max()) < _CONVERGED:
        norm = SpectralNorm(iterated.params, iterated.radii, lr=lr)
    momentum, nesterov = (
        common_value(key, [g[key] for g in groups]) for key in ("momentum", "nesterov")
    )
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
    """Read ``torch.optim.Rprop``: signs times ``step_size`` of each entry, as of the last step.

    An entry whose gradient has just changed its sign pauses for a step. The norm ignores this.
    """
    groups = optimizer.param_groups
    radii = []
    for group in groups:
        for p in group["params"]:
            first_size = torch.full_like(p, float(group["lr"]))
            radii.append(optimizer.state.get(p, {}).get("step_size", first_size).detach().clone())
    return UpdateRule(
        lr=max(float(group["lr"]) for group in groups),
        maximize=bool(common_value("maximize", [group["maximize"] for group in groups])),
        preconditioner=NormedStep(
            SignNorm(params_of(optimizer), radii, lr=1.0), type(optimizer).__name__
        ),
    )


def read_lion(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read Lion (Chen et al., 2023): signs of an average; decay is not a part of the norm."""
    unknown = unknown_option(optimizer)
    if unknown is not None:
        return unknown
    groups = optimizer.param_groups
    lr = max(float(group["lr"]) for group in groups)
    radii = [float(group["lr"]) / lr if lr else 1.0 for group in groups for _ in group["params"]]
    norm = SignNorm(params_of(optimizer), radii, lr=lr)
    return UpdateRule(
        lr=lr,
        maximize=common_value("maximize", maximizes(optimizer)),
        preconditioner=NormedStep(norm, type(optimizer).__name__),
    )
