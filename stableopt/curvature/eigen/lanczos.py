r"""Lanczos with full reorthogonalisation and thick restarts, in the P inner product.

With covectors r and vectors q = P r, orthonormal in that :math:`q_i^\top r_j = \delta_{ij}`, a step is

.. math::

    w = Hq_j - \alpha_j r_j - \beta_{j-1} r_{j-1}, \quad z = Pw, \quad \beta_j = \sqrt{z^\top w},
    \quad r_{j+1} = w/\beta_j, \quad q_{j+1} = z/\beta_j

(Lanczos, 1950; Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*,
2000). It is Lanczos on :math:`P^{1/2}HP^{1/2}`, and the residual :math:`\beta_j|s_j|` is that matrix's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.certificate import StartPolynomials
from stableopt.curvature.eigen.inner_product import Dual, InnerProduct
from stableopt.curvature.eigen.kept_subspace import KEPT, subspace_to_keep
from stableopt.curvature.eigen.result import UNCERTAINTY, Eigenpair, Search
from stableopt.curvature.operator import Operator

__all__ = ["LanczosIteration", "lanczos"]

_ROUNDING = 100
"""Norm of a rest that is rounding, in units of the rounding of the largest number."""

_RESTARTED = 8
"""Ritz vectors kept by a restart, or half of a basis that is smaller than twice that."""


class LanczosIteration:
    """The iteration that every Lanczos search reads: one product a :meth:`step`.

    After a step, numbers are those of H divided by ``unit``, a power of two.

    Args:
        operator: H.
        inner: the inner product, with its preconditioner P.
        first: the start, of norm 1.
        width: the largest number of rows in the basis.
        seed: of the directions that continue from an invariant subspace.

    Attributes:
        basis: the orthonormal rows.
        products: products so far.
        values: Ritz values in the basis, smallest first, in float64 on the host.
        weights: their Ritz vectors in coordinates of the basis, as columns.
        rest: the part of the last image outside the basis.
        beta: its norm.
        scale: the largest size of a Ritz value or a rest so far, for comparisons with rounding.
    """

    def __init__(
        self, operator: Operator, inner: InnerProduct, first: Dual, width: int, seed: int
    ) -> None:
        self.basis = Basis(first.covector[None], first.vector[None], inner, most=width)
        self.size = inner.whole_size(operator.shape[0])
        self.products, self.scale, self.unit = 0, 0.0, 1.0
        self._operator, self._inner, self._width, self._seed = operator, inner, width, seed
        self._eps: float = torch.finfo(operator.dtype).eps
        self._polynomials = StartPolynomials(self.size)
        self._projected = torch.zeros(width, width, dtype=torch.float64)
        self._magnitude: Tensor | None = None
        self._restarted = False

    def step(self) -> None:
        """Multiply the last row by H, and update the Ritz values.

        Raises:
            NonFiniteError: if the product holds an infinity or a NaN.
            ValueError: if P is found not to be positive definite.
        """
        inner, basis, held = self._inner, self.basis, self.basis.held
        image = self._operator @ basis.vectors[-1]
        self.products += 1
        if self._magnitude is None:
            self._magnitude = inner.magnitude(image)
        # The last two rows hold nearly all that has to be removed; after a restart all do.
        since = 0 if self._restarted else max(held - 2, 0)
        coordinates, self.rest = basis.split(image / self._magnitude, since)
        column = inner.on_host(
            torch.cat([coordinates, self.rest.norm[None], self._magnitude[None]])
        )
        self.beta, self.unit = column[held:].tolist()
        inner.check_product(column[:held], self.beta, self.products, self._operator)
        self._projected[:held, held - 1] = self._projected[held - 1, :held] = column[:held]
        self.values, self.weights = torch.linalg.eigh(self._projected[:held, :held])
        self.scale = max(self.scale, float(self.values.abs().max()), self.beta)

    @property
    def residuals(self) -> Tensor:
        """The absolute residual of each Ritz pair."""
        residuals: Tensor = self.beta * self.weights[-1].abs()
        return residuals

    @property
    def exhausted(self) -> bool:
        """Whether the basis holds the whole Krylov space, so that Ritz values are eigenvalues."""
        return self.basis.held == self.size or self.beta == 0.0

    def missed(self, gap: float) -> float:
        """Bound the probability that an eigenvalue ``gap`` or more above the largest was missed.

        It holds for a start that is uniform on the sphere.
        """
        point = torch.tensor([float(self.values[-1]) + gap], dtype=torch.float64)
        return float(self._with_rest().missed(point))

    def upper_bound(self) -> float | None:
        """Return the bound of :class:`Eigenpair` for a start that is uniform on the sphere."""
        if self.products == 1 or self.scale == 0.0:
            return None
        largest = float(self.values[-1])
        # Near convergence a start with little of the top vector has K's bound just below the eigenvalue.
        nearest = max(self.rounding, float(self.residuals[-1]))
        return self._with_rest().upper_bound(largest, self.scale, UNCERTAINTY, nearest)

    @property
    def rounding(self) -> float:
        """What rounding may take from a Ritz value."""
        return 10 * self._eps * self.scale

    def _with_rest(self) -> StartPolynomials:
        """Return the polynomials of the basis and the direction of its rest."""
        return self._polynomials.extended(self._column(), self._visible_beta)

    def _column(self) -> Tensor:
        held = self.basis.held
        return self._projected[:held, held - 1].clone()

    @property
    def _visible_beta(self) -> float:
        """The norm of the rest, or the size up to which it is rounding."""
        beta: float = self.beta
        return max(beta, _ROUNDING * self._eps * self.scale)

    def extend(self) -> None:
        """Append the next row; a full basis is first replaced by its best Ritz vectors."""
        following, column, kept = self.rest.normalised(), self._column(), None
        invariant = self.beta == 0.0 or self.beta < self._visible_beta
        if invariant:
            noise = self._inner.noise(self._operator, self._seed, draw=self.products)
            following = self.basis.orthogonal(noise.covector)
        self._restarted = self.basis.held == self._width
        if self._restarted:
            best = min(_RESTARTED, max(self._width // 2, 1))
            kept = self.weights[:, -best:].T
            self.basis = self.basis.combined(kept, room=self._width - best)
            self._projected.zero_()
            self._projected[:best, :best] = torch.diag(self.values[-best:])
        self._polynomials = self._polynomials.extended(
            column, self._visible_beta, weights=kept, fresh=invariant
        )
        self.basis.append(following)


def lanczos(search: Search, first: Dual, max_iter: int, *, at_least: int, drawn: bool) -> Eigenpair:
    """Return the top eigenpair of P H, from ``first``, of norm 1.

    A small residual counts only after ``at_least`` products and, where ``first`` was ``drawn`` at
    random, once a larger eigenvalue is unlikely. A basis of ``most_vectors`` is restarted with its best
    Ritz vectors.
    """
    size = search.inner.whole_size(search.operator.shape[0])
    width = min(search.most_vectors, max_iter, size)
    iteration = LanczosIteration(search.operator, search.inner, first, width, search.seed)
    while True:
        iteration.step()
        products = iteration.products
        value, residual = float(iteration.values[-1]), float(iteration.residuals[-1])
        scale = iteration.scale
        converged = iteration.exhausted or (
            products >= at_least
            and search.small_enough(residual, value, scale)
            and (not drawn or search.unlikely(iteration.missed(search.gap(value, scale))))
        )
        if converged or products == max_iter:
            break
        iteration.extend()
    bound, kept, unit = None, None, iteration.unit
    if iteration.exhausted:
        bound = value + max(residual, iteration.rounding)
    elif drawn and search.inner.preconditioner is None:
        # Uniform on the sphere in the Euclidean inner product alone.
        bound = iteration.upper_bound()
        if converged and bound is not None:
            # The bound is found to 1 % of its distance; at the gap it has been checked exactly.
            bound = min(bound, value + search.gap(value, iteration.scale))
    if search.keep:
        rest, best = iteration.rest, iteration.weights[:, 1 - KEPT :].T.flip(0)
        beyond = rest.normalised() if iteration.beta > 0 else rest
        ritz = iteration.basis.combined(best, room=1)
        kept = subspace_to_keep(ritz, beyond.covector, search.seed)
    return Eigenpair(
        value * unit,
        iteration.basis.unit_vector(iteration.weights[:, -1]),
        residual * unit,
        products,
        converged,
        None if bound is None else bound * unit,
        kept,
    )
