"""Checks that a loss is a real scalar, a mean over samples, and the same function on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.data.batches import cut, map_tensors
from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.collectives import Ranks

__all__ = [
    "CHECKED_SAMPLES",
    "UNEQUAL",
    "UNEQUAL_HALF",
    "UNEQUAL_SINGLE",
    "check_mean",
    "check_partial_batch",
    "check_replicas",
    "checked_scalar",
    "differs",
    "parameters_changed_by",
    "runs_alike",
    "twice_over",
    "unequal_samples_message",
    "warn_of_single_sample_chunks",
]

CHECKED_SAMPLES = 8
"""Samples on which the constructor tries the loss: enough to distinguish a mean from a sum."""

_NOT_A_MEAN = 0.05
"""Relative change of the loss of a doubled batch above which it is not a mean: a sum changes by 1,
rounding changes a mean by at most 1e-3 (a loss of 1e-6 in float32)."""

UNEQUAL = 1e-5
"""Relative difference between a batch's gradient and the mean of its parts' gradients above which
samples have unequal weights. Rounding leaves 1e-15 in double precision and 1e-6 in single precision.
Epsilons in denominators and adaptive solvers, which see the whole batch, leave up to 1e-6. The
auxiliary loss of a router leaves 4e-5."""

UNEQUAL_SINGLE, UNEQUAL_HALF = 2e-3, 0.05
"""The same without double precision: in single precision rounding may flip a ReLU among 64 samples, and
autocast to half precision leaves 0.01."""

_SAME_LOSS, _SMALL_LOSS = 0.05, 1e-3
"""Largest relative difference between a loss in double and in lower precision that rounding explains,
and the smallest loss that it is relative to."""

_REPLICAS = 1e-3
"""Difference between the projections of two replicas' parameters, relative to their norm, that rounding
does not explain; unrelated parameters differ by about 1."""


def checked_scalar(loss: Any) -> Tensor:
    """Return ``loss``, or raise unless it is a real scalar."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}: expected a scalar tensor")
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn returned shape {tuple(loss.shape)}: expected a scalar, the mean over the batch"
            " (reduction='mean')"
        )
    if loss.is_complex():
        raise TypeError(f"loss_fn returned {loss.dtype}: expected a real scalar")
    return loss


def check_mean(once: float, twice: float, *, of_batches: bool = False) -> None:
    """Raise ``ValueError`` unless the loss of a batch and that of its double are those of a mean.

    Args:
        once: the loss of the batch.
        twice: the loss of the batch with every sample repeated.
        of_batches: whether the loss may couple the samples of a batch; then only a sum is refused.
    """
    # Near zero both are rounding. The measurement reports a loss that is not finite.
    if not abs(once) > 1e-6 or not abs(twice) < float("inf"):
        return
    if abs(twice - once) > _NOT_A_MEAN * abs(once):
        is_sum = abs(twice - 2 * once) < 0.1 * abs(once)
        if of_batches and not is_sum:
            return
        hint = " (a sum: use reduction='mean')" if is_sum else ""
        remedy = (
            "" if is_sum else ". If samples see each other (contrastive): batch_statistics=True"
        )
        raise ValueError(
            f"loss_fn is not a mean over samples{hint}: a batch has loss {once:.6g}, the same batch"
            f" twice over {twice:.6g}; expected the same{remedy}"
        )


def unequal_samples_message(
    difference: float, chunks: int, *, given: bool, sharded: bool = False
) -> str:
    """Return the error message for a loss whose gradient is not the mean of its samples' gradients.

    Args:
        difference: the relative difference of the gradients.
        chunks: the number of chunks of the data, on all ranks.
        given: whether the user gave the weights.
        sharded: whether the model is under ``fully_shard``.
    """
    observation = _difference_in_words(difference)
    if given:
        return (
            f"sample_weight: with these weights {observation}: expected the weights by which loss_fn"
            " averages, as it divides by their sum over a batch"
        )
    if sharded:
        return (
            f"loss_fn: {observation}: it weighs samples unequally, or they see each other. Pass the"
            " weights as sample_weight=. If samples see each other, measure a replica of the model in"
            " one process, or the mean over the given batches with batch_statistics=True"
        )
    one_chunk = "" if chunks == 1 else f" or chunk_size= for one chunk (now {chunks}),"
    return (
        f"loss_fn: {observation}: it weighs samples unequally, or they see each other. Pass the weights"
        f" as sample_weight= (often each sample's number of targets that count),{one_chunk} or"
        " batch_statistics=True to measure the mean over the given batches. If samples see each other,"
        " only the sharpness is defined. Time-first data need batch_dim=1"
    )


def warn_of_single_sample_chunks(difference: float) -> None:
    """Warn that chunks of one sample measure another loss than larger batches have."""
    warnings.warn(
        f"loss_fn: {_difference_in_words(difference)}: it weighs samples unequally, or they see each"
        " other. In chunks of one sample, f is the mean over the samples by themselves, not the loss"
        " of a larger training batch. Pass the weights as sample_weight=",
        stacklevel=5,
    )


def _difference_in_words(difference: float) -> str:
    return (
        f"the gradient of a batch differs by {difference:.2g} of its size from the mean over its"
        " samples"
    )


def twice_over(batch: Any) -> Any:
    """Return ``batch`` followed by a copy of its samples.

    >>> twice_over((torch.tensor([1.0, 2.0]), torch.tensor(3.0)))
    (tensor([1., 2., 1., 2.]), tensor(3.))
    """
    return map_tensors(lambda t: torch.cat([t, t]) if t.dim() else t, batch)


def check_partial_batch(
    loss: Callable[[Any], Tensor], first: Callable[[], tuple[Any, int]], dtype: torch.dtype | None
) -> None:
    """Evaluate ``loss`` on the first samples of a batch; explain a failure.

    Args:
        loss: the loss of a batch.
        first: returns the first batch and its size.
        dtype: the chosen precision, if any.

    Raises:
        ValueError: if the loss holds tensors that were not cut or cast like the data.
        Exception: any other error of the loss.
    """
    batch, size = first()
    try:
        loss(cut(batch, 0, CHECKED_SAMPLES))
    except Exception as error:
        if size > CHECKED_SAMPLES and _runs(lambda: loss(first()[0])):
            raise ValueError(
                f"loss_fn: it fails on {CHECKED_SAMPLES} samples of a batch, and not on all {size}"
                f" ({error}): it holds tensors that belong to the whole batch, such as the edges of a"
                " graph. Pass the samples' indices as data, torch.arange(n): let the loss evaluate the"
                " whole graph, and then select the rows of these samples"
            ) from error
        if dtype is not None and "dtype" in str(error).replace("scalar type", "dtype"):
            raise ValueError(
                f"dtype={dtype} casts parameters, buffers and data, but not the tensors that loss_fn"
                f" holds ({error}): cast those where they are used, for example weight.to(outputs)"
            ) from error
        raise


def runs_alike(
    leaves: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor], value: float | None
) -> bool:
    """Return whether ``loss`` in another precision is differentiable, and about ``value``, if given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = loss(leaves)
            torch.autograd.grad(result, leaves, allow_unused=True)
    except Exception:  # kernels refuse a precision with errors of any type
        return False
    if value is None:
        return True
    return abs(float(result.detach()) - value) <= _SAME_LOSS * max(abs(value), _SMALL_LOSS)


def _runs(evaluate: Callable[[], object]) -> bool:
    try:
        evaluate()
    except Exception:  # the caller reports its own error
        return False
    return True


def parameters_changed_by(
    evaluate: Callable[[], Any], params: dict[str, nn.Parameter]
) -> frozenset[str]:
    """Return the names of the ``params`` that ``evaluate`` changes; restore their values.

    A forward pass may update a teacher or a key encoder that follows the model. Values are compared,
    since updates by ``data`` leave version counters alone. Integers are not compared: kernels may repack
    the codes of quantized weights, in another shape, without a change of the weights.
    """
    numbers = {name: p for name, p in params.items() if p.is_floating_point() or p.is_complex()}
    before = {name: p.detach().clone() for name, p in numbers.items()}
    changed: set[str] = set()
    try:
        evaluate()
    finally:
        changed = {name for name, p in numbers.items() if not torch.equal(p.detach(), before[name])}
        for name in changed:
            params[name].data.copy_(before[name])
    return frozenset(changed)


def differs(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether ``ones`` and ``others`` differ in any entry, with one host transfer.

    >>> differs([torch.zeros(2)], [torch.zeros(2)]), differs([torch.zeros(2)], [torch.ones(2)])
    (False, True)
    """
    pairs = zip(ones, others, strict=True)
    return bool(torch.stack([(one.detach() != other).any() for one, other in pairs]).any())


def check_replicas(ranks: Ranks, params: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` on every rank unless all have the same parameters, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    projection = square = 0.0
    for p in params:
        value = real_view(p.detach()).double().cpu()
        noise = torch.randn(value.shape, generator=generator, device="cpu")
        projection += float((value * noise).sum())
        square += float(value.square().sum())
    size = sum(p.numel() for p in params)
    projections, sizes = zip(*ranks.all_gather_object((projection, size)), strict=True)
    differs = abs(projection - sum(projections) / ranks.size) > _REPLICAS * square**0.5
    if ranks.any(differs or set(sizes) != {size}):
        raise ValueError(
            "model: its parameters are not the same on all ranks of process_group: expected replicas,"
            " as DistributedDataParallel keeps them"
        )
