r"""`top_eigenpair`: the algebraically largest eigenvalue of an operator, with a certificate.

For a unit vector v with Ritz value :math:`\theta = v^\top A v`, the residual :math:`\|Av-\theta v\|`
bounds the distance from :math:`\theta` to an eigenvalue of A; and :math:`\theta` never exceeds the
largest. A search stops when the residual is small *relative to the value*, and when an eigenvalue more
than 5 % above it, which a random start would have to be nearly orthogonal to, is improbable
(:mod:`~stableopt.curvature.eigen.certificate`). A tighter tolerance never takes fewer products. Five
examples::

    top_eigenpair(Hessian(problem))                       # from a random start
    last = top_eigenpair(Hessian(problem), keep=True)     # keep a subspace, and as training moves on
    top_eigenpair(Hessian(problem), keep=True, start=last.subspace)  # follow it: mostly 3 products
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
from stableopt.curvature.eigen.kept_subspace import followable
from stableopt.curvature.eigen.lanczos import lanczos
from stableopt.curvature.eigen.result import Eigenpair, Search
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["top_eigenpair"]

_FRESH = 0.05
"""Norm of the noise mixed into a unit start, which lets an eigenvector be found that has overtaken the
old one."""

_AT_LEAST = {"near": 5, "uniform": 1, "random": 12, "followed": 16}
"""Products before Lanczos believes a small residual, since at any other eigenvector it is small too:
from a start near one; from one uniform on the sphere, where the probability of a miss decides; from a
random one with a preconditioner, where that is only an estimate; and from one whose result will be
followed, with whichever it has missed."""

_FEWEST_VECTORS = 4
"""Vectors that Lanczos needs at least."""


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
        operator: anything with ``shape``, ``dtype``, ``device`` and ``@`` that is symmetric. If it has
            an ``inner_product``, its vectors are taken in that.
        preconditioner: a symmetric positive definite P ``(d, d)`` with ``@`` on ``(d,)``. The
            eigenpair is then that of :math:`PH`; each product with H takes one with P, and neither
            an inverse nor a root of P is needed.
        method: ``"lanczos"`` orthogonalises each product against all vectors held and restarts when
            ``most_vectors`` are (Lanczos, 1950; Wu & Simon, 2000). ``"power"`` is deprecated, since a
            power iteration may end at the most negative eigenvalue; it is Lanczos with four vectors.
        start: the ``subspace`` ``(k, d)`` of an earlier result, whose eigenpair is then followed in
            few products, or a single vector ``(d,)`` near the eigenvector, into which a little noise
            is mixed; with a preconditioner a vector costs one product more. Random if ``None``.
        keep: whether the result has a ``subspace``, of ten vectors, for the next search to start from.
        tol: the largest relative residual.
        max_iter: the largest number of products.
        seed: of the random start and the noise; torch's own generators are not touched.
        most_vectors: how many vectors of length d Lanczos holds, at least 4; fewer take more products.

    Everything of length d stays on the operator's device. There is one small host transfer a product,
    and one more at the start from a vector or with a preconditioner.

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
    search = _Start(operator, inner, tol, seed, keep, most_vectors)
    # Under an ambient autocast the projections would be products of half-precision numbers.
    with torch.autocast(operator.device.type, enabled=False):
        if start is None:
            return search.random(max_iter)
        start = start.to(operator.device)
        if start.dim() == 1:
            return search.near(start, max_iter)
        return search.follow(start, max_iter)


@dataclass(frozen=True)
class _Start(Search):
    """A search from each kind of start."""

    def random(self, max_iter: int) -> Eigenpair:
        return lanczos(self, self._noise(), max_iter, least=self._least, drawn=True)

    @property
    def _least(self) -> tuple[int, int]:
        """Return the fewest products from a start that is near, and from a random one."""
        start = "uniform" if self.inner.preconditioner is None else "random"
        return _AT_LEAST["near"], _AT_LEAST["followed" if self.keep else start]

    def near(self, vector: Tensor, max_iter: int) -> Eigenpair:
        if self.inner.preconditioner is None:
            return self._near_covector(vector, max_iter)
        if max_iter == 1:
            return self.random(max_iter)
        vector = vector.to(self.operator.dtype)
        # Of an eigenvector x of P H, the covector is P^-1 x = H x / lambda: one product.
        found = self._near_covector(self.operator @ vector, max_iter - 1)
        return replace(found, products=found.products + 1)

    def follow(self, kept: Tensor, max_iter: int) -> Eigenpair:
        if max_iter < 3 or not followable(kept, self.inner):
            return self._near_covector(kept[0], max_iter)
        followed = follow(self, kept.to(self.operator.dtype), max_iter)
        if followed is None:
            fresh = self.random(max_iter - ASKED)
            return replace(fresh, products=fresh.products + ASKED)
        if followed.converged or followed.products == max_iter:
            return followed
        fresh = self.random(max_iter - followed.products)
        # Of two eigenpairs the larger: the search from scratch may end at another eigenvector.
        best = followed if followed.value > fresh.value else fresh
        return replace(best, products=followed.products + fresh.products)

    def _near_covector(self, covector: Tensor, max_iter: int) -> Eigenpair:
        first, drawn = self._beginning(covector)
        held = [first]
        del first
        # Popped, it is not held here while the search runs.
        return lanczos(self, held.pop(), max_iter, least=self._least, drawn=drawn)

    def _beginning(self, covector: Tensor) -> tuple[Dual, Tensor]:
        """Return the first vector of a search near ``covector``, and whether it is all random."""
        near, fresh = self.inner.dual(covector.to(self.operator.dtype)), self._noise()
        first = self.inner.add(near.normalised(), _FRESH, fresh).normalised()
        # A zero or non-finite start is none. The host reads so with the first product.
        unusable = ~((near.norm > 0) & (near.norm < torch.inf))
        del near
        first = Dual(*(torch.where(unusable, f, n) for f, n in zip(fresh, first, strict=True)))
        if self.inner.preconditioner is None:
            first = first._replace(vector=first.covector)
        return first, unusable.to(first.norm)

    def _noise(self) -> Dual:
        fresh = self.inner.noise(self.operator, self.seed)
        if self.inner.preconditioner is not None:
            self.inner.check_norm(float(fresh.norm))
        return fresh
