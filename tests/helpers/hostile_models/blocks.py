"""Data and networks that many settings share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MSE = nn.MSELoss()


def pair(n: int = 6, d: int = 3, out: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d), torch.randn(n, out)


def sequences(n: int = 3, t: int = 3, d: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, t, d), torch.randn(n, t, d)


def tokens(n: int = 5, t: int = 4, vocabulary: int = 6) -> Tensor:
    return torch.randint(vocabulary, (n, t))


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *between, nn.Linear(4, 2))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
