"""Sharpness of the minima that gradient descent finds: Table 2 of the paper.

GD can only settle where a ≤ 2/η, and progressive sharpening brings it there: the table's numbers
are close to 2/η, below it where η is small.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import stableopt
from benchmarks.data import load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import DivergedError, gd_until, mean_squared_error

__all__ = ["Config", "run"]

PRINTED = {
    "fashion-mnist": {0.01: 53.5, 0.05: 39.3, 0.1: 19.6, 0.5: 3.9, 1.0: 1.9, 5.0: 0.4},
}
"""The paper's Table 2, FashionMNIST, FNN, n = 1,000."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for the numbers.
        seed: of the initialisation.
        n: training images.
        lrs: learning rates.
        target_loss: training loss at which GD stops.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("runs/gd-sharpness")
    seed: int = 0
    n: int = 1000
    lrs: tuple[float, ...] = (1.0, 5.0)
    target_loss: float = 1e-4


def run(config: Config, console: Console | None = None) -> list[dict[str, float | None]]:
    """Run the experiment, print its table, write ``gd-sharpness.json``; return its rows."""
    console = console or Console()
    images = load(config.data, n=config.n, folder=config.data_dir)
    rows: list[dict[str, float | None]] = []
    for lr in config.lrs:
        model = fully_connected(WIDTHS[config.data], config.seed)
        optimizer = stableopt.GD(model.parameters(), lr=lr)
        began = time.perf_counter()
        with console.status(f"GD at η = {lr:g} to loss {config.target_loss:g}") as status:

            def show(step: int, loss: float, lr: float = lr, status: object = status) -> None:
                if step % 100 == 0:
                    status.update(f"GD at η = {lr:g}: step {step:,}, loss {loss:.2e}")

            try:
                steps = gd_until(
                    config.target_loss, model, images, optimizer, max_steps=10**6, progress=show
                )
            except DivergedError as error:
                console.print(f"η = {lr:g}: {error}")
                continue
        seconds = time.perf_counter() - began
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            optimizer=optimizer,
            quantities=("sharpness",),
            tol=1e-4,
        )
        rows.append(
            {
                "lr": lr,
                "steps": steps,
                "seconds": seconds,
                "sharpness": margins.sharpness,
                "residual": margins.measurements["sharpness"].residual,
                "limit": margins.sharpness_limit,
                "printed": PRINTED.get(config.data, {}).get(lr),
                "test_accuracy": images.accuracy(model),
            }
        )
        console.print(_table(config.data, rows[-1:]))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "gd-sharpness.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _table(data: str, rows: list[dict[str, float | None]]) -> Table:
    table = Table(title=f"Sharpness of GD's minima: {data}")
    for heading in ("η", "steps", "seconds", "sharpness", "2/η", "printed", "difference", "test"):
        table.add_column(heading, justify="right")
    for row in rows:
        a, printed = row["sharpness"], row["printed"]
        table.add_row(
            f"{row['lr']:g}",
            f"{row['steps']:,}",
            f"{row['seconds']:.0f}",
            f"{a:.4f}",
            f"{row['limit']:.4f}",
            "–" if printed is None else f"{printed:g}",
            "–" if printed is None or a is None else f"{a / printed - 1:+.1%}",
            f"{row['test_accuracy']:.2%}",
        )
    return table
