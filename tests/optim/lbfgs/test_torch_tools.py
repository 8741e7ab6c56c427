"""L-BFGS with ranks, a compiler, casts, schedulers and a monitor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lbfgs_single_runs import DIRECTIONS, SEARCHES, X, Y, closure_of, flat, network
from torch import Tensor, nn

import stableopt
from stableopt.stability import UpdateRule


def test_ranks_take_the_same_branches() -> None:
    """Catches a branch on the local loss: ranks would make different calls, and hang."""

    def run(offset: float) -> tuple[int, Tensor]:
        model = network()
        optimizer = stableopt.LBFGS(
            model.parameters(),
            line_search_fn="strong_wolfe",
            # As a mean over ranks would: all ranks see the same number.
            reduce_loss=lambda loss: loss - offset * len(offsets),
        )
        plain, offsets = closure_of(model, optimizer), []

        def closure() -> Tensor:
            offsets.append(offset)
            return plain() + offset * len(offsets)

        returned = optimizer.step(closure)
        assert returned.item() == pytest.approx(0.653 + offset, abs=1e-3)
        return len(offsets), flat(model)

    (calls, point), (other_calls, other_point) = run(0.0), run(0.5)
    assert calls == other_calls
    # A half a call is added and taken away in single precision.
    torch.testing.assert_close(point, other_point, rtol=1e-2, atol=1e-2)


def test_compiled_step() -> None:
    """Catches a step that the compiler traces into: its control flow depends on data."""
    model, other = network(), network()
    optimizer, reference = (stableopt.LBFGS(m.parameters(), lr=0.5) for m in (model, other))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        step(lambda: closure_of(model, optimizer)().detach())
        reference.step(closure_of(other, reference))
    torch._dynamo.reset()
    assert torch.equal(flat(model), flat(other))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_model_cast_under_way(direction: str) -> None:
    """Catches pairs of the old dtype in products with gradients of the new one."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=0.5, max_iter=3, direction=direction)
    optimizer.step(closure_of(model, optimizer))
    model.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.double()), Y.double())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(3):
        optimizer.step(closure)
    assert closure() < first
    assert optimizer.inverse_hessian_matvec(torch.ones(20).double()).dtype == torch.float64


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(direction: str, dtype: torch.dtype) -> None:
    """Catches kernels that half precision lacks, as triangular systems do."""
    model = network().to(dtype)
    optimizer = stableopt.LBFGS(
        model.parameters(), max_iter=5, direction=direction, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    optimizer.step(closure)
    assert closure() < first


def test_scheduler_sets_the_rate() -> None:
    """Catches a rate that is read once: at rate zero nothing moves."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=1.0, max_iter=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0)
    closure, points = closure_of(model, optimizer), []
    for _ in range(4):
        optimizer.step(closure)
        scheduler.step()
        points.append(flat(model))
    assert not torch.equal(points[0], points[1])
    assert torch.equal(points[2], points[3])


def full_batch(optimizer: Any) -> UpdateRule:
    return UpdateRule(lr=float(optimizer.param_groups[0]["lr"]), full_batch=True)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_tracking_leaves_training_alone_and_counts_steps(line_search_fn: str | None) -> None:
    """Catches a measurement within a step, and a batch size summed over the closure's calls."""
    ends = []
    for tracked in (False, True):
        model = network()
        optimizer = stableopt.LBFGS(
            model.parameters(), lr=0.5, max_iter=5, line_search_fn=line_search_fn
        )
        if tracked:
            optimizer.track(model, nn.MSELoss(), (X, Y), every=1, update_rule=full_batch)
        for _ in range(3):
            optimizer.step(closure_of(model, optimizer))
        ends.append(flat(model))
    assert torch.equal(*ends)
    history = list(optimizer.monitor.history)
    assert [m.step for m in history] == [1, 2, 3]
    assert [m.failure for m in history] == [None] * 3
    # Every call of the closure sees all 12 samples; a step has 12, however often it looks.
    assert [m.batch_size for m in history] == [12] * 3
    assert [m.dataset_size for m in history] == [12] * 3
