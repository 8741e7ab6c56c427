r"""SAM has an edge of its own
==========================

Sharpness-aware minimization ascends by a length ρ before it takes the gradient. A mode of curvature h
then steps like one of curvature :math:`h + \rho h^2/\|g\|`. So its limit on the sharpness is below 2/η,
and falls as the gradient g shrinks (Long & Bartlett, 2023). A monitor reads the gradient from which SAM
ascends.
"""

import torch
from digits_runs import digits, loss_fn
from matplotlib.figure import Figure
from torch import nn

import stableopt
from stableopt.stability import readers

LR, RHO = 0.8, 0.05
x, y = data = digits(100)

# %%
# SAM is not among torch's optimizers. The reader of the class in ``pytorch_optimizer`` serves any
# class with these two parts of a step.


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021) over SGD."""

    def __init__(self, params, lr, rho):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self):
        """Ascend."""
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.ascent = [(p, self.defaults["rho"] / norm * p.grad) for p in params]
        for p, distance in self.ascent:
            p += distance

    @torch.no_grad()
    def second_step(self):
        """Return, and step along the gradient from above."""
        for p, distance in self.ascent:
            p -= distance
        self.base_optimizer.step()

    def step(self, closure):
        """Take both parts."""
        self.first_step()
        closure()
        self.second_step()


stableopt.UpdateRule.register(SAM, readers.sgd.read_sam)

# %%
# Both runs use all samples, start at the same weights, and have the same learning rate.


def trained(kind, **options):
    """Train by full batches; return the measured margins."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = kind(model.parameters(), lr=LR, **options)

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    with stableopt.StabilityMonitor(optimizer, model, loss_fn, data, every=15) as monitor:
        for _ in range(1500):
            closure()
            optimizer.step(closure if kind is SAM else None)
    return monitor.history


runs = {"gradient descent": trained(torch.optim.SGD), "SAM": trained(SAM, rho=RHO)}

# %%
# Gradient descent trains at 2/η. SAM trains at its own limit, at flatter points.

figure = Figure(figsize=(7, 4), layout="constrained")
panel = figure.subplots()
for (name, history), colour in zip(runs.items(), ("tab:orange", "tab:blue"), strict=True):
    steps = [margins.step for margins in history]
    panel.plot(steps, [margins.sharpness for margins in history], color=colour, label=name)
    limits = [margins.sharpness_limit for margins in history]
    panel.plot(steps, limits, "--", color=colour, label=f"limit of {name}")
    last = history[-1]
    print(f"{name}: sharpness {last.sharpness:.2f}, {last.sharpness_ratio:.2f} of its limit")
panel.set(xlabel="step", ylabel="sharpness", ylim=(0, None))
panel.legend()
