"""Old names: each warns, and does what the new name does."""

from __future__ import annotations

import importlib

import pytest
import torch

import stableopt
from stableopt import (
    AdaptiveAccumulation,
    AdaptiveBatchSampler,
    Problem,
    TargetRegion,
    UpdateRule,
    critical_batch_size,
    critical_lr,
)
from stableopt._support.deprecation import renamed_keywords
from stableopt.curvature import DualCurvature, InverseHessian
from stableopt.suggestions import Suggestion, Suggestions


def test_update_rule_of_is_from_optimizer() -> None:
    """Catches an alias that is silent, or reads another rule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    with pytest.warns(DeprecationWarning, match=r"use UpdateRule\.from_optimizer"):
        rule = UpdateRule.of(optimizer)
    assert rule == UpdateRule.from_optimizer(optimizer)


def test_suggestions_of_is_answer() -> None:
    """Catches an alias of another answer."""
    row = Suggestion("SGD", 4, 0.1, 0.1, exact=True, seconds=0.0)
    suggestions = Suggestions((row,), 20.0, 8, 0.0, (), "double backward")
    with pytest.warns(DeprecationWarning, match=r"use Suggestions\.answer"):
        assert suggestions.of("SGD", 4) is row


def test_critical_values_take_the_keyword_problem() -> None:
    """Catches a former keyword that no longer works."""
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    dual = DualCurvature(rows @ rows.T, 3)
    with pytest.warns(DeprecationWarning, match="use model"):
        assert critical_lr(problem=dual, batch_size=1) == critical_lr(dual, 1)
    with pytest.warns(DeprecationWarning, match="use model"):
        assert critical_batch_size(problem=dual, lr=1.2) == 2


def test_renamed_keywords_warn_at_the_caller() -> None:
    """Catches an old keyword that is dropped, and one that silently loses to the new one."""

    @renamed_keywords(max="largest")
    def clip(x: int, *, largest: int) -> int:
        return min(x, largest)

    with pytest.warns(DeprecationWarning, match="the keyword max is deprecated") as caught:
        assert clip(3, max=2) == 2
    assert caught[0].filename == __file__
    assert clip(3, largest=2) == 2
    with pytest.raises(TypeError, match="largest and its old name max"):
        clip(3, max=2, largest=2)


@pytest.mark.parametrize("module", ["stableopt.steering", "stableopt.steering.lr_laws"])
def test_measured_of_the_laws_is_lr_measured(module: str) -> None:
    """Catches an alias that only one of the two places has, or that hides a misspelt name."""
    steering = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"use {module}\.LRMeasured") as caught:
        assert steering.Measured is steering.LRMeasured
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'Mesured'"):
        steering.Mesured  # noqa: B018


def test_a_margin_is_a_region_within_limits() -> None:
    """Catches an old constructor that makes another region."""
    with pytest.warns(DeprecationWarning, match=r"use TargetRegion\.within_limits"):
        assert TargetRegion.margin(0.8) == TargetRegion.within_limits(0.8)


def test_bounds_of_batch_sizes_have_old_keywords() -> None:
    """Catches bounds that are dropped, or exchanged."""
    with pytest.warns(DeprecationWarning, match="use m.._batch_size"):
        sampler = AdaptiveBatchSampler(range(99), 8, min=4, max=16)
    assert [sampler.nearest(size) for size in (1, 99)] == [4, 16]
    with pytest.warns(DeprecationWarning, match="use max_batch_size"):
        accumulation = AdaptiveAccumulation([], 4, max=12)
    assert accumulation.nearest(99) == 12


def test_pairs_in_the_old_order_make_the_same_inverse_hessian() -> None:
    """Catches steps and gradient changes that are exchanged, and a scale that is dropped."""
    s, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 1.0]])
    expected = InverseHessian.from_pairs(s=s, y=y, gamma=0.5) @ torch.ones(2)
    with pytest.warns(DeprecationWarning, match="use keywords: y, s, gamma") as caught:
        by_position = InverseHessian.from_pairs(y, s, 0.5)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="the keyword pairs_. is deprecated"):
        by_keyword = InverseHessian.from_pairs(pairs_y=y, pairs_s=s, gamma=0.5)
    assert torch.equal(by_position @ torch.ones(2), expected)
    assert torch.equal(by_keyword @ torch.ones(2), expected)
    with pytest.raises(TypeError, match="y is given by position and by keyword"):
        InverseHessian.from_pairs(y, y=y, s=s)
    with pytest.raises(TypeError, match="at most 3 positional"):
        InverseHessian.from_pairs(y, s, 0.5, 1.0)


def test_dual_curvature_has_its_old_constructors() -> None:
    """Catches an alias that is silent, or drops the memory."""
    problem = Problem(torch.nn.Linear(2, 1), torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    with pytest.warns(DeprecationWarning, match=r"use DualCurvature\.from_problem"):
        found = DualCurvature.of(problem, memory=1000)
    assert torch.equal(found.gram, DualCurvature.from_problem(problem, memory=1000).gram)
    factors = torch.ones(2, 1, 3)
    with pytest.warns(DeprecationWarning, match=r"use DualCurvature\.from_factors"):
        found = DualCurvature.of_factors(factors)
    assert torch.equal(found.gram, DualCurvature.from_factors(factors).gram)


def test_the_former_name_of_a_bracketed_learning_rate() -> None:
    """It is the same class, and says what to use."""
    with pytest.warns(DeprecationWarning, match="use stableopt.BracketedLR") as caught:
        assert stableopt.ReshuffledLR is stableopt.BracketedLR
    assert caught[0].filename == __file__
