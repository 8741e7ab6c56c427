"""`Tracked`: the common base of the callbacks, which creates the monitor and the recorder of a run."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stableopt._support.arguments import shown
from stableopt.curvature import Problem
from stableopt.monitor.measurer import needs_second_derivatives
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.recorder import FlightRecorder
from stableopt.sinks.delivery import Sink, check_sinks
from stableopt.stability import StabilityMargins
from stableopt.stability.measure.registry import DEFAULT_QUANTITIES

__all__ = ["Tracked"]


class _IgnoringRecorder:
    """Replaces the recorder during the first evaluation of the probe set, before there is a monitor."""

    def loss(self, *args: Any, **kwargs: Any) -> None:
        """Ignore a loss, which does not belong to a step."""


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


_PROBLEM_OPTIONS = _keywords(StabilityMonitor) & _keywords(Problem)
"""Options of the monitor that go to the problem, since a monitor that is given one refuses them."""


class Tracked:
    """Mixin for callbacks: creates the monitor when a run starts, and keeps it after the end."""

    def __init__(
        self,
        data: Any,
        batch_loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        prefix: str = "stability",
        sinks: Any = (),
        recorder: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if data is None:
            raise TypeError("data=None: expected the probe set, such as a batch or a DataLoader")
        if batch_loss is not None and not callable(batch_loss):
            raise TypeError(
                f"batch_loss={shown(batch_loss)}: expected a function of model and batch"
            )
        self._data, self._batch_loss, self._prefix = data, batch_loss, prefix
        self._sinks = check_sinks(sinks)
        # An iterator can be read only once, and each training reads the options.
        self._options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, Iterator) else value
            for name, value in options.items()
        }
        if not isinstance(recorder, (str, os.PathLike, type(None))):
            raise TypeError(f"recorder={shown(recorder)}: expected the folder of its reports")
        self._report_folder = recorder
        self.monitor: StabilityMonitor | None = None
        self.recorder: FlightRecorder | None = None
        self._evidence: dict[str, Any] | None = None

    @property
    def margins(self) -> StabilityMargins | None:
        """The latest measurement, or ``None`` before the first."""
        return None if self.monitor is None else self.monitor.margins

    @property
    def history(self) -> deque[StabilityMargins]:
        """The measurements of the run so far, oldest first."""
        return deque() if self.monitor is None else self.monitor.history

    def _start(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        batch_loss: Callable[[Any, Any], Tensor],
        data: Any,
        sink: Sink,
        step: int,
        load: Callable[[StabilityMonitor], None],
        **defaults: Any,
    ) -> None:
        """Create the monitor at ``step``, and let ``load`` restore the state of an earlier run."""
        options = {**defaults, **self._options, "sinks": [sink, *self._sinks]}
        of_problem = {name: options.pop(name) for name in _PROBLEM_OPTIONS if name in options}
        of_problem["second_derivatives"] = needs_second_derivatives(
            options.get("quantities", DEFAULT_QUANTITIES)
        )
        folder, monitor, recorder = self._report_folder, None, None
        # The user's training step, which evaluates the probe set, may report to the recorder.
        self.recorder = None if folder is None else cast(FlightRecorder, _IgnoringRecorder())
        try:
            problem = Problem.from_batch_loss(model, batch_loss, data, **of_problem)
            monitor = StabilityMonitor(optimizer, problem, **options)
            monitor.step = step
            load(monitor)
            if folder is not None:
                recorder = FlightRecorder(monitor, folder)
                self._resume(recorder)
        except BaseException:
            self.recorder = None
            if monitor is not None:
                monitor.close()
            raise
        self.monitor, self.recorder = monitor, recorder

    def _saved_state(self) -> dict[str, Any]:
        """Return the state of the monitor, with that of the recorder if there is one."""
        assert self.monitor is not None
        state = self.monitor.state_dict()
        if self.recorder is not None:
            state["recorder"] = self.recorder.state_dict()
        return state

    def _restore(self, monitor: StabilityMonitor, state: dict[str, Any]) -> None:
        """Load ``state``, without its eigenvectors if they do not fit the parameters."""
        self._evidence = state.get("recorder")
        try:
            monitor.load_state_dict(state)
        except ValueError as error:
            message = f"eigenvector searches start at random: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            monitor.load_state_dict({**state, "starts": {}})

    def _resume(self, recorder: FlightRecorder) -> None:
        """Load the evidence of the earlier run into the recorder, once."""
        evidence, self._evidence = self._evidence, None
        if evidence is None:
            return
        try:
            recorder.load_state_dict(evidence)
        except Exception as error:  # a broken file must not stop training
            reason = f"{type(error).__name__}: {error}"
            message = f"the flight recorder starts without evidence of the run before: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        if self.monitor is not None:
            self.monitor.close()

    def _metrics(self, record: dict[str, float]) -> dict[str, float]:
        """Return the finite numbers of ``record`` by their names in loggers."""
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        return {f"{self._prefix}/{name}": value for name, value in finite.items()}
