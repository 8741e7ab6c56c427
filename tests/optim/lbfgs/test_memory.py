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


@pytest.mark.parametrize("kind", [CompactPairs, TwoLoopPairs])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_damping_bends_pairs_of_negative_curvature(kind: Any, damping: float) -> None:
    """Catches pairs that are dropped under damping, or kept without; and too little curvature."""
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
