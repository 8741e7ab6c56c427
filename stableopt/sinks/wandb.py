"""`WandbSink`: logs each record to a run of Weights & Biases."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

__all__ = ["WandbSink"]


class _Logged(NamedTuple):
    """What a sink has logged last: itself, the step, the run's row, and the notes of that step."""

    sink: int
    step: int
    row: int | None
    note: str


_LATEST: WeakKeyDictionary[Any, _Logged] = WeakKeyDictionary()
"""By run: several sinks may share one, and what waits in its row is what any of them logged."""


class WandbSink:
    """Logs each record to a run of Weights & Biases, as ``stability/<name>``.

    The charts' axis is ``stability/step``, the optimizer step of the measurement, independent of the
    run's own steps. A record is logged without a step, and joins the row that training logs next. Where
    training logs nothing between two records, the first one becomes a row of its own, and the run
    counts a step more. So wandb drops no row that training logs with ``step=``, as long as that step
    grows by at least one a measurement; where it counts epochs, log without ``step=``. With several
    monitors, give each a run of its own, or log without ``step=``. Numbers that are not finite, such
    as limits that do not exist, are left out.

    Args:
        run: what ``wandb.init`` returned; by default the run that is active at the first record.

    Raises:
        TypeError: for anything else.
        ImportError: at the first record, without a run and without wandb.
        RuntimeError: at the first record, without a run and where none is active.

    >>> class Run:
    ...     step = 0
    ...     def define_metric(self, name, step_metric=None): pass
    ...     def log(self, data, commit=None): print(data)
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
        self._log(step, {"note": text})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        run = self._run = self._run or _active_run()
        if not self._began:
            run.define_metric("stability/step")
            run.define_metric("stability/*", step_metric="stability/step")
            self._began = True
        latest, row = _LATEST.get(run), _row(run)
        note = values.get("note", "")
        if latest is not None and latest.row == row:  # which training has not committed
            if (latest.sink, latest.step) == (id(self), int(step)):
                note = "\n".join(filter(None, (latest.note, note)))
            else:
                run.log({}, commit=True)
                row = _row(run)
        values = {**values, "note": note} if note else values
        named = {f"stability/{name}": value for name, value in values.items()}
        # Without a commit: wandb would drop a row that training logs with a step below its count.
        run.log({"stability/step": int(step), **named}, commit=False)
        _LATEST[run] = _Logged(id(self), int(step), row, note)

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
    """Return the row that ``run`` fills; ``None`` where it does not say, as in a shared run."""
    try:
        row: int = run.step
    except Exception:  # such a run accepts no step= either, and every row may be committed
        return None
    return row
