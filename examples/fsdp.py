"""Track the sharpness of a model whose parameters are sharded by fully_shard.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stableopt

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)

torch.manual_seed(0)
x = torch.randn(256, 16)
y = torch.stack([x[:, :8].sum(1).sin(), x[:, 8:].sum(1).cos()], dim=1)
x, y = x[rank::ranks].to(device), y[rank::ranks].to(device)  # this rank's shard of the data
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))
mesh = init_device_mesh(device.type, (ranks,))
fully_shard(model.to(device)[2], mesh=mesh)
fully_shard(model, mesh=mesh)
loss_fn = nn.MSELoss()

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
monitor = stableopt.StabilityMonitor(
    optimizer,
    model,
    loss_fn,
    (x, y),
    every=10,
    sinks=[lambda step, record: print(step, f"loss {record['loss']:.4f}")],  # on rank 0 alone
)
for _ in range(20):
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()

margins = monitor.margins
assert margins is not None
assert margins.failure is None, margins.failure
if rank == 0:
    print(f"{ranks} ranks, {margins.dataset_size} samples, sharpness {margins.sharpness:.3f}")
    ratio = margins.preconditioned_sharpness_ratio
    print(f"preconditioned sharpness: {ratio:.3f} of its limit")
dist.destroy_process_group()
