r"""`top_eigenpairs`: the algebraically largest eigenvalues of an operator, with a certificate.

Lanczos from one start finds one eigenvector of each eigenvalue, and may miss an eigenvector to which the
start is nearly orthogonal. Once k residuals are small, a search from scratch therefore continues with a
second random start, orthogonal to the Ritz vectors kept. If that finds an eigenvalue above the k-th, the
eigenvalue joins the result. If it finds none, it bounds every eigenvalue from above, up to a small
probability (:class:`~stableopt.curvature.eigen.certificate.Deflation`). Four examples::

    top_eigenpairs(Hessian(problem), 10)                         # ten, each with its multiplicity
    top_eigenpairs(Hessian(problem), 20, down_to=0.75 * limit)   # all above, and the first below
    last = top_eigenpairs(Hessian(problem), 10)
    top_eigenpairs(Hessian(problem), 10, start=last.subspace)    # warm start: about eleven products
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
"""Rows kept free for the second start: with the large eigenvectors deflated, it takes about ten."""

FEWEST_MORE = 6
"""Fewest vectors held in addition to the wanted ones, so that a second start has room."""

_GUARDED = 1
"""Ritz vectors kept for the next search in addition to the wanted ones."""

_FRESH = 0.1
"""Norm of the noise in the last of them; directions outside the subspace enter through it."""

_AT_LEAST = 12
"""Fewest products of the second start with a preconditioner, where its probability of a miss is an
estimate."""


@dataclass(frozen=True)
class Eigenpairs:
    r"""The largest eigenvalues of a symmetric operator, largest first, and how accurate they are.

    Attributes:
        values: Ritz values :math:`\theta_j` ``(k,)``, in float64 on the CPU; each at most the j-th
            largest eigenvalue.
        vectors: Ritz vectors of norm 1 ``(d, k)``, as columns. They are orthogonal; with a
            preconditioner, in the inner product of its inverse.
        absolute_residuals: upper bounds of :math:`\|Av_j - \theta_jv_j\|`, ``(k,)``; with a
            preconditioner, for :math:`P^{1/2}AP^{1/2}`.
        products: products with the operator.
        converged: whether each residual is at most ``tol`` times its value and, for a search from
            scratch, another eigenvalue above the last is ruled out as in :class:`Eigenpair`. Another
            eigenvalue within ``tol`` of the last may be missing.
        upper_bounds: upper bounds of the k largest eigenvalues ``(k,)``, all true with a probability of
            0.998, for any spectrum. ``None`` where :class:`Eigenpair` has none, and for a search that
            ended before the second start gave them.
        subspace: covectors ``(n, d)``, the ``start`` of the next search.
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

        At least as many eigenvalues exceed it.
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
        operator: any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``@``.
        k: the number of pairs; with ``down_to``, the largest number. At most d are returned.
        down_to: return the eigenvalues above it and the first below, at least ``least`` and at most k.
        least: the smallest number of pairs with ``down_to``.
        preconditioner: a symmetric positive definite P ``(d, d)``: the pairs are those of
            :math:`PA`, as in :func:`top_eigenpair`.
        start: the ``subspace`` ``(n, d)`` of an earlier result, or other vectors that nearly span the
            wanted eigenvectors. Such a search is not certified: it finds eigenvectors near the start.
        tol: the largest residual of each pair relative to its value.
        max_iter: the largest number of products.
        seed: of the random starts; torch's global generators are not used.
        most_vectors: the most vectors of length d held, by default k + 40 and at least k + 6; fewer take
            more products. The result takes up to 40 more.

    All vectors of length d stay on the operator's device. Each product takes one small host transfer.

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
        return _Pairs(search, min(k, inner.whole_size(size)), down_to, least).run(start, max_iter)


@dataclass(frozen=True)
class _Pairs:
    """A search for several eigenpairs."""

    search: Search
    k: int
    down_to: float | None
    least: int

    def run(self, start: Tensor | None, max_iter: int) -> Eigenpairs:
        search = self.search
        basis = None if start is None else self._basis_of(start)
        warm = basis is not None
        if basis is None:
            basis = self._random_basis()
        # A warm start's rows are all multiplied before the search may end.
        given = basis.num_rows if warm else 0
        width, size = search.most_vectors, search.inner.whole_size(search.operator.shape[0])
        iteration = LanczosIteration(
            search.operator, search.inner, basis, width, search.seed, self.k
        )
        while True:
            iteration.step()
            count = self._count(iteration)
            settled = (
                iteration.products >= given
                and iteration.multiplied >= count
                and bool(self._is_small(iteration)[-count:].all())
            )
            verdict = "certified" if warm else self._verdict(iteration, count)
            complete = iteration.multiplied == size
            converged = complete or (settled and verdict == "certified")
            if converged or iteration.products >= max_iter:
                break
            blocked = [] if iteration.products < given else self._blocked(iteration, count)
            if settled and verdict == "unknown":
                iteration.start_in_complement(count, 1 if width == size else _ROOM)
            elif blocked:
                iteration.remultiply(torch.tensor(blocked, device="cpu"))
            else:
                iteration.extend()
                if iteration.products == given:
                    self._compress_pending(iteration, count)
        return self._result(iteration, min(count, iteration.multiplied), converged, warm)

    def _count(self, iteration: LanczosIteration) -> int:
        """Return the number of pairs wanted, by the present Ritz values."""
        if self.down_to is None:
            return self.k
        above = int((iteration.ritz_values * iteration.unit >= self.down_to).sum())
        return min(self.k, max(self.least, above + 1))

    def _is_small(self, iteration: LanczosIteration) -> Tensor:
        """Return whether each residual is small enough."""
        small: Tensor = iteration.residuals <= self._tolerance(iteration)
        return small

    def _tolerance(self, iteration: LanczosIteration) -> Tensor:
        """Return the largest residual allowed for each Ritz pair, at least its rounding error."""
        tolerance: Tensor = self.search.tol * iteration.ritz_values.abs()
        return tolerance.clamp(min=iteration.rounding)

    def _blocked(self, iteration: LanczosIteration, count: int) -> list[int]:
        """Return the indices of wanted pairs kept from converging by discarded directions alone."""
        discarded, tolerance = iteration.discarded_residuals, self._tolerance(iteration)
        blocked = (discarded > tolerance) & (iteration.residuals - discarded <= tolerance)
        blocked[: max(iteration.multiplied - count, 0)] = False
        return [int(index) for index in blocked.nonzero()]

    def _compress_pending(self, iteration: LanczosIteration, count: int) -> None:
        """Keep the pending directions in which wanted pairs have large residuals."""
        large = ~self._is_small(iteration)
        large[: max(iteration.multiplied - count, 0)] = False
        if iteration.multiplied >= count and iteration.basis.num_rows > iteration.multiplied:
            iteration.compress_pending(large.nonzero()[:, 0])

    def _verdict(
        self, iteration: LanczosIteration, count: int
    ) -> Literal["certified", "open", "unknown"]:
        """Return what the second start says about eigenvalues above the last wanted one.

        ``"certified"`` if there are none, ``"open"`` if more products are needed, ``"unknown"`` if there
        was no second start since the result last changed.
        """
        search = self.search
        if iteration.deflation is None or iteration.multiplied < count:
            return "unknown"
        present = iteration.ritz_values.flip(0)[:count]
        deflated = iteration.deflation.eigenvalues(count)
        tolerance = self._tolerance(iteration).flip(0)[: len(deflated)]
        changed = present[: len(deflated)] - deflated > tolerance
        if len(deflated) < count or bool(changed.any()):
            return "unknown"
        steps = iteration.multiplied - len(iteration.deflation.projected)
        if search.inner.preconditioner is not None and steps < _AT_LEAST:
            return "open"
        value = float(present[-1])
        top, residual = iteration.complement_top()
        if iteration.scale == 0.0:  # the product with a random direction vanishes
            return "certified"
        if top < value and search.is_unlikely(iteration.missed_in_complement(value)):
            return "certified"
        # The next eigenvalue may equal the last wanted one, up to the tolerance.
        above = max(top, value) + search.gap(value, iteration.scale)
        settled = residual <= max(search.tol * abs(top), iteration.rounding)
        if settled and search.is_unlikely(iteration.missed_in_complement(above)):
            return "certified"
        return "open"

    def _basis_of(self, start: Tensor) -> Basis | None:
        """Return an orthonormal basis of a given start; ``None`` if its rows are linearly dependent."""
        search, inner = self.search, self.search.inner
        most = min(self.k + _GUARDED, search.most_vectors // 2 - 1)
        rows = start[: max(most, 1)].to(search.operator.device, search.operator.dtype)
        rows = rows / torch.stack([inner.dual(row).norm for row in rows])[:, None]
        if len(rows) > self.k:
            noise = inner.noise(search.operator, search.seed).covector
            rows = torch.cat([rows[:-1], (rows[-1] + _FRESH * noise)[None]])
        basis, dependent = basis_of_kept(rows, inner, search.most_vectors - len(rows))
        return None if bool(inner.on_host(dependent[None])) else basis

    def _random_basis(self) -> Basis:
        """Return a basis of one random row, with room for all others."""
        search = self.search
        noise = search.inner.noise(search.operator, search.seed)
        if search.inner.preconditioner is not None:
            search.inner.check_norm(float(noise.norm))

        def with_room(row: Tensor) -> Tensor:
            rows = row.new_empty(search.most_vectors, len(row))
            rows[0] = row
            return rows

        covectors = with_room(noise.covector)
        vectors = covectors if noise.vector is noise.covector else with_room(noise.vector)
        basis = Basis(covectors, vectors, search.inner)
        basis.num_rows = 1
        return basis

    def _result(
        self, iteration: LanczosIteration, count: int, converged: bool, warm: bool
    ) -> Eigenpairs:
        inner, unit = self.search.inner, iteration.unit
        bounds = None
        if inner.preconditioner is None and not warm:
            bounds = iteration.upper_bounds(count)
        values, residuals = (
            iteration.ritz_values.flip(0)[:count],
            iteration.residuals.flip(0)[:count],
        )
        kept = iteration.ritz_vectors(min(count + _GUARDED, iteration.multiplied))
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
