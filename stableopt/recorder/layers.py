"""What the flight recorder knows of a model's layers before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.stability.layers.blocks import layer_of

__all__ = ["layers_by_group", "weight_gains"]


def layers_by_group(
    problem: MeanLoss, optimizers: Iterable[torch.optim.Optimizer]
) -> list[list[str]]:
    """Return the layers of each parameter group of ``optimizers``."""
    layers = {id(p): layer_of(n) for n, p in zip(problem.names, problem.params, strict=True)}
    return [
        list(dict.fromkeys(layers[id(p)] for p in group["params"] if id(p) in layers))
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def weight_gains(problem: MeanLoss) -> dict[str, float]:
    """Return the root mean square of each weight matrix times the root of its active inputs."""
    modules = list(problem.model.modules())
    embeddings = {id(m.weight) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    embeddings -= {id(m.weight) for m in modules if isinstance(m, nn.Linear)}
    named = [(n, p) for n, p in zip(problem.names, problem.params, strict=True) if p.dim() > 1]
    if not named or problem.sharded:
        return {}
    with torch.no_grad():
        gains = [
            p.detach().float().square().sum() / (p.numel() if id(p) in embeddings else p.shape[0])
            for _, p in named
        ]
    return {
        layer_of(name): gain**0.5
        for (name, _), gain in zip(named, torch.stack(gains).tolist(), strict=True)
    }
