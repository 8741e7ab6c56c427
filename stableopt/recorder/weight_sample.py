r"""`WeightSample`: the norm of each layer's weights and steps, estimated from a sample.

A copy of all weights would cost as much memory as the model. The sample holds at most 256 equally
spaced entries of each parameter, and the norm is estimated as

.. math:: \|w_b\|^2 \approx \sum_{p \in b} \frac{n_p}{m_p} \sum_{j=1}^{m_p} w_{p,j}^2,

over the parameters p of layer b, with :math:`n_p` entries, :math:`m_p` of them in the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local
from stableopt.stability.layers.blocks import layer_of

__all__ = ["WeightSample"]

_MAX_ENTRIES = 256
"""Entries of a parameter in the sample; the relative error of a norm is then about 4 %."""


class WeightSample:
    """A sample of the weights of each layer.

    Args:
        params: the parameters.
        names: their names.

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
        numels = [_values(p).numel() for p in self._params]
        # Odd, so that the steps meet every column of a matrix whose width is a power of two.
        self._strides = [max(-(-numel // _MAX_ENTRIES), 1) | 1 for numel in numels]
        sizes = [-(-n // stride) for n, stride in zip(numels, self._strides, strict=True)]
        device = self._params[0].device
        rows = [self.layers.index(layer_of(name)) for name in names]
        counts = torch.tensor(sizes, device="cpu").to(device)
        of_param = torch.tensor(rows, device="cpu").to(device)
        self._rows = torch.repeat_interleave(of_param, counts)
        factors = [numel / max(size, 1) for numel, size in zip(numels, sizes, strict=True)]
        of_param = torch.tensor(factors, device="cpu").to(device)
        self._factors = torch.repeat_interleave(of_param, counts)

    def take(self) -> Tensor:
        """Return the sample of the present weights, in double precision if weights are, else single."""
        device = self._params[0].device
        kinds = {(p.dtype, p.device) for p in self._params}
        with torch.inference_mode(False), torch.no_grad():
            strided = zip(self._params, self._strides, strict=True)
            parts = [_entries(_values(p), stride) for p, stride in strided]
            if kinds != {(torch.float32, device)}:
                exact = any(part.dtype == torch.float64 for part in parts)
                dtype = torch.float64 if exact else torch.float32
                parts = [part.to(device, dtype) for part in parts]
            return torch.cat(parts)

    def norms(self, sample: Tensor) -> Tensor:
        """Return the norm of each layer, from a sample or a difference of two."""
        squares = self._factors * sample.square()
        zeros = torch.zeros(len(self.layers), device=sample.device, dtype=squares.dtype)
        return zeros.index_add(0, self._rows, squares).sqrt()


def _values(p: Tensor) -> Tensor:
    return real_view(local(p.detach()))


def _entries(values: Tensor, step: int) -> Tensor:
    """Return every ``step``-th entry, in any order, without a copy of the others."""
    if values.is_contiguous():
        return values.reshape(-1)[::step]
    if _dense(values):
        # In the order of the memory, since `reshape` would copy weights in channels_last.
        return values.as_strided((values.numel(),), (1,))[::step]
    places = torch.arange(0, values.numel(), step, device=values.device)
    return values[torch.unravel_index(places, values.shape)]


def _dense(values: Tensor) -> bool:
    """Return whether the entries fill a part of the memory, each place once."""
    expected = 1
    for stride, size in sorted(zip(values.stride(), values.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
