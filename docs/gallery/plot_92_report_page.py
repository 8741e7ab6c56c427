"""The page of a run
=================

``python -m stableopt report FOLDER`` writes one HTML page about a run, from the file of a
:class:`~stableopt.JSONLinesSink` and the reports of a :class:`~stableopt.FlightRecorder`. A notebook
shows it in short for the monitor, as below.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import stableopt
from stableopt import plot
from stableopt.report import write_page

# sphinx_gallery_capture_repr = ("_repr_html_",)

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
rows = torch.randperm(len(images))[:500]
x = torch.tensor(images, dtype=torch.float32)[rows] / 16
y = nn.functional.one_hot(torch.tensor(digits)[rows], 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()
folder = Path(tempfile.mkdtemp())
opt = stableopt.SGD(model.parameters(), lr=2.0)
monitor = opt.track(
    model,
    loss_fn,
    (x, y),
    every=20,
    quantities=("sharpness", "non_uniformity", "realised_edge"),
    sinks=[stableopt.JSONLinesSink(folder / "margins.jsonl")],
)
for _ in range(600):
    batch = torch.randint(len(x), (64,))
    opt.zero_grad()
    loss_fn(model(x[batch]), y[batch]).backward()
    opt.step()

page = write_page(folder)  # what the command does
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")
monitor

# %%
# The page has every margin, and the layers and alarms where there are reports. The same margins as a
# figure:

figure = plot.margins(monitor.history)
