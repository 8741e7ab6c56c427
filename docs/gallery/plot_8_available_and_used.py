r"""Available and used: χ and ζ
===========================

χ, the sharpness over its limit, says how sharp a direction is *available*. ζ, the realised edge, says
how much of the last steps was overshoot: above 1 they raised the loss on the probe set. Optimizers
differ in how much of χ they use.

``digits_runs.py`` in the same folder has the data and the training loop.
"""

import torch
from digits_runs import digits, monitored
from matplotlib.figure import Figure
from torch import nn

torch.manual_seed(0)
data = digits(1000)


def muon_and_adamw(params):
    """Return Muon for the matrices, and AdamW for the biases."""
    return [
        torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.01),
        torch.optim.AdamW([p for p in params if p.dim() < 2], lr=3e-3),
    ]


# %%
# Each run: its optimizers, and the samples in a step.

RUNS = {
    "gradient descent": (lambda p: [torch.optim.SGD(p, lr=1.0)], None),
    "heavy ball": (lambda p: [torch.optim.SGD(p, lr=1.0, momentum=0.9)], None),
    "AdamW, B = 64": (lambda p: [torch.optim.AdamW(p, lr=3e-3)], 64),
    "SGD, B = 16": (lambda p: [torch.optim.SGD(p, lr=0.5)], 16),
    "Muon + AdamW, B = 64": (muon_and_adamw, 64),
}
figure = Figure(figsize=(7.0, 4.0), layout="constrained")
figure.suptitle("Available (χ) and used (ζ)")
axes = figure.subplots()
for row, (name, (make, size)) in enumerate(RUNS.items()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizers = make(list(model.parameters()))
    quantities = ("sharpness", "realised_edge")
    monitor = monitored(
        model, optimizers, data, steps=1000, every=20, quantities=quantities, batch_size=size
    )
    last = monitor.history[-1]
    available, used = last.edge_ratio, last.realised_edge
    shown = [f"{number:.3f}" if number is not None else "not known" for number in (available, used)]
    print(f"{name:21} χ {shown[0]:9}  ζ {shown[1]:9}  loss {last.loss:.4f}")
    for number, colour, offset in ((available, "#0072B2", -0.2), (used, "#D55E00", 0.2)):
        if number is not None:
            axes.barh(row + offset, number, 0.4, color=colour)
axes.axvline(1, color="black", linewidth=1)
axes.set_yticks(range(len(RUNS)), list(RUNS))
axes.invert_yaxis()
axes.set_xlabel("blue: χ, available; orange: ζ, used")

# %%
# Gradient descent uses what is available. Heavy ball stands as near its limit, and almost nothing of its
# steps is overshoot. SGD and AdamW stand far below theirs, and yet their steps overshoot (ζ ≈ 1): on
# average they no longer lower the loss.
