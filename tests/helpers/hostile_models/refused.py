"""Models, losses and data that a measurement refuses, with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hostile_models.batches import named_rows
from hostile_models.blocks import MSE, mlp, pair
from hostile_models.setting import Setting, refused


@refused("batch norm without running statistics", "normalises by batch statistics even in eval")
def _no_statistics() -> Setting:
    return Setting(mlp(nn.BatchNorm1d(4, track_running_stats=False)), MSE, pair())


@refused("lazy layers", "no shape yet: run the lazy model once")
def _lazy() -> Setting:
    return Setting(nn.Sequential(nn.LazyLinear(2)), MSE, pair())


@refused("half precision that was not asked for", "bfloat16.*pass dtype=torch.float32")
def _half() -> Setting:
    x, y = pair()
    return Setting(mlp().bfloat16(), MSE, (x.bfloat16(), y.bfloat16()))


@refused("mixed precision of parameters", "expected one dtype and one device")
def _mixed() -> Setting:
    model = mlp()
    model[2].float()
    return Setting(model, MSE, pair())


@refused("no trainable parameters", "no trainable parameters")
def _none_trainable() -> Setting:
    return Setting(mlp().requires_grad_(False), MSE, pair())


@refused("parameters without data", "meta")
def _meta() -> Setting:
    with torch.device("meta"):
        model = mlp()
    return Setting(model, MSE, pair())


@refused("a sum instead of a mean", "not a mean over samples.*a sum")
def _sum() -> Setting:
    return Setting(mlp(), nn.MSELoss(reduction="sum"), pair())


@refused("a loss for each sample", "expected a scalar")
def _unreduced() -> Setting:
    return Setting(mlp(), nn.MSELoss(reduction="none"), pair())


@refused("a contrastive loss", "not a mean over samples")
def _contrastive() -> Setting:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    return Setting(mlp(), loss, pair())


@refused("a loss that is a number", "returned float")
def _number() -> Setting:
    return Setting(mlp(), lambda z, y: float(MSE(z, y)), pair())


@refused("a forward pass without gradients", "does not depend on any of the parameters")
def _detached() -> Setting:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return Setting(Blind(), MSE, pair())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@refused("gradient reversal", "not the derivative of the loss")
def _reversal() -> Setting:
    class Reversal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Reversed.apply(x)

    return Setting(mlp(Reversal()), MSE, pair())


@refused("a target that is detached", "not the derivative of the loss")
def _stop_gradient() -> Setting:
    return Setting(mlp(), lambda z, y: MSE(z, z.flip(-1).detach()) + MSE(z, y), pair())


@refused("a step function", "does not depend|not the derivative|zero")
def _sign() -> Setting:
    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) > 0).double()

    return Setting(Sign(), MSE, pair())


@refused("a loss that is not finite", "not finite")
def _infinite() -> Setting:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return Setting(model, MSE, pair())


@refused("an iterator that can be read once", "read only once")
def _iterator() -> Setting:
    return Setting(mlp(), MSE, iter([pair()]))


@refused("no data", "empty")
def _empty() -> Setting:
    return Setting(mlp(), MSE, [])


@refused("batches of arrays", "torch.as_tensor")
def _arrays() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, [(x.numpy(), y.numpy())])


@refused("inputs and targets of different lengths", "same leading dimension")
def _lengths() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, (x, y[:4]))


@refused("dictionaries where pairs are expected", "from_batch_loss")
def _dictionaries_for_pairs() -> Setting:
    return Setting(mlp(), MSE, [named_rows()])


@refused("a forward pass that raises", "no such thing")
def _raises() -> Setting:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            torch.rand(1)
            self.inner(x)
            raise LookupError("no such thing")

    return Setting(Raises(), MSE, pair())


@refused("a model that is not a module", "expected a torch.nn.Module")
def _function() -> Setting:
    return Setting(torch.sin, MSE, pair())  # type: ignore[arg-type]
