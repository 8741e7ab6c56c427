r"""Lanczos with full reorthogonalisation and thick restarts, in the P inner product.

With covectors r and vectors q = P r, orthonormal in that :math:`q_i^\top r_j = \delta_{ij}`, a step is

.. math::

    w = Hq_j - \alpha_j r_j - \beta_{j-1} r_{j-1}, \quad z = Pw, \quad \beta_j = \sqrt{z^\top w},
    \quad r_{j+1} = w/\beta_j, \quad q_{j+1} = z/\beta_j

(Lanczos, 1950; Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*,
2000). It is Lanczos on :math:`P^{1/2}HP^{1/2}`, and the residual :math:`\beta_j|s_j|` is that matrix's.

From several rows at once it is band Lanczos (Aliaga, Boley, Freund & Hernández, 2000): rows wait for
their product, and what an image has outside the basis is another row that waits. A residual is the norm
of what a Ritz vector's image has in the rows that wait. Rows that are forgotten stay in the residuals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis, block_diagonal
from stableopt.curvature.eigen.certificate import Known, StartPolynomials
from stableopt.curvature.eigen.inner_product import Dual, InnerProduct
from stableopt.curvature.eigen.kept_subspace import KEPT, subspace_to_keep
from stableopt.curvature.eigen.result import UNCERTAINTY, Eigenpair, Search
from stableopt.curvature.operator import Operator

__all__ = ["LanczosIteration", "lanczos"]

_ROUNDING = 100
"""Norm of a rest that is rounding, in units of the rounding of the largest number."""

_RESTARTED = 8
"""Ritz vectors kept by a restart, or half of a basis that is smaller than twice that."""

_USEFUL = 0.03
"""Residual of a Ritz pair, relative to its distance from the last wanted one, up to which it stays when
a second start looks outside the basis: its square over a gap is what it may add to the bounds."""


class LanczosIteration:
    """The iteration that every Lanczos search reads: one product a :meth:`step`.

    After a step, numbers are those of H divided by ``unit``, a power of two.

    Args:
        operator: H.
        inner: the inner product, with its preconditioner P.
        first: the start, of norm 1, or an orthonormal basis of rows to multiply in turn.
        width: the largest number of rows in the basis.
        seed: of the directions that continue from an invariant subspace.
        wanted: eigenpairs that are looked for; a restart keeps seven more Ritz vectors.

    Attributes:
        basis: the orthonormal rows: first those that were multiplied, then those that wait.
        done: how many were multiplied.
        unread: a number on the device, which the next step reads along with its own into ``read``.
        known: what was known of H when :meth:`renew` began with a new start; else ``None``.
        products: products so far.
        values: Ritz values in the basis, smallest first, in float64 on the host.
        weights: their Ritz vectors in coordinates of the basis, as columns.
        rest: the part of the last image outside the basis.
        beta: its norm.
        scale: the largest size of a Ritz value or a rest so far, for comparisons with rounding.
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
            first = Basis(first.covector[None], first.vector[None], inner, most=width)
        self.basis, self.done = first, 0
        self.known: Known | None = None
        self.size = inner.whole_size(operator.shape[0])
        self.products, self.scale, self.unit = 0, 0.0, 1.0
        self.unread: Tensor | None = None
        self._operator, self._inner, self._width, self._seed = operator, inner, width, seed
        self._wanted = wanted
        self._eps: float = torch.finfo(operator.dtype).eps
        self._polynomials = StartPolynomials(self.size)
        self._projected = torch.zeros(width, width, dtype=torch.float64)
        self._forgotten: list[Tensor] = []
        self._magnitude: Tensor | None = None
        self._restarted = False

    def step(self) -> None:
        """Multiply the first row that waits by H, and update the Ritz values.

        Raises:
            NonFiniteError: if the product holds an infinity or a NaN.
            ValueError: if P is found not to be positive definite.
        """
        inner, basis, held, row = self._inner, self.basis, self.basis.held, self.done
        vars(self).pop("rest", None)  # of the last step: as large as all parameters
        image = self._operator @ basis.vectors[row]
        self.products += 1
        if self._magnitude is None:
            self._magnitude = inner.magnitude(image)
        # The last two rows hold nearly all that has to be removed; after a restart all do.
        since = 0 if self._restarted or row < held - 1 else max(held - 2, 0)
        image = image / self._magnitude  # the operator may keep what it returned
        coordinates, self.rest = basis.split(image, since)
        also = self.rest.norm if self.unread is None else self.unread
        numbers = torch.stack([self.rest.norm, self._magnitude, also])
        column = inner.on_host(torch.cat([coordinates, numbers]))
        self.beta, self.unit, self.read = column[held:].tolist()
        self.unread = None
        inner.check_product(column[:held], self.beta, self.products, self._operator)
        self._projected[:held, row] = self._projected[row, :held] = column[:held]
        self.done = done = row + 1
        self.values, self.weights = torch.linalg.eigh(self._projected[:done, :done])
        self.scale = max(self.scale, float(self.values.abs().max()), self.beta)

    @property
    def projected(self) -> Tensor:
        """H in coordinates of the rows that were multiplied, ``(done, done)``."""
        return self._projected[: self.done, : self.done]

    @property
    def invariant(self) -> bool:
        """Whether the last image lies in the basis, up to rounding."""
        return self.beta == 0.0 or bool(self.beta < self._visible_beta)

    @property
    def residuals(self) -> Tensor:
        """The absolute residual of each Ritz pair."""
        residuals: Tensor = self.beta * self.weights[-1].abs()
        if self.done < self.basis.held:
            waiting = self._projected[self.done : self.basis.held, : self.done] @ self.weights
            residuals = (residuals.square() + waiting.square().sum(0)).sqrt()
        return residuals + self.beyond_reach if self._forgotten else residuals

    @property
    def beyond_reach(self) -> Tensor:
        """The part of each residual in directions that were forgotten, which no step lessens."""
        parts = [(rows @ self.weights[: rows.shape[1]]).norm(dim=0) for rows in self._forgotten]
        return torch.stack([torch.zeros_like(self.values), *parts]).sum(0)

    @property
    def exhausted(self) -> bool:
        """Whether the basis holds the whole Krylov space, so that Ritz values are eigenvalues."""
        return self.done == self.size or (self.beta == 0.0 and self.done == self.basis.held)

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
        return self._projected[: self.done, self.done - 1].clone()

    @property
    def _visible_beta(self) -> float:
        """The norm of the rest, or the size up to which it is rounding."""
        beta: float = self.beta
        return max(beta, _ROUNDING * self._eps * self.scale)

    def extend(self) -> None:
        """Append what the last image has outside the basis; a full basis is first restarted."""
        following, column, kept = self.rest.normalised(), self._column(), None
        invariant = self.invariant
        if invariant and self.done < self.basis.held:
            return  # others wait
        if invariant:
            noise = self._inner.noise(self._operator, self._seed, draw=self.products)
            following = self.basis.orthogonal(noise.covector)
        image = torch.zeros(self.done, dtype=torch.float64)
        image[-1] = self.beta
        self._restarted = self.basis.held == self._width
        if self._restarted:
            kept = self._restart_outside() if self.known else self._restart(self._best())
            image = kept @ image
        self._polynomials = self._polynomials.extended(
            column, self._visible_beta, weights=kept, fresh=invariant
        )
        if not invariant:
            held, done = self.basis.held, self.done
            self._projected[held, :done] = self._projected[:done, held] = image
        self.basis.append(following)

    def forget(self) -> None:
        """Forget the rows that wait, and the rest; they remain in the residuals."""
        self._forgotten.append(self._outside())
        self.beta, self.basis.held = 0.0, self.done

    def narrow(self, pairs: Tensor) -> None:
        """Of the rows that wait keep what the residuals of ``pairs`` have; forget the others.

        ``pairs`` ``(n,)`` are indices of Ritz pairs. The rest has been appended.
        """
        done, waiting = self.done, self._outside()[:-1]
        directions = torch.linalg.svd(waiting @ self.weights[:, pairs])[0].T
        waiting, most = directions @ waiting, min(len(pairs), len(waiting))
        self.basis.combine(block_diagonal(done, directions[:most]))
        self._forgotten.append(waiting[most:])
        self._projected[done:].zero_()
        self._projected[:, done:].zero_()
        self._projected[done : done + most, :done] = waiting[:most]
        self._projected[:done, done : done + most] = waiting[:most].T
        self.beta = 0.0

    def renew(self, count: int, room: int) -> None:
        """Go on with a random direction outside the basis; the rows that wait are forgotten.

        The new steps are those of Lanczos with the compression B of H to the complement of the basis
        as it is now, from a uniform start; ``known`` is H inside. The basis is first restarted with the
        ``count`` best Ritz vectors, and others whose residuals are small relative to their distance from
        these, so that at least ``room`` rows are left.
        """
        self.forget()
        last = self.values[-count]
        useful = self.residuals <= _USEFUL * (last - self.values)
        useful[-count:] = True
        useful[: max(self.done - max(self._width - room, count), 0)] = False
        pairs = useful.nonzero()[:, 0]
        if len(pairs) < self.done:
            self._restart(pairs)
            self.values, self.weights = self.values[pairs], torch.eye(len(pairs)).double()
        noise, done = self._inner.noise(self._operator, self._seed, draw=self.products), self.done
        self.known = Known(self._projected[:done, :done].clone(), tuple(self._forgotten))
        self.basis.append(self.basis.orthogonal(noise.covector))
        self._polynomials = StartPolynomials(self.size, deflated=done)
        self._restarted = True

    def repeat(self, pairs: Tensor) -> None:
        """Restart, and have the Ritz vectors of ``pairs``, indices ``(n,)``, wait for their products.

        Their residuals then have no part beyond reach.
        """
        self.forget()
        others = self._best()
        others = others[~torch.isin(others, pairs)]
        self._restart(torch.cat([others, pairs]))
        self.done, self.known = len(others), None
        self._forgotten = [rows[:, : self.done] for rows in self._forgotten]
        self._projected[self.done :].zero_()
        self._projected[:, self.done :].zero_()

    def outside(self) -> tuple[float, float]:
        """Return the largest Ritz value of B since :meth:`renew`, and its residual."""
        values, vectors = self._outside_pairs()
        return float(values[-1]), self.beta * abs(float(vectors[-1, -1]))

    def ritz_vectors(self, count: int) -> Basis:
        """Return the ``count`` best Ritz vectors, the largest first; they replace the basis."""
        weights = torch.zeros(count, self.basis.held, dtype=torch.float64)
        weights[:, : self.done] = self.weights.flip(1)[:, :count].T
        self.basis.combine(weights)
        return self.basis.shrunk()

    def missed_outside(self, point: float) -> float:
        """Bound the probability that B has an eigenvalue from ``point`` on, above its Ritz values."""
        return float(self._with_rest().missed(torch.tensor([point], dtype=torch.float64)))

    def upper_bounds(self, count: int) -> Tensor | None:
        """Return upper bounds ``(count,)`` of the largest eigenvalues of H, largest first.

        They are as probable as :attr:`Eigenpair.upper_bound`; ``None`` if B has no bound.
        """
        if self.done == self.size:
            exact: Tensor = self.values + self.residuals + self.rounding
            return exact.flip(0)[:count]
        if not self.known or self.scale == 0.0:
            return None
        top = self.outside()[0]
        bound = self._with_rest().upper_bound(top, self.scale, UNCERTAINTY, self.rounding)
        if bound is None:
            return None
        return self.known.bounds(bound, count, self.scale) + self.rounding

    def _best(self) -> Tensor:
        """Return the Ritz pairs that a restart keeps: those wanted, and up to seven more."""
        room = self._width - (self.basis.held - self.done) - self._wanted - 1
        most = self._wanted + min(_RESTARTED - 1, max(room // 2, 0))
        return torch.arange(self.done - min(most, max(self.done - 1, 1)), self.done)

    def _outside_pairs(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values of B, and their vectors in the rows since :meth:`renew`."""
        assert self.known is not None
        rows = slice(len(self.known.projected), self.done)
        found: tuple[Tensor, Tensor] = torch.linalg.eigh(self._projected[rows, rows])
        return found

    def _outside(self) -> Tensor:
        """Return what the images have in rows that wait, and in the rest, ``(waiting + 1, done)``."""
        done, held = self.done, self.basis.held
        last = torch.zeros(1, done, dtype=torch.float64)
        last[0, -1] = self.beta
        return torch.cat([self._projected[done:held, :done], last])

    def _restart(self, pairs: Tensor) -> Tensor:
        """Replace the rows that were multiplied by Ritz vectors; return their weights ``(n, done)``."""
        kept: Tensor = self.weights[:, pairs].T
        self._forgotten = [rows @ kept[:, : rows.shape[1]].T for rows in self._forgotten]
        self._replace(kept, torch.diag(self.values[pairs]))
        self.known = None
        return kept

    def _restart_outside(self) -> Tensor:
        """Replace the rows since :meth:`renew` by the best Ritz vectors of B, half as many."""
        assert self.known is not None
        inside = len(self.known.projected)
        best = self._outside_pairs()[1][:, -max((self.done - inside) // 2, 1) :].T
        kept = block_diagonal(inside, best)
        self._replace(kept, kept @ self._projected[: self.done, : self.done] @ kept.T)
        return kept

    def _replace(self, weights: Tensor, projected: Tensor) -> None:
        """Replace the rows that were multiplied by combinations ``(n, done)``, with H projected."""
        done, held, most = self.done, self.basis.held, len(weights)
        waiting = self._projected[done:held, :done] @ weights.T
        self.basis.combine(weights)
        self._projected.zero_()
        self._projected[:most, :most] = projected
        self._projected[most : self.basis.held, :most] = waiting
        self._projected[:most, most : self.basis.held] = waiting.T
        self.done = most


def lanczos(
    search: Search, first: Dual, max_iter: int, *, least: tuple[int, int], drawn: bool | Tensor
) -> Eigenpair:
    """Return the top eigenpair of P H, from ``first``, of norm 1.

    A small residual counts only after ``least[drawn]`` products and, where ``first`` was ``drawn`` at
    random, which a number on the device may say, once a larger eigenvalue is unlikely. A basis of
    ``most_vectors`` is restarted with its best Ritz vectors.
    """
    size = search.inner.whole_size(search.operator.shape[0])
    width = min(search.most_vectors, max_iter, size)
    iteration = LanczosIteration(search.operator, search.inner, first, width, search.seed)
    del first  # which the basis has
    iteration.unread = drawn if isinstance(drawn, Tensor) else None
    while True:
        iteration.step()
        drawn = bool(iteration.read) if isinstance(drawn, Tensor) else drawn
        products = iteration.products
        value, residual = float(iteration.values[-1]), float(iteration.residuals[-1])
        scale, top = iteration.scale, iteration.weights[:, -1]
        converged = iteration.exhausted or (
            products >= least[drawn]
            and search.small_enough(residual, value, scale)
            and (not drawn or search.unlikely(iteration.missed(search.gap(value, scale))))
        )
        if converged or products == max_iter:
            break
        iteration.extend()
    basis, bound, kept, unit = iteration.basis, None, None, iteration.unit
    if iteration.exhausted:
        bound = value + max(residual, iteration.rounding)
    elif drawn and search.inner.preconditioner is None:
        # Uniform on the sphere in the Euclidean inner product alone.
        bound = iteration.upper_bound()
        if converged and bound is not None:
            # The bound is found to 1 % of its distance; at the gap it has been checked exactly.
            bound = min(bound, value + search.gap(value, iteration.scale))
    if search.keep:
        best = iteration.weights[:, 1 - KEPT :].T.flip(0)
        rest = iteration.rest.normalised() if iteration.beta > 0 else iteration.rest
        kept = subspace_to_keep(basis.combined(best, room=1), rest.covector, search.seed)
    del iteration  # and the rest of the last image, before there is one more vector
    return Eigenpair(
        value * unit,
        basis.unit_vector(top),
        residual * unit,
        products,
        converged,
        None if bound is None else bound * unit,
        kept,
        covector=basis.covector(top),
    )
