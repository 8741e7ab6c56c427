"""Digits, and a monitored training run: what the examples of normalised and of used steps share."""

import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

from stableopt import StabilityMonitor

loss_fn = nn.MSELoss()


def digits(samples):
    """Return so many images of digits, drawn at random, and their one-hot labels."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(images))[:samples]
    x = torch.tensor(images, dtype=torch.float32)[rows] / 16
    return x, nn.functional.one_hot(torch.tensor(labels)[rows], 10).float()


def monitored(model, optimizers, data, *, steps, every, quantities, batch_size=None):
    """Train in batches drawn at random, by default of all samples; return the closed monitor."""
    x, y = data
    with warnings.catch_warnings():
        # The sharpness has no limit under Muon and sign descent, which the monitor says.
        warnings.simplefilter("ignore", RuntimeWarning)
        with StabilityMonitor(
            optimizers, model, loss_fn, data, every=every, quantities=quantities
        ) as monitor:
            for _ in range(steps):
                batch = slice(None) if batch_size is None else torch.randperm(len(x))[:batch_size]
                model.zero_grad()
                loss_fn(model(x[batch]), y[batch]).backward()
                for optimizer in optimizers:
                    optimizer.step()
    return monitor
