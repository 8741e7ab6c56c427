r"""`gram_of_layers`: the Gram matrix of the output Jacobians of a fully connected network.

In a layer z = W a + b, the gradient of output c of sample i in W is :math:`\delta_{ic} a_i^\top`, with
:math:`\delta_{ic}` its gradient in z. The layer's part of the Gram matrix is therefore the entrywise
product of two small matrices, :math:`(a_i^\top a_j + 1)\,(\delta_{ic}^\top\delta_{jc'})`. It takes C
backward passes over all samples at once, and no Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stableopt.curvature.gram.jacobian import curvature_roots, sample_rows
from stableopt.curvature.problem.over_chunks import distinct_samples, drawn_samples
from stableopt.curvature.problem.problem import Problem, Theta
from stableopt.distributed.collectives import Ranks

__all__ = ["fully_connected", "gram_of_layers"]

_AGREES = 1e-3
"""Relative difference up to which two computations of a Gram matrix agree: rounding in single precision
stays below, a wrong structure is above."""


class Layer(NamedTuple):
    """A linear layer, and the indices of its parameters in the problem, by their names in the layer."""

    module: nn.Linear
    indices: dict[str, int]


class _Pass(NamedTuple):
    """Inputs ``(n, in)`` and slopes ``(n, C, out)`` of each layer, in double precision."""

    inputs: list[Tensor]
    slopes: list[Tensor]


def fully_connected(problem: Problem, theta: Theta) -> list[Layer] | None:
    """Return the linear layers if they hold all parameters, else ``None``.

    Their Gram matrix is checked against :func:`sample_rows`, on samples drawn over the data whose rows
    differ, each with the same weight. Call it inside :meth:`Problem.evaluation`.
    """
    layers = _linear_layers(problem)
    if layers is None or not all(isinstance(factor, float) for factor in problem.scale):
        return None

    def rows_of(batch: Any, size: int) -> Tensor:
        return torch.cat(sample_rows(problem, theta, batch, size), dim=2).flatten(0, 1).double()

    chosen = distinct_samples(drawn_samples(problem), lambda sample: rows_of(sample, 1).flatten())
    passes = None if chosen is None else _passes(problem, theta, layers, *chosen)
    if chosen is None or passes is None:
        return None
    rows = rows_of(*chosen)
    norms = rows.view(chosen[1], -1).norm(dim=1).repeat_interleave(len(rows) // chosen[1])
    weights = torch.where(norms > 0, 1 / norms, 0.0)
    expected = weights.unsqueeze(1) * (rows @ rows.T) * weights
    computed = weights.unsqueeze(1) * _gram(problem, layers, [passes], Ranks()) * weights
    return layers if bool((computed - expected).norm() <= _AGREES * expected.norm()) else None


def _linear_layers(problem: Problem) -> list[Layer] | None:
    """Return the linear layers; ``None`` if others hold parameters too, or a parameter is complex."""
    index = {id(p): i for i, p in enumerate(problem.params)}
    layers, found_indices = list[Layer](), set[int]()
    for module in problem.model.modules():
        named = module.named_parameters(recurse=False)
        indices = {name: index[id(p)] for name, p in named if id(p) in index}
        if not indices:
            continue
        # A subclass may compute something else.
        if type(module) is not nn.Linear or not indices.keys() <= {"weight", "bias"}:
            return None
        layers.append(Layer(module, indices))
        found_indices |= set(indices.values())
    if len(found_indices) < len(index) or any(p.is_complex() for p in problem.params):
        return None
    return layers


def gram_of_layers(problem: Problem, theta: Theta, layers: list[Layer]) -> Tensor | None:
    """Return the Gram matrix ``(nC, nC)``; ``None`` unless each layer is called once, with a batch.

    Call it inside :meth:`Problem.evaluation`.
    """

    def passes_of_chunks() -> list[_Pass | None]:
        return [_passes(problem, theta, layers, batch, size) for batch, size in problem.chunks()]

    ranks = problem.ranks
    passes_or_none = ranks.raise_together(passes_of_chunks)
    passes = [chunk for chunk in passes_or_none if chunk is not None]
    if ranks.any(len(passes) < len(passes_or_none)):
        return None
    return _gram(problem, layers, passes, ranks)


def _passes(
    problem: Problem, theta: Theta, layers: list[Layer], batch: Any, size: int
) -> _Pass | None:
    inputs: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def recording_hook(number: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[number].append(args[0])
            outputs[number].append(output)

        return record

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            handle = layer.module.register_forward_hook(recording_hook(number))
            hooks.callback(handle.remove)
        result = problem.outputs(theta, batch)
    if not isinstance(result, Tensor) or any(len(uses) != 1 for uses in inputs):
        return None
    layer_inputs = [uses[0] for uses in inputs]
    if any(a.dim() != 2 or a.shape[0] != size for a in layer_inputs):
        return None
    roots = curvature_roots(problem, theta, batch, size)
    layer_outputs = [uses[0] for uses in outputs]
    # Samples are independent: the gradient of a sum over samples holds each sample's gradient.
    columns = [
        torch.autograd.grad(
            column.sum(),
            layer_outputs,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for column in result.reshape(size, -1).unbind(1)
    ]
    slopes = [roots @ torch.stack(parts, dim=1).double() for parts in zip(*columns, strict=True)]
    return _Pass([a.detach().double() for a in layer_inputs], slopes)


def _gram(problem: Problem, layers: list[Layer], passes: list[_Pass], ranks: Ranks) -> Tensor:
    """Return the Gram matrix of the samples of ``passes``, gathered from all ``ranks``."""
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    for number, layer in enumerate(layers):
        inputs = ranks.all_gather(torch.cat([chunk.inputs[number] for chunk in passes]))
        slopes = ranks.all_gather(torch.cat([chunk.slopes[number] for chunk in passes]))
        n, outputs, _ = slopes.shape
        squares = {name: float(problem.scale[i]) ** 2 for name, i in layer.indices.items()}
        overlaps = squares.get("weight", 0.0) * (inputs @ inputs.T) + squares.get("bias", 0.0)
        rows = slopes.flatten(0, 1)
        part = (rows @ rows.T).view(n, outputs, n, outputs)
        part *= overlaps.view(n, 1, n, 1)
        total = total + part.view(n * outputs, n * outputs)
    return total
