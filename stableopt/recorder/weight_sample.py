r"""`WeightSample`: how far weights move, from a sample of them.

A copy of all weights would cost as much memory as the model. Of each parameter at most 256 numbers
are followed, in equal distances, and their squares stand for those of all:

.. math:: \|w_b\|^2 \approx \sum_{p \in b} \frac{n_p}{m_p} \sum_{j=1}^{m_p} w_{p,j}^2,

for the parameters p of a layer b with :math:`n_p` numbers, :math:`m_p` of them in the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local
from stableopt.stability.measure.layers import layer_of

__all__ = ["WeightSample"]

_MOST = 256
"""Numbers of a parameter in the sample: a norm is then right to about 4 %."""


class WeightSample:
    """A sample of the weights of each layer.

    Args:
        params: the parameters.
        names: of the parameters.

    Attributes:
        layers: the names of the layers.

    >>> weight = torch.tensor([3.0, 4.0])
    >>> sample = WeightSample([weight], ["0.weight"])
    >>> before = sample.take()
    >>> weight *= 2
    >>> sample.norms(before), sample.norms(sample.take() - before)
    (tensor([5.]), tensor([5.]))
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        self._params = tuple(params)
        self.layers = list(dict.fromkeys(map(layer_of, names)))
        wholes = [_values(p).numel() for p in self._params]
        self._every = [max(-(-whole // _MOST), 1) for whole in wholes]
        sizes = [-(-whole // every) for whole, every in zip(wholes, self._every, strict=True)]
        device = self._params[0].device
        places = [self.layers.index(layer_of(name)) for name in names]
        counts = torch.tensor(sizes, device=device)
        self._layer = torch.repeat_interleave(torch.tensor(places, device=device), counts)
        shares = [whole / max(size, 1) for whole, size in zip(wholes, sizes, strict=True)]
        self._stands_for = torch.repeat_interleave(torch.tensor(shares, device=device), counts)

    def take(self) -> Tensor:
        """Return the sample as it is now, in single precision, or double where weights are."""
        device = self._params[0].device
        kinds = {(p.dtype, p.device) for p in self._params}
        with torch.inference_mode(False), torch.no_grad():
            pairs = zip(self._params, self._every, strict=True)
            parts = [_values(p)[::every] for p, every in pairs]
            if kinds != {(torch.float32, device)}:
                exact = any(part.dtype == torch.float64 for part in parts)
                dtype = torch.float64 if exact else torch.float32
                parts = [part.to(device, dtype) for part in parts]
            return torch.cat(parts)

    def norms(self, sample: Tensor) -> Tensor:
        """Return the norm of each layer of a sample, or of a difference of two."""
        squares = self._stands_for * sample.square()
        zeros = torch.zeros(len(self.layers), device=sample.device, dtype=squares.dtype)
        return zeros.index_add(0, self._layer, squares).sqrt()


def _values(p: Tensor) -> Tensor:
    return real_view(local(p.detach())).reshape(-1)
