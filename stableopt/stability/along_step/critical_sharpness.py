r"""The critical sharpness: the learning rate at which one step stops lowering the loss.

.. math::
    \eta_c = \min\{\eta > 0 : L(\theta - \eta u) > L(\theta)\}, \qquad \lambda_c = 2/\eta_c

along the direction u of a step :math:`\theta - \eta u` (Kalra et al., arXiv:2601.16979, 2026, definition
2.1). On a quadratic :math:`\lambda_c = u^\top Hu/u^\top g \le \lambda_{\max}(PH)` for u = Pg, with
equality along the top eigenvector. It takes only losses, no second derivative. Its limit :math:`2/\eta`
is that of one step; with momentum, the limit of the sharpness is another.

Near a minimum with positive loss, the fall of the loss along the step is below rounding, and a search
finds no crossing. The loss is a parabola there, and its slopes at two points give the crossing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import positive, shown, whole
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
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["CriticalSharpness", "along_taken_step", "critical_sharpness"]

TOL = 1 / 16
"""Relative width of the bracket, that of Kalra et al."""

MAX_PASSES = 7
"""The largest number of forward passes, including the one for the loss at the start."""

_ROUNDINGS = 20
"""The loss must fall by so many rounding errors at some distance tried; else gradients are used."""

_DIP = 100
"""Largest fall of a parabola, in rounding errors, for which gradients are used. It is five times
``_ROUNDINGS``, since all distances tried can be near the crossing."""

_SHIFT = 5e-3
"""Step between two gradients, relative to the weights: the third root of single precision."""


@dataclass(frozen=True)
class CriticalSharpness:
    r"""The learning rate at which one step stops lowering the loss.

    Attributes:
        value: :math:`\lambda_c = 2/\eta_c`.
        lr: :math:`\eta_c`, interpolated in the bracket.
        bracket: the largest learning rate tried that did not raise the loss, and the smallest that did;
            0 or infinity if there is none.
        passes: the number of forward passes over the data.
        converged: whether the bracket is narrower than ``tol``, or, with the loss constant up to
            rounding, two gradients gave the learning rate; the bracket is then (0, infinity).

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
    arXiv:2601.16979, 2026). It takes at most seven forward passes, one of them with its gradient unless
    ``direction`` is given. It takes no second derivative: compiled and fused models, and models under
    ``fully_shard``, can be measured. Near a minimum, if the losses along the step differ only by
    rounding, one more gradient gives the result: the loss is a parabola there.

    Args:
        model: the model, at the point to measure; or, for ``model``, ``loss_fn`` and ``data``, a
            :class:`~stableopt.curvature.Problem`.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a batch.
        data: the samples, as for :func:`~stableopt.measure`.
        optimizer: the optimizer, or a list of optimizers, whose next step with the gradient of ``data``
            is the direction. A copy takes the step; the optimizer does not change. By default gradient
            descent.
        direction: instead of ``optimizer``, the direction u of the step :math:`\theta - \eta u`: flat
            ``(d,)``, or a tensor for each parameter.
        reference: a problem of the same model whose loss is evaluated along the step, for the relative
            form: the loss on the earlier training data along the step of fine-tuning. Fine-tuning stays
            in the basin of the earlier training if its learning rate is below ``lr``.
        lr: the first learning rate to try; an earlier ``result.lr`` saves passes. By default that of
            the optimizer, or :math:`-2L/g^\top u` at a loss L.
        tol: the largest relative width of the bracket.
        max_passes: the largest number of forward passes. If they do not suffice, as for one in six
            trained networks, the bracket is wider than ``tol`` and ``converged`` is ``False``.
        params: the parameters that the step changes; by default all trainable ones.
        chunk_size: the largest number of samples evaluated at once.
        max_samples: the largest number of samples of ``data`` to use.
        dtype: the precision, as for :class:`~stableopt.curvature.Problem`.
        sample_weight: the weights of samples, as for :class:`~stableopt.curvature.Problem`.
        batch_dim: the dimension that counts the samples, as for :class:`~stableopt.curvature.Problem`.
        process_group: the ranks that measure together, as for :func:`~stableopt.measure`.

    Returns:
        The result. If no learning rate tried raises the loss, ``lr`` is the largest tried and
        ``value`` an upper bound. If all raise it, as when u is not a descent direction, ``lr`` is the
        smallest tried and ``value`` a lower bound. ``converged`` is ``False`` in both cases.

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
        raise ValueError("optimizer and direction: expected at most one of the two")
    tol = positive("tol", tol)
    if not tol < 1:
        raise ValueError(f"tol={tol!r}: expected a number below 1")
    whole("max_passes", max_passes, least=2)
    optimizers = () if optimizer is None else optimizers_in(optimizer)
    is_problem = isinstance(model, MeanLoss)
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
        second_derivatives=None if is_problem else False,
        process_group=process_group,
    )
    rule = rule_of(optimizers) if optimizers else None
    if optimizers:
        check_params(optimizers, problem)
    sign = problem.sign
    if rule is not None:
        sign = -1.0 if rule.maximize else 1.0
    problem = evaluated = problem.transformed(sign=sign)
    if reference is not None:
        evaluated = _checked_reference(reference, problem).transformed(sign=sign)
    if direction is None:
        step = _next_step(problem, optimizers, rule, sign)
    else:
        step = _Step(_direction_parts(direction, problem))
    _check_direction(step.along, problem)
    return _searched(problem, evaluated, step, rule, lr=lr, tol=tol, max_passes=max_passes)


@dataclass(frozen=True)
class _Step:
    r"""A direction u, with what its computation has shown of the loss.

    Attributes:
        along: u, a tensor for each parameter.
        loss: the loss at the point; ``None`` if not known.
        slope: :math:`-g^\top u`; ``None`` if not known.
    """

    along: Sequence[Tensor]
    loss: float | None = None
    slope: float | None = None


def _next_step(
    problem: MeanLoss,
    optimizers: Sequence[torch.optim.Optimizer],
    rule: UpdateRule | None,
    sign: float,
) -> _Step:
    """Return the optimizers' next step with the gradient of the problem, or that of gradient descent."""
    # The forward pass of the gradient also returns the loss.
    loss, gradient = problem.loss_and_gradient()
    if optimizers:
        rate = 1.0 if rule is None or not rule.lr else rule.lr
        # An optimizer that maximizes changes the sign of the gradient itself.
        change = trial_step(optimizers, problem, sign * gradient)
        rates = [group.get("lr") for each in optimizers for group in each.param_groups]
        are_zero = all(rate is not None and not float(rate) for rate in rates)
        if are_zero and not problem.ranks.any(any(bool(part.any()) for part in change)):
            raise ValueError(
                "optimizer: its learning rate is 0 now, so its step has no direction; set that of an"
                " earlier or later step"
            )
        along = [part.to(problem.dtype) / -rate for part in change]
    else:
        along = problem.unflatten(gradient)
    return _Step(along, loss, -dot(problem, gradient, _flat(along)))


def _searched(
    problem: MeanLoss,
    evaluated: MeanLoss,
    step: _Step,
    rule: UpdateRule | None,
    *,
    lr: float | None,
    tol: float,
    max_passes: int,
) -> CriticalSharpness:
    """Search for the first learning rate at which the step raises the loss of ``evaluated``."""
    passes = 0 if step.loss is None else 1
    base = step.loss
    if base is None or evaluated is not problem:
        passes, base = passes + 1, evaluated.value()
    if not math.isfinite(base):
        raise NonFiniteError(f"the loss is {base}")
    theta = problem.theta()
    start = _first_lr(lr, rule, base, step.slope)

    def loss_at(eta: float) -> float:
        with torch.no_grad():
            moved = tuple(t.detach() - eta * u for t, u in zip(theta, step.along, strict=True))
            return evaluated.value(moved)

    # With a reference, the gradient is not that of the evaluated loss.
    slope = step.slope if evaluated is problem else None
    rise = first_rise(loss_at, base, start, tol=tol, passes=max_passes - passes, slope=slope)
    passes += rise.passes
    rounding = loss_rounding(evaluated, base)
    if slope is not None and rise.depth < _ROUNDINGS * rounding:
        eta = _crossing_from_gradients(problem, theta, step.along, slope, rounding)
        if eta is not None:
            return CriticalSharpness(2 / eta, eta, (0.0, math.inf), passes + 1, True)
    bracket = (rise.low, rise.high)
    return CriticalSharpness(2 / rise.share, rise.share, bracket, passes, _converged(rise, tol))


def along_taken_step(evaluation: Evaluation) -> QuantityResult:
    """Measure the critical sharpness along the step just taken, from the parameters before it.

    The search starts at the last result.
    """
    along, rule = evaluation.along_step(), evaluation.rule
    if not along.moved:
        return QuantityResult()
    base = along.loss_before
    if not math.isfinite(base):
        raise NonFiniteError(f"the loss before the step is {base}")
    rate = 1.0 if rule is None or not rule.lr else rule.lr
    last = evaluation.memory.get("critical_lr_along_step", rate)
    slope = along.known_slope
    # Passes for the losses before and after the step; the latter is the first trial if last == rate.
    spent = 1 if last == rate else 2
    rise = first_rise(
        along.loss_at, base, last / rate, tol=TOL, passes=MAX_PASSES - spent, slope=slope
    )
    details = {"passes": float(rise.passes)}
    rounding = loss_rounding(along.problem, base)
    if rise.depth < _ROUNDINGS * rounding:
        crossing = _parabola_crossing(along.slope, along.slope_after, rounding)
        if crossing is not None:
            value = 2 / (crossing * rate)
            measurement = Measurement(value, None, rise.passes)
            return QuantityResult(value, measurement=measurement, details=details)
    if rise.low == 0:
        return QuantityResult(details=details)  # the step is not a descent step
    eta = rise.share * rate
    evaluation.memory["critical_lr_along_step"] = eta
    width = 1 - rise.low / rise.high
    measurement = Measurement(2 / eta, width, rise.passes, _converged(rise, TOL))
    return QuantityResult(2 / eta, measurement=measurement, details=details)


def _crossing_from_gradients(
    problem: MeanLoss, theta: Theta, along: Sequence[Tensor], slope: float, rounding: float
) -> float | None:
    """Return the learning rate at which the parabola through two slopes returns to the loss at 0.

    ``None`` as for :func:`_parabola_crossing`.

    Args:
        problem: the loss.
        theta: the point.
        along: the direction u, a tensor for each parameter.
        slope: the derivative of the loss in the learning rate, at 0.
        rounding: rounding error of the loss.
    """
    direction, weights = _flat(along), problem.flatten([t.detach() for t in theta])
    length, size = (math.sqrt(dot(problem, v, v)) for v in (direction, weights))
    shift = _SHIFT * max(size, 1.0) / length
    shifted = tuple(t.detach() - shift * u for t, u in zip(theta, along, strict=True))
    _, gradient = problem.loss_and_gradient(shifted)
    crossing = _parabola_crossing(slope, -dot(problem, gradient, direction), rounding / shift)
    return None if crossing is None else crossing * shift


def _parabola_crossing(slope: float, slope_after: float, rounding: float) -> float | None:
    """Return where a parabola with these slopes at 0 and 1 returns to its value at 0.

    ``None`` if it does not return, or falls far enough below that value for a search.
    """
    if not slope < min(0.0, slope_after):
        return None
    crossing = 2 * slope / (slope - slope_after)
    return crossing if -slope * crossing / 4 < _DIP * rounding else None


def _converged(rise: Rise, tol: float) -> bool:
    return rise.low > 0 and 1 - rise.low / rise.high < tol


def _checked_reference(reference: Any, problem: MeanLoss) -> MeanLoss:
    if not isinstance(reference, MeanLoss):
        raise TypeError(f"reference={shown(reference)}: expected a Problem of the same model")
    if [id(p) for p in reference.params] != [id(p) for p in problem.params]:
        raise ValueError("reference: expected a Problem over the same parameters of the same model")
    return reference


def _direction_parts(direction: Tensor | Sequence[Tensor], problem: MeanLoss) -> list[Tensor]:
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
        raise ValueError(
            "the step is zero: expected a point with a gradient, or a nonzero direction="
        )


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _first_lr(lr: float | None, rule: UpdateRule | None, base: float, slope: float | None) -> float:
    """Return the first learning rate to try."""
    if lr is not None:
        return positive("lr", lr)
    if rule is not None and rule.lr:
        return rule.lr
    if slope is not None and slope < 0 and base > 0:
        # Half of 4 L / |slope|, where a parabola that falls to zero would return to L.
        return -2 * base / slope
    return 1.0
