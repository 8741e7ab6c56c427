"""The compact inverse Hessian against the dense BFGS update and the two-loop recursion."""

from __future__ import annotations

import pytest
import torch
from oracles import bfgs_inverse, quadratic_pairs, two_loop
from torch import Tensor

from stableopt.curvature import InverseHessian
from stableopt.curvature.products.blocked_rows import Rows

# Condition numbers of a few tens, and some hundred roundings of 2e-16 in products of length 12.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("gamma", [None, 1.0, 0.03])
def test_ladder(k: int, gamma: float | None) -> None:
    """Catches a wrong order of pairs, triangle or sign: dense, two-loop and compact forms agree."""
    y, s = quadratic_pairs(k)
    scale = float(y[-1] @ s[-1] / (y[-1] @ y[-1])) if gamma is None else gamma
    dense = bfgs_inverse(y, s, scale)
    P = InverseHessian.from_pairs(s=s, y=y, gamma=gamma)
    assert P.gamma == pytest.approx(scale, rel=1e-15 * 20)  # sums of 12 products in another order
    v = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    block = torch.randn(12, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(two_loop(y, s, scale, v), dense @ v, **ROUNDING)
    torch.testing.assert_close(P @ v, dense @ v, **ROUNDING)
    torch.testing.assert_close(P @ block, dense @ block, **ROUNDING)
    assert (P @ block[:, :0]).shape == (12, 0)


def test_any_row_may_be_the_oldest() -> None:
    """Catches a ring buffer that is read from its first row on, even if that is not the oldest."""
    y, s = quadratic_pairs(4)
    expected = InverseHessian.from_pairs(s=s, y=y, gamma=0.5)
    v = torch.ones(12, dtype=torch.float64)
    triangle, squares = (s @ y.T).triu(), y @ y.T
    for oldest in range(4):
        rows = Rows(8, v)
        for i in range(4):
            slot = (oldest + i) % 4
            rows.write(2 * slot, s[i])
            rows.write(2 * slot + 1, y[i])
        turned = InverseHessian(rows, oldest, triangle, squares, 0.5)
        torch.testing.assert_close(turned @ v, expected @ v, **ROUNDING)


def test_last_pair_is_satisfied_and_the_matrix_is_symmetric_positive() -> None:
    """Catches an error that all formulas share: the secant equation is their definition."""
    y, s = quadratic_pairs(5)
    P = InverseHessian.from_pairs(s=s, y=y)
    torch.testing.assert_close(P @ y[-1], s[-1], **ROUNDING)
    matrix = P @ torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(matrix, matrix.T, **ROUNDING)
    assert float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) > 0


def test_float32_pairs() -> None:
    """Catches small systems solved in single precision; only the pairs' rounding may remain."""
    y, s = quadratic_pairs(8)
    v = torch.ones(12, dtype=torch.float64)
    P = InverseHessian.from_pairs(s=s.float(), y=y.float(), gamma=0.5)
    # Those pairs, rounded, define another matrix: the oracle takes them as they are.
    expected = bfgs_inverse(y.float().double(), s.float().double(), 0.5) @ v
    product = P @ v.float()
    assert product.dtype == torch.float32
    # Products of length 12 in float32, through a triangle whose condition number is below 100.
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-4)


def test_reads_the_state_of_torchs_lbfgs() -> None:
    """Catches names, or an order of the lists, that are not torch's: P g is minus its direction."""
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix @ matrix.T + torch.eye(6, dtype=torch.float64)
    x = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([x], max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ matrix @ x
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[x]
    P = InverseHessian.from_pairs(s=state["old_stps"], y=state["old_dirs"], gamma=state["H_diag"])
    torch.testing.assert_close(P @ -state["prev_flat_grad"], state["d"], **ROUNDING)


@pytest.mark.parametrize(
    ("y", "s", "message"),
    [
        ([], [], "at least one"),
        (torch.ones(2, 3), torch.ones(1, 3), "2 gradient changes and 1 steps"),
        (torch.ones(1, 3), -torch.ones(1, 3), "positive"),
        (torch.full((1, 3), torch.nan), torch.ones(1, 3), "positive"),
    ],
    ids=["none", "uneven", "negative", "nan"],
)
def test_pairs_that_define_no_inverse(y: Tensor, s: Tensor, message: str) -> None:
    """Catches a matrix that is not positive definite, and would send Lanczos after NaN."""
    with pytest.raises(ValueError, match=message):
        InverseHessian.from_pairs(s=s, y=y)


def test_vectors_that_do_not_fit() -> None:
    """Catches products that broadcast, or cast, what has another length or dtype."""
    P = InverseHessian.from_pairs(s=torch.ones(1, 3), y=torch.ones(1, 3))
    for wrong in (torch.ones(4), torch.ones(3, 1, 1), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="InverseHessian"):
            P @ wrong
