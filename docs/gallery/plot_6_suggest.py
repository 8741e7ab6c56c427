"""Which learning rate?
====================

:func:`~stableopt.suggest` returns the largest learning rate that is linearly stable at a point, for
several batch sizes and optimizers.
"""

import copy

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import stableopt

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:50]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()
opt = torch.optim.SGD(model.parameters(), lr=1.0)
for _ in range(30_000):
    opt.zero_grad()
    loss_fn(model(x), y).backward()
    opt.step()

found = stableopt.suggest(model, loss_fn, (x, y), batch_sizes=(2, 8, 50))
print(found)

# %%
# The last row is the rate from which a single full-batch step raises the loss. SGD starts from this
# point with batches of 8, below and above the suggested rate. ``<=`` would mark an upper bound, as where
# samples are not fitted yet; without it the number is the threshold itself.

largest = found.answer("SGD", 8).lr
figure = Figure(figsize=(7.0, 4.0), layout="constrained")
axes = figure.subplots()
for share, colour in ((0.5, "#009E73"), (0.9, "#0072B2"), (1.2, "#CC79A7"), (1.5, "#D55E00")):
    net = copy.deepcopy(model)
    opt = torch.optim.SGD(net.parameters(), lr=share * largest)
    torch.manual_seed(0)
    losses = []
    for _ in range(300):
        with torch.no_grad():
            losses.append(loss_fn(net(x), y).item())
        batch = torch.randperm(len(x))[:8]
        opt.zero_grad()
        loss_fn(net(x[batch]), y[batch]).backward()
        opt.step()
    axes.plot(losses, color=colour, label=f"{share} of the largest stable rate")
axes.set_yscale("log")
axes.set_xlabel("step")
axes.set_ylabel("loss over all samples")
axes.legend()

# %%
# It is the largest rate at which training *stays*, not the rate at which it learns best.
