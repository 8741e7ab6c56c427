"""Derivatives of functions of several tensors: `vjp`, `DoubleVjp` and `central_difference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = [
    "DoubleVjp",
    "central_difference",
    "dense",
    "displaced",
    "edge_of",
    "flat",
    "gradient_along",
    "saved_bytes",
    "vjp",
]

V = TypeVar("V", float, Tensor)

Function = Callable[[Sequence[Tensor]], Tensor]
"""A scalar function of several tensors."""


Output = Tensor | GradientEdge | None
"""A tensor with its autograd graph, or only its edge in the graph; ``None`` counts as a constant."""


def vjp(
    outputs: Sequence[Output],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    take: Callable[[int, Tensor], object] | None = None,
) -> tuple[Tensor | None, ...]:
    r"""Return the gradient of :math:`\sum_j\langle o_j, c_j\rangle` in each leaf, keeping the graph.

    Outputs or cotangents that are ``None``, and outputs without a graph, count as constants. The
    gradient in a leaf that no output depends on is ``None``.

    Args:
        outputs: the outputs o, or their edges (:func:`edge_of`).
        leaves: the leaves of the graph.
        cotangents: the cotangents c.
        take: called with the index of a leaf and its gradient as soon as that is computed, so that not
            all gradients are in memory at once. The gradients that it takes are returned as ``None``.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> vjp([x**2, None], [x], [torch.ones(2), torch.ones(3)])
    (tensor([2., 4.]),)
    >>> vjp([x**2], [x], [torch.ones(2)], take=lambda index, gradient: print(index, gradient))
    0 tensor([2., 4.])
    (None,)
    """
    if take is None:
        return _vjp(outputs, leaves, cotangents, create_graph=False)
    taken: set[int] = set()

    def take_gradient(index: int, gradient: Tensor) -> Tensor | None:
        if gradient.layout is not torch.strided:
            return None
        take(index, gradient)
        taken.add(index)
        return gradient.new_zeros(()).expand_as(gradient)  # autograd keeps what a hook returns

    hooks: list[Any] = []
    for index, leaf in enumerate(leaves):
        hook = partial(take_gradient, index)
        hooks.append(leaf.register_hook(hook))  # type: ignore[no-untyped-call]
    try:
        gradients = _vjp(outputs, leaves, cotangents, create_graph=False)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(None if index in taken else part for index, part in enumerate(gradients))


def edge_of(output: Tensor | None) -> Output:
    """Return the edge of ``output`` in its graph, which does not keep its numbers in memory.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> vjp([edge_of(x**2)], [x], [torch.ones(2)])
    (tensor([2., 4.]),)
    """
    if output is None or not output.requires_grad:
        return None
    return output if output.grad_fn is None else get_gradient_edge(output)


def _vjp(
    outputs: Sequence[Output],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    live = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None
        and (isinstance(output, GradientEdge) or (output is not None and output.requires_grad))
    ]
    if not live:
        return (None,) * len(leaves)
    live_outputs, live_cotangents = zip(*live, strict=True)
    return torch.autograd.grad(
        live_outputs,
        leaves,
        live_cotangents,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
    )


class DoubleVjp:
    r"""Jacobian-vector products by reverse mode only, which every module supports.

    :math:`J^\top u` is linear in u, so the gradient of :math:`\langle J^\top u, v\rangle` in u is
    :math:`Jv`.

    Args:
        outputs: the outputs, with their graphs; outputs without a graph count as constants.
        leaves: the tensors to differentiate in.
        dummies: u, zeros of the outputs' shapes that require gradients; made here if ``None``.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> DoubleVjp([x**2], [x]).jvp([torch.tensor([1.0, 10.0])])
    (tensor([ 2., 40.]),)
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        dummies: Sequence[Tensor] | None = None,
    ) -> None:
        self._dummies = (
            [torch.zeros_like(output, requires_grad=True) for output in outputs]
            if dummies is None
            else dummies
        )
        self._transposed_product = _vjp(outputs, leaves, self._dummies, create_graph=True)

    def jvp(self, tangent: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return the outputs' derivatives along ``tangent``; ``None`` for outputs that are constant."""
        return vjp(self._transposed_product, self._dummies, tangent)


def central_difference(function: Callable[[float], V], step: float) -> V:
    r"""Return :math:`(g(h) - g(-h))/2h`.

    >>> central_difference(lambda h: (1 + h) ** 2, 0.5)
    2.0
    """
    return (function(step) - function(-step)) / (2 * step)


def displaced(point: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> list[Tensor]:
    """Return ``point + step * direction``, as leaves that require gradients."""
    return [(t.detach() + step * d).requires_grad_() for t, d in zip(point, direction, strict=True)]


def gradient_along(
    function: Function,
    point: Sequence[Tensor],
    direction: Sequence[Tensor],
    as_one: Callable[[Sequence[Tensor | None], Sequence[Tensor]], Tensor] | None = None,
) -> Callable[[float], Tensor]:
    """Return the gradient ``(d,)`` of ``function`` as a function of the distance from ``point``.

    ``as_one`` makes one vector of the gradient's parts; by default, :func:`flat` does.

    >>> gradient = gradient_along(lambda x: x[0].square().sum(), [torch.zeros(2)], [torch.ones(2)])
    >>> gradient(0.5)
    tensor([1., 1.])
    """

    def gradient(distance: float) -> Tensor:
        leaves = displaced(point, direction, distance)
        parts = torch.autograd.grad(function(leaves), leaves, allow_unused=True)
        return (as_one or flat)(parts, leaves)

    return gradient


def dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in dense layout."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return ``tensors``, flattened and concatenated; ``None`` becomes zeros as in ``like``."""
    parts = [
        torch.zeros_like(t) if g is None else dense(g.detach())
        for g, t in zip(tensors, like, strict=True)
    ]
    return torch.cat([part.reshape(-1).to(like[0].dtype) for part in parts])


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the bytes that autograd saves for the backward pass of ``function``.

    >>> x = torch.ones(10, requires_grad=True)
    >>> saved_bytes(lambda: x.exp())
    40
    """
    # The tensors are kept alive, so that no address is reused.
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        # With its graph, the tensor would be in a cycle: the graph refers to this hook and its result.
        tensor = tensor.detach()
        # A sparse tensor has no storage itself; its indices and values have.
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            storages.setdefault(storage.data_ptr(), (part, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for _, size in storages.values())
