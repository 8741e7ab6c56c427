"""SGD leaves a minimum where gradient descent stays
=================================================

The sharpness / non-uniformity diagram of Wu, Ma & E (2018), with a run that escapes and settles.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import StabilityRegion, UpdateRule, plot

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:100]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()

# %%
# Gradient descent trains at η = 1 and settles at 2/η.

gd = stableopt.GD(model.parameters(), lr=1.0)
for _ in range(8000):
    gd.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    gd.step()

Q = ("sharpness", "non_uniformity")
margins = stableopt.measure(model, loss_fn, (x, y), lr=1.0, batch_size=4, quantities=Q)
print(f"loss {loss.item():.1e}, a = {margins.sharpness:.2f}, s = {margins.non_uniformity:.2f}")
print(f"SGD with batches of 4 can stay up to s = {margins.non_uniformity_limit:.2f}")

# %%
# SGD at the *same* learning rate, with batches of 4, starts there. Nothing else changes.

sgd = stableopt.SGD(model.parameters(), lr=1.0)
monitor = sgd.track(model, loss_fn, (x, y), every=25, quantities=Q, batch_size=4)
monitor.measure()
losses = []
for _ in range(1500):
    batch = torch.randperm(len(x))[:4]
    sgd.zero_grad()
    loss_fn(model(x[batch]), y[batch]).backward()
    sgd.step()
    with torch.no_grad():
        losses.append(loss_fn(model(x), y).item())
print(f"the loss went up to {max(losses):.1e} and came back to {losses[-1]:.1e}")

region = StabilityRegion(UpdateRule.from_optimizer(sgd), batch_size=4, dataset_size=len(x))
figure = plot.diagram(region, monitor.history)

# %%
# The run ends inside the dashed box, at a flatter and more uniform point than its start. The loss rose
# during the escape, and fell again soon after.
