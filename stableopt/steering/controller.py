"""`StabilityController`: steers sharpness by the learning rate and non-uniformity by the batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stableopt._support.arguments import instance, positive, require_keys, whole
from stableopt.distributed.collectives import world
from stableopt.monitor.closing import StepsAfterClosing, open_monitor
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability import StabilityMargins
from stableopt.steering.agreement import decide_together
from stableopt.steering.batch_laws import (
    BatchLaw,
    BatchMeasured,
    batch_staircase,
    keep_batch_margin,
)
from stableopt.steering.decision import REMEMBERED, Decision, DecisionLog, marks
from stableopt.steering.lr_laws import State, new_state
from stableopt.steering.samplers import Resizable
from stableopt.steering.scheduler import StabilityLR
from stableopt.steering.target import OPEN, UNRESOLVED, TargetRegion, at_lr, resolved
from stableopt.steering.verdict import Situation, verdict

__all__ = ["StabilityController"]


class StabilityController:
    r"""Steers learning rate and batch size towards a region of the diagram, and records the reasons.

    Call ``step()`` after each ``optimizer.step()``. First :class:`StabilityLR` steers the sharpness.
    Once the learning rate is constant and the sharpness within the target, up to ``band``, for
    ``settle`` measurements, :func:`~stableopt.steering.batch_laws.batch_staircase` changes the batch
    size. It pauses when the sharpness leaves the target by more than twice the band. Without this
    hysteresis the two controls would chase each other, since both act on both quantities.

    Every decision, with its reason, is appended to ``decisions``, sent to the monitor's sinks, and
    marked in figures. So is the verdict that the target is reached, or unreachable.

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
                f"batch={batch!r}: expected an AdaptiveBatchSampler or an AdaptiveAccumulation"
            )
        self.monitor, self.batch, self.dry_run = monitor, batch, dry_run
        self._settle, self._patience = whole("settle", settle), whole("patience", patience)
        self._band = positive("band", band)
        self.scheduler = _scheduler(monitor, target, lr, dry_run)
        self._target = target
        _check_controls(monitor, target, self.scheduler, batch)
        default_law = batch_staircase if target.share is None else keep_batch_margin
        self._batch_law: BatchLaw = batch_law or default_law
        if self.scheduler is None:
            self.decisions = DecisionLog(maxlen=REMEMBERED)
        else:
            self.decisions = self.scheduler.decisions
        self._batch_state: State = new_state()
        self._verdict_state: State = new_state()
        self._after_closing = StepsAfterClosing(monitor, "StabilityController keeps the batch size")
        self._settled = 0  # measurements in a row within the target's sharpness
        self._last_measured: int | None = None

    @property
    def target(self) -> TargetRegion:
        """The region; one relative to the present is absolute once it is resolved."""
        return self._target

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The decisions as ``marks`` of :func:`stableopt.plot.diagram` and ``margins``."""
        return marks(self.decisions)

    def step(self) -> None:
        """Decide if there is a new measurement; call this after each ``optimizer.step()``."""
        if self.scheduler is not None:
            self.scheduler.step()
        for decision in decide_together(
            self._decide, self.decisions, self.monitor.deliver, dry_run=self.dry_run
        ):
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
            "target": [
                list(self._target.sharpness),
                list(self._target.non_uniformity),
                self._target.unit,
            ],
            "batch_law": dict(self._batch_state),
            "verdict": dict(self._verdict_state),
            "settled": self._settled,
            "seen": self._last_measured,
            "decisions": self.decisions.state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, with the same controls; load the monitor's as well.

        Raises:
            ValueError: for a missing entry, or a controller with other controls.
        """
        require_keys(state_dict, self.state_dict())
        for name, control in (("scheduler", self.scheduler), ("batch_size", self.batch)):
            if (state_dict[name] is None) != (control is None):
                raise ValueError(
                    f"state_dict: its {name} does not fit this controller: expected the state of one"
                    " that controls the same"
                )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.batch is not None:
            self.batch.batch_size = state_dict["batch_size"]
        self._target = TargetRegion(*state_dict["target"])
        self._batch_state = dict(state_dict["batch_law"])
        self._verdict_state = dict(state_dict["verdict"])
        self._settled, self._last_measured = state_dict["settled"], state_dict["seen"]
        self.decisions.load(state_dict["decisions"])

    def _decide(self) -> list[Decision]:
        if self.scheduler is None:  # it warns itself
            self._after_closing.check()
        margins = self.monitor.margins
        if margins is None or margins.step == self._last_measured:
            return []
        self._last_measured = margins.step
        self._target = resolved(self._target, margins)
        if self._target.unit == "present":
            if self.scheduler is not None:
                return []  # the scheduler has decided to hold
            size = 0.0 if self.batch is None else float(self.batch.batch_size)
            return [Decision("batch_size", "hold", size, size, UNRESOLVED, step=margins.step)]
        decisions = []
        steers_batch = self.batch is not None and self._target.non_uniformity != OPEN
        if steers_batch and self._sharpness_settled(margins):
            decisions.append(self._decide_batch_size(margins))
        if self._target.unit == "absolute":
            outcome, self._verdict_state = verdict(
                self._situation(margins),
                self._verdict_state,
                band=self._band,
                patience=self._patience,
            )
            if outcome is not None:
                decisions.append(outcome)
        return decisions

    def _decide_batch_size(self, margins: StabilityMargins) -> Decision:
        assert self.batch is not None
        measured = self._batch_measured(margins)
        decision, self._batch_state = self._batch_law(measured, self._batch_state)
        # The sampler takes the nearest multiple of its unit.
        local = self._local(decision.new) if decision.changes else self.batch.batch_size
        return replace(decision, new=local * world().size)

    def _sharpness_settled(self, margins: StabilityMargins) -> bool:
        """Return whether the sharpness has settled, or is not steered, so the batch size may change."""
        if self.scheduler is None or self._target.unit == "limit":
            return True
        a, (_, high) = margins.limited_sharpness, self._target.bounds("sharpness")
        if a is None or not margins.converged:
            return self._settled >= self._settle
        last = self.decisions.latest("lr")
        if last is not None and last.step == margins.step and last.changes:
            self._settled = 0
            return False
        # Only the upper bound counts: no batch size raises the sharpness.
        if self._settled >= self._settle:
            if a > high * (1 + 2 * self._band):
                self._settled = 0
        else:
            self._settled = self._settled + 1 if a <= high * (1 + self._band) else 0
        return self._settled >= self._settle

    def _batch_measured(self, margins: StabilityMargins) -> BatchMeasured:
        assert self.batch is not None
        ranks = world().size
        size = margins.dataset_size
        largest = self.batch.nearest(size or math.inf) * ranks if size else None
        return BatchMeasured(
            margins,
            self.monitor.update_rule,
            self._target,
            batch_size=self.batch.batch_size * ranks,
            dataset_size=size or 10**12,  # an endless stream: more than any batch
            smallest=self.batch.nearest(1) * ranks,
            largest=largest,
            loss_cap=math.inf if self.scheduler is None else self.scheduler.loss_cap,
        )

    def _situation(self, margins: StabilityMargins) -> Situation:
        scheduler, batch = self.scheduler, self.batch
        rule = self.monitor.update_rule
        return Situation(
            margins,
            self._target,
            lr=rule.lr,
            target_lr=None if scheduler is None else self._target.lr_for(at_lr(rule, rule.lr)),
            max_lr=math.inf if scheduler is None else scheduler.max_lr,
            batch_size=None if batch is None else batch.batch_size,
            smallest=1 if batch is None else batch.nearest(1),
            cuts=self._cuts(),
        )

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
        f"lr={lr!r}: expected a bool, a mapping of options of StabilityLR, or a StabilityLR"
    )


def _check_controls(
    monitor: StabilityMonitor,
    target: TargetRegion,
    scheduler: StabilityLR | None,
    batch: Resizable | None,
) -> None:
    is_share = target.share is not None
    if target.sharpness != OPEN and scheduler is None and not is_share:
        raise ValueError(
            f"target {target} bounds the sharpness, and lr=False leaves it alone: pass lr=True"
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
