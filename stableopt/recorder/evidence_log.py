"""`EvidenceLog`: the last steps and measurements of a run, and the alarms that rules find in them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.recorder.alarms import BLOCK, Alarm, AlarmRules
from stableopt.recorder.evidence import (
    FIRST_LOSSES,
    Evidence,
    MeasuredRecord,
    StepRecord,
    first_level,
)
from stableopt.stability.layers.blocks import layer_of
from stableopt.stability.measure.margins import StabilityMargins

__all__ = ["EvidenceLog", "Found"]


class Found(NamedTuple):
    """An alarm, with the evidence at that moment if later steps followed, else ``None``."""

    alarm: Alarm
    past: Evidence | None


class EvidenceLog:
    """The evidence of a run, to which the rules apply once for each block of steps.

    Args:
        monitor: the monitor of the run.
        rules: what counts as a spike.
        window: the number of steps, and of measurements, to keep.

    Attributes:
        quiet_until: alarms of earlier steps are not reported.
    """

    def __init__(self, monitor: StabilityMonitor, rules: AlarmRules, window: int) -> None:
        self._monitor, self._rules = monitor, rules
        self._steps: deque[StepRecord] = deque(maxlen=window)
        self._measured: deque[MeasuredRecord] = deque(maxlen=window)
        self._first_losses: list[float] = []
        self._first_probe: float | None = None
        self._first_gains: Mapping[str, float] = _weight_gains(monitor.problem)
        self._unchecked = 0  # steps that the rules have not seen
        self._early: Found | None = None
        self.quiet_until = 0

    @property
    def evidence(self) -> Evidence:
        """The kept steps and measurements."""
        problem = self._monitor.problem
        return Evidence(
            list(self._steps),
            list(self._measured),
            first_level(self._first_losses, self._first_probe),
            self._first_gains,
            _layers_by_group(problem, self._monitor.optimizers),
            max((torch.finfo(p.dtype).eps for p in problem.params), default=0.0),
            tuple(self._first_losses),
        )

    @property
    def measured_at(self) -> int:
        """The step of the last measurement, -1 without one."""
        return self._measured[-1].step if self._measured else -1

    def add_measurement(self, margins: StabilityMargins) -> None:
        """Append a measurement."""
        if self._first_probe is None and math.isfinite(margins.loss or math.nan):
            self._first_probe = margins.loss
        self._measured.append(MeasuredRecord.of(margins))

    def add_step(self, step: StepRecord) -> None:
        """Append a step. Call :meth:`check_block` before it."""
        self._steps.append(step)
        self._unchecked += 1
        loss = step.loss
        if loss is not None and math.isfinite(loss) and len(self._first_losses) < FIRST_LOSSES:
            self._first_losses.append(float(loss))

    def check_block(self) -> None:
        """Apply the rules after each block of steps; keep the first alarm for :meth:`check`."""
        if self._unchecked < BLOCK:
            return
        self._unchecked, evidence = 0, self.evidence
        alarm = self._rules.alarm(evidence)
        if self._early is None and alarm is not None and alarm.step >= self.quiet_until:
            self._early = Found(alarm, evidence)

    def check(self) -> Found | None:
        """Return the alarm of an earlier block, else that of the latest steps, else ``None``."""
        found, self._early, self._unchecked = self._early, None, 0
        if found is not None:
            return found
        alarm = self._rules.alarm(self.evidence)
        return None if alarm is None else Found(alarm, None)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts."""
        early = None
        if self._early is not None and self._early.past is not None:
            early = {"alarm": asdict(self._early.alarm), "evidence": self._early.past.to_dict()}
        return {
            "evidence": self.evidence.to_dict(),
            "quiet_until": self.quiet_until,
            "unchecked": self._unchecked,
            "early_alarm": early,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; change nothing if it raises."""
        evidence, early = Evidence.from_dict(state["evidence"]), state.get("early_alarm")
        if early is not None:
            early = Found(Alarm(**early["alarm"]), Evidence.from_dict(early["evidence"]))
        # States of older versions end before the unchecked steps.
        quiet_until, unchecked = int(state["quiet_until"]), int(state.get("unchecked", 0))
        self._steps = deque(evidence.steps, maxlen=self._steps.maxlen)
        self._measured = deque(evidence.measured, maxlen=self._measured.maxlen)
        self._first_losses = list(evidence.first_losses)
        # Without batch losses the loss at the start is the first one on the probe set.
        self._first_probe = None if self._first_losses else evidence.first_loss
        self._first_gains = dict(evidence.first_gains)
        self._early, self._unchecked, self.quiet_until = early, unchecked, quiet_until


def _layers_by_group(
    problem: MeanLoss, optimizers: Iterable[torch.optim.Optimizer]
) -> list[list[str]]:
    """Return the layers of each parameter group of ``optimizers``."""
    layers = {id(p): layer_of(n) for n, p in zip(problem.names, problem.params, strict=True)}
    return [
        list(dict.fromkeys(layers[id(p)] for p in group["params"] if id(p) in layers))
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _weight_gains(problem: MeanLoss) -> dict[str, float]:
    """Return the root mean square of each weight matrix times the root of its active inputs."""
    modules = list(problem.model.modules())
    embeddings = {id(m.weight) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    embeddings -= {id(m.weight) for m in modules if isinstance(m, nn.Linear)}
    named = [(n, p) for n, p in zip(problem.names, problem.params, strict=True) if p.dim() > 1]
    if not named or problem.sharded:
        return {}
    with torch.no_grad():
        gains = [
            p.detach().float().square().sum() / (p.numel() if id(p) in embeddings else p.shape[0])
            for _, p in named
        ]
    return {
        layer_of(name): gain**0.5
        for (name, _), gain in zip(named, torch.stack(gains).tolist(), strict=True)
    }
