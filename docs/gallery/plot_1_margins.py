"""The margins of a run
====================

During gradient descent the sharpness rises until it reaches its limit, the *edge of stability*. Training
continues there.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import plot

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:100]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()

# %%
# Tracking is one line. Here it measures sharpness and non-uniformity every 20 steps.

opt = stableopt.GD(model.parameters(), lr=0.6)
monitor = opt.track(model, loss_fn, (x, y), every=20, quantities=("sharpness", "non_uniformity"))


def train(steps):
    """Take some steps of gradient descent; return the loss."""
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
    return loss.item()


print(f"loss {train(2000):.4f}, {opt.margins.sharpness_ratio:.0%} of 2/η")

# %%
# Then the learning rate is raised by half. The sharpness is now above its new limit, and the run leaves
# for a flatter place.

opt.param_groups[0]["lr"] = 0.9
print(f"loss {train(2000):.4f}, {opt.margins.sharpness_ratio:.0%} of 2/η")

figure = plot.margins(monitor.history, marks=[(2000, "η × 1.5")])

# %%
# In the upper panel the dashed line is the limit, 2/η. Full-batch gradient descent has no limit on the
# non-uniformity, so the lower panel has no dashed line.
