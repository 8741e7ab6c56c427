"""The eigen-solver against known spectra and LAPACK."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import NonFiniteError, Operator, top_eigenpair


def with_spectrum(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """Return a dense symmetric float64 matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )[0]
    matrix = basis @ torch.diag(values) @ basis.T
    return (matrix + matrix.T) / 2


SPECTRA = {
    "a few outliers": [10.0, 7.0, 3.0] + [0.01 * i for i in range(40)],
    "a larger negative": [-50.0, -20.0, 3.0, 1.0, 0.0, 0.5, -1.0, 2.0],
    "symmetric": [-5.0, 5.0, 1.0, -1.0, 2.0],
    "all negative": [-5.0, -1.0, -2.0, -9.0, -3.0],
    "multiple": [4.0, 4.0, 4.0, 1.0, 0.0, -2.0],
    "one": [3.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("vectors", [40, 4])
def test_the_algebraically_largest_is_found(spectrum: str, vectors: int) -> None:
    """Catches the largest in magnitude reported as the largest. The residual bounds the error in
    the value, quadratically where there is a gap: 1e-6 is ample for a residual of 1e-5.
    """
    matrix = with_spectrum(SPECTRA[spectrum])
    pair = top_eigenpair(Dense(matrix), most_vectors=vectors, tol=1e-5, max_iter=2000)
    assert pair.converged
    assert pair.value == pytest.approx(max(SPECTRA[spectrum]), rel=1e-6)
    assert float(pair.vector.norm()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("vectors", [40, 4])
def test_the_reported_residual_is_the_true_one(vectors: int) -> None:
    """Catches a residual by recurrence that drifts from |Av - xv|, and products miscounted."""
    operator = Dense(with_spectrum(SPECTRA["a few outliers"]))
    pair = top_eigenpair(operator, most_vectors=vectors, tol=1e-4, max_iter=500)
    assert pair.products == operator.products
    true_residual = float((operator.matrix @ pair.vector - pair.value * pair.vector).norm())
    assert pair.absolute_residual == pytest.approx(true_residual, rel=1e-6, abs=1e-12)
    assert true_residual <= 1e-4 * pair.value


def test_restarts_reach_a_spectrum_without_gap() -> None:
    """Catches a restart that loses the best vector: 300 close eigenvalues need several bases."""
    matrix = with_spectrum(torch.linspace(0, 1, 300))
    pair = top_eigenpair(Dense(matrix), tol=1e-6, max_iter=1000)
    assert pair.converged
    assert pair.products > 80  # two restarts at the least, or the test is too easy
    assert pair.value == pytest.approx(1.0, abs=1e-6)


def test_a_ritz_value_never_exceeds_the_largest_eigenvalue() -> None:
    """Catches a projected matrix that is not the projection (a wrong column after a restart)."""
    matrix = with_spectrum(torch.linspace(-1, 1, 200))
    for max_iter in (1, 2, 5, 39, 40, 41, 50, 79, 80, 81):
        pair = top_eigenpair(Dense(matrix), tol=1e-14, max_iter=max_iter)
        rayleigh = float(pair.vector @ matrix @ pair.vector)
        assert pair.value == pytest.approx(rayleigh, rel=1e-10)
        assert pair.value <= 1 + 1e-12
        assert pair.products == max_iter


def test_running_out_of_products_is_said() -> None:
    """Catches an unconverged value that claims convergence."""
    pair = top_eigenpair(Dense(with_spectrum(torch.linspace(0, 1, 300))), tol=1e-8, max_iter=5)
    assert not pair.converged
    assert pair.products == 5
    assert pair.absolute_residual > 1e-8


def test_a_small_krylov_space_ends_the_search() -> None:
    """Catches division by zero when Lanczos breaks down: identity, zero, and low rank."""
    for matrix, value in (
        (torch.eye(50), 1.0),
        (torch.zeros(50, 50), 0.0),
        (torch.ones(50, 50), 50.0),
        (-torch.eye(50), -1.0),
    ):
        for vectors in (40, 4):
            pair = top_eigenpair(Dense(matrix), most_vectors=vectors, tol=1e-5, max_iter=300)
            assert pair.converged
            assert pair.value == pytest.approx(value, rel=1e-5, abs=1e-5)


def test_a_warm_start_saves_products() -> None:
    """Catches a start that is ignored."""
    operator = Dense(with_spectrum(torch.linspace(0, 1, 200)))
    cold = top_eigenpair(operator, tol=1e-3)
    warm = top_eigenpair(operator, tol=1e-3, start=cold.vector, seed=1)
    assert warm.converged
    assert warm.products < cold.products


def test_a_warm_start_at_the_wrong_eigenvector_finds_the_right_one() -> None:
    """Catches a search that, started on an exact eigenvector that has been overtaken, stays there:
    its residual is zero, so only the noise in the start reveals the larger eigenvalue.
    """
    matrix = with_spectrum([10.0, 11.0, 3.0, 1.0, 0.0, -2.0])
    vectors = torch.linalg.eigh(matrix).eigenvectors
    overtaken = vectors[:, -2]
    pair = top_eigenpair(Dense(matrix), start=overtaken, tol=1e-3)
    assert pair.value == pytest.approx(11.0, rel=1e-3)


@pytest.mark.parametrize("values", [[-100.0, 1.0], [-3.0, 1.0], [-2.0, -9.0]])
def test_the_power_method_is_lanczos_and_never_the_most_negative(values: list[float]) -> None:
    """Catches the eigenvalue of largest size taken for the largest: from a start near its vector the
    power iteration returned -100, converged.
    """
    matrix = with_spectrum(torch.cat([torch.tensor(values), torch.linspace(-2.5, -2.1, 60)]))
    lowest = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    for start in (None, lowest):
        with pytest.warns(DeprecationWarning, match="most_vectors=4"):
            pair = top_eigenpair(Dense(matrix), method="power", start=start, tol=0.1)
        assert pair.converged
        # A residual of 0.1 relative to the value bounds its error.
        assert pair.value == pytest.approx(max(values), rel=0.1)


@pytest.mark.parametrize("entry", [0.0, float("nan"), float("inf")])
def test_an_unusable_start_is_replaced(entry: float) -> None:
    """Catches a NaN that spreads from an old eigenvector."""
    matrix = with_spectrum([10.0, 3.0, 1.0, 0.0])
    pair = top_eigenpair(Dense(matrix), start=torch.full((4,), entry, dtype=torch.float64))
    assert pair.value == pytest.approx(10.0, rel=1e-3)


def test_a_start_in_single_precision_is_taken() -> None:
    """Catches a checkpoint's dtype leaking into the basis."""
    pair = top_eigenpair(Dense(with_spectrum([2.0, 1.0])), start=torch.ones(2))
    assert pair.vector.dtype == torch.float64


def test_seeds_decide_and_global_generators_are_left_alone() -> None:
    """Catches draws from torch's own generator, which would change the monitored run."""
    operator = Dense(with_spectrum(torch.linspace(0, 1, 100)))
    before = torch.get_rng_state()
    runs = [top_eigenpair(operator, tol=1e-3, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].vector, runs[1].vector)
    assert not torch.equal(runs[0].vector, runs[2].vector)


def test_single_precision_converges_to_its_accuracy() -> None:
    """Catches a tolerance in float32 that rounding never lets it reach. 1e-5 is some 80 eps."""
    matrix = with_spectrum(SPECTRA["a few outliers"]).float()
    pair = top_eigenpair(Dense(matrix), tol=1e-5)
    assert pair.converged
    assert pair.value == pytest.approx(10.0, rel=1e-5)
    assert pair.vector.dtype == torch.float32


class Broken(Operator):
    def product(self, vector: Tensor) -> Tensor:
        return vector * float("nan")


@pytest.mark.parametrize("vectors", [40, 4])
def test_a_product_that_is_not_finite_is_reported(vectors: int) -> None:
    """Catches a NaN that LAPACK would turn into an obscure error, or into a value."""
    with pytest.raises(NonFiniteError, match="product 1 with Broken"):
        top_eigenpair(Broken(3, torch.float32, torch.device("cpu")), most_vectors=vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qr"}, "method='qr'"),
        ({"tol": 0.0}, "tol=0.0"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"start": torch.ones(3)}, r"start has shape \(3,\)"),
        ({"start": torch.ones(2, 3)}, r"start has shape \(2, 3\)"),
        ({"start": torch.ones(0, 2)}, r"start has shape \(0, 2\)"),
        ({"start": torch.tensor(1.0)}, r"start has shape \(\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    """Catches an error that does not name the argument."""
    with pytest.raises(ValueError, match=message):
        top_eigenpair(Dense(torch.eye(2)), **arguments)


def test_an_operator_of_no_dimension_is_named() -> None:
    """Catches an index error from deep inside, as for a model whose layers are all frozen."""
    with pytest.raises(ValueError, match=r"operator has shape \(0, 0\)"):
        top_eigenpair(Dense(torch.zeros(0, 0)))


def test_one_host_transfer_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an `item()` on the device's values; the projected problem is solved on the host."""
    transfers = 0
    original = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        nonlocal transfers
        transfers += 1
        return original(tensor)

    monkeypatch.setattr(Tensor, "cpu", counted)
    operator = Dense(with_spectrum(SPECTRA["a few outliers"]))
    pair = top_eigenpair(operator, tol=1e-6)
    assert transfers == pair.products


def test_a_value_below_the_rounding_of_the_rest_is_not_called_converged() -> None:
    """Catches a residual of rounding size taken for convergence: in float32, next to -1e5, a
    largest eigenvalue of 1 may be missed, and the result must say so.
    """
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 0.5
    values[0], values[1] = 1.0, -1e5

    class Diagonal(Operator):
        def product(self, vector: Tensor) -> Tensor:
            return values * vector

    operator = Diagonal(5000, torch.float32, torch.device("cpu"))
    for vectors in (40, 4):
        pair = top_eigenpair(operator, most_vectors=vectors, tol=1e-3)
        assert not pair.converged or pair.value == pytest.approx(1.0, rel=1e-2)
