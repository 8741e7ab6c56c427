r"""Control laws: pure functions of a measurement and a state.

A law for the learning rate is ``law(measured, state) -> (decision, state)``. It is asked once for
each fresh measurement, and its state is a dictionary of plain numbers, empty to begin with. Options
are bound by ``functools.partial``; a new law is one function::

    StabilityLR(optimizer, monitor, target, law=partial(gated_staircase, gate=1.5))

What fails, and why the default is what it is (``python -m benchmarks run control-laws`` shows it):

- :math:`\eta = 2\rho/a` from the *measured* a: with ρ < 1 the sharpness follows the falling rate up;
  with ρ ≥ 1 the rate makes every minimum unstable in turn, towards no target, or diverges.
- A cut whenever a is above the target freezes the sharp minimum: the rate falls to zero, at which
  everything is stable.
- A cut whenever the loss rises cancels the escape that is wanted: an escape is a rise of the loss.
- A jump to :math:`2/a_{\mathrm{target}}` makes the loss rise further, and where
  :math:`\eta a/2` is then large enough, diverges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from stableopt.stability import StabilityMargins, UpdateRule
from stableopt.steering.decision import Decision, Kind
from stableopt.steering.target import TargetRegion, lr_at_limit

__all__ = ["Law", "Measured", "State", "gated_staircase", "keep_margin", "new_state"]

State: TypeAlias = Mapping[str, float]
"""What a law remembers: plain numbers by name, so that a checkpoint can hold them."""


@dataclass(frozen=True)
class Measured:
    """What a law is told.

    Attributes:
        margins: the fresh measurement.
        rule: the update rule as it stands; its ``lr`` is the rate that a decision changes.
        target: the region, resolved.
        min_lr: the smallest rate allowed.
        max_lr: the largest.
        loss_cap: the loss above which training counts as diverging, or infinity.
    """

    margins: StabilityMargins
    rule: UpdateRule
    target: TargetRegion
    min_lr: float = 0.0
    max_lr: float = math.inf
    loss_cap: float = math.inf

    @property
    def lr(self) -> float:
        """The rate as it stands."""
        return self.rule.lr

    @property
    def sharpness(self) -> float | None:
        """The measured sharpness that the limit is on."""
        return self.margins.limited_sharpness

    @property
    def limit(self) -> float:
        """The largest stable sharpness at that rate."""
        return self.rule.max_sharpness

    @property
    def ratio(self) -> float:
        """The measured sharpness over :attr:`limit`, now, though it was measured at another rate."""
        assert self.sharpness is not None
        return self.sharpness / self.limit

    def decide(self, kind: Kind, lr: float, why: str) -> Decision:
        """Return a decision for the rate ``lr``, within the bounds if it is a new one."""
        if lr != self.lr:
            lr = min(max(lr, self.min_lr), self.max_lr)
        step = self.margins.step
        return Decision("lr", kind, self.lr, lr, why, self.sharpness, self.limit, step)


Law: TypeAlias = Callable[[Measured, State], tuple[Decision, State]]


def new_state() -> State:
    """Return the state of a law that has not been asked yet."""
    return {}


def gated_staircase(
    measured: Measured,
    state: State,
    *,
    gate: float = 1.2,
    rate: float = 0.01,
    cut: float = 0.7,
    hold: int = 10,
) -> tuple[Decision, State]:
    r"""Go to the learning rate that the *target* asks for, no faster than the network can follow.

    With :math:`m = a/\mathrm{limit}(\eta)`, the measured sharpness against what the present rate
    allows, and :math:`\eta_{\mathrm{target}}` of :meth:`~TargetRegion.lr_for`:

    - :math:`\eta < \eta_{\mathrm{target}}` and m up to ``gate``: raise it by ``rate`` a step, up to
      :math:`\eta_{\mathrm{target}}` and the rate at which m is the gate;
    - m at the gate or above: hold, an escape is under way;
    - :math:`\eta > \eta_{\mathrm{target}}`: lower it by ``rate`` a step if the sharpness, or what the
      rate allows, is below the target's lower bound; otherwise it does what is wanted already;
    - a loss that is not finite, or above the cap: multiply it by ``cut``, and hold ``hold`` steps.

    A measurement that did not converge raises nothing, since it may be too low.

    Args:
        measured: the measurement.
        state: what the last call returned.
        gate: the largest ratio at which the rate still rises: 1.05 is slow and safe, 1.5 quick.
        rate: relative change in one optimizer step; steps since the last measurement add up.
        cut: the factor after a failure.
        hold: steps without a change after it.

    >>> margins = StabilityMargins(step=10, sharpness=20.0)
    >>> target = TargetRegion(sharpness=(0, 10.0))
    >>> decision, _ = gated_staircase(Measured(margins, UpdateRule(lr=0.1), target), {})
    >>> decision.kind, round(decision.new, 4)
    ('raise', 0.101)
    """
    margins = measured.margins
    emergency = _emergency(measured, state, cut=cut, hold=hold)
    if emergency is not None:
        return emergency
    passed, state = _continued(state, margins.step)
    wait = _wait(measured, state)
    if wait is not None:
        return measured.decide("hold", measured.lr, wait), state

    lr, aim = measured.lr, measured.target.lr_for(measured.rule)
    goal = min(max(aim, measured.min_lr), measured.max_lr)
    low = measured.target.sharpness[0] or 0.0
    assert measured.sharpness is not None
    if math.isclose(lr, goal, rel_tol=1e-9):
        return measured.decide("keep", lr, "this is the target's rate"), state
    if lr > goal and measured.sharpness >= low and measured.limit >= low:
        why = f"what is sharper than the target is unstable as from a rate of {aim:.4g}"
        return measured.decide("keep", lr, why), state
    if lr > goal:
        lowered = max(goal, lr * (1 - rate) ** passed)
        return measured.decide("lower", lowered, f"the target's rate is {goal:.4g}"), state
    if not margins.converged:
        return measured.decide("hold", lr, "the measurement did not converge"), state
    raised = min(goal, lr * (1 + rate) ** passed)
    if measured.sharpness > 0:
        raised = min(raised, lr_at_limit(measured.rule, measured.sharpness / gate))
    if raised <= lr:
        why = f"the sharpness is {measured.ratio:.2f} of its limit, at the gate {gate:g}: escaping"
        return measured.decide("hold", lr, why), state
    why = f"the target's rate is {goal:.4g}, and the sharpness {measured.ratio:.2f} of its limit"
    return measured.decide("raise", raised, why), state


def keep_margin(
    measured: Measured,
    state: State,
    *,
    band: float = 0.1,
    rate: float = 0.01,
    cut: float = 0.7,
    hold: int = 10,
) -> tuple[Decision, State]:
    r"""Keep the sharpness at a share ρ of its limit: the law of :meth:`TargetRegion.margin`.

    Above ρ the rate falls towards the one at which the ratio is ρ, by ``rate`` a step at the most,
    and at once where the ratio is above 1;
    below ρ(1 − ``band``) it rises likewise; in between it stays. The rate here follows the
    measurement, and training sharpens as the rate falls, so that without a floor both go on for
    ever: ``min_lr`` must be positive. At the floor the law says so and holds.

    Args:
        measured: the measurement; its target must be a margin.
        state: what the last call returned.
        band: the hysteresis, relative.
        rate: relative change in one optimizer step.
        cut: the factor after a failure.
        hold: steps without a change after it.

    Raises:
        ValueError: if the target is no margin, or ``min_lr`` is 0.

    >>> margins = StabilityMargins(step=1, sharpness=19.0)
    >>> at = Measured(margins, UpdateRule(lr=0.1), TargetRegion.margin(0.8), min_lr=0.01)
    >>> keep_margin(at, {})[0].kind
    'lower'
    """
    share, margins, lr = measured.target.share, measured.margins, measured.lr
    if share is None:
        raise ValueError(f"target {measured.target}: keep_margin needs TargetRegion.margin(share)")
    if not measured.min_lr > 0:
        raise ValueError(
            f"min_lr={measured.min_lr}: expected a positive floor; without one the sharpness rises"
            " for ever as the rate falls"
        )
    emergency = _emergency(measured, state, cut=cut, hold=hold)
    if emergency is not None:
        return emergency
    passed, state = _continued(state, margins.step)
    wait = _wait(measured, state)
    if wait is not None:
        return measured.decide("hold", lr, wait), state
    why = f"the sharpness is {measured.ratio:.2f} of its limit, to be at most {share:g}"
    assert measured.sharpness is not None
    if measured.ratio > share:
        if lr <= measured.min_lr:
            return measured.decide("hold", lr, f"{why}, but the rate is at its floor"), state
        goal = lr_at_limit(measured.rule, measured.sharpness / share)
        # What is unstable already has no time for small steps.
        slowest = lr * (1 - rate) ** passed if measured.ratio <= 1 else 0.0
        return measured.decide("lower", max(goal, slowest), why), state
    if not margins.converged:
        return measured.decide("hold", lr, "the measurement did not converge"), state
    if measured.ratio >= share * (1 - band) or lr >= measured.max_lr:
        return measured.decide("keep", lr, why), state
    raised = lr * (1 + rate) ** passed
    if measured.sharpness > 0:
        raised = min(raised, lr_at_limit(measured.rule, measured.sharpness / (share * (1 - band))))
    return measured.decide("raise", max(raised, lr), why), state


def _emergency(
    measured: Measured, state: State, *, cut: float, hold: int
) -> tuple[Decision, State] | None:
    """Return the cut that a lost loss asks for, or ``None``."""
    margins = measured.margins
    loss = margins.loss
    lost = margins.failure is not None and margins.failure.startswith("not finite")
    if lost:
        why = str(margins.failure)
    elif loss is not None and not loss <= measured.loss_cap:
        why = f"the loss {loss:.3g} is above its cap {measured.loss_cap:.3g}"
    else:
        return None
    state = {**state, "step": margins.step}
    if margins.step < state.get("held_until", -math.inf) or (lost and state.get("lost")):
        # Weights that are not finite stay so at any rate: one cut is all that can be done here.
        return measured.decide("hold", measured.lr, f"{why}; the rate was cut already"), state
    state |= {"held_until": margins.step + hold, "lost": float(lost)}
    return measured.decide("cut", cut * measured.lr, why), state


def _continued(state: State, step: int) -> tuple[float, State]:
    """Return the steps since the last decision, one at the first, and the state that goes on."""
    # A counter that went back, as one that was not restored with a checkpoint, counts one as well.
    passed = max(step - state.get("step", step - 1), 1)
    return passed, {**state, "step": step, "lost": 0.0}


def _wait(measured: Measured, state: State) -> str | None:
    """Return why nothing can be decided now, or ``None``."""
    margins = measured.margins
    if margins.failure is not None:
        return f"the measurement failed: {margins.failure}"
    if measured.sharpness is None:
        return "the sharpness was not measured"
    if margins.step < state.get("held_until", -math.inf):
        return f"until step {state['held_until']:.0f}, after a cut"
    return None
