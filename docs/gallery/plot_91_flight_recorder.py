"""A flight recorder
=================

:class:`~stableopt.FlightRecorder` keeps the last steps of a run, and writes a report when the loss
spikes. Here the learning rate of one layer rises by mistake.
"""

import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits
from torch import nn

import stableopt

torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32) / 16
y = nn.functional.one_hot(torch.tensor(digits), 10).float()

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
loss_fn = nn.MSELoss()
groups = [{"params": layer.parameters()} for layer in (model[0], model[2], model[4])]
opt = stableopt.SGD(groups, lr=0.5)
monitor = opt.track(model, loss_fn, (x[:500], y[:500]), every=10, dataset_size=len(x))
with stableopt.FlightRecorder(monitor, tempfile.mkdtemp()) as recorder:
    for step in range(100):
        if step == 40:
            opt.param_groups[1]["lr"] = 100.0  # the mistake
        rows = torch.randint(len(x), (64,))
        loss = loss_fn(model(x[rows]), y[rows])
        recorder.loss(loss, batch=rows)
        opt.zero_grad()
        loss.backward()
        opt.step()

folder = recorder.reports[0]
print(*sorted(path.name for path in Path(folder).iterdir()))
verdict = json.loads((folder / "report.json").read_text())["verdict"]
for sentence in verdict["text"].split(". "):
    print(sentence)

# %%
# The figure of the report shows the steps before the alarm. The page *Why did the loss spike?* says how
# causes are found.

figure = Figure(figsize=(9.0, 6.0), layout="constrained")
axes = figure.subplots()
axes.imshow(imread(folder / "report.png"))
axes.set_axis_off()
