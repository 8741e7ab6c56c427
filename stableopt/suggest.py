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

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import finite_size, whole
from stableopt._support.deprecation import warn_renamed
from stableopt.curvature import (
    Hessian,
    NonFiniteError,
    Problem,
    SecondDerivativeError,
    top_eigenpair,
)
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.along_step.critical_sharpness import critical_sharpness
from stableopt.stability.mean_square.choice import FITTED, curvature_of
from stableopt.stability.mean_square.critical_lr import MAX_ROWS, threshold
from stableopt.stability.mean_square.hessian_curvature import HessianCurvature, Negated, at_saddle
from stableopt.stability.mean_square.sample_curvature import SampleCurvature
from stableopt.stability.rules.coordinates import check_params, in_rule_coordinates, problem_of
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.update_rule import UpdateRule, base_optimizer

__all__ = ["Suggestion", "Suggestions", "suggest"]

_SGD, _MOMENTUM, _ADAMW = "SGD", "SGD, momentum 0.9", "AdamW"
_RUNNING = "SGD, running"
"""The label of a given SGD, with the momentum and weight decay of its groups."""

_BETA, _EPSILON = 0.9, 1e-8
"""AdamW's defaults, used if no optimizer is given."""

_SAMPLES = 64
"""Samples whose gradients estimate the second moments of AdamW."""

_UNSTABLE = "no rate is stable"

_DIRECTIONS = 8
"""Leading directions used if there are too many directions for all."""


@dataclass(frozen=True)
class Suggestion:
    """The answer for one optimizer and one batch size.

    Attributes:
        optimizer: ``"SGD"``, ``"SGD, momentum 0.9"``, ``"AdamW"``, or the name of a running optimizer
            of another class.
        batch_size: samples in a step.
        lr: the largest stable learning rate, or an upper bound.
        lower: a learning rate up to which no second moment grows, as for
            :class:`~stableopt.stability.CriticalLR`; ``None`` if none is known.
        exact: whether ``lr`` is the threshold rather than a bound.
        seconds: wall time, without the work that all answers share.
    """

    optimizer: str
    batch_size: int
    lr: float
    lower: float | None
    exact: bool
    seconds: float


@dataclass(frozen=True)
class Suggestions:
    r"""All answers; ``print`` shows a table.

    Attributes:
        rows: one for each optimizer and batch size.
        sharpness: sharpness of the Hessian at the point; ``None`` with ``curvature=False``.
        num_samples: number of samples evaluated.
        seconds: total wall time.
        notes: the assumptions, one sentence each.
        method: how Hessian-vector products were computed.
        one_step: by optimizer, the learning rate from which one full-batch step raises the loss:
            :math:`2/\lambda_c` of :func:`~stableopt.critical_sharpness`, infinite if no rate tried
            does. Keys: ``"SGD"`` and the given optimizer (``"SGD, running"`` for SGD). Empty if it
            cannot take a trial step.
    """

    rows: tuple[Suggestion, ...]
    sharpness: float | None
    num_samples: int
    seconds: float
    notes: tuple[str, ...]
    method: str
    one_step: Mapping[str, float] = field(default_factory=dict)

    def answer(self, optimizer: str, batch_size: int) -> Suggestion:
        """Return the answer for one optimizer and one batch size.

        Raises:
            KeyError: for an optimizer or a batch size without an answer.
        """
        for row in self.rows:
            if (row.optimizer, row.batch_size) == (optimizer, batch_size):
                return row
        raise KeyError(f"no answer for {optimizer!r} at batch size {batch_size}")

    def of(self, optimizer: str, batch_size: int) -> Suggestion:
        """Former name of :meth:`answer`."""
        warn_renamed("Suggestions.of", "Suggestions.answer")
        return self.answer(optimizer, batch_size)

    def __str__(self) -> str:
        names = list(dict.fromkeys([*(row.optimizer for row in self.rows), *self.one_step]))
        sizes = list(dict.fromkeys(row.batch_size for row in self.rows))
        lines = [["batch size", *names]]
        for size in sizes:
            lines.append([str(size), *(_cell(self.answer(name, size)) for name in names)])
        if self.one_step:
            rates = [self.one_step.get(name) for name in names]
            lines.append(["one step", *("–" if lr is None else f"{lr:.3g}" for lr in rates)])
        widths = [max(len(line[k]) for line in lines) for k in range(len(names) + 1)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        head = f"Largest linearly stable learning rate, by {self.num_samples} samples"
        cost = f"found in {self.seconds:.1f} s"
        if self.sharpness is not None:
            cost = f"sharpness {self.sharpness:.4g} ({self.method}); {cost}"
        return "\n".join([head, *table, cost, *self.notes])


def _cell(row: Suggestion) -> str:
    return f"{'' if row.exact else '<= '}{row.lr:.3g}"


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
        raise TypeError(f"optimizer={optimizer!r}: expected one optimizer")
    mean_loss = problem_of(model, loss_fn, data, **options)
    notes: list[str] = []
    try:
        one_step = _one_step_rates(mean_loss, optimizer)
    except (ValueError, TypeError, NonFiniteError) as error:
        if not curvature:
            raise
        one_step = {}
        notes.append(f"no rate of one step: {error}")
    if not curvature:
        seconds = time.perf_counter() - began
        return Suggestions((), None, mean_loss.num_samples, seconds, (), mean_loss.method, one_step)
    problem = require_samples(mean_loss, "a learning rate for each batch size")
    n = problem.num_samples
    size = finite_size(dataset_size, n, least=n)
    sizes = _sizes(batch_sizes, size)
    rows: list[Suggestion] = []
    search = _Search(problem, size, whole("max_rows", max_rows), seed, notes)
    plain = search.curvature_at(problem)
    for name, step in ((_SGD, LinearStep(1.0)), (_MOMENTUM, LinearStep(1.0, momentum=0.9))):
        rows += [search.answer(name, plain, step, batch_size) for batch_size in sizes]
    if optimizer is not None:
        preconditioned, step = _adam_problem(problem, optimizer)
        name = _label(optimizer)
        notes.append(f"{name}: with the second moments of the optimizer's last step")
        curvature_in_adam = search.curvature_at(preconditioned)
        rows += [search.answer(name, curvature_in_adam, step, size) for size in sizes]
    else:
        notes.append("AdamW: with the second moments that batches have here, beta1 = 0.9")
        if _stride(problem) > 1:
            notes.append(f"the gradient's variance is that of one sample in {_stride(problem)}")
        mean, variance = _gradient_moments(problem)
        step = LinearStep(1.0, momentum=_BETA, dampening=_BETA)
        for batch_size in sizes:
            second = mean**2 + noise_factor(batch_size, size) * variance
            roots = [1 / (part.sqrt() + _EPSILON).sqrt() for part in problem.unflatten(second)]
            curvature_in_adam = search.curvature_at(problem.transformed(scale=roots))
            rows.append(search.answer(_ADAMW, curvature_in_adam, step, batch_size))
    return Suggestions(
        tuple(rows),
        plain.sharpness,
        n,
        time.perf_counter() - began,
        tuple(dict.fromkeys(notes)),
        problem.method,
        one_step,
    )


def _one_step_rates(problem: MeanLoss, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Return the learning rates from which one step raises the loss, by optimizer."""
    optimizers: dict[str, torch.optim.Optimizer | None] = {_SGD: None}
    if optimizer is not None:
        name = _label(optimizer)
        optimizers[_RUNNING if name == _SGD else name] = optimizer
    results = {name: critical_sharpness(problem, optimizer=o) for name, o in optimizers.items()}
    return {name: r.lr if r.bracket[1] < math.inf else math.inf for name, r in results.items()}


def _label(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer's name in the table."""
    name = type(base_optimizer(optimizer)).__name__
    return _ADAMW if name == "Adam" else name  # they agree without weight decay


@dataclass(frozen=True)
class _Curvature:
    """The curvature at the point, in an optimizer's coordinates."""

    sharpness: float
    smallest: float  # eigenvalue of the Hessian; 0 if `samples` is known
    samples: SampleCurvature | HessianCurvature | None
    share: float | None


@dataclass(frozen=True)
class _Search:
    problem: Problem
    dataset_size: int | None
    max_rows: int
    seed: int
    notes: list[str]

    def curvature_at(self, problem: Problem) -> _Curvature:
        """Measure the curvature of a problem in its coordinates."""
        hessian = Hessian(problem)
        sharpness = top_eigenpair(hessian, tol=1e-2, seed=self.seed).value
        try:
            samples, share = curvature_of(
                problem,
                "auto",
                LinearStep(1.0),
                max_rows=self.max_rows,
                directions=min(_DIRECTIONS, problem.num_params),
                differences=True,
                seed=self.seed,
            )
        except (ValueError, TypeError, SecondDerivativeError) as error:
            self.notes.append(f"bounds by the sharpness alone: {error}")
            smallest = -top_eigenpair(Negated(hessian), tol=1e-2, seed=self.seed).value
            if smallest < -FITTED * abs(sharpness):
                self.note_unstable(at_saddle(smallest))
            return _Curvature(sharpness, smallest, None, None)
        return _Curvature(sharpness, 0.0, samples, share)

    def note_unstable(self, reason: Any) -> None:
        """Note why no rate is stable, once: AdamW would give a reason for each batch size."""
        if not any(note.startswith(_UNSTABLE) for note in self.notes):
            self.notes.append(f"{_UNSTABLE}: {reason}")

    def answer(self, name: str, point: _Curvature, step: LinearStep, batch_size: int) -> Suggestion:
        """Return the threshold for one batch size."""
        began = time.perf_counter()
        edge = step.max_lr(point.sharpness)
        noise = noise_factor(batch_size, self.dataset_size)
        noise_known = not noise or (step.momentum_share == 1 and step.filter is None)
        if point.samples is None or not noise_known:
            if point.samples is not None:
                self.notes.append(
                    f"{name}: bounds of the full batch, since its second moments are not known"
                )
            # Without noise, and at a minimum, the edge of the Hessian is the threshold.
            exact = noise == 0 and point.smallest >= -FITTED * abs(point.sharpness)
            seconds = time.perf_counter() - began
            return Suggestion(name, batch_size, edge, edge if exact else None, exact, seconds)
        result = threshold(point.samples, step, noise, share=point.share, seed=self.seed)
        if result.obstacle is not None:
            self.note_unstable(result.obstacle)
        return Suggestion(
            name,
            batch_size,
            # Leading directions may miss part of the sharpness: the edge caps an inexact value.
            result.value if result.exact else min(result.value, edge),
            result.lower or None,
            result.exact and result.converged,
            time.perf_counter() - began,
        )


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


def _adam_problem(problem: Problem, optimizer: torch.optim.Optimizer) -> tuple[Problem, LinearStep]:
    rule = UpdateRule.from_optimizer(optimizer)
    check_params([optimizer], problem, explicit=True)
    known = rule.preconditioner is not None and rule.unknown is None and rule.noise_known
    if not known or rule.preconditioner is None or not rule.preconditioner.diagonal:
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: expected an Adam or AdamW that has taken a step, so"
            " that its second moments are known; leave it out to use those at this point"
        )
    rule = dataclasses.replace(rule, decoupled_weight_decay=0.0)
    preconditioned = in_rule_coordinates(problem, rule, [optimizer]).without_weight_decay()
    return preconditioned, dataclasses.replace(rule.linear_step, lr=1.0)


def _stride(problem: Problem) -> int:
    return max(1, problem.own_samples // _SAMPLES)


def _gradient_moments(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the elementwise mean and variance of the gradient over samples.

    The variance is that of samples at equal distances in the data, which may be sorted by class.
    """
    theta, mean = problem.theta(), problem.gradient()
    with torch.inference_mode(False):
        squares = torch.zeros_like(mean)
    stride = _stride(problem)

    def samples() -> Iterator[tuple[Any, int]]:
        start = 0
        for batch, size in problem.chunks():
            for index in range(-start % stride, size, stride):
                yield cut(batch, index, index + 1), 1
            start += size

    def add(sample: Any, size: int) -> None:
        slopes = torch.autograd.grad(problem.loss(theta, sample), theta, allow_unused=True)
        squares.add_((problem.flatten(slopes) - mean) ** 2)

    return mean, mean_over_chunks(problem, [squares], add, samples())[0]
