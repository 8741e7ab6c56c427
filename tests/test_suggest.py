"""Suggested learning rates: closed forms, the thresholds they are made of, and training itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import dense_hessians, small_data, small_network
from torch import Tensor, nn

import stableopt
from stableopt.stability import DiagonalPreconditioner, UpdateRule

MSE = nn.MSELoss()


def scalars() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return f_i = x_i^2 w^2: H_i = 2 and 8, a = 5, s = 3."""
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    return model, (x, torch.zeros(2, 1, dtype=torch.float64))


def test_closed_forms_in_one_dimension() -> None:
    """Catches a column of the wrong rule, and noise of the wrong batch size."""
    found = stableopt.suggest(*_with_loss(*scalars()), batch_sizes=(1, 2))
    assert found.answer("SGD", 1).lr == pytest.approx(2 * 5 / (25 + 9), rel=1e-4)
    assert found.answer("SGD", 2).lr == pytest.approx(2 / 5, rel=1e-4)
    assert found.answer("SGD, momentum 0.9", 2).lr == pytest.approx(2 * 1.9 / 5, rel=1e-4)
    # AdamW at the full batch divides by |g| = 5 w: 38 |g| / a.
    assert found.answer("AdamW", 2).lr == pytest.approx(38 * 2.5 / 5, rel=1e-4)
    # At B = 1 the second moment is the mean of (2 w)^2 = 1 and (8 w)^2 = 16, so P = 8.5^(-1/2).
    half = 8.5**-0.5
    rule = UpdateRule(lr=1.0, momentum=0.9, dampening=0.9)
    # The largest lr at which (P a, P s) is in the region of one dimension, by bisection.
    low, high = 0.0, 38 / (5 * half)
    for _ in range(60):
        middle = (low + high) / 2
        at = UpdateRule(lr=middle, momentum=rule.momentum, dampening=rule.dampening)
        inside = at.max_non_uniformity(1, 2, sharpness=5 * half) >= 3 * half
        low, high = (middle, high) if inside else (low, middle)
    assert found.answer("AdamW", 1).lr == pytest.approx(low, rel=1e-4)
    assert all(row.exact for row in found.rows)


def test_parameters_without_gradient_are_named() -> None:
    """Catches a bound 70 times too low, without a word, before a last layer of zeros."""
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    nn.init.zeros_(model[2].weight)
    data = x, torch.tanh(x[:, :2])
    found = stableopt.suggest(model, MSE, data, batch_sizes=(4,))
    assert any("0.weight, 0.bias have no gradient here" in note for note in found.notes)
    nn.init.normal_(model[2].weight)
    found = stableopt.suggest(model, MSE, data, batch_sizes=(4,))
    assert not any("have no gradient" in note for note in found.notes)


def test_unused_parameters_are_not_named() -> None:
    """Catches a note on parameters that the loss does not depend on: they bound no rate."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    torch.manual_seed(0)
    x = torch.randn(16, 4)
    found = stableopt.suggest(Partly(), MSE, (x, torch.tanh(x[:, :2])), batch_sizes=(4,))
    assert not any("have no gradient" in note for note in found.notes)


def test_a_rate_of_zero_hides_only_its_own_step() -> None:
    """Catches SGD's rate of one step lost because that of the running optimizer is 0."""
    model, data = small_network(), small_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    MSE(model(data[0]), data[1]).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    found = stableopt.suggest(model, MSE, data, batch_sizes=(2,), optimizer=optimizer)
    assert list(found.one_step) == ["SGD"]
    assert any("of AdamW: optimizer: its learning rate is 0 now" in note for note in found.notes)
    with pytest.raises(ValueError, match="its learning rate is 0 now"):
        stableopt.suggest(model, MSE, data, curvature=False, optimizer=optimizer)


def _with_loss(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    return model, MSE, data


def test_it_agrees_with_what_it_is_made_of() -> None:
    """Catches curvature measured once and used for the wrong rule, on a network that fits its data,
    where Hessian and Gauss–Newton matrix are one.
    """
    model, (x, _) = small_network(), small_data()
    data = (x, model(x).detach())
    found = stableopt.suggest(model, MSE, data, batch_sizes=(1, 3, 7))
    problem = stableopt.Problem(model, MSE, data)
    for name, rule in (
        ("SGD", UpdateRule(lr=1.0)),
        ("SGD, momentum 0.9", UpdateRule(lr=1.0, momentum=0.9)),
    ):
        for batch_size in (1, 3, 7):
            known = stableopt.critical_lr(problem, batch_size, update_rule=rule).value
            # 1e-2: the search's tolerance, and the Hessian's sharpness, measured to a percent.
            assert found.answer(name, batch_size).lr == pytest.approx(known, rel=1e-2)
    rates = [found.answer("SGD", b).lr for b in (1, 3, 7)]
    assert rates == sorted(rates)


def test_a_running_adam_brings_its_second_moments() -> None:
    """Catches a preconditioner of this point's where the optimizer's own is known."""
    model, data = small_network(), small_data()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))
    for _ in range(5):
        adam.zero_grad()
        MSE(model(data[0]), data[1]).backward()
        adam.step()
    found = stableopt.suggest(model, MSE, data, batch_sizes=(7,), optimizer=adam)
    P = UpdateRule.from_optimizer(adam).preconditioner
    assert isinstance(P, DiagonalPreconditioner)
    hessian = dense_hessians(model, MSE, *data).mean(0)
    product = torch.stack([P @ column for column in hessian.T], dim=1)
    top = float(torch.linalg.eigvals(product).real.max())
    gauss_newton = found.answer("AdamW", 7).lr
    # No more than the Hessian's edge, and below it only where Gauss–Newton's is lower.
    assert gauss_newton <= 2 * 1.8 / (0.2 * top) * 1.01
    assert gauss_newton > 0.3 * 2 * 1.8 / (0.2 * top)
    fresh = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="has taken a step"):
        stableopt.suggest(model, MSE, data, optimizer=fresh)


@pytest.mark.parametrize("curvature", [True, False])
def test_a_running_optimizer_of_more_parameters(curvature: bool) -> None:
    """Catches a refusal: the optimizer may also train the loss's parameters, or another network."""
    start, data = small_network(), small_data()
    rates = []
    for more in ([], [nn.Parameter(torch.ones(2))]):
        model = copy.deepcopy(start)
        adam = torch.optim.AdamW([*model.parameters(), *more], lr=1e-2)
        MSE(model(data[0]), data[1]).backward()
        adam.step()
        found = stableopt.suggest(
            model, MSE, data, batch_sizes=(7,), optimizer=adam, curvature=curvature
        )
        rates.append([*(row.lr for row in found.rows), *found.one_step.values()])
    assert rates[0] == rates[1]


def test_bounds_where_the_threshold_is_out_of_reach() -> None:
    """Catches a bound sold as the threshold: for too many directions, for a loss inside the model."""
    model, (x, _) = small_network(), small_data()
    data = (x, model(x).detach())
    exact = stableopt.suggest(model, MSE, data, batch_sizes=(2,))
    few = stableopt.suggest(model, MSE, data, batch_sizes=(2,), max_rows=1)
    batch = {"x": data[0], "y": data[1]}
    whole = stableopt.Problem.from_batch_loss(
        model, lambda model, batch: MSE(model(batch["x"]), batch["y"]), batch
    )
    opaque = stableopt.suggest(whole, batch_sizes=(2, 7))
    for name in ("SGD", "SGD, momentum 0.9"):
        value = exact.answer(name, 2).lr
        assert not few.answer(name, 2).exact
        lower = few.answer(name, 2).lower
        assert lower is not None
        assert lower <= value * 1.01
        assert few.answer(name, 2).lr >= value * 0.99
        assert not opaque.answer(name, 2).exact
        assert opaque.answer(name, 2).lower is None
        assert opaque.answer(name, 7).exact
    assert any("sharpness alone" in note for note in opaque.notes)
    assert "<= " in str(opaque)


def test_the_table_and_bad_input() -> None:
    """Catches a table without a column, and sizes that no batch can have."""
    model, data = scalars()
    text = str(stableopt.suggest(model, MSE, data))
    for part in ("batch size", "SGD, momentum 0.9", "AdamW", "found in", "double backward"):
        assert part in text
    for sizes in ((0,), (3,), (), (1.5,)):
        with pytest.raises(ValueError, match="batch_sizes"):
            stableopt.suggest(model, MSE, data, batch_sizes=sizes)
    with pytest.raises(KeyError):
        stableopt.suggest(model, MSE, data, batch_sizes=1).answer("SGD", 2)


def test_time_first_data_have_the_rates_of_samples_first() -> None:
    """Catches steps in time taken for samples."""
    torch.manual_seed(0)
    linear = nn.Linear(2, 1).double()
    x, y = torch.randn(5, 3, 2).double(), torch.randn(5, 3, 1).double()
    found, expected = (
        stableopt.suggest(linear, MSE, data, batch_sizes=(1, 3), batch_dim=dim)
        for data, dim in (((x, y), 1), ((x.transpose(0, 1), y.transpose(0, 1)), None))
    )
    assert found.num_samples == 3
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert one.lr == pytest.approx(other.lr, rel=1e-8)  # sums in another order
    with pytest.raises(ValueError, match="a Problem has its own loss_fn, data, batch_dim"):
        stableopt.suggest(stableopt.Problem(linear, MSE, (x, y)), batch_dim=1)


def test_what_it_suggests_is_where_training_turns() -> None:
    """Catches any wrong threshold at the point of use: at 0.97 of it SGD returns from a small push,
    at 1.03 it leaves, in the mean square over runs, on a quadratic whose samples all have their minimum
    at zero.
    """
    model, (x, y) = scalars()
    found = stableopt.suggest(model, MSE, (x, y), batch_sizes=(1,)).answer("SGD", 1).lr
    curvatures = torch.tensor([2.0, 8.0], dtype=torch.float64)
    for factor, grows in ((0.97, False), (1.03, True)):
        growth = float(((1 - factor * found * curvatures) ** 2).mean())
        assert (growth > 1) == grows


def test_the_order_of_the_samples_does_not_matter_for_adam() -> None:
    """Catches a mean gradient of the first samples alone: data may be sorted by class."""
    model, x = nn.Linear(4, 1), torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    data = (x, (x.sum(1, keepdim=True) > 0).float())
    order = data[1].flatten().argsort()
    orders = (torch.randperm(200, generator=torch.Generator().manual_seed(3)), order)
    found = [
        stableopt.suggest(model, MSE, tuple(part[rows] for part in data), batch_sizes=(200,))
        for rows in orders
    ]
    rates = [each.answer("AdamW", 200).lr for each in found]
    assert rates[0] == pytest.approx(
        rates[1], rel=1e-3
    )  # sums in another order, and the solver's tol


def test_nadam_is_not_adam() -> None:
    """Catches NAdam's answer by Adam's formula, eleven times too large: at the full batch it is the
    edge of its own rule, and with noise no more than that, as a bound.
    """
    model, (x, y) = scalars()
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
    rule = UpdateRule.from_optimizer(optimizer)
    P = rule.preconditioner
    assert isinstance(P, DiagonalPreconditioner)
    top = 5.0 * float(P @ torch.ones(1, dtype=torch.float64))
    edge = rule.linear_step.max_lr(top)
    assert rule.linear_step.momentum_share != 1
    found = stableopt.suggest(model, MSE, (x, y), batch_sizes=(1, 2), optimizer=optimizer)
    assert found.answer("NAdam", 2).lr == pytest.approx(edge, rel=1e-6)
    assert found.answer("NAdam", 2).exact
    assert found.answer("NAdam", 1).lr == pytest.approx(edge, rel=1e-6)
    assert not found.answer("NAdam", 1).exact
    assert found.answer("NAdam", 1).lower is None
    assert any("NAdam: bounds of the full batch" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_leading_directions_are_bounds(seed: int) -> None:
    """Catches an upper bound below the threshold with momentum, where eigenvectors have not converged,
    and one far above it where many directions of little curvature decide: with one-hot inputs eta* is
    2B/k_max, and the leading directions have a small share of the noise.
    """
    model, data = nn.Linear(60, 1, bias=False).double(), torch.eye(60, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = data + 0.05 * torch.randn(60, 60, generator=generator, dtype=torch.float64)
    fitted = (x, model(x).detach())
    exact = stableopt.suggest(model, MSE, fitted, batch_sizes=(1, 4))
    few = stableopt.suggest(model, MSE, fitted, batch_sizes=(1, 4), max_rows=1, seed=seed)
    for name in ("SGD", "SGD, momentum 0.9"):
        for batch_size in (1, 4):
            known, bound = exact.answer(name, batch_size), few.answer(name, batch_size)
            assert known.exact
            assert not bound.exact
            assert bound.lower is not None
            # 1e-4: the tolerance of the exact search.
            assert bound.lower <= known.lr * (1 + 1e-4)
            assert known.lr * (1 - 1e-4) <= bound.lr
            assert bound.lr <= 1.5 * known.lr


def test_the_rate_of_one_step_is_that_of_a_scan() -> None:
    """Catches a rate of another direction, or of another optimizer than the one that runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        adam.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        adam.step()
    found = stableopt.suggest(model, nn.MSELoss(), (x, y), optimizer=adam, curvature=False)
    assert (found.rows, found.sharpness) == ((), None)
    start = nn.MSELoss()(model(x), y).item()
    for name, kind in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):

        def after(lr: float, kind: Any = kind) -> float:
            other = copy.deepcopy(model)
            trial = kind(other.parameters(), lr=lr)
            if kind is torch.optim.AdamW:
                trial.load_state_dict(adam.state_dict())
                trial.param_groups[0]["lr"] = lr
            nn.MSELoss()(other(x), y).backward()
            trial.step()
            return nn.MSELoss()(other(x), y).item()

        # The bracket's width, a sixteenth of the rate, is the search's tolerance.
        assert after(found.one_step[name] * 0.93) < start < after(found.one_step[name] * 1.07)


def test_several_optimizers_are_refused() -> None:
    """Catches an error from deep inside: the limits of a joint step have no column in the table."""
    model = nn.Linear(1, 1)
    both = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with pytest.raises(TypeError, match="expected one optimizer"):
        stableopt.suggest(model, nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)), optimizer=both)


def test_a_running_sgd_has_a_name_of_its_own() -> None:
    """Catches an answer for the running optimizer in the place of plain SGD's."""
    model = nn.Linear(1, 1, bias=False)
    data = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)  # curvature 5, with the decay 7
    running = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=2.0)
    found = stableopt.suggest(model, nn.MSELoss(), data, curvature=False, optimizer=running)
    # The bracket's width.
    assert found.one_step == pytest.approx({"SGD": 2 / 5, "SGD, running": 2 / 7}, rel=1 / 16)


def test_models_without_a_second_derivative_have_the_rate_of_one_step() -> None:
    """Catches a second derivative that is needed for what forward passes tell."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.w * x)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).mean()

    # f = w^2: a step along 2 w raises it from a rate of 1 on.
    data = torch.ones(4, 1), torch.zeros(4, 1)
    found = stableopt.suggest(Model(), loss, data, curvature=False)
    assert found.one_step["SGD"] == pytest.approx(1.0, rel=1 / 16)  # the bracket's width
    lines = str(found).splitlines()
    assert lines[1].split() == ["batch", "size", "SGD"]
    assert lines[2].split()[:2] == ["one", "step"]


def test_where_no_step_can_be_taken_the_other_answers_stand() -> None:
    """Catches a minimum, whose gradient is zero, that has no answer at all."""
    model, data = scalars()
    nn.init.zeros_(model.weight)
    found = stableopt.suggest(model, MSE, data, batch_sizes=(1,))
    assert found.one_step == {}
    assert any(note.startswith("no rate of one step of SGD:") for note in found.notes)
    assert found.answer("SGD", 1).exact
    with pytest.raises(ValueError, match="zero"):
        stableopt.suggest(model, MSE, data, curvature=False)


def test_no_stable_rate_is_said_once() -> None:
    """Catches a note for each batch size of AdamW, whose coordinates give each another number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]
    found = stableopt.suggest(model, MSE, (x, 3 * (2 * x).sin()), batch_sizes=(1, 2, 6))
    assert sum("no rate is stable" in note for note in found.notes) == 1
    assert str(found).count("negative curvature") == 1


class Scaled(nn.Module):
    """x w, at w = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


@pytest.mark.parametrize(("negative", "is_saddle"), [(0.008, True), (0.0, False)])
def test_a_batch_loss_with_little_negative_curvature_is_at_a_saddle(
    negative: float, is_saddle: bool
) -> None:
    """Catches a limit for rounding that takes 0.8 % of the sharpness for a minimum, exactly stable."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return (out[:, 0] ** 2 - negative * out[:, 1] ** 2).mean() / 2

    data = torch.ones(4, 2, dtype=torch.float64)
    problem = stableopt.Problem.from_batch_loss(Scaled(), loss, data)
    found = stableopt.suggest(problem, batch_sizes=(4,))
    row = found.answer("SGD", 4)
    assert row.lr == pytest.approx(2.0, rel=1e-4)
    assert (row.exact, row.lower) == ((False, None) if is_saddle else (True, row.lr))
    assert any("negative curvature" in note for note in found.notes) == is_saddle
