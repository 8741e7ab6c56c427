"""What readers ask of parameter groups and of the state of single parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["NOT_STEPPED", "one", "params_of", "step_counts"]

T = TypeVar("T")

NOT_STEPPED = "{} has not taken a step yet, and its preconditioner comes of the steps it took"


def one(name: str, values: list[T]) -> T:
    """Return the value that all of ``values`` are.

    Raises:
        ValueError: if they differ.
    """
    if any(value != values[0] for value in values):
        raise ValueError(
            f"param_groups have {name} {values}: expected one value; groups may differ in lr,"
            " weight_decay and what only the preconditioner depends on, or pass update_rule="
        )
    return values[0]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of the groups.

    Raises:
        TypeError: for complex ones, whose real and imaginary parts curve apart.
    """
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        if p.is_complex():
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}: update rules are of real"
                " parameters"
            )
    return params


def step_counts(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return the steps that each parameter has taken, by its id; those without any are left out.

    Counters may be numbers, or tensors on any device: one transfer for each device.
    """
    held: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    for p in params_of(optimizer):
        step = optimizer.state.get(p, {}).get("step")
        if step is not None:
            count = torch.as_tensor(step)
            held[count.device].append((id(p), count))
    counts: dict[int, float] = {}
    for pairs in held.values():
        numbers = torch.stack([count.reshape(()).float() for _, count in pairs]).tolist()
        counts.update(zip((key for key, _ in pairs), numbers, strict=True))
    # A fused step that a gradient scaler skipped leaves a count of zero.
    return {key: count for key, count in counts.items() if count > 0}
