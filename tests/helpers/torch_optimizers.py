"""Torch's lists of inputs for optimizers, the classes that take them, and a problem for these."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import stableopt

common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="needs expecttest", exc_type=ImportError
)

INFOS = {info.optim_cls: info for info in common.optim_db}
KINDS = {
    torch.optim.SGD: torch.optim.SGD,
    stableopt.SGD: torch.optim.SGD,
    stableopt.GD: torch.optim.SGD,
    torch.optim.LBFGS: torch.optim.LBFGS,
    stableopt.LBFGS: torch.optim.LBFGS,
}


class Run:
    """A linear least-squares problem and its optimizer."""

    def __init__(self, kind: Any, case: Any, *, named: bool = False) -> None:
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))
        self.input = torch.randn(3)
        params = [("weight", self.weight), ("bias", self.bias)] if named else self.params
        self.optimizer = kind(params, **copy.deepcopy(case.kwargs))

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        if self.optimizer.param_groups[0].get("maximize"):
            loss = -loss
        loss.backward()
        return loss.detach()

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def load_weights(self, other: Run) -> None:
        with torch.no_grad():
            for own, wanted in zip(self.params, other.params, strict=True):
                own.copy_(wanted)


def assert_same(found: Any, expected: Any) -> None:
    (leaves, shape), (others, other) = tree_flatten(found), tree_flatten(expected)
    assert shape == other
    for one, two in zip(leaves, others, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
