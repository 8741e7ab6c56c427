"""Makes the pictures of ``reading-margins.md``: four short runs, plotted, and in TensorBoard.

``python docs/screenshots.py`` writes them into ``docs/images``. It takes a minute and needs Chromium
(``apt-get install chromium``); ``--folder`` keeps the event files, ``--without-browser`` does without.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import StabilityRegion, UpdateRule, plot

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1250, 1040


def digits(n: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``n`` images ``(n, 64)`` and their labels, one-hot."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(images))[:n]
    x = torch.tensor(images, dtype=torch.float32)[rows] / 16
    return x, nn.functional.one_hot(torch.tensor(labels)[rows], 10).float()


def four_runs(folder: Path) -> dict[str, stableopt.StabilityMonitor]:
    """Train below the edge, at it, beyond it, and with a batch that is too small."""
    torch.manual_seed(0)
    x, y = digits()
    loss_fn = nn.MSELoss()

    def network() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def run(
        name: str, model: nn.Module, lr: float, batch_size: int, steps: int = 1500
    ) -> stableopt.StabilityMonitor:
        opt = stableopt.SGD(model.parameters(), lr=lr)
        monitor = opt.track(
            model,
            loss_fn,
            (x, y),
            every=20,
            batch_size=batch_size,
            quantities=("sharpness", "non_uniformity"),
            sinks=[stableopt.TensorBoardSink(folder / name)],
        )
        monitor.measure()
        losses = []
        for _ in range(steps):
            rows = torch.randperm(len(x))[:batch_size]
            opt.zero_grad()
            loss_fn(model(x[rows]), y[rows]).backward()
            opt.step()
            with torch.no_grad():
                losses.append(loss_fn(model(x), y).item())
        monitor.close()
        print(
            f"{name}: loss {losses[0]:.1e}, at most {max(losses):.1e}, {losses[-1]:.1e} at the end"
        )
        return monitor

    below = run("below", network(), lr=0.3, batch_size=32)
    model = network()
    edge = run("edge", model, lr=0.8, batch_size=len(x))
    settled = {name: value.clone() for name, value in model.state_dict().items()}
    escape = run("escape", model, lr=1.1, batch_size=len(x))
    model.load_state_dict(settled)
    small = run("small-batch", model, lr=0.8, batch_size=2)
    return {"below": below, "edge": edge, "escape": escape, "small-batch": small}


def draw(runs: dict[str, stableopt.StabilityMonitor]) -> None:
    """Plot each run's margins, and the small batch's way in the diagram."""
    for name, monitor in runs.items():
        plot.margins(monitor.history).savefig(IMAGES / f"margins-{name}.png")
    region = StabilityRegion(UpdateRule(lr=0.8), batch_size=2, dataset_size=100)
    plot.diagram(region, runs["small-batch"].history).savefig(IMAGES / "margins-diagram.png")


def photograph(logdir: Path, page: str, target: Path) -> None:
    """Open a page of TensorBoard in Chromium and keep what it shows."""
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
        _wait_for_runs(f"{address}data/runs", at_least=4)
        flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"]
        flags += ["hide-scrollbars", f"window-size={WIDTH},{HEIGHT}", "virtual-time-budget=20000"]
        subprocess.run(
            [
                browser,
                *(f"--{flag}" for flag in flags),
                f"--screenshot={target}",
                f"{address}#{page}&_smoothingWeight=0",
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
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the event files go, and stay")
    parser.add_argument("--without-browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "runs"
        draw(four_runs(folder))
        if not options.without_browser:
            photograph(folder, "custom_scalars", IMAGES / "margins-tensorboard.png")


if __name__ == "__main__":
    main()
