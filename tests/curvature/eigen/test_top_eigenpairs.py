"""Several certified eigenpairs: dense matrices, missed copies, bounds, warm starts and memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from oracles import Dense, Diagonal, with_spectrum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt.curvature import NonFiniteError, Operator, top_eigenpair, top_eigenpairs
from stableopt.curvature.eigen.inner_product import InnerProduct


def spectrum(largest: list[float], low: float = -5.0, high: float = 1.0, size: int = 80) -> Tensor:
    """Return ``largest`` above a flat bulk, in float64."""
    bulk = torch.linspace(low, high, size - len(largest), dtype=torch.float64)
    return torch.cat([bulk, torch.tensor(largest, dtype=torch.float64)])


SPECTRA = {
    "apart": spectrum([2.0, 3.0, 5.0, 9.0]),
    "multiple": spectrum([2.0, 2.0, 2.0, 3.0, 3.0, 5.0]),
    "clustered": spectrum([2 + 1e-6 * i for i in range(5)]),
    "indefinite": spectrum([0.1, 0.2, 0.2, 0.3], low=-50.0, high=-1.0),
    "flat": spectrum([]),
    "identity": torch.ones(80, dtype=torch.float64),
    "of rank two": spectrum([1.0, 1.0], low=0.0, high=0.0),
    "zero": torch.zeros(80, dtype=torch.float64),
    "below zero": spectrum([], low=-5.0, high=-4.0),
    "three dimensions": torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64),
}


@pytest.mark.parametrize("most_vectors", [None, 15], ids=["roomy", "restarted"])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_are_those_of_the_dense_matrix(name: str, most_vectors: int | None) -> None:
    """Catches a copy of a multiple eigenvalue that one start cannot see, and restarts that lose one."""
    values, k = SPECTRA[name], 6
    operator = Dense(with_spectrum(values))
    pairs = top_eigenpairs(operator, k, tol=1e-9, max_iter=1000, most_vectors=most_vectors)
    expected = torch.linalg.eigvalsh(operator.matrix).flip(0)[:k]
    assert pairs.converged
    assert pairs.products == operator.products
    # Required accuracy; residuals of 1e-9 leave errors near rounding.
    assert torch.allclose(pairs.values, expected, rtol=1e-8, atol=1e-10)
    V = pairs.vectors
    assert torch.allclose(V.T @ V, torch.eye(len(expected), dtype=V.dtype), atol=1e-10)
    residuals = (operator.matrix @ V - V * pairs.values).norm(dim=0)
    assert bool((residuals <= pairs.absolute_residuals + 1e-12).all())  # rounding
    assert pairs.upper_bounds is None or bool((pairs.upper_bounds >= expected - 1e-12).all())
    assert (pairs.upper_bounds is None) == (name == "zero")


def test_an_eigenvector_that_the_start_lacks_is_found() -> None:
    """Catches a certificate from the first start alone, which can be orthogonal to the top vector."""
    operator = Dense(torch.zeros(120, 120, dtype=torch.float64))
    start = InnerProduct().noise(operator, 0).covector
    hidden = torch.linspace(-1, 1, 120, dtype=torch.float64)
    hidden = hidden - (hidden @ start) * start
    hidden = hidden / hidden.norm()
    complement = torch.eye(120, dtype=torch.float64) - torch.outer(hidden, hidden)
    bulk = complement @ with_spectrum(spectrum([3.0, 4.0], size=120)) @ complement
    operator.matrix = bulk + 9.0 * torch.outer(hidden, hidden)
    pairs = top_eigenpairs(operator, 2, tol=1e-6, seed=0)
    assert pairs.values.tolist() == pytest.approx(
        torch.linalg.eigvalsh(operator.matrix)[-2:].flip(0).tolist(), rel=1e-9
    )


def test_upper_bounds_hold_and_are_tight() -> None:
    """Catches an inertia bound with the wrong sign, or without the images outside the basis.

    They may fail for 0.2 % of starts: of 25, more than one fails with probability 1e-3. With a gap of
    1 in a spread of 8 and residuals of 1 %, a residual's square over the gap is 1e-3 at most.
    """
    values = spectrum([2.0, 2.0, 3.0])
    failures = 0
    for seed in range(25):
        pairs = top_eigenpairs(Dense(with_spectrum(values, seed)), 3, tol=1e-2, seed=seed)
        assert pairs.upper_bounds is not None
        expected = torch.tensor([3.0, 2.0, 2.0], dtype=torch.float64)
        failures += bool((pairs.upper_bounds < expected).any())
        assert float((pairs.upper_bounds - expected).max()) < 0.05 * 2.0
    assert failures <= 1


def test_a_warm_start_takes_little_more_products_than_pairs() -> None:
    """Catches a warm start that is ignored, and one that keeps the old values."""
    matrix = with_spectrum(spectrum([2.0, 3.0, 4.0, 5.0, 6.0], low=-0.3, high=0.3))
    cold = top_eigenpairs(Dense(matrix), 5)
    unmoved = top_eigenpairs(Dense(matrix), 5, start=cold.subspace)
    assert unmoved.products == 6  # one for each of the five, and one that explores
    assert unmoved.converged
    assert unmoved.upper_bounds is None
    drift = torch.randn(80, 80, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = matrix + 0.02 * (drift + drift.T)
    pairs = top_eigenpairs(Dense(moved), 5, start=cold.subspace)
    assert pairs.converged
    assert pairs.products < 20
    # A residual of 1e-3 squared, over gaps of the size of the values.
    expected = torch.linalg.eigvalsh(moved).flip(0)[:5]
    assert torch.allclose(pairs.values, expected, rtol=1e-5)


def test_it_stops_at_the_first_value_below() -> None:
    """Catches an index off by one, and a bound compared in other units than the values."""
    operator = Dense(1000 * with_spectrum(spectrum([2.0, 3.0, 4.0, 5.0, 6.0])))
    pairs = top_eigenpairs(operator, 9, down_to=3500.0, tol=1e-6)
    assert pairs.values.tolist() == pytest.approx([6000, 5000, 4000, 3000])
    assert pairs.above(4500.0) == 2
    assert len(top_eigenpairs(operator, 2, down_to=0.0).values) == 2
    assert len(top_eigenpairs(operator, 9, down_to=1e9, least=3).values) == 3


def test_with_a_preconditioner_they_are_those_of_the_product() -> None:
    """Catches vectors taken for covectors, and residuals in the Euclidean norm."""
    H = with_spectrum(spectrum([2.0, 3.0, 9.0]))
    P = with_spectrum(torch.logspace(-1, 1, 80, dtype=torch.float64), 3)
    root = torch.linalg.cholesky(P)
    expected = torch.linalg.eigvalsh(root.T @ H @ root).flip(0)[:4]
    pairs = top_eigenpairs(Dense(H), 4, preconditioner=P, tol=1e-8)
    assert pairs.converged
    assert pairs.upper_bounds is None
    assert torch.allclose(pairs.values, expected, rtol=1e-10)
    images = P @ (H @ pairs.vectors)
    # Residuals of 1e-8, in a norm up to root 10 times the other.
    assert torch.allclose(images, pairs.vectors * pairs.values, atol=1e-6)
    warm = top_eigenpairs(Dense(H), 4, preconditioner=P, tol=1e-8, start=pairs.subspace)
    assert warm.products <= 8
    assert torch.allclose(warm.values, expected, rtol=1e-10)


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes of storages that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address and address not in self._seen:
            self._seen.add(address)
            self.live += size
            weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


@pytest.mark.parametrize("k", [3, 60])
def test_memory_is_k_vectors_and_a_bounded_number(k: int) -> None:
    """Catches a restart that holds old and new rows, and a result that copies all of its vectors.

    k + 40 rows, up to 40 more for the result; blocks of 8,192 columns and a few vectors in between.
    """
    size = 50_000
    values = torch.rand(size, generator=torch.Generator().manual_seed(0))
    values[:k] = torch.linspace(1.01, 1.3, k)
    with LiveBytes() as memory:
        pairs = top_eigenpairs(Diagonal(values), k, tol=1e-9, max_iter=k + 43)
    assert pairs.products > k + 40  # so that it restarts
    assert memory.peak / (4 * size) < k + 40 + 40 + 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 2, "tol": 0.0}, "tol=0.0"),
        ({"k": 2, "most_vectors": 7}, "most_vectors=7"),
        ({"k": 2, "least": 0}, "least=0"),
        ({"k": 2, "start": torch.ones(80)}, r"start has shape \(80,\)"),
        ({"k": 2, "start": torch.ones(0, 80)}, r"start has shape \(0, 80\)"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    """Catches an error from deep inside for what the caller can correct."""
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(Dense(with_spectrum(SPECTRA["flat"])), **options)


def test_a_start_of_dependent_rows_is_none() -> None:
    """Catches a division by the norm of a zero row."""
    operator = Dense(with_spectrum(SPECTRA["apart"]))
    for start in (torch.zeros(3, 80).double(), torch.ones(3, 80).double()):
        pairs = top_eigenpairs(operator, 2, start=start)
        assert pairs.values.tolist() == pytest.approx([9.0, 5.0], rel=1e-5)


def test_one_of_many_is_the_top_after_as_many_products() -> None:
    """Limiting case: before a restart both read one iteration, from the same start."""
    operator = Dense(with_spectrum(SPECTRA["flat"]))
    pairs = top_eigenpairs(operator, 5, tol=1e-14, max_iter=10)
    top = top_eigenpair(operator, tol=1e-14, max_iter=10)
    assert pairs.products == top.products == 10
    assert not pairs.converged
    # The same arithmetic: only the signs of vectors, and the order of one sum, may differ.
    assert float(pairs.values[0]) == pytest.approx(top.value, rel=1e-14)
    assert float(pairs.absolute_residuals[0]) == pytest.approx(top.absolute_residual, rel=1e-9)


def test_small_values_in_single_precision_do_not_underflow() -> None:
    """Catches norms whose squares vanish: below 1e-23 in float32."""
    values = 1e-30 * torch.linspace(-1, 1, 200)
    values[3] = 2e-30
    pairs = top_eigenpairs(Dense(torch.diag(values)), 3)
    # As accurate as the residual squared over the gap, and float32.
    assert float(pairs.values[0]) == pytest.approx(2e-30, rel=1e-5)


def test_products_that_are_not_finite_are_reported() -> None:
    """Catches a NaN that LAPACK would turn into an obscure error."""

    class Broken(Operator):
        def product(self, vector: Tensor) -> Tensor:
            return vector * float("nan")

    with pytest.raises(NonFiniteError, match="product 1 with Broken"):
        top_eigenpairs(Broken(3, torch.float32, torch.device("cpu")), 2)
