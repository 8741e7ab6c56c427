"""Track replicas under DDP: each rank measures on its shard, and rank 0 writes the records.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import stableopt

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)

torch.manual_seed(0)
x = torch.randn(500, 20)
y = torch.stack([x[:, :10].sum(1).sin(), x[:, 10:].sum(1).cos()], dim=1)
net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
model = DistributedDataParallel(net.to(device))
loss_fn = nn.MSELoss()

optimizer = stableopt.SGD(model.parameters(), lr=0.1)
monitor = optimizer.track(
    model,
    loss_fn,
    (x[rank:100:ranks], y[rank:100:ranks]),  # this rank's shard of the probe set, 100 samples
    dataset_size=len(x),
    every=50,
    quantities=["sharpness", "non_uniformity", "critical_lr"],
    sinks=[lambda step, record: print(step, f"loss {record['loss']:.4f}")],  # on rank 0 alone
)

data = TensorDataset(x, y)
sampler = DistributedSampler(data)
for epoch in range(2):
    sampler.set_epoch(epoch)
    for inputs, targets in DataLoader(data, batch_size=5, sampler=sampler):
        optimizer.zero_grad()
        loss_fn(model(inputs.to(device)), targets.to(device)).backward()
        optimizer.step()

margins = monitor.margins
assert margins is not None
assert margins.failure is None, margins.failure
if rank == 0:
    print(f"{ranks} ranks, batches of {margins.batch_size}, {margins.dataset_size} samples")
    print(f"sharpness {margins.sharpness:.3f} of {margins.sharpness_limit:.3f}")
    print(f"non-uniformity {margins.non_uniformity:.3f} of {margins.non_uniformity_limit:.3f}")
    print(f"critical learning rate {margins.critical_lr:.3f}")
dist.destroy_process_group()
