"""`measure`: measures the stability margins of a model once."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import finite_size, positive, shown
from stableopt.curvature import NonFiniteError
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.distributed.collectives import LostRankError
from stableopt.stability.layers.blocks import Blocks, blocks_of
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.measure.registry import DEFAULT_QUANTITIES, QUANTITIES
from stableopt.stability.rules.coordinates import check_params, in_rule_coordinates, problem_of
from stableopt.stability.rules.limits import checked_batch_size
from stableopt.stability.rules.several import optimizers_in, rule_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["check_quantities", "measurable", "measure", "measure_at"]


def measure(
    model: nn.Module | MeanLoss,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    lr: float | None = None,
    update_rule: UpdateRule | None = None,
    batch_size: int | None = None,
    dataset_size: float | None = None,
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
        optimizer: the optimizer whose learning rate, momentum and other options set the limits, or a
            list of optimizers that train the model together. If its update rule is not known, a
            ``RuntimeWarning`` says so, and the limits are ``None``.
        lr: instead of ``optimizer``, the learning rate of plain SGD.
        update_rule: instead of ``optimizer``, the rule itself. Without any of the three, the limits
            are ``None``.
        batch_size: samples in a step. Without it the limit of the non-uniformity is ``None``, unless
            the optimizer is :class:`stableopt.GD`.
        dataset_size: samples in the training set, if ``data`` is only a part of it; ``math.inf`` for an
            endless stream.
        quantities: names of :data:`~stableopt.stability.QUANTITIES`, listed in
            ``docs/reading-margins.md``, or of quantities that you register
            (:func:`~stableopt.stability.register`). The default is the sharpness, the cheapest; with
            a preconditioner it includes the preconditioned sharpness. Quantities along a step, such as
            the realised edge, need a monitor.
        params: the parameters to measure; by default all trainable ones.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the largest number of samples of ``data`` to use; by default all.
        dtype: the precision to measure in, as for :class:`~stableopt.curvature.Problem`.
        sample_weight: the weights of the samples, for a loss that averages with weights and is not
            one of torch's; see :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for ``Problem``: 1 for time-first batches.
        blocks: the blocks of parameters in ``margins.layers``, by default each module that holds
            parameters directly: a pattern of names such as ``"blocks.*"``, where ``*`` is one level
            of a name, a compiled regular expression, a module, a parameter, or several of these; or a
            mapping from names to these. A module stands for all parameters in it.
        process_group: a ``torch.distributed`` group whose ranks call this together, each with its
            shard as ``data``; by default the group of a ``DistributedDataParallel`` model or of a model
            under ``fully_shard``. See :class:`~stableopt.curvature.Problem`.
        tol: the largest residual, relative to the eigenvalue.
        max_iter: the largest number of products for each quantity.
        seed: seed of the eigen-solver's random start.

    The preconditioner of an adaptive optimizer is not known before its first step. Quantities that
    depend on it are then ``None``, with a ``RuntimeWarning``.

    Returns:
        The margins. ``failure`` is set if a loss or a curvature is not finite; ``failures`` says why
        single quantities were not measured.

    Raises:
        ValueError: for contradicting or out-of-range arguments, and as ``Problem`` does.
        TypeError: as ``Problem`` and ``UpdateRule.from_optimizer`` do.
        Exception: the error of the first quantity, if all quantities fail.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> margins = measure(model, nn.MSELoss(), (x, y), lr=0.25, batch_size=1)
    >>> round(margins.sharpness, 3), margins.sharpness_limit
    (4.0, 8.0)
    """
    if sum(given is not None for given in (optimizer, lr, update_rule)) > 1:
        raise ValueError("optimizer, lr and update_rule: expected at most one of the three")
    rule = update_rule
    if rule is not None and not isinstance(rule, UpdateRule):
        raise TypeError(f"update_rule={shown(rule)}: expected an UpdateRule")
    optimizers = () if optimizer is None else optimizers_in(optimizer)
    if optimizers:
        rule = rule_of(optimizers)
    elif lr is not None:
        rule = UpdateRule(lr=positive("lr", lr))
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
    if rule is not None and not rule.has_limit:
        warnings.warn(f"limits are not known: {rule.unknown}", RuntimeWarning, stacklevel=2)
    if optimizers:
        check_params(optimizers, problem)
    if rule is not None:
        problem = in_rule_coordinates(problem, rule, optimizers)
    full_batch = rule is not None and rule.full_batch
    size = finite_size(dataset_size, problem.num_samples, full_batch=full_batch)
    if batch_size is not None:
        batch_size = checked_batch_size(batch_size, size)
    evaluation = Evaluation(
        problem,
        rule,
        batch_size=size if full_batch else batch_size,
        dataset_size=size,
        tol=tol,
        max_iter=max_iter,
        seed=seed,
        blocks=blocks_of(problem.model, problem.names, problem.params, blocks),
    )
    margins = measure_at(evaluation, check_quantities(quantities, rule, sharded=problem.sharded))
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

    ``steps`` says that they are measured after steps, as by a monitor.
    """
    is_sequence = isinstance(quantities, Iterable) and not isinstance(quantities, str)
    names = list(quantities) if is_sequence else []
    if not names or any(name not in QUANTITIES for name in names):
        raise ValueError(
            f"quantities={shown(quantities)}: expected a sequence of names among {tuple(QUANTITIES)}"
        )
    selected = [quantity for name, quantity in QUANTITIES.items() if name in names]
    for quantity in selected:
        quantity.check(rule, sharded=sharded, steps=steps)
    return tuple(quantity.name for quantity in selected)


def measure_at(
    evaluation: Evaluation, quantities: Sequence[str], *, step: int = 0
) -> StabilityMargins:
    """Measure ``quantities`` at the point of ``evaluation``, which has taken no measurement yet.

    With a preconditioned rule, sharpness includes the preconditioned sharpness. ``step`` is the number
    of the step in the margins.
    """
    problem, rule, results = evaluation.problem, evaluation.rule, evaluation.results
    batch_size, dataset_size = evaluation.batch_size, evaluation.dataset_size
    names, without_step = measurable(quantities, rule)
    results |= {
        name: QuantityResult(limit=quantity.limit_of(rule, batch_size, dataset_size))
        for name, quantity in QUANTITIES.items()
        if quantity.in_box or name in names
    }
    if rule is not None:
        results |= {name: QuantityResult(failure=rule.unknown) for name in without_step}
    margins = StabilityMargins(
        step=step,
        lr=None if rule is None else rule.lr,
        batch_size=batch_size,
        dataset_size=dataset_size,
        results=results,
        method=problem.method,
    )
    failure: str | None = None
    errors: dict[str, Exception] = {}
    try:
        # Tensors of a surrounding inference mode do not allow in-place changes.
        with torch.inference_mode(False):
            for name in names:
                QUANTITIES[name].check_known(rule, batch_size)
                timed = partial(_timed, name, evaluation, results[name].limit)
                try:
                    # If one rank fails, `attempt` makes all fail: they go on with the same quantity.
                    results[name] = timed() if problem.sharded else problem.ranks.attempt(timed)
                except (NonFiniteError, LostRankError):
                    raise
                except Exception as error:
                    if problem.sharded and problem.ranks.several:
                        raise  # FSDP's collectives no longer match
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
        return dataclasses.replace(margins, failure=f"not finite: {failure}")
    return dataclasses.replace(margins, loss=loss, results=results)


def _timed(name: str, evaluation: Evaluation, limit: float | None) -> QuantityResult:
    """Measure one quantity; return its result with limit and wall time."""
    began = time.perf_counter()
    result = QUANTITIES[name].measured(evaluation)
    seconds, measurement = time.perf_counter() - began, result.measurement
    if measurement is not None:
        measurement = dataclasses.replace(measurement, seconds=seconds)
    # Some limits come with the measurement: that of the generalised sharpness needs the gradient.
    limit = limit if result.limit is None else result.limit
    return dataclasses.replace(result, limit=limit, measurement=measurement)


def measurable(quantities: Sequence[str], rule: UpdateRule | None) -> tuple[list[str], list[str]]:
    """Return the quantities to measure now, and those that need the optimizer's first step.

    Sharpness adds the preconditioned sharpness and the edge ratios of blocks, as the rule has them.
    """
    names = set(quantities)
    if "layers" in names:
        names.add("sharpness")  # shares are those of its eigenvector
    if "sharpness" in names and rule is not None:
        if rule.preconditioned:
            names.add("preconditioned_sharpness")
        if rule.blocks:
            names.add("block_edge")
    unreadable = rule is not None and not rule.has_limit
    if rule is None or unreadable or not rule.preconditioned:
        names = {name for name in names if "preconditioner" not in QUANTITIES[name].needs}
    waiting: set[str] = set()
    if rule is not None and rule.unknown is not None and not unreadable:
        waiting = {name for name in names if "step" in QUANTITIES[name].needs}
    return (
        [name for name in QUANTITIES if name in names - waiting],
        [name for name in QUANTITIES if name in waiting],
    )
