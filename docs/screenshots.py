"""Makes the pictures of README and ``reading-margins.md``.

``python docs/screenshots.py`` writes them into ``docs/images``: five short runs, plotted and in
TensorBoard. It takes two minutes and needs Chromium (``apt-get install chromium``). ``--folder`` keeps
the event files, ``--without-browser`` leaves TensorBoard out.
"""

import argparse
import csv
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import StabilityRegion, UpdateRule, plot

IMAGES = Path(__file__).parent / "images"
CASES = IMAGES.parents[1] / "benchmarks/results/small/digits/prediction/cases.csv"
WIDTH, HEIGHT = 1250, 1040
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Run:
    """A run's margins, and its loss over all samples after each step."""

    monitor: stableopt.StabilityMonitor
    losses: list[float]


def digits(n: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``n`` images ``(n, 64)`` and their labels, one-hot."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(images))[:n]
    x = torch.tensor(images, dtype=torch.float32)[rows] / 16
    return x, nn.functional.one_hot(torch.tensor(labels)[rows], 10).float()


def network() -> nn.Sequential:
    """Return the network of all runs, at its initialisation."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def train(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[torch.Tensor, torch.Tensor],
    batch_size: int,
    quantities: tuple[str, ...] = ("sharpness", "non_uniformity"),
    steps: int = 1500,
) -> Run:
    """Train with a monitor that writes to TensorBoard."""
    (x, y), loss_fn = data, nn.MSELoss()
    monitor = stableopt.StabilityMonitor(
        optimizer,
        model,
        loss_fn,
        data,
        every=20,
        batch_size=batch_size,
        quantities=quantities,
        sinks=[stableopt.TensorBoardSink(folder)],
    )
    if isinstance(optimizer, torch.optim.SGD):  # Adam has no preconditioner before its first step
        monitor.measure()
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(x))[:batch_size]
        optimizer.zero_grad()
        loss_fn(model(x[rows]), y[rows]).backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(loss_fn(model(x), y).item())
    monitor.close()
    print(
        f"{folder.name}: first loss {losses[0]:.1e}, highest {max(losses):.1e}, last {losses[-1]:.1e}"
    )
    return Run(monitor, losses)


def four_runs(folder: Path) -> dict[str, Run]:
    """Train below the edge, at it, above it, and with a batch that is too small."""
    torch.manual_seed(0)
    data = digits()

    def run(name: str, model: nn.Module, lr: float, batch_size: int = 100) -> Run:
        optimizer = stableopt.SGD(model.parameters(), lr=lr)
        return train(folder / name, model, optimizer, data, batch_size)

    below = run("below", network(), lr=0.3, batch_size=32)
    model = network()
    edge = run("edge", model, lr=0.8)
    settled = {name: value.clone() for name, value in model.state_dict().items()}
    escape = run("escape", model, lr=1.1)
    model.load_state_dict(settled)
    small = run("small-batch", model, lr=0.8, batch_size=2)
    return {"below": below, "edge": edge, "escape": escape, "small-batch": small}


def three_optimizers(folder: Path, four: Path) -> None:
    """Put gradient descent and SGD of the four runs into one folder with a run of Adam."""
    shutil.copytree(four / "edge", folder / "gd")
    shutil.copytree(four / "small-batch", folder / "sgd-B2")
    torch.manual_seed(0)
    data, model = digits(), network()
    quantities = ("sharpness", "preconditioned_sharpness", "non_uniformity")
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    train(folder / "adam", model, adam, data, len(data[0]), quantities)


def draw(runs: dict[str, Run]) -> None:
    """Plot each run's margins, and the small batch's path in the diagram."""
    for name, run in runs.items():
        plot.margins(run.monitor.history).savefig(IMAGES / f"margins-{name}.png")
    region = StabilityRegion(UpdateRule(lr=0.8), batch_size=2, dataset_size=100)
    history = runs["small-batch"].monitor.history
    plot.diagram(region, history).savefig(IMAGES / "margins-diagram.png")


def draw_first_picture(runs: dict[str, Run]) -> None:
    """Plot the README's first picture: a loss spike with its cause, and 240 predictions."""
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    loss = figure.add_subplot(grid[0, 0])
    sharpness = figure.add_subplot(grid[1, 0], sharex=loss)
    start = 0
    for name in ("edge", "escape"):
        run, steps = runs[name], len(runs[name].losses)
        loss.plot(range(start + 1, start + steps + 1), run.losses, color=BLUE, lw=1.2)
        x = [start + one.step for one in run.monitor.history]
        values = [one.sharpness for one in run.monitor.history]
        limits = [one.sharpness_limit for one in run.monitor.history]
        sharpness.plot(x, values, color=BLUE, lw=1.2)
        sharpness.plot(x, limits, "--", color=ORANGE, label=None if start else "limit 2/η")
        start += steps
    loss.set(
        yscale="log",
        ylabel="training loss",
        title="Why did the loss spike? The sharpness exceeded 2/η",
    )
    loss.tick_params(labelbottom=False)
    sharpness.set(xlabel="step", ylabel="sharpness")
    sharpness.legend(loc="lower right", bbox_to_anchor=(0.5, 0.0), frameon=False)
    raised = len(runs["edge"].losses)
    for axes in (loss, sharpness):
        axes.axvline(raised, color=GREY, lw=0.8, ls=":")
    where = {"xytext": (12, 0), "textcoords": "offset points", "va": "center", "color": GREY}
    peak = max(runs["escape"].losses)
    loss.annotate("η raised from 0.8 to 1.1", (raised, peak / 1.5), **where)
    above = runs["escape"].monitor.history[0].sharpness
    sharpness.annotate("too sharp for the new rate", (raised, above), **where)

    cases = figure.add_subplot(grid[:, 1])
    with CASES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sampling"] == "independent"]
    for escaped, label, marker, colour in (
        (True, "SGD escaped", "x", ORANGE),
        (False, "SGD stayed", "o", BLUE),
    ):
        chosen = [row for row in rows if bool(row["escaped_at"]) is escaped]
        offsets = (1.0 if row["seed"] == "0" else 1.06 for row in chosen)
        x = [int(row["batch_size"]) * offset for row, offset in zip(chosen, offsets, strict=True)]
        y = [float(row["lr"]) / float(row["critical_lr"]) for row in chosen]
        cases.plot(x, y, marker, color=colour, fillstyle="none", ms=5.5, label=label)
    cases.axhline(1.0, color="black", ls="--", lw=1.2, label="exact threshold")
    right = sum((row["exact"] == "True") == bool(row["escaped_at"]) for row in rows)
    cases.set_title(f"Which rates diverge? {right} of {len(rows)} runs predicted")
    cases.set_xscale("log", base=2)
    cases.set_yscale("log")
    sizes = sorted({int(row["batch_size"]) for row in rows})
    cases.set_xticks(sizes, [str(size) for size in sizes])
    cases.set(xlabel="batch size B", ylabel="learning rate / predicted threshold")
    cases.legend(frameon=False)
    for axes in (loss, sharpness, cases):
        axes.grid(alpha=0.25)
    figure.savefig(IMAGES / "first.png", dpi=110)


def photograph(logdir: Path, target: Path) -> None:
    """Save what Chromium shows of TensorBoard's Custom Scalars page for the runs in ``logdir``."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/screenshots.py: no Chromium; --without-browser makes the other pictures")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=logdir.parent,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/"
        _wait_for_runs(f"{address}data/runs", at_least=len(list(logdir.iterdir())))
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"]
        flags += ["hide-scrollbars", f"window-size={WIDTH},{HEIGHT}", "virtual-time-budget=20000"]
        subprocess.run(
            [
                browser,
                *(f"--{flag}" for flag in flags),
                f"--screenshot={target}",
                f"{address}#custom_scalars&_smoothingWeight=0",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
    finally:
        server.terminate()
        server.wait()


def _wait_for_runs(address: str, at_least: int) -> None:
    for _ in range(120):
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(address) as answer:
                if answer.read().count(b'"') >= 2 * at_least:
                    return
        except OSError:
            continue
    raise TimeoutError(f"TensorBoard did not show {at_least} runs within a minute")


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the event files here")
    parser.add_argument("--without-browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "runs"
        runs = four_runs(folder)
        draw(runs)
        draw_first_picture(runs)
        if not options.without_browser:
            photograph(folder, IMAGES / "margins-tensorboard.png")
            optimizers = Path(temporary) / "optimizers"
            three_optimizers(optimizers, folder)
            photograph(optimizers, IMAGES / "tensorboard.png")


if __name__ == "__main__":
    main()
