"""`Run`: a small network that trains with a flight recorder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stableopt import FlightRecorder, StabilityMonitor

__all__ = ["LOSS", "Run", "data"]

LOSS = nn.MSELoss()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 8, generator=generator)
    return x, torch.stack([x[:, :4].sum(1).sin(), x[:, 4:].sum(1).cos()], dim=1)


class Run:
    """A small network that trains on batches of 32 with a recorder."""

    def __init__(self, folder: Path, *, lr: float = 0.1, record: bool = True, **options: Any):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.x, self.y = data()
        self.monitor = StabilityMonitor(
            self.optimizer, self.model, LOSS, (self.x, self.y), every=10
        )
        self.recorder = FlightRecorder(self.monitor, folder, **options) if record else None
        self.generator = torch.Generator().manual_seed(2)
        self.steps = 0
        self.good: dict[str, Tensor] = {}

    def train(self, steps: int, *, spoil: float = 1.0) -> None:
        for _ in range(steps):
            self.steps += 1
            rows = torch.randint(128, (32,), generator=self.generator)
            loss = LOSS(self.model(self.x[rows]), self.y[rows] * spoil)
            if self.recorder is not None:
                self.recorder.loss(loss, rows)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def report(self) -> dict[str, Any]:
        assert self.recorder is not None
        (path,) = self.recorder.reports
        found: dict[str, Any] = json.loads((path / "report.json").read_text())
        return found
