"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from oracles import small_data, small_network
from torch import Tensor, nn

from stableopt.curvature import Problem

# Frameworks run as installed, but offline and without telemetry.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# The pace of a machine that others share says nothing about the code.
settings.register_profile(
    "any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("any pace")


@pytest.fixture
def network() -> nn.Module:
    return small_network()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return small_data()


@pytest.fixture
def problem(network: nn.Module, data: tuple[Tensor, Tensor]) -> Problem:
    return Problem(network, nn.MSELoss(), data)


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
