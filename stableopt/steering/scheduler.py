"""The learning-rate scheduler that steers."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from stableopt._arguments import positive
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.sinks.events import Decided
from stableopt.stability.rules.update_rule import base_optimizer
from stableopt.steering import agreement as ranks
from stableopt.steering.decision import Decision
from stableopt.steering.lr_laws import Law, Measured, State, gated_staircase, keep_margin, new_state
from stableopt.steering.rollback import LastGood, kick_along
from stableopt.steering.target import OPEN, TargetRegion, at_lr

__all__ = ["StabilityLR", "said_before"]

_REMEMBERED = 10_000


class StabilityLR(LRScheduler):
    r"""Sets the learning rate so that minima outside of ``target`` are unstable.

    A scheduler like those of torch: ``step()`` after each ``optimizer.step()``, in
    ``SequentialLR`` or ``ChainedScheduler`` too. It acts once for each *fresh* measurement of the
    monitor and changes nothing in between. Groups keep the ratios of their rates; rates that are
    tensors are changed in place.

    Every decision is kept in ``decisions`` and told to the monitor's sinks. A measurement that
    failed or did not converge never raises the rate.

    In a distributed run rank 0 decides, and ``step()`` must be called on every rank.

    Args:
        optimizer: the optimizer.
        monitor: what measures it; at least the sharpness.
        target: the region; a relative one is resolved at the first good measurement.
        law: how to get there, see :mod:`~stableopt.steering.lr_laws`; by default the gated staircase, and
            :func:`~stableopt.steering.lr_laws.keep_margin` for a margin.
        min_lr: the smallest rate, of the fastest group; by default 0, and a tenth of the present rate
            for a margin.
        max_lr: the largest; by default none, and the present rate for a margin.
        loss_cap: the probe loss above which training counts as diverging; by default only a loss
            that is not finite does. The loss at initialisation is a good one: escapes stay below.
        restore: after such a loss, put back the weights, buffers and optimizer state of the last
            good measurement. Costs a copy of them at each.
        kick: when the present point has become unstable, move the weights once along the top
            eigenvector, by so many times their norm; 0 for none. A converged point has no gradient
            to leave it by, and takes long to find rounding errors to grow; 1e-3 is a good kick.
        dry_run: decide, record and change nothing.
        last_epoch: as in torch.

    Attributes:
        target: the region, absolute as soon as it can be.
        decisions: the latest 10,000 :class:`~stableopt.steering.decision.Decision`.
        min_lr: the smallest rate, of the fastest group.
        max_lr: the largest.
        loss_cap: the loss above which training counts as diverging.

    Raises:
        TypeError: for an optimizer, monitor or target that is none.
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
        restore: bool = False,
        kick: float = 0.0,
        dry_run: bool = False,
        last_epoch: int = -1,
    ) -> None:
        _check(optimizer, monitor, target)
        if monitor.problem.sharded and (restore or kick):
            raise ValueError(
                "restore and kick set the weights of replicas from rank 0, and these are sharded by"
                " fully_shard: leave them out"
            )
        present = _fastest(optimizer)
        margin = target.share is not None
        self.monitor = monitor
        self.target = target
        self.law: Law = law or (keep_margin if margin else gated_staircase)
        self.dry_run = dry_run
        self.decisions: deque[Decision] = deque(maxlen=_REMEMBERED)
        self.min_lr = _bound("min_lr", min_lr, present / 10 if margin else 0.0)
        self.max_lr = _bound("max_lr", max_lr, present if margin else math.inf)
        if not self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr={self.min_lr} is above max_lr={self.max_lr}")
        self.loss_cap = math.inf if loss_cap == math.inf else positive("loss_cap", loss_cap)
        self._kick = 0.0 if kick == 0 else positive("kick", kick)
        self._last_good = LastGood(optimizer, monitor.problem.model) if restore else None
        self._state: State = new_state()
        self._seen: int | None = None
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group after what there is to decide; ``step`` calls it."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        # torch steps a scheduler once as it makes it.
        decision = self._act() if self._step_count > 1 else None
        if decision is None:
            return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        # In this order the fastest group has the very rate that was decided.
        return [decision.new * (float(rate) / decision.old) for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but optimizer and monitor, as plain numbers, lists and dicts."""
        return {
            "last_epoch": self.last_epoch,
            "base_lrs": list(self.base_lrs),
            "last_lr": list(self._last_lr),
            "step_count": self._step_count,
            "seen": self._seen,
            "law": dict(self._state),
            "target": {
                "sharpness": list(self.target.sharpness),
                "non_uniformity": list(self.target.non_uniformity),
                "unit": self.target.unit,
            },
            "decisions": [decision.to_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; load that of optimizer and monitor as well.

        Raises:
            ValueError: if something is missing in it.
        """
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}")
        target = state_dict["target"]
        self.target = TargetRegion(
            tuple(target["sharpness"]), tuple(target["non_uniformity"]), target["unit"]
        )
        decisions = [Decision.from_dict(each) for each in state_dict["decisions"]]
        self.decisions.clear()
        self.decisions.extend(decisions)
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["last_lr"])
        self._step_count = state_dict["step_count"]
        self._seen, self._state = state_dict["seen"], dict(state_dict["law"])

    def _act(self) -> Decision | None:
        """Decide, do what concerns the weights, and return what changes the rates, if anything."""
        decided = self._decide() if ranks.is_first() else []
        decided = ranks.shared_decisions(decided)
        change = None
        for decision in decided:
            if not decision.changes and said_before(decision, self.decisions):
                continue  # a decision to change nothing is said once
            self.decisions.append(decision)
            if ranks.is_first():
                self.monitor.deliver(Decided(decision.step, decision))
            if decision.dry_run:
                continue
            if decision.kind in ("restore", "kick"):
                self._change_weights(decision)
            elif decision.changes:
                change = decision
        return change

    def _decide(self) -> list[Decision]:
        margins = self.monitor.margins
        lr = _fastest(self.optimizer)
        if margins is None or margins.step == self._seen or lr == 0:
            return []
        self._seen = margins.step
        if margins.limited_sharpness is not None and margins.converged:
            self.target = self.target.resolve(margins)
        if self.target.unit == "present":
            why = "the target is relative to a measurement, and there is no good one yet"
            return [Decision("lr", "hold", lr, lr, why, step=margins.step, dry_run=self.dry_run)]
        rule = at_lr(self.monitor.update_rule, lr)
        measured = Measured(margins, rule, self.target, self.min_lr, self.max_lr, self.loss_cap)
        decision, self._state = self.law(measured, self._state)
        decided = [decision, *self._about_weights(measured, decision)]
        return [replace(each, dry_run=self.dry_run) for each in decided]

    def _about_weights(self, measured: Measured, decision: Decision) -> list[Decision]:
        margins = measured.margins
        if decision.kind == "cut":
            if self._last_good is not None and self._last_good.step is not None:
                old, new = float(margins.step), float(self._last_good.step)
                why = f"back to the weights of step {self._last_good.step}: {decision.why}"
                return [Decision("weights", "restore", old, new, why, step=margins.step)]
            return []
        good = margins.failure is None and (margins.loss or 0.0) <= self.loss_cap
        if self._last_good is not None and good and not self.dry_run:
            self._last_good.keep(margins.step)
        if not self._kick or not good or "sharpness" not in self.monitor.eigenvectors:
            return []
        a = margins.limited_sharpness
        assert a is not None
        after = a / at_lr(measured.rule, decision.new).max_sharpness
        kicked = bool(self._state.get("kicked"))
        self._state = {**self._state, "kicked": float(after > 1)}
        if after <= 1 or kicked:
            return []
        why = f"the sharpness is {after:.2f} of its limit, and the point must be left"
        return [Decision("weights", "kick", 0.0, self._kick, why, a, step=margins.step)]

    def _change_weights(self, decision: Decision) -> None:
        problem = self.monitor.problem
        if ranks.is_first():
            if decision.kind == "restore" and self._last_good is not None:
                self._last_good.put_back()
            elif decision.kind == "kick":
                kick_along(problem, self.monitor.eigenvectors["sharpness"], decision.new)
        ranks.shared_tensors([*problem.params, *problem.model.buffers()])


def said_before(decision: Decision, decisions: deque[Decision]) -> bool:
    """Return whether the last decision about the same thing said the same, numbers aside."""
    last = next((each for each in reversed(decisions) if each.what == decision.what), None)
    return last is not None and _words(last) == _words(decision)


def _words(decision: Decision) -> tuple[str, str]:
    return decision.kind, re.sub(r"[-+.\d]+(e[-+]?\d+)?", "", decision.why)


def _fastest(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _bound(name: str, value: float | None, default: float) -> float:
    return default if value is None else positive(name, value)


def _check(
    optimizer: torch.optim.Optimizer, monitor: StabilityMonitor, target: TargetRegion
) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: expected a torch.optim.Optimizer")
    if not isinstance(monitor, StabilityMonitor):
        raise TypeError(f"monitor={monitor!r}: expected a StabilityMonitor, as track() returns")
    if not isinstance(target, TargetRegion):
        raise TypeError(f"target={target!r}: expected a TargetRegion")
    if monitor.optimizer is not base_optimizer(optimizer):
        raise ValueError("monitor: it measures another optimizer than the one given")
    if target.sharpness == OPEN:
        raise ValueError(
            f"target {target} does not bound the sharpness, which the learning rate selects; the"
            " batch size selects the non-uniformity, see StabilityController"
        )
    if "sharpness" not in monitor.quantities:
        raise ValueError(
            f"monitor: it measures {monitor.quantities}, and steering needs the sharpness"
        )
    if target.unit == "present":
        for name in ("sharpness", "non_uniformity"):
            if getattr(target, name) != OPEN and name not in monitor.quantities:
                raise ValueError(
                    f"target is relative to the present {name}, which the monitor does not measure:"
                    " add it to its quantities"
                )
