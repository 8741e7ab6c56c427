"""`FlightRecorder`: keeps the last steps of a run and writes a report when training fails."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import instance, require_keys, whole
from stableopt._support.torch_internals import eager
from stableopt._support.warn_once import WarnOnce
from stableopt.monitor.closing import open_monitor, warn_of_closed
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.monitor.observed_step import observe_steps
from stableopt.recorder.alarms import Alarm, AlarmRules
from stableopt.recorder.evidence import Evidence
from stableopt.recorder.evidence_log import EvidenceLog, Found
from stableopt.recorder.pending import PendingSteps
from stableopt.recorder.report import reason_of, report_folder, why, write_report
from stableopt.recorder.verdict import Verdict, verdict
from stableopt.sinks.events import Event, Measured

__all__ = ["FlightRecorder"]

STATE_KEYS = ("evidence", "quiet_until", "reports")
"""Entries that every state has."""


class FlightRecorder:
    """Watches a run, and writes a report when the loss spikes or the sharpness exceeds its limit.

    A report is a folder ``step-<step>`` in ``folder`` with ``report.md``, ``report.json`` and, where
    matplotlib is installed, ``report.png``. It states what happened, the likely cause and the layers
    that held the top eigenvector, and shows the steps and measurements before the alarm. The folder
    appears once it is complete, so a killed run leaves no partial report.

    The recorder keeps only numbers, of the last ``window`` steps and measurements. In each step the
    device computes the norm of each parameter's gradient and of a sample of its weights; the recorder
    reads them every ``check_every`` steps. It never changes training and never raises into it; each
    error is warned of once. In a distributed run rank 0 writes, from its own gradients. If training goes
    on after the monitor was closed, the recorder stops with a warning.

    Args:
        monitor: the monitor of the run, such as ``optimizer.track(…)`` returns.
        folder: the folder of the reports; the first report creates it.
        window: the number of steps, and of measurements, to keep.
        check_every: steps between two checks of losses and gradients. A check waits for the device. A
            late check finds the alarms that earlier checks would have found.
        rules: what counts as a spike.
        measure: whether an alarm from losses or gradients triggers a measurement, so that the report
            shows the curvature at that moment; sinks receive it, steering does not. Ignored in a
            distributed run, where every rank would have to measure.
        most_reports: the largest number of reports.
        keep_weights: whether to keep a copy of the model's weights from the last measurement without
            an alarm, and to write it into the report as ``last_good.pt``, for
            ``torch.load(weights_only=True)``.

    Attributes:
        reports: the folders of the reports, oldest first.

    Raises:
        TypeError: for a ``monitor`` or ``rules`` of another kind, and for optimizers whose steps cannot
            be observed.
        ValueError: for numbers out of range, a closed monitor, and a ``folder`` that exists as a file.

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
        self._monitor = open_monitor(monitor)
        rules = instance("rules", AlarmRules() if rules is None else rules, AlarmRules)
        self.folder = report_folder(folder)
        self._window, self._check_every = whole("window", window), whole("check_every", check_every)
        self._measure = measure and not monitor.problem.ranks.several
        self._most_reports, self._keep_weights = whole("most_reports", most_reports), keep_weights
        self._log = EvidenceLog(monitor, rules, self._window)
        self._pending = PendingSteps(monitor)
        self._last_lost = -math.inf  # the step of the last alarm whose report could not be written
        self._next_measurement = 0  # no alarm triggers a measurement before this step
        self._reporting = self._stopped = False
        self._last_good: dict[str, Tensor] | None = None
        self._is_writer = monitor.problem.ranks.rank == 0
        self._warn = WarnOnce(active=self._is_writer)
        self.reports: list[Path] = []
        self._handles: list[Any] = []
        try:
            self._handles += observe_steps(
                monitor.optimizers, self._before_step, self._after_step, self._at_ascent
            )
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
        """Report the loss of the next step's batch, and optionally its samples and gradient norm.

        Several calls before a step are its micro-batches: their losses are averaged, and their samples
        are concatenated. So do not report a batch whose step the loop skips: it would count as one of
        the next step's. The call does not synchronize with the device. With a closure, only the first
        evaluation in a step counts; evaluations by the monitor never do.

        Args:
            loss: a scalar; for a micro-batch its own mean loss, not its share of the step's.
            batch: identifiers of the samples, such as indices or file names; the first 1,024 are kept.
            grad_norm: the norm of the gradient before clipping, as
                :func:`torch.nn.utils.clip_grad_norm_` returns it. The recorder itself sees only the
                clipped gradients, in which an odd batch does not show.
        """
        if self._stops():
            return
        try:
            self._pending.report(loss, batch, grad_norm)
        except Exception as error:
            self._warn("the flight recorder cannot read a loss", why(error))

    @property
    def evidence(self) -> Evidence:
        """The kept steps and measurements, without steps that are still on the device."""
        return self._log.evidence

    def receive(self, event: Event) -> None:
        """Take a measurement from the monitor, whose sink this is."""
        if isinstance(event, Measured) and not self._stopped:
            self._guarded(lambda: self._record_measurement(event))

    def _record_measurement(self, event: Measured) -> None:
        self._pending.end()  # the monitor's step hook runs before the recorder's
        self._read_pending()
        self._log.add_measurement(event.margins)
        found = self._check()
        if found is None and self._keep_weights and event.margins.failure is None:
            self._last_good = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self._monitor.problem.model.state_dict().items()
                if isinstance(value, Tensor)
            }

    def close(self) -> None:
        """Check once more, and detach from optimizer and monitor."""
        if not self._stopped:
            self._guarded(self._check)
        self._stopped = True
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
        """Return the evidence and the reports' paths as plain numbers, lists and dicts, no weights."""
        self._read_pending()
        return {**self._log.state_dict(), "reports": [str(path) for path in self.reports]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`; steps and weights seen before are forgotten.

        Raises:
            ValueError: if an entry is missing.
        """
        require_keys(state, STATE_KEYS)
        reports = [Path(path) for path in state["reports"]]
        self._log.load_state_dict(state)
        self.reports, self._pending = reports, PendingSteps(self._monitor)
        self._last_lost, self._next_measurement, self._last_good = -math.inf, 0, None

    def _stops(self) -> bool:
        """Return whether the recorder has stopped, as it does if steps follow that the monitor misses.

        Without the monitor's count of steps and its measurements, a report would name wrong steps.
        """
        if self._monitor.closed and not self._stopped:
            self._guarded(self._check)
            self._stopped = True
            what = f"the flight recorder stopped after step {self._monitor.step}"
            warn_of_closed(self._warn, what)
        return self._stopped

    def _guarded(self, action: Callable[[], object]) -> None:
        """Call ``action``; warn of an error instead of raising it into training."""
        try:
            action()
        except Exception as error:
            self._warn("the flight recorder failed", why(error))

    @eager
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._stops():
            return None
        self._guarded(lambda: self._pending.begin(optimizer))
        # args[0] is the optimizer; a closure may be any later argument.
        place = next((k for k, arg in enumerate(args) if k and callable(arg)), None)
        closure = kwargs.get("closure") if place is None else args[place]
        if closure is None:
            self._guarded(self._pending.gradients)
            return None
        observed = self._observed(closure)
        if place is None:
            return args, {**kwargs, "closure": observed}
        return (*args[:place], observed, *args[place + 1 :]), kwargs

    def _observed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``closure`` wrapped so that its first evaluation records the step's loss and gradients.

        A line search evaluates the closure again, at points that are not those of the step; SAM
        evaluates it only there.
        """
        evaluated = False

        @eager
        def observed() -> Any:
            nonlocal evaluated
            if evaluated or self._pending.has_gradients:
                with self._pending.repeated():
                    return closure()
            loss = closure()
            evaluated = True
            self._guarded(self._pending.gradients)
            return loss

        return observed

    @eager
    def _at_ascent(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the gradients before SAM ascends."""
        self._guarded(self._pending.gradients)

    @eager
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._stopped:
            return
        self._guarded(self._pending.end)
        if len(self._pending) >= self._check_every:
            self._guarded(self._check)

    def _read_pending(self) -> None:
        """Read the pending steps from the device, and apply the rules to each block of them."""
        for step in self._pending.read():
            self._guarded(self._log.check_block)
            self._log.add_step(step)

    def _check(self) -> Found | None:
        """Return the alarm that the rules give, if any, and write its report."""
        self._read_pending()
        found = self._log.check()
        if found is None or self._reporting or found.alarm.step < self._log.quiet_until:
            return found
        if not self._is_writer or len(self.reports) >= self._most_reports:
            return found
        self._reporting = True
        try:
            is_written = self._report(found)
        finally:
            self._reporting = False
        if is_written:
            self._log.quiet_until = found.alarm.step + self._window
        return found

    def _report(self, found: Found) -> bool:
        """Write a report, which names its own missing parts; return whether that worked."""
        alarm, missing = found.alarm, dict[str, str]()
        now = self._monitor.step
        if self._measure and self._log.measured_at < now and now >= self._next_measurement:
            # If the report cannot be written, the next check tries again, without this measurement.
            self._next_measurement = now + self._window
            try:
                self._monitor.measure(aside=True)  # `receive` gets the result
            except Exception as error:
                missing["the measurement at the alarm"] = why(error)
        evidence = self.evidence
        if found.past is not None:
            evidence = replace(found.past, measured=evidence.measured)
        try:
            cause = verdict(alarm, evidence)
        except Exception as error:
            cause = Verdict("unknown", f"{alarm.text[0].upper()}{alarm.text[1:]}.")
            missing["the cause"] = why(error)
        try:
            path = write_report(self.folder, alarm, cause, evidence, self._last_good, missing)
        except Exception as error:
            self._warn_of_lost(alarm, cause, error)
            return False
        self.reports.append(path)
        for part, reason in missing.items():
            self._warn(f"the report of step {alarm.step} lacks {part}", reason)
        return True

    def _warn_of_lost(self, alarm: Alarm, cause: Verdict, error: Exception) -> None:
        """Warn of a lost report, with its verdict; not again while later attempts follow closely."""
        if alarm.step > self._last_lost + self._window:
            self._warn.always(
                f"the report of step {alarm.step} ({cause.cause}) could not be written to"
                f" {self.folder}: {reason_of(error)}. {cause.text}"
            )
        self._last_lost = alarm.step

    def __repr__(self) -> str:
        return f"FlightRecorder({str(self.folder)!r}, reports={len(self.reports)})"
