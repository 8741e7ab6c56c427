"""Steering from a sharp minimum to named regions of the diagram, against baselines; and from scratch.

Gradient descent trains to a sharp minimum. From there the controller is told a region: flatter, more
uniform, both, or sharper. What it reaches is set beside a fixed learning rate and batch size, a
grid-searched schedule, a rate by curvature (CDAT) and a batch size by the noise scale. Nothing but
the regions is tuned.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from torch import nn

import stableopt
from benchmarks import steering_methods as methods
from benchmarks import steering_report as report
from benchmarks.data import Images, load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.steering_case import REGIONS, Config, Outcome
from benchmarks.training import evaluate, gd_until, mean_squared_error
from stableopt import StabilityMargins

__all__ = ["Config", "run"]


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run the experiment; write figures and ``steering.json``; return what that holds."""
    console = console or Console()
    images = load(
        config.data, n=config.n, folder=config.data_dir, random_labels=config.random_labels
    )
    config.out.mkdir(parents=True, exist_ok=True)
    report.announce(config, console)
    rows: list[dict[str, Any]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        with console.status(f"seed {seed}"):
            rows += _seed(config, images, seed)
        console.print(f"seed {seed}: done")
    result = {"config": _settings(config), "summary": report.summary(rows), "runs": rows}
    (config.out / "steering.json").write_text(json.dumps(result, indent=2) + "\n")
    report.compare(rows, console)
    report.point_out(config, console)
    return result


def _seed(config: Config, images: Images, seed: int) -> list[dict[str, Any]]:
    """Return the numbers of one seed: from its file, if an earlier run left one, else by running."""
    path = config.out / f"seed-{seed}.json"
    settings = _settings(config)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["config"] == settings:
            return list(kept["runs"])
    outcomes = [*_from_minimum(config, images, seed), *_from_scratch(config, images, seed)]
    if seed == config.seed:
        report.draw(config, outcomes)
    rows = [outcome.numbers() for outcome in outcomes]
    path.write_text(json.dumps({"config": settings, "runs": rows}, indent=2) + "\n")
    return rows


def _settings(config: Config) -> dict[str, Any]:
    """Return what a seed's numbers depend on, as JSON gives it back."""
    elsewhere = ("out", "data_dir", "seed", "seeds")
    values = {name: value for name, value in vars(config).items() if name not in elsewhere}
    return dict(json.loads(json.dumps(values)))


def _from_minimum(config: Config, images: Images, seed: int) -> list[Outcome]:
    model, minimum, initial_loss = _minimum(config, images, seed)
    at_start = minimum.end
    return [
        minimum,
        *(methods.steered(model, images, config, region, seed, initial_loss) for region in REGIONS),
        methods.fixed(model, images, config, seed),
        *methods.grid_searched(model, images, config, seed, at_start),
        methods.curvature_aware(model, images, config, seed),
        methods.noise_scaled(model, images, config, seed),
    ]


def _minimum(config: Config, images: Images, seed: int) -> tuple[nn.Module, Outcome, float]:
    """Return gradient descent's minimum, what is measured there, and the loss it began with."""
    model = fully_connected(WIDTHS[config.data], seed)
    initial_loss = evaluate(model, images)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    steps = gd_until(config.start_loss, model, images, optimizer, max_steps=10**6)
    margins: StabilityMargins = stableopt.measure(
        model, mean_squared_error, (images.x, images.y), optimizer=optimizer, tol=1e-3
    )
    outcome = Outcome(
        "GD", "the minimum", seed, steps, 0, margins, images.accuracy(model), initial_loss
    )
    return model, outcome, initial_loss


def _from_scratch(config: Config, images: Images, seed: int) -> list[Outcome]:
    if not config.scratch_steps:
        return []

    def fresh() -> nn.Module:
        return fully_connected(WIDTHS[config.data], seed)

    return [
        methods.scratch_steered(fresh(), images, config, seed),
        *(methods.scratch_constant(fresh(), images, config, seed, lr) for lr in config.scratch_lrs),
    ]
