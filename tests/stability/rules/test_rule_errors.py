"""Wrong update rules and preconditioners are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from optimizer_steps import MSE
from oracles import small_data
from torch import nn

from stableopt import UpdateRule, measure
from stableopt.stability import (
    DiagonalPreconditioner,
)

BAD: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "betas": (
        lambda m: UpdateRule.from_optimizer(
            torch.optim.Adam(
                [{"params": [m[0].weight], "betas": (0.5, 0.9)}, {"params": [m[2].weight]}]
            )
        ),
        ValueError,
        r"momentum \(beta, tau, nu\) of \(0\.5, 0\.5, 1\.0\) and \(0\.9",
    ),
    "maximize": (
        lambda m: UpdateRule.from_optimizer(
            torch.optim.Adam(
                [{"params": [m[0].weight], "maximize": True}, {"params": [m[2].weight]}]
            )
        ),
        ValueError,
        r"maximize \[True, False\]",
    ),
    "a matrix alone": (
        lambda m: UpdateRule(lr=0.1, preconditioner=torch.eye(38)),  # type: ignore[arg-type]
        TypeError,
        "MatrixPreconditioner",
    ),
    "rates twice": (
        lambda m: UpdateRule(
            lr=0.1, group_lrs=(0.1, 0.2), preconditioner=DiagonalPreconditioner([], [])
        ),
        ValueError,
        "group_lrs with a preconditioner",
    ),
    "too few entries": (
        lambda m: DiagonalPreconditioner(m.parameters(), [1.0]),
        ValueError,
        "1 values: expected one for each of the 4",
    ),
    "entries of another shape": (
        lambda m: DiagonalPreconditioner([m[0].weight], [torch.ones(3, 5)]),
        ValueError,
        r"\(3, 5\) for a parameter of shape \(5, 3\)",
    ),
    "a vector of another size": (
        lambda m: DiagonalPreconditioner([m[0].weight], [1.0]) @ torch.ones(3),
        ValueError,
        r"@ \(3,\): expected \(15,\)",
    ),
    "a parameter that P does not know": (
        lambda m: measure(
            m,
            MSE,
            small_data(),
            update_rule=UpdateRule(
                lr=0.1, preconditioner=DiagonalPreconditioner([m[0].weight], [1.0])
            ),
        ),
        ValueError,
        "not one of the 1 of the preconditioner",
    ),
    "preconditioned sharpness of SGD": (
        lambda m: measure(m, MSE, small_data(), lr=0.1, quantities=("preconditioned_sharpness",)),
        ValueError,
        "needs an optimizer with a preconditioner",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, network: nn.Module) -> None:
    """Catches an error from deep inside, or a wrong number without one."""
    call, kind, message = BAD[case]
    with warnings.catch_warnings(), pytest.raises(kind, match=message):
        call(network)
