"""`Objective`: the closure's loss as a function of the flat vector of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt._support.tensors import as_tensor

__all__ = ["FlatKind", "Objective", "flat_kind", "largest", "wide_dot"]


def largest(vector: Tensor) -> Tensor:
    """Return the largest absolute entry, or NaN if an entry is NaN, in a single pass.

    >>> largest(torch.tensor([1.0, -3.0]))
    tensor(3.)
    """
    minimum, maximum = torch.aminmax(vector)
    return torch.maximum(maximum, -minimum)


def wide_dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of two vectors; half-precision vectors are multiplied in float32.

    Squares of float16 overflow from 256 on and underflow below 2e-4.

    >>> wide_dot(torch.full((2,), 300.0).half(), torch.full((2,), 300.0).half())
    tensor(180000.)
    """
    if one.dtype in (torch.float16, torch.bfloat16):
        return one.float().dot(other.float())
    return one.dot(other)


class FlatKind(NamedTuple):
    """Length, dtype and device of a flat vector."""

    size: int
    dtype: torch.dtype
    device: torch.device


def flat_kind(params: Sequence[Tensor]) -> FlatKind | None:
    """Return length, dtype and device of the flat gradient of ``params``; ``None`` if it is empty.

    Raises:
        ValueError: for parameters on several devices.

    >>> flat_kind([torch.zeros(2), torch.zeros(3, dtype=torch.complex128)])
    FlatKind(size=8, dtype=torch.float64, device=device(type='cpu'))
    """
    views = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    devices = sorted({str(view.device) for view in views})
    if len(devices) > 1:
        raise ValueError(f"parameters are on {' and '.join(devices)}: expected one device")
    size = sum(view.numel() for view in views)
    if not size:
        return None
    dtype = reduce(torch.promote_types, (view.dtype for view in views))
    return FlatKind(size, dtype, views[0].device)


class Objective:
    r"""The loss of a closure f, with sign and weight decay of the parameter groups:

    .. math:: \pm f(x) + \sum_g \tfrac{\lambda_g}{2} \|x_g\|^2,

    with minus for ``maximize``. Complex parameters are pairs of real ones, and a missing gradient is
    zero.

    Args:
        closure: computes the gradients and returns the loss.
        groups: the optimizer's groups of parameters.
        reduce_loss: maps the detached loss to the number to compare, such as its mean over ranks.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        groups: Sequence[dict[str, Any]],
        reduce_loss: Callable[[Tensor], Any] | None,
    ) -> None:
        self._closure = torch.enable_grad()(closure)
        self._reduce_loss = reduce_loss
        self._groups = groups
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._views = [torch.view_as_real(p) if p.is_complex() else p for p in self.params]
        self.dtype = reduce(torch.promote_types, (view.dtype for view in self._views))
        self._decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        self.evaluations = 0
        self.first_returned: Any = None

    def evaluate(self) -> tuple[Any, Tensor]:
        """Call the closure; return the loss, a 0-dimensional tensor or a float, and its gradient."""
        loss = self._closure()
        if not self.evaluations:
            self.first_returned = loss
        self.evaluations += 1
        if loss is None:
            raise TypeError("closure returned None: expected the loss")
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"closure returned a loss of shape {tuple(loss.shape)}: expected a scalar"
                )
            loss = loss.detach().reshape(())
        if self._reduce_loss is not None:
            loss = self._reduce_loss(as_tensor(loss, device=self.params[0].device))
        gradient = self._gradient()
        if self._groups[0]["maximize"]:
            loss, gradient = -loss, gradient.neg_()
        if any(self._decays):
            loss = loss + self._penalty(gradient)
        return loss, gradient

    def _gradient(self) -> Tensor:
        parts = []
        for p, view in zip(self.params, self._views, strict=True):
            if p.grad is None:
                parts.append(view.new_zeros(view.numel()))
                continue
            grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            parts.append((torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1))
        return torch.cat(parts)

    def _penalty(self, gradient: Tensor) -> Tensor:
        """Add the gradient of the weight decay to ``gradient``; return its loss."""
        total = gradient.new_zeros(())
        for part, view, decay in zip(self.split(gradient), self._views, self._decays, strict=True):
            if decay:
                part.add_(view, alpha=decay)
                total += 0.5 * decay * view.square().sum()
        return total

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a flat vector's part for each parameter, in the parameter's shape."""
        parts = torch.split(vector, [view.numel() for view in self._views])
        return [part.view(view.shape) for part, view in zip(parts, self._views, strict=True)]

    def position(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [view.clone(memory_format=torch.contiguous_format) for view in self._views]

    def restore(self, position: list[Tensor]) -> None:
        """Set the parameters to a :meth:`position`."""
        torch._foreach_copy_(self._views, position)

    def move(self, direction: Tensor, t: Any) -> None:
        """Add t times the flat ``direction`` to the parameters."""
        torch._foreach_add_(self._views, self.split(direction), alpha=float(t))

    def stays_finite(self, length: float, position: list[Tensor] | None = None) -> bool:
        """Return whether parameters at ``position`` stay finite if none moves by more than ``length``.

        A length below the rounding of the largest finite number is safe without a look at the
        parameters, and almost all are.
        """
        for tensor in position or self._views:
            limits = torch.finfo(tensor.dtype)
            safe = length <= limits.max * limits.eps / 4
            if not safe and tensor.numel() and not float(largest(tensor)) + length <= limits.max:
                return False
        return True

    def versions(self) -> list[tuple[int, int]]:
        """Return addresses and version counters, by which writes of others are detected."""
        return [(p.data_ptr(), p._version) for p in self.params]
