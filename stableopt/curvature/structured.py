r"""Per-sample Hessian products of fully connected layers at the price of a few batched passes.

In a layer z = W a + b the gradient of sample i's loss is the outer product :math:`\delta_i a_i^\top`,
:math:`\delta_i` its gradient in z. Its derivative along v, that block of :math:`w_i = H_i v`, has rank
two, :math:`\dot\delta_i a_i^\top + \delta_i \dot a_i^\top`, and is never formed. What is wanted,

.. math:: \sum_i H_i (w_i - \bar w)
    = \nabla_\theta \sum_i \langle w_i - \bar w, \nabla f_i(\theta)\rangle,

is one backward pass from all :math:`a_i` and :math:`\delta_i`, with the cotangents

.. math::
    c^{\delta}_i &= \dot\delta_i \|a_i\|^2 + \delta_i \langle\dot a_i, a_i\rangle - \bar W a_i
        \;(+\, \dot\delta_i - \bar b), \\
    c^{a}_i &= a_i \langle\dot\delta_i, \delta_i\rangle + \dot a_i \|\delta_i\|^2
        - \bar W^\top \delta_i .

So an exact product costs a constant number of batched passes, whatever n is. Whatever lies between the
layers is autograd's business. It applies where every parameter that counts is the weight or the bias
of an ``nn.Linear`` that is called once, with one row a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stableopt.curvature.problem import Problem, Theta
from stableopt.curvature.pull import pull

__all__ = [
    "Layer",
    "LayerPasses",
    "LayerTangents",
    "UnfitError",
    "linear_layers",
    "linearise",
    "mean_from",
    "product_from",
    "tangents_along",
]


class Layer(NamedTuple):
    """An ``nn.Linear`` and where its weight and bias are among the problem's parameters."""

    module: nn.Linear
    weight: int | None
    bias: int | None


class LayerPasses(NamedTuple):
    """A chunk's passes at theta: per layer the inputs a and the slopes delta, with their graph.

    ``transposed`` are the gradients in theta of the sum of all <a, u> + <delta, w>. They are linear
    in the dummies u and w, so their derivative in the dummies along a tangent is the tangent of a
    and delta, without forward mode.
    """

    size: int
    inputs: list[Tensor]
    slopes: list[Tensor]
    dummies: list[Tensor]
    transposed: tuple[Tensor | None, ...]


class LayerTangents(NamedTuple):
    """The derivatives of a chunk's inputs and slopes along a tangent."""

    inputs: list[Tensor]
    slopes: list[Tensor]


class UnfitError(Exception):
    """The model turned out not to call its layers as the structure needs."""


def linear_layers(problem: Problem) -> list[Layer] | None:
    """Return the layers that hold the problem's parameters, or ``None`` if others hold some.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> [(layer.weight, layer.bias) for layer in linear_layers(problem)]
    [(0, 1), (2, 3)]
    """
    index = {id(p): i for i, p in enumerate(problem.params)}
    owners = Counter(id(p) for _, p in problem.model.named_parameters(remove_duplicate=False))
    layers = []
    for module in problem.model.modules():
        # A subclass, or a reparametrised module, may compute something else.
        if type(module) is nn.Linear:
            weight, bias = index.get(id(module.weight)), index.get(id(module.bias))
            if weight is not None or bias is not None:
                layers.append(Layer(module, weight, bias))
    held = [i for layer in layers for i in (layer.weight, layer.bias) if i is not None]
    shared = any(owners[id(p)] > 1 for p in problem.params)
    return None if shared or sorted(held) != list(range(len(problem.params))) else layers


def linearise(
    problem: Problem, layers: Sequence[Layer], theta: Theta, batch: Any, size: int
) -> LayerPasses:
    """Return the passes over a chunk of ``size`` samples at ``theta``.

    Raises:
        UnfitError: if a layer was not called exactly once with a row a sample.
    """
    inputs: dict[int, Tensor] = {}
    offsets: dict[int, Tensor] = {}
    handles = []
    for number, layer in enumerate(layers):

        def insert(module: Any, args: Any, output: Tensor, number: int = number) -> Tensor:
            if number in inputs or len(args) != 1 or args[0].dim() != 2 or len(args[0]) != size:
                raise UnfitError
            inputs[number] = args[0]
            offsets[number] = torch.zeros_like(output, requires_grad=True)
            return output + offsets[number]

        handles.append(layer.module.register_forward_hook(insert))
    try:
        loss = size * problem.loss(theta, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(inputs) != len(layers):
        raise UnfitError
    heads = [inputs[number] for number in range(len(layers))]
    leaves = [offsets[number] for number in range(len(layers))]
    slopes = list(torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True))
    dummies = [torch.zeros_like(t, requires_grad=True) for t in [*heads, *slopes]]
    transposed = _gradients([*heads, *slopes], theta, dummies)
    return LayerPasses(size, heads, slopes, dummies, transposed)


def _gradients(
    outputs: list[Tensor], leaves: Theta, weights: list[Tensor]
) -> tuple[Tensor | None, ...]:
    live = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    heads, cotangents = zip(*live, strict=True)
    return torch.autograd.grad(heads, leaves, cotangents, create_graph=True, allow_unused=True)


def tangents_along(passes: LayerPasses, tangent: Sequence[Tensor]) -> LayerTangents:
    """Return the derivatives of the chunk's inputs and slopes along ``tangent``."""
    found = pull(passes.transposed, passes.dummies, tangent)
    dotted = [
        torch.zeros_like(dummy) if dot is None else dot
        for dot, dummy in zip(found, passes.dummies, strict=True)
    ]
    half = len(passes.inputs)
    return LayerTangents(dotted[:half], dotted[half:])


def mean_from(
    layers: Sequence[Layer], passes: LayerPasses, tangents: LayerTangents
) -> list[Tensor]:
    """Return the mean of :math:`w_i` over the chunk, in the shapes of the parameters."""
    found: dict[int, Tensor] = {}
    for layer, a, delta, a_dot, delta_dot in _by_layer(layers, passes, tangents):
        if layer.weight is not None:
            found[layer.weight] = (delta_dot.T @ a + delta.T @ a_dot) / passes.size
        if layer.bias is not None:
            found[layer.bias] = delta_dot.sum(0) / passes.size
    return [found[index] for index in sorted(found)]


def product_from(
    layers: Sequence[Layer],
    theta: Theta,
    passes: LayerPasses,
    tangents: LayerTangents,
    mean: Sequence[Tensor],
    scale: Sequence[float],
) -> tuple[Tensor | None, ...]:
    r"""Return :math:`\sum_i H_i (D^2 w_i - m)` over the chunk, per parameter.

    Args:
        layers: the layers.
        theta: the point.
        passes: the chunk's passes there.
        tangents: the chunk's tangents along v.
        mean: m, in the shapes of the parameters.
        scale: the diagonal of D, a number for each parameter.
    """
    along_inputs: list[Tensor] = []
    along_slopes: list[Tensor] = []
    for layer, a, delta, a_dot, delta_dot in _by_layer(layers, passes, tangents):
        along_a, along_delta = torch.zeros_like(a), torch.zeros_like(delta)
        if layer.weight is not None:
            power, w_mean = scale[layer.weight] ** 2, mean[layer.weight]
            rank_two = a * _dot(delta_dot, delta) + a_dot * _dot(delta, delta)
            along_a += power * rank_two - delta @ w_mean
            rank_two = delta_dot * _dot(a, a) + delta * _dot(a_dot, a)
            along_delta += power * rank_two - a @ w_mean.T
        if layer.bias is not None:
            along_delta += scale[layer.bias] ** 2 * delta_dot - mean[layer.bias]
        along_inputs.append(along_a)
        along_slopes.append(along_delta)
    return pull([*passes.inputs, *passes.slopes], theta, [*along_inputs, *along_slopes])


def _by_layer(
    layers: Sequence[Layer], passes: LayerPasses, tangents: LayerTangents
) -> Iterator[tuple[Layer, Tensor, Tensor, Tensor, Tensor]]:
    """Yield each layer with its a, delta, and their tangents, none of them with a graph."""
    inputs, slopes = ([t.detach() for t in part] for part in (passes.inputs, passes.slopes))
    yield from zip(layers, inputs, slopes, tangents.inputs, tangents.slopes, strict=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each pair of rows, as a column."""
    return (left * right).sum(1, keepdim=True)
