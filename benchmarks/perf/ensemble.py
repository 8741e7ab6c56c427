"""The gain from training several runs as one network with stacked weights.

The members differ in learning rate and seed; see :mod:`benchmarks.training.ensemble`. Both ways take the
same steps; the weights after the first few are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from benchmarks.perf import timing
from benchmarks.perf.timing import interleaved, report
from benchmarks.training import ensemble
from benchmarks.training.data import Dataset, Images
from benchmarks.training.minimum import Solution
from benchmarks.training.stepping import training_run

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config(timing.Config):
    """What is timed.

    Attributes:
        members: number of runs trained as one.
        steps: steps of each, under GD and under SGD.
        batch_size: batch size of SGD.
    """

    repeats: int = 3
    members: int = 8
    steps: int = 200
    batch_size: int = 16


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time both ways under GD and SGD, print and write the table; return its rows."""
    console = console or Console()
    data = Dataset(config.data, config.n)
    images = data.load(config.data_dir).to(config.device)
    rows = []
    for batch_size in (None, config.batch_size):
        jobs = [
            Solution(data, lr=config.lr / (k + 1), seed=config.seed + k, batch_size=batch_size)
            for k in range(config.members)
        ]
        with console.status(f"{config.members} members, batches of {batch_size or config.n}"):
            rows.append(_row(config, jobs, images))

    t = pd.DataFrame(rows)
    columns = {
        **{"batch": t.batch_size, "steps": t.steps},
        "one by one, ms a step": 1e3 * t.one_by_one / t.steps,
        "as one, ms a step": 1e3 * t.as_one / t.steps,
        **{"gain": t.one_by_one / t.as_one, "difference": t.difference},
    }
    title = f"{config.members} training runs of {config.data} as one"
    return report(config, console, "ensemble", title, columns, rows)


def _row(config: Config, jobs: Sequence[Solution], images: Images) -> dict[str, Any]:
    def one_by_one(steps: int) -> list[list[torch.Tensor]]:
        weights = []
        for job in jobs:
            model = job.model(config.device)
            run = training_run(job, model, images)
            while run.steps < steps:
                run.training_loss()
                run.advance()
            weights.append([p.detach() for p in model.parameters()])
        return weights

    def as_one(steps: int) -> list[list[torch.Tensor]]:
        stack = ensemble.Stack(jobs, images, config.device)
        while stack.steps < steps:
            stack.training_losses()
            stack.advance()
        return [list(stack.weights(k).values()) for k in range(len(jobs))]

    pairs = zip(one_by_one(10), as_one(10), strict=True)
    difference = max(
        float((p - q).norm() / p.norm()) for member in pairs for p, q in zip(*member, strict=True)
    )
    timings = interleaved(
        {"one_by_one": lambda: one_by_one(config.steps), "as_one": lambda: as_one(config.steps)},
        repeats=config.repeats,
        device=config.device,
    )
    size = jobs[0].batch_size or len(images.x)
    epoch = -(-len(images.x) // size)
    return {
        "data": config.data,
        "members": len(jobs),
        "batch_size": size,
        "steps": -(-config.steps // epoch) * epoch,  # SGD takes whole epochs
        **{method: timing.median for method, timing in timings.items()},
        "difference": difference,
    }
