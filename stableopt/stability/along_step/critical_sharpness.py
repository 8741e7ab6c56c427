r"""The critical sharpness: the learning rate at which one step stops lowering the loss.

.. math::
    \eta_c = \min\{\eta > 0 : L(\theta - \eta u) > L(\theta)\}, \qquad \lambda_c = 2/\eta_c

along the direction u of a step :math:`\theta - \eta u` (Kalra et al., arXiv:2601.16979, 2026, definition
2.1). On a quadratic :math:`\lambda_c = u^\top Hu/u^\top g \le \lambda_{\max}(PH)` for u = Pg, equal
along the top eigenvector. It takes losses alone, and so no second derivative. It is a threshold of one
step, :math:`2/\eta`: with momentum, sharpness has another limit.

Near a minimum with loss left the dip of the loss is rounding, and no crossing is found. There the loss
is a parabola, whose crossing follows from its slopes at two points: two gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import positive, whole
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.problem.data.layout import BatchDim
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta
from stableopt.stability.along_step.crossing_search import Rise, first_rise
from stableopt.stability.along_step.realised_edge import loss_rounding
from stableopt.stability.along_step.trial_step import trial_step
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.taken_step import dot
from stableopt.stability.rules.coordinates import check_params, problem_of
from stableopt.stability.rules.several import optimizers_in, rule_of

__all__ = ["CriticalSharpness", "along_taken_step", "critical_sharpness"]

TOL = 1 / 16
"""Relative width of the bracket, that of Kalra et al."""

MAX_PASSES = 7
"""Forward passes, that for the loss at the start included."""

_ROUNDINGS = 20
"""Rounding errors of the loss that it has to fall by, at some distance tried."""

_DIP = 100
"""Those of a parabola's dip: five times as many, if all distances tried are near the crossing."""

_SHIFT = 5e-3
"""Length of the step between two gradients, relative to the weights: the third root of the precision."""


@dataclass(frozen=True)
class CriticalSharpness:
    r"""The learning rate at which one step stops lowering the loss.

    Attributes:
        value: :math:`\lambda_c = 2/\eta_c`.
        lr: :math:`\eta_c`, interpolated in the bracket.
        bracket: the largest learning rate tried that did not raise the loss, and the smallest that did;
            0 or infinity where none was found.
        passes: forward passes over the data.
        converged: whether the bracket is as narrow as asked for; or, where the loss changes by rounding
            alone, whether two gradients gave the learning rate. The bracket is then open.

    >>> found = CriticalSharpness(4.0, 0.5, (0.49, 0.51), 5, True)
    >>> found.value * found.lr
    2.0
    """

    value: float
    lr: float
    bracket: tuple[float, float]
    passes: int
    converged: bool


def critical_sharpness(
    model: nn.Module | MeanLoss,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    data: Any = None,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    direction: Tensor | Sequence[Tensor] | None = None,
    reference: MeanLoss | None = None,
    lr: float | None = None,
    tol: float = TOL,
    max_passes: int = MAX_PASSES,
    params: Iterable[Tensor] | None = None,
    chunk_size: int | None = None,
    max_samples: int | None = None,
    dtype: torch.dtype | None = None,
    sample_weight: Tensor | Callable[[Any], Tensor] | None = None,
    batch_dim: BatchDim | None = None,
    process_group: Any = None,
) -> CriticalSharpness:
    r"""Return the critical sharpness :math:`\lambda_c = 2/\eta_c` along a step from here.

    :math:`\eta_c` is the smallest learning rate at which the step raises the loss (Kalra et al.,
    arXiv:2601.16979, 2026). It takes at most seven forward passes, and for a direction that is not
    given one gradient; no second derivative, so that compiled and fused models, and models under
    ``fully_shard``, can be measured. Near a minimum, where the loss changes by rounding alone, it takes
    one more gradient, and no crossing is searched for: the loss is a parabola there.

    Args:
        model: the model, at the point in question; or, for ``model``, ``loss_fn`` and ``data``, a
            :class:`~stableopt.curvature.Problem`.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        optimizer: the optimizer, or several, whose next step on the gradient of ``data`` is the
            direction. Copies of it step: it does not change. By default gradient descent.
        direction: alternatively, u itself, the descent direction of the step
            :math:`\theta - \eta u`: flat ``(d,)``, or a tensor for each parameter.
        reference: a problem of the same model whose loss counts, for the relative form: along the step
            that lowers the loss of fine-tuning, the loss of the data trained on before. Fine-tuning
            stays in its basin if the learning rate is below ``lr``.
        lr: the first learning rate tried: a former ``result.lr`` saves passes. By default the
            optimizer's, or :math:`-2L/g^\top u` at a loss L.
        tol: the largest relative width of the bracket.
        max_passes: the most forward passes. Where they do not suffice, the bracket is wider than asked
            for, and ``converged`` is ``False``: with trained networks in about one of six.
        params: the parameters that move; by default all trainable ones.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the most samples of ``data`` that count.
        dtype: the precision, as for :class:`~stableopt.curvature.Problem`.
        sample_weight: the weights of samples, as for :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for :class:`~stableopt.curvature.Problem`.
        process_group: the ranks that measure together, as for :func:`~stableopt.measure`.

    Returns:
        The result. Where no learning rate tried raises the loss, ``lr`` is the largest tried and
        ``value`` an upper bound; where all do, as when u does not descend, ``lr`` is the smallest
        tried and ``value`` a lower bound. ``converged`` is then ``False``.

    Raises:
        ValueError: for arguments out of range, a direction that is zero, and as ``Problem`` does.
        TypeError: for an optimizer that cannot take a trial step, and as ``Problem`` does.
        NonFiniteError: if the loss at the point, or the direction, is not finite.

    >>> model = nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> top = torch.tensor([[0.0, 1.0]]).double()              # f = (w_1^2 + 4 w_2^2) / 2, g = 4 top
    >>> _ = model.weight.data.copy_(top)
    >>> round(critical_sharpness(model, nn.MSELoss(), (x, y), direction=[4 * top]).value, 6)
    4.0
    """
    if optimizer is not None and direction is not None:
        raise ValueError("optimizer and direction: expected at most one of them")
    tol = positive("tol", tol)
    if not tol < 1:
        raise ValueError(f"tol={tol!r}: expected a number below 1")
    whole("max_passes", max_passes, least=2)
    optimizers = () if optimizer is None else optimizers_in(optimizer)
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
        second_derivatives=None if given else False,
        process_group=process_group,
    )
    rule = rule_of(optimizers) if optimizers else None
    if optimizers:
        check_params(optimizers, problem, explicit=given or params is not None)
    sign = problem.sign if rule is None else (-1.0 if rule.maximize else 1.0)
    problem = problem.transformed(sign=sign)
    counted = (
        problem if reference is None else _reference(reference, problem).transformed(sign=sign)
    )
    rate = 1.0 if rule is None or not rule.lr else rule.lr
    passes, base, slope = 0, None, None
    if direction is not None:
        along = _given(direction, problem)
    else:
        loss, gradient = problem.loss_and_gradient()
        if optimizers:
            # The optimizer turns the gradient of f itself around where it maximizes.
            change = trial_step(optimizers, problem, sign * gradient)
            along = [part.to(problem.dtype) / -rate for part in change]
        else:
            along = problem.unflatten(gradient)
        # The pass forward of the gradient has the loss.
        passes, base = 1, loss if counted is problem else None
        slope = -dot(problem, gradient, _flat(along))
    _check_direction(along, problem)
    theta = problem.theta()
    if base is None:
        passes, base = passes + 1, counted.value()
    if not math.isfinite(base):
        raise NonFiniteError(f"the loss is {base}")
    start = _start(lr, rule, base, slope)

    def loss_at(eta: float) -> float:
        with torch.no_grad():
            return counted.value(
                tuple(t.detach() - eta * u for t, u in zip(theta, along, strict=True))
            )

    # The gradient is that of the loss that counts, or of another.
    own = slope if counted is problem else None
    rise = first_rise(loss_at, base, start, tol=tol, passes=max_passes - passes, slope=own)
    rounding = loss_rounding(counted, base)
    if own is not None and rise.depth < _ROUNDINGS * rounding:
        eta = _by_two_gradients(problem, theta, along, own, rounding)
        if eta is not None:
            spent = passes + rise.passes + 1
            return CriticalSharpness(2 / eta, eta, (0.0, math.inf), spent, True)
    return CriticalSharpness(
        2 / rise.share,
        rise.share,
        (rise.low, rise.high),
        passes + rise.passes,
        _converged(rise, tol),
    )


def along_taken_step(at: Evaluation) -> QuantityResult:
    """Measure the critical sharpness along the step just taken, from the parameters before it.

    The search starts at the learning rate that it found last.
    """
    along, rule = at.along_step(), at.rule
    if not along.moved:
        return QuantityResult()
    base = along.loss_before
    if not math.isfinite(base):
        raise NonFiniteError(f"the loss before the step is {base}")
    rate = 1.0 if rule is None or not rule.lr else rule.lr
    last = at.memory.get("critical_lr_along_step", rate)
    slope = along.known_slope
    # The losses before the step and after it count too, and the latter may be the first tried.
    spent = 1 if last == rate else 2
    rise = first_rise(
        along.loss_at, base, last / rate, tol=TOL, passes=MAX_PASSES - spent, slope=slope
    )
    details = {"passes": float(rise.passes)}
    rounding = loss_rounding(along.problem, base)
    if rise.depth < _ROUNDINGS * rounding:
        crossing = _of_parabola(along.slope, along.slope_after, rounding)
        if crossing is not None:
            value = 2 / (crossing * rate)
            measurement = Measurement(value, 0.0, rise.passes, 0.0, True)
            return QuantityResult(value, measurement=measurement, details=details)
    if rise.low == 0:
        return QuantityResult(details=details)  # the step goes uphill
    eta = rise.share * rate
    at.memory["critical_lr_along_step"] = eta
    width = 1 - rise.low / rise.high
    measurement = Measurement(2 / eta, width, rise.passes, 0.0, _converged(rise, TOL))
    return QuantityResult(2 / eta, measurement=measurement, details=details)


def _by_two_gradients(
    problem: MeanLoss, theta: Theta, along: Sequence[Tensor], slope: float, rounding: float
) -> float | None:
    """Return the learning rate at which the parabola of two slopes is back at its start, or ``None``.

    Args:
        problem: the loss.
        theta: the point.
        along: u, a tensor for each parameter.
        slope: the slope of the loss in the learning rate at 0.
        rounding: rounding error of the loss.
    """
    direction, weights = _flat(along), problem.flatten([t.detach() for t in theta])
    step, size = (math.sqrt(dot(problem, v, v)) for v in (direction, weights))
    shift = _SHIFT * max(size, 1.0) / step
    there = tuple(t.detach() - shift * u for t, u in zip(theta, along, strict=True))
    _, gradient = problem.loss_and_gradient(there)
    crossing = _of_parabola(slope, -dot(problem, gradient, direction), rounding / shift)
    return None if crossing is None else crossing * shift


def _of_parabola(slope: float, slope_after: float, rounding: float) -> float | None:
    """Return where a parabola with these slopes at 0 and 1 is back at its start.

    ``None`` if it is not, or if its dip is deep enough for a search.
    """
    if not slope < min(0.0, slope_after):
        return None
    crossing = 2 * slope / (slope - slope_after)
    return crossing if -slope * crossing / 4 < _DIP * rounding else None


def _converged(rise: Rise, tol: float) -> bool:
    return rise.low > 0 and 1 - rise.low / rise.high < tol


def _reference(reference: Any, problem: MeanLoss) -> MeanLoss:
    if not isinstance(reference, MeanLoss):
        raise TypeError(
            f"reference={reference!r}: expected a Problem of the same model, whose loss counts"
        )
    if [id(p) for p in reference.params] != [id(p) for p in problem.params]:
        raise ValueError("reference: expected a Problem over the same parameters of the same model")
    return reference


def _given(direction: Tensor | Sequence[Tensor], problem: MeanLoss) -> list[Tensor]:
    if isinstance(direction, Tensor):
        if direction.shape != (problem.num_params,):
            raise ValueError(
                f"direction has shape {tuple(direction.shape)}: expected ({problem.num_params},), or"
                " a list with a tensor for each parameter"
            )
        return problem.unflatten(direction.detach().to(problem.device, problem.dtype))
    parts = [part.detach().to(problem.device, problem.dtype) for part in direction]
    if [part.shape for part in parts] != list(problem.shapes):
        raise ValueError(
            f"direction has shapes {[tuple(part.shape) for part in parts]}: expected"
            f" {[tuple(shape) for shape in problem.shapes]}"
        )
    return parts


def _check_direction(along: Sequence[Tensor], problem: MeanLoss) -> None:
    flat = _flat(along)
    if problem.ranks.any(not bool(torch.isfinite(flat).all())):
        raise NonFiniteError("the direction of the step is not finite")
    if not problem.ranks.any(bool(flat.any())):
        raise ValueError("the step is zero: expected a point that is not a minimum, or a direction")


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _start(lr: float | None, rule: Any, base: float, slope: float | None) -> float:
    """Return the first learning rate to try."""
    if lr is not None:
        return positive("lr", lr)
    if rule is not None and rule.lr:
        return float(rule.lr)
    if slope is not None and slope < 0 and base > 0:
        # Where a parabola that falls to zero is back at its start would be at 4 L / |slope|.
        return -2 * base / slope
    return 1.0
