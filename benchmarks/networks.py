"""The networks of the experiments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

__all__ = ["WIDTHS", "fully_connected"]

WIDTHS = {
    "digits": (64, 128, 128, 10),
    "fashion-mnist": (784, 500, 500, 500, 10),
}
"""Layer widths by data set. Those for Fashion-MNIST are the paper's: 898,510 parameters."""


def fully_connected(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return a ReLU network with torch's default initialisation from ``seed``.

    >>> sum(p.numel() for p in fully_connected(WIDTHS["fashion-mnist"], seed=0).parameters())
    898510
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
