"""`StabilityLR`: a learning-rate scheduler that makes unwanted minima unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from stableopt._support.arguments import instance, non_negative, positive, require_keys
from stableopt.distributed.collectives import world
from stableopt.monitor.closing import StepsAfterClosing, open_monitor
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability import StabilityMargins
from stableopt.stability.measure.measurement import ratio_to_limit
from stableopt.stability.rules.reader_registry import base_optimizer
from stableopt.steering.agreement import decide_together, decision_is_due, new_margins
from stableopt.steering.decision import REMEMBERED, Decision, DecisionLog
from stableopt.steering.law_state import State, new_state
from stableopt.steering.lr_laws import Law, LRMeasured, gated_staircase, keep_margin, why_diverging
from stableopt.steering.rollback import LastGood, kick
from stableopt.steering.target import OPEN, TargetRegion, at_lr, resolved, why_unknown

__all__ = ["StabilityLR"]

_BOUNDS = ("min_lr", "max_lr", "loss_cap")

STATE_KEYS = (
    *("last_epoch", "base_lrs", "last_lr", "step_count"),
    *("seen", "restored", "kicked", "law", "bounds", "target", "decisions"),
)
"""The entries of a state. "seen" and "kicked" keep their names for older checkpoints."""


@dataclass(frozen=True)
class _Memory:
    """What a scheduler remembers from one measurement to the next, the same on every rank.

    Attributes:
        target: the region, absolute once it is resolved.
        law: the state of the law.
        last_step: the step of the last measurement that was decided on.
        good: the step of the last good measurement, whose weights :class:`LastGood` keeps.
        unmeasured: whether these are of a resumed run's first step instead, to be restored once.
        restored: whether the last decision restored the weights.
        unstable: whether the point was last unstable at the decided rate, so a kick would be a second.
    """

    target: TargetRegion
    law: State
    last_step: int | None = None
    good: int | None = None
    unmeasured: bool = False
    restored: bool = False
    unstable: bool = False


class StabilityLR(LRScheduler):
    r"""Sets the learning rate so that minima outside of ``target`` are unstable.

    Use it like torch's schedulers: call ``step()`` after each ``optimizer.step()``, also within
    ``SequentialLR`` or ``ChainedScheduler``. It acts once for each new measurement of the monitor and
    changes nothing in between. Groups keep the ratios of their rates; rates that are tensors change in
    place.

    Every decision is appended to ``decisions`` and sent to the monitor's sinks. A measurement that
    failed or did not converge never raises the rate.

    The rate of the fastest group stays within ``min_lr`` and ``max_lr``. A rate outside of them, initial
    or set by another scheduler, moves to the nearer bound at once. A rate of 0 stays 0.

    In a distributed run rank 0 decides, and every rank must call ``step()``. Ranks that measure
    together communicate only at a new measurement. If training goes on after the monitor was closed,
    rank 0 warns once, and the rate stays.

    Args:
        optimizer: the optimizer.
        monitor: the monitor of this optimizer; it measures at least the sharpness.
        target: the region; one relative to the present becomes absolute at the first converged
            measurement.
        law: the control law (:mod:`~stableopt.steering.lr_laws`); by default
            :func:`~stableopt.steering.lr_laws.gated_staircase`, or for a share of the limits
            :func:`~stableopt.steering.lr_laws.keep_margin`.
        min_lr: the smallest rate, of the fastest group; by default 0, or for a share of the limits
            a tenth of the initial rate.
        max_lr: the largest rate; by default unbounded, or for a share of the limits the initial
            rate: torch's ``initial_lr`` if another scheduler has set it, else the present rate.
        loss_cap: the probe loss above which training counts as diverging; by default only a loss
            that is not finite does. The loss at initialisation is a good cap: escapes stay below.
        restore: after a diverging loss, restore weights, buffers and optimizer state from the last
            good measurement. Costs a copy of them at each measurement. By default true with momentum,
            which moves the weights further after a cut, unless weights are sharded.
        kick: when the present point becomes unstable, move the weights along the top eigenvector by
            this fraction of their norm; 0 for no kick. Without it the escape from a converged point,
            where the gradient vanishes, starts from rounding errors. 1e-3 is a good value.
        dry_run: decide and record, but change nothing.
        last_epoch: as in torch.

    Attributes:
        decisions: the latest 10,000 :class:`~stableopt.steering.decision.Decision`.
        min_lr: the smallest rate, of the fastest group.
        max_lr: the largest rate.
        loss_cap: the loss above which training counts as diverging.

    Raises:
        TypeError: for an optimizer, monitor or target of another type.
        ValueError: for numbers out of range, a monitor that is closed, of another optimizer or without
            the sharpness, or a target that does not bound the sharpness.

    >>> import stableopt
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x, y = torch.ones(4, 1), torch.zeros(4, 1)         # the sharpness is 2
    >>> optimizer = stableopt.GD(model.parameters(), lr=0.1)
    >>> monitor = optimizer.track(model, torch.nn.MSELoss(), (x, y), every=1)
    >>> scheduler = StabilityLR(optimizer, monitor, stableopt.TargetRegion(sharpness=(0, 8.0)))
    >>> for _ in range(100):
    ...     loss = optimizer.full_gradient(model, torch.nn.MSELoss(), (x, y))
    ...     optimizer.step(); scheduler.step()
    >>> scheduler.get_last_lr()
    [0.25]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: StabilityMonitor,
        target: TargetRegion,
        *,
        law: Law | None = None,
        min_lr: float | None = None,
        max_lr: float | None = None,
        loss_cap: float = math.inf,
        restore: bool | None = None,
        kick: float = 0.0,
        dry_run: bool = False,
        last_epoch: int = -1,
    ) -> None:
        _check(optimizer, monitor, target)
        if monitor.problem.sharded and (restore or kick):
            raise ValueError(
                "restore and kick need whole weights on every rank, and fully_shard shards them: omit"
                " both arguments"
            )
        if restore is None:
            restore = monitor.update_rule.memory > 0 and not monitor.problem.sharded
        keeps_margin = target.unit == "limit"
        initial_lr = _fastest(optimizer, "initial_lr")
        lowest, highest = (initial_lr / 10, initial_lr) if keeps_margin else (0.0, math.inf)
        self.monitor = monitor
        self.law: Law = law or (keep_margin if keeps_margin else gated_staircase)
        self.dry_run = dry_run
        self.decisions = DecisionLog(maxlen=REMEMBERED)
        self.min_lr = _bound("min_lr", min_lr, lowest, open_end=0.0)
        self.max_lr = _bound("max_lr", max_lr, highest, open_end=math.inf)
        if not self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr={self.min_lr} is above max_lr={self.max_lr}")
        self.loss_cap = _bound("loss_cap", loss_cap, math.inf, open_end=math.inf)
        self._kick = non_negative("kick", kick)
        self._last_good = LastGood(optimizer, monitor.problem.model) if restore else None
        self._memory = _Memory(target, new_state())
        self._resumed = False
        self._after_closing = StepsAfterClosing(monitor, "StabilityLR keeps the learning rate")
        super().__init__(optimizer, last_epoch)

    @property
    def target(self) -> TargetRegion:
        """The region; one relative to the present is absolute once it is resolved."""
        return self._memory.target

    def get_lr(self) -> list[float | Tensor]:
        """Decide if there is a new measurement; return the rate of each group. ``step`` calls this."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        changes = self._act()
        if not changes:
            return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        # In this order of operations no rounding moves the fastest group off the decided rate.
        return [changes[-1].new * (float(rate) / changes[0].old) for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but optimizer and monitor, as plain numbers, lists and dicts."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "step_count": self._step_count,
            "seen": self._memory.last_step,
            "restored": self._memory.restored,
            "kicked": self._memory.unstable,
            "law": dict(self._memory.law),
            "bounds": {name: getattr(self, name) for name in _BOUNDS},
            "target": self.target.to_dict(),
            "decisions": self.decisions.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; load the states of optimizer and monitor as well.

        The weights to restore are not part of the state. Until the next good measurement those of
        the first step after loading, if they are finite, can be restored once.

        Raises:
            Exception: ``ValueError`` for a missing entry, or any error over one of a wrong kind. The
                scheduler then stays as it was.
        """
        # Read everything that can raise before changing anything.
        require_keys(state_dict, STATE_KEYS)
        require_keys(state_dict["bounds"], _BOUNDS, "state_dict['bounds']")
        memory = _Memory(
            TargetRegion.from_dict(state_dict["target"]),
            dict(state_dict["law"]),
            state_dict["seen"],
            restored=state_dict["restored"],
            unstable=state_dict["kicked"],
        )
        attributes = {
            "_memory": memory,
            "last_epoch": state_dict["last_epoch"],
            "base_lrs": list(state_dict["base_lrs"]),
            "_last_lr": list(state_dict["last_lr"]),
            "_step_count": state_dict["step_count"],
            **{name: state_dict["bounds"][name] for name in _BOUNDS},
        }
        decisions = self.decisions.read(state_dict["decisions"])
        vars(self).update(attributes)
        self.decisions.replace(decisions)
        self._resumed = True

    def _act(self) -> list[Decision]:
        """Carry out decisions on the weights; return those that change the rate."""
        if world().rank == 0:
            self._after_closing.check()
        if self._resumed:  # not while loading: model and optimizer may be loaded later
            self._resumed = False
            if self._last_good is not None and not self.dry_run and self._last_good.keep_finite():
                self._memory = replace(self._memory, good=self.monitor.step, unmeasured=True)
        present = _fastest(self.optimizer)
        if present == 0:
            return []
        # A dry run leaves the rate, so a decision to clip it would come again at each step.
        lr = present if self.dry_run else self._clipped(present)
        clip = [] if lr == present else self._clip(present)
        margins = None
        if self._step_count > 1:  # torch calls step once in the constructor
            margins = new_margins(self.monitor, self._memory.last_step)
        if not decision_is_due(bool(clip) or margins is not None, self.monitor):
            return []

        def decide() -> tuple[list[Decision], _Memory]:
            if margins is None:
                return clip, self._memory
            decisions, memory = self._apply_law(margins, lr)
            return [*clip, *decisions], memory

        before = self._memory.last_step
        decisions, self._memory = decide_together(
            decide, self.decisions, self.monitor, dry_run=self.dry_run
        )
        if self._last_good is not None and before != self._memory.last_step == self._memory.good:
            self._last_good.keep()
        changes = []
        for decision in decisions:
            if decision.dry_run:
                continue
            if decision.kind in ("restore", "kick"):
                self._change_weights(decision)
            elif decision.changes:
                changes.append(decision)
        return changes

    def _clipped(self, lr: float) -> float:
        """Return ``lr`` clipped to the bounds, or a bound that it equals up to rounding."""
        for bound in (self.min_lr, self.max_lr):
            if math.isclose(lr, bound, rel_tol=self._rounding()):
                return bound
        return min(max(lr, self.min_lr), self.max_lr)

    def _rounding(self) -> float:
        """Return the relative rounding error of rates that are tensors."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return max((torch.finfo(r.dtype).eps for r in rates if isinstance(r, Tensor)), default=0.0)

    def _clip(self, lr: float) -> list[Decision]:
        """Return the decision to clip a rate that is outside of the bounds by more than rounding."""
        bound, step = self._clipped(lr), self.monitor.step
        if math.isclose(lr, bound, rel_tol=self._rounding()):
            return []
        if lr > bound:
            why = f"the rate was above max_lr={bound:.4g}"
            return [Decision("lr", "lower", lr, bound, why, step=step)]
        why = f"the rate was below min_lr={bound:.4g}"
        return [Decision("lr", "raise", lr, bound, why, step=step)]

    def _apply_law(self, margins: StabilityMargins, lr: float) -> tuple[list[Decision], _Memory]:
        """Return the decisions on a new measurement at the rate ``lr``, and the new memory."""
        restored, target = self._memory.restored, resolved(self.target, margins)
        memory = replace(self._memory, target=target, last_step=margins.step, restored=False)
        rule = at_lr(self.monitor.update_rule, lr)
        why = why_unknown(target, rule)
        if why is not None:
            return [Decision("lr", "hold", lr, lr, why, step=margins.step)], memory
        measured = LRMeasured(
            margins, rule, target, self.min_lr, self.max_lr, self.loss_cap, restored
        )
        decision, law = self.law(measured, memory.law)
        memory = replace(memory, law=dict(law))
        if decision.kind == "cut":
            restores = self._restore(margins.step, decision.why)
            restored = bool(restores) and not self.dry_run
            good = None if memory.unmeasured else memory.good
            return [decision, *restores], replace(memory, restored=restored, good=good)
        if margins.failure is not None or why_diverging(margins, self.loss_cap) is not None:
            return [decision], memory
        if self._last_good is not None and not self.dry_run:
            memory = replace(memory, good=margins.step, unmeasured=False)
        kicks, unstable = self._kick_if_unstable(measured, decision)
        return [decision, *kicks], replace(memory, unstable=unstable)

    def _restore(self, step: int, reason: str) -> list[Decision]:
        """Return the decision to restore the last good weights after a cut, if there are any."""
        good = self._memory.good
        if good is None:
            return []
        why = f"back to the weights of step {good}: {reason}"
        return [Decision("weights", "restore", float(step), float(good), why, step=step)]

    def _kick_if_unstable(
        self, measured: LRMeasured, decision: Decision
    ) -> tuple[list[Decision], bool]:
        """Return the decision to kick the weights, once the decided rate makes the point unstable.

        Also return whether it does.
        """
        margins, was_unstable = measured.margins, self._memory.unstable
        a = margins.limited_sharpness
        if not self._kick or a is None:
            return [], was_unstable
        ratio = ratio_to_limit(a, at_lr(measured.rule, decision.new).max_sharpness)
        if ratio <= 1 or was_unstable:
            return [], ratio > 1
        why = f"the {measured.name} is {ratio:.2f} of its limit: the kick starts the escape"
        return [Decision("weights", "kick", 0.0, self._kick, why, a, step=margins.step)], True

    def _change_weights(self, decision: Decision) -> None:
        """Restore or kick the weights."""
        if decision.kind == "restore" and self._last_good is not None:
            # Each rank has its own snapshot, so the optimizer's state needs no broadcast.
            self._last_good.put_back()
        elif decision.kind == "kick":
            kick(self.monitor, decision.new)


def _fastest(optimizer: torch.optim.Optimizer, key: str = "lr") -> float:
    """Return the largest ``key`` of the groups; a group without ``key`` counts with its rate."""
    return max(float(group.get(key, group["lr"])) for group in optimizer.param_groups)


def _bound(name: str, value: float | None, default: float, *, open_end: float) -> float:
    if value is None:
        return default
    if open_end == 0:
        return non_negative(name, value)
    return open_end if value == open_end else positive(name, value)


def _check(
    optimizer: torch.optim.Optimizer, monitor: StabilityMonitor, target: TargetRegion
) -> None:
    instance("optimizer", optimizer, torch.optim.Optimizer)
    open_monitor(monitor)
    instance("target", target, TargetRegion)
    if len(monitor.optimizers) > 1:
        raise ValueError(
            f"monitor measures {len(monitor.optimizers)} optimizers together: expected the monitor of"
            " one optimizer, whose learning rate can be steered"
        )
    if monitor.optimizer is not base_optimizer(optimizer):
        raise ValueError("monitor: it measures another optimizer than this one")
    if target.sharpness == OPEN:
        raise ValueError(
            f"target {target} does not bound the sharpness, which the learning rate selects; for the"
            " non-uniformity, which the batch size selects, use StabilityController"
        )
    # Another limit may be unknown for now only, and the law then holds.
    if (rule := monitor.update_rule).norm is not None:
        raise ValueError(f"optimizer: the sharpness has no limit with it: {rule.unknown}")
    if "sharpness" not in monitor.quantities:
        raise ValueError(
            f"monitor: it measures {monitor.quantities}, and steering needs the sharpness"
        )
    if target.unit == "present":
        for name in ("sharpness", "non_uniformity"):
            if target.bounds(name) != OPEN and name not in monitor.quantities:
                raise ValueError(
                    f"target is relative to the present {name}, which the monitor does not measure:"
                    " add it to its quantities"
                )
