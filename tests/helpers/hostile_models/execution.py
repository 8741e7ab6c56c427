"""Models that are compiled, checkpointed, scripted, traced or wrapped, and contexts around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hostile_models.blocks import MSE, mlp, pair
from hostile_models.setting import Setting, measured


@measured("compiled", "double backward, uncompiled")
def _compiled() -> Setting:
    return Setting(torch.compile(mlp(), backend="eager"), MSE, pair())


@measured("compiled in place", "double backward, uncompiled")
def _compiled_in_place() -> Setting:
    model = mlp()
    model.compile(backend="aot_eager")
    return Setting(model, MSE, pair())


@measured("a compiled part", "double backward, uncompiled")
def _compiled_part() -> Setting:
    inner = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager")
    return Setting(mlp(inner), MSE, pair())


@measured("a compiled loss")
def _compiled_loss() -> Setting:
    loss = torch.compile(lambda z, y: (z - y).square().mean(), backend="eager")
    return Setting(mlp(), loss, pair())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant = reentrant

    def block(self, z: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(z)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        for _ in range(2):
            z = checkpoint(self.block, z, use_reentrant=self.reentrant)
        return self.last(z)


@measured("activation checkpointing", "double backward, without checkpointing")
def _checkpointed() -> Setting:
    return Setting(Checkpointed(reentrant=False), MSE, pair())


@measured("reentrant checkpointing", "double backward, without checkpointing")
def _reentrant() -> Setting:
    return Setting(Checkpointed(reentrant=True), MSE, pair())


class Autocast(nn.Module):
    """Casts for itself, so that it computes in half precision in any context."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@measured("autocast in the model", "double backward, without autocast")
def _autocast() -> Setting:
    return Setting(Autocast(), MSE, pair())


@measured("autocast around the measurement")
def _autocast_around() -> Setting:
    return Setting(mlp(), MSE, pair(), around=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@measured("half precision measured in double", "double backward, in float64")
def _half_in_double() -> Setting:
    x, y = pair()
    model = mlp(nn.BatchNorm1d(4).eval()).bfloat16()
    x, y = x.bfloat16(), y.bfloat16()
    return Setting(model, MSE, (x, y), options={"dtype": torch.float64})


@measured("a scripted module")
def _scripted() -> Setting:
    return Setting(torch.jit.script(mlp()), MSE, pair())


@measured("a traced graph")
def _traced() -> Setting:
    return Setting(torch.fx.symbolic_trace(mlp()), MSE, pair())


@measured("data-parallel")
def _parallel() -> Setting:
    return Setting(nn.DataParallel(mlp()), MSE, pair())


@measured("inference mode around the measurement")
def _inference() -> Setting:
    return Setting(mlp(), MSE, pair(), around=torch.inference_mode)


@measured("no gradients around the measurement")
def _no_grad() -> Setting:
    return Setting(mlp(), MSE, pair(), around=torch.no_grad)
