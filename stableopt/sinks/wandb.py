"""`WandbSink`: logs each record to a run of Weights & Biases."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["WandbSink"]


class WandbSink:
    """Logs each record to a run of Weights & Biases, as ``stability/<name>``.

    The charts' axis is ``stability/step``, the optimizer step of the measurement, independent of the
    run's own steps. Records are logged without a step: wandb then drops no row that training logs with
    ``step=``, as long as there is one record, with its notes, between two such calls. With several
    monitors, give each a run of its own, or log without ``step=``. Numbers that are not finite, such
    as limits that do not exist, are left out.

    Args:
        run: what ``wandb.init`` returned; by default the run that is active at the first record.

    Raises:
        TypeError: for anything else.
        ImportError: at the first record, without a run and without wandb.
        RuntimeError: at the first record, without a run and where none is active.

    >>> class Run:
    ...     def define_metric(self, name, step_metric=None): pass
    ...     def log(self, data): print(data)
    >>> WandbSink(Run())(50, {"sharpness": 15.0, "non_uniformity_limit": math.inf})
    {'stability/step': 50, 'stability/sharpness': 15.0}
    """

    def __init__(self, run: Any = None) -> None:
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise TypeError(f"run={run!r}: expected what wandb.init() returned, or None")
        self._run, self._began = run, False

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Log ``record``, measured at ``step``."""
        self._log(step, {name: value for name, value in record.items() if math.isfinite(value)})

    def note(self, step: int, text: str) -> None:
        """Log ``text``, a decision at ``step`` and its reason, as ``stability/note``."""
        # Part of the next row: otherwise wandb would count another step.
        self._log(step, {"note": text}, commit=False)

    def _log(self, step: int, values: Mapping[str, Any], **how: Any) -> None:
        run = self._run = self._run or _active_run()
        if not self._began:
            run.define_metric("stability/step")
            run.define_metric("stability/*", step_metric="stability/step")
            self._began = True
        named = {f"stability/{name}": value for name, value in values.items()}
        run.log({"stability/step": int(step), **named}, **how)

    def __repr__(self) -> str:
        return f"WandbSink({self._run!r})"


def _active_run() -> Any:
    try:
        run = importlib.import_module("wandb").run
    except ModuleNotFoundError as error:
        raise ImportError("WandbSink needs wandb: pip install stableopt[wandb]") from error
    if run is None:
        raise RuntimeError("WandbSink: no run is active; expected wandb.init() before, or run=")
    return run
