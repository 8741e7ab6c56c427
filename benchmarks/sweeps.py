"""`remember`, `remembered`: which experiments, with which settings, were run in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.experiment import Experiment
from benchmarks.runner import Store
from benchmarks.runner.files import read_json, write_json

__all__ = ["remember", "remembered"]


def remember(one: Experiment, preset: str, store: Store) -> None:
    """Write an experiment and its settings into ``sweeps`` of the store."""
    sweeps = store.root / "sweeps"
    sweeps.mkdir(parents=True, exist_ok=True)
    path = sweeps / f"{preset}-{one.data}-{one.name}.json"
    write_json(path, {"experiment": one.name, "preset": preset, "settings": one.settings})


def remembered(
    root: Path, skipped: Callable[[Path, Exception], object]
) -> Iterator[tuple[str, Experiment]]:
    """Yield preset and experiment of each sweep below ``root``, in the order of the experiments.

    ``skipped`` receives each file that this version cannot read, and why.
    """
    sweeps = []
    for path in (root / "sweeps").glob("*.json"):
        try:
            sweep = read_json(path)
            one = experiment(sweep["experiment"]).from_json(sweep["settings"])
            sweeps.append((NAMES.index(one.name), sweep["preset"], path.name, one))
        except (ValueError, TypeError, KeyError) as error:
            skipped(path, error)
    for _, preset, _, one in sorted(sweeps, key=lambda sweep: sweep[:3]):
        yield preset, one
