r"""`PairMemory`: the interface of L-BFGS memories; `Move`: their input; `damped_share`: damping.

A memory receives each move, keeps the pair of step s and gradient change y if it has curvature, and
returns the direction :math:`-Pg`. :mod:`~stableopt.optim.lbfgs.two_loop` has torch's arithmetic, bit for
bit; :mod:`~stableopt.optim.lbfgs.compact` applies the same matrix in a few large products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from stableopt.optim.lbfgs.line_search import Number

__all__ = ["Move", "PairMemory", "damped_share"]


@dataclass
class Move:
    """A step ``t * direction``, with the gradient and the loss before it."""

    direction: Tensor
    t: Number
    gradient: Tensor
    loss: Number


def damped_share(curvature: float, reference: float, damping: float) -> float:
    r"""Return the share of y in a damped pair; the rest is :math:`s/\gamma`.

    .. math::
        \bar y = \theta y + (1-\theta) s/\gamma, \qquad \theta = \begin{cases}
        1 & y^\top s \ge c\,\sigma \\ (1-c)\,\sigma/(\sigma - y^\top s) & \text{else}\end{cases},
        \qquad \sigma = s^\top s/\gamma,

    so that :math:`\bar y^\top s \ge c\,\sigma` (Powell, 1978; with the initial matrix of the limited
    memory instead of the full one: Wang, Ma, Goldfarb & Liu, SIAM J. Optim. 2017).

    >>> damped_share(1.0, 1.0, 0.2), damped_share(-1.0, 1.0, 0.2)
    (1.0, 0.4)
    """
    if curvature >= damping * reference:
        return 1.0
    return (1 - damping) * reference / (reference - curvature)


class PairMemory(Protocol):
    """The memory of :class:`~stableopt.optim.lbfgs.optimizer.LBFGS`."""

    capacity: int

    def numbers(self, *values: Any) -> list[Number]:
        """Return the values as floats, by one host transfer, or unchanged for torch's arithmetic."""

    def clear(self) -> None:
        """Remove all pairs."""

    def products(self, move: Move, gradient: Tensor) -> list[Tensor]:
        """Return the inner products that :meth:`update` takes as numbers."""

    def update(self, move: Move, gradient: Tensor, products: list[Number], damping: float) -> None:
        """Keep the pair of a move that ended at ``gradient``, if it has curvature."""

    def descent(self, gradient: Tensor) -> Tensor:
        """Return -P times ``gradient``, which does not change."""

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return P times ``(d,)`` or ``(d, k)``."""

    def export(self) -> dict[str, Any]:
        """Return the pairs in the form of the state of ``torch.optim.LBFGS``."""
