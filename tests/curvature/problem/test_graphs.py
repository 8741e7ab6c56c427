"""What a graph shows of custom functions and kinks."""

from __future__ import annotations

import pytest
import torch
from oracles import SineOnce
from torch import Tensor
from torch.nn import functional as F

from stableopt.curvature.problem.derivatives.graphs import has_custom_function, has_kinks


@pytest.mark.parametrize(
    ("function", "kinks"),
    [
        (torch.tanh, False),
        (lambda x: x.softmax(-1), False),
        (lambda x: x.log_softmax(-1), False),
        (F.gelu, False),
        (F.elu, False),
        (F.relu, True),
        (F.leaky_relu, True),
        (F.hardswish, True),
        (lambda x: F.max_pool1d(x, 2), True),
        (lambda x: x.clamp(max=0.1), True),
        (lambda x: x.amax(-1), True),
    ],
)
def test_kinks_are_known_by_name(function: object, kinks: bool) -> None:
    """Catches a softmax taken for a maximum, and a piecewise function taken for smooth."""
    x = torch.ones(1, 4, requires_grad=True)
    out: Tensor = function(x * 2)  # type: ignore[operator]
    assert has_kinks(out.sum()) == kinks
    assert not has_custom_function(out.sum())


def test_a_function_of_the_user_s_is_custom() -> None:
    """Catches a custom function that is trusted like torch's."""
    assert has_custom_function(SineOnce.apply(torch.ones(2, requires_grad=True)).sum())
