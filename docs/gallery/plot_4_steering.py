"""Steering to a flatter minimum
=============================

Name the minima that you want; the learning rate makes the others unstable.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import StabilityController, TargetRegion, plot

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:100]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()

# %%
# First gradient descent alone, for 4,000 steps at η = 0.5. It sharpens towards 2/η = 4.

opt = stableopt.GD(model.parameters(), lr=0.5)
monitor = opt.track(model, loss_fn, (x, y), every=40, quantities=("sharpness", "non_uniformity"))


def train(steps, after=lambda: None):
    """Take some steps of gradient descent; return the loss."""
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        after()
    return loss.item()


first = train(1)
print(f"loss {train(3999):.1e}, a = {opt.margins.sharpness:.2f}")

# %%
# The target is a minimum three times flatter. A loss above ``loss_cap``, here the loss at
# initialisation, would count as divergence.

controller = StabilityController(monitor, TargetRegion.flatter(by=3), lr={"loss_cap": first})
print(f"loss {train(4000, controller.step):.1e}, a = {opt.margins.sharpness:.2f}")
print(f"η is now {opt.param_groups[0]['lr']:.2f}")
for decision in list(controller.decisions)[:3]:
    print(decision)

figure = plot.margins(monitor.history, marks=[(4000, "steering begins")])

# %%
# The limit falls by 1 % per step, and waits while the sharpness is far above it. The non-uniformity fell
# as well, without being a target: see the page on steering.
