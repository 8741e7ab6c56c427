r"""`Convolution`: a convolution and its two adjoints, each with the other two as derivatives.

The trilinear form :math:`\langle\delta, w * x\rangle` has three derivatives: the convolution in
:math:`\delta`, its adjoint in x, and the gradient in w. The derivatives of each of them are the other
two. Torch's own second derivative is slower: it handles groups one by one, and otherwise uses a
convolution with a kernel as large as the feature map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Convolution"]

_FEW_POSITIONS = 4
"""Number of positions up to which a product with patches is faster than oneDNN's weight gradient."""

_will_run = getattr(torch._C, "_will_engine_execute_node", None)

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias, for inputs of a fixed shape.

    Attributes:
        inputs: the shape of the inputs, ``(n, channels, ...)``.
        kernel: the shape of the weight, ``(out, channels / groups, ...)``.
        stride: the stride in each dimension.
        padding: the number of zeros on each side, in each dimension.
        dilation: the dilation in each dimension.
        groups: the number of groups of channels.

    >>> convolution = Convolution((1, 1, 3), (1, 1, 2), (1,), (0,), (1,), 1)
    >>> convolution.out(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2))
    tensor([[[3., 5.]]])
    """

    inputs: torch.Size
    kernel: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out(self, x: Tensor, w: Tensor) -> Tensor:
        """Return :math:`w * x`."""
        output: Tensor = _Out.apply(self, x, w)  # type: ignore[no-untyped-call]
        return output

    def back(self, y: Tensor, w: Tensor) -> Tensor:
        """Return the gradient of :math:`⟨y, w * x⟩` in x."""
        gradient: Tensor = _Back.apply(self, y, w)  # type: ignore[no-untyped-call]
        return gradient

    def grad(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of :math:`⟨y, w * x⟩` in w."""
        gradient: Tensor = _Grad.apply(self, x, y)  # type: ignore[no-untyped-call]
        return gradient

    def by_sample(self, size: int) -> Convolution:
        """Return the grouped convolution that applies its own kernel to each of ``size`` samples."""
        channels = self.inputs[1]
        return replace(
            self,
            inputs=torch.Size((self.inputs[0] // size, size * channels, *self.inputs[2:])),
            kernel=torch.Size((size * self.kernel[0], *self.kernel[1:])),
            groups=size * self.groups,
        )

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches under the kernel at all positions, ``(n, groups, in, T)``: a linear map."""
        # One strided view for each kernel offset, so that the patches are copied once.
        padded = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        views = [padded[indices] for indices in self._offsets(padded)]
        rows = self.kernel[1] * len(views)
        return torch.stack(views, dim=2).reshape(len(x), self.groups, rows, -1)

    def spread(self, cotangent: Tensor) -> Tensor:
        """Return the adjoint of :meth:`patches`."""
        shape = self.inputs
        lengths = [length + 2 * p for length, p in zip(shape[2:], self.padding, strict=True)]
        padded = cotangent.new_zeros(*shape[:2], *lengths)
        offsets = self._offsets(padded)
        parts = cotangent.reshape(*shape[:2], len(offsets), -1)
        for number, indices in enumerate(offsets):
            view = padded[indices]
            view += parts[:, :, number].view_as(view)
        for axis, (length, p) in enumerate(zip(shape[2:], self.padding, strict=True), start=2):
            padded = padded.narrow(axis, p, length)
        return padded

    def _offsets(self, padded: Tensor) -> list[tuple[slice, ...]]:
        """Return, for each offset in the kernel, the indices of the inputs that it multiplies."""
        axes = []
        for length, kernel, stride, dilation in zip(
            padded.shape[2:], self.kernel[2:], self.stride, self.dilation, strict=True
        ):
            count = (length - dilation * (kernel - 1) - 1) // stride + 1
            starts = [k * dilation for k in range(kernel)]
            axes.append([slice(k, k + (count - 1) * stride + 1, stride) for k in starts])
        return [(slice(None), slice(None), *slices) for slices in product(*axes)]

    def _options(self) -> tuple[Any, ...]:
        none = [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, False, none, self.groups

    def _plain_out(self, x: Tensor, w: Tensor) -> Tensor:
        output: Tensor = torch.ops.aten.convolution.default(x, w, None, *self._options())
        return output

    def _plain_back(self, y: Tensor, w: Tensor) -> Tensor:
        like = y.new_empty(()).expand(self.inputs)
        gradient: Tensor = _backward(y, like, w, None, *self._options(), [True, False, False])[0]
        return gradient

    def _plain_grad(self, x: Tensor, y: Tensor) -> Tensor:
        positions = y[0, 0].numel()
        if self.groups == 1 and positions <= _FEW_POSITIONS:
            rows = y.flatten(2).transpose(0, 1).flatten(1)
            patches = self.patches(x).squeeze(1).transpose(0, 1).flatten(1)
            return (rows @ patches.T).view(self.kernel)
        like = y.new_empty(()).expand(self.kernel)
        gradient: Tensor = _backward(y, x, like, None, *self._options(), [False, True, False])[1]
        return gradient


def _needed(ctx: Any) -> tuple[bool, bool]:
    """Return whether the running backward pass needs the gradients in the first and second tensor.

    ``needs_input_grad`` is also true for tensors with a graph in which no derivative is taken now.
    """
    if _will_run is None:
        return ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    needed = []
    for has_graph, (node, _) in zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=True):
        try:
            needed.append(has_graph and _will_run(node))
        except RuntimeError:  # a leaf in which the gradient is taken
            needed.append(True)
    return needed[0], needed[1]


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, convolution: Convolution, x: Tensor, w: Tensor) -> Tensor:
        ctx.convolution = convolution
        ctx.save_for_backward(x, w)
        return convolution._plain_out(x, w)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (in_x, in_w), convolution = ctx.saved_tensors, _needed(ctx), ctx.convolution
        return (
            None,
            convolution.back(y, w) if in_x else None,
            convolution.grad(x, y) if in_w else None,
        )


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, convolution: Convolution, y: Tensor, w: Tensor) -> Tensor:
        ctx.convolution = convolution
        ctx.save_for_backward(y, w)
        return convolution._plain_back(y, w)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        (y, w), (in_y, in_w), convolution = ctx.saved_tensors, _needed(ctx), ctx.convolution
        return (
            None,
            convolution.out(x, w) if in_y else None,
            convolution.grad(x, y) if in_w else None,
        )


class _Grad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, convolution: Convolution, x: Tensor, y: Tensor) -> Tensor:
        ctx.convolution = convolution
        ctx.save_for_backward(x, y)
        return convolution._plain_grad(x, y)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (in_x, in_y), convolution = ctx.saved_tensors, _needed(ctx), ctx.convolution
        return (
            None,
            convolution.back(y, w) if in_x else None,
            convolution.out(x, w) if in_y else None,
        )
