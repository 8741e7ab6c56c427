r"""`Form`: how a sample's gradient in a parameter depends on a layer's input and slope.

With a the layer's input and :math:`\delta` the gradient of the sample's loss in its output, the
sample's gradient in a parameter is bilinear, :math:`g_i = \Phi(a_i, \delta_i)`, in one of four forms.
T counts positions: of a sequence, of a feature map, or of several uses of one parameter.

=============== =========================================== ===============================
form            a ``(n, ...)``, delta ``(n, ...)``          :math:`\Phi(a, \delta)`
=============== =========================================== ===============================
``MATRIX``      ``(groups, in, T)``, ``(groups, out, T)``   :math:`\sum_t \delta_t a_t^\top`
``ELEMENTWISE`` ``(F, T)``, ``(F, T)``                      :math:`\sum_t \delta_t a_t`
``LOOKUP``      row numbers ``(T,)``, ``(D, T)``            :math:`\sum_{t: a_t = r} \delta_t`
``PLAIN``       none, ``(F, T)``                            :math:`\sum_t \delta_t`
=============== =========================================== ===============================

The tangents :math:`\dot a, \dot\delta` along v give, per sample, the parameter's block of
:math:`w_i = H_i v`, :math:`w_i = \Phi(\dot a, \delta) + \Phi(a, \dot\delta)`, and the cotangents

.. math:: c^a = \partial_a \langle k_i, \Phi(a, \delta)\rangle, \qquad
    c^\delta = \partial_\delta \langle k_i, \Phi(a, \delta)\rangle, \qquad
    k_i = P w_i - \bar w,

with P a diagonal preconditioner, a number or a tensor of the parameter's shape. Each form decides
whether forming :math:`k_i` or avoiding it is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ELEMENTWISE", "LOOKUP", "MATRIX", "PLAIN", "Cotangents", "Form", "Uses"]


class Uses(NamedTuple):
    """Inputs and slopes of all uses of a parameter, one after the other along T; no graph.

    Slopes are ``(n, F, T)`` for every form, groups one after the other. ``None`` stands for missing
    inputs, and for the tangents of inputs that do not depend on the parameters.
    """

    inputs: Tensor | None
    slopes: Tensor
    input_tangents: Tensor | None
    slope_tangents: Tensor


class Cotangents(NamedTuple):
    """Cotangents in the shapes of inputs and slopes; ``None`` for inputs without a tangent."""

    inputs: Tensor | None
    slopes: Tensor


class Form(NamedTuple):
    r"""One bilinear dependence of a gradient on inputs and slopes.

    Attributes:
        name: the form's name.
        total: ``(uses, shape)`` -> the sum of :math:`w_i` over the samples, in the parameter's shape.
        cotangents: ``(uses, P, mean)`` -> the cotangents, with ``mean`` for :math:`\bar w`.
    """

    name: str
    total: Callable[[Uses, torch.Size], Tensor]
    cotangents: Callable[[Uses, Tensor | float, Tensor], Cotangents]


def _plain_total(uses: Uses, shape: torch.Size) -> Tensor:
    return uses.slope_tangents.sum(dim=(0, 2)).view(shape)


def _plain_cotangents(uses: Uses, scale: Tensor | float, mean: Tensor) -> Cotangents:
    deviation = uses.slope_tangents.sum(2) * _flat(scale) - mean.reshape(-1)
    return Cotangents(None, deviation.unsqueeze(2).expand_as(uses.slopes))


PLAIN = Form("plain", _plain_total, _plain_cotangents)
"""A bias, or a parameter that is copied for each sample."""


def _gains(uses: Uses) -> Tensor:
    """Return each sample's :math:`w_i`, ``(n, F)``."""
    assert uses.inputs is not None
    found = (uses.slope_tangents * uses.inputs).sum(2)
    if uses.input_tangents is not None:
        found = found + (uses.slopes * uses.input_tangents).sum(2)
    return found


def _elementwise_total(uses: Uses, shape: torch.Size) -> Tensor:
    return _gains(uses).sum(0).view(shape)


def _elementwise_cotangents(uses: Uses, scale: Tensor | float, mean: Tensor) -> Cotangents:
    assert uses.inputs is not None
    kernel = (_gains(uses) * _flat(scale) - mean.reshape(-1)).unsqueeze(2)
    along_inputs = None if uses.input_tangents is None else kernel * uses.slopes
    return Cotangents(along_inputs, kernel * uses.inputs)


ELEMENTWISE = Form("elementwise", _elementwise_total, _elementwise_cotangents)
"""The gain of a normalisation: one number for each feature."""


def _lookup_total(uses: Uses, shape: torch.Size) -> Tensor:
    assert uses.inputs is not None
    known = uses.inputs >= 0
    rows = (uses.slope_tangents * known.unsqueeze(1)).mT.reshape(-1, shape[1])
    return rows.new_zeros(shape).index_add_(0, uses.inputs.clamp(min=0).reshape(-1), rows)


def _lookup_cotangents(uses: Uses, scale: Tensor | float, mean: Tensor) -> Cotangents:
    indices = uses.inputs
    assert indices is not None
    # All positions that look up a row add to it.
    same = (indices.unsqueeze(1) == indices.unsqueeze(2)).to(uses.slopes.dtype)
    rows = indices.clamp(min=0)
    factor = scale[rows].mT if isinstance(scale, Tensor) else scale
    deviation = (uses.slope_tangents @ same) * factor - mean[rows].mT
    return Cotangents(None, deviation * (indices >= 0).unsqueeze(1))


LOOKUP = Form("lookup", _lookup_total, _lookup_cotangents)
"""The table of an embedding: indices have no tangent, and negative ones are ignored."""


def _matrix_total(uses: Uses, shape: torch.Size) -> Tensor:
    a, delta, a_dot, delta_dot = _grouped(uses)
    found = _sum_of_outer(delta_dot, a)
    if a_dot is not None:
        found = found + _sum_of_outer(delta, a_dot)
    return found.view(shape)


def _matrix_cotangents(uses: Uses, scale: Tensor | float, mean: Tensor) -> Cotangents:
    grouped = _grouped(uses)
    groups, inputs, positions = grouped.inputs.shape[1:]
    outputs = grouped.slopes.shape[2]
    shape = (groups, outputs, inputs)
    mean = mean.reshape(shape)
    factor = scale.reshape(shape) if isinstance(scale, Tensor) else scale
    if positions == 1 and groups == 1:
        found = _one_position(grouped, factor, mean[0])
    elif isinstance(factor, Tensor) or _kernel_is_cheaper(inputs, outputs, positions):
        found = _materialised(grouped, factor, mean)
    else:
        found = _by_positions(grouped, factor, mean)
    return Cotangents(found.inputs, found.slopes.reshape(uses.slopes.shape))


MATRIX = Form("matrix", _matrix_total, _matrix_cotangents)
"""A linear map at each position: fully connected layers, and convolutions by their patches."""


class _Grouped(NamedTuple):
    """Uses with inputs ``(n, groups, in, T)`` and slopes ``(n, groups, out, T)``."""

    inputs: Tensor
    slopes: Tensor
    input_tangents: Tensor | None
    slope_tangents: Tensor


def _grouped(uses: Uses) -> _Grouped:
    a, delta, a_dot, delta_dot = uses
    assert a is not None
    size, groups = a.shape[:2]
    shape = (size, groups, delta.shape[1] // groups, delta.shape[2])
    return _Grouped(a, delta.reshape(shape), a_dot, delta_dot.reshape(shape))


def _kernel_is_cheaper(inputs: int, outputs: int, positions: int) -> bool:
    """Whether a kernel for each sample costs less than the Gram matrices of the positions."""
    return inputs * outputs <= positions * (inputs + outputs)


def _materialised(uses: _Grouped, factor: Tensor | float, mean: Tensor) -> Cotangents:
    a, delta, a_dot, delta_dot = uses
    kernel = delta_dot @ a.mT
    if a_dot is not None:
        kernel += delta @ a_dot.mT
    kernel = kernel.mul_(factor).sub_(mean)
    return Cotangents(None if a_dot is None else kernel.mT @ delta, kernel @ a)


def _by_positions(uses: _Grouped, factor: float, mean: Tensor) -> Cotangents:
    a, delta, a_dot, delta_dot = uses
    along_slopes = delta_dot @ (a.mT @ a)
    along_inputs = None
    if a_dot is not None:
        along_slopes += delta @ (a_dot.mT @ a)
        along_inputs = a @ (delta_dot.mT @ delta) + a_dot @ (delta.mT @ delta)
        along_inputs = along_inputs.mul_(factor).sub_(mean.mT @ delta)
    return Cotangents(along_inputs, along_slopes.mul_(factor).sub_(mean @ a))


def _one_position(uses: _Grouped, factor: Tensor | float, mean: Tensor) -> Cotangents:
    # Rank two: inner products of rows instead of Gram matrices, and one large matrix product instead
    # of many small ones. A tensor for P becomes a part of the inner product.
    a, delta, delta_dot = (t.flatten(1) for t in (uses.inputs, uses.slopes, uses.slope_tangents))
    a_dot = None if uses.input_tangents is None else uses.input_tangents.flatten(1)
    if isinstance(factor, Tensor):
        factor = factor[0]

        def along_rows(left: Tensor, right: Tensor) -> Tensor:
            return (left * right) @ factor.T

        def along_columns(left: Tensor, right: Tensor) -> Tensor:
            return (left * right) @ factor
    else:

        def along_rows(left: Tensor, right: Tensor) -> Tensor:
            products: Tensor = torch.linalg.vecdot(left, right)
            return factor * products.unsqueeze(1)

        along_columns = along_rows
    along_slopes = delta_dot * along_rows(a, a)
    if a_dot is not None:
        along_slopes = along_slopes.addcmul_(delta, along_rows(a_dot, a))
    along_slopes = torch.addmm(along_slopes, a, mean.T, alpha=-1)
    if a_dot is None:
        return Cotangents(None, along_slopes)
    along_inputs = a * along_columns(delta_dot, delta)
    along_inputs = along_inputs.addcmul_(a_dot, along_columns(delta, delta))
    along_inputs = torch.addmm(along_inputs, delta, mean, alpha=-1)
    return Cotangents(along_inputs.view_as(uses.inputs), along_slopes)


def _sum_of_outer(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over samples and positions of outer products, ``(groups, out, in)``."""
    if left.shape[3] == 1 and left.shape[1] == 1:
        return left.flatten(1).T @ right.flatten(1)
    return (left @ right.mT).sum(0)


def _flat(scale: Tensor | float) -> Tensor | float:
    return scale.reshape(-1) if isinstance(scale, Tensor) else scale
