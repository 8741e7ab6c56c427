"""Track a loop of Accelerate: the monitor takes what `prepare` returns.

python examples/accelerate_loop.py                    # or: accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stableopt import StabilityMonitor

torch.manual_seed(0)
x = torch.randn(240, 8)
y = torch.stack([x[:, :4].sum(1).sin(), x[:, 4:].sum(1).cos()], dim=1)
net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
loss_fn = nn.MSELoss()

accelerator = Accelerator(gradient_accumulation_steps=2)
data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
# Several processes measure together, each on its shard of the probe set.
shard = slice(accelerator.process_index, None, accelerator.num_processes)
model, optimizer, data = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), 3e-3), data)

monitor = StabilityMonitor(
    optimizer,
    model,
    loss_fn,
    (x[shard], y[shard]),
    dataset_size=len(x),
    every=10,
    sinks=[lambda step, record: accelerator.print(step, record["preconditioned_sharpness_ratio"])],
)
for _ in range(2):
    for inputs, targets in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
monitor.close()
margins = monitor.margins
assert margins is not None
assert margins.failure is None, margins.failure
accelerator.print(f"{monitor.step} steps of {margins.batch_size} samples")
accelerator.end_training()
