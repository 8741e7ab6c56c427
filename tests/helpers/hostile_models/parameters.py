"""Parameters that are tied, frozen, unused, chosen, reparametrised or pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hostile_models.blocks import MSE, mlp, next_token_loss, pair, tokens
from hostile_models.setting import Setting, measured


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


@measured("tied embeddings")
def _tied() -> Setting:
    ids = tokens()
    return Setting(TiedLanguageModel(), next_token_loss, (ids, ids.roll(-1, 1)))


@measured("frozen parameters")
def _frozen() -> Setting:
    model = mlp(nn.Linear(4, 4), nn.Tanh())
    model[0].requires_grad_(False)
    return Setting(model, MSE, pair())


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@measured("unused parameters")
def _unused() -> Setting:
    return Setting(WithUnused(), MSE, pair())


@measured("chosen parameters")
def _chosen() -> Setting:
    return Setting(mlp(), MSE, pair(), params=lambda model: list(model[2].parameters()))


class LowRank(nn.Module):
    """A frozen layer with a trainable adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 3))
        self.up = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@measured("low-rank adapters")
def _low_rank() -> Setting:
    return Setting(LowRank(), MSE, pair())


class Collections(nn.Module):
    """Lists and dictionaries of parameters, scalars, and one without entries."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.by_name = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(0.7))})
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(x * self.gains[0]) * self.gains[1]
        return self.by_name["scale"] * z[:, :2] + self.empty.sum()


@measured("parameter lists, scalars and empty tensors")
def _collections() -> Setting:
    return Setting(Collections(), MSE, pair())


@measured("weight norm")
def _weight_norm() -> Setting:
    return Setting(parametrizations.weight_norm(nn.Linear(3, 2)), MSE, pair())


@measured("spectral norm")
def _spectral_norm() -> Setting:
    return Setting(mlp(parametrizations.spectral_norm(nn.Linear(4, 4))), MSE, pair())


@measured("orthogonal parametrisation")
def _orthogonal() -> Setting:
    return Setting(mlp(parametrizations.orthogonal(nn.Linear(4, 4))), MSE, pair())


@measured("pruned weights")
def _pruned() -> Setting:
    model = mlp()
    prune.random_unstructured(model[0], "weight", amount=0.4)
    return Setting(model, MSE, pair())
