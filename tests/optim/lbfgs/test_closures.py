"""Losses with noise, and closures that return no loss, or one of another type."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lbfgs_single_runs import X, Y, closure_of, flat, network, repeat
from torch import Tensor, nn

import stableopt
from stableopt.optim.lbfgs.iterations import SAME_LOSS


def test_noise_at_one_point_warns_once() -> None:
    """Catches a warning where parameters were changed by hand, and one that costs extra calls."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=3)
    plain, noise, calls = closure_of(model, optimizer), 0.0, 0

    def closure() -> Tensor:
        nonlocal calls, noise
        calls += 1
        noise *= 1.01
        return plain() + noise

    for _ in range(3):
        optimizer.step(closure)  # warnings are errors here
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
    optimizer.step(closure)
    noise = 0.01
    with pytest.warns(RuntimeWarning, match=r"different losses.*strong_wolfe") as caught:
        repeat(4, lambda: optimizer.step(closure))
    assert len(caught) == 1
    assert calls == next(iter(optimizer.state.values()))["func_evals"]


def test_an_end_that_was_not_evaluated_gives_no_warning_of_noise() -> None:
    """Catches a comparison of losses at two points, after fixed steps of one iteration.

    Each step has other data, so that any comparison with a loss of the step before would warn.
    """
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), max_iter=1, lr=0.1)
    losses = []
    for index in range(6):
        rows = slice(2 * index, 2 * index + 2)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
            loss.backward()
            return loss

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append(float(optimizer.step(closure).detach()))
        assert caught == []
    # The precondition: the losses differ by more than parallel sums explain.
    assert all(abs(a / b - 1) > SAME_LOSS for a, b in pairwise(losses))
    assert next(iter(optimizer.state.values()))["func_evals"] == 6


def test_without_a_closure() -> None:
    """Catches torch's error, which names an argument but no remedy."""
    optimizer = stableopt.LBFGS(network().parameters())
    for step in (optimizer.step, lambda: optimizer.step(None), lambda: optimizer.step(3.0)):
        with pytest.raises(TypeError, match=r"closure=.*calls it several times"):
            step()


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (None, TypeError, "returned None"),
        (torch.ones(3), ValueError, r"shape \(3,\)"),
    ],
    ids=["none", "vector"],
)
def test_closures_that_return_no_loss(returned: Any, error: type[Exception], says: str) -> None:
    """Catches a failure far from its cause."""
    optimizer = stableopt.LBFGS(network().parameters())
    with pytest.raises(error, match=says):
        optimizer.step(lambda: returned)


@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor([x]), lambda x: torch.tensor(x)])
def test_losses_of_other_types(kind: Callable[[float], Any]) -> None:
    """Catches a loss that must be a 0-dimensional tensor; torch takes numbers as well."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    plain = closure_of(model, optimizer)
    first = optimizer.step(lambda: kind(plain().item()))
    assert plain().item() < float(first)


@pytest.mark.parametrize("unscaled", [False, True])
def test_gradient_scaler(unscaled: bool) -> None:
    """Catches scaled gradients in the pairs, and an error about inf checks instead of the reason."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plain = closure_of(model, optimizer)
    scaler.scale(nn.functional.mse_loss(model(X), Y)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"GradScaler.*bfloat16"):
        scaler.step(optimizer, plain)
    assert torch.equal(flat(model), before)
    optimizer.step(plain)  # without it, all is well again
    switched_off = torch.amp.GradScaler("cpu", enabled=False)
    switched_off.step(optimizer, plain)
    assert plain() < 2


def test_nothing_to_train() -> None:
    """Catches an index error where every group is empty; SGD then does nothing."""
    optimizer = stableopt.LBFGS([{"params": []}])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
    assert optimizer.inverse_hessian_matvec(torch.ones(0)).shape == (0,)
    optimizer = stableopt.LBFGS([nn.Parameter(torch.ones(0))])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3.0
