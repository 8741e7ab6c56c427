r"""`trace`: the sum of all eigenvalues, with a standard error.

Hutch++ (Meyer, Musco, Musco & Woodruff, *Hutch++: optimal stochastic trace estimation*, 2021) takes the
trace exactly on a subspace with the large eigenvalues, and estimates the rest of it by random signs g:

.. math::
    \mathrm{tr}\,A = \mathrm{tr}\,Q^\top AQ + E\,[g^\top(I-QQ^\top)A(I-QQ^\top)g]

Here Q is the Krylov space of a random start (Chen & Hallman, *Krylov-aware stochastic trace estimation*,
2023). Lanczos has :math:`T = Q^\top AQ` already, where a random sketch takes as many products again; and
from :math:`AQ = QT + \beta q e_m^\top` a sample needs one product, :math:`Ag`, and is then known for any
later, larger Q too:

.. math::
    g^\top Ag - x^\top Tx - 2\beta x_m\,q^\top g, \qquad x = Q^\top g

Half of the products go into Q: in Hutch++ it is two thirds, a third for the sketch and a third for its
images. Two examples::

    trace(Hessian(problem)).value               # to 1 %, its standard error
    trace(Hessian(problem)).effective_rank      # over the largest eigenvalue
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
"""Products for Q at first."""

_GROWTH = 1.25
"""Factor by which Q grows; each time the samples are drawn again for its new rows, without products."""

_FEWEST = 16
"""Samples before the standard error is believed: of fewer it is itself off by a fifth."""

_SELECTED = 1.05
"""Factor of the standard error: samples end where chance made it small."""

_SAMPLES = 10**6
"""Number of the first draw, apart from those of Lanczos."""


@dataclass(frozen=True)
class Trace:
    r"""An estimate of a trace.

    Attributes:
        value: the estimate; it has no bias.
        standard_error: its standard error, widened for few samples as Student's distribution is: the
            trace is within two of them with a probability of about 0.95. 0 where the value is exact.
        largest: the largest Ritz value in the sketch, at most the largest eigenvalue.
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
        r""":math:`\mathrm{tr}\,A/\lambda_{\max}(A)`, the number of eigenvalues as large as the largest
        that give the trace; NaN where none is positive.
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
    r"""Return the trace of a symmetric ``operator``, or of P times it.

    Args:
        operator: anything with ``shape``, ``dtype``, ``device`` and ``@`` that is symmetric.
        preconditioner: a symmetric positive definite P ``(d, d)``; the trace is then that of
            :math:`PA`, and each product with A takes one with P.
        tol: the standard error to reach, relative to the value.
        max_iter: the largest number of products.
        seed: of the random start and signs; torch's own generators are not touched.
        most_vectors: the most vectors of length d in the sketch. In at most as many dimensions the
            trace is exact.

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
        rows, most = (size if exact else _FIRST), min(most_vectors, max_iter // 2)
        while True:
            ready = min(rows, most, max_iter - len(samples.values))
            before = iteration.done
            while iteration.done < (size if exact else ready):
                if iteration.done:
                    iteration.extend()
                iteration.step()
            if iteration.done > before:
                samples.update()
            left = 0 if exact else max_iter - iteration.done - len(samples.values)
            if left <= 0 or samples.settled(tol):
                break
            # Only a Q that the samples did not choose decides: where they end, it grows once more.
            while left > 0 and len(samples.values) < rows and not samples.settled(tol):
                more = min(left, max(_FEWEST - len(samples.values), len(samples.values) // 8, 1))
                for _ in range(more):
                    samples.draw()
                left -= more
            rows = max(rows + 1, int(_GROWTH * rows))
    value, error = samples.value(), 0.0 if exact else samples.error()
    products = iteration.products + len(samples.values)
    largest = float(iteration.values[-1]) * iteration.unit
    return Trace(value, error, largest, products, error <= tol * abs(value))


class _Samples:
    """Samples of the trace outside the basis of an iteration, each from one product."""

    def __init__(
        self, operator: Operator, inner: InnerProduct, iteration: LanczosIteration, seed: int
    ) -> None:
        self._operator, self._inner, self._iteration = operator, inner, iteration
        self._seed = seed
        self._forms: list[float] = []
        self.values: list[float] = []

    def draw(self) -> None:
        """Add a sample."""
        g = self._signs(len(self.values))
        image = self._operator @ g
        bent = image if self._inner.preconditioner is None else self._inner.preconditioner @ image
        (form,) = self._inner.on_host(self._inner.dot(bent[None], g)).tolist()
        if not abs(form) < float("inf"):
            name = type(self._operator).__name__
            raise NonFiniteError(
                f"product {self._iteration.products + 1} with {name} is not finite"
            )
        self._forms.append(form)
        self.values.append(form - self._inside(g))

    def update(self) -> None:
        """Bring all samples up to date with the basis."""
        for index, form in enumerate(self._forms):
            self.values[index] = form - self._inside(self._signs(index))

    def value(self) -> float:
        """Return the estimate of the trace."""
        inside = float(self._iteration.projected.diagonal().sum()) * self._iteration.unit
        return inside + (mean(self.values) if self.values else 0.0)

    def error(self) -> float:
        """Return its standard error, so that two of them are Student's interval of 95 %."""
        count = len(self.values)
        if count < 2:
            return float("inf")
        return float(_SELECTED * _student(count - 1) / 2 * stdev(self.values) / count**0.5)

    def settled(self, tol: float) -> bool:
        """Whether the standard error is at most ``tol`` times the value."""
        enough = len(self.values) >= _FEWEST
        return enough and self.error() <= tol * abs(self.value())

    def _signs(self, index: int) -> Tensor:
        return self._inner.signs(self._operator, self._seed, _SAMPLES + index)

    def _inside(self, g: Tensor) -> float:
        """Return the part of ``g^T PA g`` that the basis knows."""
        iteration, inner = self._iteration, self._inner
        basis, rest = iteration.basis, iteration.rest
        done = iteration.done
        parts = [inner.dot(basis.vectors[:done], g), inner.dot(rest.vector[None], g)]
        if inner.preconditioner is not None:
            parts += [inner.dot(basis.covectors[:done], g), inner.dot(rest.covector[None], g)]
        numbers = inner.on_host(torch.cat(parts))
        a, beyond = numbers[:done], float(numbers[done])
        b, above = a, beyond
        if inner.preconditioner is not None:
            b, above = numbers[done + 1 : -1], float(numbers[-1])
        inside = a @ iteration.projected @ b + a[-1] * above + b[-1] * beyond
        return float(inside) * iteration.unit


def _student(freedom: int) -> float:
    """Return t with Student's P(|T| <= t) = P(|Z| <= 2) of the normal distribution, to 4 %.

    This is the expansion of Cornish and Fisher in 1 over the degrees of freedom, at 2.

    >>> [round(_student(n), 2) for n in (3, 10, 100)]     # exactly 3.31, 2.28 and 2.03
    [3.28, 2.28, 2.03]
    """
    return 2 + 10 / (4 * freedom) + 294 / (96 * freedom**2) + 1098 / (384 * freedom**3)
