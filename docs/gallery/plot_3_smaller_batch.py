"""What would a smaller batch do?
==============================

:func:`~stableopt.critical_lr` answers before SGD runs: above it the distance to the minimum grows in
mean square. Running SGD checks it here.
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
gd = stableopt.GD(model.parameters(), lr=1.0)
for _ in range(8000):
    gd.zero_grad()
    loss = loss_fn(model(x), y)
    loss.backward()
    gd.step()
print(f"gradient descent at η = 1: loss {loss.item():.1e}")

# %%
# The critical learning rate of this minimum, for several batch sizes, and the smallest batch that
# can stay at η = 0.8.

problem = stableopt.Problem(model, loss_fn, (x, y))
sizes = (1, 2, 4, 8, 16)
critical = {size: stableopt.critical_lr(problem, batch_size=size).value for size in sizes}
for size, lr in critical.items():
    print(f"B = {size:2}: {lr:.3f}")
print("at η = 0.8:", stableopt.critical_batch_size(problem, lr=0.8))

# %%
# SGD now starts from there, at rates below and above. A run has escaped if the loss rises tenfold.


@torch.no_grad()
def loss_of(net):
    """Return the loss over all samples."""
    return loss_fn(net(x), y).item()


def escapes(size, lr, steps=500):
    """Return whether SGD leaves."""
    net = copy.deepcopy(model)
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        batch = torch.randperm(len(x))[:size]
        opt.zero_grad()
        loss_fn(net(x[batch]), y[batch]).backward()
        opt.step()
        if step % 10 == 9 and not loss_of(net) < 10 * loss_of(model):
            return True
    return False


figure = Figure(figsize=(7.0, 4.5), layout="constrained")
axes = figure.subplots()
axes.plot(list(sizes), list(critical.values()), color="#0072B2", label="critical learning rate")
runs = [(size, share * lr) for size, lr in critical.items() for share in (0.7, 0.9, 1.1, 1.4)]
left = [run for run in runs if escapes(*run)]
stayed = [run for run in runs if run not in left]
for found, marker, colour in ((left, "x", "#D55E00"), (stayed, "o", "#009E73")):
    label = f"SGD {'escaped' if marker == 'x' else 'stayed'}"
    where = [size for size, _ in found], [lr for _, lr in found]
    axes.plot(*where, marker, color=colour, label=label)
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, [str(size) for size in sizes])
axes.minorticks_off()
axes.set_xlabel("batch size B")
axes.set_ylabel("learning rate η")
axes.legend()

# %%
# The box, s ≤ √B/η, is cheaper and often sufficient: it needs one measurement for all batch sizes.

Q = ("sharpness", "non_uniformity")
margins = stableopt.measure(problem, lr=1.0, batch_size=4, quantities=Q)
for size in sizes:
    region = stableopt.StabilityRegion(stableopt.UpdateRule(lr=0.8), size, dataset_size=len(x))
    print(
        f"B = {size:2}: can stay at η = 0.8?",
        region.contains(margins.sharpness, margins.non_uniformity),
    )
