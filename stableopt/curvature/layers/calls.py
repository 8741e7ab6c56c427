"""`CALLS`: recorded versions of torch functions whose outputs depend on parameters in a known way.

Each takes the recorder and the arguments of the function. It returns the recorded output, or
``NotImplemented`` for arguments of another structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stableopt.curvature.layers.attention import self_attention
from stableopt.curvature.layers.convolution import Convolution
from stableopt.curvature.layers.kinds import Bias, Conv, Linear, Lookup, Matrix
from stableopt.curvature.layers.normalisation import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)
from stableopt.curvature.layers.recorder import Recorder

__all__ = ["CALLS"]


def _affine(
    recorder: Recorder,
    way: str,
    given: Tensor,
    weight: tuple[int, Matrix] | None,
    bias: Tensor | None,
    axis: int,
    plain: Callable[[Tensor | None], Tensor],
) -> Tensor:
    """Record a linear map of ``given`` plus a bias; weight, bias or both are parameters.

    Args:
        recorder: the recorder.
        way: the name of the treatment, for reports.
        given: the head.
        weight: the weight's index and kind; ``None`` if it is not one of the parameters.
        bias: the bias.
        axis: the dimension of the features in the output.
        plain: computes the output from the bias, or without one.
    """
    bias_index = recorder.parameter(bias) if bias is not None and recorder.known(bias) else None
    bias_is_computed = recorder.known(bias) and bias_index is None
    output, slope = recorder.offset(plain(None if bias_is_computed else bias))
    if weight is not None:
        weight_index, kind = weight
        recorder.use(weight_index, kind, recorder.head(given), slope, way)
    if bias_index is not None:
        recorder.use(bias_index, Bias(axis), None, slope, way)
    if bias_is_computed:
        assert bias is not None
        if axis == 1:
            bias = recorder.any_call(Tensor.view, (bias, -1, *[1] * (output.dim() - 2)), {})
        output = recorder.any_call(torch.add, (output, bias), {})
    return output


def _row_product(
    recorder: Recorder,
    given: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    plain: Callable[[Tensor | None], Tensor],
    *,
    flipped: bool,
) -> Any:
    """Record ``given @ matrix``, or with ``flipped`` the product with its transpose."""
    if given.dim() < 2 or matrix.dim() != 2 or recorder.known(given):
        return NotImplemented
    alias = recorder.matrix(matrix) if recorder.known(matrix) else None
    if alias is None and recorder.known(matrix):
        return NotImplemented
    if not recorder.batch_arguments("linear", given)[0]:
        return NotImplemented
    weight = None
    if alias is not None:
        index, is_transpose = alias
        shape = matrix.mT.shape if is_transpose else matrix.shape
        weight = index, Linear(shape, transposed=is_transpose == flipped)
    return _affine(recorder, "linear", given, weight, bias, -1, plain)


def _linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _row_product(
        recorder, input, weight, bias, lambda bias: F.linear(input, weight, bias), flipped=True
    )


def _matmul(recorder: Recorder, input: Tensor, other: Tensor) -> Any:
    def plain(bias: Tensor | None) -> Tensor:
        return input @ other

    return _row_product(recorder, input, other, None, plain, flipped=False)


def _addmm(
    recorder: Recorder,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented

    def plain(bias: Tensor | None) -> Tensor:
        return mat1 @ mat2 if bias is None else torch.addmm(bias, mat1, mat2)

    return _row_product(recorder, mat1, mat2, input, plain, flipped=False)


def _convolution(dims: int) -> Callable[..., Any]:
    def call(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        index = _index(recorder, input, weight, dims)
        if index is NotImplemented:
            return NotImplemented
        strides, dilations = _per_dimension(stride, dims), _per_dimension(dilation, dims)
        if padding == "same":
            pads = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            if any(pad % 2 for pad in pads):  # one more zero at the end
                sides = [side for pad in reversed(pads) for side in (0, pad % 2)]
                input = F.pad(input, sides)
            padding = [pad // 2 for pad in pads]
        padding = _per_dimension(0 if padding == "valid" else padding, dims)
        shapes = input.shape, weight.shape
        convolution = Convolution(*shapes, strides, padding, dilations, groups)
        return _convolved(recorder, index, convolution, input, weight, bias, transposed=False)

    return call


def _transposed_convolution(dims: int) -> Callable[..., Any]:
    def call(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        index = _index(recorder, input, weight, dims)
        if index is NotImplemented:
            return NotImplemented
        strides, paddings, output_paddings, dilations = (
            _per_dimension(value, dims) for value in (stride, padding, output_padding, dilation)
        )
        kernel = weight.shape[2:]
        sizes = [
            (length - 1) * s - 2 * p + d * (k - 1) + o + 1
            for length, s, p, d, k, o in zip(
                input.shape[2:], strides, paddings, dilations, kernel, output_paddings, strict=True
            )
        ]
        shape = torch.Size((len(input), groups * weight.shape[1], *sizes))
        convolution = Convolution(shape, weight.shape, strides, paddings, dilations, groups)
        return _convolved(recorder, index, convolution, input, weight, bias, transposed=True)

    return call


def _convolved(
    recorder: Recorder,
    index: int | None,
    convolution: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """Record a convolution, or its adjoint in the input, with the weight's ``index`` if it has one."""
    convolve = convolution.back if transposed else convolution.out

    def plain(bias: Tensor | None) -> Tensor:
        return _with_bias(convolve(*_autocast(input, weight)), bias)

    kind = None if index is None else (index, Conv(convolution, transposed=transposed))
    return _affine(recorder, "convolution", input, kind, bias, 1, plain)


def _index(recorder: Recorder, given: Tensor, weight: Tensor, dims: int) -> Any:
    """Return the weight's index, ``None`` if it is not a parameter, or ``NotImplemented``."""
    if given.dim() != 2 + dims or recorder.known(given):
        return NotImplemented
    index = recorder.parameter(weight) if recorder.known(weight) else None
    if index is None and recorder.known(weight):
        return NotImplemented
    return index if recorder.batch_arguments("convolution", given)[0] else NotImplemented


def _per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments of a convolution as autocast would cast them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _with_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return output
    return output + bias.to(output.dtype).view(-1, *[1] * (output.dim() - 2))


def _embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    # These options couple samples, change the table during the pass, or give sparse gradients.
    index = recorder.parameter(weight)
    if index is None or max_norm is not None or scale_grad_by_freq or sparse or input.dim() == 0:
        return NotImplemented
    rows = input
    if not recorder.batch_arguments("embedding", input)[0]:
        if len(input) != 1:
            return NotImplemented
        rows = input.expand(recorder.size, *input.shape[1:])  # all samples share the indices
    output, slope = recorder.offset(F.embedding(rows, weight, padding_idx))
    if padding_idx is not None:
        # The padding row has no gradient: -1 marks its positions.
        rows = rows.masked_fill(rows == padding_idx % len(weight), -1)
    recorder.use(index, Lookup(), recorder.head(rows), slope, "embedding")
    return output


def _getitem(recorder: Recorder, table: Tensor, where: Any) -> Any:
    lookup = isinstance(where, Tensor) and where.dtype == torch.int64 and table.dim() == 2
    if not lookup or not recorder.known(table) or recorder.known(where):
        return NotImplemented
    return _embedding(recorder, where, table)


CALLS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    F.multi_head_attention_forward: partial(self_attention, _linear),
}
"""The recorded version of each function. Modules are recognised by the functions that they call."""
