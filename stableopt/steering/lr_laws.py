r"""Control laws for the learning rate: pure functions of a measurement and a state.

A law is ``law(measured, state) -> (decision, state)``, called once for each fresh measurement. Its state
is a dictionary of plain numbers, empty at the start. A new law is one function, and
``functools.partial`` binds options::

    StabilityLR(optimizer, monitor, target, law=partial(gated_staircase, gate=1.5))

The default is the gated staircase, since simpler laws fail (``python -m benchmarks run
control-laws`` shows how):

- :math:`\eta = 2\rho/a` from the *measured* a: with ρ < 1 the rate falls and the sharpness
  rises, both without end; with ρ ≥ 1 the rate makes one minimum after the other unstable without a
  target, or training diverges.
- A cut whenever a is above the target: the rate falls to zero, where every minimum is stable, and
  training stays in the sharp one.
- A cut whenever the loss rises: it cancels the wanted escape, during which the loss rises.
- A jump to :math:`2/a_{\mathrm{target}}`: the loss rises higher, and training diverges if
  :math:`\eta a/2` is large enough.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stableopt._support.deprecation import renamed_names
from stableopt.stability import StabilityMargins, UpdateRule
from stableopt.stability.measure.measurement import ratio_to_limit
from stableopt.stability.rules.filters import stable_range
from stableopt.steering.decision import Decision, Kind, kind_of_change
from stableopt.steering.law_state import State, at_step, without
from stableopt.steering.target import TargetRegion, lr_at_limit

__all__ = ["LRMeasured", "Law", "gated_staircase", "keep_margin", "why_diverging", "why_unusable"]

UNCONVERGED = "the measurement did not converge"

TRIES = 3
"""Failures after which a law no longer moves in the direction that failed."""


@dataclass(frozen=True)
class LRMeasured:
    """The input of a law for the learning rate.

    Attributes:
        margins: the fresh measurement.
        rule: the present update rule; its ``lr`` is the rate that a decision changes.
        target: the region, absolute or a share of the limits.
        min_lr: the smallest allowed rate.
        max_lr: the largest allowed rate.
        loss_cap: the loss above which training counts as diverging, or infinity.
        restored: whether the last decision was a cut that restored the last good weights.
    """

    margins: StabilityMargins
    rule: UpdateRule
    target: TargetRegion
    min_lr: float = 0.0
    max_lr: float = math.inf
    loss_cap: float = math.inf
    restored: bool = False

    @property
    def lr(self) -> float:
        """The present learning rate."""
        return self.rule.lr

    @property
    def sharpness(self) -> float | None:
        """The measured sharpness that the limit applies to."""
        return self.margins.limited_sharpness

    @property
    def name(self) -> str:
        """The name of that sharpness, in words."""
        preconditioned = self.margins.preconditioned_sharpness is not None
        return "preconditioned sharpness" if preconditioned else "sharpness"

    @property
    def limit(self) -> float:
        """The largest stable sharpness at the present rate."""
        return self.rule.max_sharpness

    @property
    def ratio(self) -> float:
        """The measured sharpness over the limit at the present rate, not that of the measurement."""
        assert self.sharpness is not None
        return ratio_to_limit(self.sharpness, self.limit)

    def decide(self, kind: Kind, lr: float, why: str) -> Decision:
        """Return a decision for the rate ``lr``, clipped to the bounds.

        If clipping prevents or reverses the change, ``kind`` is that of the actual change.
        """
        new = min(max(lr, self.min_lr), self.max_lr)
        if new != lr:
            bound = "min_lr" if new > lr else "max_lr"
            why = f"{why}; {bound}={new:.4g}"
        kind, step = kind_of_change(kind, self.lr, new), self.margins.step
        return Decision("lr", kind, self.lr, new, why, self.sharpness, self.limit, step)


Law: TypeAlias = Callable[[LRMeasured, State], tuple[Decision, State]]
"""``law(measured, state) -> (decision, state)``."""

__getattr__ = renamed_names(__name__, Measured="LRMeasured")


def gated_staircase(
    measured: LRMeasured,
    state: State,
    *,
    gate: float = 1.2,
    rate: float = 0.01,
    cut: float = 0.7,
    hold: int = 10,
    tries: int = TRIES,
) -> tuple[Decision, State]:
    r"""Move to the learning rate of the *target*, no faster than the network can follow.

    The ratio :math:`m = a/\mathrm{limit}(\eta)` compares the measured sharpness with its limit at the
    present rate; :math:`\eta_{\mathrm{target}}` is :meth:`~TargetRegion.lr_for`. The law

    - raises η by ``rate`` a step if :math:`\eta < \eta_{\mathrm{target}}` and m is below the gate,
      up to :math:`\eta_{\mathrm{target}}` and to the rate at which m reaches the gate;
    - holds η if m is at the gate or above, since training escapes;
    - holds η for :math:`\beta/(1-\beta)` steps once m is back at 1 or below, since the momentum of the
      escape still moves the weights;
    - lowers η by ``rate`` a step if :math:`\eta > \eta_{\mathrm{target}}` and the sharpness, or its
      limit, is below the target's lower bound, or if weight decay makes every minimum unstable.
      Otherwise it keeps η: every minimum sharper than the target is unstable already;
    - multiplies η by ``cut`` if the loss is not finite or above the cap, and then holds it for
      ``hold`` steps. Each cut halves the gate's distance from 1. After ``tries`` cuts η never rises
      again, unless it has stayed at :math:`\eta_{\mathrm{target}}` for ``100 * hold`` steps.

    Without momentum the gate is ``gate``; with momentum it is the ratio at which an escape grows
    equally fast (``momentum_gate``).

    A measurement that did not converge never raises the rate, since it may be too low.

    Args:
        measured: the measurement.
        state: the state that the last call returned.
        gate: the largest ratio at which the rate still rises: 1.05 is slow and safe, 1.5 quick.
        rate: relative change per optimizer step; the steps since the last measurement compound.
        cut: the factor after a failure.
        hold: steps without a change after a cut.
        tries: cuts after which the rate no longer rises.

    >>> margins = StabilityMargins(step=10, sharpness=20.0)
    >>> target = TargetRegion(sharpness=(0, 10.0))
    >>> decision, _ = gated_staircase(LRMeasured(margins, UpdateRule(lr=0.1), target), {})
    >>> decision.kind, round(decision.new, 4)
    ('raise', 0.101)
    """
    decision, steps, state = _cut_or_hold(measured, state, cut=cut, hold=hold)
    if decision is not None:
        return decision, state
    lr, target_lr = measured.lr, measured.target.lr_for(measured.rule)
    goal = min(max(target_lr, measured.min_lr), measured.max_lr)
    low, _ = measured.target.bounds("sharpness")
    assert measured.sharpness is not None
    step = measured.margins.step
    if measured.ratio > 1:
        state = {**state, "escaping": step}
    if math.isclose(lr, goal, rel_tol=1e-9):
        state = {**state, "arrived": state.get("arrived", step)}
        if step - state["arrived"] >= 100 * hold:
            state = without(state, "cuts")
        return measured.decide("keep", lr, "this is the target's rate"), state
    some_are_stable = measured.limit >= low and measured.limit > 0
    if lr > goal and measured.sharpness >= low and some_are_stable:
        why = f"every minimum sharper than the target is unstable at rates above {target_lr:.4g}"
        return measured.decide("keep", lr, why), state
    if lr > goal:
        lowered = max(goal, lr * (1 - rate) ** steps)
        return measured.decide("lower", lowered, f"the target's rate is {goal:.4g}"), state
    reason = _why_not_raise(measured, state, tries)
    if reason is not None:
        return measured.decide("hold", lr, reason), state
    gate = momentum_gate(measured.rule, 1 + (gate - 1) / 2 ** state.get("cuts", 0))
    raised = min(goal, lr * _compound(1 + rate, steps))
    if measured.sharpness > 0:
        raised = min(raised, lr_at_limit(measured.rule, measured.sharpness / gate))
    if raised <= lr:
        why = (
            f"the {measured.name} is {measured.ratio:.3g} of its limit, not below the gate {gate:.4g}:"
            " waiting for the escape to end"
        )
        return measured.decide("hold", lr, why), state
    beta = measured.rule.memory
    momentum_end = state.get("escaping", -math.inf) + beta / (1 - beta)
    if measured.ratio <= 1 and step < momentum_end:
        end = f"{momentum_end:.0f}"
        why = f"the {measured.name} was above its limit, and momentum lasts until step {end}"
        return measured.decide("hold", lr, why), state
    why = f"the target's rate is {goal:.4g}, and the {measured.name} {measured.ratio:.2f} of its limit"
    return measured.decide("raise", raised, why), state


def keep_margin(
    measured: LRMeasured,
    state: State,
    *,
    band: float = 0.1,
    rate: float = 0.01,
    cut: float = 0.7,
    hold: int = 10,
    tries: int = TRIES,
) -> tuple[Decision, State]:
    r"""Keep the sharpness at a share ρ of its limit: the law of :meth:`TargetRegion.within_limits`.

    If the ratio is above ρ, the rate falls towards the rate at which it is ρ: by at most ``rate`` a
    step, and at once if the ratio is above 1. Below ρ(1 − ``band``) the rate rises by at most ``rate``
    a step. In between it stays. The sharpness rises as the rate falls, so both would continue without
    end: ``min_lr`` must be positive, and at this floor the law holds. A loss that is not finite or
    above the cap gives a cut; after ``tries`` cuts the rate never rises again.

    Args:
        measured: the measurement; its target must be a share of the limits.
        state: the state that the last call returned.
        band: the relative hysteresis.
        rate: relative change per optimizer step.
        cut: the factor after a failure.
        hold: steps without a change after a cut.
        tries: cuts after which the rate no longer rises.

    Raises:
        ValueError: if the target is not a share of the limits, or ``min_lr`` is 0.

    >>> margins = StabilityMargins(step=1, sharpness=19.0)
    >>> target = TargetRegion.within_limits(0.8)
    >>> keep_margin(LRMeasured(margins, UpdateRule(lr=0.1), target, min_lr=0.01), {})[0].kind
    'lower'
    """
    share, lr = measured.target.share, measured.lr
    if share is None:
        raise ValueError(
            f"target {measured.target}: keep_margin needs TargetRegion.within_limits(share)"
        )
    if not measured.min_lr > 0:
        raise ValueError(
            f"min_lr={measured.min_lr}: expected a positive floor; without one the sharpness rises"
            " without end as the rate falls"
        )
    decision, steps, state = _cut_or_hold(measured, state, cut=cut, hold=hold)
    if decision is not None:
        return decision, state
    why = (
        f"the {measured.name} is {measured.ratio:.2f} of its limit, and should be at most {share:g}"
    )
    assert measured.sharpness is not None
    if measured.ratio > share:
        if lr <= measured.min_lr:
            return measured.decide("hold", lr, f"{why}, but the rate is at its floor"), state
        goal, lowest = 0.0, lr * (1 - rate) ** steps
        if measured.sharpness > 0:  # else weight decay alone makes the step unstable
            goal = lr_at_limit(measured.rule, measured.sharpness / share)
            # Beyond the limit the rate falls at once, since the point is unstable.
            lowest = lowest if measured.ratio <= 1 else 0.0
        return measured.decide("lower", max(goal, lowest), why), state
    reason = _why_not_raise(measured, state, tries)
    if reason is not None:
        return measured.decide("hold", lr, reason), state
    if measured.ratio >= share * (1 - band) or lr >= measured.max_lr:
        return measured.decide("keep", lr, why), state
    raised = lr * _compound(1 + rate, steps)
    if measured.sharpness > 0:
        raised = min(raised, lr_at_limit(measured.rule, measured.sharpness / (share * (1 - band))))
    return measured.decide("raise", max(raised, lr), why), state


def momentum_gate(rule: UpdateRule, gate: float) -> float:
    r"""Return the ratio at which an escape with ``rule`` grows as fast as plain SGD's at ``gate``.

    At ``gate`` times its limit gradient descent grows by :math:`\rho = 2\,\mathrm{gate} - 1` a step.
    A linear mode of :class:`~stableopt.UpdateRule` with :math:`k = \eta a` has the characteristic
    polynomial :math:`z^2 - (c + \beta - uk) z + \beta c - wk`, with :math:`c = 1 - \eta\lambda'`,
    :math:`u = (1-\nu) + \nu(1-\tau)` and :math:`w = \beta(1-\nu)`. It has the root -ρ at

    .. math:: k(\rho) = \frac{(\rho + c)(\rho + \beta)}{u\rho + w},

    and the ratio is :math:`k(\rho)/k(1)`. For a filter :math:`k(\rho)` is the largest
    :math:`\eta a` at which no root exceeds ρ
    (:func:`~stableopt.stability.rules.filters.stable_range`). Near the limit an escape with momentum
    grows faster than one without.

    >>> momentum_gate(UpdateRule(lr=0.1), 1.2)
    1.2
    >>> round(momentum_gate(UpdateRule(lr=0.1, momentum=0.9), 1.2), 4)
    1.0376
    """
    growth = 2 * gate - 1
    beta, c = rule.momentum, 1 - rule.lr * rule.decoupled_weight_decay
    if rule.filter is not None:
        return stable_range(c, rule.filter, growth)[1] / stable_range(c, rule.filter)[1]
    if rule.plain:
        return gate
    direct, averaged = 1 - rule.momentum_share, rule.momentum_share
    if rule.nesterov:
        direct, averaged = 1.0, beta
    u = direct + averaged * (1 - rule.dampening if beta else 1.0)
    w = beta * direct

    def k(rho: float) -> float:
        return (rho + c) * (rho + beta) / (u * rho + w)

    return k(growth) / k(1.0)


def why_diverging(margins: StabilityMargins, loss_cap: float) -> str | None:
    """Return why training counts as diverging, by its loss; or ``None``."""
    if margins.failure is not None and margins.failure.startswith("not finite"):
        return margins.failure
    if margins.loss is None or margins.loss <= min(loss_cap, sys.float_info.max):
        return None
    if not math.isfinite(margins.loss):
        return f"the loss is {margins.loss}"
    return f"the loss {margins.loss:.3g} is above its cap {loss_cap:.3g}"


def why_unusable(margins: StabilityMargins, name: str, value: float | None) -> str | None:
    """Return why a law cannot use the measurement ``value`` of the quantity ``name``; or ``None``."""
    if margins.failure is not None:
        return f"the measurement failed: {margins.failure}"
    if value is None:
        return f"the {name} was not measured"
    return None if math.isfinite(value) else f"the {name} is {value}"


def _compound(factor: float, steps: float) -> float:
    """Return ``factor`` to the power of ``steps``, infinity on overflow."""
    try:
        return float(factor**steps)
    except OverflowError:
        return math.inf


def _why_not_raise(measured: LRMeasured, state: State, tries: int) -> str | None:
    """Return why the rate must not rise, now or ever again; or ``None``."""
    if state.get("cuts", 0) >= tries:
        return f"the rate was cut {state['cuts']:.0f} times: it stays at the last one that held"
    return None if measured.margins.converged else UNCONVERGED


def _cut_or_hold(
    measured: LRMeasured, state: State, *, cut: float, hold: int
) -> tuple[Decision | None, float, State]:
    """Return the cut or hold that the measurement, or an earlier cut, forces on any law; or ``None``.

    Also return the number of steps since the last call, 1 at the first, and the new state.
    """
    margins, step = measured.margins, measured.margins.step
    last = state.get("step", math.inf)
    state = at_step(state, step, "held_until", "escaping", "arrived")
    if measured.restored:  # a new divergence gives a new cut
        state = without(state, "lost", "held_until")
    steps = step - last if step > last else 1
    held_until = state.get("held_until", -math.inf)
    diverging = why_diverging(margins, measured.loss_cap)
    if diverging is not None:
        lost = diverging == margins.failure
        if step < held_until or (lost and state.get("lost")):
            # No rate makes lost weights finite again, so a second cut is useless.
            why = f"{diverging}; the rate was cut already"
            return measured.decide("hold", measured.lr, why), steps, state
        cuts = state.get("cuts", 0) + 1
        state = without(state, "arrived")
        state = {**state, "held_until": step + hold, "lost": float(lost), "cuts": cuts}
        return measured.decide("cut", cut * measured.lr, diverging), steps, state
    state = {**state, "lost": 0.0}
    reason = why_unusable(margins, "sharpness", measured.sharpness)
    if reason is None and step < held_until:
        reason = f"until step {held_until:.0f}, after a cut"
    decision = None if reason is None else measured.decide("hold", measured.lr, reason)
    return decision, steps, state
