"""`InDouble`: single precision inside a function becomes double."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stableopt.curvature.isolation.in_double import InDouble

HELD = torch.tensor([0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.float() / 3,
        lambda x: x.to(torch.float32) / 3,
        lambda x: x.type(torch.float32) / 3,
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: torch.zeros(3) + x,
        lambda x: x @ HELD,
        lambda x: torch.stack([x.float(), HELD]),
    ],
)
def test_results_are_double_and_exact(function: object) -> None:
    """Catches rounding to single precision on the way, which a double result alone does not show."""
    x = torch.tensor([1.0, 2.0, 1 / 3], dtype=torch.float64)
    with InDouble():
        result: Tensor = function(x)  # type: ignore[operator]
    assert result.dtype == torch.float64
    assert not torch.equal(result, result.float().double())


def test_tensors_that_are_written_to_stay_themselves() -> None:
    """Catches a write to a copy, which is lost."""
    count = torch.zeros(3)
    with InDouble():
        count.add_(torch.ones(3))
        count[0] = 5.0
    assert count.dtype == torch.float32
    assert count.tolist() == [5.0, 1.0, 1.0]


def test_grouped_products_have_no_kernel_in_double_precision() -> None:
    """Catches mixtures of experts that cannot be evaluated in double precision at all."""
    rows, matrices = torch.randn(7, 4), torch.randn(3, 4, 8)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    with InDouble():
        products = torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    groups = [rows[:2].double() @ matrices[0].double(), rows[2:6].double() @ matrices[2].double()]
    assert torch.equal(products[:6], torch.cat(groups))
    single = torch.nn.functional.grouped_mm(rows, matrices, offs=ends)
    torch.testing.assert_close(products[:6].float(), single[:6])
