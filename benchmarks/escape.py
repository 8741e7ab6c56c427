"""Escape from a sharp minimum: Figures 1 and 8 of the paper.

Gradient descent trains to a minimum, where sharpness and non-uniformity are measured. For each batch
size the box (9) then says, *before* a step is taken, whether SGD at the same learning rate can stay;
SGD is run, and what it did is set beside what was said.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import stableopt
from benchmarks.data import Images, load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import evaluate, gd_until, mean_squared_error, sgd_steps
from stableopt import StabilityMargins, StabilityRegion, UpdateRule

__all__ = ["Config", "run"]

LR = {"digits": 0.5, "fashion-mnist": 0.5}

QUANTITIES = ("sharpness", "non_uniformity")

ESCAPED = 10.0
"""The training loss rises by this factor when SGD leaves: noise around a stable minimum makes it
rise two- to fourfold, an escape thirtyfold and more."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for logs and figures.
        seed: of the initialisation and the batches.
        n: training images.
        lr: learning rate of GD and SGD; 0 for the data set's own.
        target_loss: training loss at which GD stops.
        batch_sizes: of the SGD runs.
        steps: of each SGD run.
        measure_every: SGD steps between measurements.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("runs/escape")
    seed: int = 0
    n: int = 1000
    lr: float = 0.0
    target_loss: float = 3e-4
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    steps: int = 1000
    measure_every: int = 100


@dataclass(frozen=True)
class Prediction:
    """What the box says of one batch size, from margins measured at the minimum."""

    batch_size: int
    escapes: bool
    why: str


@dataclass
class Trace:
    """One SGD run: the largest loss, when it had risen tenfold, and the margins along the way."""

    prediction: Prediction
    start: StabilityMargins
    steps: list[int]
    losses: list[float]
    history: list[StabilityMargins]
    accuracy: float
    escaped_at: int | None

    @property
    def final(self) -> StabilityMargins:
        return self.history[-1]

    @property
    def right(self) -> bool:
        return self.prediction.escapes == (self.escaped_at is not None)


def predict(margins: StabilityMargins) -> Prediction:
    """Say from measured margins whether SGD will leave: the box (9)."""
    assert margins.batch_size is not None
    a, a_max = margins.sharpness, margins.sharpness_limit
    s, s_max = margins.non_uniformity, margins.non_uniformity_limit
    if margins.stable is None or a is None or s is None or a_max is None or s_max is None:
        raise ValueError(f"margins were not measured: {margins.failure}")
    if margins.stable:
        why = f"a = {a:.2f} ≤ {a_max:.2f} and s = {s:.2f} ≤ {s_max:.2f}: stable, will stay"
    elif a > a_max:
        why = f"a = {a:.2f} > 2/η = {a_max:.2f}: unstable, will escape"
    else:
        why = f"s = {s:.2f} > √B/η = {s_max:.2f}: unstable, will escape"
    return Prediction(margins.batch_size, not margins.stable, why)


def run(config: Config, console: Console | None = None) -> dict[str, object]:
    """Run the experiment; write figures, logs and ``escape.json``; return what that holds."""
    console = console or Console()
    images = load(config.data, n=config.n, folder=config.data_dir)
    lr = config.lr or LR[config.data]
    config.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]Escape from a sharp minimum[/bold]: {config.data}, {len(images.x):,} training images,"
        f" η = {lr:g}"
    )
    model, gd_history = _descend(config, images, lr, console)
    at_minimum = {
        size: stableopt.measure(
            model, mean_squared_error, (images.x, images.y), lr=lr, batch_size=size
        )
        for size in config.batch_sizes[:1]
    }
    first = at_minimum[config.batch_sizes[0]]
    starts = [_for_batch_size(first, lr, size) for size in config.batch_sizes]
    predictions = [predict(start) for start in starts]
    console.print("\n[bold]Predicted[/bold], before any step of SGD:")
    for prediction in predictions:
        console.print(f"  B = {prediction.batch_size:<4} {prediction.why}")
    console.print()

    traces = []
    for start, prediction in zip(starts, predictions, strict=True):
        traces.append(_switch(config, model, images, lr, start, prediction, console))
    console.print(_table(first, images.accuracy(model), lr, traces))
    for trace in traces:
        said = "escape" if trace.prediction.escapes else "stay"
        done = (
            f"escaped (loss × {ESCAPED:g} by step {trace.escaped_at})"
            if trace.escaped_at
            else f"stayed (loss at most × {max(trace.losses) / trace.losses[0]:.1f})"
        )
        mark = "[green]✓[/green]" if trace.right else "[red]✗[/red]"
        console.print(f"  {mark} B = {trace.prediction.batch_size:<4} predicted to {said}: {done}")

    _draw(config, lr, gd_history, traces)
    result = _result(config, lr, first, images.accuracy(model), traces)
    path = config.out / "escape.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(
        f"\nFigures: {config.out / 'escape.png'}, {config.out / 'diagram.png'}; numbers: {path}\n"
        f"TensorBoard: tensorboard --logdir {config.out / 'tensorboard'}\n"
        f"  then {stableopt.TensorBoardSink.link}"
    )
    return result


def _descend(
    config: Config, images: Images, lr: float, console: Console
) -> tuple[nn.Module, list[StabilityMargins]]:
    model = fully_connected(WIDTHS[config.data], config.seed)
    optimizer = stableopt.GD(model.parameters(), lr=lr)
    sink = stableopt.TensorBoardSink(config.out / "tensorboard" / "gd")
    monitor = optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        max_overhead=0.2,
        quantities=QUANTITIES,
        sinks=[sink],
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, monitor:
        task = progress.add_task("GD", total=1.0)
        first_loss = evaluate(model, images)

        def show(step: int, loss: float) -> None:
            if step % 100:
                return
            margins = optimizer.margins
            ratio = "" if margins is None else f", sharpness at {margins.sharpness_ratio:.0%} of 2/η"
            progress.update(
                task,
                # The loss falls about as a power of time: the logarithm's share is an honest bar.
                completed=_log_share(first_loss, loss, config.target_loss),
                description=f"GD  step {step:,}, loss {loss:.2e}{ratio}",
            )

        gd_until(
            config.target_loss, model, images, optimizer, max_steps=1_000_000, progress=show
        )
        progress.update(task, completed=1.0)
    monitor.measure()
    sink.close()
    return model, list(monitor.history)


def _log_share(start: float, now: float, end: float) -> float:
    begin, here, goal = torch.tensor([start, now, end], dtype=torch.float64).log().tolist()
    return min(1.0, max(0.0, (begin - here) / (begin - goal))) if begin != goal else 1.0


def _for_batch_size(margins: StabilityMargins, lr: float, batch_size: int) -> StabilityMargins:
    """Return the same measurement beside the limits of another batch size."""
    from dataclasses import replace

    region = StabilityRegion(UpdateRule(lr=lr), batch_size, margins.dataset_size)
    return replace(
        margins, batch_size=batch_size, non_uniformity_limit=region.max_non_uniformity
    )


def _switch(
    config: Config,
    start_model: nn.Module,
    images: Images,
    lr: float,
    start: StabilityMargins,
    prediction: Prediction,
    console: Console,
) -> Trace:
    size = prediction.batch_size
    sink = stableopt.TensorBoardSink(config.out / "tensorboard" / f"sgd-B{size}")
    monitors: list[stableopt.StabilityMonitor] = []

    def track(optimizer: stableopt.SGD, model: nn.Module) -> None:
        monitor = optimizer.track(
            model,
            mean_squared_error,
            (images.x, images.y),
            every=config.measure_every,
            quantities=QUANTITIES,
            sinks=[sink],
        )
        monitors.append(monitor)

    sink(0, start.record())
    steps, losses = [0], [evaluate(start_model, images)]
    escaped_at = None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    model = start_model
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"SGD B = {size}", total=config.steps)
        run = sgd_steps(
            start_model,
            images,
            lr=lr,
            batch_size=size,
            steps=config.steps,
            seed=config.seed,
            before=track,
        )
        for step, model in run:
            if step % 10 == 0:
                steps.append(step)
                losses.append(evaluate(model, images))
                if escaped_at is None and not losses[-1] < ESCAPED * losses[0]:
                    escaped_at = step
                progress.update(task, completed=step)
    (monitor,) = monitors
    monitor.close()
    sink.close()
    history = [start, *monitor.history]
    return Trace(prediction, start, steps, losses, history, images.accuracy(model), escaped_at)


def _table(
    start: StabilityMargins, accuracy: float, lr: float, traces: list[Trace]
) -> Table:
    table = Table(title="Before and after")
    for heading in ("", "loss", "test accuracy", "sharpness a", "2/η", "a / limit"):
        table.add_column(heading, justify="right")
    for heading in ("non-uniformity s", "√B/η (finite n)", "s / limit"):
        table.add_column(heading, justify="right")

    def row(name: str, margins: StabilityMargins, accuracy: float, limited: bool = True) -> None:
        def number(value: float | None, form: str) -> str:
            return "–" if value is None else format(value, form)

        table.add_row(
            name,
            number(margins.loss, ".2e"),
            f"{accuracy:.2%}",
            number(margins.sharpness, ".2f"),
            number(margins.sharpness_limit, ".2f"),
            number(margins.sharpness_ratio, ".2f"),
            number(margins.non_uniformity, ".2f"),
            number(margins.non_uniformity_limit if limited else None, ".2f"),
            number(margins.non_uniformity_ratio if limited else None, ".2f"),
        )

    row("GD minimum", start, accuracy, limited=False)
    for trace in traces:
        row(f"SGD B = {trace.prediction.batch_size}", trace.final, trace.accuracy)
    return table


def _result(
    config: Config,
    lr: float,
    start: StabilityMargins,
    accuracy: float,
    traces: list[Trace],
) -> dict[str, object]:
    return {
        "config": {**asdict(config), "lr": lr, "out": str(config.out), "data_dir": None},
        "torch": str(torch.__version__),
        "minimum": {**start.record(), "test_accuracy": accuracy},
        "runs": [
            {
                "batch_size": t.prediction.batch_size,
                "predicted": "escape" if t.prediction.escapes else "stay",
                "why": t.prediction.why,
                "observed": "escape" if t.escaped_at else "stay",
                "escaped_at": t.escaped_at,
                "right": t.right,
                "largest_loss_ratio": max(t.losses) / t.losses[0],
                "end": {**t.final.record(), "test_accuracy": t.accuracy},
            }
            for t in traces
        ],
    }


def _draw(
    config: Config, lr: float, gd_history: list[StabilityMargins], traces: list[Trace]
) -> None:
    from matplotlib.figure import Figure

    from stableopt import plot

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    names = ("training loss", "sharpness λmax(H)", "non-uniformity λmax(Σ)^½")
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="SGD step", title=name)
    panels[0].set_yscale("log")
    for trace, colour in zip(traces, ("#d55e00", "#0072b2", "#009e73", "#cc79a7") * 9, strict=False):
        label = f"B = {trace.prediction.batch_size}"
        panels[0].plot(trace.steps, trace.losses, color=colour, label=label)
        at = [margins.step for margins in trace.history]
        panels[1].plot(at, [m.sharpness for m in trace.history], "o-", ms=3, color=colour)
        panels[2].plot(at, [m.non_uniformity for m in trace.history], "o-", ms=3, color=colour)
        limit = trace.start.non_uniformity_limit
        if limit is not None and limit < float("inf"):
            panels[2].axhline(limit, color=colour, ls="--", lw=1)
    panels[1].axhline(2 / lr, color="black", ls="--", lw=1, label="2/η")
    panels[0].legend(frameon=False)
    panels[1].legend(frameon=False)
    panels[2].plot([], [], "k--", lw=1, label="√B/η (finite n)")
    panels[2].legend(frameon=False)
    figure.savefig(config.out / "escape.png", dpi=150)

    escaping = next((t for t in traces if t.prediction.escapes and t.prediction.batch_size > 1), traces[0])
    region = StabilityRegion(UpdateRule(lr=lr), escaping.prediction.batch_size, len(traces) and config.n)
    points = [(m.sharpness, m.non_uniformity) for m in [*gd_history, *escaping.history]]
    plot.diagram(region, points).savefig(config.out / "diagram.png", dpi=150)
