r"""`trace`: the sum of all eigenvalues, with a standard error.

Hutch++ (Meyer, Musco, Musco & Woodruff, *Hutch++: optimal stochastic trace estimation*, 2021) computes
the trace exactly on a subspace Q near the eigenvectors of large eigenvalues, and estimates it on the
complement by vectors g of random signs:

.. math::
    \mathrm{tr}\,A = \mathrm{tr}\,Q^\top AQ + E\,[g^\top(I-QQ^\top)A(I-QQ^\top)g]

Here Q is the Krylov space of a random start (Chen & Hallman, *Krylov-aware stochastic trace estimation*,
2023). Lanczos provides :math:`T = Q^\top AQ` without further products; a random sketch needs as many
again. By :math:`AQ = QT + \beta q e_m^\top`, a sample takes one product, :math:`Ag`, which also serves
any later, larger Q:

.. math::
    g^\top Ag - x^\top Tx - 2\beta x_m\,q^\top g, \qquad x = Q^\top g

Up to about half of the products go into Q; in Hutch++, two thirds. Two examples::

    trace(Hessian(problem)).value               # with a standard error of 1 %
    trace(Hessian(problem)).effective_rank      # trace over the largest eigenvalue
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor

from stableopt._support.arguments import positive, whole
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.lanczos import LanczosIteration
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["Trace", "trace"]

_FIRST = 12
"""Products for Q before the first sample."""

_GROWTH = 1.25
"""Factor by which Q grows. All samples are then updated for the larger Q, without products."""

_FEWEST = 16
"""Fewest samples before the standard error counts: from fewer it is itself off by a fifth."""

_SELECTED = 1.05
"""Factor on the standard error, since sampling stops when the estimated error is small by chance."""

_SAMPLES = 10**6
"""Number of the first sample's draw, larger than the draws of Lanczos."""


@dataclass(frozen=True)
class Trace:
    r"""An estimate of a trace.

    Attributes:
        value: the estimate, without bias.
        standard_error: its standard error, widened for few samples by Student's distribution: the trace
            is within two standard errors with a probability of about 0.95. 0 if the value is exact.
        largest: the largest Ritz value in Q, at most the largest eigenvalue.
        products: products with the operator.
        converged: whether the standard error is at most ``tol`` times the value.
    """

    value: float
    standard_error: float
    largest: float
    products: int
    converged: bool

    @property
    def effective_rank(self) -> float:
        r""":math:`\mathrm{tr}\,A/\lambda_{\max}(A)`: the trace in units of the largest eigenvalue.

        NaN if no eigenvalue is positive.
        """
        return self.value / self.largest if self.largest > 0 else float("nan")


def trace(
    operator: Operator,
    *,
    preconditioner: Preconditioner | None = None,
    tol: float = 0.01,
    max_iter: int = 300,
    seed: int = 0,
    most_vectors: int = 40,
) -> Trace:
    r"""Return the trace of a symmetric ``operator`` A, or of :math:`PA`.

    Args:
        operator: any symmetric matrix with ``shape``, ``dtype``, ``device`` and ``@``.
        preconditioner: a symmetric positive definite P ``(d, d)``; the trace is then that of
            :math:`PA`, and each product with A takes one with P.
        tol: the standard error to reach, relative to the value.
        max_iter: the largest number of products.
        seed: of the random start and signs; torch's global generators are not used.
        most_vectors: the most vectors of length d in Q. The trace is exact in up to as many dimensions.

    Raises:
        ValueError: for arguments out of range, and for a preconditioner that turns out not to be
            positive definite.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.arange(1.0, 201.0) * vector
    >>> found = trace(Diagonal(200, torch.float32, torch.device("cpu")), tol=0.02)
    >>> abs(found.value - 20_100) < 3 * found.standard_error, found.converged
    (True, True)
    """
    tol, max_iter = positive("tol", tol), whole("max_iter", max_iter, least=3)
    most_vectors = whole("most_vectors", most_vectors)
    inner = InnerProduct.for_operator(operator, preconditioner)
    size = inner.whole_size(operator.shape[0])
    if size == 0:
        raise ValueError("operator has shape (0, 0): expected at least one dimension")
    exact = size <= min(most_vectors, max_iter)
    with torch.autocast(operator.device.type, enabled=False):
        start = inner.noise(operator, seed)
        inner.check_norm(float(start.norm))
        iteration = LanczosIteration(operator, inner, start, min(most_vectors, size), seed)
        samples = _Samples(operator, inner, iteration, seed)
        if exact:
            _extend(iteration, size)
        else:
            _refine(iteration, samples, tol, max_iter, min(most_vectors, max_iter // 2))
    value, error = samples.value(), 0.0 if exact else samples.error()
    products = iteration.products + len(samples.values)
    largest = float(iteration.ritz_values[-1]) * iteration.unit
    return Trace(value, error, largest, products, error <= tol * abs(value))


def _extend(iteration: LanczosIteration, rows: int) -> None:
    """Extend the basis Q of an iteration to ``rows`` multiplied rows."""
    while iteration.multiplied < rows:
        if iteration.multiplied:
            iteration.extend()
        iteration.step()


def _refine(
    iteration: LanczosIteration, samples: _Samples, tol: float, max_iter: int, most_rows: int
) -> None:
    """Extend Q, up to ``most_rows``, and draw samples in turn until the standard error is small."""
    rows = _FIRST
    while True:
        before = iteration.multiplied
        _extend(iteration, min(rows, most_rows, max_iter - len(samples.values)))
        if iteration.multiplied > before:
            samples.update()
        remaining = max_iter - iteration.multiplied - len(samples.values)
        # Sampling stops at an error that is small by chance: decide after Q has been extended once more.
        if remaining <= 0 or samples.settled(tol):
            return
        while remaining > 0 and len(samples.values) < rows and not samples.settled(tol):
            more = min(remaining, max(_FEWEST - len(samples.values), len(samples.values) // 8, 1))
            for _ in range(more):
                samples.draw()
            remaining -= more
        rows = max(rows + 1, int(_GROWTH * rows))


class _Samples:
    """Samples of the trace on the complement of an iteration's basis, each from one product."""

    def __init__(
        self, operator: Operator, inner: InnerProduct, iteration: LanczosIteration, seed: int
    ) -> None:
        self._operator, self._inner, self._iteration = operator, inner, iteration
        self._seed = seed
        self._quadratic_forms: list[float] = []
        self.values: list[float] = []

    def draw(self) -> None:
        """Draw one more sample."""
        g = self._signs(len(self.values))
        image = self._operator @ g
        if self._inner.preconditioner is not None:
            image = self._inner.preconditioner @ image
        (form,) = self._inner.on_host(self._inner.dot(image[None], g)).tolist()
        if not abs(form) < float("inf"):
            name = type(self._operator).__name__
            raise NonFiniteError(
                f"product {self._iteration.products + 1} with {name} is not finite"
            )
        self._quadratic_forms.append(form)
        self.values.append(form - self._inside(g))

    def update(self) -> None:
        """Recompute all samples for the present basis, without products."""
        for index, form in enumerate(self._quadratic_forms):
            self.values[index] = form - self._inside(self._signs(index))

    def value(self) -> float:
        """Return the estimate of the trace."""
        inside = float(self._iteration.projected.diagonal().sum()) * self._iteration.unit
        return inside + (mean(self.values) if self.values else 0.0)

    def error(self) -> float:
        """Return the standard error of the estimate: two of them are Student's 95 % interval."""
        count = len(self.values)
        if count < 2:
            return float("inf")
        return float(_SELECTED * _student(count - 1) / 2 * stdev(self.values) / count**0.5)

    def settled(self, tol: float) -> bool:
        """Return whether the standard error is at most ``tol`` times the value."""
        enough = len(self.values) >= _FEWEST
        return enough and self.error() <= tol * abs(self.value())

    def _signs(self, index: int) -> Tensor:
        return self._inner.signs(self._operator, self._seed, _SAMPLES + index)

    def _inside(self, g: Tensor) -> float:
        """Return ``g^T PA g`` minus its part on the complement of the basis."""
        iteration, inner = self._iteration, self._inner
        basis, residual, m = iteration.basis, iteration.residual_vector, iteration.multiplied
        products = [inner.dot(basis.vectors[:m], g), inner.dot(residual.vector[None], g)]
        if inner.preconditioner is not None:
            products += [inner.dot(basis.covectors[:m], g), inner.dot(residual.covector[None], g)]
        numbers = inner.on_host(torch.cat(products))
        x, x_residual = numbers[:m], float(numbers[m])
        y, y_residual = x, x_residual
        if inner.preconditioner is not None:
            y, y_residual = numbers[m + 1 : -1], float(numbers[-1])
        inside = x @ iteration.projected @ y + x[-1] * y_residual + y[-1] * x_residual
        return float(inside) * iteration.unit


def _student(degrees_of_freedom: int) -> float:
    """Return the t for which Student's P(|T| <= t) is the normal P(|Z| <= 2), to 4 %.

    This is Cornish and Fisher's expansion in the inverse number of degrees of freedom, at 2.

    >>> [round(_student(n), 2) for n in (3, 10, 100)]     # exactly 3.31, 2.28 and 2.03
    [3.28, 2.28, 2.03]
    """
    n = degrees_of_freedom
    return 2 + 10 / (4 * n) + 294 / (96 * n**2) + 1098 / (384 * n**3)
