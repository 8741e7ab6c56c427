r"""What a memory of L-BFGS does, whatever its arithmetic, and Powell's damping.

A memory is told of each step, keeps the pair of step s and gradient change y if it has curvature,
and returns :math:`-Pg`. :mod:`~stableopt.optim.lbfgs.two_loop` is torch's, to the last bit;
:mod:`~stableopt.optim.lbfgs.compact` the same matrix in a few large products.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from stableopt.optim.lbfgs.line_search import Number

__all__ = ["PairMemory", "damped_share"]


def damped_share(curvature: float, reference: float, damping: float) -> float:
    r"""Return the share of y that is left in a damped pair; the rest is :math:`s/\gamma`.

    .. math::
        \bar y = \theta y + (1-\theta) s/\gamma, \qquad \theta = \begin{cases}
        1 & y^\top s \ge c\,\sigma \\ (1-c)\,\sigma/(\sigma - y^\top s) & \text{else}\end{cases},
        \qquad \sigma = s^\top s/\gamma,

    so that :math:`\bar y^\top s \ge c\,\sigma` (Powell, 1978, with the initial matrix of the limited
    memory in place of the full one, as in Wang, Ma, Goldfarb & Liu, SIAM J. Optim. 2017).

    >>> damped_share(1.0, 1.0, 0.2), damped_share(-1.0, 1.0, 0.2)
    (1.0, 0.4)
    """
    if curvature >= damping * reference:
        return 1.0
    return (1 - damping) * reference / (reference - curvature)


class PairMemory(Protocol):
    """What :class:`~stableopt.optim.lbfgs.optimizer.LBFGS` asks of a memory."""

    capacity: int

    def numbers(self, *values: Any) -> list[Number]:
        """Return what scalars are decided by: floats, in one transfer, or torch's tensors."""

    def clear(self) -> None:
        """Forget all pairs."""

    def products(self, gradient: Tensor, previous: Tensor, direction: Tensor) -> list[Tensor]:
        """Return the inner products that :meth:`update` wants to know as numbers."""

    def update(
        self,
        gradient: Tensor,
        previous: Tensor,
        direction: Tensor,
        t: Number,
        products: list[Number],
        damping: float,
    ) -> None:
        """Remember the pair of a step ``t * direction`` between two gradients, if it is one."""

    def descent(self, gradient: Tensor) -> Tensor:
        """Return -P times ``gradient``, which is left alone."""

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return P times ``(d,)`` or ``(d, k)``."""

    def export(self) -> dict[str, Any]:
        """Return the pairs as the state of ``torch.optim.LBFGS`` has them."""
