"""The certificate of a result: upper bound, extreme magnitudes, and host transfers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stableopt.curvature import Operator, top_eigenpair


class Diagonal(Operator):
    def __init__(self, values: Tensor) -> None:
        super().__init__(len(values), values.dtype, values.device)
        self.values = values

    def product(self, vector: Tensor) -> Tensor:
        return self.values * vector


SPECTRA = {
    "flat": torch.linspace(0, 1, 300),
    "one hidden above": torch.cat([torch.linspace(-3, 0.9, 299), torch.ones(1)]),
    "below zero": torch.linspace(-5, -4, 300),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("products", [20, 45])
def test_the_upper_bound_holds(spectrum: str, products: int) -> None:
    """Catches a wrong exponent, a missing shift, and a count that continues past the restart.

    The bound may fail for 1 % of starts; of 60 seeds more than 4 do so with probability 4e-4.
    Gaussian starts are invariant under rotation, so a diagonal matrix stands for any.
    """
    values = SPECTRA[spectrum].double()
    largest, spread = float(values.max()), float(values.max() - values.min())
    failures = 0
    for seed in range(60):
        found = top_eigenpair(Diagonal(values), tol=1e-14, max_iter=products, seed=seed)
        assert found.upper_bound is not None
        failures += largest > found.upper_bound
        # (ln(2 * 1.648 * sqrt(300) / 0.01) / 39)^2 = 0.0492, over 1 - 2 * 0.0492, is 0.0546.
        assert found.upper_bound - largest <= 0.0546 * spread
    assert failures <= 4


def test_the_upper_bound_is_the_formula() -> None:
    """Catches a bound that is true but loose. By hand for d = 10,000 and k = 20."""
    values = torch.linspace(-1, 1, 10_000, dtype=torch.float64)
    found = top_eigenpair(Diagonal(values), tol=1e-14, max_iter=20)
    smallest = -top_eigenpair(Diagonal(-values), tol=1e-14, max_iter=20).value
    epsilon = (10.40308 / 39) ** 2  # ln(2 * 1.648 * 100 / 0.01) = 10.40308
    expected = found.value + epsilon / (1 - 2 * epsilon) * (found.value - smallest)
    assert found.upper_bound == pytest.approx(expected, rel=1e-6)


def test_no_bound_where_none_is_known() -> None:
    """Catches a theorem on uniform starts applied to others, or to too few products."""
    operator = Diagonal(torch.linspace(0, 1, 1000))
    assert top_eigenpair(operator, max_iter=5, tol=1e-9).upper_bound is None
    cold = top_eigenpair(operator, max_iter=30, tol=1e-9, keep=True)
    assert cold.upper_bound is not None
    for arguments in (
        {"start": cold.vector},
        {"start": cold.subspace},
        {"method": "power"},
        {"preconditioner": torch.eye(1000)},
    ):
        found = top_eigenpair(operator, max_iter=30, tol=1e-1, **arguments)
        assert found.upper_bound is None


def test_an_exhausted_space_is_exact() -> None:
    """Catches a probabilistic bound where the value is exact."""
    found = top_eigenpair(Diagonal(torch.tensor([3.0, -7.0, 1.0]).double()), tol=1e-15)
    assert found.converged
    assert found.upper_bound == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e-22, 1e20, 1e30])
@pytest.mark.parametrize("how", ["lanczos", "power", "followed", "preconditioned"])
def test_squares_neither_vanish_nor_overflow(scale: float, how: str) -> None:
    """Catches a norm in float32 that is 0 below 1e-23 or infinite above 1e19."""
    values = torch.linspace(-1, 1, 200)
    values[3] = 2.0
    arguments: dict[str, Any] = {}
    if how == "power":
        arguments["method"] = "power"
    elif how == "preconditioned":
        arguments["preconditioner"] = torch.eye(200)
    elif how == "followed":
        arguments["start"] = top_eigenpair(Diagonal(values), keep=True).subspace
    found = top_eigenpair(Diagonal(values * scale), tol=1e-3, **arguments)
    assert found.converged
    assert found.value == pytest.approx(2 * scale, rel=1e-5)
    assert found.absolute_residual <= 1e-3 * found.value


def test_single_precision_among_a_million() -> None:
    """Catches projections whose rounding grows with d: summed in sequence they made this value
    4e-5 wrong, and the true residual a thousand times the reported one.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1_000_000, generator=generator)
    values[17], values[18] = 3.0, 2.0
    for method in ("lanczos", "power"):
        found = top_eigenpair(Diagonal(values), tol=1e-4, max_iter=60, method=method)
        assert found.converged
        # Rounding in float32 is 6e-8, and 1e-6 in a product summed by blocks.
        assert found.value == pytest.approx(3.0, rel=2e-6)
        vector = found.vector.double()
        true = float((values.double() * vector - found.value * vector).norm())
        assert true == pytest.approx(found.absolute_residual, rel=0.02, abs=1e-5)


class Transfers(TorchDispatchMode):
    """Counts the operations that wait for a device: reads and copies of marked tensors.

    On a CPU the dtype distinguishes the device's tensors from the host's:
    the host works in float64, the operator in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and source.dtype == torch.float32:
            reads = "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name
            leaves = "_to_copy" in name and (kwargs or {}).get("dtype") == torch.float64
            self.count += reads or leaves
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_one_transfer_a_product(method: str) -> None:
    """Catches a number read from the device for a decision: every read makes the host wait."""
    operator = Diagonal(torch.linspace(0, 1, 500))
    with Transfers() as transfers:
        found = top_eigenpair(operator, method=method, tol=1e-2)
    assert 0 < transfers.count <= found.products


def test_following_transfers_no_more_than_a_product_each() -> None:
    """Catches a transfer each for the first two products; one more is for the kept subspace."""
    operator = Diagonal(torch.cat([torch.linspace(0, 0.5, 500), torch.tensor([1.0, 2.0])]))
    kept = top_eigenpair(operator, tol=1e-2, keep=True).subspace
    with Transfers() as transfers:
        found = top_eigenpair(operator, start=kept, tol=1e-2)
    assert transfers.count <= found.products == 3
