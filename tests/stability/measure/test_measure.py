"""`measure` against dense matrices, and its errors for bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import covariance, dense_hessians, small_data, small_network
from scipy.optimize import brentq
from torch import Tensor, nn

import stableopt
from stableopt import StabilityMargins, UpdateRule
from stableopt.curvature import Hessian, NonUniformity, Problem
from stableopt.stability import SecondMomentExcess, measure, noise_factor

Data = tuple[Tensor, Tensor]
ALL = ("sharpness", "non_uniformity", "theorem1")


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def test_all_quantities_against_dense_matrices(network: nn.Module, data: Data) -> None:
    """Catches a missing square root, p for another n, and eta on one side of condition (8)."""
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    h, sigma = hessians.mean(0), covariance(hessians)
    lr, batch = 0.8, 2
    margins = measure(
        network, nn.MSELoss(), data, lr=lr, batch_size=batch, quantities=ALL, tol=1e-8
    )
    contraction = torch.eye(38, dtype=torch.float64) - lr * h
    bound = contraction @ contraction + lr**2 * noise_factor(batch, 7) * sigma
    assert margins.converged
    assert margins.sharpness == pytest.approx(largest(h), rel=1e-9)
    assert margins.non_uniformity == pytest.approx(math.sqrt(largest(sigma)), rel=1e-9)
    assert margins.theorem1 == pytest.approx(largest(bound), rel=1e-9)
    assert margins.loss == pytest.approx(float(nn.MSELoss()(network(data[0]), data[1]).detach()))
    assert margins.sharpness_limit == 2 / lr
    assert margins.non_uniformity_limit == pytest.approx(math.sqrt(2 * 6 / 5) / lr)
    assert margins.dataset_size == 7
    assert all(m.seconds > 0 and m.products > 0 for m in margins.measurements.values())


def test_theorem1_is_one_on_the_region_of_diagonal_problems() -> None:
    """f_i = a_i w^2 / 2: condition (8) is the half-ellipse, whose edge in eta is
    2 a / (a^2 + p s^2). Catches a bound that is not exact in one dimension.
    """
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    data = (x, torch.zeros(3, 1, dtype=torch.float64))
    curvature = x.squeeze() ** 2
    a, s = float(curvature.mean()), float(curvature.std(correction=0))
    for batch in (1, 2, 3):
        edge = 2 * a / (a**2 + noise_factor(batch, 3) * s**2)

        def half(z: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (z - y).square().mean()

        margins = measure(model, half, data, lr=edge, batch_size=batch, quantities=("theorem1",))
        assert margins.theorem1 == pytest.approx(1.0, rel=1e-9)
    # B = n: no noise, and the edge is 2 / a.
    assert edge == pytest.approx(2 / a)


def test_weight_decay_in_theorem1(network: nn.Module, data: Data) -> None:
    """Catches decay left out of I - eta (H + lambda I)."""
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    problem = Problem(network, nn.MSELoss(), data)
    excess = SecondMomentExcess(
        Hessian(problem), NonUniformity(problem), lr=0.5, noise=0.3, weight_decay=0.4
    )
    eye = torch.eye(38, dtype=torch.float64)
    contraction = eye - 0.5 * (hessians.mean(0) + 0.4 * eye)
    expected = contraction @ contraction + 0.25 * 0.3 * covariance(hessians) - eye
    assert float((excess @ eye - expected).norm() / expected.norm()) < 1e-10


def groups(network: nn.Module) -> list[dict]:
    return [
        {"params": network[0].parameters(), "lr": 0.1, "weight_decay": 0.5},
        {"params": network[2].parameters(), "lr": 0.4},
    ]


def test_groups_with_their_own_rates_are_a_preconditioner(network: nn.Module, data: Data) -> None:
    """Catches the plain sharpness next to the largest rate's limit: gradient descent with these
    groups has the step matrix I - diag(eta_g)(H + Lambda), whose edge must be at ratio 1.
    """
    optimizer = torch.optim.SGD(groups(network), lr=1.0)
    h = dense_hessians(network, nn.MSELoss(), *data).mean(0)
    rates = torch.cat([torch.full((20,), 0.1), torch.full((18,), 0.4)]).double()
    decay = torch.cat([torch.full((20,), 0.5), torch.zeros(18)]).double()
    top = torch.linalg.eigvals(rates[:, None] * (h + torch.diag(decay))).real.max()
    margins = measure(network, nn.MSELoss(), data, optimizer=optimizer, tol=1e-8)
    # |1 - mu| = 1 at mu = 2.
    assert margins.preconditioned_sharpness_ratio == pytest.approx(float(top) / 2, rel=1e-7)
    assert margins.sharpness == pytest.approx(largest(h), rel=1e-7)
    assert margins.sharpness_limit is None
    assert margins.stable
    assert margins.lr == 0.4


def test_maximize_looks_at_minus_the_loss(network: nn.Module, data: Data) -> None:
    """Catches the largest eigenvalue of H reported for an optimizer that climbs."""
    h = dense_hessians(network, nn.MSELoss(), *data).mean(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, maximize=True)
    margins = measure(network, nn.MSELoss(), data, optimizer=optimizer, tol=1e-8)
    assert margins.sharpness == pytest.approx(largest(-h), rel=1e-8)
    assert margins.loss is not None
    assert margins.loss > 0


def test_the_edge_it_reports_is_where_gradient_descent_turns() -> None:
    """Catches any wrong limit at the point of use: on a quadratic, steps at 0.98 of the critical
    rate shrink the distance and at 1.02 grow it, for each kind of SGD.
    """
    x, y = small_data(20)
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    minimum = model.weight.detach().clone()
    for rule in (
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
    ):
        for factor, grows in ((0.98, False), (1.02, True)):
            at_one = torch.optim.SGD(model.parameters(), lr=1.0, **rule)
            margins = measure(model, nn.MSELoss(), (x, y), optimizer=at_one, tol=1e-10)
            lr = factor * margins.sharpness_limit / margins.sharpness
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, **rule)
            with torch.no_grad():
                model.weight.add_(1e-3)
            start = float((model.weight.detach() - minimum).norm())
            for _ in range(500):
                optimizer.zero_grad()
                nn.MSELoss()(model(x), y).backward()
                optimizer.step()
            distance = float((model.weight.detach() - minimum).norm())
            assert (distance > 1) == grows
            assert grows or distance < 1e-6 * start
            with torch.no_grad():
                model.weight.copy_(minimum)


def test_without_a_rule_there_are_values_and_no_limits(network: nn.Module, data: Data) -> None:
    """Catches a default learning rate that the user did not choose."""
    margins = measure(network, nn.MSELoss(), data)
    assert margins.sharpness > 0
    assert margins.sharpness_limit is None
    assert margins.non_uniformity_limit is None
    assert margins.sharpness_ratio is None
    assert margins.stable is None
    assert margins.lr is None


def test_momentum_and_gd_limits(network: nn.Module, data: Data) -> None:
    """Catches a rule that is read in part, and a limit on the non-uniformity of full batches."""
    momentum = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    margins = measure(network, nn.MSELoss(), data, optimizer=momentum, batch_size=3)
    assert margins.sharpness_limit == pytest.approx(37.8)
    descent = stableopt.GD(network.parameters(), lr=0.1)
    quantities = ("sharpness", "non_uniformity")
    margins = measure(network, nn.MSELoss(), data, optimizer=descent, quantities=quantities)
    assert margins.non_uniformity_limit == math.inf
    assert margins.non_uniformity_ratio == 0
    assert margins.batch_size == 7
    assert margins.stable


def test_a_loss_that_is_not_finite_is_a_failed_measurement(network: nn.Module, data: Data) -> None:
    """Catches a NaN reported as a sharpness, and an exception instead of a record."""
    x, y = data
    for target in (float("nan"), float("inf")):
        targets = y.clone()
        targets[3, 1] = target
        margins = measure(network, nn.MSELoss(), (x, targets), lr=0.1)
        assert margins.failure is not None
        assert "loss is" in margins.failure
        assert margins.sharpness is None
        assert not margins.converged
        assert margins.record()["failed"] == 1.0
        assert margins.sharpness_limit == 20.0


def test_margins_and_ratios() -> None:
    """Catches a ratio upside down, and a limit of zero or less taken for no limit."""
    margins = StabilityMargins(
        sharpness=15.0, sharpness_limit=20.0, non_uniformity=6.0, non_uniformity_limit=4.0
    )
    assert margins.sharpness_ratio == 0.75
    assert margins.sharpness_margin == 5.0
    assert margins.non_uniformity_ratio == 1.5
    assert margins.non_uniformity_margin == -2.0
    assert margins.stable is False
    assert StabilityMargins(sharpness=1.0, sharpness_limit=-1.0).stable is False
    preconditioned = StabilityMargins(
        sharpness=90.0, preconditioned_sharpness=3.0, preconditioned_sharpness_limit=2.0
    )
    assert preconditioned.preconditioned_sharpness_ratio == 1.5
    assert preconditioned.preconditioned_sharpness_margin == -1.0
    assert preconditioned.record()["preconditioned_sharpness_ratio"] == 1.5
    assert preconditioned.stable is False
    assert preconditioned.sharpness_ratio is None
    assert (preconditioned.limited_sharpness, preconditioned.edge_ratio) == (3.0, 1.5)
    assert (margins.limited_sharpness, margins.edge_ratio) == (15.0, 0.75)
    assert set(StabilityMargins().record()) == {"seconds", "failed", "converged", "certified"}


CALLS: dict[str, tuple[Callable[[nn.Module, Data], object], type[Exception], str]] = {
    "sum": (lambda m, d: measure(m, nn.MSELoss(reduction="sum"), d), ValueError, "a sum"),
    "no reduction": (
        lambda m, d: measure(m, nn.MSELoss(reduction="none"), d),
        ValueError,
        r"shape \(7, 3\): expected a scalar",
    ),
    "a float": (lambda m, d: measure(m, lambda z, y: 1.0, d), TypeError, "returned float"),
    "complex": (
        lambda m, d: measure(m, lambda z, y: z.mean() * 1j, d),
        TypeError,
        "complex128: expected a real scalar",
    ),
    "constant": (
        lambda m, d: measure(m, lambda z, y: y.square().mean().requires_grad_(), d),
        ValueError,
        "does not depend on any",
    ),
    "an iterator": (
        lambda m, d: measure(m, nn.MSELoss(), iter([d])),
        TypeError,
        "can be read only once",
    ),
    "a generator": (
        lambda m, d: measure(m, nn.MSELoss(), (batch for batch in [d])),
        TypeError,
        "can be read only once",
    ),
    "no batches": (lambda m, d: measure(m, nn.MSELoss(), []), ValueError, "data is empty"),
    "no samples": (
        lambda m, d: measure(m, nn.MSELoss(), (d[0][:0], d[1][:0])),
        ValueError,
        "data is empty",
    ),
    "unequal": (
        lambda m, d: measure(m, nn.MSELoss(), (d[0], d[1][:5])),
        ValueError,
        r"\[7, 5\] samples",
    ),
    "a number": (lambda m, d: measure(m, nn.MSELoss(), 3), TypeError, "data=3 cannot be"),
    "a tensor": (lambda m, d: measure(m, nn.MSELoss(), d[0]), TypeError, r"expected \(x, y\)"),
    "dictionaries": (
        lambda m, d: measure(m, nn.MSELoss(), [{"x": d[0]}]),
        TypeError,
        "Problem.from_batch_loss",
    ),
    "no module": (
        lambda m, d: measure(lambda x: x, nn.MSELoss(), d),
        TypeError,
        "expected a torch.nn.Module",
    ),
    "nothing to train": (
        lambda m, d: measure(nn.Tanh(), nn.MSELoss(), d),
        ValueError,
        "no trainable parameters",
    ),
    "a stranger": (
        lambda m, d: measure(m, nn.MSELoss(), d, params=[nn.Parameter(torch.ones(2))]),
        ValueError,
        r"tensors of shapes \[\(2,\)\] are not parameters of model",
    ),
    "one tensor": (
        lambda m, d: measure(m, nn.MSELoss(), d, params=m[0].weight),
        TypeError,
        "params is a single tensor",
    ),
    "half precision": (
        lambda m, d: measure(m.half(), nn.MSELoss(), (d[0].half(), d[1].half())),
        TypeError,
        r"'0\.weight' has dtype torch.float16",
    ),
    "two dtypes": (
        lambda m, d: (m[2].float(), measure(m, nn.MSELoss(), d)),
        ValueError,
        r"'2\.weight' is torch.float32",
    ),
    "two devices": (
        lambda m, d: (m[2].to("meta"), measure(m, nn.MSELoss(), d)),
        ValueError,
        r"'2\.weight' is torch.float64 on meta",
    ),
    "batch above n": (
        lambda m, d: measure(m, nn.MSELoss(), d, lr=0.1, batch_size=8),
        ValueError,
        "batch_size=8 is above dataset_size=7",
    ),
    "rate of zero": (lambda m, d: measure(m, nn.MSELoss(), d, lr=0.0), ValueError, "lr=0.0"),
    "two rules": (
        lambda m, d: measure(m, nn.MSELoss(), d, lr=0.1, update_rule=UpdateRule(0.1)),
        ValueError,
        "at most one",
    ),
    "unknown quantity": (
        lambda m, d: measure(m, nn.MSELoss(), d, quantities=("flatness",)),
        ValueError,
        r"quantities=\('flatness',\)",
    ),
    "a string": (
        lambda m, d: measure(m, nn.MSELoss(), d, quantities="sharpness"),
        ValueError,
        "expected a sequence",
    ),
    "theorem1 with momentum": (
        lambda m, d: measure(
            m,
            nn.MSELoss(),
            d,
            update_rule=UpdateRule(0.1, momentum=0.9),
            batch_size=1,
            quantities=("theorem1",),
        ),
        ValueError,
        "momentum is 0.9",
    ),
    "theorem1 without a batch": (
        lambda m, d: measure(m, nn.MSELoss(), d, lr=0.1, quantities=("theorem1",)),
        ValueError,
        "needs a learning rate and a batch size",
    ),
    "chunks of nothing": (
        lambda m, d: measure(m, nn.MSELoss(), d, chunk_size=0),
        ValueError,
        "chunk_size=0",
    ),
    "coupled samples": (
        lambda m, d: measure(
            nn.Sequential(m, nn.BatchNorm1d(3, track_running_stats=False).double()),
            nn.MSELoss(),
            d,
        ),
        ValueError,
        r"module '1' \(BatchNorm1d\) normalises by batch statistics",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_input_is_named_and_nothing_is_changed(case: str) -> None:
    """Catches an error that does not name what is wrong, and a model left in eval mode by it."""
    function, kind, message = CALLS[case]
    model, data = small_network(), small_data()
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        function(model, data)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_excess_is_not_hidden_by_the_flat_directions() -> None:
    """Catches a tolerance relative to 1: with more parameters than samples nearly all of a random
    vector lies where condition (8) has the eigenvalue 1, and 1.02 would pass for stable.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    x = torch.randn(20, 10, dtype=torch.float64)
    y = model(x).detach()  # a minimum that every sample shares
    hessians = dense_hessians(model, nn.MSELoss(), x, y)
    h, sigma = hessians.mean(0), covariance(hessians)
    eye = torch.eye(len(h), dtype=torch.float64)

    def left_side(lr: float) -> float:
        contraction = eye - lr * h
        return largest(contraction @ contraction + lr**2 * noise_factor(2, 20) * sigma)

    lr = brentq(lambda lr: left_side(lr) - 1.02, 0.01 / largest(h), 2 / largest(h), rtol=1e-9)
    margins = measure(
        model, nn.MSELoss(), (x, y), lr=lr, batch_size=2, quantities=("theorem1",), tol=0.03
    )
    assert margins.theorem1 == pytest.approx(1.02, abs=1e-3)


def test_theorem1_of_gradient_descent_needs_no_batch_size(network: nn.Module, data: Data) -> None:
    """Catches a request for a batch size where the full batch has no noise, on a partial probe set."""
    optimizer = stableopt.GD(network.parameters(), lr=0.3)
    h = dense_hessians(network, nn.MSELoss(), *data).mean(0)
    monitor = optimizer.track(network, nn.MSELoss(), data, quantities=("theorem1",), tol=1e-8)
    # Steps of more samples than the probe has: warnings are errors.
    monitor._counter.observed.append(100)
    margins = monitor.measure()
    contraction = torch.eye(38, dtype=torch.float64) - 0.3 * h
    assert margins.theorem1 == pytest.approx(largest(contraction @ contraction), rel=1e-6)


def test_the_failure_of_one_quantity_leaves_the_others() -> None:
    """Catches an error of the critical learning rate that takes the sharpness with it."""

    def concave(z: Tensor, y: Tensor) -> Tensor:
        return -(z - y).square().mean()

    model, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
    wanted = {"lr": 0.1, "batch_size": 2, "quantities": ("sharpness", "critical_lr")}
    with pytest.warns(RuntimeWarning, match="critical_lr was not measured: ValueError.*convex"):
        margins = measure(model, concave, (x, y), **wanted)
    assert margins.sharpness is not None
    assert margins.failure is None
    assert list(margins.failures) == ["critical_lr"]
    assert not margins.converged
    assert "convex" in str(margins["critical_lr"].failure)
    assert "sharpness" in margins.record()
    assert "critical_lr" not in margins.record()
    assert StabilityMargins.from_dict(margins.to_dict()).failures == margins.failures
    with pytest.raises(ValueError, match="convex"):
        measure(model, concave, (x, y), **{**wanted, "quantities": ("critical_lr",)})
