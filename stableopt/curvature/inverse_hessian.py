r"""The inverse Hessian that L-BFGS keeps: known by its pairs, applied in its compact form.

With the steps S and the gradient changes Y as rows, :math:`(k, d)`, oldest first, and the initial
matrix :math:`\gamma I`,

.. math::
    Pv = \gamma v + S^\top R^{-\top}\left[(D + \gamma YY^\top)u - \gamma Yv\right] - \gamma Y^\top u,
    \qquad u = R^{-1} S v,

where R is the upper triangle of :math:`SY^\top` and D its diagonal (Byrd, Nocedal & Schnabel,
Representations of quasi-Newton matrices, 1994, equation 3.1). It reads S and Y twice, each time in
one matrix product, where the two-loop recursion makes 4k products and sums that wait for each other.

    InverseHessian.from_pairs(ys, ss, gamma) @ v      # (d,) or (d, k)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature.operators import Operator

__all__ = ["InverseHessian", "triangle_dtype"]


def triangle_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the small matrices, whose triangular systems want all digits there are.

    >>> triangle_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


class InverseHessian(Operator):
    r"""The symmetric positive definite ``(d, d)`` matrix that pairs with :math:`y^\top s > 0` define.

    Every pair but the last constrains it in part, the last in full: ``P @ y == s``.

    Args:
        pairs: step and gradient change of each pair, ``(k, 2, d)``, in cyclic order.
        oldest: the row of ``pairs`` that holds the oldest.
        triangle: R, the upper triangle of :math:`SY^\top`, ``(k, k)``, oldest first.
        changes: :math:`YY^\top`, ``(k, k)``, oldest first.
        gamma: scale of the initial matrix.

    ``pairs`` is not copied: the matrix lives as long as they stay what they are.
    :meth:`from_pairs` copies.
    """

    def __init__(
        self, pairs: Tensor, oldest: int, triangle: Tensor, changes: Tensor, gamma: float
    ) -> None:
        super().__init__(pairs.shape[2], pairs.dtype, pairs.device)
        self.gamma = gamma
        self._pairs = pairs
        self._oldest = oldest
        self._triangle = triangle
        self._middle = torch.diag(triangle.diagonal()) + gamma * changes

    @classmethod
    def from_pairs(
        cls,
        pairs_y: Sequence[Tensor] | Tensor,
        pairs_s: Sequence[Tensor] | Tensor,
        gamma: float | Tensor | None = None,
    ) -> InverseHessian:
        r"""Build the matrix from gradient changes and steps, oldest first.

        The state of ``torch.optim.LBFGS`` holds them as ``old_dirs``, ``old_stps`` and ``H_diag``.

        Args:
            pairs_y: k gradient changes ``(d,)``, or their rows ``(k, d)``.
            pairs_s: the k steps that go with them.
            gamma: scale of the initial matrix; :math:`y^\top s / y^\top y` of the last pair if
                ``None``.

        Raises:
            ValueError: for no pairs, unequal numbers, or a pair without :math:`y^\top s > 0`.

        >>> P = InverseHessian.from_pairs([torch.tensor([4.0, 0.0])], [torch.tensor([2.0, 0.0])])
        >>> P @ torch.tensor([4.0, 1.0])
        tensor([2.0000, 0.5000])
        """
        if len(pairs_y) != len(pairs_s) or not len(pairs_y):
            raise ValueError(
                f"{len(pairs_y)} gradient changes and {len(pairs_s)} steps: expected as many of"
                " each, at least one"
            )
        pairs = torch.stack([torch.stack(list(pairs_s)), torch.stack(list(pairs_y))], dim=1)
        steps, changes = pairs.detach().to(triangle_dtype(pairs.device)).unbind(1)
        triangle = (steps @ changes.T).triu()
        curvatures = triangle.diagonal()
        if not bool((curvatures > 0).all()):
            raise ValueError(
                f"pairs have curvatures y @ s of {curvatures.tolist()}: expected positive numbers"
            )
        squares = changes @ changes.T
        if gamma is None:
            gamma = curvatures[-1] / squares[-1, -1]
        return cls(pairs.detach(), 0, triangle, squares, float(gamma))

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
        return self.from_inner(vector, self.inner(vector))

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector, reading the pairs twice for all of them."""
        if not vectors:
            return []
        block = torch.stack(list(vectors), dim=1)
        return list(self.from_inner(block, self.inner(block)).unbind(1))

    def inner(self, vectors: Tensor) -> Tensor:
        """Return the products of every row of the pairs with ``(d,)`` or ``(d, c)`` vectors."""
        rows = self._pairs.flatten(0, 1)
        return rows @ vectors

    def from_inner(self, vectors: Tensor, inner: Tensor, *, sign: int = 1) -> Tensor:
        """Return the matrix times ``vectors``, given what :meth:`inner` returns of them."""
        gamma, rows = self.gamma, self._pairs.flatten(0, 1)
        small = inner.to(self._triangle.dtype).view(len(self._pairs), 2, -1)
        steps, changes = small.roll(-self._oldest, dims=0).unbind(1)
        u = torch.linalg.solve_triangular(self._triangle, steps, upper=True)
        right = self._middle @ u - gamma * changes
        p = torch.linalg.solve_triangular(self._triangle.T, right, upper=False)
        weights = torch.stack([p, -gamma * u], dim=1).roll(self._oldest, dims=0)
        weights = weights.to(self.dtype).view(inner.shape)
        if vectors.dim() == 1:
            return torch.addmv(vectors, rows.T, weights, beta=sign * gamma, alpha=sign)
        return torch.addmm(vectors, rows.T, weights, beta=sign * gamma, alpha=sign)
