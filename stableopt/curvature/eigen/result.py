"""What a search for the top eigenpair returns, and how it may fail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stableopt._deprecation import warn_renamed

__all__ = ["UNCERTAINTY", "Eigenpair", "small_enough"]

UNCERTAINTY = 0.01
"""Probability that a largest eigenvalue lies above its ``upper_bound``."""


@dataclass(frozen=True)
class Eigenpair:
    r"""The largest eigenvalue of a symmetric operator, and what is known of its accuracy.

    With a preconditioner P it is that of :math:`PH`, which is that of the symmetric
    :math:`P^{1/2}HP^{1/2}`; read the residual as that of the latter.

    Attributes:
        value: the Ritz value; at most the largest eigenvalue, up to rounding.
        vector: the unit Ritz vector x ``(d,)``, on the operator's device: :math:`PHx = \lambda x`
            in the limit, with :math:`|x| = 1` in the plain Euclidean norm.
        absolute_residual: ``|A v - value v|``: an eigenvalue of A lies within this distance of
            ``value``. With a preconditioner :math:`A = P^{1/2}HP^{1/2}`, and v is
            :math:`P^{-1/2}x` scaled to 1.
        products: how many products with the operator it took.
        converged: whether ``absolute_residual <= tol * |value|`` was reached.
        upper_bound: for a Lanczos search from a random start, what the largest eigenvalue exceeds with
            probability at most 0.01 over the starts; ``None`` for other searches, whose start is not
            uniform on the sphere, and for ones too short. For k products and
            :math:`\epsilon = (\ln(2\cdot1.648\sqrt d/0.01)/(2k-1))^2 < 1/2` it is
            :math:`\theta + \epsilon(\theta-\theta_{\min})/(1-2\epsilon)`, where :math:`\theta_{\min}`
            is the smallest Ritz value seen and k counts up to the first restart. By Kuczyński &
            Woźniakowski (*Estimating the largest eigenvalue by the power and Lanczos algorithms with
            a random start*, 1992, Theorem 4.2), :math:`\lambda_1 - \theta \le
            \epsilon(\lambda_1-\lambda_d)` fails with probability at most
            :math:`1.648\sqrt d\,e^{-\sqrt\epsilon(2k-1)}`: theirs is for a positive definite matrix
            and the error relative to :math:`\lambda_1`; a shift, which Lanczos does not see, makes it
            this one for any. Applied to -A too, it bounds the unknown :math:`\lambda_d`. Where the
            Krylov space is exhausted, the value is exact, and this is ``value + absolute_residual``.
        subspace: if asked for, what the next search goes on from: covectors ``(k, d)``, orthonormal,
            nine Ritz vectors, best first, and a direction not yet explored. ``None`` otherwise.
    """

    value: float
    vector: Tensor
    absolute_residual: float
    products: int
    converged: bool
    upper_bound: float | None = None
    subspace: Tensor | None = None

    @property
    def relative_residual(self) -> float:
        """The residual over ``|value|``; zero where the value is."""
        return self.absolute_residual / abs(self.value) if self.value else 0.0

    @property
    def residual(self) -> float:
        """Deprecated: the absolute residual, whereas other results call the relative one so."""
        warn_renamed("Eigenpair.residual", "absolute_residual or relative_residual")
        return self.absolute_residual


def small_enough(residual: float, value: float, scale: float, tol: float, eps: float) -> bool:
    """Return whether the residual is within ``tol`` of the value, or both within rounding of zero."""
    # A value that is itself below the rounding of the products is zero, as far as can be told.
    floor = 10 * eps * scale
    return residual <= tol * abs(value) or max(residual, abs(value)) <= floor
