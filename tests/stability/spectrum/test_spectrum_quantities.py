"""The quantities of the spectrum against dense matrices, for each matrix and kind of rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import covariance, dense_gauss_newtons, dense_hessians, small_data, small_network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import stableopt
from stableopt import StabilityMargins, StabilityMonitor, TensorBoardSink, measure, plot
from stableopt.curvature import SpectralDensity
from stableopt.stability import QuantityResult, zeroth_order_lr

LOSS = nn.MSELoss()
KINDS = ("top_eigenvalues", "trace", "spectrum")


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Return a network after a step of Adam, the optimizer, and its P as a dense diagonal."""
    model, (x, y) = small_network(), small_data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    LOSS(model(x), y).backward()
    optimizer.step()
    scales = [
        0.1 / (optimizer.state[p]["exp_avg_sq"].div(0.001).sqrt() + 1e-8) / (1 - 0.9)
        for p in model.parameters()
    ]
    return model, optimizer, torch.cat([scale.reshape(-1) for scale in scales])


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("prefix", ["", "gauss_newton_", "sigma_"])
def test_each_matrix_is_the_dense_one(prefix: str, rule: str, trained: Any) -> None:
    """Catches one matrix's entry under another's name, and P on one side or left out.

    38 dimensions: the trace and the largest eigenvalues are exact there.
    """
    model, optimizer, _ = trained
    options: dict[str, Any] = {"lr": 0.3} if rule == "sgd" else {"optimizer": optimizer}
    names = tuple(prefix + kind for kind in KINDS)
    margins = measure(
        model,
        LOSS,
        small_data(),
        quantities=("sharpness", *names),
        batch_size=2,
        tol=1e-8,
        **options,
    )
    root = torch.ones(38, dtype=torch.float64)
    if rule == "adam":
        P = stableopt.UpdateRule.from_optimizer(optimizer).preconditioner
        assert P is not None
        root = (P @ torch.ones(38, dtype=torch.float64)).sqrt()
    samples = (dense_gauss_newtons if prefix == "gauss_newton_" else dense_hessians)(
        model, LOSS, *small_data()
    )
    samples = root[:, None] * samples * root
    matrix = covariance(samples) if prefix == "sigma_" else samples.mean(0)
    values = torch.linalg.eigvalsh(matrix).flip(0)

    top, trace, spectrum = (margins[name] for name in names)
    largest = [top.value, *(v for key, v in top.details.items() if key.isdigit())]
    assert largest == pytest.approx(values[: len(largest)].tolist(), rel=1e-8)
    sharpest = "preconditioned_sharpness_limit" if rule == "adam" else "sharpness_limit"
    limit = getattr(margins, "non_uniformity_limit" if prefix == "sigma_" else sharpest)
    assert top.limit == pytest.approx(limit**2 if prefix == "sigma_" else limit)
    assert top.details["above"] == int((values > top.limit).sum())
    assert len(largest) == min(max(int((values > 0.75 * top.limit).sum()) + 1, 3), 20)
    assert trace.value == pytest.approx(float(values.sum()), rel=1e-8)
    assert trace.details["effective_rank"] == pytest.approx(float(values.sum() / values[0]))
    assert spectrum.density is not None
    assert spectrum.details["largest"] == pytest.approx(float(values[0]), rel=1e-6)
    # Five starts of 38 dimensions: shares are off by about sqrt(1 / 190).
    assert spectrum.details["negative"] == pytest.approx(
        float((values < -1e-6 * values[0]).double().mean()), abs=0.15
    )


def test_a_matrix_preconditioner_has_eigenvalues_and_a_trace_but_no_spectrum() -> None:
    """Catches P left out where the coordinates do not contain it."""
    model, (x, y) = small_network(), small_data()
    optimizer = stableopt.LBFGS(model.parameters(), lr=0.5, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.warns(RuntimeWarning, match="not diagonal: expected top_eigenvalues and trace"):
        margins = measure(model, LOSS, (x, y), optimizer=optimizer, quantities=KINDS, tol=1e-8)
    P = stableopt.UpdateRule.from_optimizer(optimizer).preconditioner
    assert P is not None
    eye = torch.eye(38, dtype=torch.float64)
    product = torch.stack([P @ row for row in eye]) @ dense_hessians(model, LOSS, x, y).mean(0)
    expected = torch.linalg.eigvals(product).real.sort(descending=True).values
    assert margins["top_eigenvalues"].value == pytest.approx(float(expected[0]), rel=1e-8)
    assert margins["top_eigenvalues"].details["2"] == pytest.approx(float(expected[1]), rel=1e-8)
    assert margins["trace"].value == pytest.approx(float(expected.sum()), rel=1e-8)


def test_a_monitor_keeps_the_eigenvalues_warm_and_the_spectrum_rare(tmp_path: Path) -> None:
    """Catches a spectrum at each measurement, a curve that ends, and a cold start each time."""
    model, (x, y) = small_network(), small_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sink = TensorBoardSink(tmp_path, max_diagrams=0)
    with StabilityMonitor(
        optimizer,
        model,
        LOSS,
        (x, y),
        every=1,
        quantities=KINDS,
        spectrum_every=3,
        sinks=[sink],
    ) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    assert [m["spectrum"].density is not None for m in monitor.history] == [
        True,
        False,
        False,
        True,
    ]
    for margins in monitor.history:
        assert margins.failure is None
        assert margins.failures == {}
        assert {"2", "3"} <= margins["top_eigenvalues"].details.keys()
    products = [m["top_eigenvalues"].measurement.products for m in monitor.history]
    assert max(products[1:]) < products[0]
    restored = StabilityMargins.from_dict(json.loads(json.dumps(monitor.history[0].to_dict())))
    assert restored == monitor.history[0]

    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("spectra/spectrum")] == [1, 4]
    histogram = events.Histograms("spectra/spectrum")[0].histogram_value
    assert sum(histogram.bucket) == pytest.approx(38)
    assert histogram.max == pytest.approx(monitor.history[0]["spectrum"].details["largest"])
    scalars = events.Tags()["scalars"]
    assert {"stability/top_eigenvalu_2", "stability/top_eigen_above"} <= {*scalars}
    assert "stability/trace" in scalars


def mezo_radius(values: Tensor, lr: float) -> float:
    """Return the growth of the second moments of zeroth-order gradient descent, as a dense matrix.

    x_j' = x_j (1 - 2 lr h_j + 2 lr^2 h_j^2) + lr^2 sum_i h_i^2 x_i, from E[z z^T A z z^T].
    """
    growth = torch.diag(1 - 2 * lr * values + 2 * (lr * values) ** 2)
    growth = growth + lr**2 * (values**2)[None]
    return float(torch.linalg.eigvals(growth).abs().max())


def test_the_zeroth_order_limit_brackets_the_exact_one() -> None:
    """Catches a factor of two: below the lower bound moments shrink, above the upper one they grow."""
    values = torch.cat([torch.full((60,), 0.01), torch.tensor([1.0, 2.0, 5.0])]).double()
    low, high = zeroth_order_lr(float(values.sum()), float(values.max()))
    assert mezo_radius(values, 0.999 * low) < 1
    assert mezo_radius(values, 1.001 * high) > 1
    assert low < high
    assert zeroth_order_lr(-1.0, -2.0) == (float("inf"), float("inf"))


DENSITY = SpectralDensity((-1.0, 0.0, 4.0), (0.1, 0.8, 0.1), width=0.2, size=100, products=3)


def test_the_figure_shows_the_density_the_limit_and_the_largest() -> None:
    """Catches marks of another quantity, and a limit of the wrong one."""
    results = {
        "spectrum": QuantityResult(-1.0, density=DENSITY),
        "top_eigenvalues": QuantityResult(4.0, limit=5.0, details={"2": 3.0, "above": 0}),
    }
    axes = plot.spectrum(StabilityMargins(results=results), title="all").axes[0]
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    assert list(drawn["largest"].get_xdata()) == [4.0, 3.0]
    assert set(drawn["limit"].get_xdata()) == {5.0}
    assert axes.get_yscale() == "log"
    curve = next(line for line in axes.lines if len(line.get_xdata()) > 100)
    x, density = curve.get_xdata(), curve.get_ydata()
    assert x[density.argmax()] == pytest.approx(0.0, abs=0.01)  # a thousand points over 6.6
    assert axes.get_ylim()[0] < 0.1 * density[abs(x - 4).argmin()]
    assert len(plot.spectrum(DENSITY).axes[0].lines) == 1
    with pytest.raises(ValueError, match="without a density of 'spectrum'"):
        plot.spectrum(StabilityMargins())
