r"""`top_eigenpairs`: the algebraically largest eigenvalues of an operator, with a certificate.

Lanczos from one start finds each eigenvalue once, however many eigenvectors it has, and may miss one
to which the start is nearly orthogonal. A search from scratch therefore goes on, once k residuals are
small, with a second random start outside everything found. Where that has an eigenvalue above the k-th,
it joins the result; where it has none, up to a small probability, it bounds every eigenvalue from above
(:class:`~stableopt.curvature.eigen.certificate.Known`). Four examples::

    top_eigenpairs(Hessian(problem), 10)                         # ten, each with its multiplicity
    top_eigenpairs(Hessian(problem), 20, down_to=0.75 * limit)   # all above, and the first below
    last = top_eigenpairs(Hessian(problem), 10)                  # and as training moves on
    top_eigenpairs(Hessian(problem), 10, start=last.subspace)    # about eleven products
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.kept_subspace import basis_of_kept
from stableopt.curvature.eigen.lanczos import LanczosIteration
from stableopt.curvature.eigen.result import Search
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["Eigenpairs", "top_eigenpairs"]

MORE = 40
"""Vectors held in addition to the wanted ones."""

_ROOM = 16
"""Rows kept free for the second start, which takes about ten outside all large eigenvectors."""

FEWEST_MORE = 6

_GUARDED = 1
"""Ritz vectors kept for the next search in addition to the wanted ones."""

_FRESH = 0.1
"""Norm of the noise in the last of them, in which a direction never seen before begins."""

_AT_LEAST = 12
"""Products of the second start where its probability of a miss is an estimate: with a preconditioner."""


@dataclass(frozen=True)
class Eigenpairs:
    r"""The largest eigenvalues of a symmetric operator, largest first, and how accurate they are.

    Attributes:
        values: Ritz values :math:`\theta_j` ``(k,)``, in float64 on the CPU; each at most the j-th
            largest eigenvalue.
        vectors: vectors of norm 1 ``(d, k)``, as columns; orthogonal, with a preconditioner in the
            inner product of its inverse.
        absolute_residuals: :math:`\|Av_j - \theta_jv_j\|` or more, ``(k,)``, with a preconditioner of
            the symmetric :math:`P^{1/2}AP^{1/2}`.
        products: products with the operator.
        converged: whether each residual is at most ``tol`` times its value, and for a search from
            scratch another eigenvalue above the last is ruled out, as :class:`Eigenpair` says; within
            ``tol`` of the last, one more may have been left out.
        upper_bounds: upper bounds of the k largest eigenvalues ``(k,)``, all of them true with a
            probability of 0.998, for any spectrum; ``None`` where :class:`Eigenpair` has none, and
            where the search ended before it had them.
        subspace: covectors ``(n, d)`` for the next search to start from.
    """

    values: Tensor
    vectors: Tensor
    absolute_residuals: Tensor
    products: int
    converged: bool
    upper_bounds: Tensor | None
    subspace: Tensor

    def above(self, limit: float) -> int:
        """Return how many values exceed ``limit`` by more than their residuals.

        At least as many eigenvalues do.
        """
        return int((self.values - self.absolute_residuals > limit).sum())


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    down_to: float | None = None,
    least: int = 1,
    preconditioner: Preconditioner | None = None,
    start: Tensor | None = None,
    tol: float = 1e-3,
    max_iter: int = 300,
    seed: int = 0,
    most_vectors: int | None = None,
) -> Eigenpairs:
    r"""Return the k algebraically largest eigenvalues of a symmetric ``operator`` and their vectors.

    Args:
        operator: anything with ``shape``, ``dtype``, ``device`` and ``@`` that is symmetric.
        k: how many, or with ``down_to`` the most; no more than d are returned.
        down_to: return those above it, and the first below, at least ``least`` and at most k.
        least: how many at least, where ``down_to`` is given.
        preconditioner: a symmetric positive definite P ``(d, d)``: the pairs are those of
            :math:`PA`, as in :func:`top_eigenpair`.
        start: the ``subspace`` ``(n, d)`` of an earlier result, or other vectors that span nearly the
            wanted ones. Such a search is not certified: it knows what is near the start.
        tol: the largest residual of each pair relative to its value.
        max_iter: the largest number of products.
        seed: of the random starts; torch's own generators are not touched.
        most_vectors: how many vectors of length d are held, by default k + 40 and at least k + 6;
            fewer take more products. The result takes up to 40 more.

    Everything of length d stays on the operator's device; there is one small host transfer a product.

    Raises:
        ValueError: for arguments out of range, and for a preconditioner that turns out not to be
            positive definite.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.tensor([3.0, 5.0, -7.0, 5.0, 1.0]) * vector
    >>> found = top_eigenpairs(Diagonal(5, torch.float32, torch.device("cpu")), 3)
    >>> found.values.round(decimals=3), found.converged, found.above(4.0)
    (tensor([5., 5., 3.], dtype=torch.float64), True, 2)
    """
    tol, max_iter, k = positive("tol", tol), whole("max_iter", max_iter), whole("k", k)
    least = min(whole("least", least), k)
    if most_vectors is not None:
        most_vectors = whole("most_vectors", most_vectors, least=k + FEWEST_MORE)
    size, inner = operator.shape[0], InnerProduct.for_operator(operator, preconditioner)
    if inner.whole_size(size) == 0:
        raise ValueError("operator has shape (0, 0): expected at least one dimension")
    if start is not None and (start.dim() != 2 or start.shape[1] != size or len(start) == 0):
        raise ValueError(f"start has shape {tuple(start.shape)}: expected (n, {size})")
    width = min(most_vectors or k + MORE, inner.whole_size(size))
    search = Search(operator, inner, tol, seed, keep=True, most_vectors=width)
    with torch.autocast(operator.device.type, enabled=False):
        return _Pairs(search, min(k, inner.whole_size(size)), down_to, least).found(start, max_iter)


@dataclass(frozen=True)
class _Pairs:
    """A search for several eigenpairs."""

    search: Search
    k: int
    down_to: float | None
    least: int

    def found(self, start: Tensor | None, max_iter: int) -> Eigenpairs:
        search, rows = self.search, None if start is None else self._rows(start)
        warm, first = rows is not None, self._drawn() if rows is None else rows
        given = first.held if warm else 0
        width, size = search.most_vectors, search.inner.whole_size(search.operator.shape[0])
        iteration = LanczosIteration(
            search.operator, search.inner, first, width, search.seed, self.k
        )
        while True:
            iteration.step()
            count = self._count(iteration)
            whole = iteration.done == size
            settled = (
                iteration.products >= given
                and iteration.done >= count
                and bool(self._small(iteration)[-count:].all())
            )
            verdict = "certified" if warm else self._verdict(iteration, count)
            converged = whole or (settled and verdict == "certified")
            if converged or iteration.products >= max_iter:
                break
            blocked = [] if iteration.products < given else self._blocked(iteration, count)
            if settled and verdict == "unknown":
                iteration.renew(count, 1 if width == size else _ROOM)
            elif len(blocked):
                iteration.repeat(torch.tensor(blocked))
            else:
                iteration.extend()
                if iteration.products == given:
                    self._narrow(iteration, count)
        return self._result(iteration, min(count, iteration.done), converged, warm)

    def _count(self, iteration: LanczosIteration) -> int:
        """Return how many pairs are wanted, as far as the Ritz values say."""
        if self.down_to is None:
            return self.k
        above = int((iteration.values * iteration.unit >= self.down_to).sum())
        return min(self.k, max(self.least, above + 1))

    def _small(self, iteration: LanczosIteration) -> Tensor:
        """Return which Ritz pairs have converged; to rounding is enough for small values."""
        small: Tensor = iteration.residuals <= self._allowed(iteration)
        return small

    def _allowed(self, iteration: LanczosIteration) -> Tensor:
        allowed: Tensor = self.search.tol * iteration.values.abs()
        return allowed.clamp(min=iteration.rounding)

    def _blocked(self, iteration: LanczosIteration, count: int) -> list[int]:
        """Return the wanted pairs that have not converged for directions that were forgotten alone."""
        beyond, allowed = iteration.beyond_reach, self._allowed(iteration)
        blocked = (beyond > allowed) & (iteration.residuals - beyond <= allowed)
        blocked[: max(iteration.done - count, 0)] = False
        return [int(index) for index in blocked.nonzero()]

    def _narrow(self, iteration: LanczosIteration, count: int) -> None:
        """Go on with the residuals of the wanted pairs that have not converged."""
        large = ~self._small(iteration)
        large[: max(iteration.done - count, 0)] = False
        if iteration.done >= count and iteration.basis.held > iteration.done:
            iteration.narrow(large.nonzero()[:, 0])

    def _verdict(
        self, iteration: LanczosIteration, count: int
    ) -> Literal["certified", "open", "unknown"]:
        """Say what the second start knows of eigenvalues above the last wanted one.

        ``"unknown"`` if there is none since the result last changed.
        """
        search = self.search
        if iteration.known is None or iteration.done < count:
            return "unknown"
        found, inside = iteration.values.flip(0)[:count], iteration.known.values(count)
        changed = found[: len(inside)] - inside > self._allowed(iteration).flip(0)[: len(inside)]
        if len(inside) < count or bool(changed.any()):
            return "unknown"
        value, steps = float(found[-1]), iteration.done - len(iteration.known.projected)
        if search.inner.preconditioner is not None and steps < _AT_LEAST:
            return "open"
        top, residual = iteration.outside()
        if iteration.scale == 0.0:  # of a random direction too
            return "certified"
        if top < value and search.unlikely(iteration.missed_outside(value)):
            return "certified"
        # Another eigenvalue is as large as the last, up to the tolerance.
        near = residual <= max(search.tol * abs(top), iteration.rounding) and search.unlikely(
            iteration.missed_outside(max(top, value) + search.gap(value, iteration.scale))
        )
        return "certified" if near else "open"

    def _rows(self, start: Tensor) -> Basis | None:
        search, inner = self.search, self.search.inner
        most = min(self.k + _GUARDED, search.most_vectors // 2 - 1)
        rows = start[: max(most, 1)].to(search.operator.device, search.operator.dtype)
        rows = rows / torch.stack([inner.dual(row).norm for row in rows])[:, None]
        if len(rows) > self.k:
            noise = inner.noise(search.operator, search.seed).covector
            rows = torch.cat([rows[:-1], (rows[-1] + _FRESH * noise)[None]])
        basis, dependent = basis_of_kept(rows, inner, search.most_vectors - len(rows))
        return None if bool(inner.on_host(dependent[None])) else basis

    def _drawn(self) -> Basis:
        search = self.search
        noise = search.inner.noise(search.operator, search.seed)
        if search.inner.preconditioner is not None:
            search.inner.check_norm(float(noise.norm))

        def room(row: Tensor) -> Tensor:
            rows = row.new_empty(search.most_vectors, len(row))
            rows[0] = row
            return rows

        covectors = room(noise.covector)
        vectors = covectors if noise.vector is noise.covector else room(noise.vector)
        basis = Basis(covectors, vectors, search.inner)
        basis.held = 1
        return basis

    def _result(
        self, iteration: LanczosIteration, count: int, converged: bool, warm: bool
    ) -> Eigenpairs:
        inner, unit = self.search.inner, iteration.unit
        bounds = None
        if inner.preconditioner is None and not warm:
            bounds = iteration.upper_bounds(count)
        values, residuals = iteration.values.flip(0)[:count], iteration.residuals.flip(0)[:count]
        kept = iteration.ritz_vectors(min(count + _GUARDED, iteration.done))
        subspace, vectors = kept.covectors, kept.vectors[:count]
        if inner.preconditioner is not None:
            vectors = vectors / torch.stack([inner.norm(row) for row in vectors])[:, None]
        return Eigenpairs(
            values * unit,
            vectors.T,
            residuals * unit,
            iteration.products,
            converged,
            None if bounds is None else bounds * unit,
            subspace,
        )
