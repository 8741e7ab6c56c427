r"""`LanczosIteration`: Lanczos with full reorthogonalisation and thick restarts, in the P inner product.

With covectors r and vectors q = P r, orthonormal in that :math:`q_i^\top r_j = \delta_{ij}`, a step is

.. math::

    w = Hq_j - \alpha_j r_j - \beta_{j-1} r_{j-1}, \quad z = Pw, \quad \beta_j = \sqrt{z^\top w},
    \quad r_{j+1} = w/\beta_j, \quad q_{j+1} = z/\beta_j

(Lanczos, 1950; Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*,
2000). It is Lanczos on :math:`P^{1/2}HP^{1/2}`, and the residual :math:`\beta_j|s_j|` is that matrix's.

From several rows at once it is band Lanczos (Aliaga, Boley, Freund & Hernández, 2000). Pending rows are
rows of the basis not yet multiplied by H. A step multiplies the first of them; the component of the
product orthogonal to the basis becomes another pending row. The residual of a Ritz vector x is the norm
of the component of Hx in the pending rows. Pending rows that are discarded still count in the residuals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis, block_diagonal
from stableopt.curvature.eigen.certificate import Deflation, StartPolynomials
from stableopt.curvature.eigen.inner_product import Dual, InnerProduct
from stableopt.curvature.eigen.result import UNCERTAINTY
from stableopt.curvature.operator import Operator

__all__ = ["LanczosIteration"]

_ROUNDING = 100
"""Norm of an orthogonal component that is rounding, in units of the rounding of the largest number."""

_RESTARTED = 8
"""Ritz vectors kept by a restart, or half of a basis that is smaller than twice that."""

_USEFUL = 0.03
"""Largest residual of a Ritz pair kept for a search in the complement, relative to the distance from the
last wanted pair. Its square over a gap is what it may add to the bounds."""


class LanczosIteration:
    """The Lanczos iteration shared by all searches: one product with H per :meth:`step`.

    After a step, all numbers are those of H divided by ``unit``, a power of two.

    Args:
        operator: H.
        inner: the inner product, with its preconditioner P.
        first: the start, of norm 1, or an orthonormal basis of rows to multiply in turn.
        width: the largest number of rows in the basis.
        seed: of the random directions that continue from an invariant subspace.
        wanted: number of eigenpairs sought; a restart keeps seven more Ritz vectors.

    Attributes:
        basis: the orthonormal rows: first those multiplied by H, then the pending ones.
        multiplied: the number of rows multiplied by H.
        device_flag: a flag on the device, which the next step transfers with its own numbers.
        host_flag: the flag that the last step transferred.
        deflation: the projection of H that :meth:`start_in_complement` deflated; else ``None``.
        products: products so far.
        ritz_values: Ritz values, smallest first, in float64 on the host.
        ritz_coordinates: coordinates of the Ritz vectors in the multiplied rows, as columns.
        residual_vector: the component of the last product orthogonal to the basis.
        beta: its norm.
        scale: the largest absolute Ritz value or beta so far, for comparisons with rounding.
    """

    def __init__(
        self,
        operator: Operator,
        inner: InnerProduct,
        first: Dual | Basis,
        width: int,
        seed: int,
        wanted: int = 1,
    ) -> None:
        if isinstance(first, Dual):
            first = Basis(first.covector[None], first.vector[None], inner, capacity=width)
        self.basis, self.multiplied = first, 0
        self.deflation: Deflation | None = None
        self.size = inner.whole_size(operator.shape[0])
        self.products, self.scale, self.unit = 0, 0.0, 1.0
        self.device_flag: Tensor | None = None
        self._operator, self._inner, self._width, self._seed = operator, inner, width, seed
        self._wanted = wanted
        self._eps: float = torch.finfo(operator.dtype).eps
        self._polynomials = StartPolynomials(self.size)
        self._projected = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        self._discarded: list[Tensor] = []
        self._magnitude: Tensor | None = None
        self._restarted = False

    def step(self) -> None:
        """Multiply the first pending row by H, and update the Ritz pairs.

        Raises:
            NonFiniteError: if the product holds an infinity or a NaN.
            ValueError: if P is found not to be positive definite.
        """
        inner, basis = self._inner, self.basis
        num_rows, row = basis.num_rows, self.multiplied
        # The last step's residual vector is as long as all parameters: free it before the product.
        vars(self).pop("residual_vector", None)
        image = self._operator @ basis.vectors[row]
        self.products += 1
        if self._magnitude is None:
            self._magnitude = inner.magnitude(image)
        # In the three-term recurrence the image overlaps with two rows only; after a restart with all.
        full_pass = self._restarted or row < num_rows - 1
        since = 0 if full_pass else max(num_rows - 2, 0)
        image = image / self._magnitude  # not in place: the operator may keep what it returned
        coordinates, self.residual_vector = basis.split(image, since)
        norm = self.residual_vector.norm
        flag = norm if self.device_flag is None else self.device_flag
        numbers = torch.stack([norm, self._magnitude, flag])
        column = inner.on_host(torch.cat([coordinates, numbers]))
        self.beta, self.unit, self.host_flag = column[num_rows:].tolist()
        self.device_flag = None
        inner.check_product(column[:num_rows], self.beta, self.products, self._operator)
        self._projected[:num_rows, row] = self._projected[row, :num_rows] = column[:num_rows]
        self.multiplied = row + 1
        self.ritz_values, self.ritz_coordinates = torch.linalg.eigh(self.projected)
        self.scale = max(self.scale, float(self.ritz_values.abs().max()), self.beta)

    @property
    def projected(self) -> Tensor:
        """The projection of H on the multiplied rows, ``(multiplied, multiplied)``."""
        return self._projected[: self.multiplied, : self.multiplied]

    @property
    def invariant(self) -> bool:
        """Whether the last product lies in the basis, up to rounding."""
        return self.beta == 0.0 or bool(self.beta < self._beta_or_rounding)

    @property
    def residuals(self) -> Tensor:
        """The absolute residual of each Ritz pair."""
        residuals: Tensor = self.beta * self.ritz_coordinates[-1].abs()
        if self.multiplied < self.basis.num_rows:
            pending = self._images_in_pending_rows() @ self.ritz_coordinates
            residuals = (residuals.square() + pending.square().sum(0)).sqrt()
        return residuals + self.discarded_residuals if self._discarded else residuals

    @property
    def discarded_residuals(self) -> Tensor:
        """The part of each residual in discarded directions, which further steps do not reduce."""
        norms = [
            (images @ self.ritz_coordinates[: images.shape[1]]).norm(dim=0)
            for images in self._discarded
        ]
        return torch.stack([torch.zeros_like(self.ritz_values), *norms]).sum(0)

    @property
    def exhausted(self) -> bool:
        """Whether the basis holds the whole Krylov space, so that Ritz values are eigenvalues."""
        no_pending_rows = self.multiplied == self.basis.num_rows
        return self.multiplied == self.size or (self.beta == 0.0 and no_pending_rows)

    def missed(self, gap: float) -> float:
        """Bound the probability that an eigenvalue ``gap`` or more above the largest was missed.

        It holds for a start that is uniform on the sphere.
        """
        point = self.ritz_values[-1:] + gap
        return float(self._polynomials_with_residual().missed(point))

    def upper_bound(self) -> float | None:
        """Return the bound of :class:`Eigenpair` for a start that is uniform on the sphere."""
        if self.products == 1 or self.scale == 0.0:
            return None
        largest = float(self.ritz_values[-1])
        # Near convergence, K's bound may lie just below the eigenvalue if the start has little of the
        # top eigenvector.
        nearest = max(self.rounding, float(self.residuals[-1]))
        polynomials = self._polynomials_with_residual()
        return polynomials.upper_bound(largest, self.scale, UNCERTAINTY, nearest)

    @property
    def rounding(self) -> float:
        """The largest rounding error of a Ritz value."""
        return 10 * self._eps * self.scale

    def _polynomials_with_residual(self) -> StartPolynomials:
        """Return the polynomials of the basis and of the last residual vector."""
        return self._polynomials.extended(self._last_column(), self._beta_or_rounding)

    def _last_column(self) -> Tensor:
        return self._projected[: self.multiplied, self.multiplied - 1].clone()

    @property
    def _beta_or_rounding(self) -> float:
        """The larger of beta and the norm up to which a residual vector is rounding."""
        beta: float = self.beta
        return max(beta, _ROUNDING * self._eps * self.scale)

    def extend(self) -> None:
        """Append the normalised residual vector as a pending row; restart a full basis first.

        In an invariant subspace, a random direction replaces the residual vector, and nothing is
        appended while other rows are pending.
        """
        following, column, kept = self.residual_vector.normalised(), self._last_column(), None
        invariant = self.invariant
        if invariant and self.multiplied < self.basis.num_rows:
            return  # other rows are pending
        if invariant:
            noise = self._inner.noise(self._operator, self._seed, draw=self.products)
            following = self.basis.orthogonal(noise.covector)
        image = torch.zeros(self.multiplied, dtype=torch.float64, device="cpu")
        image[-1] = self.beta
        self._restarted = self.basis.num_rows == self._width
        if self._restarted:
            kept = (
                self._restart_complement() if self.deflation else self._restart(self._kept_pairs())
            )
            image = kept @ image
        self._polynomials = self._polynomials.extended(
            column, self._beta_or_rounding, weights=kept, fresh=invariant
        )
        if not invariant:
            new_row, multiplied = self.basis.num_rows, self.multiplied
            self._projected[new_row, :multiplied] = self._projected[:multiplied, new_row] = image
        self.basis.append(following)

    def discard_pending(self) -> None:
        """Discard the pending rows and the residual vector; residuals still include them."""
        self._discarded.append(self._images_outside())
        self.beta, self.basis.num_rows = 0.0, self.multiplied

    def compress_pending(self, pairs: Tensor) -> None:
        """Replace the pending rows by those that span the residuals of ``pairs``; discard the others.

        ``pairs`` ``(n,)`` are indices of Ritz pairs. Call it after :meth:`extend`.
        """
        multiplied, pending = self.multiplied, self._images_outside()[:-1]
        directions = torch.linalg.svd(pending @ self.ritz_coordinates[:, pairs])[0].T
        count = min(len(pairs), len(pending))
        pending = directions @ pending
        self.basis.combine(block_diagonal(multiplied, directions[:count]))
        self._discarded.append(pending[count:])
        self._projected[multiplied:].zero_()
        self._projected[:, multiplied:].zero_()
        self._projected[multiplied : multiplied + count, :multiplied] = pending[:count]
        self._projected[:multiplied, multiplied : multiplied + count] = pending[:count].T
        self.beta = 0.0

    def start_in_complement(self, count: int, room: int) -> None:
        """Continue from a random direction orthogonal to the basis; discard the pending rows.

        The steps that follow are those of Lanczos, from a uniform start, with the compression B of H to
        the complement of the present basis; ``deflation`` is H inside. First the basis is restarted with
        the ``count`` best Ritz vectors and those of small residual relative to their distance from
        these, so that at least ``room`` rows are free.
        """
        self.discard_pending()
        last = self.ritz_values[-count]
        useful = self.residuals <= _USEFUL * (last - self.ritz_values)
        useful[-count:] = True
        useful[: max(self.multiplied - max(self._width - room, count), 0)] = False
        pairs = useful.nonzero()[:, 0]
        if len(pairs) < self.multiplied:
            self._restart(pairs)
            self.ritz_values = self.ritz_values[pairs]
            self.ritz_coordinates = torch.eye(len(pairs), dtype=torch.float64, device="cpu")
        noise = self._inner.noise(self._operator, self._seed, draw=self.products)
        self.deflation = Deflation(self.projected.clone(), tuple(self._discarded))
        self.basis.append(self.basis.orthogonal(noise.covector))
        self._polynomials = StartPolynomials(self.size, deflated=self.multiplied)
        self._restarted = True

    def remultiply(self, pairs: Tensor) -> None:
        """Restart with the Ritz vectors of ``pairs``, indices ``(n,)``, as pending rows.

        Their residuals then have no discarded part.
        """
        self.discard_pending()
        others = self._kept_pairs()
        others = others[~torch.isin(others, pairs)]
        self._restart(torch.cat([others, pairs]))
        self.multiplied, self.deflation = len(others), None
        self._discarded = [images[:, : self.multiplied] for images in self._discarded]
        self._projected[self.multiplied :].zero_()
        self._projected[:, self.multiplied :].zero_()

    def complement_top(self) -> tuple[float, float]:
        """Return the largest Ritz value of B since :meth:`start_in_complement`, and its residual."""
        values, vectors = self._complement_ritz_pairs()
        return float(values[-1]), self.beta * abs(float(vectors[-1, -1]))

    def ritz_vectors(self, count: int) -> Basis:
        """Return the ``count`` best Ritz vectors, the largest first; they replace the basis."""
        weights = torch.zeros(count, self.basis.num_rows, dtype=torch.float64, device="cpu")
        weights[:, : self.multiplied] = self.ritz_coordinates.flip(1)[:, :count].T
        self.basis.combine(weights)
        return self.basis.shrunk()

    def missed_in_complement(self, point: float) -> float:
        """Bound the probability that B has an eigenvalue at or above ``point``.

        ``point`` is above all Ritz values of B.
        """
        points = torch.tensor([point], dtype=torch.float64, device="cpu")
        return float(self._polynomials_with_residual().missed(points))

    def upper_bounds(self, count: int) -> Tensor | None:
        """Return upper bounds ``(count,)`` of the largest eigenvalues of H, largest first.

        They are as probable as :attr:`Eigenpair.upper_bound`; ``None`` if B has no bound.
        """
        if self.multiplied == self.size:
            exact: Tensor = self.ritz_values + self.residuals + self.rounding
            return exact.flip(0)[:count]
        if not self.deflation or self.scale == 0.0:
            return None
        top = self.complement_top()[0]
        polynomials = self._polynomials_with_residual()
        bound = polynomials.upper_bound(top, self.scale, UNCERTAINTY, self.rounding)
        if bound is None:
            return None
        return self.deflation.bounds(bound, count, self.scale) + self.rounding

    def _kept_pairs(self) -> Tensor:
        """Return the indices of the Ritz pairs that a restart keeps: the wanted, up to seven more."""
        pending = self.basis.num_rows - self.multiplied
        room = self._width - pending - self._wanted - 1
        count = self._wanted + min(_RESTARTED - 1, max(room // 2, 0))
        first = self.multiplied - min(count, max(self.multiplied - 1, 1))
        return torch.arange(first, self.multiplied, device="cpu")

    def _complement_ritz_pairs(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values and vectors of B, in the rows since :meth:`start_in_complement`."""
        assert self.deflation is not None
        rows = slice(len(self.deflation.projected), self.multiplied)
        pairs: tuple[Tensor, Tensor] = torch.linalg.eigh(self._projected[rows, rows])
        return pairs

    def _images_in_pending_rows(self) -> Tensor:
        """Return the components of the products in the pending rows, ``(pending, multiplied)``."""
        return self._projected[self.multiplied : self.basis.num_rows, : self.multiplied]

    def _images_outside(self) -> Tensor:
        """Return the components of the products in the pending rows and the residual vector.

        The shape is ``(pending + 1, multiplied)``.
        """
        last = torch.zeros(1, self.multiplied, dtype=torch.float64, device="cpu")
        last[0, -1] = self.beta
        return torch.cat([self._images_in_pending_rows(), last])

    def _restart(self, pairs: Tensor) -> Tensor:
        """Replace the multiplied rows by Ritz vectors; return their coordinates ``(n, multiplied)``."""
        kept: Tensor = self.ritz_coordinates[:, pairs].T
        self._discarded = [images @ kept[:, : images.shape[1]].T for images in self._discarded]
        self._replace_multiplied(kept, torch.diag(self.ritz_values[pairs]))
        self.deflation = None
        return kept

    def _restart_complement(self) -> Tensor:
        """Replace the rows since :meth:`start_in_complement` by half as many: B's best Ritz vectors."""
        assert self.deflation is not None
        deflated = len(self.deflation.projected)
        count = max((self.multiplied - deflated) // 2, 1)
        best = self._complement_ritz_pairs()[1][:, -count:].T
        kept = block_diagonal(deflated, best)
        self._replace_multiplied(kept, kept @ self.projected @ kept.T)
        return kept

    def _replace_multiplied(self, weights: Tensor, projected: Tensor) -> None:
        """Replace the multiplied rows by combinations ``weights`` ``(n, multiplied)``.

        ``projected`` ``(n, n)`` is the projection of H on them.
        """
        count, pending = len(weights), self._images_in_pending_rows() @ weights.T
        self.basis.combine(weights)
        num_rows = self.basis.num_rows
        self._projected.zero_()
        self._projected[:count, :count] = projected
        self._projected[count:num_rows, :count] = pending
        self._projected[:count, count:num_rows] = pending.T
        self.multiplied = count
