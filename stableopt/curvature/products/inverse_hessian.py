r"""`InverseHessian`: the inverse Hessian approximation of L-BFGS, from pairs (s, y), in compact form.

With the steps S and the gradient changes Y as rows, :math:`(k, d)`, oldest first, and the initial
matrix :math:`\gamma I`,

.. math::
    Pv = \gamma v + S^\top R^{-\top}\left[(D + \gamma YY^\top)u - \gamma Yv\right] - \gamma Y^\top u,
    \qquad u = R^{-1} S v,

where R is the upper triangle of :math:`SY^\top` and D its diagonal (Byrd, Nocedal & Schnabel,
Representations of quasi-Newton matrices, 1994, equation 3.1). This takes two matrix products with S and
Y. The two-loop recursion takes 4k sequential dot products and sums instead. Example::

    InverseHessian.from_pairs(s=steps, y=changes, gamma=0.1) @ v      # (d,) or (d, k)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt._support.deprecation import positional_keywords
from stableopt.curvature.operator import Operator
from stableopt.curvature.products.blocked_rows import Rows

__all__ = ["InverseHessian"]


class InverseHessian(Operator):
    r"""The L-BFGS matrix ``(d, d)``, symmetric positive definite for pairs with :math:`y^\top s > 0`.

    It satisfies the secant equation ``P @ y == s`` of the last pair, and those of earlier pairs
    approximately.

    Args:
        rows: a ring buffer of pairs: steps at even rows, gradient changes at odd rows.
        oldest: the index of the oldest pair in ``rows``.
        triangle: R, the upper triangle of :math:`SY^\top`, ``(k, k)``, oldest first.
        squares: :math:`YY^\top`, ``(k, k)``, oldest first.
        gamma: scale of the initial matrix.

    ``rows`` is not copied: the matrix is valid until it changes. :meth:`from_pairs` copies.
    """

    def __init__(
        self, rows: Rows, oldest: int, triangle: Tensor, squares: Tensor, gamma: float
    ) -> None:
        super().__init__(rows.size, rows.dtype, rows.device)
        self.gamma = gamma
        self._rows = rows
        self._oldest = oldest
        self._triangle = triangle
        self._middle = torch.diag(triangle.diagonal()) + gamma * squares

    @classmethod
    @positional_keywords("y", "s", "gamma", pairs_s="s", pairs_y="y")
    def from_pairs(
        cls,
        *,
        s: Sequence[Tensor] | Tensor,
        y: Sequence[Tensor] | Tensor,
        gamma: float | Tensor | None = None,
    ) -> InverseHessian:
        r"""Build the matrix from steps and gradient changes, oldest first.

        In the state of ``torch.optim.LBFGS``, ``old_stps`` is s, ``old_dirs`` is y and ``H_diag`` is
        gamma.

        Args:
            s: k steps ``(d,)``, or their rows ``(k, d)``.
            y: the k gradient changes over these steps.
            gamma: scale of the initial matrix; by default :math:`y^\top s / y^\top y` of the last pair.

        Raises:
            ValueError: for no pairs, unequal numbers, or a pair without :math:`y^\top s > 0`.

        >>> s, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]])
        >>> P = InverseHessian.from_pairs(s=s, y=y)
        >>> P @ torch.tensor([4.0, 1.0])
        tensor([2.0000, 0.5000])
        """
        if len(s) != len(y) or not len(s):
            raise ValueError(
                f"{len(y)} gradient changes and {len(s)} steps: expected the same number of each,"
                " at least one"
            )
        steps, changes = (torch.stack(list(p)).detach() for p in (s, y))
        rows = Rows(2 * len(steps), steps[0])
        for i, (step, change) in enumerate(zip(steps, changes, strict=True)):
            rows.write(2 * i, step)
            rows.write(2 * i + 1, change)
        # Row i holds the products of y_i with every row: s_j y_i in even columns, y_j y_i in odd ones.
        inner = rows.inner(changes, 2 * len(steps))
        triangle, squares = inner[:, 0::2].T.triu(), inner[:, 1::2]
        curvatures = triangle.diagonal()
        if not bool((curvatures > 0).all()):
            raise ValueError(
                f"pairs have curvatures y @ s of {curvatures.tolist()}: expected positive numbers"
            )
        if gamma is None:
            gamma = curvatures[-1] / squares[-1, -1]
        return cls(rows, 0, triangle, squares, float(gamma))

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector."""
        if not vectors:
            return []
        inner = self._rows.inner(torch.stack(list(vectors)), 2 * len(self._triangle))
        return [self.from_inner(v, products) for v, products in zip(vectors, inner, strict=True)]

    def from_inner(self, vector: Tensor, inner: Tensor, *, sign: int = 1) -> Tensor:
        """Return ``sign * P @ vector``; ``inner`` holds the products of ``vector`` with the rows."""
        steps, changes = inner.view(-1, 2, 1).roll(-self._oldest, dims=0).unbind(1)
        u = torch.linalg.solve_triangular(self._triangle, steps, upper=True)
        right = self._middle @ u - self.gamma * changes
        p = torch.linalg.solve_triangular(self._triangle.T, right, upper=False)
        weights = torch.stack([p, -self.gamma * u], dim=1).roll(self._oldest, dims=0)
        return self._rows.added(vector, weights.flatten(), beta=sign * self.gamma, alpha=sign)
