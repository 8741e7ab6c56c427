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
    "check_replicas",
    "checked_scalar",
    "differs",
    "moved_by",
    "runs_alike",
    "try_a_part",
    "twice_over",
    "unequal_samples",
    "warn_of_samples_alone",
]

CHECKED_SAMPLES = 8
"""Samples that the constructor tries the loss on: enough to tell a mean from a sum."""

_NOT_A_MEAN = 0.05
"""Relative change of the loss, when the batch is doubled, that excludes a mean: a sum changes by 1,
rounding by at most 1e-3 (a loss of 1e-6 in float32)."""

UNEQUAL = 1e-5
"""Relative difference between a batch's gradient and the mean of its parts' above which samples are not
equal. Rounding leaves 1e-15 in double precision, and 1e-6 in single. Terms against division by zero and
adaptive solvers, which see the batch, leave up to 1e-6. The auxiliary loss of a router leaves 4e-5."""

UNEQUAL_SINGLE, UNEQUAL_HALF = 2e-3, 0.05
"""The same where double precision is not to be had: in single precision rounding may flip a ReLU among
64 samples, and autocast to half precision leaves 0.01."""

_SAME_LOSS, _SMALL_LOSS = 0.05, 1e-3
"""Relative difference of the loss in double precision that single or half precision explains, and the
least loss that it is relative to."""

_REPLICAS = 1e-3
"""Difference of a projection of the parameters, relative to their norm, that exceeds rounding between
replicas; other parameters differ by about 1."""


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
    """Raise ``ValueError`` if the losses of a batch, and of it twice over, exclude a mean.

    Args:
        once: the loss of the batch.
        twice: the loss of the batch twice over.
        of_batches: whether batches count as they are; then a sum alone is excluded, since samples may
            see each other.
    """
    # Near zero both are rounding; a non-finite loss is for the measurement to report.
    if not abs(once) > 1e-6 or not abs(twice) < float("inf"):
        return
    if abs(twice - once) > _NOT_A_MEAN * abs(once):
        is_sum = abs(twice - 2 * once) < 0.1 * abs(once)
        if of_batches and not is_sum:
            return
        hint = " (a sum: use reduction='mean')" if is_sum else ""
        way = "" if is_sum else ". If samples see each other (contrastive): batch_statistics=True"
        raise ValueError(
            f"loss_fn is not a mean over samples{hint}: a batch has loss {once:.6g}, the same batch"
            f" twice over {twice:.6g}; expected the same{way}"
        )


def unequal_samples(difference: float, chunks: int, *, given: bool, sharded: bool = False) -> str:
    """Return what to tell of a loss whose gradient is not the mean of its samples'.

    Args:
        difference: of the gradients, relative.
        chunks: the number of chunks of the data, on all ranks.
        given: whether the user gave the weights.
        sharded: whether the model is under ``fully_shard``.
    """
    found = _found(difference)
    if given:
        return (
            f"sample_weight: with these weights {found}: expected the weights by which loss_fn averages,"
            " as it divides by their sum over a batch"
        )
    if sharded:
        return (
            f"loss_fn: {found}: it weighs samples unequally, or they see each other. Pass the weights"
            " as sample_weight=; of samples that see each other measure a replica of the model, under"
            " one process, or with batch_statistics=True the mean over the batches given"
        )
    alone = "" if chunks == 1 else f" or chunk_size= for one chunk (now {chunks}),"
    return (
        f"loss_fn: {found}: it weighs samples unequally, or they see each other. Pass the weights as"
        f" sample_weight= (often each sample's number of targets that count),{alone} or"
        " batch_statistics=True to measure the mean over the batches given;"
        " of samples that see each other only the sharpness is defined. Time-first data need batch_dim=1"
    )


def warn_of_samples_alone(difference: float) -> None:
    """Warn of a loss that is another one for several samples at once, measured one by one."""
    warnings.warn(
        f"loss_fn: {_found(difference)}: it weighs samples unequally, or they see each other. In chunks"
        " of one sample, f is the mean over the samples by themselves, and not the loss of a larger"
        " training batch; sample_weight= gives weights",
        stacklevel=5,
    )


def _found(difference: float) -> str:
    return (
        f"the gradient of a batch differs by {difference:.2g} of its size from the mean over its"
        " samples"
    )


def twice_over(batch: Any) -> Any:
    """Return ``batch`` with its samples repeated once.

    >>> twice_over((torch.tensor([1.0, 2.0]), torch.tensor(3.0)))
    (tensor([1., 2., 1., 2.]), tensor(3.))
    """
    return map_tensors(lambda t: torch.cat([t, t]) if t.dim() else t, batch)


def try_a_part(
    loss: Callable[[Any], Tensor], first: Callable[[], tuple[Any, int]], dtype: torch.dtype | None
) -> None:
    """Evaluate ``loss`` on a few samples, and say why where that fails.

    Args:
        loss: the loss of a batch.
        first: returns the first batch and its size.
        dtype: the precision that was chosen, if any.

    Raises:
        ValueError: if the loss holds tensors that are cut or cast differently from the data.
        Exception: of the loss.
    """
    batch, size = first()
    try:
        loss(cut(batch, 0, CHECKED_SAMPLES))
    except Exception as error:
        if size > CHECKED_SAMPLES and _runs(lambda: loss(first()[0])):
            raise ValueError(
                f"loss_fn: it fails on {CHECKED_SAMPLES} samples of a batch, and not on all {size}"
                f" ({error}): it holds tensors that belong to all of the batch, such as the edges of a"
                " graph. Let the data be the numbers of the samples, torch.arange(n), and take"
                " everything else, and at the end the rows of these samples, from what the loss holds"
            ) from error
        if dtype is not None and "dtype" in str(error).replace("scalar type", "dtype"):
            raise ValueError(
                f"dtype={dtype} casts parameters, buffers and data, and not the tensors that loss_fn"
                f" holds by itself ({error}): cast those where they are used, as by weight.to(outputs)"
            ) from error
        raise


def runs_alike(
    leaves: Sequence[Tensor], loss: Callable[[Sequence[Tensor]], Tensor], value: float
) -> bool:
    """Return whether ``loss`` in another precision can be differentiated, and is about ``value``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = loss(leaves)
            torch.autograd.grad(found, leaves, allow_unused=True)
    except Exception:  # kernels refuse a precision by errors of all kinds
        return False
    return abs(float(found.detach()) - value) <= _SAME_LOSS * max(abs(value), _SMALL_LOSS)


def _runs(evaluate: Callable[[], object]) -> bool:
    try:
        evaluate()
    except Exception:  # which the other one explains as well
        return False
    return True


def moved_by(evaluate: Callable[[], Any], params: dict[str, nn.Parameter]) -> frozenset[str]:
    """Return which of ``params`` a forward pass changes, after restoring them.

    A teacher or a key encoder may follow the model in its forward pass. Values are compared, since
    updates by ``data`` leave version counters alone. Integers are the codes of quantized weights:
    a kernel may repack them, in another shape, without a change of the weights.
    """
    numbers = {name: p for name, p in params.items() if p.is_floating_point() or p.is_complex()}
    before = {name: p.detach().clone() for name, p in numbers.items()}
    moved: set[str] = set()
    try:
        evaluate()
    finally:
        moved = {name for name, p in numbers.items() if not torch.equal(p.detach(), before[name])}
        for name in moved:
            params[name].data.copy_(before[name])
    return frozenset(moved)


def differs(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether any number of ``ones`` is not that of ``others``, in one host transfer.

    >>> differs([torch.zeros(2)], [torch.zeros(2)]), differs([torch.zeros(2)], [torch.ones(2)])
    (False, True)
    """
    pairs = zip(ones, others, strict=True)
    return bool(torch.stack([(one.detach() != other).any() for one, other in pairs]).any())


def check_replicas(ranks: Ranks, params: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` on every rank unless all have the same parameters, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    shown = square = 0.0
    for p in params:
        value = real_view(p.detach()).double().cpu()
        shown += float((value * torch.randn(value.shape, generator=generator)).sum())
        square += float(value.square().sum())
    size = sum(p.numel() for p in params)
    shown_by_all, sizes = zip(*ranks.all_gather_object((shown, size)), strict=True)
    differs = abs(shown - sum(shown_by_all) / ranks.size) > _REPLICAS * square**0.5
    if ranks.any(differs or set(sizes) != {size}):
        raise ValueError(
            "model: its parameters are not the same on all ranks of process_group: expected replicas,"
            " as DistributedDataParallel keeps them"
        )
