"""Helpers of readers: settings of parameter groups, and step counts of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableopt._support.tensors import as_tensor
from stableopt.stability.rules.filters import agree

__all__ = ["NOT_STEPPED", "common_value", "decay_of", "params_of", "step_counts"]

T = TypeVar("T")

NOT_STEPPED = "{} has not taken a step yet, and its preconditioner depends on its steps"


def common_value(name: str, values: list[T]) -> T:
    """Return the first of ``values``, which have to agree.

    Raises:
        ValueError: if they differ by more than rounding errors.
    """
    if not all(agree(values[0], value) for value in values):
        raise ValueError(
            f"param_groups have {name} {values}: expected one value; groups may differ in lr,"
            " weight_decay and settings of the preconditioner; or pass update_rule="
        )
    return values[0]


def decay_of(values: Sequence[float]) -> dict[str, Any]:
    """Return the arguments of ``UpdateRule`` for the weight decay of each group."""
    if len(set(values)) == 1:
        return {"weight_decay": values[0]}
    return {"group_weight_decays": tuple(values)}


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of the groups.

    Raises:
        TypeError: for complex parameters, unless the optimizer is one of torch's, which step on
            their real view.
    """
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        if p.is_complex() and not any(
            kind.__module__.startswith("torch.optim") and kind is not torch.optim.Optimizer
            for kind in type(optimizer).__mro__
        ):
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}: expected real parameters"
            )
    return params


def step_counts(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the number of steps of each parameter by its id, without those that took none.

    A counter is in the parameter's state or in its group. Only parameters with a state have stepped.
    Counters may be numbers or tensors on any device; each device costs one transfer to the host.
    """
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for group in optimizer.param_groups:
        group_count = group.get("k", group.get("step", 1))  # 1 without a counter
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            step = state.get("step", group_count) if state else None
            if step is not None:
                count = as_tensor(step)
                by_device[count.device].append((id(p), count))
    counts: dict[int, float] = {}
    for pairs in by_device.values():
        numbers = torch.stack([count.reshape(()).float() for _, count in pairs]).tolist()
        counts.update(zip((key for key, _ in pairs), numbers, strict=True))
    # A fused step that a gradient scaler skipped has a count of zero.
    return {key: count for key, count in counts.items() if count > 0}
