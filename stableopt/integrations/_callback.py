"""`Tracked`: what the callbacks share, a probe set, its loss, and the monitor of a run."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stableopt.curvature import Problem
from stableopt.monitor.monitor import StabilityMonitor, needs_second_derivatives
from stableopt.recorder import FlightRecorder
from stableopt.sinks.delivery import Sink, check_sinks
from stableopt.stability import StabilityMargins
from stableopt.stability.measure.quantities import DEFAULT_QUANTITIES

__all__ = ["Tracked"]


class _Waiting:
    """Stands for the recorder while the probe set is first evaluated, before there is a monitor."""

    def loss(self, *args: Any, **kwargs: Any) -> None:
        """Ignore a loss, which is not that of a step."""


_OF_THE_PROBLEM = ("params", "chunk_size", "dtype", "sample_weight", "batch_dim", "process_group")


class Tracked:
    """Mixin for callbacks: makes the monitor when a run starts, and keeps it after the end."""

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
            raise TypeError(f"batch_loss={batch_loss!r}: expected a function of model and batch")
        self._data, self._batch_loss, self._prefix = data, batch_loss, prefix
        self._sinks, self._options = check_sinks(sinks), options
        if not isinstance(recorder, (str, os.PathLike, type(None))):
            raise TypeError(f"recorder={recorder!r}: expected the folder of its reports")
        self._folder = recorder
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
        """Make the monitor at ``step``, and let ``load`` restore the state of an earlier run."""
        options = {**defaults, **self._options, "sinks": [sink, *self._sinks]}
        own = {name: options.pop(name) for name in _OF_THE_PROBLEM if name in options}
        own["second_derivatives"] = needs_second_derivatives(
            options.get("quantities", DEFAULT_QUANTITIES)
        )
        # The loss of a training step may report to the recorder.
        self.recorder = None if self._folder is None else cast(FlightRecorder, _Waiting())
        monitor = None
        try:
            problem = Problem.from_batch_loss(model, batch_loss, data, **own)
            monitor = StabilityMonitor(optimizer, problem, **options)
            monitor.step = step
            load(monitor)
            recorder = None if self._folder is None else FlightRecorder(monitor, self._folder)
            if recorder is not None:
                self._resume(recorder)
        except BaseException:
            self.recorder = None
            if monitor is not None:
                monitor.close()
            raise
        self.monitor, self.recorder = monitor, recorder

    def _saved(self) -> dict[str, Any]:
        """Return the state of the monitor, and that of the recorder."""
        assert self.monitor is not None
        state = self.monitor.state_dict()
        return state if self.recorder is None else {**state, "recorder": self.recorder.state_dict()}

    def _restore(self, monitor: StabilityMonitor, state: dict[str, Any]) -> None:
        """Load ``state``, without its eigenvectors where they are of other parameters."""
        self._evidence = state.get("recorder")
        try:
            monitor.load_state_dict(state)
        except ValueError as error:
            warnings.warn(f"searches start at random: {error}", RuntimeWarning, stacklevel=2)
            monitor.load_state_dict({**state, "starts": {}})

    def _resume(self, recorder: FlightRecorder) -> None:
        """Give the recorder the evidence of the run before, once."""
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

    def _named(self, record: dict[str, float]) -> dict[str, float]:
        """Return the finite numbers of ``record`` under the names for loggers."""
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        return {f"{self._prefix}/{name}": value for name, value in finite.items()}
