r"""Sign descent and Muon at their edge
===================================

Steps of sign descent and Muon have a length of their own. The sharpness says little about them; the
*generalised sharpness*, in the norm in which they descend, settles at its limit
:math:`2\|g\|_\star/\eta`.

``digits_runs.py`` in the same folder has the data and the training loop.
"""

import statistics

import torch
from digits_runs import digits, monitored
from matplotlib.figure import Figure
from torch import nn

from stableopt import UpdateRule
from stableopt.stability import NormedStep, SignNorm

torch.manual_seed(0)
data = digits(100)

# %%
# Sign descent is not among torch's optimizers. Its reader names the norm: one radius for all entries.


class SignDescent(torch.optim.SGD):
    """Steps along the signs of the gradient."""

    def step(self, closure=None):
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.sign(), alpha=group["lr"])


def read(optimizer):
    """Return the rule of sign descent."""
    (group,) = optimizer.param_groups
    return UpdateRule(
        lr=group["lr"],
        preconditioner=NormedStep(SignNorm(group["params"], lr=group["lr"]), "sign descent"),
    )


UpdateRule.register(SignDescent, read)

# %%
# Muon descends in the spectral norm of all matrices together. Its default coefficients approximate polar
# factors with singular values between 0.7 and 1.1, which the norm then takes in. Those of the convergent
# iteration make them 1.

EXACT = {"ns_coefficients": (15 / 8, -10 / 8, 3 / 8), "ns_steps": 12}
PLAIN = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
RUNS = {
    "sign descent": lambda params: SignDescent(params, lr=2e-3),
    "Muon": lambda params: torch.optim.Muon(params, lr=0.02, **PLAIN, **EXACT),
}
figure = Figure(figsize=(7.0, 4.0), layout="constrained")
figure.suptitle("The generalised sharpness settles at its limit")
axes = figure.subplots()
for (name, make), colour in zip(RUNS.items(), ("#0072B2", "#009E73"), strict=True):
    model = nn.Sequential(nn.Linear(64, 16, bias=False), nn.Tanh(), nn.Linear(16, 10, bias=False))
    optimizer = make(list(model.parameters()))
    quantities = ("sharpness", "generalised_sharpness")
    monitor = monitored(model, [optimizer], data, steps=240, every=30, quantities=quantities)
    lr = optimizer.param_groups[0]["lr"]
    steps = [margins.step for margins in monitor.history]
    ratios = [margins["generalised_sharpness"].ratio for margins in monitor.history]
    sharpness = [margins.sharpness * lr / 2 for margins in monitor.history]
    axes.plot(steps, ratios, color=colour, label=f"{name}: generalised sharpness / limit")
    axes.plot(steps, sharpness, "--", color=colour, label=f"{name}: sharpness / (2/η)")
    last = statistics.median(ratios[-5:])
    loss = monitor.margins.loss
    print(f"{name}: loss {loss:.4f}, ratio {last:.2f}, sharpness {sharpness[-1]:.4f} of 2/η")
axes.axhline(1, color="#D55E00", linewidth=1)
axes.set_yscale("log")
axes.set_xlabel("step")
axes.legend()

# %%
# The value is a bound from below: the search finds a maximum of a quadratic form over a ball, not the
# largest. With momentum or mini-batches the ratio is a diagnostic, since the step is then not along the
# oracle of the measured gradient.
