"""`StabilityController`: steers sharpness by the learning rate and non-uniformity by the batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stableopt._support.arguments import instance, positive, require_keys, shown, whole
from stableopt.distributed.collectives import world
from stableopt.monitor.closing import StepsAfterClosing, open_monitor
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability import StabilityMargins
from stableopt.steering.agreement import decide_together, decision_is_due, new_margins
from stableopt.steering.batch_laws import (
    BatchLaw,
    BatchMeasured,
    batch_staircase,
    keep_batch_margin,
)
from stableopt.steering.decision import REMEMBERED, Decision, DecisionLog, kind_of_change, marks
from stableopt.steering.law_state import State, new_state
from stableopt.steering.samplers import Resizable
from stableopt.steering.scheduler import StabilityLR
from stableopt.steering.target import OPEN, TargetRegion, resolved, why_unknown
from stableopt.steering.target_status import Situation, target_status

__all__ = ["StabilityController"]

STATE_KEYS = (
    *("scheduler", "batch_size", "target", "batch_law", "verdict", "settled", "seen"),
    "decisions",
)
"""The entries of a state. "verdict" and "seen" keep their names for older checkpoints."""


@dataclass(frozen=True)
class _Memory:
    """What a controller remembers from one measurement to the next, the same on every rank.

    Attributes:
        target: the region, absolute once it is resolved.
        batch_law: the state of the law of the batch size.
        status: the state of :func:`~stableopt.steering.target_status.target_status`.
        settled: measurements in a row within the target's sharpness.
        last_step: the step of the last measurement that was decided on.
    """

    target: TargetRegion
    batch_law: State
    status: State
    settled: int = 0
    last_step: int | None = None


class StabilityController:
    r"""Steers learning rate and batch size towards a region of the diagram, and records the reasons.

    Call ``step()`` after each ``optimizer.step()``. First :class:`StabilityLR` steers the sharpness.
    Once the learning rate is constant and the sharpness within the target, up to ``band``, for
    ``settle`` measurements, :func:`~stableopt.steering.batch_laws.batch_staircase` changes the batch
    size. It pauses when the sharpness leaves the target by more than twice the band. Without this
    hysteresis the two controls would chase each other, since both act on both quantities.

    Every decision, with its reason, is appended to ``decisions``, sent to the monitor's sinks, and
    marked in figures. So is whether the target is reached, missed again or unreachable.

    In a distributed run rank 0 decides, and every rank must call ``step()``.

    Args:
        monitor: the monitor; it measures what the target bounds.
        target: the region.
        lr: ``True`` for a :class:`StabilityLR` with its defaults, a mapping of options for one, a
            :class:`StabilityLR`, or ``False`` to leave the learning rate alone, as ``True`` does if
            the target does not bound the sharpness.
        batch: the holder of the batch size: :class:`AdaptiveBatchSampler`,
            :class:`AdaptiveAccumulation`, or ``None``.
        batch_law: the control law of the batch size; by default the staircase, or for a share of
            the limits ``keep_batch_margin``.
        settle: measurements within the target before the batch size may change.
        band: relative tolerance of the target's bounds.
        patience: measurements without progress after which the target counts as unreachable.
        dry_run: decide and record, but change nothing.

    Attributes:
        scheduler: the learning-rate scheduler, or ``None``.
        decisions: the latest 10,000 decisions, oldest first.

    Raises:
        TypeError: for arguments of a wrong kind.
        ValueError: for a closed monitor, and if the target bounds a quantity that nothing controls, or
            that is not measured.

    >>> import stableopt, torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x, y = torch.ones(4, 1), torch.zeros(4, 1)         # the sharpness is 2
    >>> optimizer = stableopt.GD(model.parameters(), lr=0.1)
    >>> monitor = optimizer.track(model, torch.nn.MSELoss(), (x, y), every=1)
    >>> controller = StabilityController(monitor, stableopt.TargetRegion(sharpness=(0, 8.0)))
    >>> for _ in range(3):
    ...     loss = optimizer.full_gradient(model, torch.nn.MSELoss(), (x, y))
    ...     optimizer.step(); controller.step()
    >>> [(decision.kind, decision.what) for decision in controller.decisions][:2]
    [('raise', 'lr'), ('reached', 'target')]
    """

    def __init__(
        self,
        monitor: StabilityMonitor,
        target: TargetRegion,
        *,
        lr: StabilityLR | Mapping[str, Any] | bool = True,
        batch: Resizable | None = None,
        batch_law: BatchLaw | None = None,
        settle: int = 3,
        band: float = 0.05,
        patience: int = 50,
        dry_run: bool = False,
    ) -> None:
        open_monitor(monitor)
        instance("target", target, TargetRegion)
        if batch is not None and not hasattr(batch, "resize"):
            raise TypeError(
                f"batch={shown(batch)}: expected an AdaptiveBatchSampler or an AdaptiveAccumulation"
            )
        self.monitor, self.batch, self.dry_run = monitor, batch, dry_run
        self._settle, self._patience = whole("settle", settle), whole("patience", patience)
        self._band = positive("band", band)
        self.scheduler = _scheduler(monitor, target, lr, dry_run)
        _check_controls(monitor, target, self.scheduler, batch)
        default_law = keep_batch_margin if target.unit == "limit" else batch_staircase
        self._batch_law: BatchLaw = batch_law or default_law
        if self.scheduler is None:
            self.decisions = DecisionLog(maxlen=REMEMBERED)
        else:
            self.decisions = self.scheduler.decisions
        self._memory = _Memory(target, new_state(), new_state())
        self._after_closing = StepsAfterClosing(monitor, "StabilityController keeps the batch size")

    @property
    def target(self) -> TargetRegion:
        """The region; one relative to the present is absolute once it is resolved."""
        return self._memory.target

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The decisions as ``marks`` of :func:`stableopt.plot.diagram` and ``margins``."""
        return marks(self.decisions)

    def step(self) -> None:
        """Decide if there is a new measurement; call this after each ``optimizer.step()``."""
        if self.scheduler is not None:
            self.scheduler.step()
        elif world().rank == 0:
            self._after_closing.check()
        margins = new_margins(self.monitor, self._memory.last_step)
        if not decision_is_due(margins is not None, self.monitor):
            return
        decisions, self._memory = decide_together(
            lambda: ([], self._memory) if margins is None else self._decide(margins),
            self.decisions,
            self.monitor,
            dry_run=self.dry_run,
        )
        for decision in decisions:
            if decision.what == "batch_size" and decision.changes and not decision.dry_run:
                assert self.batch is not None
                self.batch.resize(self._local(decision.new))

    def state_dict(self) -> dict[str, Any]:
        """Return everything but monitor and optimizer as plain numbers, lists and dicts.

        The position within the epoch belongs to the sampler's ``state_dict``.
        """
        return {
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "batch_size": None if self.batch is None else self.batch.batch_size,
            "target": self.target.to_dict(),
            "batch_law": dict(self._memory.batch_law),
            "verdict": dict(self._memory.status),
            "settled": self._memory.settled,
            "seen": self._memory.last_step,
            # A scheduler shares its log, and saves it.
            "decisions": None if self.scheduler is not None else self.decisions.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, with the same controls; load the monitor's as well.

        Raises:
            Exception: ``ValueError`` for a missing entry, a batch size that is not allowed, or a
                controller with other controls; or any error over an entry of a wrong kind. Controller,
                scheduler and batch size then stay as they were.
        """
        require_keys(state_dict, STATE_KEYS)
        for name, control in (("scheduler", self.scheduler), ("batch_size", self.batch)):
            if (state_dict[name] is None) != (control is None):
                raise ValueError(
                    f"state_dict: its {name} does not fit this controller: expected the state of one"
                    " that controls the same"
                )
        # Read everything that can raise before changing anything; each control refuses on its own.
        memory = _Memory(
            TargetRegion.from_dict(state_dict["target"]),
            dict(state_dict["batch_law"]),
            dict(state_dict["verdict"]),
            state_dict["settled"],
            state_dict["seen"],
        )
        decisions = None
        if self.scheduler is None:
            decisions = self.decisions.read(state_dict["decisions"])
        batch_size = None if self.batch is None else self.batch.batch_size
        if self.batch is not None:
            self.batch.batch_size = state_dict["batch_size"]
        if self.scheduler is not None:
            try:
                self.scheduler.load_state_dict(state_dict["scheduler"])
            except Exception:
                if self.batch is not None and batch_size is not None:
                    self.batch.batch_size = batch_size
                raise
        self._memory = memory
        if decisions is not None:
            self.decisions.replace(decisions)

    def _decide(self, margins: StabilityMargins) -> tuple[list[Decision], _Memory]:
        """Return the decisions on a new measurement, and the new memory."""
        target = resolved(self.target, margins)
        memory = replace(self._memory, target=target, last_step=margins.step)
        why = why_unknown(target, self.monitor.update_rule)
        if why is not None:
            if self.scheduler is not None:
                return [], memory  # the scheduler has decided to hold
            size = float(self._batch_size or 0)
            hold = Decision("batch_size", "hold", size, size, why, step=margins.step)
            return [hold], memory
        decisions = []
        if self.batch is not None and target.non_uniformity != OPEN:
            is_settled, settled = self._sharpness_settled(margins, memory)
            memory = replace(memory, settled=settled)
            if is_settled:
                decision, law = self._decide_batch_size(margins, memory)
                decisions.append(decision)
                memory = replace(memory, batch_law=dict(law))
        if target.unit == "absolute":
            outcome, state = target_status(
                self._situation(margins, target),
                memory.status,
                band=self._band,
                patience=self._patience,
            )
            memory = replace(memory, status=dict(state))
            if outcome is not None:
                decisions.append(outcome)
        return decisions, memory

    def _decide_batch_size(
        self, margins: StabilityMargins, memory: _Memory
    ) -> tuple[Decision, State]:
        assert self.batch is not None
        measured = self._batch_measured(margins, memory.target)
        decision, state = self._batch_law(measured, memory.batch_law)
        # The sampler takes the nearest multiple of its unit.
        local = self._local(decision.new) if decision.changes else self.batch.batch_size
        new = local * world().size
        kind = kind_of_change(decision.kind, decision.old, new)
        return replace(decision, kind=kind, new=new), state

    def _sharpness_settled(self, margins: StabilityMargins, memory: _Memory) -> tuple[bool, int]:
        """Return whether the sharpness has settled, so the batch size may change, and the new count.

        A sharpness that is not steered counts as settled.
        """
        settled = memory.settled
        if self.scheduler is None or memory.target.unit == "limit":
            return True, settled
        a, (_, high) = margins.limited_sharpness, memory.target.bounds("sharpness")
        if a is None or not margins.converged:
            return settled >= self._settle, settled
        last = self.decisions.latest("lr")
        if last is not None and last.step == margins.step and last.changes:
            return False, 0
        # Only the upper bound counts: no batch size raises the sharpness.
        if settled >= self._settle:
            settled = 0 if a > high * (1 + 2 * self._band) else settled
        else:
            settled = settled + 1 if a <= high * (1 + self._band) else 0
        return settled >= self._settle, settled

    def _batch_measured(self, margins: StabilityMargins, target: TargetRegion) -> BatchMeasured:
        assert self.batch is not None
        ranks = world().size
        size = margins.dataset_size
        return BatchMeasured(
            margins,
            self.monitor.update_rule,
            target,
            batch_size=self.batch.batch_size * ranks,
            dataset_size=10**12 if size is None else size,  # an endless stream: above any batch
            smallest=self.batch.nearest(1) * ranks,
            largest=None if size is None else self.batch.nearest(size) * ranks,
            loss_cap=math.inf if self.scheduler is None else self.scheduler.loss_cap,
        )

    def _situation(self, margins: StabilityMargins, target: TargetRegion) -> Situation:
        scheduler, batch = self.scheduler, self.batch
        rule = self.monitor.update_rule
        return Situation(
            margins,
            target,
            lr=rule.lr,
            target_lr=None if scheduler is None else target.lr_for(rule),
            max_lr=math.inf if scheduler is None else scheduler.max_lr,
            batch_size=self._batch_size,
            smallest=1 if batch is None else batch.nearest(1) * world().size,
            cuts=self._cuts(),
        )

    @property
    def _batch_size(self) -> int | None:
        """The number of samples in a step over all ranks, or ``None`` if nothing changes it."""
        return None if self.batch is None else self.batch.batch_size * world().size

    def _cuts(self) -> int:
        """Return the number of cuts of the learning rate since the target was last reached."""
        cuts = 0
        for decision in self.decisions:
            cuts = 0 if decision.kind == "reached" else cuts + (decision.kind == "cut")
        return cuts

    def _local(self, batch_size: float) -> int:
        """Return this rank's allowed batch size nearest to its share of ``batch_size``."""
        assert self.batch is not None
        return self.batch.nearest(batch_size / world().size)


def _scheduler(
    monitor: StabilityMonitor,
    target: TargetRegion,
    lr: StabilityLR | Mapping[str, Any] | bool,
    dry_run: bool,
) -> StabilityLR | None:
    if isinstance(lr, StabilityLR):
        if lr.monitor is not monitor or lr.target != target or lr.dry_run != dry_run:
            raise ValueError("lr: this StabilityLR has another monitor, target or dry_run")
        return lr
    if isinstance(lr, Mapping):
        return StabilityLR(monitor.optimizer, monitor, target, **{**lr, "dry_run": dry_run})
    if lr is True and target.sharpness != OPEN:
        return StabilityLR(monitor.optimizer, monitor, target, dry_run=dry_run)
    if isinstance(lr, bool):
        return None
    raise TypeError(
        f"lr={shown(lr)}: expected a bool, a mapping of options of StabilityLR, or a StabilityLR"
    )


def _check_controls(
    monitor: StabilityMonitor,
    target: TargetRegion,
    scheduler: StabilityLR | None,
    batch: Resizable | None,
) -> None:
    is_share = target.unit == "limit"
    if target.sharpness != OPEN and scheduler is None and not is_share:
        raise ValueError(
            f"target {target} bounds the sharpness, but lr=False leaves the learning rate alone: pass"
            " lr=True"
        )
    if target.non_uniformity == OPEN:
        return
    if batch is None and not is_share:
        raise ValueError(
            f"target {target} bounds the non-uniformity, which the batch size selects: pass batch="
        )
    if batch is not None and "non_uniformity" not in monitor.quantities:
        raise ValueError(
            f"monitor: it measures {monitor.quantities}, and the target bounds the non-uniformity: add"
            " it to the quantities"
        )
    if batch is not None and monitor.update_rule.full_batch:
        raise ValueError(
            "monitor: its optimizer takes the whole data set in each step (GD); a batch size that"
            " changes needs SGD"
        )
