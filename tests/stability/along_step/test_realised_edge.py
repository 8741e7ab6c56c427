"""The realised edge against the quadratic form of the dense Hessian, and against losses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from first_order import FirstOrderOnly, Unread, half_squares, quadratic
from torch import Tensor, nn

import stableopt
from stableopt import Problem, StabilityMonitor, measure

ONLY = {"quantities": ("realised_edge",), "every": 1}


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.Muon([model[0].weight], lr=0.03),
        torch.optim.AdamW([model[1].weight], lr=0.05),
    ]


def schedule_free(model: nn.Module) -> list[torch.optim.Optimizer]:
    package = pytest.importorskip("schedulefree")
    optimizer = package.SGDScheduleFree(model.parameters(), lr=0.2)
    optimizer.train()
    return [optimizer]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9)],
    "AdamW": lambda m: [torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1)],
    "unread": lambda m: [Unread(m.parameters(), lr=0.2)],
    "Muon and AdamW": two_optimizers,
    "schedule-free": schedule_free,
}


class Sum(nn.Module):
    """Two linear layers side by side: a quadratic loss with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 3, bias=False).double() for _ in range(2))

    def __getitem__(self, index: int) -> nn.Module:
        return self.parts[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x) + 0.5 * self.parts[1](x)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_quadratics_it_is_the_curvature_along_the_step(name: str) -> None:
    r"""Catches a partial step, and a gradient or a loss of another point.

    The oracle is :math:`-\tfrac12\delta^\top H\delta/(g^\top\delta)` with the dense Hessian. With a
    window of one step, steps uphill have no value and are counted.
    """
    torch.manual_seed(0)
    _, (x, y), block = quadratic()
    model = Sum()
    hessian = torch.kron(torch.tensor([[1.0, 0.5], [0.5, 0.25]]).double(), block)
    optimizers = OPTIMIZERS[name](model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # limits that are not known
        monitor = StabilityMonitor(
            optimizers, model, half_squares, (x, y), realised_window=1, **ONLY
        )
    uphill = 0
    for _ in range(15):
        for optimizer in optimizers:
            optimizer.zero_grad()
        before, loss = flat(model.parameters()), half_squares(model(x), y)
        loss.backward()
        gradient = flat(p.grad for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        for optimizer in optimizers:
            optimizer.step()
        step = flat(model.parameters()) - before
        with torch.no_grad():
            rise = float(half_squares(model(x), y) - loss)
        slope = float(gradient @ step)
        assert monitor.margins is not None
        assert monitor.margins.failure is None
        edge = monitor.margins["realised_edge"]
        uphill += slope >= 0
        assert edge.details["uphill"] == uphill
        if slope >= 0:
            assert edge.value is None
            continue
        assert edge.value is not None
        # Required accuracy; 1e-12 is measured: rounding of the losses over their difference.
        assert edge.value == pytest.approx(
            float(-0.5 * step @ hessian @ step / slope), rel=1e-8, abs=1e-8
        )
        assert (edge.value > 1) == (rise > 0)
        assert edge.limit == 1.0


def test_gradient_descent_on_an_eigenvector() -> None:
    r"""Catches another normalisation: :math:`\eta\lambda/2`, with all of the sharpness used."""
    model, (x, y), hessian = quadratic(outputs=1)
    values, vectors = torch.linalg.eigh(hessian)
    minimum = torch.linalg.lstsq(x, y).solution.T
    for index, share in ((3, 1.0), (0, float(values[0] / values[3]))):
        with torch.no_grad():
            model.weight.copy_(minimum + vectors[:, index])
        optimizer = stableopt.GD(model.parameters(), lr=0.3)
        monitor = optimizer.track(
            model,
            half_squares,
            (x, y),
            every=1,
            quantities=("sharpness", "realised_edge"),
            tol=1e-6,
        )
        half_squares(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        margins = monitor.margins
        # Rounding of the loss, and a residual of 1e-6 squared.
        assert margins.realised_edge == pytest.approx(0.3 * float(values[index]) / 2, rel=1e-9)
        assert margins.edge_split == pytest.approx((0.15 * float(values[3]), share, 1.0), rel=1e-9)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_split_is_what_it_says(name: str) -> None:
    r"""Catches :math:`\chi`, :math:`\varsigma` or :math:`\tau` in other coordinates than P's."""
    _, (x, y), block = quadratic()
    torch.manual_seed(0)
    model = Sum()
    hessian = torch.kron(torch.tensor([[1.0, 0.5], [0.5, 0.25]]).double(), block)
    (optimizer,) = OPTIMIZERS[name](model)
    monitor = StabilityMonitor(
        optimizer,
        model,
        half_squares,
        (x, y),
        every=1,
        quantities=("sharpness", "realised_edge"),
        tol=1e-7,
        max_iter=200,
    )
    for _ in range(2):
        before = flat(model.parameters())
        optimizer.zero_grad()
        half_squares(model(x), y).backward()
        gradient = flat(p.grad for p in model.parameters())
        optimizer.step()
    step, rule = flat(model.parameters()) - before, monitor.update_rule
    scale = torch.ones_like(step)
    if rule.preconditioner is not None:
        scale = flat(rule.preconditioner.entries)  # type: ignore[attr-defined]
    sharpness = float(torch.linalg.eigvals(scale[:, None] * hessian).real.max())
    norm = float(step @ (step / scale))
    margins = monitor.margins
    rows = monitor._measurer.memory["realised_edge"]
    fall, slope, metric = rows[-1]
    assert metric == pytest.approx(rule.max_sharpness * norm, rel=1e-9)
    assert slope == pytest.approx(float(gradient @ step), rel=1e-9)
    assert fall - slope == pytest.approx(float(step @ hessian @ step) / 2, rel=1e-9)
    split = margins.edge_split
    assert split.available == pytest.approx(sharpness / rule.max_sharpness, rel=1e-6)
    product = split.available * split.used / split.calibration
    assert product == pytest.approx(margins.realised_edge, rel=1e-12)


def test_small_batches_are_averaged_apart() -> None:
    """Catches a mean of ratios, a wrong window or standard error.

    The oracle takes the same sums from the parameters themselves, and the standard error from a
    jackknife.
    """
    torch.manual_seed(0)
    model, (x, y), _ = quadratic(samples=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    monitor = StabilityMonitor(optimizer, model, half_squares, (x, y), realised_window=20, **ONLY)
    rows = []
    for _ in range(30):
        batch = torch.randint(40, (2,))
        optimizer.zero_grad()
        half_squares(model(x[batch]), y[batch]).backward()
        before = model.weight.detach().clone()
        optimizer.step()
        with torch.no_grad():
            fall = half_squares(model(x), y) - half_squares(nn.functional.linear(x, before), y)
            residual = nn.functional.linear(x, before) - y
            slope = ((residual.T @ x / 40) * (model.weight - before)).sum()
        rows.append((float(fall), float(slope)))
    falls, slopes = torch.tensor(rows[-20:], dtype=torch.float64).T
    edge = monitor.margins["realised_edge"]
    assert edge.details["steps"] == 20
    assert edge.details["uphill"] == sum(slope >= 0 for _, slope in rows)
    assert edge.value == pytest.approx(1 - float(falls.sum() / slopes.sum()), rel=1e-9)
    leave_one_out = (falls.sum() - falls) / (slopes.sum() - slopes)
    jackknife = float(((leave_one_out - leave_one_out.mean()).square().sum() * 19 / 20).sqrt())
    # Both are estimates: they agree to first order in the weight of one step, 1/20.
    assert edge.details["standard_error"] == pytest.approx(jackknife, rel=0.2)
    assert edge.measurement.residual == edge.details["standard_error"] / abs(edge.value)


def test_where_the_loss_is_rounding_gradients_tell() -> None:
    """Catches a difference of losses that rounds to nothing: in single precision close to a minimum."""
    model, (x, y), hessian = quadratic(outputs=1)
    top = torch.linalg.eigvalsh(hessian)[-1]
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    minimum = torch.linalg.lstsq(x, y).solution.T
    model, x, y = model.float(), x.float(), y.float()
    with torch.no_grad():
        model.weight.copy_(minimum + 1e-3 * vector)
    optimizer = stableopt.GD(model.parameters(), lr=0.3)
    monitor = optimizer.track(model, half_squares, (x, y), **ONLY)
    half_squares(model(x), y).backward()
    optimizer.step()
    # The loss changes by 1e-6 of itself, which leaves one digit of a difference. The gradient is 1e-3
    # of its parts: three digits fewer than single precision.
    assert monitor.margins.realised_edge == pytest.approx(0.15 * float(top), rel=1e-3)


def test_no_second_derivative_is_built() -> None:
    """Catches a double backward, or its check, in the monitor or in a problem made for it.

    Every other way to measure this model raises.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), FirstOrderOnly(), nn.Linear(4, 1)).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    y = x.sum(1, keepdim=True).sin()
    optimizer = Unread(model.parameters(), lr=0.1)
    quantities = ("realised_edge", "critical_sharpness")
    # Without a warning: their limits hold for any rule.
    monitor = StabilityMonitor(
        optimizer, model, nn.MSELoss(), (x, y), every=1, quantities=quantities
    )
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    for margins in monitor.history:
        assert (margins.failure, margins.failures) == (None, {})
        assert margins.realised_edge is not None
        assert margins.method == "first derivatives, in float64"[:17]
    sharpness = stableopt.critical_sharpness(model, nn.MSELoss(), (x, y))
    assert sharpness.converged
    problem = Problem(model, nn.MSELoss(), (x, y), second_derivatives=False)
    # When requested, second derivatives are checked.
    with pytest.raises(AssertionError, match="a second derivative was built"):
        _ = problem.obstacle
    with pytest.raises(AssertionError, match="a second derivative was built"):
        Problem(model, nn.MSELoss(), (x, y))


def test_steps_that_do_not_count() -> None:
    """Catches a value for a step that moved nothing, and measurements without a step."""
    model, (x, y), _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(
        optimizer, model, half_squares, (x, y), every=1, quantities=("sharpness", "realised_edge")
    )
    optimizer.step()  # without gradients
    assert monitor.margins.realised_edge is None
    assert monitor.margins["realised_edge"].details == {}
    with pytest.warns(RuntimeWarning, match="no step was recorded"):
        margins = monitor.measure()
    assert margins.sharpness is not None
    assert "no step was recorded" in margins.failures["realised_edge"]
    with pytest.raises(ValueError, match=r"belongs to a step.*StabilityMonitor"):
        measure(model, half_squares, (x, y), optimizer=optimizer, quantities=("realised_edge",))
    with pytest.raises(ValueError, match="realised_window=0"):
        StabilityMonitor(optimizer, model, half_squares, (x, y), realised_window=0)


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    """Catches an infinite step that enters the average of those after it."""
    model, (x, y), _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(optimizer, model, half_squares, (x, y), **ONLY)
    half_squares(model(x), y).backward()
    optimizer.param_groups[0]["lr"] = 1e200
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert monitor.margins.failure == "not finite: the loss is inf"
    assert "realised_edge" not in monitor._measurer.memory


def test_a_checkpoint_keeps_the_window() -> None:
    """Catches a resumed average that begins again, and a checkpoint of an older version refused."""
    model, (x, y), _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {**ONLY, "batch_size": 2}
    monitor = StabilityMonitor(optimizer, model, half_squares, (x, y), **options)
    for _ in range(3):
        optimizer.zero_grad()
        half_squares(model(x), y).backward()
        optimizer.step()
    state = monitor.state_dict()
    assert state["history"][-1]["details"]["realised_edge"]["steps"] == 3
    monitor.close()
    resumed = StabilityMonitor(optimizer, model, half_squares, (x, y), **options)
    resumed.load_state_dict(state)
    assert resumed.margins == monitor.margins
    optimizer.step()
    assert resumed.margins["realised_edge"].details["steps"] == 4
    assert len(monitor._measurer.memory["realised_edge"]) == 3
    del state["memory"]
    resumed.load_state_dict(state)
    assert resumed._measurer.memory == {}


def test_the_record_has_finite_numbers_and_distinct_tags(tmp_path: Any) -> None:
    """Catches details that a sink cannot take: two with one tag, or a number that is not one."""
    model, (x, y), _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    received: list[dict[str, float]] = []
    monitor = StabilityMonitor(
        optimizer,
        model,
        half_squares,
        (x, y),
        every=1,
        quantities=("sharpness", "realised_edge", "critical_sharpness"),
        sinks=[
            lambda step, record: received.append(record),
            stableopt.TensorBoardSink(str(tmp_path), max_diagrams=0),
        ],
    )
    for _ in range(2):
        half_squares(model(x), y).backward()
        optimizer.step()
    monitor.close()
    (_, record) = received
    assert record["realised_edge"] == monitor.margins.realised_edge
    assert record["critical_sharpness_passes"] <= 7
    infinite = {name for name, value in record.items() if not math.isfinite(value)}
    assert infinite <= {"non_uniformity_limit"}  # of the full batch


def _quiet(step: int, model: nn.Module, state: dict[str, float]) -> None:
    """Change nothing between steps."""


def _anneal(step: int, model: nn.Module, state: dict[str, float]) -> None:
    state["weight"] = 0.1 * step


def _shift(step: int, model: nn.Module, state: dict[str, float]) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(0.01)


@pytest.mark.parametrize("between", [_quiet, _anneal, _shift])
@pytest.mark.parametrize("norm", [False, True])
def test_what_the_last_step_left_is_used_only_where_it_holds(
    norm: bool, between: Callable[[int, nn.Module, dict[str, float]], None]
) -> None:
    """Catches a gradient reused where weights, running statistics or the loss itself have changed.

    The oracle measures each step too, within a time budget that is never exhausted, and keeps
    nothing. Steps too small for the loss's digits need both gradients: with the last one kept, one
    a step.
    """
    torch.manual_seed(0)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 2)]
    model, state = nn.Sequential(*layers), {"weight": 0.0}
    calls = {"losses": 0}

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls["losses"] += 1
        return (outputs - targets).square().mean() + state["weight"] * outputs.square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    options = {"quantities": ("realised_edge",), "realised_window": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # batch norm in training mode
        reusing = StabilityMonitor(optimizer, model, loss_fn, (x, y), every=1, **options)
        recomputing = StabilityMonitor(
            optimizer, model, loss_fn, (x, y), max_overhead=1e12, **options
        )
    passes = []
    for step in range(5):
        between(step, model, state)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        calls["losses"] = 0
        optimizer.step()
        passes.append(calls["losses"])
    assert len(reusing.history) == len(recomputing.history) == 5
    for reused, recomputed in zip(reusing.history, recomputing.history, strict=True):
        assert reused.realised_edge == recomputed.realised_edge
        assert reused.loss == recomputed.loss
    # Recomputing takes two gradients and a loss.
    holds = between is _quiet and not norm
    assert passes[-1] == (2 if holds else 3) + 3
