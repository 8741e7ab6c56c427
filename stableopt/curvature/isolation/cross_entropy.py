r"""`lean_cross_entropy`: softmax cross-entropy with a memory-efficient second derivative.

The cross-entropy of one row of logits x, with :math:`\pi = \mathrm{softmax}(x)`, targets t of any
weights and :math:`m = \sum_c t_c`, has

.. math::
    \ell = -\sum_c t_c \log\pi_c, \qquad \nabla\ell = m\pi - t, \qquad
    \nabla^2\ell = m\,(\mathrm{diag}(\pi) - \pi\pi^\top).

Double backward through ``log_softmax`` saves about ten tensors of the logits' size. These formulas save
only the logits, and recompute :math:`\pi` for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["CUSTOM_FUNCTIONS", "LEAST", "lean_cross_entropy"]

LEAST = 2**17
"""Number of logits from which the formulas are used: for fewer, torch's own function is faster and its
copies are small."""

_BLOCK = {"cpu": 2**19}
"""Number of logits in a block: on a CPU 2 MiB, which fits into its cache; elsewhere 16 times as many."""

_NONE, _MEAN, _SUM = range(3)
"""torch's numbers for reductions."""


@dataclass(frozen=True)
class _Targets:
    r"""The targets t of all rows: :math:`t_i = a_i e_{y_i} + k_i s`, or probabilities.

    A row is a vector of logits along ``classes``. Tensors with one number a row have size 1 there.

    Attributes:
        classes: the dimension of the classes.
        mass: m of each row.
        index: y, or ``None`` for probabilities.
        share: a, the weight of class y.
        spread: s, a vector that all rows share, by broadcasting; ``None`` for zero.
        kept: k, which is 1, or 0 for an ignored row.
        probabilities: q, with :math:`t = q\,w + s`.
        factor: w, a number or a vector.
    """

    classes: int
    mass: Tensor
    index: Tensor | None = None
    share: Tensor | None = None
    spread: Tensor | None = None
    kept: Tensor | None = None
    probabilities: Tensor | None = None
    factor: Tensor | float = 1.0

    def rows(self, logits: Tensor) -> Iterator[tuple[_Targets, slice, int]]:
        """Yield ``(targets, slice, dimension)`` of blocks of rows."""
        others = [d for d in range(logits.dim()) if d != self.classes]
        if not others:
            yield self, slice(None), 0
            return
        along = max(others, key=lambda d: logits.shape[d])
        block_size = _BLOCK.get(logits.device.type, 16 * _BLOCK["cpu"])
        size = logits.shape[along]
        step = max(1, block_size * size // max(logits.numel(), 1))
        for start in range(0, size, step):
            block = slice(start, min(start + step, size))
            yield self._cut(along, block), block, along

    def _cut(self, along: int, block: slice) -> _Targets:
        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else _narrowed(t, along, block)

        return replace(
            self,
            mass=_narrowed(self.mass, along, block),
            index=part(self.index),
            share=part(self.share),
            kept=part(self.kept),
            probabilities=part(self.probabilities),
        )

    def dot(self, rows: Tensor) -> Tensor:
        r"""Return :math:`\sum_c t_c\,` ``rows`` of each row."""
        if self.index is None:
            assert self.probabilities is not None
            t = self.probabilities * self.factor
            t = t if self.spread is None else t + self.spread
            return (t * rows).sum(self.classes, keepdim=True)
        assert self.share is not None
        # The logits of an ignored row may be infinite or NaN.
        total = _masked_product(self.share, rows.gather(self.classes, self.index))
        if self.spread is not None:
            assert self.kept is not None
            spread = (self.spread * rows).sum(self.classes, keepdim=True)
            total = total + _masked_product(self.kept, spread)
        return total

    def subtract(self, rows: Tensor, by: Tensor) -> None:
        """Subtract ``by * t`` from ``rows``, in place; ``by`` has one number a row."""
        if self.index is None:
            assert self.probabilities is not None
            rows.sub_(self.probabilities * self.factor * by)
            if self.spread is not None:
                rows.sub_(self.spread * by)
            return
        assert self.share is not None
        rows.scatter_add_(self.classes, self.index, -self.share * by)
        if self.spread is not None:
            assert self.kept is not None
            rows.sub_(self.spread * (self.kept * by))

    def dense(self, like: Tensor) -> Tensor:
        """Return t itself, of the logits' shape."""
        targets = torch.zeros_like(like)
        self.subtract(targets, -torch.ones_like(self.mass))
        return targets


def _masked_product(weight: Tensor, value: Tensor) -> Tensor:
    """Return ``weight * value``, with 0 for zero weights also where the value is not finite."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def _narrowed(tensor: Tensor, along: int, block: slice) -> Tensor:
    if block == slice(None):
        return tensor
    return tensor.narrow(along, block.start, block.stop - block.start)


class _Losses(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: _Targets) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.targets = targets
        losses = torch.empty_like(targets.mass)
        for part, block, along in targets.rows(logits):
            logs = torch.log_softmax(_narrowed(logits, along, block), part.classes)
            _narrowed(losses, along, block).copy_(part.dot(logs).neg_())
        return losses

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, None]:
        (logits,) = ctx.saved_tensors
        return _Slopes.apply(logits, slopes, ctx.targets), None  # type: ignore[no-untyped-call]


class _Slopes(torch.autograd.Function):
    r"""The gradient :math:`g\,(m\pi - t)` of each row, where g is the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, slopes: Tensor, targets: _Targets) -> Tensor:
        ctx.save_for_backward(logits, slopes)
        ctx.targets = targets
        gradients = torch.empty_like(logits)
        for part, block, along in targets.rows(logits):
            out, g = _narrowed(gradients, along, block), _narrowed(slopes, along, block)
            out.copy_(torch.softmax(_narrowed(logits, along, block), part.classes))
            out.mul_(g * part.mass)
            part.subtract(out, g)
        return gradients

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logits, slopes = ctx.saved_tensors
        targets: _Targets = ctx.targets
        if torch.is_grad_enabled():  # a third derivative will be taken
            return (*_differentiable_backward(logits, slopes, cotangent, targets), None)
        in_logits = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        in_slopes = torch.empty_like(slopes) if ctx.needs_input_grad[1] else None
        for part, block, along in targets.rows(logits):
            x, u = _narrowed(logits, along, block), _narrowed(cotangent, along, block)
            pi = torch.softmax(x, part.classes)
            means = (pi * u).sum(part.classes, keepdim=True)
            if in_logits is not None:
                torch.mul(
                    pi.mul_(u - means),
                    _narrowed(slopes, along, block) * part.mass,
                    out=_narrowed(in_logits, along, block),
                )
            if in_slopes is not None:
                _narrowed(in_slopes, along, block).copy_(part.mass * means - part.dot(u))
        return in_logits, in_slopes, None


def _differentiable_backward(
    logits: Tensor, slopes: Tensor, cotangent: Tensor, targets: _Targets
) -> tuple[Tensor, Tensor]:
    """Return the same derivatives in a form that can be differentiated further."""
    pi = torch.softmax(logits, targets.classes)
    means = (pi * cotangent).sum(targets.classes, keepdim=True)
    in_logits = slopes * targets.mass * pi * (cotangent - means)
    products = (targets.dense(logits) * cotangent).sum(targets.classes, keepdim=True)
    return in_logits, targets.mass * means - products


CUSTOM_FUNCTIONS = (_Losses, _Slopes)
"""The custom functions. Their derivatives are exact, so the checks of derivatives trust them."""


def lean_cross_entropy(
    original: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy like ``original``, torch's own function, by formulas where they apply.

    They apply to single and double precision, plain reverse mode, and constant targets.

    >>> x, y = torch.randn(3, LEAST), torch.tensor([0, 4, -100])
    >>> own = torch._C._nn.cross_entropy_loss
    >>> torch.testing.assert_close(lean_cross_entropy(own, x, y), own(x, y, None, 1))
    """
    if logits.numel() < LEAST or not _formulas_apply(logits, target, weight):
        return original(logits, target, weight, reduction, ignore_index, label_smoothing)
    targets, divisor = _targets_and_divisor(logits, target, weight, ignore_index, label_smoothing)
    losses: Tensor = _Losses.apply(logits, targets)  # type: ignore[no-untyped-call]
    losses = losses.squeeze(targets.classes)
    if reduction == _NONE:
        return losses
    return losses.sum() / divisor if reduction == _MEAN else losses.sum()


_FULL = (torch.float32, torch.float64)


def _formulas_apply(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    # torch.func, vmap and forward mode need rules that the custom functions lack.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    constants = [t for t in (target, weight) if t is not None]
    if any(t.requires_grad for t in constants) or hasattr(logits, "device_mesh"):
        return False
    if logits.dtype not in _FULL or logits.dim() == 0 or logits.numel() == 0:
        return False
    shape = list(logits.shape)
    classes = shape.pop(1 if logits.dim() > 1 else 0)
    if weight is not None and (weight.shape != (classes,) or weight.dtype not in _FULL):
        return False
    if target.is_floating_point():
        return target.shape == logits.shape
    return target.dtype == torch.int64 and list(target.shape) == shape


def _targets_and_divisor(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[_Targets, Tensor | int]:
    """Return the targets of all rows, and the number by which their mean divides."""
    dim = 1 if logits.dim() > 1 else 0
    count = logits.shape[dim]
    shape = [1] * logits.dim()
    shape[dim] = count
    class_weights = None if weight is None else weight.to(logits.dtype).view(shape)
    spread = None
    if smoothing > 0:
        ones = logits.new_ones(shape) if class_weights is None else class_weights
        spread = ones * (smoothing / count)
    if target.is_floating_point():
        probabilities = target.to(logits.dtype)
        factor = (1.0 if class_weights is None else class_weights) * (1 - smoothing)
        mass = (probabilities * factor).sum(dim, keepdim=True)
        mass = mass if spread is None else mass + spread.sum()
        rows = logits.numel() // count
        return _Targets(dim, mass, spread=spread, probabilities=probabilities, factor=factor), rows
    index = target.unsqueeze(dim)
    kept = (index != ignore_index).to(logits.dtype)
    index = torch.where(index == ignore_index, torch.zeros_like(index), index)
    row_weights = kept if weight is None else kept * weight.to(logits.dtype)[index]
    share = row_weights * (1 - smoothing)
    mass = share if spread is None else share + kept * spread.sum()
    return _Targets(dim, mass, index, share, spread, kept), row_weights.sum()
