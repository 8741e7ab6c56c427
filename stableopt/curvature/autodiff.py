"""One step of reverse mode on a graph that is kept for the next product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dense", "flat", "pull"]


def pull(
    outputs: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    r"""Return the gradient of :math:`\sum_j\langle o_j, c_j\rangle` in each leaf, keeping the graph.

    ``None`` among outputs or cotangents, and outputs without a graph, are constants; a leaf that
    nothing depends on gets ``None``.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> pull([x**2, None], [x], [torch.ones(2), torch.ones(3)])
    (tensor([2., 4.]),)
    """
    live = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad and cotangent is not None
    ]
    if not live:
        return (None,) * len(leaves)
    heads, weights = zip(*live, strict=True)
    return torch.autograd.grad(heads, leaves, weights, retain_graph=True, allow_unused=True)


def dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with its zeros."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the tensors' entries in a row, zeros where there is none."""
    parts = [
        torch.zeros_like(t) if g is None else dense(g.detach())
        for g, t in zip(tensors, like, strict=True)
    ]
    return torch.cat([part.reshape(-1).to(like[0].dtype) for part in parts])
