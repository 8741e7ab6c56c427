"""The spectral density against dense spectra."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import SpectralDensity, spectral_density

_GENERATOR = torch.Generator().manual_seed(0)
_SQUARE = torch.randn(250, 250, generator=_GENERATOR, dtype=torch.float64)
BASIS = torch.linalg.qr(_SQUARE)[0]

SPECTRA = {
    "semicircle": torch.linalg.eigvalsh((_SQUARE + _SQUARE.T) / 250**0.5),
    "outliers": torch.cat([torch.randn(240, generator=_GENERATOR) / 50, torch.linspace(1, 9, 10)]),
    "two values": torch.cat([torch.zeros(150), torch.ones(100)]),
    "rank three": torch.cat([torch.zeros(247), torch.tensor([1.0, -2.0, 5.0])]),
}


def kolmogorov(density: SpectralDensity, values: Tensor) -> float:
    """Return the largest difference of the cumulative distributions, by a plain loop.

    Values that differ by less than 1e-6 of the range count as one: rounding parts a node from its
    eigenvalue.
    """
    tolerance = 1e-6 * float(values.max() - values.min())
    worst = 0.0
    for point in [*values.tolist(), *density.nodes]:
        grid = torch.tensor([point + tolerance, point - tolerance], dtype=torch.float64)
        shares = density.cumulative(grid)
        for share, value in zip(shares.tolist(), grid.tolist(), strict=True):
            worst = max(worst, abs(share - float((values <= value).double().mean())))
    return worst


@pytest.mark.parametrize("name", SPECTRA)
def test_the_cumulative_distribution_is_that_of_the_dense_spectrum(name: str) -> None:
    """Catches weights of another component, starts that count unequally, and a wrong unit.

    Ten starts leave an error of about 1/sqrt(10 * 250) = 0.02; 60 steps resolve 1/60 of the range.
    """
    values = 100 * SPECTRA[name].double()
    density = spectral_density(Dense((BASIS * values) @ BASIS.T), starts=10, steps=60)
    assert sum(density.weights) == pytest.approx(1.0)
    assert kolmogorov(density, values) < 0.04
    assert density.nodes[-1] == pytest.approx(float(values.max()), abs=1e-2 * 100)
    assert density.products <= 600
    mean = sum(node * weight for node, weight in zip(density.nodes, density.weights, strict=True))
    assert mean == pytest.approx(float(values.mean()), abs=0.05 * float(values.std()))


def test_it_stops_where_the_krylov_space_ends() -> None:
    """Catches Ritz values of a random direction that is added to an exhausted Krylov space."""
    values = SPECTRA["rank three"].double()
    density = spectral_density(Dense((BASIS * values) @ BASIS.T), starts=3)
    assert density.products == 12
    assert spectral_density(Dense(2 * torch.eye(9).double())).nodes == pytest.approx((2.0,) * 5)


def test_the_density_integrates_to_the_cumulative_distribution() -> None:
    """Catches a normalisation without the width."""
    density = spectral_density(Dense((BASIS * SPECTRA["semicircle"]) @ BASIS.T), starts=2)
    low, high = density.nodes[0] - 6 * density.width, density.nodes[-1] + 6 * density.width
    grid = torch.linspace(low, high, 4001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(density.density(grid), grid)
    assert float(integral[-1]) == pytest.approx(1.0, abs=1e-6)
    # A Gaussian moves weight by about its width, where the density is at most 1/3 per unit.
    assert float((integral - density.cumulative(grid[1:])).abs().max()) < density.width
    assert density.width == pytest.approx((density.nodes[-1] - density.nodes[0]) / 50)


def test_arguments_out_of_range_are_named() -> None:
    """Catches a division by zero for what the caller can correct."""
    operator = Dense(torch.eye(4))
    for options, message in (({"starts": 0}, "starts=0"), ({"steps": 0}, "steps=0")):
        with pytest.raises(ValueError, match=message):
            spectral_density(operator, **options)
    with pytest.raises(ValueError, match=r"width=0.0"):
        spectral_density(operator).density(torch.zeros(1), width=0.0)
