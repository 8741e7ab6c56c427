r"""Following the top eigenpair from one measurement to the next, in three products when little moved.

What is kept of a measurement is a subspace: nine Ritz vectors :math:`u_1, u_2, \dots` and an explorer
f, orthonormal. The next measurement takes

1. the product with :math:`u_1`, which gives its Rayleigh quotient and its residual;
2. one with a probe :math:`p = \sum_{j\ge2} \pm c_j u_j`, f included. Where the :math:`u_j` are still
   near eigenvectors, :math:`u_j^\top Ap / c_j` are *all* their Rayleigh quotients, of one product;
3. one where it tells most: with what is now thought to be the top Ritz vector, if the residual is
   too large or another eigenvalue seems to have overtaken; else with the runner-up, if it may have;
   else with what of Ap the subspace did not hold. And more, while one of the first two is the case.

What is thought is the projection of A on all directions at hand: those estimates on its diagonal,
changed as little as agrees with every product (the symmetric update of Powell, 1970, as the
quasi-Newton methods have it). What is *reported* comes from the products of this measurement alone:
the Rayleigh–Ritz value in the span of the tested directions, and its true residual. So:

- Certain: the value is at most the largest eigenvalue, and an eigenvalue is within the residual.
- Probable only: that it is the largest. A kept direction that overtakes is missed where the
  estimates err, by about the residual of the probe; more products are taken while the estimate is
  within half of that. A direction never seen before grows in the explorer like a power iteration with
  the others deflated, one step a measurement: a sudden one among d needs several measurements, or a
  cold start. No bound holds for fewer products than Krylov needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from stableopt.curvature.eigenpair import Eigenpair, NonFiniteError, Preconditioner, small_enough
from stableopt.curvature.inner import Dual, check_norm, dual, magnitude_of, scaled
from stableopt.curvature.operators import Operator

__all__ = ["KEPT", "subspace", "track", "trackable"]

KEPT = 10
"""Directions kept from one measurement to the next, the explorer among them. With eight, eigenvalues
that rose from below the tenth were at times lost for three measurements."""

_SMALL = 3 * KEPT
"""Size below which a whole search is no dearer than following."""

_AT_LEAST = 3

_PATIENCE = 9
"""Products after which what is kept no longer helps, and a search from nearly nothing does."""

_OVERTAKEN = 0.01
"""An estimate above the value by this part asks for a product."""

_DOUBT = (0.5, 0.03)
"""So does one within half the probe's residual of 1.03 times the value."""

_EXPLORER = 0.3
"""Weight of the explorer in the probe, relative to all others together."""

_FRESH = 0.1
"""Norm of the noise mixed into the explorer, in which a direction never seen before begins."""

_UNTESTED = 0.5
"""Norm of the part of a Ritz vector outside the tested directions that makes it untested."""

_NOTHING = 1e-6
"""Relative norm of what is rounding in single precision."""


class _Frame:
    """Covectors and vectors ``(rows, d)``, orthonormal, that hold all directions and images."""

    def __init__(
        self, covectors: Tensor, vectors: Tensor, preconditioner: Preconditioner | None
    ) -> None:
        self._preconditioner = preconditioner
        self._room = [covectors, vectors]
        self._plain = covectors is vectors
        self.held = len(covectors)
        self.reserve(_AT_LEAST)

    @property
    def covectors(self) -> Tensor:
        return self._room[0][: self.held]

    @property
    def vectors(self) -> Tensor:
        return self._room[1][: self.held]

    def reserve(self, rows: int) -> None:
        """Make room for as many more rows."""
        if self.held + rows > len(self._room[0]):
            more = self._room[0].new_empty(rows, self._room[0].shape[1])
            covectors = torch.cat([self.covectors, more])
            self._room = [covectors, covectors if self._plain else torch.cat([self.vectors, more])]

    def absorb(self, image: Tensor) -> Tensor:
        """Add what the frame lacks of ``image`` as a row; return all its coordinates, on the device."""
        self.reserve(1)
        coordinates = self.vectors @ image
        image = image - coordinates @ self.covectors
        correction = self.vectors @ image
        image.addmv_(self.covectors.T, correction, alpha=-1)
        coordinates += correction
        rest = dual(image, self._preconditioner)
        # A rest that is rounding alone would be a row that is not orthogonal: it is a row of zeros.
        eps = torch.finfo(image.dtype).eps
        real = rest.norm > 100 * eps * coordinates.norm()
        self._room[0][self.held] = torch.where(real, rest.covector / rest.norm, 0.0)
        if not self._plain:
            self._room[1][self.held] = torch.where(real, rest.vector / rest.norm, 0.0)
        self.held += 1
        kept_norm = torch.where(real | (rest.norm < 0) | rest.norm.isnan(), rest.norm, 0.0)
        return torch.cat([coordinates, kept_norm[None]])


def trackable(kept: Tensor, max_iter: int) -> bool:
    """Return whether ``kept`` is enough to follow, in a space that is not small."""
    rows, size = kept.shape
    return rows >= 3 and size >= _SMALL and rows <= KEPT and max_iter >= _AT_LEAST


def track(
    operator: Operator,
    kept: Tensor,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    max_iter: int,
    seed: int,
) -> Eigenpair | None:
    """Return the top eigenpair from an earlier ``subspace`` ``(k, d)``.

    ``None`` where ``kept`` does not span k directions; not converged where what is kept no longer
    helps.
    """
    frame = _frame(kept, preconditioner)
    if frame is None:
        return None
    eps = torch.finfo(operator.dtype).eps
    weights = _probe(len(kept), seed)
    # Both products go off before the first transfer.
    image = operator @ frame.vectors[0]
    magnitude = magnitude_of(image)
    probed = operator @ (weights.to(kept) @ frame.vectors)
    columns = [frame.absorb(image / magnitude), frame.absorb(probed / magnitude)]
    on_host = torch.cat([*columns, magnitude[None]]).cpu().double()
    unit = float(on_host[-1])
    first, second = on_host[: len(columns[0])], on_host[len(columns[0]) : -1]
    _check(first, 1, operator, preconditioner)
    _check(second, 2, operator, preconditioner)
    model = _Model(weights, first, second)
    products = 2
    while True:
        value, best, residual, scale = model.tested()
        settled = small_enough(residual, value, scale, tol, eps)
        wanted = model.direction(value, settled, optional=products < _AT_LEAST)
        if wanted is None or products >= min(max_iter, _PATIENCE):
            break
        column = frame.absorb(operator @ (wanted.to(kept) @ frame.vectors) / magnitude)
        products += 1
        column = column.cpu().double()
        _check(column, products, operator, preconditioner)
        model.learn(wanted, column)
    vector = best.to(kept) @ frame.vectors
    ritz = model.expected()[1][: len(kept) - 1]
    rows, explorer = ritz.to(kept), model.explorer(ritz).to(kept)
    covectors = rows @ frame.covectors
    vectors = covectors if preconditioner is None else rows @ frame.vectors
    return Eigenpair(
        value * unit,
        vector / vector.norm(),
        residual * unit,
        products,
        settled and wanted is None,
        subspace=subspace(
            Dual(covectors, vectors, rows.norm()),
            explorer @ frame.covectors,
            preconditioner,
            seed,
        ),
    )


class _Model:
    """What is known of the projection of A on the frame: all of it on the host, in float64."""

    def __init__(self, weights: Tensor, first: Tensor, second: Tensor) -> None:
        kept = len(weights)
        self._directions = torch.zeros(2, len(second), dtype=torch.float64)
        self._directions[0, 0] = 1.0
        self._directions[1, :kept] = weights
        self._images = torch.zeros(2, len(second), dtype=torch.float64)
        self._images[0, : len(first)] = first
        self._images[1] = second
        estimates = second[1:kept] / weights[1:]
        self._guess = min(float(first[0]), float(estimates.min()))
        self._diagonal = torch.cat([first[:1], estimates])
        self._noise = float(second[kept:].norm())

    def learn(self, direction: Tensor, image: Tensor) -> None:
        more = len(image) - self._images.shape[1]
        self._directions = torch.cat(
            [pad(self._directions, (0, more)), pad(direction, (0, more))[None]]
        )
        self._images = torch.cat([pad(self._images, (0, more)), image[None]])

    def tested(self) -> tuple[float, Tensor, float, float]:
        """Return the top Ritz value of the tested directions, its vector, its residual, and a scale."""
        projected = self._directions @ self._images.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        value, weights = float(values[-1]), vectors[:, -1]
        best = weights @ self._directions
        residual = float((weights @ self._images - value * best).norm())
        return value, best, residual, float(self._images.norm(dim=1).max())

    def expected(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values and vectors (as rows), best first, of the projection as it is thought."""
        size = self._images.shape[1]
        diagonal = torch.full((size,), self._guess, dtype=torch.float64)
        diagonal[: len(self._diagonal)] = self._diagonal
        tested = self._directions
        wrong = self._images - tested * diagonal
        projected = torch.diag(diagonal) + wrong.T @ tested + tested.T @ wrong
        projected -= tested.T @ (wrong @ tested.T) @ tested
        # A row of zeros takes part in nothing.
        empty = (self._images.abs().amax(0) == 0) & (tested.abs().amax(0) == 0)
        projected.diagonal()[empty] = -10 * (1 + self._images.abs().max())
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        return values.flip(0), vectors.T.flip(0)

    def direction(self, value: float, settled: bool, optional: bool) -> Tensor | None:
        """Return the direction to test next, of norm 1 and orthogonal to the tested; or none."""
        values, vectors = self.expected()
        outside = vectors - (vectors @ self._directions.T) @ self._directions
        norms = outside.norm(dim=1, keepdim=True)
        directions: Tensor = outside / norms.clamp(min=1e-300)
        overtaken = float(values[0]) > value + _OVERTAKEN * abs(value)
        if norms[0] > (1e-3 if settled else 1e-9) and (overtaken or not settled):
            return directions[0]
        untested = (norms[:, 0] > _UNTESTED).nonzero()
        if len(untested):
            index = int(untested[0, 0])
            part, above = _DOUBT
            hopeful = float(values[index]) + part * self._noise
            free = float(values[index]) + 2 * self._noise > value
            if hopeful > value + above * abs(value) or (optional and free):
                return directions[index]
        if not optional and settled:
            return None
        # What the kept directions did not hold of the probe's image.
        unheld: Tensor = self._images[1].clone()
        unheld[: len(self._diagonal)] = 0.0
        unheld -= (self._directions @ unheld) @ self._directions
        norm = float(unheld.norm())
        if norm > _NOTHING * float(self._images[1].norm()):
            return unheld / norm
        return directions[int(norms.argmax())] if float(norms.max()) > _NOTHING else None

    def explorer(self, kept: Tensor) -> Tensor:
        """Return what the rows ``kept`` do not hold of the probe's image, of norm 1 or zero."""
        unheld: Tensor = self._images[1] - (kept @ self._images[1]) @ kept
        norm = float(unheld.norm())
        enough = norm > _NOTHING * float(self._images[1].norm())
        return unheld / norm if enough else torch.zeros_like(unheld)


def _probe(count: int, seed: int) -> Tensor:
    """Return the probe's coordinates ``(k,)`` on the host: random signs, so that errors do not add."""
    weights = torch.arange(count, dtype=torch.float64).clamp(min=1) ** -0.5
    weights[0] = 0.0
    weights[-1] = _EXPLORER * weights[:-1].norm()
    signs = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    weights[signs] *= -1
    unit: Tensor = weights / weights.norm()
    return unit


def _frame(kept: Tensor, preconditioner: Preconditioner | None) -> _Frame | None:
    """Return ``kept`` as an orthonormal frame, or ``None`` if its rows do not span as many."""
    covectors = kept
    vectors = kept if preconditioner is None else torch.stack([preconditioner @ r for r in kept])
    gram = (vectors @ covectors.T).cpu().double()
    lower, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    # What P has changed since, and rounding, is put right; lost directions are not.
    if int(failed) or not float(lower.diagonal().min()) > 1e-3 * float(lower.diagonal().max()):
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(kept)).double(), upper=False)
    covectors = inverse.to(kept) @ covectors
    vectors = covectors if preconditioner is None else inverse.to(kept) @ vectors
    return _Frame(covectors, vectors, preconditioner)


def _check(
    column: Tensor, products: int, operator: Operator, preconditioner: Preconditioner | None
) -> None:
    if not bool(torch.isfinite(column[:-1]).all()):
        raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
    check_norm(float(column[-1]), preconditioner)


def subspace(
    ritz: Dual, explorer: Tensor, preconditioner: Preconditioner | None, seed: int
) -> Tensor:
    """Return what to keep ``(k, d)``: covectors of Ritz vectors, and the explorer with fresh noise."""
    if explorer.shape[0] < _SMALL:
        return ritz.covector
    generator = torch.Generator(device=explorer.device).manual_seed(seed)
    noise = torch.randn(
        explorer.shape, generator=generator, dtype=explorer.dtype, device=explorer.device
    )
    explorer = explorer + _FRESH * scaled(dual(noise, preconditioner)).covector
    for _ in range(2):
        explorer = explorer - (ritz.vector @ explorer) @ ritz.covector
    return torch.cat([ritz.covector, scaled(dual(explorer, preconditioner)).covector[None]])
