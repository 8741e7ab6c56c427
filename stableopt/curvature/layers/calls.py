"""`CALLS`: torch functions whose outputs depend on a parameter in a known way, by function.

Each takes the recorder and the arguments of the function. It returns the output, recorded, or
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


def _layer(
    recorder: Recorder,
    way: str,
    given: Tensor,
    weight: tuple[int, Matrix] | None,
    bias: Tensor | None,
    axis: int,
    plain: Callable[[Tensor | None], Tensor],
) -> Tensor:
    """Record a linear map of ``given`` with a bias; one or both are parameters.

    Args:
        recorder: the recorder.
        way: what to call it.
        given: the head.
        weight: the index of the weight, and the map; ``None`` if it does not count.
        bias: the bias.
        axis: the dimension of the features in the output.
        plain: from the bias, or none, to the output.
    """
    index = recorder.parameter(bias) if bias is not None and recorder.known(bias) else None
    apart = recorder.known(bias) and index is None
    output, slope = recorder.offset(plain(None if apart else bias))
    if weight is not None:
        number, kind = weight
        recorder.use(number, kind, recorder.head(given), slope, way)
    if index is not None:
        recorder.use(index, Bias(axis), None, slope, way)
    if apart:
        assert bias is not None
        if axis == 1:
            bias = recorder.any_call(Tensor.view, (bias, -1, *[1] * (output.dim() - 2)), {})
        output = recorder.any_call(torch.add, (output, bias), {})
    return output


def _rows(
    recorder: Recorder,
    given: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    plain: Callable[[Tensor | None], Tensor],
    *,
    flipped: bool,
) -> Any:
    """Record ``given @ matrix``, or with ``flipped`` the product with its transpose."""
    fits = given.dim() >= 2 and matrix.dim() == 2 and not recorder.known(given)
    found = recorder.matrix(matrix) if fits and recorder.known(matrix) else None
    if not fits or (found is None and recorder.known(matrix)):
        return NotImplemented
    if not recorder.leads("linear", given)[0]:
        return NotImplemented
    weight = None
    if found is not None:
        index, turned = found
        shape = matrix.mT.shape if turned else matrix.shape
        weight = index, Linear(shape, transposed=turned == flipped)
    return _layer(recorder, "linear", given, weight, bias, -1, plain)


def _linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _rows(
        recorder, input, weight, bias, lambda bias: F.linear(input, weight, bias), flipped=True
    )


def _matmul(recorder: Recorder, input: Tensor, other: Tensor) -> Any:
    def plain(bias: Tensor | None) -> Tensor:
        return input @ other

    return _rows(recorder, input, other, None, plain, flipped=False)


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

    return _rows(recorder, mat1, mat2, input, plain, flipped=False)


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
        steps, spread = _each(stride, dims), _each(dilation, dims)
        if padding == "same":
            pads = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
            if any(pad % 2 for pad in pads):  # one more zero at the end
                sides = [side for pad in reversed(pads) for side in (0, pad % 2)]
                input = F.pad(input, sides)
            padding = [pad // 2 for pad in pads]
        padding = _each(0 if padding == "valid" else padding, dims)
        of = Convolution(input.shape, weight.shape, steps, padding, spread, groups)
        return _convolved(recorder, index, of, input, weight, bias, transposed=False)

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
        steps, zeros, more, spread = (
            _each(given, dims) for given in (stride, padding, output_padding, dilation)
        )
        kernel = weight.shape[2:]
        sizes = [
            (length - 1) * s - 2 * p + d * (k - 1) + o + 1
            for length, s, p, d, k, o in zip(
                input.shape[2:], steps, zeros, spread, kernel, more, strict=True
            )
        ]
        shape = torch.Size((len(input), groups * weight.shape[1], *sizes))
        of = Convolution(shape, weight.shape, steps, zeros, spread, groups)
        return _convolved(recorder, index, of, input, weight, bias, transposed=True)

    return call


def _convolved(
    recorder: Recorder,
    index: int | None,
    of: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """Record a convolution, or its adjoint in the input; ``index`` is the weight's, if it counts."""
    convolve = of.back if transposed else of.out

    def plain(bias: Tensor | None) -> Tensor:
        return _with_bias(convolve(*_cast(input, weight)), bias)

    kind = None if index is None else (index, Conv(of, transposed=transposed))
    return _layer(recorder, "convolution", input, kind, bias, 1, plain)


def _index(recorder: Recorder, given: Tensor, weight: Tensor, dims: int) -> Any:
    """Return the weight's index, ``None`` if it does not count, or ``NotImplemented``."""
    if given.dim() != 2 + dims or recorder.known(given):
        return NotImplemented
    index = recorder.parameter(weight) if recorder.known(weight) else None
    if index is None and recorder.known(weight):
        return NotImplemented
    return index if recorder.leads("convolution", given)[0] else NotImplemented


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what autocast makes of the arguments of a convolution."""
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
    # Other options depend on more than the sample, or change the table in the pass.
    index = recorder.parameter(weight)
    if index is None or max_norm is not None or scale_grad_by_freq or sparse or input.dim() == 0:
        return NotImplemented
    rows = input
    if not recorder.leads("embedding", input)[0]:
        if len(input) != 1:
            return NotImplemented
        rows = input.expand(recorder.size, *input.shape[1:])  # the same for all samples
    output, slope = recorder.offset(F.embedding(rows, weight, padding_idx))
    if padding_idx is not None:
        # Its row has no gradient: its positions are marked.
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
"""Known calls: what modules compute, by what they call and not by their names."""
