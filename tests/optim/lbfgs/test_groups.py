"""Parameter groups of ``stableopt.LBFGS``, and the options that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lbfgs_runs import DIRECTIONS, SEARCHES, X, Y, closure_of, flat, network
from torch import Tensor, nn

import stableopt


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_equal_groups_are_one(direction: str, line_search_fn: str | None) -> None:
    """Catches a separate line search for each group, or a group left out; the oracle is one group."""

    def run(split: bool) -> Tensor:
        model: Any = network()
        params: Any = list(model.parameters())
        if split:
            params = [{"params": params[:1]}, {"params": []}, {"params": params[1:]}]
        optimizer = stableopt.LBFGS(
            params, direction=direction, line_search_fn=line_search_fn, lr=0.5
        )
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
        return flat(model)

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_group_has_its_rate(direction: str) -> None:
    """Catches rates that are ignored or applied twice; two directions are known in closed form."""
    p, q = (nn.Parameter(torch.tensor([1.0], dtype=torch.float64)) for _ in range(2))
    optimizer = stableopt.LBFGS(
        [{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.4}],
        max_iter=1,
        direction=direction,
    )
    scale = torch.tensor([3.0, 5.0], dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (scale * torch.cat([p, q]).square()).sum() / 2
        loss.backward()
        return loss

    rates = torch.tensor([0.1, 0.4], dtype=torch.float64)
    before, gradient = torch.ones(2, dtype=torch.float64), scale
    optimizer.step(closure)
    first = torch.cat([p, q]).detach()
    # The first step has length lr / |g|_1 at most.
    torch.testing.assert_close(first, before - rates * gradient / 8)
    optimizer.step(closure)
    second = torch.cat([p, q]).detach()
    P = optimizer.inverse_hessian_matvec(torch.eye(2, dtype=torch.float64))
    root = torch.diag(rates.sqrt())
    torch.testing.assert_close(second, first - root @ P @ root @ (scale * first))


def test_rate_zero_freezes_a_group() -> None:
    """Catches NaN in pairs or quotients where a step is zero, and a search along a zero direction."""
    model: Any = network()
    optimizer = stableopt.LBFGS(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}],
        line_search_fn="strong_wolfe",
    )
    frozen = model[0].weight.detach().clone()
    closure = closure_of(model, optimizer)
    before = float(closure())
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, frozen)
    assert float(closure()) < before
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    resting = flat(model)
    optimizer.step(closure)
    assert torch.equal(flat(model), resting)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_weight_decay_and_maximize_are_those_of_the_loss(
    direction: str, line_search_fn: str | None
) -> None:
    """Catches decay in the gradient but not in the loss, where a line search fails, and wrong signs."""

    def run(inside: bool) -> Tensor:
        model = network()
        extra = {} if inside else {"weight_decay": 0.1, "maximize": True}
        optimizer = stableopt.LBFGS(
            model.parameters(),
            line_search_fn=line_search_fn,
            direction=direction,
            max_iter=6,
            lr=0.5,
            **extra,
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X), Y)
            decay = 0.05 * sum(p.square().sum() for p in model.parameters())
            loss = loss + decay if inside else -loss
            loss.backward()
            return loss

        optimizer.step(closure)
        return flat(model)

    # Six iterations from gradients that differ by rounding.
    torch.testing.assert_close(run(True), run(False), rtol=1e-11, atol=1e-11)


def test_decay_of_one_group() -> None:
    """Catches a decay taken from the first group for all."""
    p, q = (nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = stableopt.LBFGS(
        [{"params": [p], "weight_decay": 3.0}, {"params": [q]}],
        line_search_fn="strong_wolfe",
        max_iter=50,
        tolerance_change=0,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((p - 1).square() + (q - 1).square()).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    # (p - 1) + 3 p = 0; gradients end below 1e-7.
    assert (p.item(), q.item()) == (pytest.approx(0.25, abs=1e-6), pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": torch.ones(2)}, "2 elements"),
        ({"max_iter": 1.5}, "max_iter=1.5"),
        ({"max_eval": -1}, "max_eval=-1"),
        ({"history_size": 0}, "history_size=0"),
        ({"line_search_fn": "armijo"}, "line_search_fn='armijo'"),
        ({"direction": "dense"}, "direction='dense'"),
        ({"damping": 1.0}, r"damping=1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"tolerance_grad": float("nan")}, "tolerance_grad=nan"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    """Catches values that torch accepts and that fail in the middle of training."""
    with pytest.raises(ValueError, match=says):
        stableopt.LBFGS([nn.Parameter(torch.ones(1))], **options)


def test_groups_differ_in_rates_and_decays_only() -> None:
    """Catches an option of a second group that is silently the first one's."""
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="history_size 100 and 5"):
        stableopt.LBFGS([{"params": [p]}, {"params": [q], "history_size": 5}])
    optimizer = stableopt.LBFGS([p])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [q], "lr": -1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q], "lr": 0.1})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_added_later(direction: str) -> None:
    """Catches pairs of the old length in products with gradients of the new one."""
    model: Any = network()
    optimizer = stableopt.LBFGS(
        model[0].parameters(), direction=direction, line_search_fn="strong_wolfe", max_iter=5
    )
    losses: list[float] = []
    closure = closure_of(model, optimizer, losses)
    optimizer.step(closure)
    frozen = float(closure())
    optimizer.add_param_group({"params": model[2].parameters()})
    for _ in range(5):
        optimizer.step(closure)
    assert losses[-1] < frozen / 2
    assert optimizer.inverse_hessian_matvec(torch.ones(37, dtype=torch.float64)).shape == (37,)
