"""What the monitor measures: the right matrix, warm starts, and the history."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from monitored_runs import MSE, X, Y, linear, start, train
from torch import Tensor, nn

import stableopt
import stableopt.monitor.measurer
import stableopt.monitor.monitor
from stableopt.stability.measure.evaluation import Evaluation


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian by plain nested loops over the parameters' gradient."""
    params = list(model.parameters())
    gradients = torch.autograd.grad(MSE(model(x), y), params, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in gradients]):
        row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("decays", [(0.0, 0.0), (0.3, 0.3), (0.0, 0.7)], ids=str)
@pytest.mark.parametrize("lrs", [(0.1, 0.1), (0.02, 0.1)], ids=str)
def test_sharpness_of_groups_is_that_of_the_dense_matrix(
    lrs: tuple[float, float], decays: tuple[float, float], maximize: bool
) -> None:
    r"""Catches a wrong scale, square root, sign or decay: :math:`P^{1/2}(\pm H+\Lambda)P^{1/2}`.

    Whether in limit or matrix, the edge is where the update's own linearisation has radius 1.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = X.double(), Y.double()
    groups = [
        {"params": part.parameters(), "lr": lr, "weight_decay": decay}
        for part, lr, decay in zip((model[0], model[2]), lrs, decays, strict=True)
    ]
    optimizer = stableopt.SGD(groups, lr=1.0, maximize=maximize)
    monitor = optimizer.track(model, MSE, (x, y), every=1, tol=1e-9, batch_size=4)
    margins = monitor.measure()

    sizes = [9, 4]
    spread = torch.tensor(sizes)
    rates = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(spread)
    decay = torch.tensor(decays, dtype=torch.float64).repeat_interleave(spread)
    hessian = dense_hessian(model, x, y) * (-1 if maximize else 1)
    # The step itself: theta <- theta - R (+-H + Lambda) theta, symmetric after a similarity.
    root = rates.sqrt()
    step = root[:, None] * (hessian + torch.diag(decay)) * root
    top = float(torch.linalg.eigvalsh(step)[-1])
    # Unstable exactly where an eigenvalue of the step passes 2. The solver's error is of the order
    # of tol^2, 1e-18, so rounding in another order is all there is.
    shared = decays[0] if lrs[0] == lrs[1] and decays[0] == decays[1] else 0.0
    same = len(set(lrs)) == len(set(decays)) == 1
    measured, limit = (
        (margins.sharpness, margins.sharpness_limit)
        if same
        else (margins.preconditioned_sharpness, margins.preconditioned_sharpness_limit)
    )
    assert measured is not None
    assert limit == pytest.approx(2 / max(lrs) - shared, rel=1e-12)
    assert measured + shared == pytest.approx(top / max(lrs), rel=1e-12)
    # Plain sharpness is H's for any groups, and has a limit only where the step is plain.
    plain = float(torch.linalg.eigvalsh(hessian)[-1])
    assert margins.sharpness == pytest.approx(plain, rel=1e-12)
    assert (margins.sharpness_limit is None) == (not same)
    assert margins.lr == max(lrs)
    loss = float(MSE(model(x), y).detach())
    assert margins.loss == pytest.approx(loss, rel=1e-12)  # rounding alone


def test_warm_starts_and_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that never restarts cold, which could keep following an overtaken eigenvector."""
    given: list[tuple[set[str], int]] = []
    measure_at = stableopt.monitor.measurer.measure_at

    def recorded(evaluation: Evaluation, *args: Any, **kwargs: Any) -> Any:
        assert evaluation.starts is not None
        given.append((set(evaluation.starts), evaluation.seed))
        return measure_at(evaluation, *args, **kwargs)

    monkeypatch.setattr(stableopt.monitor.measurer, "measure_at", recorded)
    model, optimizer, _ = start(cold_every=2, seed=7)
    train(model, optimizer, 7)
    cold, warm = set[str](), {"sharpness"}
    assert [starts for starts, _ in given] == [cold, warm, warm, cold, warm, warm, cold]
    assert [seed for _, seed in given] == list(range(7, 14))


def test_history_holds_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a history that grows without bound, or that drops its latest entries."""
    monkeypatch.setattr(stableopt.monitor.monitor, "_HISTORY", 3)
    model, optimizer, monitor = start()
    train(model, optimizer, 5)
    assert [m.step for m in monitor.history] == [3, 4, 5]
    assert monitor.margins is monitor.history[-1]


def test_no_warning_in_a_healthy_run() -> None:
    """Catches a needless warning, which would teach users to ignore warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, monitor = start(quantities=("sharpness", "non_uniformity", "theorem1"))
        train(model, optimizer, 3)
    assert all(m.converged for m in monitor.history)
    assert len(monitor.history) == 3


def test_replaced_layers_are_followed() -> None:
    """Catches curvature of parameters that the model no longer has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = X.double(), Y.double()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()

    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (x, y), every=1, tol=1e-9)
    train(model, optimizer)
    model[2] = nn.Linear(4, 1).double()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer)
    expected = stableopt.measure(model, MSE, (x, y), tol=1e-9, quantities=("sharpness",))
    assert monitor.margins is not None
    assert monitor.margins.sharpness == pytest.approx(expected.sharpness, rel=1e-9)
    model[2].requires_grad_(False)
    train(model, optimizer)
    assert monitor.problem.num_params == 12
    assert monitor.margins.failure is None


def test_parallel_wrappers_are_measured_as_the_module_inside() -> None:
    """Catches a forward pass of DDP in a measurement: it talks to other processes."""

    class Wrapper(nn.DataParallel):
        def forward(self, *args: Any) -> Any:
            raise AssertionError("the wrapper was called")

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(Wrapper(model), MSE, (X, Y), every=1)
    assert monitor.measure().failure is None
