r"""`Kind`: families of layers with a known structure; `plan`: the treatment of every parameter.

Per-sample gradients of a layer's parameters are bilinear in a *head* a, a function of the input, and in
the gradient in the output. A :class:`Kind` defines both for one family of modules, and lays them out for
:mod:`~stableopt.curvature.layers.bilinear`. A new family is one new subclass, added to ``KINDS``.

:func:`plan` assigns each parameter of a problem to the kind of its layer, or, for other modules, to a
*unit*: the module is called once for each sample, vectorised, with a copy of its parameters for each.
This takes memory in the size of these parameters alone.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product as grid
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.bilinear import ELEMENTWISE, LOOKUP, MATRIX, Form
from stableopt.curvature.problem.problem import Problem

__all__ = ["Kind", "Layer", "Plan", "plan"]


class Kind(abc.ABC):
    """A family of layers with a weight, a bias or both."""

    name: ClassVar[str]
    weight: ClassVar[Form] = MATRIX

    def fits(self, module: Any) -> bool:
        """Whether the structure holds for this module."""
        return True

    def head(self, module: Any, given: Tensor, size: int) -> Tensor:
        """Return the head, in which the weight's gradients are linear: a function of the input."""
        return given

    @abc.abstractmethod
    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        """Return ``head`` laid out for the form of the weight: a linear map."""

    def inputs_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        """Return the adjoint of :meth:`inputs`, in the head's ``shape``."""
        raise TypeError(f"the inputs of a kind {self.name!r} have no tangent")

    @abc.abstractmethod
    def slopes(self, module: Any, slope: Tensor, size: int) -> Tensor:
        """Return the gradient in the output as ``(n, F, T)``."""

    @abc.abstractmethod
    def slopes_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        """Return the inverse of :meth:`slopes`."""


class _FeaturesLast(Kind):
    """Features in the last dimension, positions between the samples' dimension and it.

    Positions that were merged into the leading dimension are assumed to be contiguous for each sample;
    the trial of the product detects other layouts.
    """

    def slopes(self, module: Any, slope: Tensor, size: int) -> Tensor:
        return _by_sample(slope, size, slope.shape[-1]).mT

    def slopes_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        return cotangent.mT.reshape(shape)


class _FeaturesSecond(Kind):
    """Features in the second dimension, positions after it."""

    def slopes(self, module: Any, slope: Tensor, size: int) -> Tensor:
        return _samples_first(slope, size).reshape(size, slope.shape[1], -1)

    def slopes_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        return cotangent.reshape(shape)


class _Linear(_FeaturesLast):
    name = "linear"

    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        return _by_sample(head, size, module.in_features).mT.unsqueeze(1)

    def inputs_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        return cotangent.squeeze(1).mT.reshape(shape)


class _Convolution(_FeaturesSecond):
    name = "convolution"

    def fits(self, module: Any) -> bool:
        return bool(module.padding_mode == "zeros")

    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        # One strided view for each offset in the kernel: the patches in one copy.
        if head.dim() != 2 + len(module.kernel_size):
            raise UnfitError("a convolution saw a sample without its batch")
        padded = F.pad(_samples_first(head, size), _padding(module))
        views = [padded[where] for where in _offsets(module, padded)]
        patches = torch.stack(views, dim=2)
        per_group = module.in_channels // module.groups
        return patches.reshape(size, module.groups, per_group * len(views), -1)

    def inputs_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        padding = _padding(module)
        grown = [s + b + a for s, b, a in zip(shape[2:], *_sides(padding), strict=True)]
        padded = cotangent.new_zeros(*shape[:2], *grown)
        offsets = _offsets(module, padded)
        spread = cotangent.reshape(*shape[:2], len(offsets), -1)
        for number, where in enumerate(offsets):
            view = padded[where]
            view += spread[:, :, number].view_as(view)
        for axis, (length, before) in enumerate(
            zip(shape[2:], _sides(padding)[0], strict=True), start=2
        ):
            padded = padded.narrow(axis, before, length)
        return padded


class _LayerNorm(_FeaturesLast):
    name = "normalisation"
    weight = ELEMENTWISE

    def head(self, module: Any, given: Tensor, size: int) -> Tensor:
        return F.layer_norm(given, module.normalized_shape, None, None, module.eps)

    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        return _by_sample(head, size, _numel(module.normalized_shape)).mT

    def inputs_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        return cotangent.mT.reshape(shape)

    def slopes(self, module: Any, slope: Tensor, size: int) -> Tensor:
        return self.inputs(module, slope, size)


class _GroupNorm(_FeaturesSecond):
    name = "normalisation"
    weight = ELEMENTWISE

    def head(self, module: Any, given: Tensor, size: int) -> Tensor:
        return F.group_norm(given, module.num_groups, None, None, module.eps)

    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        return self.slopes(module, head, size)

    def inputs_back(self, module: Any, cotangent: Tensor, shape: torch.Size) -> Tensor:
        return self.slopes_back(module, cotangent, shape)


class _BatchNorm_(_GroupNorm):  # noqa: N801 - the base class has the good name
    def head(self, module: Any, given: Tensor, size: int) -> Tensor:
        # In eval mode, with running statistics: the same affine map for all samples.
        return F.batch_norm(
            given, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
        )


class _InstanceNorm(_GroupNorm):
    def head(self, module: Any, given: Tensor, size: int) -> Tensor:
        return F.instance_norm(given, eps=module.eps)

    def fits(self, module: Any) -> bool:
        return not module.track_running_stats


class _Embedding(_FeaturesLast):
    name = "embedding"
    weight = LOOKUP

    def fits(self, module: Any) -> bool:
        # Other options depend on more than the sample, or change the table in the pass.
        return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse

    def inputs(self, module: Any, head: Tensor, size: int) -> Tensor:
        # The row for padding has no gradient: its positions are marked.
        words = (
            head if module.padding_idx is None else head.masked_fill(head == module.padding_idx, -1)
        )
        return _by_sample(words, size, 1).squeeze(2)

    def slopes(self, module: Any, slope: Tensor, size: int) -> Tensor:
        return _by_sample(slope, size, module.embedding_dim).mT


KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: _Linear(),
    nn.Conv1d: _Convolution(),
    nn.Conv2d: _Convolution(),
    nn.Conv3d: _Convolution(),
    nn.LayerNorm: _LayerNorm(),
    nn.GroupNorm: _GroupNorm(),
    nn.BatchNorm1d: _BatchNorm_(),
    nn.BatchNorm2d: _BatchNorm_(),
    nn.BatchNorm3d: _BatchNorm_(),
    nn.InstanceNorm1d: _InstanceNorm(),
    nn.InstanceNorm2d: _InstanceNorm(),
    nn.InstanceNorm3d: _InstanceNorm(),
    nn.Embedding: _Embedding(),
}
"""Kinds by exact class: a subclass, or a reparametrised module, may compute something else."""


@dataclass(frozen=True)
class Layer:
    """A module, its kind, and the indices of its parameters in the problem.

    Attributes:
        module: the module.
        kind: its kind, or ``None`` for a unit.
        indices: the index of each of its parameters that count, by name within the module.
    """

    module: nn.Module
    kind: Kind | None
    indices: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """The treatment of every parameter.

    Attributes:
        layers: the layers, structured ones and units.
        expanded: indices of parameters of modules with other modules inside, with a leading
            dimension of 1 for the samples: each sample gets a copy.
        ways: how each parameter is treated, by name.
        mapped: for each unit that was called, by its ``id``, which of its inputs have the samples as
            their first dimension.
    """

    layers: list[Layer]
    expanded: list[int]
    ways: dict[str, str]
    mapped: dict[int, list[bool]] = field(default_factory=dict)


def plan(problem: Problem) -> Plan | None:
    """Return the treatment of each of the problem's parameters, or ``None`` if some have none.

    >>> model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.PReLU(), nn.Flatten(), nn.Linear(3, 1))
    >>> problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2, 2), torch.zeros(4, 1)))
    >>> plan(problem).ways
    {'0.weight': 'convolution', '0.bias': 'convolution', '1.weight': 'vmap', '3.weight': 'linear', '3.bias': 'linear'}
    """  # noqa: E501 - a doctest's output
    if any(p.is_complex() for p in problem.params):
        return None
    index = {id(p): i for i, p in enumerate(problem.params)}
    layers: list[Layer] = []
    units: list[nn.Module] = []
    expanded: list[int] = []
    for module in problem.model.modules():
        held = _indices(module, index, recurse=False)
        if not held:
            continue
        kind = KINDS.get(type(module))
        if kind is not None and held.keys() <= {"weight", "bias"} and kind.fits(module):
            layers.append(Layer(module, kind, held))
        elif module is not problem.model and not _holds_others(module, index):
            units.append(module)
        elif all(problem.shapes[i][:1] == (1,) for i in held.values()):
            expanded += held.values()
        elif module is not problem.model:
            units.append(module)
        else:
            return None
    # A unit includes all modules inside it.
    inside = {id(m) for unit in units for m in unit.modules() if m is not unit}
    layers += [Layer(unit, None, _indices(unit, index, recurse=True)) for unit in units]
    layers = [layer for layer in layers if id(layer.module) not in inside]
    in_units = {i for layer in layers if layer.kind is None for i in layer.indices.values()}
    expanded = [i for i in expanded if i not in in_units]
    ways = dict.fromkeys(problem.names, "vmap")
    for layer in layers:
        for i in layer.indices.values():
            ways[problem.names[i]] = "vmap" if layer.kind is None else layer.kind.name
    reached = {i for layer in layers for i in layer.indices.values()} | set(expanded)
    return Plan(layers, expanded, ways) if len(reached) == len(problem.params) else None


def _indices(module: nn.Module, index: dict[int, int], *, recurse: bool) -> dict[str, int]:
    named = module.named_parameters(recurse=recurse)
    return {name: index[id(p)] for name, p in named if id(p) in index}


def _holds_others(module: nn.Module, index: dict[int, int]) -> bool:
    own = _indices(module, index, recurse=False)
    return len(_indices(module, index, recurse=True)) > len(own)


def _samples_first(tensor: Tensor, size: int) -> Tensor:
    if tensor.dim() < 2 or tensor.shape[0] != size:
        raise UnfitError(f"a layer saw {tuple(tensor.shape)} in a batch of {size} samples")
    return tensor


def _by_sample(tensor: Tensor, size: int, features: int) -> Tensor:
    """Return ``(n, T, F)``."""
    rows = tensor.shape[0] if tensor.dim() else 0
    if rows == 0 or rows % size:
        raise UnfitError(f"a layer saw {tuple(tensor.shape)} in a batch of {size} samples")
    return tensor.reshape(size, -1, features)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _padding(module: Any) -> list[int]:
    """Return the padding in the order of ``F.pad``: last dimension first, both sides."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if module.padding == "same":
        return list(module._reversed_padding_repeated_twice)
    return [side for p in reversed(module.padding) for side in (p, p)]


def _sides(padding: list[int]) -> tuple[list[int], list[int]]:
    return padding[-2::-2], padding[::-2]


def _offsets(module: Any, padded: Tensor) -> list[tuple[Any, ...]]:
    """Return, for each offset in the kernel, the index of the positions that it covers."""
    axes = []
    for length, kernel, stride, dilation in zip(
        padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        count = (length - dilation * (kernel - 1) - 1) // stride + 1
        axes.append(
            [
                slice(k * dilation, k * dilation + (count - 1) * stride + 1, stride)
                for k in range(kernel)
            ]
        )
    return [(slice(None), slice(None), *where) for where in grid(*axes)]
