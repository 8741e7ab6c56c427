"""`WandbSink`: logs each record to a run of Weights & Biases."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

from stableopt._support.arguments import shown

__all__ = ["WandbSink"]


class _Logged(NamedTuple):
    """The last record that a sink logged to a run, with all notes of its step."""

    sink: ReferenceType[WandbSink]
    step: int
    row: int | None
    note: str


_LATEST: WeakKeyDictionary[Any, _Logged] = WeakKeyDictionary()
"""The last record by run: sinks may share a run, and only the last one fills its uncommitted row."""


class WandbSink:
    """Logs each record to a run of Weights & Biases, as ``stability/<name>``.

    The charts' axis is ``stability/step``, the optimizer step of the measurement, independent of the
    run's own step. A record is logged without a step, and joins the row that training logs next. If
    training logs nothing between two records, the first becomes a row of its own, and the run's step
    grows by one. So wandb drops no row that training logs with ``step=``, as long as that step grows by
    at least one per measurement. If it counts epochs, log without ``step=``. With several monitors,
    give each its own run, or log without ``step=``. Infinity and NaN, such as limits that do not exist,
    are left out.

    Args:
        run: the result of ``wandb.init``; by default the run that is active at the first record.

    Raises:
        TypeError: if ``run`` is not a run.
        ImportError: at the first record, if wandb is needed and not installed.
        RuntimeError: at the first record, if no run is given and none is active.

    >>> class Run:
    ...     step = 0
    ...     def define_metric(self, name, step_metric=None): pass
    ...     def log(self, data, commit=None): print(data)
    >>> WandbSink(Run())(50, {"sharpness": 15.0, "non_uniformity_limit": math.inf})
    {'stability/step': 50, 'stability/sharpness': 15.0}
    """

    def __init__(self, run: Any = None) -> None:
        if run is not None and not callable(getattr(run, "define_metric", None)):
            raise TypeError(f"run={shown(run)}: expected what wandb.init() returned, or None")
        self._run, self._has_metrics = run, False

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Log ``record``, measured at ``step``."""
        self._log(step, {name: value for name, value in record.items() if math.isfinite(value)})

    def note(self, step: int, text: str) -> None:
        """Log ``text``, a decision at ``step`` and its reason, as ``stability/note``."""
        self._log(step, {"note": text})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        run = self._run = self._run or _active_run()
        if not self._has_metrics:
            run.define_metric("stability/step")
            run.define_metric("stability/*", step_metric="stability/step")
            self._has_metrics = True
        latest, row = _LATEST.get(run), _row(run)
        note = values.get("note", "")
        if latest is not None and latest.row == row:  # training has not committed the latest record
            if latest.sink() is self and latest.step == int(step):
                note = "\n".join(filter(None, (latest.note, note)))
            else:
                run.log({}, commit=True)
                row = _row(run)
        values = {**values, "note": note} if note else values
        named = {f"stability/{name}": value for name, value in values.items()}
        # A commit would raise the run's step, and wandb drops rows that training logs with a lower one.
        run.log({"stability/step": int(step), **named}, commit=False)
        _LATEST[run] = _Logged(ref(self), int(step), row, note)

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


def _row(run: Any) -> int | None:
    """Return the number of the row that ``run`` fills; ``None`` for a shared run, which has no step."""
    try:
        row: int = run.step
    except Exception:  # a shared run does not accept step= either, so a commit drops no row
        return None
    return row
