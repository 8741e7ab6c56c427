"""Control laws that fail, beside the one that works: why the learning rate follows the target.

From one point of gradient descent, on its way to a minimum, each law is given the same target for the
same number of steps. What fails does so in its own way: the sharpness runs away, the rate vanishes,
the escape is cancelled, or training diverges.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import stableopt
from benchmarks.data import Images, load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import evaluate, gd_until, mean_squared_error
from stableopt import StabilityLR, StabilityMargins, TargetRegion
from stableopt.adapt import Decision, Law, Measured, State, gated_staircase

__all__ = ["LAWS", "Config", "run"]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for numbers and figure.
        seed: of the initialisation.
        n: training images.
        lr: learning rate at the start.
        start_loss: training loss at which the laws take over.
        flatter: how many times flatter the target is than the start.
        steps: of each law.
        measure_every: steps between measurements.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("runs/control-laws")
    seed: int = 0
    n: int = 200
    lr: float = 0.5
    start_loss: float = 2e-3
    flatter: float = 4.0
    steps: int = 1500
    measure_every: int = 10


def follow(measured: Measured, state: State, *, share: float) -> tuple[Decision, State]:
    """Set the rate at which the measured sharpness is ``share`` of its limit."""
    if measured.margins.sharpness is None:
        return measured.decide("hold", measured.lr, "not measured"), state
    lr = 2 * share / measured.margins.sharpness
    return measured.decide("raise" if lr > measured.lr else "lower", lr, "measured"), state


def cut_while_sharp(measured: Measured, state: State) -> tuple[Decision, State]:
    """Lower the rate by 10 % as long as the sharpness is above the target."""
    a, high = measured.margins.sharpness, measured.target.sharpness[1]
    if a is None or high is None or a <= high:
        return measured.decide("keep", measured.lr, "flat enough, or not measured"), state
    return measured.decide("lower", 0.9 * measured.lr, "too sharp"), state


def cut_on_a_rise(measured: Measured, state: State) -> tuple[Decision, State]:
    """Climb as the staircase does, and go back to the first rate whenever the loss has doubled."""
    loss = measured.margins.loss
    best = min(state.get("best", math.inf), math.inf if loss is None else loss)
    first = state.get("first", measured.lr)
    if loss is not None and loss > 2 * best:
        return measured.decide("cut", first, "the loss rose"), {**state, "first": first}
    decision, after = gated_staircase(measured, state)
    return decision, {**after, "best": best, "first": first}


def jump(measured: Measured, state: State) -> tuple[Decision, State]:
    """Take the target's rate at once."""
    return measured.decide("raise", measured.target.lr_for(measured.rule), "at once"), state


LAWS: Mapping[str, Law] = {
    "0.8 of the measured limit": partial(follow, share=0.8),
    "1.05 of the measured limit": partial(follow, share=1.05),
    "cut while too sharp": cut_while_sharp,
    "cut when the loss rises": cut_on_a_rise,
    "jump": jump,
    "gated staircase": gated_staircase,
}


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run every law; write ``control-laws.json`` and a figure; return what the file holds."""
    console = console or Console()
    images = load(config.data, n=config.n, folder=config.data_dir)
    model = fully_connected(WIDTHS[config.data], config.seed)
    initial_loss = evaluate(model, images)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    gd_until(config.start_loss, model, images, optimizer, max_steps=10**6)
    histories = {name: _run(config, model, images, law, initial_loss) for name, law in LAWS.items()}
    start = histories["gated staircase"][0]
    assert start.sharpness is not None
    aim = start.sharpness / config.flatter
    table = Table(title=f"From a = {start.sharpness:.2f} to {aim:.2f}, {config.steps:,} steps")
    for heading in ("law", "a", "η", "2/η", "loss", "largest loss"):
        table.add_column(heading, justify="left" if heading == "law" else "right")
    rows = {}
    for name, history in histories.items():
        good = [m for m in history if m.failure is None]
        end = good[-1]
        largest = math.inf if len(good) < len(history) else max(m.loss or 0.0 for m in good)
        diverged = len(good) < len(history)
        rows[name] = {
            "sharpness": end.sharpness,
            "lr": end.lr,
            "loss": end.loss,
            "largest_loss": largest if math.isfinite(largest) else None,
            "diverged_at": next((m.step for m in history if m.failure is not None), None),
        }
        cells = (end.sharpness, end.lr, end.sharpness_limit, end.loss, largest)
        shown = ["diverged"] if diverged else [f"{value:.3g}" for value in cells]
        table.add_row(name, *shown)
    console.print(table)
    result = {"start": start.sharpness, "target": aim, "laws": rows}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "control-laws.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(config, histories, aim)
    return result


def _run(
    config: Config, start: nn.Module, images: Images, law: Law, loss_cap: float
) -> list[StabilityMargins]:
    model = copy.deepcopy(start)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    with (
        warnings.catch_warnings(),
        optimizer.track(
            model, mean_squared_error, (images.x, images.y), every=config.measure_every
        ) as monitor,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # those that diverge, do
        monitor.measure()
        scheduler = StabilityLR(
            optimizer,
            monitor,
            TargetRegion.flatter(by=config.flatter),
            law=law,
            loss_cap=loss_cap,
        )
        for _ in range(config.steps):
            optimizer.zero_grad()
            mean_squared_error(model(images.x), images.y).backward()
            optimizer.step()
            scheduler.step()
            if monitor.margins is not None and monitor.margins.failure is not None:
                break
    return list(monitor.history)


def _draw(config: Config, histories: Mapping[str, list[StabilityMargins]], aim: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    sharpness, rate = figure.subplots(1, 2)
    for name, history in histories.items():
        # What diverges soon leaves the panels, and its loss all measure.
        good = [m for m in history if m.failure is None and (m.loss or 0.0) < 1.0]
        steps = [m.step for m in good]
        width = 2.4 if name == "gated staircase" else 1.2
        sharpness.plot(steps, [m.sharpness for m in good], label=name, linewidth=width)
        rate.plot(steps, [m.lr for m in good], label=name, linewidth=width)
        if len(good) < len(history):
            sharpness.plot(steps[-1], good[-1].sharpness, "kx")
    sharpness.axhline(aim, color="black", linestyle=":", label="target")
    sharpness.set(yscale="log", ylabel="sharpness", xlabel="step")
    rate.set(yscale="log", ylabel="learning rate", xlabel="step")
    rate.legend(fontsize="small")
    for axes in (sharpness, rate):
        axes.grid(alpha=0.25)
    figure.savefig(config.out / "control-laws.png", dpi=120)
