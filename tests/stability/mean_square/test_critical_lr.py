"""Critical learning rates of models: closed forms, dense matrices, real steps, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from first_order import half_squares
from oracles import dense_hessians, small_data, small_network
from torch import Tensor, nn

import stableopt
from stableopt import StabilityMargins, UpdateRule, critical_batch_size, critical_lr, measure
from stableopt.curvature import DualCurvature, NonFiniteError, Problem
from stableopt.stability import batch_sharpness, noise_factor
from stableopt.stability.rules.coordinates import in_rule_coordinates

Data = tuple[Tensor, Tensor]


def fitted(model: nn.Module, data: Data) -> Data:
    """Return the data with targets that the model fits: Hessians are Gauss–Newton matrices there."""
    return data[0], model(data[0]).detach()


def linear_problem(rows: Tensor) -> Problem:
    """Return the problem whose samples have the Hessians J_i J_i^T, fitted by the present weights."""
    model = nn.Linear(rows.shape[1], 1, bias=False).double()
    return Problem(model, half_squares, (rows.double(), model(rows.double()).detach()))


def test_models_with_three_gradients_that_the_box_misjudges() -> None:
    """J = (1,1), (1,-1), (1,0) as a linear model: Theorem 1 at 1, the exact threshold at 1.10102.
    Catches a factor of the loss on the way from the model to the Gram matrix.
    """
    critical = critical_lr(linear_problem(torch.tensor([[1.0, 1], [1, -1], [1, 0]])), 1, tol=1e-7)
    assert critical.theorem1 == pytest.approx(1.0, rel=1e-12)
    assert critical.value == pytest.approx(1.10102, abs=1e-5)
    assert critical.hessian_sharpness == pytest.approx(critical.sharpness, rel=1e-4)


def test_a_chain_of_scalars() -> None:
    """(prod w_l) x with half the squared loss: G = sum (theta / w_l)^2, H_i = x_i^2 G in one direction,
    eta* = 2 m2 / (m2^2 + p (m4 - m2^2)) with m_k of x sqrt(G). Catches curvature of a non-linear model
    that is not that of its Jacobian.
    """

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.prod() * x

    x = torch.tensor([[1.0], [2.0], [0.5], [1.5]], dtype=torch.float64)
    problem = Problem(Chain(), half_squares, (x, 1.5 * x))
    g = sum((1.5 / w) ** 2 for w in (0.5, 2.0, 1.5))
    m2, m4 = g * float((x**2).mean()), g**2 * float((x**4).mean())
    dual = DualCurvature.from_problem(problem)
    assert dual.sharpness == pytest.approx(m2, rel=1e-12)
    assert dual.non_uniformity == pytest.approx(math.sqrt(m4 - m2**2), rel=1e-12)
    for batch_size in (1, 3, 4):
        p = noise_factor(batch_size, 4)
        expected = 2 * m2 / (m2**2 + p * (m4 - m2**2))
        assert critical_lr(problem, batch_size).value == pytest.approx(expected, rel=1e-9)


def test_orthogonal_and_diagonal_models() -> None:
    """One-hot inputs: eta* = 2B/k_max. Gains of three outputs: eta* = min_k 2 a_k/(a_k^2 + p s_k^2).
    Catches several outputs counted as several samples.
    """
    k = torch.tensor([1.0, 5.0, 2.0, 0.5])
    for batch_size in (1, 3):
        critical = critical_lr(linear_problem(torch.diag(k.sqrt())), batch_size, tol=1e-7)
        assert critical.value == pytest.approx(2 * batch_size / 5, rel=1e-6)

    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x

    x = torch.tensor([[1.0, 2, 0], [3, 1, 1], [0, 1, 2], [2, 2, 1]], dtype=torch.float64)
    a, s2 = (x**2).mean(0), (x**2).var(0, correction=0)
    for batch_size in (1, 2):
        expected = float((2 * a / (a**2 + noise_factor(batch_size, 4) * s2)).min())
        critical = critical_lr(Problem(Gains(), half_squares, (x, x)), batch_size, tol=1e-7)
        assert critical.value == pytest.approx(expected, rel=1e-6)


def test_groups_are_a_preconditioner(network: nn.Module, data: Data) -> None:
    """Catches groups' rates that do not reach the Gram matrix: eta* of the problem in their
    coordinates must be that of the rows times D.
    """
    scale = [2.0, 0.5, 1.0, 3.0]
    data = fitted(network, data)
    problem = Problem(network, nn.MSELoss(), data)
    x, _ = data
    jacobian = torch.stack(
        [
            torch.stack(
                [
                    torch.cat(
                        [g.reshape(-1) for g in torch.autograd.grad(z, [*network.parameters()])]
                    )
                    for z in (network(x[i : i + 1])[0, c] for c in range(3))
                ]
            )
            for i in range(7)
        ]
    )
    d = torch.cat([torch.full((k,), f) for k, f in zip((15, 5, 15, 3), scale, strict=True)])
    expected = critical_lr(DualCurvature.from_factors((2 / 3) ** 0.5 * jacobian * d), 2)
    critical = critical_lr(problem.transformed(scale=scale), 2)
    assert critical.value == pytest.approx(expected.value, rel=1e-8)
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": f**2} for p, f in zip(network.parameters(), scale, strict=True)],
        lr=1.0,
    )
    margins = measure(
        network, nn.MSELoss(), data, optimizer=optimizer, batch_size=2, quantities=("critical_lr",)
    )
    # The optimizer's largest rate is 9, and D^2 = rates / 9.
    assert margins.critical_lr == pytest.approx(9 * expected.value, rel=1e-6)


def test_weight_decay_of_the_problem_or_the_rule(problem: Problem) -> None:
    """Catches decay counted twice, or in one place only; and decay that would turn the modes."""
    rule = UpdateRule(1.0, weight_decay=0.4)
    expected = critical_lr(problem, 2, update_rule=rule)
    critical = critical_lr(problem.transformed(weight_decay=[0.4] * 4), 2)
    assert critical.value == pytest.approx(expected.value, rel=1e-12)
    # Decay lowers the edge without noise, and may yet raise the rate that noise allows.
    assert expected.full_batch == pytest.approx(2 / (expected.sharpness + 0.4), rel=1e-12)
    halved = problem.transformed(scale=[0.5] * 4, weight_decay=[1.6] * 4)
    assert critical_lr(halved, 7).value == pytest.approx(
        2 / (critical.sharpness / 4 + 0.4), rel=1e-12
    )
    with pytest.raises(ValueError, match=r"from 0 to 0.4 to the curvature"):
        critical_lr(problem.transformed(weight_decay=[0.4, 0.0, 0.4, 0.4]), 2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_leading_directions_bracket_the_exact_rate(
    network: nn.Module, data: Data, momentum: float
) -> None:
    """Catches a restriction that is not a bound: with few directions the value lies above the exact one,
    and the stable rate below it; with all directions they agree.
    """
    problem = Problem(network, nn.MSELoss(), fitted(network, data))
    rule = UpdateRule(1.0, momentum=momentum)
    for batch_size in (1, 3):
        exact = critical_lr(problem, batch_size, update_rule=rule, tol=1e-6)
        restricted = critical_lr(problem, batch_size, update_rule=rule, max_rows=20, directions=3)
        assert exact.exact
        assert not restricted.exact
        assert restricted.theorem1 is None
        # Also with momentum, and eigenvectors that have not converged; 1e-9: rounding.
        assert restricted.lower < exact.value < restricted.value * (1.0 + 1e-9)
        assert restricted.value < 1.5 * exact.value
        full = critical_lr(
            problem, batch_size, update_rule=rule, max_rows=1, directions=38, tol=1e-6
        )
        assert full.value == pytest.approx(exact.value, rel=1e-5)


def test_margins_and_records(network: nn.Module, data: Data) -> None:
    """Catches a quantity that is measured and then lost on its way to sinks and checkpoints."""
    names = ("critical_lr", "batch_sharpness")
    margins = measure(
        network, nn.MSELoss(), data, lr=0.2, batch_size=2, quantities=("sharpness", *names)
    )
    problem = Problem(network, nn.MSELoss(), data)
    expected = critical_lr(problem, 2)
    assert margins.critical_lr == pytest.approx(expected.value, rel=1e-9)
    assert margins.critical_lr_lower == pytest.approx(expected.lower, rel=1e-9)
    assert margins.critical_lr_ratio == pytest.approx(0.2 / expected.value, rel=1e-9)
    assert margins.batch_sharpness == batch_sharpness(problem, 2).value
    record = margins.record()
    assert {*names, "critical_lr_lower", "critical_lr_ratio"} <= record.keys()
    assert StabilityMargins.from_dict(margins.to_dict()) == margins
    assert margins.converged
    assert all(margins.measurements[name].products > 0 for name in names)
    assert all(margins.measurements[name].seconds > 0 for name in names)


def test_the_monitor_measures_them(network: nn.Module, data: Data) -> None:
    """Catches start vectors or limits that these quantities lack."""
    optimizer = stableopt.SGD(network.parameters(), lr=0.05, momentum=0.5)
    names = ("sharpness", "critical_lr", "batch_sharpness")
    x, y = data
    with optimizer.track(network, nn.MSELoss(), data, every=1, quantities=names) as monitor:
        for rows in ([0, 1], [2, 3]):
            optimizer.zero_grad()
            nn.MSELoss()(network(x[rows]), y[rows]).backward()
            optimizer.step()
    assert all(m.failure is None and m.batch_size == 2 for m in monitor.history)
    rule = UpdateRule(lr=1.0, momentum=0.5)
    expected = critical_lr(Problem(network, nn.MSELoss(), data), 2, update_rule=rule)
    assert monitor.margins is not None
    assert monitor.margins.critical_lr == pytest.approx(expected.value, rel=1e-6)
    state = copy.deepcopy(monitor.state_dict())
    monitor.load_state_dict(state)


def test_gradient_descent_needs_no_batch_size(network: nn.Module, data: Data) -> None:
    """Catches noise for an optimizer that has none."""
    descent = stableopt.GD(network.parameters(), lr=0.1)
    data = fitted(network, data)
    margins = measure(network, nn.MSELoss(), data, optimizer=descent, quantities=("critical_lr",))
    dual = DualCurvature.from_problem(Problem(network, nn.MSELoss(), data))
    assert margins.critical_lr == pytest.approx(2 / dual.sharpness, rel=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_batch_sharpness_against_dense_hessians(
    network: nn.Module, data: Data, chunk_size: int | None
) -> None:
    """Catches a mean of ratios, and batches across chunks that weigh them wrongly: over all batches of
    one sample, and for the full batch.
    """
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    problem = Problem(network, nn.MSELoss(), data, chunk_size=chunk_size)
    gradients = torch.stack(
        [
            Problem(network, nn.MSELoss(), (data[0][i : i + 1], data[1][i : i + 1])).gradient()
            for i in range(7)
        ]
    )
    curvatures = torch.einsum("ni,nij,nj->n", gradients, hessians, gradients)
    sharpness = batch_sharpness(problem, 1)
    assert sharpness.value == pytest.approx(
        float(curvatures.sum() / gradients.square().sum()), rel=1e-10
    )
    assert sharpness.batches == 7
    mean, h = gradients.mean(0), hessians.mean(0)
    full = batch_sharpness(problem, 7)
    assert full.value == pytest.approx(float(mean @ h @ mean / (mean @ mean)), rel=1e-10)
    assert (full.batches, full.standard_error) == (1, 0.0)


def test_batch_sharpness_of_pairs_is_near_that_of_all_pairs(network: nn.Module, data: Data) -> None:
    """Catches batches that are not uniform: within five standard errors of the average over all 21
    pairs, and repeatable by the seed, with torch's own generator as it was.
    """
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    problem = Problem(network, nn.MSELoss(), data)
    terms = []
    for i in range(7):
        for j in range(i):
            rows = [i, j]
            g = Problem(network, nn.MSELoss(), (data[0][rows], data[1][rows])).gradient()
            terms.append([float(g @ hessians[rows].mean(0) @ g), float(g @ g)])
    curvatures, squares = torch.tensor(terms, dtype=torch.float64).mean(0)
    state = torch.get_rng_state()
    sharpness = batch_sharpness(problem, 2, num_batches=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert sharpness.value is not None
    assert 0 < sharpness.standard_error < 0.2 * sharpness.value
    assert abs(sharpness.value - float(curvatures / squares)) < 5 * sharpness.standard_error
    assert batch_sharpness(problem, 2, num_batches=100) == sharpness
    assert batch_sharpness(problem, 2, num_batches=100, seed=1) != sharpness


def test_no_gradient_has_no_batch_sharpness() -> None:
    """Catches 0/0 at exact interpolation, and a measurement that fails for it."""
    model = nn.Linear(2, 1).double()
    x = torch.ones(3, 2).double()
    y = model(x).detach()
    assert batch_sharpness(Problem(model, nn.MSELoss(), (x, y)), 1).value is None
    margins = measure(
        model, nn.MSELoss(), (x, y), lr=0.1, batch_size=1, quantities=("batch_sharpness",)
    )
    assert margins.failure is None
    assert margins.batch_sharpness is None


def test_real_steps_stay_below_and_leave_above() -> None:
    """Catches a threshold that holds for matrices and not for training: a tanh network that fits its
    data, nudged, under torch.optim.SGD with single samples.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, _ = small_data(12)
    y = model(x).detach()
    # Single runs escape at higher rates than the mean square, with momentum at much higher ones.
    for momentum, above in ((0.0, 1.3), (0.9, 2.0)):
        value = critical_lr(
            Problem(model, nn.MSELoss(), (x, y)), 1, update_rule=UpdateRule(1.0, momentum)
        ).value
        for factor, escapes in ((0.9, False), (above, True)):
            walker = copy.deepcopy(model)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in walker.parameters():
                    p += 1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            before = float(nn.MSELoss()(walker(x), y).detach())
            optimizer = torch.optim.SGD(walker.parameters(), lr=factor * value, momentum=momentum)
            escaped = False
            for _ in range(1000):
                row = torch.randint(12, (1,), generator=generator)
                optimizer.zero_grad()
                loss = nn.MSELoss()(walker(x[row]), y[row])
                loss.backward()
                optimizer.step()
                escaped = escaped or float(loss.detach()) > 1e4 * before
                if escaped:
                    break
            assert escaped == escapes, (momentum, factor)


def test_bad_input_is_named(network: nn.Module, data: Data, problem: Problem) -> None:
    """Catches errors that do not name the argument."""
    dual = DualCurvature(torch.eye(4), 4)
    with pytest.raises(ValueError, match="batch_size=5 is above dataset_size=4"):
        critical_lr(dual, 5)
    with pytest.raises(ValueError, match="batch_size=0"):
        critical_lr(dual, 0)
    with pytest.raises(ValueError, match="dataset_size=3: expected at least the 4"):
        critical_lr(dual, 1, dataset_size=3)
    with pytest.raises(ValueError, match="tol=0"):
        critical_lr(dual, 1, tol=0)
    with pytest.raises(ValueError, match="max_rows=0"):
        critical_lr(problem, 1, max_rows=0)
    with pytest.raises(ValueError, match="seed=-1"):
        critical_lr(dual, 1, seed=-1)
    with pytest.raises(ValueError, match=r"lr=-0.1"):
        critical_batch_size(dual, -0.1)
    with pytest.raises(TypeError, match=r"update_rule=0.1"):
        critical_lr(dual, 1, update_rule=0.1)
    with pytest.raises(ValueError, match="maximize=True, but problem has sign=1"):
        critical_lr(problem, 1, update_rule=UpdateRule(1.0, maximize=True))
    with pytest.raises(ValueError, match="several groups"):
        critical_lr(problem, 1, update_rule=UpdateRule(1.0, group_lrs=(1.0, 0.5)))
    with pytest.raises(ValueError, match="num_batches=0"):
        batch_sharpness(problem, 1, num_batches=0)
    with pytest.raises(ValueError, match="batch_size=8 is above the 7 samples"):
        batch_sharpness(problem, 8)
    for name in ("critical_lr", "batch_sharpness"):
        with pytest.raises(ValueError, match=rf"{name} needs"):
            measure(network, nn.MSELoss(), data, lr=0.1, quantities=(name,))


def test_curvature_that_is_not_there_or_not_finite(data: Data) -> None:
    """Catches a division by zero where no sample curves, and a NaN that passes for a threshold."""
    flat = DualCurvature(torch.zeros(3, 3), 3)
    assert critical_lr(flat, 1).value == math.inf
    assert critical_batch_size(flat, 1e9) == 1
    decayed = critical_lr(flat, 1, update_rule=UpdateRule(1.0, weight_decay=0.5))
    assert decayed.value == 4.0
    network = small_network()
    with torch.no_grad():
        network[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        critical_lr(Problem(network, nn.MSELoss(), data), 1)
    margins = measure(
        network, nn.MSELoss(), data, lr=0.1, batch_size=1, quantities=("critical_lr",)
    )
    assert margins.failure is not None


def test_a_search_that_was_cut_short_says_so() -> None:
    """Catches a value reported as exact after two products; it and the lower end are still bounds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 2, 9, generator=generator, dtype=torch.float64)
    dual = DualCurvature.from_factors(rows)
    exact = critical_lr(dual, 1, tol=1e-7)
    short = critical_lr(dual, 1, max_iter=2)
    assert not short.converged
    assert short.lower <= exact.value <= short.value
    assert short.products == 2


def test_a_model_stands_for_its_problem(network: nn.Module, data: Data) -> None:
    """Catches arguments in another order than `measure` has, and a rule's coordinates left out."""
    loss_fn = nn.MSELoss()
    problem = Problem(network, loss_fn, data)
    expected = critical_lr(problem, 2)
    assert critical_lr(network, loss_fn, data, 2) == expected
    assert critical_lr(network, loss_fn, data, batch_size=2) == expected
    assert critical_lr(problem, batch_size=2) == expected
    assert critical_lr(network, loss_fn, data).value == pytest.approx(expected.full_batch)
    lr = 0.9 * expected.full_batch
    assert critical_batch_size(network, loss_fn, data, lr) == critical_batch_size(problem, lr)
    with pytest.raises(ValueError, match="lr=None"):
        critical_batch_size(network, loss_fn, data)
    with pytest.raises(ValueError, match="loss_fn and data: expected both"):
        critical_lr(network, loss_fn, batch_size=2)
    with pytest.raises(ValueError, match="leave them out"):
        critical_lr(problem, loss_fn, data, 2)
    with pytest.raises(ValueError, match="leave them out"):
        critical_lr(DualCurvature.from_problem(problem), loss_fn, data, 2)

    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    loss_fn(network(data[0]), data[1]).backward()
    adam.step()
    rule = UpdateRule.from_optimizer(adam)
    preconditioned = in_rule_coordinates(Problem(network, loss_fn, data), rule, [adam])
    critical = critical_lr(network, loss_fn, data, 2, update_rule=rule)
    assert critical == critical_lr(preconditioned, 2, update_rule=rule)
