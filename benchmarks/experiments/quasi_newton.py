"""Quasi-Newton methods settle in sharper minima: Figure 9 of the paper, and other preconditioners.

An L-BFGS of tuned rate trains to a minimum; gradient descent and SGD, each of tuned rate too, start
there. Where the minimum is sharper than 2/η they have to leave, for one that is flatter. Beyond the
paper, Adam, Adahessian, Apollo and Shampoo train from scratch: their limit is on the *preconditioned*
sharpness, and leaves the sharpness itself free. Rates are chosen by one half of the test images, and
accuracies reported on the other.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import stableopt
from benchmarks.data import Images, load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import evaluate, mean_squared_error, reshuffled_batches

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for numbers and figures.
        seed: the first; rates are searched with it.
        seeds: how many runs of each method.
        n: training images.
        random_labels: how many of them get a random label.
        target_loss: training loss at which a run ends.
        max_steps: at which it ends in any case.
        min_steps: of GD and SGD from the minimum, so that they have time to leave.
        history: pairs that L-BFGS remembers.
        batch_size: of SGD.
        lbfgs_lrs: rates that are tried, and so on.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("runs/quasi-newton")
    seed: int = 0
    seeds: int = 5
    n: int = 1000
    random_labels: int = 150
    target_loss: float = 1e-3
    max_steps: int = 2000
    min_steps: int = 500
    history: int = 10
    batch_size: int = 16
    lbfgs_lrs: tuple[float, ...] = (0.1, 0.3, 1.0)
    gd_lrs: tuple[float, ...] = (0.3, 1.0, 2.0)
    sgd_lrs: tuple[float, ...] = (0.1, 0.3, 1.0)
    adam_lrs: tuple[float, ...] = (1e-3, 3e-3)
    adahessian_lrs: tuple[float, ...] = (0.05, 0.15)
    apollo_lrs: tuple[float, ...] = (0.1, 0.3)
    shampoo_lrs: tuple[float, ...] = (0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Solution:
    """Where one run ended."""

    method: str
    lr: float
    seed: int
    steps: int
    loss: float
    validation: float
    test: float
    sharpness: float | None
    sharpness_limit: float | None
    preconditioned_sharpness: float | None
    preconditioned_sharpness_limit: float | None


@dataclass(frozen=True)
class _Method:
    """How to make the optimizer, and what feeds it."""

    name: str
    make: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    lrs: tuple[float, ...]
    batch_size: int | None = None
    from_minimum: bool = False
    twice: bool = False


def _methods(config: Config) -> list[_Method]:
    def external(name: str, **options: Any) -> Callable[..., torch.optim.Optimizer]:
        def make(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            import torch_optimizer

            optimizer: torch.optim.Optimizer = getattr(torch_optimizer, name)(
                params, lr=lr, **options
            )
            return optimizer

        return make

    def lbfgs(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        # One iteration a step: each costs one gradient.
        return stableopt.LBFGS(params, lr=lr, max_iter=1, history_size=config.history)

    return [
        _Method("L-BFGS", lbfgs, config.lbfgs_lrs),
        _Method(
            "L-BFGS, then GD",
            lambda params, lr: stableopt.GD(params, lr=lr),
            config.gd_lrs,
            from_minimum=True,
        ),
        _Method(
            f"L-BFGS, then SGD, B = {config.batch_size}",
            lambda params, lr: stableopt.SGD(params, lr=lr),
            config.sgd_lrs,
            batch_size=config.batch_size,
            from_minimum=True,
        ),
        _Method("GD", lambda params, lr: stableopt.GD(params, lr=lr), config.gd_lrs),
        _Method("Adam", lambda params, lr: torch.optim.Adam(params, lr=lr), config.adam_lrs),
        _Method("Adahessian", external("Adahessian"), config.adahessian_lrs, twice=True),
        _Method("Apollo", external("Apollo", warmup=50), config.apollo_lrs),
        _Method("Shampoo", external("Shampoo", epsilon=1e-2, update_freq=20), config.shampoo_lrs),
    ]


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Search the rates, run the seeds, print the table, write numbers and figure; return them."""
    console = console or Console()
    images = load(
        config.data, n=config.n, folder=config.data_dir, random_labels=config.random_labels
    )
    chosen_on, reported_on = _halves(images)
    searched: list[Solution] = []
    solutions: list[Solution] = []
    minima: dict[int, nn.Module] = {}
    found: dict[str, Any] = {}
    for method in _methods(config):
        trials = []
        for lr in method.lrs:
            with console.status(f"{method.name}: trying η = {lr:g}"):
                trial, model = _trained(
                    config, method, lr, config.seed, images, chosen_on, reported_on, minima
                )
            trials.append((trial, model))
            searched.append(trial)
        best, model = max(trials, key=lambda pair: _rank(pair[0], config))
        for seed in range(config.seed, config.seed + config.seeds):
            if seed != config.seed:
                with console.status(f"{method.name}, η = {best.lr:g}: seed {seed}"):
                    best, model = _trained(
                        config, method, best.lr, seed, images, chosen_on, reported_on, minima
                    )
            solutions.append(best)
            if method.name == "L-BFGS":
                minima[seed] = model
        console.print(_table(config, [s for s in solutions if s.method == method.name]))
        found = _written(config, searched, solutions)
    console.print(_table(config, solutions))
    _draw(config, solutions, config.out / "quasi-newton.png")
    return found


def _written(config: Config, searched: list[Solution], solutions: list[Solution]) -> dict[str, Any]:
    """Write what there is by now; return it."""
    found = {
        "config": {key: str(v) if isinstance(v, Path) else v for key, v in asdict(config).items()},
        "searched": [asdict(s) for s in searched],
        "solutions": [asdict(s) for s in solutions],
    }
    config.out.mkdir(parents=True, exist_ok=True)
    partial = config.out / "quasi-newton.partial"
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, config.out / "quasi-newton.json")
    return found


def _halves(images: Images) -> tuple[Images, Images]:
    halves = (slice(0, None, 2), slice(1, None, 2))
    return tuple(  # type: ignore[return-value]
        replace(images, test_x=images.test_x[half], test_labels=images.test_labels[half])
        for half in halves
    )


def _rank(solution: Solution, config: Config) -> tuple[bool, float]:
    """Order by whether the run got there, or nearly, and then by what it is worth."""
    return solution.loss <= 10 * config.target_loss, solution.validation


def _trained(
    config: Config,
    method: _Method,
    lr: float,
    seed: int,
    images: Images,
    chosen_on: Images,
    reported_on: Images,
    minima: dict[int, nn.Module],
) -> tuple[Solution, nn.Module]:
    if method.from_minimum:
        model: nn.Module = copy.deepcopy(minima[seed])
    else:
        model = fully_connected(WIDTHS[config.data], seed)
    torch.manual_seed(seed)  # Adahessian draws from the global generator
    optimizer = method.make(model.parameters(), lr)
    least = config.min_steps if method.from_minimum else 0
    steps, lost = 0, False
    for steps, (x, y) in enumerate(_batches(method, images, seed), start=1):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mean_squared_error(model(x), y)
            torch.autograd.backward(loss, create_graph=method.twice)
            return loss

        try:
            if method.name.startswith("L-BFGS") and not method.from_minimum:
                loss = optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
        except torch.linalg.LinAlgError:  # Shampoo decomposes its statistics, good or bad
            lost = True
            break
        value = (
            evaluate(model, images)
            if method.batch_size and steps % 50 == 0
            else float(loss.detach())
        )
        if not value < math.inf or steps == config.max_steps:
            break
        # A batch's loss is not the training loss.
        known = method.batch_size is None or steps % 50 == 0
        if known and steps >= least and value <= config.target_loss:
            break
    for p in model.parameters():
        p.grad = None  # and with it the graph that double backward leaves there
    loss = math.nan if lost else evaluate(model, images)
    margins = stableopt.StabilityMargins()
    if loss < math.inf:
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            optimizer=optimizer,
            batch_size=method.batch_size,
            quantities=("sharpness",),
            max_iter=300,
        )
    solution = Solution(
        method=method.name,
        lr=lr,
        seed=seed,
        steps=steps,
        loss=loss,
        validation=chosen_on.accuracy(model),
        test=reported_on.accuracy(model),
        sharpness=margins.sharpness,
        sharpness_limit=margins.sharpness_limit,
        preconditioned_sharpness=margins.preconditioned_sharpness,
        preconditioned_sharpness_limit=margins.preconditioned_sharpness_limit,
    )
    return solution, model


def _batches(method: _Method, images: Images, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = method.batch_size
    if size is not None:
        return reshuffled_batches(images, size, torch.Generator().manual_seed(seed))
    return iter(lambda: (images.x, images.y), None)


def _spread(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None and value < math.inf]
    if not known:
        return "–"
    spread = f" ± {stdev(known):{form}}" if len(known) > 1 else ""
    return f"{mean(known):{form}}{spread}"


def _table(config: Config, solutions: list[Solution]) -> Table:
    table = Table(
        title=f"Where they settle: {config.data}, {config.random_labels} of {config.n:,} labels"
        f" random, {config.seeds} seeds"
    )
    for heading in ("method", "η", "steps", "loss", "a", "2/η", "a_P", "limit", "test"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name in dict.fromkeys(s.method for s in solutions):
        rows = [s for s in solutions if s.method == name]
        table.add_row(
            name,
            f"{rows[0].lr:g}",
            f"{mean(s.steps for s in rows):,.0f}",
            f"{mean(s.loss for s in rows):.1e}",
            _spread((s.sharpness for s in rows), ".3g"),
            _spread((s.sharpness_limit for s in rows[:1]), ".3g"),
            _spread((s.preconditioned_sharpness for s in rows), ".3g"),
            _spread((s.preconditioned_sharpness_limit for s in rows[:1]), ".3g"),
            _spread((100 * s.test for s in rows), ".2f"),
        )
    return table


def _draw(config: Config, solutions: list[Solution], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    escape, edge = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(s.method for s in solutions)):
        rows = [s for s in solutions if s.method == name and s.sharpness is not None]
        style = {"color": f"C{number}", "label": name}
        escape.plot([s.sharpness for s in rows], [100 * s.test for s in rows], "o", **style)
        ratios = [
            s.preconditioned_sharpness / s.preconditioned_sharpness_limit
            for s in rows
            if s.preconditioned_sharpness is not None and s.preconditioned_sharpness_limit
        ]
        if len(ratios) == len(rows):
            edge.plot([s.sharpness for s in rows], ratios, "o", **style)
    escape.set(xscale="log", xlabel="sharpness a", ylabel="test accuracy, %")
    escape.legend(frameon=False, fontsize=8)
    edge.axhline(1, color="black", linestyle="--", linewidth=1)
    edge.set(
        xscale="log",
        xlabel="sharpness a",
        ylabel="preconditioned sharpness / its limit",
        title="what the optimizer's own limit is on",
    )
    figure.suptitle(f"Where they settle: {config.data}, {config.random_labels} random labels")
    figure.savefig(path, dpi=150)
