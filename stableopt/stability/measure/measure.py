"""Measuring how far a point stands from the edge of linear stability."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._arguments import positive, whole
from stableopt.curvature import NonFiniteError, Problem, top_eigenpair
from stableopt.curvature.problem.sharded import sharded_or_whole
from stableopt.curvature.products.linearization_cache import MEMORY
from stableopt.stability.direct import DIRECT
from stableopt.stability.limits import noise_factor
from stableopt.stability.margins import Measurement, StabilityMargins
from stableopt.stability.measure.coordinates import as_seen_by
from stableopt.stability.measure.quantities import DEGREE, OperatorsAt, measurement_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "QUANTITIES",
    "as_seen_by",
    "check_params",
    "check_quantities",
    "measure",
    "measure_at",
    "problem_of",
]

QUANTITIES = ("sharpness", "preconditioned_sharpness", "non_uniformity", "theorem1", *DIRECT)
"""What :func:`measure` can measure, in the order in which it does."""

_MOST_VECTORS, _FEWEST_VECTORS = 40, 6
"""Vectors of the parameters' size that an eigen-solver holds: as many as 1 GiB takes twice, since a
restart has the old ones beside the new. Where it is not all, none are kept to be followed."""

DEFAULT_QUANTITIES = ("sharpness", "non_uniformity")


def measure(
    model: nn.Module | Problem,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    update_rule: UpdateRule | None = None,
    batch_size: int | None = None,
    dataset_size: int | None = None,
    quantities: Iterable[str] | None = None,
    params: Iterable[Tensor] | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    process_group: Any = None,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
) -> StabilityMargins:
    """Measure the stability margins of ``model`` once, now; nothing of it changes.

    Args:
        model: the model, at the point to measure; or a ready :class:`~stableopt.curvature.Problem`
            in place of ``model``, ``loss_fn`` and ``data``.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples that the theory speaks of, the training set or a part of it; see
            :class:`~stableopt.curvature.Problem`.
        optimizer: where learning rate, momentum and the like are read from.
        lr: in place of an optimizer, the learning rate of plain SGD.
        update_rule: in place of either, the rule itself. With none of the three there are no limits.
        batch_size: samples in a step. Without it the non-uniformity has no known limit, unless the
            optimizer is :class:`stableopt.GD`.
        dataset_size: samples in all, where ``data`` is only a part of them.
        quantities: any of ``"sharpness"``, ``"preconditioned_sharpness"``, ``"non_uniformity"``,
            ``"theorem1"``, ``"critical_lr"``, ``"batch_sharpness"``; by default sharpness and, unless
            the preconditioner is not diagonal, non-uniformity. Sharpness comes with the preconditioned
            one where there is a preconditioner.
        params: the parameters that count; all trainable ones by default.
        chunk_size: the most samples evaluated at once.
        dtype: the precision to measure in, as for :class:`~stableopt.curvature.Problem`.
        process_group: a ``torch.distributed`` group whose ranks call this together, each with its
            shard as ``data``; see :class:`~stableopt.curvature.Problem`.
        tol: the largest residual relative to the eigenvalue.
        max_iter: the largest number of products for each quantity.
        seed: of the eigen-solver's random start.

    Before its first step an adaptive optimizer's preconditioner is not known: what depends on it is
    then ``None``, with a ``RuntimeWarning``.

    Returns:
        The margins; with ``failure`` set where a loss or a curvature was not finite.

    Raises:
        ValueError: for contradicting or out-of-range arguments, and as ``Problem`` does.
        TypeError: as ``Problem`` and ``UpdateRule.from_optimizer`` do.

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
    if optimizer is not None:
        rule = UpdateRule.from_optimizer(optimizer)
    elif lr is not None:
        rule = UpdateRule(lr=positive("lr", lr))
    given = isinstance(model, Problem)
    problem = problem_of(
        model,
        loss_fn,
        data,
        params=params,
        chunk_size=chunk_size,
        dtype=dtype,
        process_group=process_group,
    )
    if optimizer is not None:
        check_params(optimizer, problem, explicit=given or params is not None)
    if rule is not None:
        problem = as_seen_by(problem, rule, optimizer)
    dataset_size = (
        problem.num_samples if dataset_size is None else whole("dataset_size", dataset_size)
    )
    if batch_size is not None:
        batch_size = whole("batch_size", batch_size)
        noise_factor(batch_size, dataset_size)  # raises for a batch above n
    if quantities is None:
        every = _diagonal(rule) and not problem.sharded
        quantities = DEFAULT_QUANTITIES if every else ("sharpness",)
    margins, _ = measure_at(
        problem,
        rule,
        batch_size=batch_size,
        dataset_size=dataset_size,
        quantities=check_quantities(quantities, rule, sharded=problem.sharded),
        tol=tol,
        max_iter=max_iter,
        seed=seed,
    )
    return margins


def problem_of(
    model: nn.Module | Problem,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    data: Any,
    **options: Any,
) -> Problem:
    """Return the problem of ``model``, or ``model`` itself where it is one already.

    Raises:
        ValueError: if ``loss_fn`` or ``data`` are missing, or ``options`` are given beside a problem.
    """
    if not isinstance(model, Problem):
        if loss_fn is None or data is None:
            raise ValueError("loss_fn and data: expected both, or a Problem in place of model")
        return sharded_or_whole(model, loss_fn, data, **options)
    if any(value is not None for value in (loss_fn, data, *options.values())):
        raise ValueError(
            f"a Problem has its own loss_fn, data, {', '.join(options)}: leave them out"
        )
    return model


def check_params(optimizer: torch.optim.Optimizer, problem: Problem, *, explicit: bool) -> None:
    """Raise ``ValueError`` unless ``optimizer`` steps the parameters of ``problem``, and only those.

    ``explicit`` says that the user chose the parameters, so that it may step others too.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in zip(problem.names, problem.params, strict=True):
        if id(p) not in held:
            raise ValueError(
                f"parameter {name!r} is trainable but not in the optimizer: freeze it by"
                " requires_grad_(False), or name the parameters that count by params="
            )
    strangers = len(held - {id(p) for p in problem.model.parameters()})
    if strangers and not explicit:
        raise ValueError(
            f"the optimizer holds {strangers} parameters that are not the model's, so the model's"
            " curvature is not all that its steps see; name those that count by params="
        )


def check_quantities(
    quantities: Iterable[str], rule: UpdateRule | None, *, sharded: bool = False
) -> tuple[str, ...]:
    """Return ``quantities`` in the order in which they are measured, or raise ``ValueError``."""
    listed = isinstance(quantities, Iterable) and not isinstance(quantities, str)
    wanted = list(quantities) if listed else []
    if not wanted or any(name not in QUANTITIES for name in wanted):
        raise ValueError(f"quantities={quantities!r}: expected a sequence of some of {QUANTITIES}")
    if "theorem1" in wanted and rule is not None and not rule.plain:
        raise ValueError(
            f"quantities: theorem1 is a condition on SGD without momentum, and momentum is"
            f" {rule.momentum}, decoupled weight decay {rule.decoupled_weight_decay}; leave it out"
        )
    per_sample = [name for name in ("non_uniformity", "theorem1", *DIRECT) if name in wanted]
    if per_sample and not _diagonal(rule):
        raise ValueError(
            f"quantities: {per_sample[0]} needs a preconditioner with a root that can be multiplied"
            " by, and this one is not diagonal; leave it out"
        )
    if sharded and per_sample:
        raise ValueError(
            f"quantities: {per_sample[0]} needs the gradients of single samples, and fully_shard sums"
            " them over samples and ranks; expected sharpness alone. Measure a replica for the others"
        )
    if "preconditioned_sharpness" in wanted and (rule is None or not rule.preconditioned):
        raise ValueError(
            "quantities: preconditioned_sharpness needs an optimizer with a preconditioner; for"
            " others the limit is on the sharpness"
        )
    return tuple(name for name in QUANTITIES if name in wanted)


def measure_at(
    problem: Problem,
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
) -> tuple[StabilityMargins, dict[str, Tensor]]:
    """Measure ``problem``, already in the rule's coordinates; return margins and subspaces.

    ``starts`` are the subspaces of an earlier measurement, by quantity; where it is ``None``, none are
    returned either. With a preconditioned rule the sharpness is measured together with the
    preconditioned one.
    """
    margins = StabilityMargins(
        step=step,
        lr=None if rule is None else rule.lr,
        batch_size=dataset_size if rule is not None and rule.full_batch else batch_size,
        dataset_size=dataset_size,
        non_uniformity_limit=_non_uniformity_limit(rule, batch_size, dataset_size),
        method=problem.method,
    )
    if rule is not None and rule.unknown is None:
        prefix = "preconditioned_" if rule.preconditioned else ""
        limit: dict[str, Any] = {f"{prefix}sharpness_limit": rule.max_sharpness}
        margins = dataclasses.replace(margins, **limit)
    quantities = _measurable(quantities, rule)
    operators = OperatorsAt(problem, rule, margins)
    vectors = _vectors_held(problem)
    measurements: dict[str, Measurement] = {}
    subspaces: dict[str, Tensor] = {}
    more: dict[str, float] = {}
    try:
        # Vectors made in an ambient inference mode could not be changed inside the evaluation.
        with torch.inference_mode(False):
            for name in quantities:
                began = time.perf_counter()
                if name in DIRECT:
                    direct = DIRECT[name](problem, rule, margins, seed)
                    if direct.measurement is not None:
                        seconds = time.perf_counter() - began
                        measurements[name] = dataclasses.replace(
                            direct.measurement, seconds=seconds
                        )
                        more.update(direct.more)
                    continue
                start = (starts or {}).get(name)
                preconditioner = operators.preconditioner(name)
                pair = top_eigenpair(
                    operators.of(name),
                    preconditioner=preconditioner,
                    start=start,
                    keep=starts is not None and vectors == _MOST_VECTORS,
                    most_vectors=vectors,
                    tol=DEGREE.get(name, 1) * tol,
                    max_iter=max_iter,
                    seed=seed,
                )
                if pair.subspace is not None:
                    subspaces[name] = pair.subspace
                elif starts is not None and preconditioner is None:
                    subspaces[name] = pair.vector[None]
                found = measurement_of(name, pair, time.perf_counter() - began)
                measurements[name] = found.within(operators.error(name), tol)
        failure = None
    except NonFiniteError as error:
        failure = str(error)
    loss = problem.sign * operators.loss()
    if not abs(loss) < float("inf"):
        failure = f"the loss is {loss}"
    if failure is not None:
        return dataclasses.replace(margins, failure=f"not finite: {failure}"), {}
    values: dict[str, Any] = {name: m.value for name, m in measurements.items()} | more
    return dataclasses.replace(margins, loss=loss, measurements=measurements, **values), subspaces


def _vectors_held(problem: Problem) -> int:
    """Return how many vectors of the parameters' size a search may hold at once."""
    # Of a sharded problem each rank holds a part, and all must search alike.
    each = max(problem.ranks.all_gather_object(problem.num_params)) * problem.dtype.itemsize
    return max(_FEWEST_VECTORS, min(_MOST_VECTORS, MEMORY // (2 * each)))


def _non_uniformity_limit(
    rule: UpdateRule | None, batch_size: int | None, dataset_size: int | None
) -> float | None:
    if rule is None or rule.unknown or (batch_size is None and not rule.full_batch):
        return None
    if not rule.full_batch and not _diagonal(rule):
        return None
    return rule.max_non_uniformity(batch_size, dataset_size)


def _diagonal(rule: UpdateRule | None) -> bool:
    """Whether a step is one learning rate for all once each coordinate is scaled."""
    return rule is None or rule.preconditioner is None or rule.preconditioner.diagonal


def _measurable(quantities: Sequence[str], rule: UpdateRule | None) -> list[str]:
    """Return what of ``quantities`` has a meaning for ``rule`` as it is now, and its companions."""
    wanted = set(quantities)
    preconditioned = rule is not None and rule.preconditioned
    if preconditioned and "sharpness" in wanted:
        wanted.add("preconditioned_sharpness")
    if not preconditioned:
        wanted.discard("preconditioned_sharpness")
    reason = None if rule is None else rule.unknown
    if reason is not None and wanted != {"sharpness"}:
        wanted &= {"sharpness"}
        warnings.warn(
            f"the preconditioned margins are not known: {reason}", RuntimeWarning, stacklevel=3
        )
    return [name for name in QUANTITIES if name in wanted]
