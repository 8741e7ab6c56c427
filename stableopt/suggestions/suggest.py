r"""`suggest`: the largest linearly stable learning rates of SGD and AdamW at a point, by batch size::

    print(stableopt.suggest(model, loss_fn, (x, y), batch_sizes=(1, 16, 64)))

Above these rates training leaves the point; which rate learns best is another question. A rate is the
exact mean-square threshold in two cases (:func:`~stableopt.critical_lr`): all samples are fitted and all
directions are affordable, or the model has few parameters. Otherwise it is an upper bound, also if the
model's outputs are not separate from its loss. If the Hessian has negative curvature, no learning rate
is stable: the bounds then concern the directions of positive curvature, and a note says so.

The last row has the rate from which *one* step along the full-batch gradient raises the loss, by a few
forward passes. It is not a limit of training, but it is available for models that are too large for
Hessian-vector products or have no second derivative: ``curvature=False`` computes only this row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import finite_size, shown, whole
from stableopt.curvature import NonFiniteError, Problem
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.along_step.critical_sharpness import critical_sharpness
from stableopt.stability.mean_square.critical_lr import MAX_ROWS
from stableopt.stability.rules.coordinates import problem_of
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.rules.reader_registry import base_optimizer
from stableopt.suggestions.adamw import (
    BETA,
    expected_scales,
    gradient_moments,
    gradient_stride,
    running_adam,
    without_gradient,
)
from stableopt.suggestions.result import Suggestion, Suggestions
from stableopt.suggestions.search import Search

__all__ = ["suggest"]

_SGD, _MOMENTUM, _ADAMW = "SGD", "SGD, momentum 0.9", "AdamW"
_RUNNING = "SGD, running"
"""The label of a given SGD, with the momentum and weight decay of its groups."""


def suggest(
    model: nn.Module | Problem,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    batch_sizes: Iterable[int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dataset_size: float | None = None,
    max_rows: int = MAX_ROWS,
    curvature: bool = True,
    batch_dim: BatchDim | None = None,
    seed: int = 0,
) -> Suggestions:
    r"""Return the largest learning rates that are linearly stable here, by optimizer and batch size.

    Args:
        model: the model, at the point to examine; or, for ``model``, ``loss_fn`` and ``data``, a
            ``Problem``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        batch_sizes: the batch sizes; by default 1, 4, 16, ... and all samples.
        optimizer: an optimizer with a diagonal preconditioner that has taken a step, such as AdamW,
            whose second moments and betas are used. Its weight decay, which changes the limit by a
            factor :math:`1-\eta\lambda/2`, is ignored. If its dynamics under noise are not known, as for
            NAdam, the bound is that of the full batch. By default AdamW with the second moments that it
            would reach here, :math:`v = \bar g^2 + \operatorname{Var}(g_i)/B`, from 64 samples.
        dataset_size: samples in the training set, if ``data`` is a part of it; ``math.inf`` for an
            endless stream.
        max_rows: rows nC up to which all directions of Gauss–Newton matrices are used.
        curvature: ``False`` computes only ``one_step``, by one gradient and a few forward passes for
            each optimizer; ``optimizer`` can then be any that can take a trial step.
        batch_dim: the dimension that counts the samples, as for ``Problem``: 1 for time-first batches.
        seed: seed of the eigen-solvers.

    Raises:
        ValueError: for arguments out of range, and as ``Problem`` does.
        TypeError: for an ``optimizer`` without a known diagonal preconditioner.

    >>> linear = nn.Linear(1, 1, bias=False).double()    # f_i = x_i^2 w^2: H_i = 2 and 8
    >>> data = torch.tensor([[1.0], [2.0]]).double(), torch.zeros(2, 1).double()
    >>> found = suggest(linear, nn.MSELoss(), data, batch_sizes=(1, 2))
    >>> [round(found.answer("SGD", size).lr, 4) for size in (1, 2)]     # 2a / (a^2 + s^2), 2 / a
    [0.2941, 0.4]
    """
    began = time.perf_counter()
    options: dict[str, Any] = {"batch_dim": batch_dim}
    if isinstance(model, nn.Module) and not curvature:
        options["second_derivatives"] = False
    is_instance = hasattr(optimizer, "param_groups") and not isinstance(optimizer, type)
    if optimizer is not None and not is_instance:
        raise TypeError(f"optimizer={shown(optimizer)}: expected one optimizer")
    mean_loss = problem_of(model, loss_fn, data, **options)
    if optimizer is not None and mean_loss.all_trainable:
        # The optimizer may also update parameters outside the model, such as those of the loss.
        mean_loss = mean_loss.restricted(mean_loss.params)
    n = mean_loss.num_samples
    if not curvature:
        one_step = _one_step_rates(mean_loss, optimizer)
        seconds = time.perf_counter() - began
        return Suggestions((), None, n, seconds, (), mean_loss.method, one_step)
    problem = require_samples(mean_loss, "a learning rate for each batch size")
    size = finite_size(dataset_size, n, least=n)
    sizes = _sizes(batch_sizes, size)
    search = Search(problem, size, whole("max_rows", max_rows), seed)
    one_step = _one_step_rates(problem, optimizer, note=search.note)
    plain = search.curvature_at(problem)
    rows: list[Suggestion] = []
    for name, step in ((_SGD, LinearStep(1.0)), (_MOMENTUM, LinearStep(1.0, momentum=0.9))):
        rows += [search.answer(name, plain, step, batch_size) for batch_size in sizes]
    rows += _adam(search, sizes) if optimizer is None else _running(search, sizes, optimizer)
    seconds, notes = time.perf_counter() - began, tuple(search.notes)
    return Suggestions(tuple(rows), plain.sharpness, n, seconds, notes, problem.method, one_step)


def _running(
    search: Search, sizes: Sequence[int], optimizer: torch.optim.Optimizer
) -> list[Suggestion]:
    """Return the answers for the given optimizer, with the preconditioner of its last step."""
    problem, step = running_adam(search.problem, optimizer)
    name = _label(optimizer)
    search.note(f"{name}: with the second moments of the optimizer's last step")
    point = search.curvature_at(problem)
    return [search.answer(name, point, step, size) for size in sizes]


def _adam(search: Search, sizes: Sequence[int]) -> list[Suggestion]:
    """Return the answers for AdamW, whose second moments differ between batch sizes."""
    search.note(f"AdamW: with the second moments of batches at this point, beta1 = {BETA}")
    if (stride := gradient_stride(search.problem)) > 1:
        search.note(f"the gradient's variance is that of one sample in {stride}")
    step = LinearStep(1.0, momentum=BETA, dampening=BETA)
    moments = gradient_moments(search.problem)
    if still := without_gradient(search.problem, moments):
        more = ", …" if len(still) > 3 else ""
        search.note(
            f"AdamW: {', '.join(still[:3])}{more} have no gradient here, as before a layer of zeros."
            " AdamW takes its largest steps there, so its rates are far too low: ask after some steps"
        )
    scales = expected_scales(search.problem, moments, sizes, search.dataset_size)
    points = (search.curvature_at(search.problem.transformed(scale=scale)) for scale in scales)
    return [
        search.answer(_ADAMW, point, step, size) for point, size in zip(points, sizes, strict=True)
    ]


def _one_step_rates(
    problem: MeanLoss,
    optimizer: torch.optim.Optimizer | None,
    note: Callable[[str], object] | None = None,
) -> dict[str, float]:
    """Return the learning rates from which one step raises the loss, by optimizer.

    With ``note``, it is called if one has none; without it the error is raised.
    """
    optimizers: dict[str, torch.optim.Optimizer | None] = {_SGD: None}
    if optimizer is not None:
        name = _label(optimizer)
        optimizers[_RUNNING if name == _SGD else name] = optimizer
    rates: dict[str, float] = {}
    for name, each in optimizers.items():
        try:
            result = critical_sharpness(problem, optimizer=each)
        except (ValueError, TypeError, NonFiniteError) as error:
            if note is None:
                raise
            note(f"no rate of one step of {name}: {error}")
        else:
            rates[name] = result.lr if result.bracket[1] < math.inf else math.inf
    return rates


def _label(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer's name in the table."""
    name = type(base_optimizer(optimizer)).__name__
    return _ADAMW if name == "Adam" else name  # they agree without weight decay


def _sizes(batch_sizes: Iterable[int] | None, dataset_size: int | None) -> Sequence[int]:
    n = math.inf if dataset_size is None else dataset_size
    if batch_sizes is None:
        powers = [4**k for k in range(4) if 4**k < n]
        return powers if dataset_size is None else [*powers, dataset_size]
    if isinstance(batch_sizes, int):
        batch_sizes = [batch_sizes]
    sizes = [whole("batch_sizes", size) for size in batch_sizes]
    if not sizes or max(sizes) > n:
        raise ValueError(f"batch_sizes={sizes}: expected at least one, each at most {n} samples")
    return list(dict.fromkeys(sizes))
