"""The trace against dense matrices: exact cases, stated errors, and the preconditioned form."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense, with_spectrum
from torch import Tensor

from stableopt.curvature import NonFiniteError, Operator, trace

BULK = torch.linspace(-0.1, 0.2, 54, dtype=torch.float64)
SPECTRA = {
    "outliers": torch.cat([BULK, torch.linspace(1, 8, 6, dtype=torch.float64)]),
    "flat": torch.linspace(0, 1, 60, dtype=torch.float64),
    "indefinite": torch.cat([torch.linspace(-1, 1, 58), torch.tensor([4.0, 20.0])]).double(),
}


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "P"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_stated_error_holds_at_the_stated_rate(name: str, preconditioned: bool) -> None:
    """Catches a biased estimate, and a standard error of the samples without their number.

    Of 40 seeds with 0.95 each, fewer than 34 hold with probability 5e-3 at 0.95, 3e-2 at 0.93.
    """
    A = with_spectrum(SPECTRA[name])
    P = with_spectrum(torch.logspace(-1, 1, 60).double(), 3) if preconditioned else None
    true = float((A if P is None else P @ A).diagonal().sum())
    within, errors = 0, []
    for seed in range(40):
        estimate = trace(Dense(A), preconditioner=P, seed=seed, max_iter=30)
        assert estimate.products <= 30
        # 1e-9: with all large eigenvalues in the sketch the error is rounding.
        within += abs(estimate.value - true) <= 2 * estimate.standard_error + 1e-9 * abs(true)
        errors.append(estimate.value - true)
    assert within >= 34
    spread = torch.tensor(errors).std() / 40**0.5
    assert abs(sum(errors) / 40) <= 4 * float(spread) + 1e-9


def test_it_stops_at_the_tolerance() -> None:
    """Catches an absolute tolerance, and a search that never ends early."""
    operator = Dense(1e4 * with_spectrum(SPECTRA["outliers"]))
    estimate = trace(operator, tol=0.05)
    assert estimate.converged
    assert estimate.products == operator.products < 60
    assert estimate.standard_error <= 0.05 * estimate.value
    assert estimate.largest == pytest.approx(8e4, rel=1e-3)  # a sketch of a few steps
    assert estimate.effective_rank == pytest.approx(estimate.value / estimate.largest)
    assert not trace(operator, tol=1e-6, max_iter=24).converged


def test_small_and_degenerate_matrices_are_exact() -> None:
    """Catches samples outside a basis that spans the whole space, and a remainder of norm zero."""
    A = with_spectrum(SPECTRA["indefinite"][-20:])
    estimate = trace(Dense(A))
    assert (estimate.standard_error, estimate.products) == (0.0, 20)
    assert estimate.value == pytest.approx(float(A.diagonal().sum()), rel=1e-12)
    zero = trace(Dense(torch.zeros(60, 60).double()))
    assert zero.value == zero.standard_error == 0.0
    assert zero.effective_rank != zero.effective_rank  # NaN
    # One row has the Krylov space of twice the identity; fresh directions follow it.
    twice = trace(Dense(2 * torch.eye(60).double()))
    assert twice.value == pytest.approx(120.0, abs=4 * twice.standard_error)


def test_products_that_are_not_finite_are_reported() -> None:
    """Catches a NaN that ends as the value."""

    class Late(Operator):
        count = 0

        def product(self, vector: Tensor) -> Tensor:
            self.count += 1
            return vector * (float("nan") if self.count > 9 else 2.0)

    with pytest.raises(NonFiniteError, match="with Late"):
        trace(Late(60, torch.float64, torch.device("cpu")))


def test_arguments_out_of_range_are_named() -> None:
    """Catches an error from deep inside for what the caller can correct."""
    operator = Dense(torch.eye(4))
    for options, message in (
        ({"tol": 0.0}, "tol=0.0"),
        ({"max_iter": 2}, "max_iter=2"),
        ({"most_vectors": 0}, "most_vectors=0"),
        ({"preconditioner": -torch.eye(4)}, "expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(operator, **options)
