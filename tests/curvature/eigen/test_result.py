"""The two residuals of an :class:`Eigenpair`, and the old name of one."""

from __future__ import annotations

import pytest
import torch

from stableopt.curvature import Eigenpair


def test_the_relative_residual_is_the_absolute_one_over_the_value() -> None:
    """Catches a sign kept, and a division by a value of zero."""
    vector = torch.ones(1)
    assert Eigenpair(-4.0, vector, 0.5, 3, True).relative_residual == 0.125
    assert Eigenpair(0.0, vector, 0.0, 3, True).relative_residual == 0.0


def test_the_old_name_is_the_absolute_residual() -> None:
    """Catches existing code that silently gets the relative one."""
    pair = Eigenpair(4.0, torch.ones(1), 0.5, 3, True)
    with pytest.warns(DeprecationWarning, match="use absolute_residual or relative_residual"):
        assert pair.residual == 0.5
