r"""`gram_of_layers`: the Gram matrix of output Jacobians of a fully connected network.

In a layer z = W a + b, output c's gradient for sample i is :math:`\delta_{ic} a_i^\top`, with
:math:`\delta_{ic}` its gradient in z. So the layer's part of the Gram matrix is the product, entry by
entry, of two small ones, :math:`(a_i^\top a_j + 1)\,(\delta_{ic}^\top\delta_{jc'})`. It takes C
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
is below it, the part that a wrong structure leaves out is above it."""


class Layer(NamedTuple):
    """A linear layer, and the indices of its parameters in the problem, by their names within it."""

    module: nn.Linear
    indices: dict[str, int]


class _Pass(NamedTuple):
    """For each layer, inputs ``(n, in)`` and slopes ``(n, C, out)``, in double precision."""

    inputs: list[Tensor]
    slopes: list[Tensor]


def fully_connected(problem: Problem, theta: Theta) -> list[Layer] | None:
    """Return the linear layers that hold all parameters, or ``None`` for other models.

    Checked against the rows themselves, on samples drawn over the data whose rows differ; each sample
    counts the same. Call it inside :meth:`Problem.evaluation`.
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
    lengths = rows.view(chosen[1], -1).norm(dim=1).repeat_interleave(len(rows) // chosen[1])
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    expected = scale.unsqueeze(1) * (rows @ rows.T) * scale
    tried = scale.unsqueeze(1) * _gram(problem, layers, [passes], Ranks()) * scale
    return layers if bool((tried - expected).norm() <= _AGREES * expected.norm()) else None


def _linear_layers(problem: Problem) -> list[Layer] | None:
    """Return the linear layers with a parameter that counts, or ``None`` if others have one."""
    index = {id(p): i for i, p in enumerate(problem.params)}
    layers, held = list[Layer](), set[int]()
    for module in problem.model.modules():
        named = module.named_parameters(recurse=False)
        indices = {name: index[id(p)] for name, p in named if id(p) in index}
        if not indices:
            continue
        # A subclass may compute something else.
        if type(module) is not nn.Linear or not indices.keys() <= {"weight", "bias"}:
            return None
        layers.append(Layer(module, indices))
        held |= set(indices.values())
    complex_ones = any(p.is_complex() for p in problem.params)
    return layers if len(held) == len(index) and not complex_ones else None


def gram_of_layers(problem: Problem, theta: Theta, layers: list[Layer]) -> Tensor | None:
    """Return the Gram matrix ``(nC, nC)``, or ``None`` if a layer was not called once with a batch.

    Call it inside :meth:`Problem.evaluation`.
    """

    def own() -> list[_Pass | None]:
        return [_passes(problem, theta, layers, batch, size) for batch, size in problem.chunks()]

    ranks = problem.ranks
    found = ranks.raise_together(own)
    fit = [passes for passes in found if passes is not None]
    if ranks.any(len(fit) < len(found)):
        return None
    return _gram(problem, layers, fit, ranks)


def _passes(
    problem: Problem, theta: Theta, layers: list[Layer], batch: Any, size: int
) -> _Pass | None:
    inputs: list[list[Tensor]] = [[] for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def hook(number: int) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[number].append(args[0])
            outputs[number].append(output)

        return take

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            handle = layer.module.register_forward_hook(hook(number))
            hooks.callback(handle.remove)
        result = problem.outputs(theta, batch)
    if not isinstance(result, Tensor) or any(len(uses) != 1 for uses in inputs):
        return None
    given = [uses[0] for uses in inputs]
    if any(a.dim() != 2 or a.shape[0] != size for a in given):
        return None
    roots = curvature_roots(problem, theta, batch, size)
    heads = [uses[0] for uses in outputs]
    # Samples do not see each other, so one pass from a sum over them has the slopes of each.
    columns = [
        torch.autograd.grad(
            column.sum(), heads, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for column in result.reshape(size, -1).unbind(1)
    ]
    slopes = [roots @ torch.stack(parts, dim=1).double() for parts in zip(*columns, strict=True)]
    return _Pass([a.detach().double() for a in given], slopes)


def _gram(problem: Problem, layers: list[Layer], passes: list[_Pass], ranks: Ranks) -> Tensor:
    """Return the Gram matrix of the samples of ``passes``, on all ``ranks``."""
    total = torch.zeros((), dtype=torch.float64, device=problem.device)
    for number, layer in enumerate(layers):
        inputs = ranks.all_gather(torch.cat([one.inputs[number] for one in passes]))
        slopes = ranks.all_gather(torch.cat([one.slopes[number] for one in passes]))
        n, outputs, _ = slopes.shape
        squares = {name: float(problem.scale[i]) ** 2 for name, i in layer.indices.items()}
        overlaps = squares.get("weight", 0.0) * (inputs @ inputs.T) + squares.get("bias", 0.0)
        rows = slopes.flatten(0, 1)
        part = (rows @ rows.T).view(n, outputs, n, outputs)
        part *= overlaps.view(n, 1, n, 1)
        total = total + part.view(n * outputs, n * outputs)
    return total
