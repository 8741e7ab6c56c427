"""Recorded calls of normalisations, whose gains and biases act on each sample's rows separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableopt.curvature.layers.recorder import Recorder

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Record ``F.layer_norm``."""

    def plain() -> Tensor:
        return F.layer_norm(input, normalized_shape, None, None, eps)

    return _normalised(recorder, input, plain, weight, bias, (-1, *normalized_shape))


def rms_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """Record ``F.rms_norm``."""

    def plain() -> Tensor:
        return F.rms_norm(input, normalized_shape, None, eps)

    return _normalised(recorder, input, plain, weight, None, (-1, *normalized_shape))


def group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Record ``F.group_norm``."""

    def plain() -> Tensor:
        return F.group_norm(input, num_groups, None, None, eps)

    return _normalised(recorder, input, plain, weight, bias, (-1, input.shape[1], None))


def instance_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Record ``F.instance_norm`` with the statistics of each sample."""
    if not use_input_stats:
        return NotImplemented

    def plain() -> Tensor:
        return F.instance_norm(input, eps=eps)

    return _normalised(recorder, input, plain, weight, bias, (-1, input.shape[1], None))


def batch_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Record ``F.batch_norm`` with running statistics."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    mean, variance = running_mean, running_var

    def plain() -> Tensor:
        # With running statistics: the same affine map for all samples.
        return F.batch_norm(input, mean, variance, None, None, False, 0.0, eps)

    return _normalised(recorder, input, plain, weight, bias, (-1, input.shape[1], None))


def _normalised(
    recorder: Recorder,
    given: Tensor,
    plain: Callable[[], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    features: tuple[int | None, ...],
) -> Any:
    """Record a normalisation with one copy of gains and biases for each sample.

    ``features`` is the shape of a sample's rows: positions, features, ``None`` for more positions.
    """
    if recorder.known(given) or not recorder.batch_arguments("normalisation", given)[0]:
        return NotImplemented
    normalised = plain()
    rows = normalised.reshape(recorder.size, *_shape(features, normalised, recorder.size))
    shape = [1, *(1 if count is None else count for count in features[1:])]

    def broadcastable(parameter: Tensor) -> Tensor:
        if recorder.known(parameter):
            return recorder.copies(parameter, "normalisation").reshape(recorder.size, *shape)
        return parameter.reshape(1, *shape)

    if weight is not None and bias is not None:
        rows = torch.addcmul(broadcastable(bias), rows, broadcastable(weight))
    elif weight is not None:
        rows = rows * broadcastable(weight)
    elif bias is not None:
        rows = rows + broadcastable(bias)
    return rows.reshape(normalised.shape)


def _shape(features: tuple[int | None, ...], like: Tensor, size: int) -> list[int]:
    if features[-1] is not None:
        return [-1, *(n for n in features[1:] if n is not None)]
    return [len(like) // size, like.shape[1], like[0, 0].numel()]
