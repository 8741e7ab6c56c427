"""`missing`: unfinished experiments, ordered by value; `Rates`: estimates of their run times."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.experiments import NAMES
from benchmarks.experiments import experiment as experiment_class
from benchmarks.framework.experiment import PRESETS, Experiment
from benchmarks.runner import Store, in_order
from benchmarks.runner.estimate import estimate

__all__ = ["BEYOND", "Part", "Rates", "missing", "seconds_of"]

BEYOND = "Beyond the paper"
"""``shows`` of an experiment that reproduces no table or figure of the paper."""


class Part(NamedTuple):
    """An experiment on a data set, the number of its remaining jobs, and their time in seconds."""

    experiment: Experiment
    jobs: int
    seconds: float


def missing(preset: str, store: Store, results: Path, workers: int = 1) -> list[Part]:
    """Return the experiments with jobs left, in the order in which they are worth running.

    Unpublished experiments come first, since each adds a line to the report. Among these, the
    paper's own tables and figures precede the others. Ties go to the shortest run time.

    Args:
        preset: one of :data:`~benchmarks.framework.experiment.PRESETS`.
        store: the results so far.
        results: the folder of published results.
        workers: number of parallel jobs.
    """
    parts = []
    for name in NAMES:
        kind = experiment_class(name)
        for data in kind.datasets:
            experiment = kind.preset(preset, data)
            jobs = in_order(experiment.jobs())
            remaining = sum(not store.done(job) for job in jobs)
            if remaining:
                parts.append(Part(experiment, remaining, estimate(jobs, store, workers)))

    def rank(part: Part) -> tuple[bool, bool, float]:
        experiment = part.experiment
        published = (results / preset / experiment.data / experiment.name / "about.json").exists()
        return published, experiment.shows == BEYOND, part.seconds

    return sorted(parts, key=rank)


class Rates:
    """Seconds per floating-point operation in the published runs, to estimate other run times.

    Args:
        results: the folder of published results.
    """

    def __init__(self, results: Path) -> None:
        self._rates: dict[tuple[str, str], float] = {}
        for preset in PRESETS[1:]:
            for name in NAMES:
                for data in experiment_class(name).datasets:
                    file = results / preset / data / name / "about.json"
                    if not file.exists():
                        continue
                    about, flops = json.loads(file.read_text()), _flops(name, preset, data)
                    if about["done"] and flops:
                        share_done = about["done"] / about["jobs"]
                        self._rates[name, data] = about["seconds"] / (share_done * flops)

    def seconds(self, name: str, preset: str, data: str) -> float | None:
        """Return an experiment's estimated seconds on one worker, or ``None`` if nothing is published.

        The rate is its own on these data, or else the median over experiments on the same data, or
        else the median over all.
        """
        on_same_data = [rate for (_, other_data), rate in self._rates.items() if other_data == data]
        rates = on_same_data or list(self._rates.values())
        if not rates:
            return None
        return self._rates.get((name, data), median(rates)) * _flops(name, preset, data)


def _flops(name: str, preset: str, data: str) -> float:
    jobs = in_order(experiment_class(name).preset(preset, data).jobs())
    return float(sum(job.flops for job in jobs))


def seconds_of(text: str) -> float:
    """Return the seconds in a time such as ``"90s"``, ``"20m"`` or ``"3h"``.

    Raises:
        ValueError: for text in any other form.

    >>> seconds_of("1.5h")
    5400.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise ValueError(f"{text!r}: expected a number of seconds, minutes or hours, as in 20m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
