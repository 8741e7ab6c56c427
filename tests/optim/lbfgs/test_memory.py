"""The pairs in memory: their scale, and their damping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt.optim.lbfgs.compact import CompactPairs
from stableopt.optim.lbfgs.memory import Move
from stableopt.optim.lbfgs.two_loop import TwoLoopPairs


def test_pairs_do_not_depend_on_the_scale_of_the_loss() -> None:
    """Catches an absolute threshold: at a scale of 1e-12 torch keeps no pair."""
    kept = {}
    for scale in (1.0, 2.0**-40):
        for kind in (stableopt.LBFGS, torch.optim.LBFGS):
            x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
            optimizer = kind([x], max_iter=5, tolerance_grad=0, tolerance_change=0)

            def closure(x: Tensor = x, scale: float = scale, o: Any = optimizer) -> Tensor:
                o.zero_grad()
                loss = scale * (x[0] ** 2 + 10 * x[1] ** 2 + x[0] * x[1])
                loss.backward()
                return loss.detach()

            for _ in range(2):
                optimizer.step(closure)
            (state,) = optimizer.state_dict()["state"].values()
            kept[kind, scale] = len(state["old_dirs"])
    assert kept[torch.optim.LBFGS, 1.0] > 3
    assert kept[torch.optim.LBFGS, 2.0**-40] == 0
    assert kept[stableopt.LBFGS, 1.0] > 3
    assert kept[stableopt.LBFGS, 2.0**-40] > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_pairs_whose_products_underflow_are_left_out(dtype: torch.dtype) -> None:
    """Catches a division by zero, and a scale of the initial matrix made of rounding errors."""
    memory, zero = CompactPairs(5, {}), torch.zeros(2, dtype=dtype)
    root = torch.finfo(dtype).tiny ** 0.5

    def pairs_after(y: float, s: float) -> tuple[int, float]:
        last = Move(torch.tensor([s, 0.0], dtype=dtype), 1.0, gradient=zero, loss=0.0)
        gradient = torch.tensor([y, 0.0], dtype=dtype)
        memory.update(last, gradient, memory.numbers(*memory.products(last, gradient)), 0.0)
        state = memory.export()
        return len(state["old_dirs"]), float(state["H_diag"])

    assert pairs_after(4.0, 2.0) == (1, 0.5)
    assert pairs_after(root / 64, 1.0) == (1, 0.5)  # y @ y has lost its digits
    assert pairs_after(1e-3 * root, 1e-3) == (1, 0.5)  # y @ y is zero, or next to it
    assert pairs_after(1.0, 0.5 * torch.finfo(dtype).tiny) == (1, 0.5)  # and here y @ s
    assert pairs_after(16 * root, 4.0) == (2, pytest.approx(1 / (4 * root), rel=1e-3))


def test_training_goes_on_below_the_smallest_numbers() -> None:
    """Catches a division by zero where the loss falls without end, and pairs made of rounding errors.

    The data are separable: the infimum of the loss is 0, which torch, whose pairs end at a curvature
    of 1e-10, comes no nearer than 1e-12.
    """
    torch.manual_seed(0)
    features = torch.randn(60, 10)
    sign = (features @ torch.randn(10)).sign()
    losses = {}
    for kind in (torch.optim.LBFGS, stableopt.LBFGS):
        weight = nn.Parameter(torch.zeros(10))
        optimizer = kind([weight], lr=0.5, tolerance_grad=0, tolerance_change=0)

        def closure(weight: Tensor = weight, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.softplus(-sign * (features @ weight)).mean()
            loss.backward()
            return loss

        for _ in range(60):
            losses[kind] = optimizer.step(closure).item()
        assert bool((sign * (features @ weight) > 0).all())
    assert 0 <= losses[stableopt.LBFGS] < 1e-6 * losses[torch.optim.LBFGS]
    (state,) = optimizer.state_dict()["state"].values()
    for y, s in zip(state["old_dirs"], state["old_stps"], strict=True):
        assert float(y @ s) >= 0.9 * torch.finfo(torch.float32).tiny  # the sums may differ in order
        assert float(y @ y) >= 0.9 * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("seed", range(3))
def test_least_squares_in_float16_is_solved(line_search_fn: str | None, seed: int) -> None:
    """Catches squares that underflow below 2e-4; torch ends in NaN, or in an error."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, 4, generator=generator).half()
    solution = torch.randn(4, generator=generator).half()
    target = features @ solution
    weight = nn.Parameter(torch.zeros(4).half())
    optimizer = stableopt.LBFGS(
        [weight], lr=0.5, line_search_fn=line_search_fn, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (features @ weight - target).square().mean() / 2
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    # Two units in the last place of numbers up to 2, as the residuals are rounded as well.
    torch.testing.assert_close(weight.detach(), solution, rtol=0, atol=2 * 2.0**-10)


@pytest.mark.parametrize("kind", [CompactPairs, TwoLoopPairs])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_damping_bends_pairs_of_negative_curvature(kind: Any, damping: float) -> None:
    """Catches pairs dropped with damping, or kept without it, and pairs of too little curvature."""
    memory = kind(5, {})
    zero = torch.zeros(3, dtype=torch.float64)

    def move(y: list[float], direction: list[float], t: float) -> None:
        last = Move(torch.tensor(direction).double(), t, gradient=zero, loss=0.0)
        gradient = torch.tensor(y).double()
        memory.update(last, gradient, memory.numbers(*memory.products(last, gradient)), damping)

    # Nothing is known of the scale yet: even a damped memory can only drop it.
    move([-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], 1.0)
    assert memory.export()["old_dirs"] == []
    move([4.0, 0.0, 0.0], [1.0, 0.0, 0.0], 2.0)
    assert float(memory.export()["H_diag"]) == 0.5
    # s = (0, 1, 2): sigma = 5 / 0.5 = 10, and y s = -4 < 0.2 sigma = 2.
    move([7.0, 4.0, -4.0], [0.0, 0.5, 1.0], 2.0)
    state = memory.export()
    if not damping:
        assert len(state["old_dirs"]) == 1
        return
    theta = 0.8 * 10 / (10 + 4)
    expected = theta * torch.tensor([7.0, 4.0, -4.0]) + (1 - theta) * torch.tensor([0.0, 2.0, 4.0])
    torch.testing.assert_close(state["old_dirs"][-1], expected.double())
    assert float(1 / state["ro"][-1]) == pytest.approx(2.0)
    assert float(state["H_diag"]) == pytest.approx(2 / float(expected.square().sum()), rel=1e-6)
    # Enough curvature is left alone.
    move([0.0, 0.0, 3.0], [0.0, 0.0, 1.0], 1.0)
    assert memory.export()["old_dirs"][-1].tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_products_do_not_overflow_in_float16(line_search_fn: str | None) -> None:
    """Catches slopes and curvatures summed in float16: they overflow from a gradient norm of 256 on.

    Then the parameters would never move.
    """
    curvatures = torch.arange(1, 11).half() ** 2  # the gradient's square is 101,332, above 65,504
    weight = nn.Parameter(torch.ones(10).half())
    optimizer = stableopt.LBFGS(
        [weight], lr=1 if line_search_fn else 0.1, max_iter=100, line_search_fn=line_search_fn
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (curvatures * weight * weight).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert closure().item() < 1e-3 * first
