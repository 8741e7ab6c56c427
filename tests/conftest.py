"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest
from oracles import small_data, small_network
from torch import Tensor, nn

from stableopt.curvature import Problem


@pytest.fixture
def network() -> nn.Module:
    return small_network()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return small_data()


@pytest.fixture
def problem(network: nn.Module, data: tuple[Tensor, Tensor]) -> Problem:
    return Problem(network, nn.MSELoss(), data)
