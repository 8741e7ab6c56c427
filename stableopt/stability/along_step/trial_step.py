"""`trial_step`: the step that an optimizer would take, computed on copies."""

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
"""Attributes not copied: they refer to the original, like a scheduler's wrapper around ``step``."""


def trial_step(
    optimizers: Sequence[torch.optim.Optimizer], problem: MeanLoss, gradient: Tensor
) -> list[Tensor]:
    """Return the change of each parameter of ``problem`` in the next step of ``optimizers``.

    Copies of the optimizers step on copies of the parameters. Parameters outside the problem have no
    gradient.

    Args:
        optimizers: the optimizers.
        problem: the problem.
        gradient: the gradient of the step ``(d,)``, in the parameters' own coordinates.

    Raises:
        TypeError: for an optimizer whose copy cannot step, such as one that needs a closure.
    """
    parts = dict(zip(map(id, problem.params), problem.unflatten(gradient), strict=True))
    copies: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    with torch.inference_mode(False):
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for p in params:
                twin = p.detach().clone().requires_grad_(p.requires_grad)
                if id(p) in parts:
                    twin.grad = _gradient_like(p, parts[id(p)])
                copies[id(p)] = twin
            _step_copy(optimizer, {id(p): copies[id(p)] for p in params})
            for p in params:
                change = local(copies[id(p)].detach()) - local(p.detach())
                changes[id(p)] = real_view(change)
    return [changes[id(p)] for p in problem.params]


def _gradient_like(p: Tensor, part: Tensor) -> Tensor:
    """Return the local ``part`` as a gradient of ``p``: a ``DTensor`` if ``p`` is one."""
    part = torch.view_as_complex(part.contiguous()) if p.is_complex() else part
    part = part.to(p.dtype)
    dtensor: Any = p
    if local(p.detach()) is p or not hasattr(dtensor, "device_mesh"):
        return part.clone()
    kind: Any = type(dtensor.data)
    gradient: Tensor = kind.from_local(
        part.clone(),
        dtensor.device_mesh,
        dtensor.placements,
        run_check=False,
        shape=dtensor.shape,
        stride=dtensor.stride(),
    )
    return gradient


def _step_copy(optimizer: torch.optim.Optimizer, copies: dict[int, Tensor]) -> None:
    """Let a copy of ``optimizer`` step on copies of its parameters."""
    twin = object.__new__(type(optimizer))
    memo: dict[int, Any] = {**copies, id(optimizer): twin}
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            vars(twin)[name] = OrderedDict()
        elif name not in _LEFT_OUT:
            vars(twin)[name] = copy.deepcopy(value, memo)
    device_type = next(iter(copies.values())).device.type
    devices = list({t.device for t in copies.values()} - {torch.device("cpu")})
    method: Any = getattr(type(twin), "step", None)
    try:
        # Restore the random generators: some optimizers draw from them, and training must not see it.
        with torch.random.fork_rng(devices, device_type=device_type if devices else "cuda"):
            if getattr(method, "hooked", False):
                method.__wrapped__(twin)  # without global hooks, which count training steps
            else:
                twin.step()
    except Exception as error:
        raise TypeError(
            f"optimizer={type(optimizer).__name__} cannot take a trial step"
            f" ({type(error).__name__}: {error}): pass direction=, or measure the quantity"
            ' "critical_sharpness" by a StabilityMonitor, along the steps that it takes'
        ) from error
