r"""`Kind`: bilinear dependence of a layer's output on a parameter and its input.

A layer's output is :math:`z = B(w, a)`, bilinear in a parameter w and in a *head* a, a function of its
input. With :math:`\delta` the gradient of the loss in z, the trilinear form
:math:`\langle\delta, B(w, a)\rangle` has three derivatives, which each :class:`Kind` defines: in
:math:`\delta` (``out``), in a (``back``) and in w (``grad``), summed over all samples. ``outs``,
``backs`` and ``dense`` are the same with a separate w for each sample.

Inputs and outputs have the samples in the leading dimension, each with one row or with several adjacent
rows. The trial of the product detects other layouts.
"""

# ruff: noqa: D102 - the declaring class documents the methods
from __future__ import annotations

import abc
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature.layers.convolution import Convolution

__all__ = ["Bias", "Conv", "Copies", "Kind", "Linear", "Lookup", "Matrix"]


_FEW_POSITIONS = 256
"""Number of positions up to which per-sample kernel gradients are products with patches: for more,
oneDNN's gradient of a grouped convolution is faster and takes less memory."""


class Kind(abc.ABC):
    """A bilinear dependence of an output on a parameter. Heads are ``None`` for kinds without one."""

    @abc.abstractmethod
    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        """Return :math:`B(w, a)`, in the shape of ``like``."""

    @abc.abstractmethod
    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient in w, ``shape``, summed over the samples."""

    @abc.abstractmethod
    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        """Return the gradient in w of each of ``size`` samples."""

    @abc.abstractmethod
    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        """Return :math:`B(w_i, a_i)` for w ``(n, ...)``, in the shape of ``like``."""


class Copies(Kind):
    """A parameter with one copy for each sample: the slopes are the gradients in the copies."""

    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        return w.expand_as(like)

    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        return slope.sum(0)

    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        return slope

    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        return w


@dataclass(frozen=True)
class Bias(Kind):
    """One number for each feature, added at all positions.

    Attributes:
        axis: the dimension of the features in the output: 1, or the last.
    """

    axis: int

    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        return self.outs(w.unsqueeze(0), head, like)

    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        axis = self.axis % slope.dim()
        return slope.sum([d for d in range(slope.dim()) if d != axis])

    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        if self.axis == 1:
            return slope.reshape(size, -1, shape[0], slope[0, 0].numel()).sum((1, 3))
        return slope.reshape(size, -1, shape[0]).sum(1)

    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.axis] = -1
        values = w.view(len(w), *shape[1:])
        if len(w) in (1, len(like)):
            return values.expand_as(like)
        return values.repeat_interleave(len(like) // len(w), dim=0).expand_as(like)


@dataclass(frozen=True)
class Lookup(Kind):
    """Rows of a table ``(V, D)`` by their indices; a negative index stands for a row of zeros."""

    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        rows = w[head.clamp(min=0)] * (head >= 0).unsqueeze(-1)
        return rows.reshape(like.shape)

    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        assert head is not None
        rows = (slope * (head >= 0).unsqueeze(-1)).reshape(-1, shape[1])
        return rows.new_zeros(shape).index_add_(0, head.clamp(min=0).reshape(-1), rows)

    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        assert head is not None
        stacked_shape = torch.Size((size * shape[0], *shape[1:]))
        indices = self._stacked_indices(head, shape[0], size)
        return self.grad(indices, slope, stacked_shape).view(size, *shape)

    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        return self.out(w.flatten(0, 1), self._stacked_indices(head, w.shape[1], len(w)), like)

    def _stacked_indices(self, head: Tensor, rows: int, size: int) -> Tensor:
        """Return the indices into the samples' tables, stacked one below the other."""
        starts = torch.arange(0, size * rows, rows, device=head.device).view(size, 1)
        indices = head.reshape(size, -1)
        return torch.where(indices >= 0, indices + starts, indices).view(head.shape)


class Matrix(Kind):
    r"""A linear map at each position: :math:`g_i = \sum_t l_t r_t^\top`.

    l are rows of the slope and r rows of the head, or the reverse with ``head_is_left``.
    """

    head_is_left: bool

    @abc.abstractmethod
    def back(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        """Return the gradient in the head, in the shape of ``like``."""

    @abc.abstractmethod
    def backs(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        """Return the gradient in the head for w ``(n, ...)``."""

    @abc.abstractmethod
    def sizes(self, head: Tensor | None, slope: Tensor) -> tuple[int, int]:
        """Return the lengths of a row of the slope and of a row of the head, in one group."""

    @abc.abstractmethod
    def positions(self, head: Tensor | None, slope: Tensor, size: int) -> int:
        """Return the number of positions in one of ``size`` samples."""

    @abc.abstractmethod
    def head_rows(self, head: Tensor, size: int) -> Tensor:
        """Return the rows of the head ``(n * groups, T, F)``: a linear map."""

    @abc.abstractmethod
    def slope_rows(self, slope: Tensor, size: int) -> Tensor:
        """Return the rows of the slope ``(n * groups, T, F)``: a linear map."""

    @abc.abstractmethod
    def head_of(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the adjoint of :meth:`head_rows`, in the shape of ``like``."""

    @abc.abstractmethod
    def slope_of(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return the adjoint of :meth:`slope_rows`, in the shape of ``like``."""


class Linear(Matrix):
    """A linear map of the last dimension.

    Args:
        shape: the shape of the weight as a matrix; the parameter may have another shape.
        transposed: whether the matrix is ``(in, out)`` instead of ``(out, in)``.
    """

    def __init__(self, shape: torch.Size, *, transposed: bool) -> None:
        self.shape, self.head_is_left = shape, transposed

    def _map(self, w: Tensor) -> Tensor:
        """Return the matrix that multiplies rows from the right, ``(..., in, out)``."""
        return w if self.head_is_left else w.mT

    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        return head @ self._map(w.reshape(self.shape))

    def back(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        return slope @ self._map(w.reshape(self.shape)).mT

    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        assert head is not None
        rows, columns = slope.flatten(0, -2), head.flatten(0, -2)
        return (columns.T @ rows if self.head_is_left else rows.T @ columns).view(shape)

    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        assert head is not None
        rows, columns = self.slope_rows(slope, size), self.head_rows(head, size)
        gradients = columns.mT @ rows if self.head_is_left else rows.mT @ columns
        return gradients.view(size, *shape)

    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        kernels = self._map(w.reshape(len(w), *self.shape))
        return (self.head_rows(head, len(w)) @ kernels).view(like.shape)

    def backs(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        kernels = self._map(w.reshape(len(w), *self.shape)).mT
        return (self.slope_rows(slope, len(w)) @ kernels).view(like.shape)

    def sizes(self, head: Tensor | None, slope: Tensor) -> tuple[int, int]:
        assert head is not None
        return slope.shape[-1], head.shape[-1]

    def positions(self, head: Tensor | None, slope: Tensor, size: int) -> int:
        return slope.numel() // (slope.shape[-1] * size)

    def head_rows(self, head: Tensor, size: int) -> Tensor:
        return head.reshape(size, -1, head.shape[-1])

    def slope_rows(self, slope: Tensor, size: int) -> Tensor:
        return slope.reshape(size, -1, slope.shape[-1])

    def head_of(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def slope_of(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)


class Conv(Matrix):
    """A convolution, computed from patches where that is cheaper.

    Args:
        convolution: the convolution, for inputs of any shape.
        transposed: whether the head is the convolution's output, as for ``nn.ConvTranspose2d``.
    """

    def __init__(self, convolution: Convolution, *, transposed: bool) -> None:
        self.convolution, self.head_is_left = convolution, transposed

    def _at_inputs(self, head: Tensor, slope: Tensor) -> Convolution:
        inputs = slope if self.head_is_left else head
        return replace(self.convolution, inputs=inputs.shape)

    def out(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        conv = self._at_inputs(head, like)
        w = w.reshape(conv.kernel)
        return conv.back(head, w) if self.head_is_left else conv.out(head, w)

    def back(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        conv = self._at_inputs(like, slope)
        w = w.reshape(conv.kernel)
        return conv.out(slope, w) if self.head_is_left else conv.back(slope, w)

    def grad(self, head: Tensor | None, slope: Tensor, shape: torch.Size) -> Tensor:
        assert head is not None
        conv = self._at_inputs(head, slope)
        gradient = conv.grad(slope, head) if self.head_is_left else conv.grad(head, slope)
        return gradient.view(shape)

    def dense(self, head: Tensor | None, slope: Tensor, shape: torch.Size, size: int) -> Tensor:
        assert head is not None
        conv = self._at_inputs(head, slope)
        if conv.groups == 1 and self.positions(head, slope, size) <= _FEW_POSITIONS:
            rows, columns = self.slope_rows(slope, size), self.head_rows(head, size)
            gradients = columns.mT @ rows if self.head_is_left else rows.mT @ columns
            return gradients.view(size, *shape)
        conv = conv.by_sample(size)
        head, slope = _samples_to_channels(head, size), _samples_to_channels(slope, size)
        gradients = conv.grad(slope, head) if self.head_is_left else conv.grad(head, slope)
        return gradients.view(size, *shape)

    def outs(self, w: Tensor, head: Tensor | None, like: Tensor) -> Tensor:
        assert head is not None
        conv = self._at_inputs(head, like).by_sample(len(w))
        given, kernels = _samples_to_channels(head, len(w)), w.reshape(conv.kernel)
        outputs = conv.back(given, kernels) if self.head_is_left else conv.out(given, kernels)
        return _channels_to_samples(outputs, len(w), like)

    def backs(self, w: Tensor, slope: Tensor, like: Tensor) -> Tensor:
        conv = self._at_inputs(like, slope).by_sample(len(w))
        given, kernels = _samples_to_channels(slope, len(w)), w.reshape(conv.kernel)
        gradients = conv.out(given, kernels) if self.head_is_left else conv.back(given, kernels)
        return _channels_to_samples(gradients, len(w), like)

    def sizes(self, head: Tensor | None, slope: Tensor) -> tuple[int, int]:
        kernel = self.convolution.kernel
        outputs, patch = kernel[0] // self.convolution.groups, kernel[1:].numel()
        return (patch, outputs) if self.head_is_left else (outputs, patch)

    def positions(self, head: Tensor | None, slope: Tensor, size: int) -> int:
        outputs = head if self.head_is_left else slope
        assert outputs is not None
        return outputs[:, 0].numel() // size

    def head_rows(self, head: Tensor, size: int) -> Tensor:
        return self._output_rows(head, size) if self.head_is_left else self._patch_rows(head, size)

    def slope_rows(self, slope: Tensor, size: int) -> Tensor:
        return (
            self._patch_rows(slope, size) if self.head_is_left else self._output_rows(slope, size)
        )

    def head_of(self, rows: Tensor, like: Tensor) -> Tensor:
        return (
            self._from_output_rows(rows, like)
            if self.head_is_left
            else self._from_patch_rows(rows, like)
        )

    def slope_of(self, rows: Tensor, like: Tensor) -> Tensor:
        return (
            self._from_patch_rows(rows, like)
            if self.head_is_left
            else self._from_output_rows(rows, like)
        )

    def _output_rows(self, y: Tensor, size: int) -> Tensor:
        groups, each = self.convolution.groups, len(y) // size
        rows = y.reshape(size, each, groups, y.shape[1] // groups, -1)
        return rows.permute(0, 2, 1, 4, 3).reshape(size * groups, -1, rows.shape[3])

    def _from_output_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        groups = self.convolution.groups
        size, each, features = len(rows) // groups, like[0, 0].numel(), rows.shape[2]
        outputs = rows.reshape(size, groups, -1, each, features).permute(0, 2, 1, 4, 3)
        return outputs.reshape(like.shape)

    def _patch_rows(self, x: Tensor, size: int) -> Tensor:
        conv = replace(self.convolution, inputs=x.shape)
        patches, each = conv.patches(x), len(x) // size  # (rows, groups, in, T)
        if each == 1:
            return patches.flatten(0, 1).mT
        rows = patches.view(size, each, *patches.shape[1:]).permute(0, 2, 1, 4, 3)
        return rows.reshape(size * conv.groups, -1, patches.shape[2])

    def _from_patch_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        conv = replace(self.convolution, inputs=like.shape)
        size = len(rows) // conv.groups
        each, features = len(like) // size, rows.shape[2]
        patches = rows.view(size, conv.groups, each, -1, features).permute(0, 2, 1, 4, 3)
        return conv.spread(patches.reshape(len(like), conv.groups, features, -1))


def _samples_to_channels(tensor: Tensor, size: int) -> Tensor:
    """Return ``(n * k, C, ...)`` as ``(k, n * C, ...)``."""
    rows = tensor.reshape(size, -1, *tensor.shape[1:]).transpose(0, 1)
    return rows.reshape(rows.shape[0], size * tensor.shape[1], *tensor.shape[2:])


def _channels_to_samples(tensor: Tensor, size: int, like: Tensor) -> Tensor:
    """Return ``(k, n * C, ...)`` as ``(n * k, C, ...)``."""
    rows = tensor.reshape(tensor.shape[0], size, *like.shape[1:]).transpose(0, 1)
    return rows.reshape(like.shape)
