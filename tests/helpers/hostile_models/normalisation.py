"""Normalisation layers, and convolutions with pooling."""

from __future__ import annotations

import torch
from torch import nn

from hostile_models.blocks import MSE, mlp, pair
from hostile_models.setting import Setting, measured


@measured("batch norm in eval mode")
def _batch_norm() -> Setting:
    norm = nn.BatchNorm1d(4)
    with torch.no_grad():
        norm(3 + 2 * torch.randn(50, 4))
    return Setting(mlp(norm), MSE, pair())


@measured("batch norm by batch statistics", "double backward, batch statistics")
def _batch_statistics() -> Setting:
    setting = Setting(mlp(nn.BatchNorm1d(4)), MSE, pair(), options={"batch_statistics": True})
    setting.model[2].train()
    return setting


@measured("batch statistics of chunks", "double backward, batch statistics")
def _batch_statistics_of_chunks() -> Setting:
    options = {"batch_statistics": True, "chunk_size": 3}
    x, y = pair(6)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    return Setting(mlp(nn.BatchNorm1d(4)), MSE, (x, y), batches, options=options)


@measured("group, layer and instance norm")
def _norms() -> Setting:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.GroupNorm(2, 2),
        nn.Softplus(),
        nn.InstanceNorm2d(2, affine=True),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 2),
    )
    return Setting(model, MSE, (torch.randn(3, 1, 4, 4), torch.randn(3, 2)))


@measured("convolutions with max-pooling and in-place ReLU")
def _convolutions() -> Setting:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    return Setting(model, MSE, (torch.randn(3, 1, 4, 4), torch.randn(3, 2)))
