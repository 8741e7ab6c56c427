"""`FlightRecorder`: keeps the last steps of a run, and writes a report when something goes wrong."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import instance, require_keys, whole
from stableopt._support.torch_internals import eager
from stableopt.monitor.joint_step import JointStep, nested
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.monitor.observed_step import observe_steps
from stableopt.recorder.alarms import BLOCK, Alarm, AlarmRules
from stableopt.recorder.evidence import (
    FIRST_LOSSES,
    Evidence,
    MeasuredRecord,
    StepRecord,
    first_level,
)
from stableopt.recorder.pending import PendingSteps
from stableopt.recorder.report import why, write_report
from stableopt.recorder.verdict import Verdict, verdict
from stableopt.sinks.delivery import WarnOnce
from stableopt.sinks.events import Event, Measured
from stableopt.stability.measure.layers import layer_of, layer_shares

__all__ = ["FlightRecorder"]


class FlightRecorder:
    """Watches a run through its monitor, and writes a report when the loss spikes or an edge is left.

    A report says what happened, the likely cause, which layers held the top eigenvector, and shows
    the steps and measurements before: ``report.md``, ``report.json``, and ``report.png`` where
    matplotlib is installed. It is a folder ``step-<step>`` in ``folder`` that appears as a whole, so
    that a killed run leaves only complete reports.

    The recorder keeps numbers of the last ``window`` steps and measurements and nothing else. It adds
    the norm of each parameter's gradient to a step, and that of a sample of its weights, on the device,
    and reads them once every ``check_every`` steps. It changes nothing in training and never raises
    into it; an error is warned of once. Where several ranks train, rank 0 writes, from its own
    gradients.

    Args:
        monitor: the monitor of the run, such as ``optimizer.track(…)`` returns.
        folder: where reports go; it is created with the first.
        window: steps, and measurements, that are kept.
        check_every: steps between two looks at losses and gradients. Each look waits for the device. A
            late look finds what earlier ones would have found.
        rules: what counts as a spike.
        measure: whether to measure at an alarm that no measurement gave, so that the report shows
            the curvature at that moment. Not where several ranks train: all of them would have to.
        most_reports: after so many, no more are written.
        keep_weights: whether to keep a copy of the model's weights of the last measurement without
            an alarm, and to write it into the report as ``last_good.pt``, for
            ``torch.load(weights_only=True)``.

    Attributes:
        reports: the folders of the reports, oldest first.

    Raises:
        TypeError: for a ``monitor`` or ``rules`` of another kind, and for optimizers whose steps cannot
            be observed.
        ValueError: for numbers out of range.

    >>> import tempfile
    >>> from torch import nn
    >>> model, x, y = nn.Linear(2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.8)  # the limit is 1/3
    >>> monitor = StabilityMonitor(optimizer, model, nn.MSELoss(), (x, y), every=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorder = FlightRecorder(monitor, folder)
    ...     for _ in range(5):
    ...         loss = nn.MSELoss()(model(x), y)
    ...         recorder.loss(loss)
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...         optimizer.step()
    ...     recorder.close()
    ...     print(sorted(path.name for path in Path(folder).glob("*")))
    ['step-5']
    """

    def __init__(
        self,
        monitor: StabilityMonitor,
        folder: str | os.PathLike[str],
        *,
        window: int = 200,
        check_every: int = 5,
        rules: AlarmRules | None = None,
        measure: bool = True,
        most_reports: int = 10,
        keep_weights: bool = False,
    ) -> None:
        if monitor is None:
            raise TypeError(
                "monitor=None: expected a StabilityMonitor. That of a callback exists once training has"
                " started; StabilityCallback(..., recorder=folder) makes the recorder then"
            )
        self._monitor = instance("monitor", monitor, StabilityMonitor)
        self._rules = instance("rules", AlarmRules() if rules is None else rules, AlarmRules)
        self.folder = Path(folder)
        self._window, self._check_every = whole("window", window), whole("check_every", check_every)
        self._measure = measure and not monitor.problem.ranks.several
        self._most_reports, self._keep_weights = whole("most_reports", most_reports), keep_weights
        self._steps: deque[StepRecord] = deque(maxlen=self._window)
        self._measured: deque[MeasuredRecord] = deque(maxlen=self._window)
        self._pending = PendingSteps(monitor)
        self._first_losses: list[float] = []
        self._first_probe: float | None = None
        self._quiet_until = self._measures_from = 0
        self._reporting = False
        self._unjudged = 0  # steps of the evidence that the rules have not seen
        self._earlier: tuple[Alarm, Evidence] | None = None
        self._good: dict[str, Tensor] | None = None
        self._first_gains = self._gains()
        self._warn = WarnOnce(active=monitor.problem.ranks.rank == 0)
        self._writes = monitor.problem.ranks.rank == 0
        self.reports: list[Path] = []
        self._joint = JointStep(monitor.optimizers)
        self._handles: list[Any] = []
        try:
            for each in monitor.optimizers:
                self._handles += observe_steps(each, self._before_step, self._after_step)
        except Exception:
            self.close()
            raise
        monitor.sinks.append(self)

    @eager
    def loss(
        self,
        loss: Tensor | float,
        batch: Any = None,
        *,
        grad_norm: Tensor | float | None = None,
    ) -> None:
        """Report the loss of the batch of the next step, and what else is known of it.

        Several calls before a step are its micro-batches: their losses are averaged, and their samples
        are joined. Tensors are read later, without a wait for the device now. With a closure, the first
        evaluation of a step counts; the monitor's own evaluations do not.

        Args:
            loss: a scalar: of a micro-batch its own mean loss, not its share of the step's.
            batch: what identifies the batch, such as the indices of its samples, or names of files;
                the first 1,024 are kept.
            grad_norm: the norm of the gradient before it is clipped, as
                :func:`torch.nn.utils.clip_grad_norm_` returns it. The recorder sees clipped gradients
                alone, in which an odd batch leaves no mark.
        """
        try:
            self._pending.report(loss, batch, grad_norm)
        except Exception as error:
            self._warn("the flight recorder cannot read a loss", why(error))

    @property
    def evidence(self) -> Evidence:
        """The steps and measurements that are kept, as far as they have been read."""
        return Evidence(
            list(self._steps),
            list(self._measured),
            first_level(self._first_losses, self._first_probe),
            self._first_gains,
            self._groups(),
            max((torch.finfo(p.dtype).eps for p in self._monitor.problem.params), default=0.0),
            tuple(self._first_losses),
        )

    def receive(self, event: Event) -> None:
        """Take a measurement from the monitor, whose sink this is."""
        if isinstance(event, Measured):
            self._guarded(lambda: self._take(event))

    def _take(self, event: Measured) -> None:
        self._pending.end()  # the monitor's hook comes before the recorder's
        self._drain()
        problem = self._monitor.problem
        margins, shares = event.margins, {}
        vectors = self._monitor.eigenvectors
        vector = vectors.get("preconditioned_sharpness", vectors.get("sharpness"))
        sizes = [shape.numel() for shape in problem.shapes]
        if margins.failure is None and vector is not None and not problem.sharded:
            shares = layer_shares(vector, problem.names, sizes)
        if self._first_probe is None and math.isfinite(margins.loss or math.nan):
            self._first_probe = margins.loss
        self._measured.append(MeasuredRecord(margins, shares))
        alarm = self._look()
        if alarm is None and self._keep_weights and margins.failure is None:
            state = self._monitor.problem.model.state_dict()
            self._good = {
                name: value.detach().to("cpu", copy=True)
                for name, value in state.items()
                if isinstance(value, Tensor)
            }

    def close(self) -> None:
        """Look once more, and detach from optimizer and monitor."""
        self._guarded(self._look)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self in self._monitor.sinks:
            self._monitor.sinks.remove(self)

    def __enter__(self) -> FlightRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept as plain numbers, lists and dicts; weights are left out."""
        self._drain()
        return {
            "evidence": self.evidence.to_dict(),
            "quiet_until": self._quiet_until,
            "reports": [str(path) for path in self.reports],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            ValueError: if something is missing.
        """
        require_keys(state, self.state_dict())
        known = Evidence.from_dict(state["evidence"])
        self._steps = deque(known.steps, maxlen=self._window)
        self._measured = deque(known.measured, maxlen=self._window)
        self._first_losses, self._first_probe = list(known.first_losses), known.first_loss
        self._first_gains = dict(known.first_gains)
        self._quiet_until = int(state["quiet_until"])
        self.reports = [Path(path) for path in state["reports"]]

    def _guarded(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            self._warn("the flight recorder failed", why(error))

    @eager
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if nested(optimizer) or not self._joint.begins(optimizer):
            return None
        self._guarded(lambda: self._pending.begin(optimizer))
        at = next((k for k, each in enumerate(args) if k and callable(each)), None)
        closure = kwargs.get("closure") if at is None else args[at]
        if closure is None:
            self._guarded(self._pending.gradients)
            return None
        seen = self._seen(closure)
        if at is None:
            return args, {**kwargs, "closure": seen}
        return (*args[:at], seen, *args[at + 1 :]), kwargs

    def _seen(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``closure``, whose first evaluation gives the step its loss and gradients.

        A line search evaluates it at further points, whose losses are not those of the step.
        """
        evaluated = False

        @eager
        def seen() -> Any:
            nonlocal evaluated
            if evaluated:
                with self._pending.repeated():
                    return closure()
            loss = closure()
            evaluated = True
            self._guarded(self._pending.gradients)
            return loss

        return seen

    @eager
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if nested(optimizer) or not self._joint.ends(optimizer):
            return
        self._guarded(self._pending.end)
        if len(self._pending) >= self._check_every:
            self._guarded(self._look)

    def _drain(self) -> None:
        """Read the pending steps from the device; of many, ask the rules among them too."""
        for step in self._pending.read():
            if self._unjudged == BLOCK:
                self._guarded(self._judge)
            self._steps.append(step)
            self._unjudged += 1
            known = step.loss is not None and math.isfinite(step.loss)
            if known and len(self._first_losses) < FIRST_LOSSES:
                self._first_losses.append(float(step.loss or 0.0))

    def _judge(self) -> None:
        """Keep the first alarm for the next look, with the evidence of that moment."""
        self._unjudged, evidence = 0, self.evidence
        alarm = self._rules.alarm(evidence)
        if self._earlier is None and alarm is not None and alarm.step >= self._quiet_until:
            self._earlier = alarm, evidence

    def _groups(self) -> list[list[str]]:
        problem = self._monitor.problem
        layers = {id(p): layer_of(n) for n, p in zip(problem.names, problem.params, strict=True)}
        return [
            list(dict.fromkeys(layers[id(p)] for p in group["params"] if id(p) in layers))
            for o in self._monitor.optimizers
            for group in o.param_groups
        ]

    def _gains(self) -> dict[str, float]:
        problem = self._monitor.problem
        named = [(n, p) for n, p in zip(problem.names, problem.params, strict=True) if p.dim() > 1]
        if not named or problem.sharded:
            return {}
        with torch.no_grad():
            gains = [p.detach().float().square().sum() / p.shape[0] for _, p in named]
        return {
            layer_of(name): gain**0.5
            for (name, _), gain in zip(named, torch.stack(gains).tolist(), strict=True)
        }

    def _look(self) -> Alarm | None:
        """Write a report if there is an alarm; return the alarm."""
        self._drain()
        earlier, self._earlier, self._unjudged = self._earlier, None, 0
        alarm, past = earlier or (self._rules.alarm(self.evidence), None)
        quiet = alarm is None or self._reporting or alarm.step < self._quiet_until
        if alarm is None or quiet or not self._writes or len(self.reports) >= self._most_reports:
            return alarm
        self._reporting = True
        try:
            self.reports.append(self._report(alarm, past))
        finally:
            self._reporting = False
        self._quiet_until = alarm.step + self._window
        return alarm

    def _report(self, alarm: Alarm, past: Evidence | None) -> Path:
        """Write the report of ``alarm``; what fails is named in it.

        ``past`` is the evidence at the alarm where that was before now.
        """
        missing: dict[str, str] = {}
        if self._measure and self._last_measured() < self._monitor.step >= self._measures_from:
            # A report that cannot be written is tried again, and the measurement is not.
            self._measures_from = self._monitor.step + self._window
            try:
                self._monitor.measure()  # which comes back by `receive`
            except Exception as error:
                missing["the measurement at the alarm"] = why(error)
        evidence = self.evidence
        if past is not None:
            evidence = replace(past, measured=evidence.measured)
        try:
            found = verdict(alarm, evidence)
        except Exception as error:
            found = Verdict("unknown", f"{alarm.text[0].upper()}{alarm.text[1:]}.")
            missing["the cause"] = why(error)
        path = write_report(self.folder, alarm, found, evidence, self._good, missing)
        for part, reason in missing.items():
            self._warn(f"the report of step {alarm.step} lacks {part}", reason)
        return path

    def _last_measured(self) -> int:
        return self._measured[-1].step if self._measured else -1

    def __repr__(self) -> str:
        return f"FlightRecorder({str(self.folder)!r}, reports={len(self.reports)})"
