"""Escape from a sharp minimum: Figures 1 and 8 of the paper.

Gradient descent trains to a minimum, where sharpness and non-uniformity are measured. For each batch
size the box (9) then says, *before* a step is taken, whether SGD at the same learning rate can stay;
SGD is run, and what it did is set beside what was said.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

import stableopt
from benchmarks import escape_report
from benchmarks.data import Images, load
from benchmarks.escape_case import Config, Prediction, Trace, predict
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import evaluate, gd_until, mean_squared_error, sgd_steps
from stableopt import StabilityMargins, UpdateRule

__all__ = ["Config", "run"]

QUANTITIES = ("sharpness", "non_uniformity")

GD_EVERY = 2048
"""Steps of GD between measurements."""


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment; write figures, logs and ``escape.json``; return what that holds."""
    console = console or Console()
    images = load(
        config.data, n=config.n, folder=config.data_dir, random_labels=config.random_labels
    )
    config.out.mkdir(parents=True, exist_ok=True)
    escape_report.announce(config, images, console)
    model, gd_history = _descend(config, images, console)

    at_minimum = gd_history[-1]
    starts = [_beside_limits(at_minimum, config.lr, size) for size in config.batch_sizes]
    predictions = [predict(start) for start in starts]
    escape_report.foretell(config, predictions, console)
    traces = [
        _switch(config, model, images, start, prediction, console)
        for start, prediction in zip(starts, predictions, strict=True)
    ]
    accuracy = images.accuracy(model)
    escape_report.compare(at_minimum, accuracy, traces, console)
    escape_report.draw(config, gd_history, traces)
    result = _result(config, at_minimum, accuracy, traces)
    (config.out / "escape.json").write_text(json.dumps(result, indent=2) + "\n")
    escape_report.point_out(config, console)
    return result


def _descend(
    config: Config, images: Images, console: Console
) -> tuple[nn.Module, list[StabilityMargins]]:
    """Train by GD; return the model, and margins of which the last are those of the end."""
    model = fully_connected(WIDTHS[config.data], config.seed)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    sink = stableopt.TensorBoardSink(config.out / "tensorboard" / "gd")
    monitor = optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=GD_EVERY,
        quantities=QUANTITIES,
        sinks=[sink],
        tol=1e-3,
    )
    first_loss = evaluate(model, images)
    with _progress(console) as progress, monitor:
        task = progress.add_task("GD", total=1.0)

        def show(step: int, loss: float) -> None:
            if step < GD_EVERY and step & (step - 1) == 0:
                monitor.measure()  # much happens early: at powers of two as well
            if step % 100:
                return
            margins = optimizer.margins
            ratio = None if margins is None else margins.sharpness_ratio
            edge = "" if ratio is None else f", a at {ratio:.0%} of 2/η"
            # The loss falls about as a power of time, so its logarithm makes an honest bar.
            share = math.log(first_loss / loss) / math.log(first_loss / config.target_loss)
            progress.update(
                task, completed=share, description=f"GD step {step:,}, loss {loss:.1e}{edge}"
            )

        gd_until(config.target_loss, model, images, optimizer, max_steps=10**6, progress=show)
        progress.update(task, completed=1.0)
        monitor.measure()
    sink.close()
    return model, list(monitor.history)


def _beside_limits(margins: StabilityMargins, lr: float, batch_size: int) -> StabilityMargins:
    """Return what was measured beside the limits of SGD with this batch size, as step 0 of it."""
    limit = UpdateRule(lr=lr).max_non_uniformity(batch_size, margins.dataset_size)
    return replace(margins, step=0, batch_size=batch_size, non_uniformity_limit=limit)


def _switch(
    config: Config,
    start_model: nn.Module,
    images: Images,
    start: StabilityMargins,
    prediction: Prediction,
    console: Console,
) -> Trace:
    """Go on from the minimum by SGD."""
    assert start.batch_size is not None
    sink = stableopt.TensorBoardSink(config.out / "tensorboard" / f"sgd-B{start.batch_size}")
    sink(0, start.record())
    model, optimizer, steps = sgd_steps(
        start_model,
        images,
        lr=config.lr,
        batch_size=start.batch_size,
        steps=config.steps,
        seed=config.seed,
    )
    monitor = optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=config.measure_every,
        quantities=QUANTITIES,
        sinks=[sink],
    )
    looked, losses = [0], [evaluate(model, images)]
    with _progress(console) as progress, monitor:
        task = progress.add_task(f"SGD, B = {start.batch_size}", total=config.steps)
        for step in steps:
            if step % 10 == 0:
                looked.append(step)
                losses.append(evaluate(model, images))
                progress.update(task, completed=step)
    sink.close()
    history = [start, *monitor.history]
    return Trace(prediction, history, looked, losses, images.accuracy(model))


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _result(
    config: Config, minimum: StabilityMargins, accuracy: float, traces: list[Trace]
) -> dict[str, Any]:
    def numbers(margins: StabilityMargins, accuracy: float) -> dict[str, float | None]:
        record = {k: v if math.isfinite(v) else None for k, v in margins.record().items()}
        return {**record, "test_accuracy": accuracy}

    settings = {**asdict(config), "batch_sizes": list(config.batch_sizes)}
    for folder in ("out", "data_dir"):
        del settings[folder]
    return {
        "config": settings,
        "torch": str(torch.__version__),
        "minimum": numbers(minimum, accuracy),
        "runs": [
            {
                "batch_size": trace.batch_size,
                "predicted": "escape" if trace.prediction.escapes else "stay",
                "why": trace.prediction.why,
                "escaped_at": trace.escaped_at,
                "right": trace.right,
                "largest_loss_ratio": max(trace.losses) / trace.losses[0],
                "end": numbers(trace.history[-1], trace.accuracy),
            }
            for trace in traces
        ],
    }
