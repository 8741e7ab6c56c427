r"""`suggest`: the largest learning rates that are linearly stable at a point.

It prints them for each batch size and each of plain SGD, SGD with momentum 0.9, and AdamW::

    print(stableopt.suggest(model, loss_fn, (x, y), batch_sizes=(1, 16, 64)))

Above them training leaves this point; they do not say which rate learns best. The rate is the exact
mean-square threshold in two cases (:func:`~stableopt.critical_lr`): all samples are fitted and all
directions are affordable, or the model has few parameters. Otherwise it is an upper bound, as it is if
the model's outputs are not separate from its loss. Where the Hessian has negative curvature no learning
rate is stable; the bounds are then those of the directions of positive curvature, as a note says.

A last row has the rate from which *one* step along the full-batch gradient raises the loss, by a few
forward passes. It is not a limit of training, but for models that are too large for products with the
Hessian, or have no second derivative, it is what can be had: ``curvature=False`` finds it alone.
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

from stableopt._support.arguments import whole
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
from stableopt.stability.mean_square.hessian_curvature import HessianCurvature, Negated, leaves
from stableopt.stability.mean_square.sample_curvature import SampleCurvature
from stableopt.stability.rules.coordinates import as_seen_by, check_params, problem_of
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.update_rule import UpdateRule, base_optimizer

__all__ = ["Suggestion", "Suggestions", "suggest"]

_SGD, _MOMENTUM, _ADAMW = "SGD", "SGD, momentum 0.9", "AdamW"
_RUNNING = "SGD, running"
"""A running SGD, whose momentum and weight decay are those of its groups."""

_BETA, _EPSILON = 0.9, 1e-8
"""AdamW's defaults, used without an optimizer."""

_SAMPLES = 64
"""Samples whose gradients estimate the second moments of AdamW."""

_UNSTABLE = "no rate is stable"

_DIRECTIONS = 8
"""Number of leading directions if all are too many."""


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
        exact: whether ``lr`` is the threshold itself rather than a bound.
        seconds: wall time, without the part that all answers share.
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
        notes: assumptions.
        method: how products with the Hessian were computed.
        one_step: by optimizer, the learning rate from which one full-batch step raises the loss:
            :math:`2/\lambda_c` of :func:`~stableopt.critical_sharpness`. For plain SGD, ``"SGD"``, and
            the running optimizer if it can take a trial step, ``"SGD, running"`` if that is SGD too;
            infinity where no rate tried does.
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
        lines += [
            [str(size), *(_shown(self.answer(name, size)) for name in names)] for size in sizes
        ]
        if self.one_step:
            known = [self.one_step.get(name) for name in names]
            lines.append(["one step", *("–" if lr is None else f"{lr:.3g}" for lr in known)])
        widths = [max(len(line[k]) for line in lines) for k in range(len(names) + 1)]
        table = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]
        head = f"Largest linearly stable learning rate, by {self.num_samples} samples"
        found = f"found in {self.seconds:.1f} s"
        if self.sharpness is not None:
            found = f"sharpness {self.sharpness:.4g} ({self.method}); {found}"
        return "\n".join([head, *table, found, *self.notes])


def _shown(row: Suggestion) -> str:
    return f"{'' if row.exact else '<= '}{row.lr:.3g}"


def suggest(
    model: nn.Module | Problem,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    batch_sizes: Iterable[int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    dataset_size: int | None = None,
    max_rows: int = MAX_ROWS,
    curvature: bool = True,
    batch_dim: BatchDim | None = None,
    seed: int = 0,
) -> Suggestions:
    r"""Return the largest learning rates that are linearly stable here, by optimizer and batch size.

    Args:
        model: the model, at the point in question; or, for ``model``, ``loss_fn`` and ``data``, a
            ``Problem``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        batch_sizes: the batch sizes; by default 1, 4, 16, ... and all samples.
        optimizer: a running optimizer with a diagonal preconditioner, such as AdamW, whose second
            moments and betas are used; one whose second moments under noise are not known, such as
            NAdam, has the bound of the full batch. Without it, AdamW has the second moments that it
            would reach by staying at this point, :math:`v = \bar g^2 + \operatorname{Var}(g_i)/B`,
            estimated from 64 samples. Its weight decay, which changes the limit by a factor
            :math:`1-\eta\lambda/2`, is ignored.
        dataset_size: samples in the training set, if ``data`` is a part of it.
        max_rows: rows nC up to which all directions of Gauss–Newton matrices are used.
        curvature: ``False`` finds ``one_step`` of the answer alone, by one gradient and a few forward
            passes for each optimizer, which then may be any that can take a trial step.
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
    if isinstance(optimizer, (list, tuple)):
        raise TypeError(f"optimizer={optimizer!r}: expected one optimizer")
    given = problem_of(model, loss_fn, data, **options)
    notes: list[str] = []
    try:
        one_step = _one_step(given, optimizer)
    except (ValueError, TypeError, NonFiniteError) as error:
        if not curvature:
            raise
        one_step = {}
        notes.append(f"no rate of one step: {error}")
    if not curvature:
        seconds = time.perf_counter() - began
        return Suggestions((), None, given.num_samples, seconds, (), given.method, one_step)
    problem = require_samples(given, "a learning rate for each batch size")
    n = problem.num_samples
    size = n if dataset_size is None else whole("dataset_size", dataset_size, least=n)
    sizes = _sizes(batch_sizes, size)
    rows: list[Suggestion] = []
    search = _Search(problem, size, whole("max_rows", max_rows), seed, notes)
    plain = search.at(problem)
    for name, step in ((_SGD, LinearStep(1.0)), (_MOMENTUM, LinearStep(1.0, momentum=0.9))):
        rows += [search.answer(name, plain, step, batch_size) for batch_size in sizes]
    if optimizer is not None:
        seen, step = _as_adam_sees(problem, optimizer)
        name = _name(optimizer)
        notes.append(f"{name}: with the second moments of the optimizer's last step")
        adam = search.at(seen)
        rows += [search.answer(name, adam, step, batch_size) for batch_size in sizes]
    else:
        notes.append("AdamW: with the second moments that batches have here, beta1 = 0.9")
        if _stride(problem) > 1:
            notes.append(f"the gradient's variance is that of one sample in {_stride(problem)}")
        mean, variance = _gradient_moments(problem)
        step = LinearStep(1.0, momentum=_BETA, dampening=_BETA)
        for batch_size in sizes:
            second = mean**2 + noise_factor(batch_size, size) * variance
            roots = [1 / (part.sqrt() + _EPSILON).sqrt() for part in problem.unflatten(second)]
            at = search.at(problem.transformed(scale=roots))
            rows.append(search.answer(_ADAMW, at, step, batch_size))
    return Suggestions(
        tuple(rows),
        plain.sharpness,
        n,
        time.perf_counter() - began,
        tuple(dict.fromkeys(notes)),
        problem.method,
        one_step,
    )


def _one_step(problem: MeanLoss, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Return the learning rates from which one step raises the loss."""
    steps: dict[str, torch.optim.Optimizer | None] = {_SGD: None}
    if optimizer is not None:
        name = _name(optimizer)
        steps[_RUNNING if name == _SGD else name] = optimizer
    found = {name: critical_sharpness(problem, optimizer=its) for name, its in steps.items()}
    return {name: at.lr if at.bracket[1] < math.inf else math.inf for name, at in found.items()}


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Return the name in the table."""
    name = type(base_optimizer(optimizer)).__name__
    return _ADAMW if name == "Adam" else name  # without weight decay they are one


@dataclass(frozen=True)
class _Point:
    """The curvature at the point, in an optimizer's coordinates."""

    sharpness: float
    least: float
    samples: SampleCurvature | HessianCurvature | None
    share: float | None


@dataclass(frozen=True)
class _Search:
    problem: Problem
    dataset_size: int
    max_rows: int
    seed: int
    notes: list[str]

    def at(self, problem: Problem) -> _Point:
        """Measure a problem in its coordinates."""
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
            least = -top_eigenpair(Negated(hessian), tol=1e-2, seed=self.seed).value
            if least < -FITTED * abs(sharpness):
                self.unstable(leaves(least))
            return _Point(sharpness, least, None, None)
        return _Point(sharpness, 0.0, samples, share)

    def unstable(self, reason: Any) -> None:
        """Say once why no rate is stable: AdamW has other numbers for each batch size."""
        if not any(note.startswith(_UNSTABLE) for note in self.notes):
            self.notes.append(f"{_UNSTABLE}: {reason}")

    def answer(self, name: str, at: _Point, step: LinearStep, batch_size: int) -> Suggestion:
        """Return the threshold for one batch size."""
        began = time.perf_counter()
        edge = step.max_lr(at.sharpness)
        noise = noise_factor(batch_size, self.dataset_size)
        if at.samples is None or (noise and not (step.momentum_share == 1 and step.filter is None)):
            if at.samples is not None:
                self.notes.append(
                    f"{name}: bounds of the full batch, since its second moments are not known"
                )
            # Without noise the edge of the Hessian is the threshold itself, if it has a minimum.
            exact = noise == 0 and at.least >= -FITTED * abs(at.sharpness)
            seconds = time.perf_counter() - began
            return Suggestion(name, batch_size, edge, edge if exact else None, exact, seconds)
        found = threshold(at.samples, step, noise, share=at.share, seed=self.seed)
        if found.obstacle is not None:
            self.unstable(found.obstacle)
        return Suggestion(
            name,
            batch_size,
            # The search of the sharpness may end below it by its tolerance.
            found.value if found.exact else min(found.value, edge),
            found.lower or None,
            found.exact and found.converged,
            time.perf_counter() - began,
        )


def _sizes(given: Iterable[int] | None, n: int) -> Sequence[int]:
    if given is None:
        powers = [4**k for k in range(4) if 4**k < n]
        return [*powers, n]
    if isinstance(given, int):
        given = [given]
    sizes = [whole("batch_sizes", size) for size in given]
    if not sizes or max(sizes) > n:
        raise ValueError(f"batch_sizes={sizes}: expected some, each at most the {n} samples in all")
    return list(dict.fromkeys(sizes))


def _as_adam_sees(problem: Problem, optimizer: torch.optim.Optimizer) -> tuple[Problem, LinearStep]:
    rule = UpdateRule.from_optimizer(optimizer)
    check_params([optimizer], problem, explicit=True)
    known = rule.preconditioner is not None and rule.unknown is None and rule.noise_known
    if not known or rule.preconditioner is None or not rule.preconditioner.diagonal:
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: expected an Adam or AdamW that has taken a step, so"
            " that its second moments are known; leave it out for those of this point"
        )
    rule = dataclasses.replace(rule, decoupled_weight_decay=0.0)
    seen = as_seen_by(problem, rule, [optimizer]).without_weight_decay()
    return seen, dataclasses.replace(rule.linear_step, lr=1.0)


def _stride(problem: Problem) -> int:
    return max(1, problem.own_samples // _SAMPLES)


def _gradient_moments(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of the gradient over samples, entry by entry.

    The variance is that of samples spread over the data, which may be sorted by class.
    """
    theta, mean = problem.theta(), problem.gradient()
    with torch.inference_mode(False):
        squares = torch.zeros_like(mean)
    stride = _stride(problem)

    def samples() -> Iterator[tuple[Any, int]]:
        seen = 0
        for batch, size in problem.chunks():
            for index in range(-seen % stride, size, stride):
                yield cut(batch, index, index + 1), 1
            seen += size

    def add(sample: Any, size: int) -> None:
        slopes = torch.autograd.grad(problem.loss(theta, sample), theta, allow_unused=True)
        squares.add_((problem.flatten(slopes) - mean) ** 2)

    return mean, mean_over_chunks(problem, [squares], add, samples())[0]
