"""L-BFGS where losses or gradients are not finite, and where the closure raises."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from lbfgs_single_runs import DIRECTIONS, SEARCHES, closure_of, flat, network, repeat
from torch import Tensor, nn

import stableopt


@pytest.fixture
def unheard() -> Iterator[None]:
    """Ignore warnings, which other tests check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BAD: dict[str, tuple[float | None, float]] = {
    "nan_loss": (math.nan, 1.0),
    "minus_inf_loss": (-math.inf, 1.0),
    "nan_gradient": (None, math.nan),
    "huge_gradient": (None, 3e37),
}
"""The loss instead of the true one, and a factor of one entry of the gradient."""


class Valley:
    """A narrow valley whose calls, from one on or that one alone, go wrong."""

    def __init__(self, strikes: Callable[[int], bool], bad: str) -> None:
        self.x = nn.Parameter(torch.tensor([3.0, -2.0]))
        self.strikes, self.bad, self.calls = strikes, BAD[bad], 0

    def value(self) -> float:
        return float(self.x[0].detach() ** 2 + 10 * self.x[1].detach() ** 2)

    def closure(self) -> Tensor:
        self.calls += 1
        x = self.x.detach()
        assert bool(torch.isfinite(x).all()), self.calls
        self.x.grad = torch.stack([2 * x[0], 20 * x[1]])
        if not self.strikes(self.calls):
            return torch.tensor(self.value())
        self.x.grad[1] *= self.bad[1]
        return torch.tensor(self.value() if self.bad[0] is None else self.bad[0])


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("max_iter", [1, 5])
def test_parameters_stay_finite_whenever_it_strikes(
    bad: str, direction: str, line_search_fn: str | None, max_iter: int
) -> None:
    """Catches non-finite parameters, whichever call goes wrong, and an optimizer that is stuck then."""
    for first, lasting in itertools.product(range(1, 8), (False, True)):
        strikes = (lambda n, first=first: n >= first) if lasting else first.__eq__
        valley = Valley(strikes, bad)
        optimizer = stableopt.LBFGS(
            [valley.x],
            lr=0.5,
            max_iter=max_iter,
            direction=direction,
            line_search_fn=line_search_fn,
        )
        for _ in range(3 if lasting else 25 // max_iter):
            optimizer.step(valley.closure)
            assert bool(torch.isfinite(valley.x).all()), (first, lasting)
        # From 49: a single strike is overcome, and a lasting one does not lose the progress before it.
        assert valley.value() < (60 if lasting else 1), (first, lasting)


@pytest.mark.usefixtures("unheard")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("start", [1e-3, 30.0])
def test_steps_over_the_edge_come_back(
    direction: str, line_search_fn: str | None, start: float
) -> None:
    """Catches a search that extends its step, or gives up, beyond a logarithmic barrier."""
    x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], lr=1, max_iter=100, direction=direction, line_search_fn=line_search_fn
    )
    finite = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - 5 * x.log()).sum()  # NaN for x < 0; the minimum is at 5
        loss.backward()
        finite.append(math.isfinite(loss.item()))
        return loss

    for _ in range(5):
        optimizer.step(closure)
    # Steps end where the loss changes by less than 1e-9: within sqrt(2e-9 * 5) of the minimum.
    assert x.item() == pytest.approx(5, abs=2e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_search_across_the_edge(direction: str) -> None:
    """Catches a first trial that is not finite taken for a low one: it must be the high end."""
    x = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], lr=1e6, max_iter=1, max_eval=20, direction=direction, line_search_fn="strong_wolfe"
    )
    values = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x.square() + (100 - x).sqrt() * 0).sum() - 2 * x.sum()
        loss.backward()
        values.append((x.item(), math.isfinite(loss.item())))
        return loss

    optimizer.step(closure)
    assert not values[1][1]
    assert 0.5 < x.item() < 1.5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_straight_line_is_followed_not_lost(direction: str) -> None:
    """Catches a division by zero in the cubic through a line: floats raise where tensors give inf."""
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], line_search_fn="strong_wolfe", max_iter=2, direction="two_loop"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -x.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert bool((x > 1).all())
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("max_iter", [1, 3])
def test_saturated_loss_does_not_hide_an_overflow(max_iter: int) -> None:
    """Catches parameters that grow tenfold a trial while the half-precision loss is saturated."""
    x = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float16))
    optimizer = stableopt.LBFGS(
        [x], lr=1e3, max_iter=max_iter, line_search_fn=None, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        x.grad = torch.full_like(x, -8.0)
        return torch.tensor(1.0)

    with pytest.warns(RuntimeWarning, match="not finite"):
        repeat(12, lambda: optimizer.step(closure))
    assert bool(torch.isfinite(x).all())
    assert bool((x > 10_000).all())  # and it went as far as it could


def test_first_loss_that_is_not_finite_warns_once() -> None:
    """Catches no warning, a warning at every step, and a step along a non-finite gradient."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters())
    before = flat(model)
    with pytest.warns(RuntimeWarning, match=r"not finite.*strong_wolfe") as caught:
        losses = repeat(3, lambda: optimizer.step(lambda: torch.tensor(math.nan)))
    assert all(map(math.isnan, losses))
    assert len(caught) == 1
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_closure_that_raises(direction: str, line_search_fn: str | None) -> None:
    """Catches parameters left at a trial point, and a pair remembered twice when training goes on."""
    model = network()
    optimizer = stableopt.LBFGS(
        model.parameters(), direction=direction, line_search_fn=line_search_fn, lr=0.5
    )
    plain, calls = closure_of(model, optimizer), 0
    optimizer.step(plain)
    before = flat(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)
    kept = len(next(iter(optimizer.state_dict()["state"].values()))["old_dirs"])
    calls = 2
    loss = optimizer.step(closure)
    after = plain()
    assert after < loss
    assert kept < len(next(iter(optimizer.state_dict()["state"].values()))["old_dirs"])
