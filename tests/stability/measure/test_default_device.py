"""Measurements with ``torch.set_default_device``, of a model on another device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import stableopt
from stableopt.curvature import Hessian, Problem, spectral_density, top_eigenpairs
from stableopt.curvature.problem.derivatives.short_differences import generic_point
from stableopt.curvature.problem.derivatives.sketch import sketch
from stableopt.stability import QUANTITIES

LOSS = nn.MSELoss()

BATCH = 4

OF_STEPS = ["realised_edge", "critical_sharpness"]
"""Quantities along the steps of a run."""

OF_SGD = sorted(
    QUANTITIES.keys()
    - {*OF_STEPS, "block_edge", "preconditioned_sharpness", "generalised_sharpness"}
)


def network() -> nn.Sequential:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


def samples() -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(24, 3, generator=generator), torch.randn(24, 2, generator=generator)


def numbers(margins: stableopt.StabilityMargins | None) -> dict[str, float]:
    assert margins is not None
    assert not margins.failures
    return {name: value for name, value in margins.record().items() if "seconds" not in name}


def quantity(name: str) -> Callable[[Path], Any]:
    def measured(_: Path) -> Any:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        margins = stableopt.measure(
            model, LOSS, samples(), optimizer=optimizer, batch_size=BATCH, quantities=[name]
        )
        assert margins[name].value is not None
        return numbers(margins), margins[name].density

    return measured


def trained(
    optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path, quantities: list[str]
) -> Any:
    """Train with a monitor, and a flight recorder that is shown a loss that is not a number."""
    with torch.device("cpu"):
        # The first step makes the state, with torch's own factories.
        LOSS(model(samples()[0]), samples()[1]).backward()
        optimizer.step()
    x, y = samples()
    monitor = stableopt.StabilityMonitor(
        optimizer, model, LOSS, (x, y), every=4, quantities=quantities
    )
    recorder = stableopt.FlightRecorder(monitor, folder, check_every=2, measure=False)
    for step in range(12):
        rows = slice(step % 6 * BATCH, step % 6 * BATCH + BATCH)
        loss = LOSS(model(x[rows]), y[rows])
        shown = loss.item() if step == 1 else loss * (math.nan if step == 9 else 1.0)
        recorder.loss(shown, range(BATCH))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    recorder.close()
    reports = [path.name for path in recorder.reports]
    assert reports
    return [numbers(margins) for margins in monitor.history], reports, weights(model)


def weights(model: nn.Module) -> list[list[float]]:
    return [p.flatten().tolist() for p in model.parameters()]


def tracked_sgd(folder: Path) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return trained(optimizer, model, folder, ["sharpness", "layers", *OF_STEPS])


def tracked_adamw(folder: Path) -> Any:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return trained(optimizer, model, folder, ["preconditioned_sharpness", "sigma_trace"])


def tracked_muon(folder: Path) -> Any:
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Linear(3, 2, bias=False)
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    optimizer = torch.optim.Muon(model.parameters(), lr=1e-2)
    return trained(optimizer, model, folder, ["generalised_sharpness"])


def lbfgs(direction: Any) -> Callable[[Path], Any]:
    def trained(_: Path) -> Any:
        model, (x, y) = network(), samples()
        optimizer = stableopt.LBFGS(
            model.parameters(),
            max_iter=5,
            line_search_fn="strong_wolfe",
            direction=direction,
            reduce_loss=lambda loss: loss / 2,
        )
        optimizer.track(model, LOSS, (x, y), every=1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return weights(model), numbers(optimizer.margins)

    return trained


def critical_lr(_: Path) -> Any:
    found = [
        stableopt.critical_lr(network(), LOSS, samples(), BATCH, max_rows=rows)
        for rows in (2048, 8)  # from all modes, and from the leading ones
    ]
    return [repr(result) for result in found]


def critical_sharpness(_: Path) -> Any:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return stableopt.critical_sharpness(model, LOSS, samples(), optimizer=optimizer)


def reshuffled_critical_lr(_: Path) -> Any:
    return stableopt.reshuffled_critical_lr(
        network(), LOSS, samples(), BATCH, replicas=8, epochs=16
    )


def almost_sure_critical_lr(_: Path) -> Any:
    return stableopt.almost_sure_critical_lr(network(), LOSS, samples(), BATCH, steps=50)


def suggest(_: Path) -> Any:
    found = stableopt.suggest(network(), LOSS, samples(), batch_sizes=[BATCH])
    return found.sharpness, [(row.optimizer, row.lr, row.lower) for row in found.rows]


def eigenpairs(_: Path) -> Any:
    """By restarts, deflation and a warm start."""
    hessian = Hessian(Problem(network(), LOSS, samples(), max_samples=20))
    pairs = top_eigenpairs(hessian, 3, most_vectors=10, tol=1e-5)
    again = top_eigenpairs(hessian, 3, start=pairs.vectors.T)
    return [(found.values.tolist(), found.vectors.tolist()) for found in (pairs, again)]


def density(_: Path) -> Any:
    found = spectral_density(Hessian(Problem(network(), LOSS, samples())))
    grid = torch.linspace(-1.0, 1.0, 5, device="cpu")
    return found.density(grid).tolist(), found.cumulative(grid).tolist()


def random_numbers(_: Path) -> Any:
    """Of the checks of a model's own derivatives."""
    (near,) = generic_point([torch.ones(5, device="cpu")])
    return near.tolist(), sketch([near]).tolist()


RESULTS = [
    tracked_sgd,
    tracked_adamw,
    tracked_muon,
    critical_lr,
    critical_sharpness,
    reshuffled_critical_lr,
    almost_sure_critical_lr,
    suggest,
    eigenpairs,
    density,
    random_numbers,
    *(pytest.param(lbfgs(kind), id=f"lbfgs-{kind}") for kind in ("compact", "two_loop")),
    *(pytest.param(quantity(name), id=name) for name in OF_SGD),
]


@pytest.fixture
def meta_by_default() -> Iterator[Callable[[], None]]:
    """A function that makes ``"meta"``, where nothing can be computed, the default device."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore:limits are not known. Muon", "ignore:.* did not converge")
@pytest.mark.parametrize("result", RESULTS)
def test_results_on_another_device_than_the_default(
    result: Callable[[Path], Any], meta_by_default: Callable[[], None], tmp_path: Path
) -> None:
    """Catches a tensor of the library that goes to the default device instead of its own."""
    expected = result(tmp_path / "without")
    meta_by_default()
    assert result(tmp_path / "with") == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_data_set_is_read_under_a_default_device() -> None:
    """Catches a loader whose generator is not on the device on which torch draws its seed."""
    data = TensorDataset(*samples())
    problem = Problem(network(), LOSS, data, max_samples=20)
    expected = problem.value()
    try:
        torch.set_default_device("cuda")
        assert problem.value() == expected
        assert Problem(network(), LOSS, data, max_samples=20).value() == expected
    finally:
        torch.set_default_device(None)
