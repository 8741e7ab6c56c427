"""`trial_step`: the step that an optimizer would take, without taking it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local

__all__ = ["trial_step"]

_LEFT_OUT = ("step", "zero_grad", "_stability_monitor")
"""Attributes that refer to the optimizer itself, as a scheduler's wrapper around ``step`` does."""


def trial_step(
    optimizers: Sequence[torch.optim.Optimizer], problem: MeanLoss, gradient: Tensor
) -> list[Tensor]:
    """Return the change of each parameter of ``problem`` in the next step of ``optimizers``.

    Copies of the optimizers step on copies of the parameters. Parameters outside of the problem have no
    gradient.

    Args:
        optimizers: the optimizers.
        problem: the problem.
        gradient: the gradient of the step ``(d,)``, in the parameters' own coordinates.

    Raises:
        TypeError: for an optimizer that cannot step so, such as one that needs a closure.
    """
    parts = dict(zip(map(id, problem.params), problem.unflatten(gradient), strict=True))
    twins: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    with torch.inference_mode(False):
        for optimizer in optimizers:
            own = [p for group in optimizer.param_groups for p in group["params"]]
            for p in own:
                twin = p.detach().clone().requires_grad_(p.requires_grad)
                if id(p) in parts:
                    twin.grad = _like(p, parts[id(p)])
                twins[id(p)] = twin
            _step(optimizer, {id(p): twins[id(p)] for p in own})
            for p in own:
                change = local(twins[id(p)].detach()) - local(p.detach())
                changes[id(p)] = real_view(change)
    return [changes[id(p)] for p in problem.params]


def _like(p: Tensor, part: Tensor) -> Tensor:
    """Return the local ``part`` as a gradient of ``p``, sharded if it is."""
    part = torch.view_as_complex(part.contiguous()) if p.is_complex() else part
    part = part.to(p.dtype)
    placed: Any = p
    if local(p.detach()) is p or not hasattr(placed, "device_mesh"):
        return part.clone()
    sharded: Any = type(placed.data)
    gradient: Tensor = sharded.from_local(
        part.clone(),
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )
    return gradient


def _step(optimizer: torch.optim.Optimizer, twins: dict[int, Tensor]) -> None:
    """Let a copy of ``optimizer`` step on copies of its parameters."""
    twin = object.__new__(type(optimizer))
    memo: dict[int, Any] = {**twins, id(optimizer): twin}
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            vars(twin)[name] = OrderedDict()
        elif name not in _LEFT_OUT:
            vars(twin)[name] = copy.deepcopy(value, memo)
    # Without torch's global hooks, which count the steps of training.
    kind = next(iter(twins.values())).device.type
    devices = list({t.device for t in twins.values()} - {torch.device("cpu")})
    method: Any = getattr(type(twin), "step", None)
    hooked = getattr(method, "hooked", False)
    try:
        # Some optimizers draw random numbers, which training then has still to draw.
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            method.__wrapped__(twin) if hooked else twin.step()
    except Exception as error:
        raise TypeError(
            f"optimizer={type(optimizer).__name__} cannot take a trial step"
            f" ({type(error).__name__}: {error}): pass direction=, or measure the quantity"
            ' "critical_sharpness" by a StabilityMonitor, along the steps that it takes'
        ) from error
