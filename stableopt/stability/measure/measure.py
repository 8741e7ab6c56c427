"""`measure`: the stability margins of a model at one point."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import positive, whole
from stableopt.curvature import NonFiniteError
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.distributed.collectives import LostRankError
from stableopt.stability.layers.blocks import Block, Blocks, blocks_of
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.measure.quantities import DEFAULT_QUANTITIES, QUANTITIES
from stableopt.stability.measure.taken_step import TakenStep
from stableopt.stability.rules.coordinates import as_seen_by, check_params, problem_of
from stableopt.stability.rules.limits import noise_factor
from stableopt.stability.rules.preconditioner import UnknownStep
from stableopt.stability.rules.several import SeparateBlocks, optimizers_in, rule_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["check_quantities", "measure", "measure_at"]


def measure(
    model: nn.Module | MeanLoss,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    lr: float | None = None,
    update_rule: UpdateRule | None = None,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    quantities: Iterable[str] = DEFAULT_QUANTITIES,
    params: Iterable[Tensor] | None = None,
    chunk_size: int | None = None,
    max_samples: int | None = None,
    dtype: torch.dtype | None = None,
    sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
    batch_dim: BatchDim | None = None,
    blocks: Blocks | None = None,
    process_group: Any = None,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
) -> StabilityMargins:
    """Measure the stability margins of ``model`` once, without changing it.

    Args:
        model: the model, at the point to measure; or, for ``model``, ``loss_fn`` and ``data``, a
            :class:`~stableopt.curvature.Problem`.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the training set or a part of it; see :class:`~stableopt.curvature.Problem`.
        optimizer: the optimizer whose learning rate, momentum and so on give the limits, or a list of
            those that train the model together. Without a known rule a
            ``RuntimeWarning`` says that the limits are not known.
        lr: alternatively, the learning rate of plain SGD.
        update_rule: alternatively, the rule itself. Without any of the three, limits are not known.
        batch_size: samples in a step. Without it the limit of the non-uniformity is not known, unless
            the optimizer is :class:`stableopt.GD`.
        dataset_size: samples in the training set, if ``data`` is only a part of it.
        quantities: names of :data:`~stableopt.stability.QUANTITIES`, which
            ``docs/reading-margins.md`` lists, and registered ones
            (:func:`~stableopt.stability.register`); by default the sharpness alone, the cheapest, as
            in the monitor. Those along a step, such as the realised edge, need a monitor. With a
            preconditioner, sharpness includes the preconditioned sharpness.
        params: the parameters to measure; by default all trainable ones.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the most samples of ``data`` that count, as for ``Problem``. All by default.
        dtype: the precision to measure in, as for :class:`~stableopt.curvature.Problem`.
        sample_weight: the weights of samples in a loss that averages unequally, where they are not
            those of torch's losses; see :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for ``Problem``: 1 for time-first batches.
        blocks: the blocks of parameters that ``margins.layers`` shows, by default each module that has
            parameters of its own: a pattern of names such as ``"blocks.*"``, where ``*`` is one level
            of a name, a compiled regular expression, a module, a parameter, or several of these; or a
            mapping from names to them. A module stands for all parameters in it.
        process_group: a ``torch.distributed`` group whose ranks call this together, each with its
            shard as ``data``; by default that of a ``DistributedDataParallel`` model or of a model
            under ``fully_shard``. See :class:`~stableopt.curvature.Problem`.
        tol: the largest residual, relative to the eigenvalue.
        max_iter: the largest number of products for each quantity.
        seed: seed of the eigen-solver's random start.

    The preconditioner of an adaptive optimizer is not known before its first step: quantities that
    depend on it are then ``None``, with a ``RuntimeWarning``.

    Returns:
        The margins; ``failure`` says why if a loss or a curvature was not finite, ``failures`` why
        single quantities were not measured.

    Raises:
        ValueError: for contradicting or out-of-range arguments, and as ``Problem`` does.
        TypeError: as ``Problem`` and ``UpdateRule.from_optimizer`` do.
        Exception: if no quantity could be measured, the first one's error.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> margins = measure(model, nn.MSELoss(), (x, y), lr=0.25, batch_size=1)
    >>> round(margins.sharpness, 3), margins.sharpness_limit
    (4.0, 8.0)
    """
    if sum(given is not None for given in (optimizer, lr, update_rule)) > 1:
        raise ValueError("optimizer, lr and update_rule: expected at most one of them")
    rule = update_rule
    if rule is not None and not isinstance(rule, UpdateRule):
        raise TypeError(f"update_rule={rule!r}: expected an UpdateRule")
    optimizers = () if optimizer is None else optimizers_in(optimizer)
    if optimizers:
        rule = rule_of(optimizers)
    elif lr is not None:
        rule = UpdateRule(lr=positive("lr", lr))
    given = isinstance(model, MeanLoss)
    problem = problem_of(
        model,
        loss_fn,
        data,
        params=params,
        chunk_size=chunk_size,
        max_samples=max_samples,
        dtype=dtype,
        sample_weight=sample_weight,
        batch_dim=batch_dim,
        process_group=process_group,
    )
    if rule is not None and isinstance(rule.preconditioner, UnknownStep):
        warnings.warn(f"limits are not known: {rule.unknown}", RuntimeWarning, stacklevel=2)
    if optimizers:
        check_params(optimizers, problem, explicit=given or params is not None)
    if rule is not None:
        problem = as_seen_by(problem, rule, optimizers)
    dataset_size = (
        problem.num_samples if dataset_size is None else whole("dataset_size", dataset_size)
    )
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size)
        noise_factor(batch_size, dataset_size)  # raises for a batch above n
    margins, _ = measure_at(
        problem,
        rule,
        blocks=blocks_of(problem.model, problem.names, problem.params, blocks),
        batch_size=batch_size,
        dataset_size=dataset_size,
        quantities=check_quantities(quantities, rule, sharded=problem.sharded),
        tol=tol,
        max_iter=max_iter,
        seed=seed,
    )
    for name, reason in margins.failures.items():
        warnings.warn(f"{name} was not measured: {reason}", RuntimeWarning, stacklevel=2)
    return margins


def check_quantities(
    quantities: Iterable[str],
    rule: UpdateRule | None,
    *,
    sharded: bool = False,
    steps: bool = False,
) -> tuple[str, ...]:
    """Return ``quantities`` in the order of measurement, or raise ``ValueError``.

    ``steps``: whether they are measured after steps, as by a monitor.
    """
    listed = isinstance(quantities, Iterable) and not isinstance(quantities, str)
    wanted = list(quantities) if listed else []
    if not wanted or any(name not in QUANTITIES for name in wanted):
        raise ValueError(
            f"quantities={quantities!r}: expected a sequence of some of {tuple(QUANTITIES)}"
        )
    known = [quantity for name, quantity in QUANTITIES.items() if name in wanted]
    for quantity in known:
        quantity.check(rule, sharded=sharded, steps=steps)
    return tuple(quantity.name for quantity in known)


def measure_at(
    problem: MeanLoss,
    rule: UpdateRule | None,
    *,
    batch_size: int | None,
    dataset_size: int | None,
    quantities: Sequence[str],
    tol: float,
    max_iter: int,
    seed: int,
    starts: Mapping[str, Tensor] | None = None,
    step: int = 0,
    taken: TakenStep | None = None,
    memory: dict[str, Any] | None = None,
    window: int | None = None,
    blocks: tuple[Block, ...] = (),
) -> tuple[StabilityMargins, dict[str, Tensor]]:
    """Measure ``problem``, already in the rule's coordinates; return margins and subspaces.

    ``starts`` are the subspaces of an earlier measurement by quantity; if it is ``None``, no subspaces
    are returned. With a preconditioned rule, sharpness includes the preconditioned sharpness. ``taken``,
    ``memory``, ``window`` and ``blocks`` are those of an :class:`Evaluation`.
    """
    samples = dataset_size if rule is not None and rule.full_batch else batch_size
    names, without_step = _measurable(quantities, rule)
    results = {
        name: QuantityResult(limit=quantity.limit_of(rule, batch_size, dataset_size))
        for name, quantity in QUANTITIES.items()
        if quantity.in_box or name in names
    }
    if rule is not None:
        results |= {name: QuantityResult(failure=rule.unknown) for name in without_step}
    evaluation = Evaluation(problem, rule, samples, dataset_size, tol, max_iter, seed, starts)
    evaluation.results = results
    evaluation.taken, evaluation.window = taken, window
    evaluation.memory = {} if memory is None else memory
    evaluation.blocks = blocks or evaluation.blocks
    margins = StabilityMargins(
        step=step,
        lr=None if rule is None else rule.lr,
        batch_size=samples,
        dataset_size=dataset_size,
        results=results,
        method=problem.method,
    )
    failure: str | None = None
    errors: dict[str, Exception] = {}
    try:
        # Vectors made in a surrounding inference mode could not be changed inside the evaluation.
        with torch.inference_mode(False):
            for name in names:
                QUANTITIES[name].check_known(rule, samples)
                timed = partial(_timed, name, evaluation, results[name].limit)
                try:
                    # An error of one rank must not leave the ranks in different quantities.
                    results[name] = timed() if problem.sharded else problem.ranks.attempt(timed)
                except (NonFiniteError, LostRankError):
                    raise
                except Exception as error:
                    if problem.sharded and problem.ranks.several:  # FSDP is out of step
                        raise
                    errors[name] = error
                    reason = f"{type(error).__name__}: {error}"
                    results[name] = dataclasses.replace(results[name], failure=reason)
    except NonFiniteError as error:
        failure = str(error)
    if failure is None and errors and len(errors) == len(names):
        raise next(iter(errors.values()))
    loss = evaluation.loss()
    if not abs(loss) < float("inf"):
        failure = f"the loss is {loss}"
    if failure is not None:
        return dataclasses.replace(margins, failure=f"not finite: {failure}"), {}
    return dataclasses.replace(margins, loss=loss, results=results), evaluation.subspaces


def _timed(name: str, evaluation: Evaluation, limit: float | None) -> QuantityResult:
    began = time.perf_counter()
    found = QUANTITIES[name].measured(evaluation)
    seconds, measurement = time.perf_counter() - began, found.measurement
    if measurement is not None:
        measurement = dataclasses.replace(measurement, seconds=seconds)
    # Some limits are known only with the measurement, such as those that the gradient sets.
    limit = limit if found.limit is None else found.limit
    return dataclasses.replace(found, limit=limit, measurement=measurement)


def _measurable(quantities: Sequence[str], rule: UpdateRule | None) -> tuple[list[str], list[str]]:
    """Return the quantities that are defined for ``rule`` now, and those that wait for its first step.

    With a preconditioned rule the preconditioned sharpness is among them.
    """
    wanted = set(quantities)
    if "layers" in wanted:
        wanted.add("sharpness")  # whose eigenvector they share
    if rule is not None and rule.preconditioned and "sharpness" in wanted:
        wanted.add("preconditioned_sharpness")
    if (
        rule is not None
        and isinstance(rule.preconditioner, SeparateBlocks)
        and "sharpness" in wanted
    ):
        wanted.add("block_edge")
    if rule is None or not rule.preconditioned or isinstance(rule.preconditioner, UnknownStep):
        wanted = {name for name in wanted if "preconditioner" not in QUANTITIES[name].needs}
    unknown = {name for name in wanted if "step" in QUANTITIES[name].needs}
    if rule is not None and isinstance(rule.preconditioner, UnknownStep):
        unknown = set()  # then they are measured as without a preconditioner
    if rule is None or rule.unknown is None:
        unknown = set()
    return (
        [name for name in QUANTITIES if name in wanted - unknown],
        [name for name in QUANTITIES if name in unknown],
    )
