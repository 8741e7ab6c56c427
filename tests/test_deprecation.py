"""Old names: each warns, and does what the new name does."""

from __future__ import annotations

import pytest
import torch

from stableopt import UpdateRule
from stableopt._deprecation import renamed_keywords


def test_update_rule_of_is_from_optimizer() -> None:
    """Catches an alias that is silent, or reads another rule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    with pytest.warns(DeprecationWarning, match=r"use UpdateRule\.from_optimizer"):
        rule = UpdateRule.of(optimizer)
    assert rule == UpdateRule.from_optimizer(optimizer)


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
