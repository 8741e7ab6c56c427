"""`StabilityLR`: a learning-rate scheduler that makes unwanted minima unstable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from stableopt._support.arguments import instance, positive, require_keys
from stableopt.distributed.collectives import world
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability.rules.coordinates import as_seen_by, outside_coordinates
from stableopt.stability.rules.update_rule import base_optimizer
from stableopt.steering.agreement import broadcast_tensors, decide_together
from stableopt.steering.decision import REMEMBERED, Decision, DecisionLog
from stableopt.steering.lr_laws import (
    Law,
    LRMeasured,
    State,
    after_restore,
    gated_staircase,
    keep_margin,
    new_state,
)
from stableopt.steering.rollback import LastGood, kick_along
from stableopt.steering.target import OPEN, UNRESOLVED, TargetRegion, at_lr, resolved

__all__ = ["StabilityLR"]

_BOUNDS = ("min_lr", "max_lr", "loss_cap")


class StabilityLR(LRScheduler):
    r"""Sets the learning rate so that minima outside of ``target`` are unstable.

    It is used like torch's schedulers: call ``step()`` after each ``optimizer.step()``, also within
    ``SequentialLR`` or ``ChainedScheduler``. It acts once for each *fresh* measurement of the
    monitor and changes nothing in between. Groups keep the ratios of their rates; rates that are
    tensors change in place.

    Every decision is appended to ``decisions`` and sent to the monitor's sinks. A measurement that
    failed or did not converge never raises the rate.

    The rate of the fastest group stays within ``min_lr`` and ``max_lr``: a rate outside of them,
    present or set by another scheduler, moves to the nearer bound at once. A rate of 0 stays 0.

    In a distributed run rank 0 decides, and every rank must call ``step()``.

    Args:
        optimizer: the optimizer.
        monitor: the monitor of this optimizer; it measures at least the sharpness.
        target: the region; a relative one is resolved at the first good measurement.
        law: the control law (:mod:`~stableopt.steering.lr_laws`); by default
            :func:`~stableopt.steering.lr_laws.gated_staircase`, or for a share of the limits
            :func:`~stableopt.steering.lr_laws.keep_margin`.
        min_lr: the smallest rate, of the fastest group; by default 0, or for a share of the limits
            a tenth of the initial rate.
        max_lr: the largest rate; by default unbounded, or for a share of the limits the initial
            one: torch's ``initial_lr`` where another scheduler has set it, else the present rate.
        loss_cap: the probe loss above which training counts as diverging; by default only a loss
            that is not finite does. The loss at initialisation is a good cap: escapes stay below.
        restore: after a diverging loss, restore weights, buffers and optimizer state of the last
            good measurement. Costs a copy of them at each measurement. By default only with
            momentum, which carries weights on after the rate is cut, and not with sharded weights.
        kick: once the present point becomes unstable, move the weights along the top eigenvector by
            this fraction of their norm; 0 for no kick. A converged point has no gradient, and
            rounding errors take long to grow; 1e-3 is a good value.
        dry_run: decide and record, but change nothing.
        last_epoch: as in torch.

    Attributes:
        target: the region, absolute once it is resolved.
        decisions: the latest 10,000 :class:`~stableopt.steering.decision.Decision`.
        min_lr: the smallest rate, of the fastest group.
        max_lr: the largest rate.
        loss_cap: the loss above which training counts as diverging.

    Raises:
        TypeError: for an optimizer, monitor or target of another type.
        ValueError: for numbers out of range, a monitor of another optimizer or without the
            sharpness, or a target that does not bound the sharpness.

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
                "restore and kick copy rank 0's weights to all ranks, which is impossible for weights"
                " sharded by fully_shard: leave them out"
            )
        if restore is None:
            restore = monitor.update_rule.memory > 0 and not monitor.problem.sharded
        initial = _fastest(optimizer, "initial_lr")
        margin = target.share is not None
        self.monitor = monitor
        self.target = target
        self.law: Law = law or (keep_margin if margin else gated_staircase)
        self.dry_run = dry_run
        self.decisions = DecisionLog(maxlen=REMEMBERED)
        self.min_lr = _bound("min_lr", min_lr, initial / 10 if margin else 0.0, open_end=0.0)
        self.max_lr = _bound("max_lr", max_lr, initial if margin else math.inf, open_end=math.inf)
        if not self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr={self.min_lr} is above max_lr={self.max_lr}")
        self.loss_cap = _bound("loss_cap", loss_cap, math.inf, open_end=math.inf)
        self._kick = 0.0 if kick == 0 else positive("kick", kick)
        self._last_good = LastGood(optimizer, monitor.problem.model) if restore else None
        self._state: State = new_state()
        self._seen: int | None = None
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Decide if there is a fresh measurement; return the rate of each group. For ``step``."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        changes = self._act()
        if not changes:
            return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        # In this order of operations the fastest group gets exactly the decided rate.
        return [changes[-1].new * (float(rate) / changes[0].old) for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but optimizer and monitor, as plain numbers, lists and dicts."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "step_count": self._step_count,
            "seen": self._seen,
            "law": dict(self._state),
            "bounds": {name: getattr(self, name) for name in _BOUNDS},
            "target": {
                "sharpness": list(self.target.sharpness),
                "non_uniformity": list(self.target.non_uniformity),
                "unit": self.target.unit,
            },
            "decisions": self.decisions.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; load those of optimizer and monitor as well.

        Raises:
            ValueError: for a missing entry.
        """
        require_keys(state_dict, self.state_dict())
        self.target = TargetRegion(**state_dict["target"])
        self.decisions.load(state_dict["decisions"])
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["last_lr"])
        self._step_count = state_dict["step_count"]
        self._seen, self._state = state_dict["seen"], dict(state_dict["law"])
        for name in _BOUNDS:
            setattr(self, name, state_dict["bounds"][name])

    def _act(self) -> list[Decision]:
        """Decide, change the weights if so decided, and return the changes of the rates."""
        changes = []
        for decision in decide_together(
            self._decide, self.decisions, self.monitor.deliver, dry_run=self.dry_run
        ):
            if decision.dry_run:
                continue
            if decision.kind in ("restore", "kick"):
                self._change_weights(decision)
            elif decision.changes:
                changes.append(decision)
        return changes

    def _decide(self) -> list[Decision]:
        present = _fastest(self.optimizer)
        if present == 0:
            return []
        # Without effect in a dry run, it would be repeated at each step.
        lr = present if self.dry_run else self._nearest(present)
        bounded = [] if lr == present else self._bounded(present)
        # torch calls step once in the constructor.
        return [*bounded, *(self._by_law(lr) if self._step_count > 1 else [])]

    def _nearest(self, lr: float) -> float:
        """Return ``lr`` within the bounds, and the bound itself where it was rounded to a tensor."""
        for bound in (self.min_lr, self.max_lr):
            if math.isclose(lr, bound, rel_tol=self._rounding()):
                return bound
        return min(max(lr, self.min_lr), self.max_lr)

    def _rounding(self) -> float:
        """Return the relative rounding error of rates that are tensors."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return max((torch.finfo(r.dtype).eps for r in rates if isinstance(r, Tensor)), default=0.0)

    def _bounded(self, lr: float) -> list[Decision]:
        """Return the decision for a rate outside of the bounds, by more than rounding."""
        bound, step = self._nearest(lr), self.monitor.step
        if math.isclose(lr, bound, rel_tol=self._rounding()):
            return []
        if lr > bound:
            why = f"the rate was above max_lr={bound:.4g}"
            return [Decision("lr", "lower", lr, bound, why, step=step)]
        why = f"the rate was below min_lr={bound:.4g}"
        return [Decision("lr", "raise", lr, bound, why, step=step)]

    def _by_law(self, lr: float) -> list[Decision]:
        margins = self.monitor.margins
        if margins is None or margins.step == self._seen:
            return []
        self._seen = margins.step
        self.target = resolved(self.target, margins)
        if self.target.unit == "present":
            return [Decision("lr", "hold", lr, lr, UNRESOLVED, step=margins.step)]
        rule = at_lr(self.monitor.update_rule, lr)
        measured = LRMeasured(margins, rule, self.target, self.min_lr, self.max_lr, self.loss_cap)
        decision, self._state = self.law(measured, self._state)
        return [decision, *self._about_weights(measured, decision)]

    def _about_weights(self, measured: LRMeasured, decision: Decision) -> list[Decision]:
        margins = measured.margins
        if decision.kind == "cut":
            if self._last_good is not None and self._last_good.step is not None:
                old, new = float(margins.step), float(self._last_good.step)
                why = f"back to the weights of step {self._last_good.step}: {decision.why}"
                if not self.dry_run:
                    self._state = after_restore(self._state)
                return [Decision("weights", "restore", old, new, why, step=margins.step)]
            return []
        good = margins.failure is None and (margins.loss or 0.0) <= self.loss_cap
        if self._last_good is not None and good and not self.dry_run:
            self._last_good.keep(margins.step)
        a = margins.limited_sharpness
        if not self._kick or not good or a is None:
            return []
        after = a / at_lr(measured.rule, decision.new).max_sharpness
        kicked = bool(self._state.get("kicked"))
        self._state = {**self._state, "kicked": float(after > 1)}
        if after <= 1 or kicked:
            return []
        why = f"the sharpness is {after:.2f} of its limit, and the point must be left"
        return [Decision("weights", "kick", 0.0, self._kick, why, a, step=margins.step)]

    def _change_weights(self, decision: Decision) -> None:
        problem = self.monitor.problem
        if world().rank == 0:
            if decision.kind == "restore" and self._last_good is not None:
                self._last_good.put_back()
            elif decision.kind == "kick":
                kick_along(problem.params, self._top_direction(), decision.new)
        broadcast_tensors([*problem.params, *problem.model.buffers()])

    def _top_direction(self) -> list[Tensor]:
        """Return the direction of the parameters in which the step is the least stable."""
        rule, found = self.monitor.update_rule, self.monitor.eigenvectors
        name = "preconditioned_sharpness"
        problem = as_seen_by(self.monitor.problem, rule, self.monitor.optimizers)
        if name not in found:
            return problem.unflatten(found["sharpness"])
        own = outside_coordinates(rule, problem.params)
        # With P outside of the coordinates it is a covector.
        return problem.unflatten(found[name] if own is None else own @ found[name])


def _fastest(optimizer: torch.optim.Optimizer, key: str = "lr") -> float:
    return max(float(group.get(key, group["lr"])) for group in optimizer.param_groups)


def _bound(name: str, value: float | None, default: float, *, open_end: float) -> float:
    if value is None:
        return default
    return open_end if value == open_end else positive(name, value)


def _check(
    optimizer: torch.optim.Optimizer, monitor: StabilityMonitor, target: TargetRegion
) -> None:
    instance("optimizer", optimizer, torch.optim.Optimizer)
    instance("monitor", monitor, StabilityMonitor)
    instance("target", target, TargetRegion)
    if len(monitor.optimizers) > 1:
        raise ValueError(
            f"monitor measures {len(monitor.optimizers)} optimizers together: expected that of one,"
            " whose learning rate can be steered"
        )
    if monitor.optimizer is not base_optimizer(optimizer):
        raise ValueError("monitor: it measures another optimizer than this one")
    if target.sharpness == OPEN:
        raise ValueError(
            f"target {target} does not bound the sharpness, which the learning rate selects; for the"
            " non-uniformity, which the batch size selects, use StabilityController"
        )
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
