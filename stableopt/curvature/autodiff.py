"""Derivatives of functions of tensors: `vjp`, `DoubleVjp` and `central_difference`."""

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
"""A tensor with its graph, or its place in the graph alone; ``None`` counts as a constant."""


def vjp(
    outputs: Sequence[Output],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    take: Callable[[int, Tensor], object] | None = None,
) -> tuple[Tensor | None, ...]:
    r"""Return the gradient of :math:`\sum_j\langle o_j, c_j\rangle` in each leaf, keeping the graph.

    Outputs or cotangents that are ``None``, and outputs without a graph, count as constants. A leaf
    that no output depends on gets ``None``.

    Args:
        outputs: the outputs o, or their edges (:func:`edge_of`).
        leaves: the leaves of the graph.
        cotangents: c.
        take: called with the place of a leaf and its gradient as soon as that is known, so that not
            all of them are in memory at once. Leaves that it was called for get ``None``.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> vjp([x**2, None], [x], [torch.ones(2), torch.ones(3)])
    (tensor([2., 4.]),)
    >>> vjp([x**2], [x], [torch.ones(2)], take=lambda place, gradient: print(place, gradient))
    0 tensor([2., 4.])
    (None,)
    """
    if take is None:
        return _vjp(outputs, leaves, cotangents, create_graph=False)
    taken: set[int] = set()

    def instead(place: int, gradient: Tensor) -> Tensor | None:
        if gradient.layout is not torch.strided:
            return None
        take(place, gradient)
        taken.add(place)
        return gradient.new_zeros(()).expand_as(gradient)  # autograd keeps what a hook returns

    hooks: list[Any] = []
    for place, leaf in enumerate(leaves):
        hooks.append(leaf.register_hook(partial(instead, place)))  # type: ignore[no-untyped-call]
    try:
        found = _vjp(outputs, leaves, cotangents, create_graph=False)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(None if place in taken else part for place, part in enumerate(found))


def edge_of(output: Tensor | None) -> Output:
    """Return the place of ``output`` in its graph, which does not hold its numbers.

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
    heads, weights = zip(*live, strict=True)
    return torch.autograd.grad(
        heads, leaves, weights, retain_graph=True, create_graph=create_graph, allow_unused=True
    )


class DoubleVjp:
    r"""Jacobian-vector products by reverse mode alone, which every module supports.

    :math:`J^\top u` is linear in u, so its derivative in u, pulled back along v, is :math:`Jv`.

    Args:
        outputs: the outputs, with their graphs; those without one count as constants.
        leaves: the tensors to differentiate in.
        dummies: u, zeros that require gradients, in the outputs' shapes; made here if ``None``.

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
        self._transposed = _vjp(outputs, leaves, self._dummies, create_graph=True)

    def jvp(self, tangent: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return the outputs' derivatives along ``tangent``; ``None`` where they vanish."""
        return vjp(self._transposed, self._dummies, tangent)


def central_difference(function: Callable[[float], V], step: float) -> V:
    r"""Return :math:`(g(h) - g(-h))/2h`.

    >>> central_difference(lambda h: (1 + h) ** 2, 0.5)
    2.0
    """
    return (function(step) - function(-step)) / (2 * step)


def displaced(point: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> list[Tensor]:
    """Return ``point + step * direction`` as leaves that require gradients."""
    return [(t.detach() + step * d).requires_grad_() for t, d in zip(point, direction, strict=True)]


def gradient_along(
    function: Function,
    point: Sequence[Tensor],
    direction: Sequence[Tensor],
    as_one: Callable[[Sequence[Tensor | None], Sequence[Tensor]], Tensor] | None = None,
) -> Callable[[float], Tensor]:
    """Return the flat gradient ``(d,)`` of ``function`` as a function of the distance from ``point``.

    ``as_one`` makes another vector of the gradient's parts than :func:`flat` does.

    >>> slope = gradient_along(lambda at: at[0].square().sum(), [torch.zeros(2)], [torch.ones(2)])
    >>> slope(0.5)
    tensor([1., 1.])
    """

    def gradient(distance: float) -> Tensor:
        at = displaced(point, direction, distance)
        slopes = torch.autograd.grad(function(at), at, allow_unused=True)
        return (as_one or flat)(slopes, at)

    return gradient


def dense(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in dense layout."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the concatenation of ``tensors``, with zeros shaped as in ``like`` for ``None``."""
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
    # The tensors are held, or their addresses would be used again.
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        # With its graph a tensor would be in a cycle: the graph holds this hook, and what it returns.
        tensor = tensor.detach()
        # A sparse gradient has no storage of its own, but its indices and values have.
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            storages.setdefault(storage.data_ptr(), (part, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for _, size in storages.values())
