"""Adam's edge of stability
========================

Adam preconditions the Hessian. Its limit, 38/η at β₁ = 0.9, applies to the *preconditioned* sharpness
λmax(PH). The sharpness itself has no limit.
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
# A monitor works with any optimizer whose update rule is known.

Q = ("sharpness", "preconditioned_sharpness", "non_uniformity")
adam = torch.optim.Adam(model.parameters(), lr=3e-3)
with stableopt.StabilityMonitor(
    adam, model, loss_fn, (x, y), every=10, quantities=Q, dataset_size=len(x)
) as monitor:
    for _ in range(800):
        adam.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        adam.step()

margins = monitor.history[-1]
print(f"loss {loss.item():.1e}")
print(f"sharpness {margins.sharpness:.2f}: no limit of its own")
print(f"preconditioned sharpness {margins.preconditioned_sharpness:.0f}, 38/η = {38 / 3e-3:.0f}")

figure = plot.margins(monitor.history)

# %%
# In the first steps the limit is lower, because of Adam's bias corrections.
