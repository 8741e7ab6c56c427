"""`missing` and `Rates`: the experiments that have jobs left, in order of value, and their time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.experiment import PRESETS, Experiment
from benchmarks.runner import Store, in_order
from benchmarks.runner.estimate import estimate

__all__ = ["BEYOND", "Part", "Rates", "missing", "seconds_of"]

BEYOND = "Beyond the paper"
"""What an experiment shows that is not the paper's."""


class Part(NamedTuple):
    """An experiment on a data set, the number of its jobs that are left, and their time in seconds."""

    experiment: Experiment
    jobs: int
    seconds: float


def missing(preset: str, store: Store, results: Path, workers: int = 1) -> list[Part]:
    """Return what is not done, in the order in which it is worth running.

    What is not published comes first, so that the report gains a line; of this the paper's own
    tables and figures; then the quickest, so that a limited time yields the most.

    Args:
        preset: of :data:`~benchmarks.framework.experiment.PRESETS`.
        store: where results are.
        results: the folder of published results.
        workers: jobs at a time.
    """
    parts = []
    for name in NAMES:
        kind = experiment(name)
        for data in kind.datasets:
            one = kind.preset(preset, data)
            jobs = in_order(one.jobs())
            left = sum(not store.done(job) for job in jobs)
            if left:
                parts.append(Part(one, left, estimate(jobs, store, workers)))

    def rank(part: Part) -> tuple[bool, bool, float]:
        one = part.experiment
        published = (results / preset / one.data / one.name / "about.json").exists()
        return published, one.shows == BEYOND, part.seconds

    return sorted(parts, key=rank)


class Rates:
    """Seconds a floating-point operation of the published runs, to tell how long others will take.

    Args:
        results: the folder of published results.
    """

    def __init__(self, results: Path) -> None:
        self._known: dict[tuple[str, str], float] = {}
        for preset in PRESETS[1:]:
            for name in NAMES:
                for data in experiment(name).datasets:
                    file = results / preset / data / name / "about.json"
                    flops = _flops(name, preset, data) if file.exists() else 0.0
                    about = json.loads(file.read_text()) if flops else {"done": 0}
                    if about["done"]:
                        done = about["done"] / about["jobs"]
                        self._known[name, data] = about["seconds"] / (done * flops)

    def seconds(self, name: str, preset: str, data: str) -> float | None:
        """Return roughly how many seconds of one worker an experiment takes, or ``None`` if unknown.

        By its own rate on these data, else the median of others on the same data, else of all.
        """
        same = [rate for (_, other), rate in self._known.items() if other == data]
        rates = same or list(self._known.values())
        if not rates:
            return None
        return self._known.get((name, data), median(rates)) * _flops(name, preset, data)


def _flops(name: str, preset: str, data: str) -> float:
    jobs = in_order(experiment(name).preset(preset, data).jobs())
    return float(sum(job.flops for job in jobs))


def seconds_of(text: str) -> float:
    """Return the seconds in a time such as ``"90s"``, ``"20m"`` or ``"3h"``.

    Raises:
        ValueError: for another text.

    >>> seconds_of("1.5h")
    5400.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise ValueError(f"{text!r}: expected a number of seconds, minutes or hours, as in 20m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
