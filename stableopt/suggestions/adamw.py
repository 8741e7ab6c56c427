"""AdamW's coordinates at a point: from an optimizer's second moments, or from those of batches there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature import Hessian, Problem
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.stability.rules.coordinates import check_params, in_rule_coordinates
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "BETA",
    "Moments",
    "expected_scales",
    "gradient_moments",
    "gradient_stride",
    "running_adam",
    "without_gradient",
]

BETA = 0.9
"""AdamW's default beta1, used if no optimizer is given."""

_EPSILON = 1e-8

_SAMPLES = 64
"""Samples whose gradients estimate the second moments."""


def running_adam(problem: Problem, optimizer: torch.optim.Optimizer) -> tuple[Problem, LinearStep]:
    """Return the problem in the coordinates of a running optimizer, and its step at the rate 1.

    Weight decay is left out of both.

    Raises:
        TypeError: for an optimizer without a known diagonal preconditioner.
    """
    rule = UpdateRule.from_optimizer(optimizer)
    check_params([optimizer], problem)
    known = rule.preconditioner is not None and rule.unknown is None and rule.noise_known
    if not known or rule.preconditioner is None or not rule.preconditioner.diagonal:
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: expected an Adam or AdamW that has taken a step, so"
            " that its second moments are known; leave it out to use those at this point"
        )
    rule = dataclasses.replace(rule, decoupled_weight_decay=0.0)
    preconditioned = in_rule_coordinates(problem, rule, [optimizer]).without_weight_decay()
    return preconditioned, dataclasses.replace(rule.linear_step, lr=1.0)


def expected_scales(
    problem: Problem, moments: Moments, batch_sizes: Iterable[int], dataset_size: int | None
) -> Iterator[list[Tensor]]:
    r"""Yield the root of AdamW's preconditioner for each batch size, a tensor per parameter.

    Batches of B here have the second moments :math:`v = \bar g^2 + p \operatorname{Var}(g_i)`, with p
    of :func:`~stableopt.stability.rules.limits.noise_factor`.
    """
    for batch_size in batch_sizes:
        second = moments.mean**2 + noise_factor(batch_size, dataset_size) * moments.variance
        yield [1 / (part.sqrt() + _EPSILON).sqrt() for part in problem.unflatten(second)]


def without_gradient(problem: Problem, moments: Moments) -> list[str]:
    """Return the names of parameters with curvature whose gradient is zero for all samples.

    Parameters that the loss does not depend on have no curvature.
    """
    parts = zip(problem.unflatten(moments.mean), problem.unflatten(moments.variance), strict=True)
    still = [i for i, (mean, variance) in enumerate(parts) if not (mean.any() or variance.any())]
    if not still:
        return []
    hessian, names = Hessian(problem), []
    sizes = [shape.numel() for shape in problem.shapes]
    for index in still:
        generator = torch.Generator(problem.device).manual_seed(index)
        vector = torch.zeros_like(moments.mean)
        torch.split(vector, sizes)[index].normal_(generator=generator)
        if (hessian @ vector).any():
            names.append(problem.names[index])
    return names


def gradient_stride(problem: Problem) -> int:
    """Return the distance in the data of the samples whose gradients estimate the variance."""
    return max(1, problem.own_samples // _SAMPLES)


class Moments(NamedTuple):
    """The elementwise mean and variance ``(d,)`` of the gradient over samples."""

    mean: Tensor
    variance: Tensor


def gradient_moments(problem: Problem) -> Moments:
    """Return the elementwise mean and variance of the gradient over samples.

    The variance is that of samples at equal distances in the data, which may be sorted by class.
    """
    theta, mean = problem.theta(), problem.gradient()
    with torch.inference_mode(False):
        squares = torch.zeros_like(mean)
    stride = gradient_stride(problem)

    def samples() -> Iterator[tuple[Any, int]]:
        start = 0
        for batch, size in problem.chunks():
            for index in range(-start % stride, size, stride):
                yield cut(batch, index, index + 1), 1
            start += size

    def add(sample: Any, size: int) -> None:
        slopes = torch.autograd.grad(problem.loss(theta, sample), theta, allow_unused=True)
        squares.add_((problem.flatten(slopes) - mean) ** 2)

    return Moments(mean, mean_over_chunks(problem, [squares], add, samples())[0])
