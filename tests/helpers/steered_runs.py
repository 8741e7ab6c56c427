"""`Run`: a small network that trains with a monitor, for the learning-rate scheduler to steer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import stableopt
from stableopt import TargetRegion

__all__ = ["FLAT", "MSE", "Run", "X", "Y", "network"]

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(16, 2, generator=GENERATOR)
Y = X.sum(1, keepdim=True).sin()
MSE = nn.MSELoss()
FLAT = TargetRegion(sharpness=(0, 0.5))  # a rate of 4; runs start at 0.05


def network(seed: int = 0) -> nn.Sequential:
    """Return a small network; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))


class Run:
    """A network in full-batch training, with a monitor that measures it."""

    def __init__(
        self, lr: Any = 0.05, *, every: int = 1, groups: Any = None, **options: Any
    ) -> None:
        self.model = network()
        parameters = list(self.model.parameters())
        if groups is not None:
            parameters = [
                {"params": parameters[:2], "lr": groups[0]},
                {"params": parameters[2:], "lr": groups[1]},
            ]
        self.optimizer = stableopt.SGD(parameters, lr=lr, momentum=options.pop("momentum", 0.0))
        options = {"batch_size": 16, "max_iter": 100, "tol": 1e-3, **options}
        self.monitor = self.optimizer.track(self.model, MSE, (X, Y), every=every, **options)

    def step(self, x: Tensor = X, y: Tensor = Y) -> None:
        self.optimizer.zero_grad()
        MSE(self.model(x), y).backward()
        self.optimizer.step()

    def go(self, scheduler: Any, steps: int = 1, y: Tensor = Y) -> None:
        for _ in range(steps):
            self.step(X, y)
            scheduler.step()

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]
