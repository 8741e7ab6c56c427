"""The compact form against the two-loop recursion, and both against the textbook's matrix."""

from __future__ import annotations

import pytest
import torch
from lbfgs_runs import DIRECTIONS, SEARCHES, closure_of, flat, network, train
from oracles import bfgs_inverse

import stableopt


@pytest.mark.parametrize("history_size", [3, 50])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_compact_is_two_loop_to_rounding(line_search_fn: str | None, history_size: int) -> None:
    """Catches a stale Gram matrix after the ring buffer wraps; 14 iterations wrap it four times."""
    options = {"line_search_fn": line_search_fn, "history_size": history_size, "max_iter": 14}
    compact, losses, optimizer = train(stableopt.LBFGS, steps=1, lr=0.5, **options)
    looped, expected, reference = train(
        stableopt.LBFGS, steps=1, lr=0.5, direction="two_loop", **options
    )
    assert len(losses) == len(expected)
    # Rounding of 2e-16 grows by less than 3 an iteration on this loss: by 1e4 in all.
    torch.testing.assert_close(compact, looped, rtol=1e-11, atol=1e-11)
    v = torch.randn(len(compact), 2, generator=torch.Generator().manual_seed(1)).double()
    product = optimizer.inverse_hessian_matvec(v)
    expected_product = reference.inverse_hessian_matvec(v)
    # The pairs differ by as much.
    torch.testing.assert_close(product, expected_product, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("history_size", [3, 50])
def test_inverse_hessian_is_the_textbooks(direction: str, history_size: int) -> None:
    """Catches a product with a matrix other than that of the pairs, also after the ring wraps."""
    model = network()
    optimizer = stableopt.LBFGS(
        model.parameters(), max_iter=1, history_size=history_size, lr=0.5, direction=direction
    )
    closure = closure_of(model, optimizer)
    identity = torch.eye(len(flat(model)), dtype=torch.float64)
    assert torch.equal(optimizer.inverse_hessian_matvec(identity), identity)
    for step in range(12):
        optimizer.step(closure)
        (state,) = optimizer.state_dict()["state"].values()
        changes, steps = state["old_dirs"], state["old_stps"]
        assert len(changes) == min(step, history_size)
        matrix = optimizer.inverse_hessian_matvec(identity)
        if changes:
            dense = bfgs_inverse(torch.stack(changes), torch.stack(steps), float(state["H_diag"]))
            # Sums of 37 products, through triangles of a condition number below 1e3.
            torch.testing.assert_close(matrix, dense, rtol=1e-12, atol=1e-12)
        column = optimizer.inverse_hessian_matvec(identity[:, 3])
        torch.testing.assert_close(column, matrix[:, 3], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(
            matrix @ -state["prev_flat_grad"], state["d"], rtol=1e-11, atol=1e-12
        )


def test_vectors_that_do_not_fit() -> None:
    """Catches a product that broadcasts."""
    optimizer = stableopt.LBFGS(network().parameters())
    with pytest.raises(ValueError, match=r"expected \(37,\) or \(37, k\)"):
        optimizer.inverse_hessian_matvec(torch.ones(36))
