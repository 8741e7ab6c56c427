r"""`layer_shares`: which layers hold an eigenvector.

.. math:: \text{share}_b = \sum_{j \in b} v_j^2, \qquad \|v\| = 1

With a preconditioned rule, v is the eigenvector of :math:`P^{1/2} H P^{1/2}`, and the shares sum to 1
as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["layer_of", "layer_shares"]


def layer_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter, as the model names it.

    >>> layer_of("blocks.3.mlp.weight"), layer_of("scale")
    ('blocks.3.mlp', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def layer_shares(vector: Tensor, names: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """Return the share of each layer in the squared norm of ``vector``, the largest first.

    Args:
        vector: a vector ``(d,)``, such as an eigenvector.
        names: of the parameters, in the order of the vector.
        sizes: their numbers of elements, which sum to d.

    Raises:
        ValueError: if the sizes do not sum to d.

    >>> layer_shares(torch.tensor([3.0, 0.0, 4.0]), ["0.weight", "0.bias", "1.weight"], [1, 1, 1])
    {'1': 0.64, '0': 0.36}
    """
    if sum(sizes) != vector.numel():
        raise ValueError(f"sizes sum to {sum(sizes)}: expected the {vector.numel()} of the vector")
    squares = torch.stack(
        [part.double().square().sum() for part in torch.split(vector, list(sizes))]
    )
    total = float(squares.sum()) or 1.0
    shares: dict[str, float] = {}
    for name, square in zip(names, squares.tolist(), strict=True):  # one transfer for all layers
        layer = layer_of(name)
        shares[layer] = shares.get(layer, 0.0) + square / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
