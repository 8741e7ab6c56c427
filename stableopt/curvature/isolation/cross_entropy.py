r"""`lean_cross_entropy`: softmax cross-entropy whose second derivative keeps few copies of the logits.

The cross-entropy of one row of logits x, with :math:`\pi = \mathrm{softmax}(x)`, targets t of any
weights and :math:`m = \sum_c t_c`, has

.. math::
    \ell = -\sum_c t_c \log\pi_c, \qquad \nabla\ell = m\pi - t, \qquad
    \nabla^2\ell = m\,(\mathrm{diag}(\pi) - \pi\pi^\top).

Double backward through ``log_softmax`` keeps about ten tensors of the logits' size. These formulas need
the logits alone, and compute :math:`\pi` again, for one block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["LEAST", "OWN", "lean_cross_entropy"]

LEAST = 2**17
"""Logits from which the formulas are used: for fewer, torch's own function is faster, and its copies are
small."""

_BLOCK = {"cpu": 2**19}
"""Logits in a block: on a CPU 2 MiB, which its cache holds; elsewhere 16 times as many."""

_NONE, _MEAN, _SUM = range(3)
"""torch's numbers for reductions."""


@dataclass(frozen=True)
class _Targets:
    r"""The targets t of all rows: :math:`t_i = a_i e_{y_i} + k_i s`, or probabilities.

    Rows lie along all dimensions but ``classes``; tensors of one number a row keep that as 1.

    Attributes:
        classes: the dimension of the classes.
        mass: m of each row.
        index: y, or ``None`` for probabilities.
        share: a, the weight of class y.
        spread: s, the same for all rows: a vector that broadcasts over them; ``None`` for zero.
        kept: k, one, or zero for a row that is ignored.
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
        """Yield blocks of the rows: their targets, and where they are, in which dimension."""
        others = [d for d in range(logits.dim()) if d != self.classes]
        if not others:
            yield self, slice(None), 0
            return
        along = max(others, key=lambda d: logits.shape[d])
        most = _BLOCK.get(logits.device.type, 16 * _BLOCK["cpu"])
        size = logits.shape[along]
        step = max(1, most * size // max(logits.numel(), 1))
        for start in range(0, size, step):
            where = slice(start, min(start + step, size))
            yield self._cut(along, where), where, along

    def _cut(self, along: int, where: slice) -> _Targets:
        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else _part(t, along, where)

        mass = _part(self.mass, along, where)
        return _Targets(
            self.classes,
            mass,
            part(self.index),
            part(self.share),
            self.spread,
            part(self.kept),
            part(self.probabilities),
            self.factor,
        )

    def dot(self, rows: Tensor) -> Tensor:
        r"""Return :math:`\sum_c t_c\,` ``rows`` of each row."""
        if self.index is None:
            assert self.probabilities is not None
            t = self.probabilities * self.factor
            t = t if self.spread is None else t + self.spread
            return (t * rows).sum(self.classes, keepdim=True)
        assert self.share is not None
        # Where a row is ignored, its logits may be anything.
        found = _times(self.share, rows.gather(self.classes, self.index))
        if self.spread is not None:
            assert self.kept is not None
            spread = (self.spread * rows).sum(self.classes, keepdim=True)
            found = found + _times(self.kept, spread)
        return found

    def subtract(self, rows: Tensor, by: Tensor) -> None:
        """Subtract ``by``, a number for each row, times t from ``rows``, in place."""
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
        found = torch.zeros_like(like)
        self.subtract(found, -torch.ones_like(self.mass))
        return found


def _times(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def _part(tensor: Tensor, along: int, where: slice) -> Tensor:
    if where == slice(None):
        return tensor
    return tensor.narrow(along, where.start, where.stop - where.start)


class _Losses(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: _Targets) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.targets = targets
        losses = torch.empty_like(targets.mass)
        for part, where, along in targets.rows(logits):
            logs = torch.log_softmax(_part(logits, along, where), part.classes)
            _part(losses, along, where).copy_(part.dot(logs).neg_())
        return losses

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, None]:
        (logits,) = ctx.saved_tensors
        return _Slopes.apply(logits, slopes, ctx.targets), None  # type: ignore[no-untyped-call]


class _Slopes(torch.autograd.Function):
    r"""The gradient :math:`g\,(m\pi - t)` of each row, g being the slope that arrives."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, slopes: Tensor, targets: _Targets) -> Tensor:
        ctx.save_for_backward(logits, slopes)
        ctx.targets = targets
        found = torch.empty_like(logits)
        for part, where, along in targets.rows(logits):
            out, g = _part(found, along, where), _part(slopes, along, where)
            out.copy_(torch.softmax(_part(logits, along, where), part.classes))
            out.mul_(g * part.mass)
            part.subtract(out, g)
        return found

    @staticmethod
    def backward(ctx: Any, along_found: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        logits, slopes = ctx.saved_tensors
        targets: _Targets = ctx.targets
        if torch.is_grad_enabled():  # a third derivative will be taken
            return (*_bent(logits, slopes, along_found, targets), None)
        bent = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        pushed = torch.empty_like(slopes) if ctx.needs_input_grad[1] else None
        for part, where, along in targets.rows(logits):
            x, u = _part(logits, along, where), _part(along_found, along, where)
            pi = torch.softmax(x, part.classes)
            means = (pi * u).sum(part.classes, keepdim=True)
            if bent is not None:
                torch.mul(
                    pi.mul_(u - means),
                    _part(slopes, along, where) * part.mass,
                    out=_part(bent, along, where),
                )
            if pushed is not None:
                _part(pushed, along, where).copy_(part.mass * means - part.dot(u))
        return bent, pushed, None


def _bent(
    logits: Tensor, slopes: Tensor, along: Tensor, targets: _Targets
) -> tuple[Tensor, Tensor]:
    """Return the same derivatives as functions that can be differentiated further."""
    pi = torch.softmax(logits, targets.classes)
    means = (pi * along).sum(targets.classes, keepdim=True)
    bent = slopes * targets.mass * pi * (along - means)
    return bent, targets.mass * means - (targets.dense(logits) * along).sum(
        targets.classes, keepdim=True
    )


OWN = (_Losses, _Slopes)
"""The custom functions, whose derivatives are known to be right."""


def lean_cross_entropy(
    original: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy as ``original`` does, torch's own, by formulas where they apply.

    They do for single and double precision, plain reverse mode, and targets that are constants.

    >>> x, y = torch.randn(3, LEAST), torch.tensor([0, 4, -100])
    >>> own = torch._C._nn.cross_entropy_loss
    >>> torch.testing.assert_close(lean_cross_entropy(own, x, y), own(x, y, None, 1))
    """
    given = (target, weight, reduction, ignore_index, label_smoothing)
    if logits.numel() < LEAST or not _applies(logits, target, weight):
        return original(logits, *given)
    targets, total = _read(logits, target, weight, ignore_index, label_smoothing)
    losses: Tensor = _Losses.apply(logits, targets)  # type: ignore[no-untyped-call]
    losses = losses.squeeze(targets.classes)
    if reduction == _NONE:
        return losses
    return losses.sum() / total if reduction == _MEAN else losses.sum()


_FULL = (torch.float32, torch.float64)


def _applies(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    # torch.func, vmap and forward mode differentiate by rules of their own.
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


def _read(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[_Targets, Tensor | int]:
    """Return the targets of all rows, and what their mean divides by."""
    dim = 1 if logits.dim() > 1 else 0
    count = logits.shape[dim]
    broad = [1] * logits.dim()
    broad[dim] = count
    of_classes = None if weight is None else weight.to(logits.dtype).view(broad)
    spread = None
    if smoothing > 0:
        ones = logits.new_ones(broad) if of_classes is None else of_classes
        spread = ones * (smoothing / count)
    if target.is_floating_point():
        probabilities = target.to(logits.dtype)
        factor = (1.0 if of_classes is None else of_classes) * (1 - smoothing)
        mass = (probabilities * factor).sum(dim, keepdim=True)
        mass = mass if spread is None else mass + spread.sum()
        rows = logits.numel() // count
        return _Targets(dim, mass, spread=spread, probabilities=probabilities, factor=factor), rows
    index = target.unsqueeze(dim)
    kept = (index != ignore_index).to(logits.dtype)
    index = torch.where(index == ignore_index, torch.zeros_like(index), index)
    own = kept if weight is None else kept * weight.to(logits.dtype)[index]
    share = own * (1 - smoothing)
    mass = share if spread is None else share + kept * spread.sum()
    return _Targets(dim, mass, index, share, spread, kept), own.sum()
