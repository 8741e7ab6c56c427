r"""`top_eigenpair`: the algebraically largest eigenvalue of an operator, with a certificate.

For a unit vector v with Ritz value :math:`\theta = v^\top A v`, the residual :math:`\|Av-\theta v\|`
bounds the distance from :math:`\theta` to an eigenvalue of A, and :math:`\theta` is at most the largest
eigenvalue. A search stops when the residual is small *relative to the value* and an eigenvalue more than
5 % above it is improbable: the random start would have to be nearly orthogonal to its eigenvector
(:mod:`~stableopt.curvature.eigen.certificate`). A tighter tolerance never takes fewer products. Five
examples::

    top_eigenpair(Hessian(problem))                       # from a random start
    last = top_eigenpair(Hessian(problem), keep=True)     # keep a subspace
    top_eigenpair(Hessian(problem), keep=True, start=last.subspace)  # warm start: mostly 3 products
    top_eigenpair(operator, most_vectors=4)               # little memory, more products
    top_eigenpair(Hessian(problem), preconditioner=P)     # of P H, from products with P
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature.eigen.follow import ASKED, follow
from stableopt.curvature.eigen.inner_product import Dual, InnerProduct
from stableopt.curvature.eigen.kept_subspace import KEPT, followable, subspace_to_keep
from stableopt.curvature.eigen.lanczos import LanczosIteration
from stableopt.curvature.eigen.result import Eigenpair, Search
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["top_eigenpair"]

_FRESH = 0.05
"""Norm of the noise added to a unit start, so that an eigenvector that has overtaken can be found."""

_AT_LEAST = {"near": 5, "uniform": 1, "random": 12, "followed": 16}
"""Fewest products before a small residual counts, since it is small at every eigenvector. Starts: near
an eigenvector; uniform on the sphere, where the probability of a miss decides; random with a
preconditioner, where that probability is only an estimate; and random with ``keep=True``, since a miss
would be kept."""

_FEWEST_VECTORS = 4
"""Fewest vectors that Lanczos can work with."""


def top_eigenpair(
    operator: Operator,
    *,
    preconditioner: Preconditioner | None = None,
    method: Literal["lanczos", "power"] = "lanczos",
    start: Tensor | None = None,
    keep: bool = False,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
    most_vectors: int = 40,
) -> Eigenpair:
    r"""Return the algebraically largest eigenvalue of a symmetric ``operator`` and its vector.

    Args:
        operator: any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``@``. If it has an
            ``inner_product``, the search uses that.
        preconditioner: a symmetric positive definite P ``(d, d)`` with ``@`` on ``(d,)``. The
            eigenpair is then that of :math:`PH`. Each product with H takes one with P; neither an
            inverse nor a root of P is needed.
        method: ``"lanczos"`` orthogonalises each product against all vectors held, and restarts when
            there are ``most_vectors`` (Lanczos, 1950; Wu & Simon, 2000). ``"power"`` is deprecated,
            since a power iteration may end at the most negative eigenvalue; it is Lanczos with four
            vectors.
        start: the ``subspace`` ``(k, d)`` of an earlier result, whose eigenpair is then followed in
            few products; or a vector ``(d,)`` near the eigenvector, to which a little noise is added
            (with a preconditioner this takes one product more). Random if ``None``.
        keep: whether the result has a ``subspace`` of ten vectors, to start the next search from.
        tol: the largest relative residual.
        max_iter: the largest number of products.
        seed: of the random start and the noise; torch's global generators are not used.
        most_vectors: the most vectors of length d that Lanczos holds, at least 4; fewer take more
            products.

    All vectors of length d stay on the operator's device. Each product takes one small host transfer. A
    preconditioner may take one more, at the start.

    Raises:
        ValueError: for arguments out of range, and for a preconditioner that turns out not to be
            positive definite.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.tensor([3.0, -7.0, 1.0]) * vector
    >>> operator = Diagonal(3, torch.float32, torch.device("cpu"))
    >>> top = top_eigenpair(operator, tol=1e-5)
    >>> round(top.value, 4), top.converged
    (3.0, True)
    >>> P = torch.diag(torch.tensor([1.0, 1.0, 5.0]))
    >>> round(top_eigenpair(operator, preconditioner=P, tol=1e-5).value, 4)
    5.0
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method={method!r}: expected 'lanczos' or 'power'")
    tol, max_iter = positive("tol", tol), whole("max_iter", max_iter)
    most_vectors = whole("most_vectors", most_vectors, least=_FEWEST_VECTORS)
    if method == "power":
        most_vectors = _FEWEST_VECTORS
        warnings.warn(
            "method='power' is deprecated and will be removed in 1.0: Lanczos runs with four vectors;"
            " leave method out, and pass most_vectors=4 for little memory",
            DeprecationWarning,
            stacklevel=2,
        )
    size, inner = operator.shape[0], InnerProduct.for_operator(operator, preconditioner)
    if inner.whole_size(size) == 0:
        raise ValueError("operator has shape (0, 0): expected at least one dimension")
    if start is not None and (
        start.dim() not in (1, 2) or start.shape[-1] != size or start.shape[0] == 0
    ):
        raise ValueError(f"start has shape {tuple(start.shape)}: expected ({size},) or (k, {size})")
    search = _StartedSearch(operator, inner, tol, seed, keep, most_vectors)
    # An ambient autocast would compute the projections in half precision.
    with torch.autocast(operator.device.type, enabled=False):
        if start is None:
            return search.from_random(max_iter)
        start = start.to(operator.device)
        if start.dim() == 1:
            return search.from_vector(start, max_iter)
        return search.from_subspace(start, max_iter)


@dataclass(frozen=True)
class _StartedSearch(Search):
    """A search from each kind of start."""

    def from_random(self, max_iter: int) -> Eigenpair:
        return _lanczos(self, self._noise(), max_iter, random_start=True)

    def from_vector(self, vector: Tensor, max_iter: int) -> Eigenpair:
        if self.inner.preconditioner is None:
            return self._from_covector(vector, max_iter)
        if max_iter == 1:
            return self.from_random(max_iter)
        vector = vector.to(self.operator.dtype)
        # The covector of an eigenvector x of P H is P^-1 x = H x / lambda: one product.
        found = self._from_covector(self.operator @ vector, max_iter - 1)
        return replace(found, products=found.products + 1)

    def from_subspace(self, kept: Tensor, max_iter: int) -> Eigenpair:
        if max_iter < 3 or not followable(kept, self.inner):
            return self._from_covector(kept[0], max_iter)
        followed = follow(self, kept.to(self.operator.dtype), max_iter)
        if followed is None:
            fresh = self.from_random(max_iter - ASKED)
            return replace(fresh, products=fresh.products + ASKED)
        if followed.converged or followed.products == max_iter:
            return followed
        fresh = self.from_random(max_iter - followed.products)
        # The search from scratch may end at another eigenvector: return the larger eigenpair.
        best = followed if followed.value > fresh.value else fresh
        return replace(best, products=followed.products + fresh.products)

    def fewest_products(self, *, random_start: bool) -> int:
        """Return the number of products before a small residual counts."""
        if not random_start:
            return _AT_LEAST["near"]
        if self.keep:
            return _AT_LEAST["followed"]
        return _AT_LEAST["uniform" if self.inner.preconditioner is None else "random"]

    def _from_covector(self, covector: Tensor, max_iter: int) -> Eigenpair:
        first, is_random = self._with_noise(covector)
        starts = [first]
        del first
        # Popped, the start is not referenced here while the search runs.
        return _lanczos(self, starts.pop(), max_iter, random_start=is_random)

    def _with_noise(self, covector: Tensor) -> tuple[Dual, Tensor]:
        """Return the start near ``covector``, and whether it is random, as a number on the device."""
        near, noise = self.inner.dual(covector.to(self.operator.dtype)), self._noise()
        first = self.inner.add(near.normalised(), _FRESH, noise).normalised()
        # Noise replaces a zero or non-finite covector. The host learns of it with the first product.
        unusable = ~((near.norm > 0) & (near.norm < torch.inf))
        del near
        first = Dual(*(torch.where(unusable, n, f) for n, f in zip(noise, first, strict=True)))
        if self.inner.preconditioner is None:
            first = first._replace(vector=first.covector)
        return first, unusable.to(first.norm)

    def _noise(self) -> Dual:
        noise = self.inner.noise(self.operator, self.seed)
        if self.inner.preconditioner is not None:
            self.inner.check_norm(float(noise.norm))
        return noise


def _lanczos(
    search: _StartedSearch, first: Dual, max_iter: int, *, random_start: bool | Tensor
) -> Eigenpair:
    """Return the top eigenpair of P H, from ``first``, of norm 1.

    A basis of ``most_vectors`` rows is restarted with its best Ritz vectors.

    Args:
        search: operator, inner product and options.
        first: the start.
        max_iter: the largest number of products.
        random_start: whether the start is random; a number on the device if the host does not know yet.
            From a random start the search continues until a larger eigenvalue is unlikely.
    """
    size = search.inner.whole_size(search.operator.shape[0])
    width = min(search.most_vectors, max_iter, size)
    iteration = LanczosIteration(search.operator, search.inner, first, width, search.seed)
    del first  # now the first row of the basis
    iteration.device_flag = random_start if isinstance(random_start, Tensor) else None
    while True:
        iteration.step()
        if isinstance(random_start, Tensor):
            random_start = bool(iteration.host_flag)
        products, scale = iteration.products, iteration.scale
        value, residual = float(iteration.ritz_values[-1]), float(iteration.residuals[-1])
        converged = iteration.exhausted or (
            products >= search.fewest_products(random_start=random_start)
            and search.is_small(residual, value, scale)
            and (not random_start or search.is_unlikely(iteration.missed(search.gap(value, scale))))
        )
        if converged or products == max_iter:
            break
        iteration.extend()
    basis, unit, top = iteration.basis, iteration.unit, iteration.ritz_coordinates[:, -1]
    bound, subspace = None, None
    if iteration.exhausted:
        bound = value + max(residual, iteration.rounding)
    elif random_start and search.inner.preconditioner is None:
        # With a preconditioner the start is not uniform on the sphere.
        bound = iteration.upper_bound()
        if converged and bound is not None:
            # The bound is computed to 1 % of its distance; the gap itself has been checked exactly.
            bound = min(bound, value + search.gap(value, scale))
    if search.keep:
        best = iteration.ritz_coordinates[:, 1 - KEPT :].T.flip(0)
        explorer = iteration.residual_vector
        if iteration.beta > 0:
            explorer = explorer.normalised()
        subspace = subspace_to_keep(basis.combined(best, room=1), explorer.covector, search.seed)
    del iteration  # and its residual vector, before another vector is allocated
    return Eigenpair(
        value * unit,
        basis.unit_vector(top),
        residual * unit,
        products,
        converged,
        None if bound is None else bound * unit,
        subspace,
        covector=basis.covector(top),
    )
