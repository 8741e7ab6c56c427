"""`remember` and `remembered`: the experiments that were run in a folder, with their settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.experiments import NAMES
from benchmarks.experiments import experiment as experiment_class
from benchmarks.framework.experiment import Experiment
from benchmarks.runner import Store
from benchmarks.runner.files import read_json, write_json

__all__ = ["remember", "remembered"]


def remember(experiment: Experiment, preset: str, store: Store) -> bool:
    """Write an experiment and its settings into the store's folder ``sweeps``.

    Return whether they replace other settings, whose tables and figures are then replaced as well.
    """
    sweeps = store.root / "sweeps"
    sweeps.mkdir(parents=True, exist_ok=True)
    path = sweeps / f"{preset}-{experiment.data}-{experiment.name}.json"
    sweep = {"experiment": experiment.name, "preset": preset, "settings": experiment.settings}
    try:
        former = read_json(path)
    except (FileNotFoundError, ValueError):  # none, or one that `remembered` skips
        former = None
    write_json(path, sweep)
    return former not in (None, json.loads(json.dumps(sweep)))


def remembered(
    root: Path, skipped: Callable[[Path, Exception], object]
) -> Iterator[tuple[str, Experiment]]:
    """Yield the preset and the experiment of each sweep in ``root``, in the order of ``NAMES``.

    ``skipped`` receives the path of each file that this version cannot read, and the error.
    """
    sweeps = []
    for path in (root / "sweeps").glob("*.json"):
        try:
            sweep = read_json(path)
            experiment = experiment_class(sweep["experiment"]).from_json(sweep["settings"])
            sweeps.append((NAMES.index(experiment.name), sweep["preset"], path.name, experiment))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            skipped(path, error)
    for _, preset, _, experiment in sorted(sweeps, key=lambda sweep: sweep[:3]):
        yield preset, experiment
