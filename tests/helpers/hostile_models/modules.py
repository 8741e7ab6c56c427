"""Modules with a forward or backward pass out of the ordinary."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from oracles import SineOnce
from torch import Tensor, nn

from hostile_models.blocks import MSE, mlp, pair, tokens
from hostile_models.setting import Setting, measured


class Noise(nn.Module):
    """Draws from every generator there is, one of its own included, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(5)
        self.of_numpy = np.random.default_rng(5)
        self.of_python = random.Random(5)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[1], generator=self.own) + torch.rand(x.shape[1])
        noise = noise + float(self.of_numpy.random()) + self.of_python.random()
        return x + 0.0 * (noise + random.random() + float(np.random.rand()))  # noqa: NPY002


@measured("dropout, and modules that draw random numbers")
def _noise() -> Setting:
    return Setting(mlp(nn.Dropout(0.5), Noise(), nn.AlphaDropout(0.2)), MSE, pair())


@measured("embedding bags with sparse gradients", "central differences")
def _sparse() -> Setting:
    model = nn.Sequential(nn.EmbeddingBag(6, 4, sparse=True), nn.Tanh(), nn.Linear(4, 2))
    return Setting(model, MSE, (tokens(), torch.randn(5, 2)))


class Experts(nn.Module):
    """Sends each sample to one of two experts: control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 2), nn.ModuleList([mlp(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return share.unsqueeze(1) * out


@measured("a mixture of experts")
def _experts() -> Setting:
    return Setting(Experts(), MSE, pair())


class Energy(nn.Module):
    """Returns the gradient of an energy in its inputs, as force fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@measured("a gradient inside the model")
def _energy() -> Setting:
    x = torch.randn(5, 3)
    return Setting(Energy(), MSE, (x, x.sin()))


class Laplacian(nn.Module):
    """Uses torch.func inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.jacrev(lambda at: self.net(at).squeeze(-1))
        return torch.vmap(slope)(x)


@measured("torch.func inside the model")
def _laplacian() -> Setting:
    x = torch.randn(5, 3)
    return Setting(Laplacian(), MSE, (x, x.sin()))


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SineOnce.apply(x)


@measured("a kernel of one's own that is differentiable once", "central differences")
def _once() -> Setting:
    return Setting(mlp(Once()), MSE, pair())


class DetachedSine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.cosine = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.cosine


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return DetachedSine.apply(x)


@measured("a backward whose own derivative is silently wrong", "central differences")
def _silent() -> Setting:
    return Setting(mlp(Silent()), MSE, pair())


@measured("user hooks on the modules")
def _hooks() -> Setting:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, out: out * 1.5)
    model[0].weight.register_hook(lambda grad: grad * 1.0)
    return Setting(model, MSE, pair())


@measured("a train() that does more than set the mode")
def _own_train() -> Setting:
    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            raise AssertionError("a measurement must not call train() or eval()")

    return Setting(Own(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), MSE, pair())


@measured("a loss with parameters that are frozen")
def _loss_module() -> Setting:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).requires_grad_(False)

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return MSE(self.features(z), self.features(y))

    return Setting(mlp(), Perceptual(), pair())
