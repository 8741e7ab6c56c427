r"""The spectrum at the edge of stability
======================================

A few eigenvalues of the Hessian are large, as many as there are classes or so; all others lie near zero,
some below it. Gradient descent at its edge of stability has the largest at 2/η. How many others stand
there too?
"""

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn

import stableopt

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:500]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()
loss_fn = nn.MSELoss()
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

# %%
# Top eigenvalues are measured along with the sharpness: those down to 0.75 of the limit, at least three.
# The trace and the spectrum take more products; ``spectrum_every`` measures the spectrum at every tenth
# measurement.

optimizer = stableopt.GD(model.parameters(), lr=1.0)
monitor = optimizer.track(
    model,
    loss_fn,
    (x, y),
    every=60,
    quantities=("sharpness", "top_eigenvalues", "trace", "spectrum"),
    tol=0.02,
    spectrum_every=10,
)
for _ in range(1200):
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()

# %%
# On the left the last spectrum, with the limit; on the right the largest eigenvalues over time.

figure = Figure(figsize=(9.0, 3.6), layout="constrained")
spectrum, over_time = figure.subplots(1, 2)
spectra = [m for m in monitor.history if m["spectrum"].density is not None]
early, late = spectra[0], spectra[-1]
stableopt.plot.spectrum(late, ax=spectrum, title=f"spectrum at step {late.step}")
over_time.set_title("largest eigenvalues")
steps = [m.step for m in monitor.history]
for index in range(1, 13):
    key = "top_eigenvalues" + (f"_{index}" if index > 1 else "")
    values = [m.record().get(key, float("nan")) for m in monitor.history]
    over_time.plot(steps, values, color="#0072B2", alpha=1 / index**0.5)
over_time.axhline(2 / 1.0, color="#D55E00", linestyle="--", label="limit 2/η")
over_time.set_xlabel("step")
over_time.legend()

for margins in (early, late):
    top, trace, density = (margins[name] for name in ("top_eigenvalues", "trace", "spectrum"))
    print(f"step {margins.step:4}: largest {top.value:.3f}, limit {top.limit}")
    print(f"  above the limit {top.details['above']}, below zero {density.details['negative']:.0%}")
    print(f"  trace {trace.value:.2f} ± {trace.details['standard_error']:.2f}")
    print(f"  effective rank {trace.details['effective_rank']:.1f}")

# %%
# One eigenvalue after the other rises to the limit and stays there: the edge of stability is not that of
# the sharpest direction alone. The effective rank, the trace over the largest eigenvalue, says how many
# eigenvalues as large as the largest would give the same trace. Most are small, and below zero.
