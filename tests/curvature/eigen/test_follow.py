"""Following the top eigenpair along operators of known spectrum that change slowly or suddenly."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import Eigenpair, NonFiniteError, Operator, top_eigenpair

TOL = 0.03


class Spiked(Operator):
    """A diagonal bulk on the complement of ten orthonormal rows, and given eigenvalues on these."""

    def __init__(self, bulk: Tensor, rows: Tensor, values: Tensor) -> None:
        super().__init__(len(bulk), bulk.dtype, bulk.device)
        self.bulk, self.rows, self.values = bulk, rows, values
        self.count = 0

    def product(self, vector: Tensor) -> Tensor:
        self.count += 1
        inside = self.rows @ vector
        outside = self.bulk * (vector - inside @ self.rows)
        return outside - (self.rows @ outside) @ self.rows + (self.values * inside) @ self.rows


Values = Callable[[int, Tensor], None]
"""Sets the ten eigenvalues at a measurement; they are about 1.0, 0.93, ..., 0.35 unless it does."""


def sharpening(t: int, values: Tensor) -> None:
    values *= 1 + 0.02 * t


def second_overtakes(t: int, values: Tensor) -> None:
    values[1] = 0.5 + min(max(t - 5, 0) / 30, 1)


def sixth_overtakes(t: int, values: Tensor) -> None:
    values[5] = 0.4 + min(max(t - 5, 0) / 30, 1)


def new_one_from_the_bulk(t: int, values: Tensor) -> None:
    values[9] = 0.2 + 1.3 * min(max(t - 5, 0) / 40, 1)


def catapult(t: int, values: Tensor) -> None:
    if t >= 10:
        values *= torch.tensor([0.35, 0.9, 0.5, 0.8, 0.7, 0.6, 0.95, 0.4, 0.9, 1.0])


def family(
    change: Values, size: int, seed: int, *, rotation: float, count: int = 50
) -> Iterator[tuple[Spiked, float]]:
    """Yield operators and their largest eigenvalues; eigenvectors turn by ``rotation`` each time."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bulk = 0.4 * torch.rand(size, generator=generator) - 0.1
    rows = torch.linalg.qr(normal(size, 10))[0].T.contiguous()
    base = torch.linspace(1.0, 0.35, 10) * (1 + 0.05 * normal(10))
    base[0], base[1:] = 1.0, base[1:].clamp(max=0.95)
    for t in range(count):
        if t and rotation:
            turn = rotation * normal(10, 10)
            moved = (
                rows + (turn - turn.T) / 2 @ rows + rotation / math.sqrt(size) * normal(10, size)
            )
            rows = torch.linalg.qr(moved.T)[0].T.contiguous()
        values = base.clone()
        change(t, values)
        yield Spiked(bulk, rows, values), float(values.max())


def rising(t: int, values: Tensor) -> None:
    values[9] = min(0.2 * 1.3 ** max(t - 3, 0), 1.6)


def follow(operators: Iterator[tuple[Spiked, float]]) -> tuple[list[int], list[float]]:
    """Return products and relative errors of the warm measurements that follow a cold one."""
    products, losses, subspace = [], [], None
    for t, (operator, largest) in enumerate(operators):
        pair = top_eigenpair(operator, start=subspace, keep=True, tol=TOL, max_iter=50, seed=t)
        assert pair.products == operator.count
        assert pair.value <= largest * (1 + 1e-5)  # rounding in float32
        if t:
            products.append(pair.products)
            losses.append((largest - pair.value) / largest)
        subspace = pair.subspace
    return products, losses


CHANGES = [
    pytest.param(sharpening, 0.01, 0, id="sharpening"),
    pytest.param(catapult, 0.01, 0, id="catapult"),
    # The rising eigenvalue may pass the top between two measurements, by 3.3 % of it. One in 115
    # measurements was seen to lose more than 3 %: more than 4 of 100 do with probability 2e-3.
    pytest.param(second_overtakes, 0.13, 4, id="the second overtakes"),
    pytest.param(sixth_overtakes, 0.13, 4, id="the sixth overtakes"),
    pytest.param(new_one_from_the_bulk, 0.13, 4, id="a new one"),
]


@pytest.mark.parametrize("rotation", [0.0, 0.05], ids=["at rest", "turning"])
@pytest.mark.parametrize(("change", "worst", "most_late"), CHANGES)
def test_the_top_is_followed(change: Values, worst: float, most_late: int, rotation: float) -> None:
    """Catches a search that stays with an overtaken eigenvector, and products wasted where little
    moves: fifty measurements, the first one cold, of each of two families.
    """
    late = 0
    for seed in range(2):
        products, losses = follow(family(change, 1000, seed, rotation=rotation))
        assert statistics.median(products) <= 3
        assert max(losses) <= worst
        # The last measurements are those after the crossing.
        assert max(losses[-5:]) <= TOL
        late += sum(loss > TOL for loss in losses)
    assert late <= most_late


@pytest.mark.parametrize("change", [second_overtakes, new_one_from_the_bulk])
def test_the_top_is_followed_among_many(change: Values) -> None:
    """Catches a search that works only in few dimensions: a random start holds 1/300 of any
    direction.
    """
    products, losses = follow(family(change, 100_000, 0, rotation=0.0, count=40))
    assert statistics.median(products) <= 3
    assert max(losses) <= 0.13
    assert sum(loss > TOL for loss in losses) <= 3


def test_one_that_rises_by_thirty_percent_each_time_is_seen_in_time() -> None:
    """Catches an explorer that waits for its turn behind a kept direction: of these 152
    measurements 16 were more than 3 % too low, one by 37 %.

    Of 228 other measurements 3.5 % are too low: at that rate, more than 10 of 152 are with
    probability 2e-2.
    """
    late, products = 0, []
    for seed in range(8):
        rotation = 0.05 * (seed % 2)
        run_products, losses = follow(family(rising, 1000, seed, rotation=rotation, count=20))
        late += sum(loss > TOL for loss in losses)
        products += run_products
    assert late <= 10
    assert statistics.median(products) <= 3


def top_and_subspace(operator: Operator, **arguments: object) -> tuple[Eigenpair, Tensor]:
    pair = top_eigenpair(operator, keep=True, tol=TOL, **arguments)
    assert pair.subspace is not None
    return pair, pair.subspace


def test_what_is_kept_is_orthonormal_and_starts_with_the_vector() -> None:
    """Catches rows in the wrong order, and rows that the next search would discard."""
    operator, _ = next(family(sharpening, 2000, 0, rotation=0.0))
    cold, cold_rows = top_and_subspace(operator)
    for pair, rows in ((cold, cold_rows), top_and_subspace(operator, start=cold_rows, seed=1)):
        assert rows.shape == (10, 2000)
        # float32: the rounding of a few projections.
        torch.testing.assert_close(rows @ rows.T, torch.eye(10), atol=1e-5, rtol=0)
        assert abs(float(rows[0] @ pair.vector)) > 0.99


def test_residual_and_value_are_of_this_operator_alone() -> None:
    """Catches a value or a residual of the previous operator: this one is a third of it."""
    operator, _ = next(family(sharpening, 2000, 0, rotation=0.0))
    _, subspace = top_and_subspace(operator)
    shrunk = Spiked(operator.bulk, operator.rows, operator.values / 3)
    pair, _ = top_and_subspace(shrunk, start=subspace)
    assert pair.converged
    image = shrunk @ pair.vector
    assert pair.value == pytest.approx(float(pair.vector @ image), rel=1e-5)
    true_residual = float((image - pair.value * pair.vector).norm())
    # The vector is in float32.
    assert pair.absolute_residual == pytest.approx(true_residual, rel=1e-2, abs=1e-5)


def test_what_no_longer_helps_is_searched_afresh() -> None:
    """Catches a search that relies on the subspace of an unrelated operator."""
    old, _ = next(family(sharpening, 2000, 0, rotation=0.0))
    new, largest = next(family(sharpening, 2000, 1, rotation=0.0))
    _, subspace = top_and_subspace(old)
    pair, _ = top_and_subspace(new, start=subspace)
    assert pair.converged
    assert pair.value == pytest.approx(largest, rel=1e-2)
    assert pair.products == new.count > 12


@pytest.mark.parametrize(
    "spoil",
    [
        lambda subspace: subspace * float("nan"),
        torch.zeros_like,
        lambda subspace: subspace[:1].expand(10, -1),
        lambda subspace: subspace[:1],
        lambda subspace: torch.cat([subspace, subspace]),
        lambda subspace: subspace.double() * 100,
    ],
    ids=["nan", "zero", "one direction", "one row", "too many", "scaled"],
)
def test_a_spoilt_subspace_still_finds_the_top(spoil: Callable[[Tensor], Tensor]) -> None:
    """Catches a broken tensor in a checkpoint that stops the run."""
    operator, largest = next(family(sharpening, 2000, 0, rotation=0.0))
    _, subspace = top_and_subspace(operator)
    pair = top_eigenpair(operator, start=spoil(subspace), tol=TOL, max_iter=50)
    assert pair.value == pytest.approx(largest, rel=1e-2)
    assert pair.subspace is None


@pytest.mark.parametrize("size", [1, 2, 29, 31])
def test_small_spaces_are_searched_whole(size: int) -> None:
    """Catches a kept subspace with more directions than the space has."""
    matrix = torch.diag(torch.linspace(-1, 1, size, dtype=torch.float64))
    _, subspace = top_and_subspace(Dense(matrix))
    pair, _ = top_and_subspace(Dense(matrix + torch.eye(size).double()), start=subspace)
    assert pair.converged
    assert pair.value == pytest.approx(float(matrix.max()) + 1, rel=TOL**2)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0])
def test_multiples_of_the_identity_can_be_followed(value: float) -> None:
    """Catches a failure where the Krylov space has one dimension and images add no direction."""
    operator = Dense(value * torch.eye(100))
    _, subspace = top_and_subspace(operator)
    rows = torch.linalg.qr(torch.randn(100, 10, generator=torch.Generator().manual_seed(0)))[0].T
    for start in (subspace, rows):
        pair = top_eigenpair(operator, start=start, tol=TOL)
        assert pair.converged
        assert pair.value == pytest.approx(value, abs=1e-5)


def test_tight_tolerances_are_met_from_a_subspace() -> None:
    """Catches a correction that is dropped as too short because it is of the size of the tolerance."""
    first, second = (operator for operator, _ in family(sharpening, 500, 0, rotation=0.05, count=2))
    double = [Spiked(o.bulk.double(), o.rows.double(), o.values.double()) for o in (first, second)]
    for operator in double:  # orthonormal to more than float32
        operator.rows = torch.linalg.qr(operator.rows.T)[0].T
    _, subspace = top_and_subspace(double[0])
    pair = top_eigenpair(double[1], start=subspace, tol=1e-9, max_iter=200)
    assert pair.converged
    assert pair.value == pytest.approx(float(second.values.max()), rel=1e-12)


def test_a_preconditioned_one_is_followed() -> None:
    """Catches a subspace that is orthonormal in the previous P's inner product."""
    size = 400
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(size, 10, generator=generator).double())[0].T
    bulk = 0.3 * torch.rand(size, generator=generator).double()
    products, subspace = [], None
    for t in range(12):
        values = torch.linspace(1.0, 0.4, 10).double()
        values[1] = 0.7 + 0.06 * t
        operator = Spiked(bulk, rows, values)
        precondition = torch.diag(torch.linspace(1, 1.5 + 0.05 * t, size).double())
        root = precondition.sqrt()
        columns = [operator @ column for column in torch.eye(size).double()]
        dense = root @ torch.stack(columns) @ root
        largest = float(torch.linalg.eigvalsh(dense)[-1])
        pair = top_eigenpair(
            operator, preconditioner=precondition, start=subspace, keep=True, tol=TOL, seed=t
        )
        assert pair.converged
        assert (1 - TOL) * largest <= pair.value <= largest * (1 + 1e-12)
        products.append(pair.products)
        subspace = pair.subspace
    assert statistics.median(products[1:]) <= 3


class Failing(Dense):
    def product(self, vector: Tensor) -> Tensor:
        image = super().product(vector)
        return image if self.products != 2 else image * float("inf")


def test_a_product_that_is_not_finite_is_reported() -> None:
    """Catches a NaN in the second of the two products that share a transfer."""
    _, subspace = top_and_subspace(Dense(torch.diag(torch.linspace(0, 1, 100))))
    with pytest.raises(NonFiniteError, match="product 2 with Failing"):
        top_eigenpair(Failing(torch.diag(torch.linspace(0, 1, 100))), start=subspace)
