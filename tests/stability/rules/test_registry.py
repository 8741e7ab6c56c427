"""Which optimizers are known: the registry, subclasses, and optional packages."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from optimizer_steps import MSE, Data
from torch import nn

import stableopt
from stableopt import TargetRegion, UpdateRule, measure


def test_torch_optimizer_is_not_imported_and_its_classes_are_known() -> None:
    """Catches an optional package that has become a requirement."""
    code = (
        "import sys, torch, stableopt; assert 'torch_optimizer' not in sys.modules;"
        "import torch_optimizer;"
        "rule = stableopt.UpdateRule.from_optimizer(torch_optimizer.Yogi([torch.zeros(1)], lr=0.5));"
        "print(rule.max_sharpness)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(process.stdout) == pytest.approx(76.0)


def test_a_subclass_with_a_step_of_its_own_is_unknown() -> None:
    """Catches the rule of the parent, read silently for a subclass that takes other steps."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    class Same(torch.optim.SGD):
        pass

    params = [torch.zeros(1, requires_grad=True)]
    rule = UpdateRule.from_optimizer(Own(params, lr=0.1))
    assert rule.lr == 0.1
    assert re.search(r"overrides step of SGD.*register\(Own, .*update_rule=", str(rule.unknown))
    for kind in (Same, stableopt.SGD, stableopt.GD, stableopt.LBFGS, torch.optim.AdamW):
        optimizer = kind(params, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 5)  # patches step on the instance
        assert UpdateRule.from_optimizer(optimizer).lr == 0.1


def test_registering_by_class_by_name_and_for_subclasses() -> None:
    """Catches a subclass that is read by its parent's reader although it has its own."""

    class Parent(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    class Child(Parent):
        pass

    params = [torch.zeros(1)]
    unknown = UpdateRule.from_optimizer(Parent(params)).unknown
    assert re.search(r"UpdateRule\.register\(Parent, .*update_rule=", str(unknown))
    UpdateRule.register(
        f"{Parent.__module__}.{Parent.__qualname__}", lambda optimizer: UpdateRule(lr=0.5)
    )
    assert UpdateRule.from_optimizer(Child(params)).lr == 0.5
    UpdateRule.register(Child, lambda optimizer: UpdateRule(lr=0.25))
    assert (
        UpdateRule.from_optimizer(Parent(params)).lr,
        UpdateRule.from_optimizer(Child(params)).lr,
    ) == (0.5, 0.25)
    with pytest.raises(TypeError, match="kind=5"):
        UpdateRule.register(5, lambda optimizer: UpdateRule(lr=1.0))  # type: ignore[arg-type]


def test_a_step_that_is_not_known_has_no_limits(network: nn.Module, data: Data) -> None:
    """Catches 2/lr as the limit of an optimizer that takes other steps, in any function of the rule."""

    class Mine(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": torch.tensor(0.5), "scale": 3})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    rule = UpdateRule.from_optimizer(Mine(network.parameters()))
    assert (rule.lr, rule.preconditioned) == (0.5, True)
    for limit in (
        lambda: rule.max_sharpness,
        lambda: rule.min_sharpness,
        lambda: rule.max_non_uniformity(4),
        lambda: TargetRegion(sharpness=(0, 10)).lr_for(rule),
    ):
        with pytest.raises(ValueError, match=r"limit .* is not known: optimizer is Mine.*register"):
            limit()
    with pytest.warns(RuntimeWarning, match="optimizer is Mine, whose update rule is not known"):
        margins = measure(network, MSE, data, optimizer=Mine(network.parameters()), batch_size=2)
    assert margins.sharpness is not None
    unknown = (margins.sharpness_limit, margins.preconditioned_sharpness, margins.stable)
    assert unknown == (None,) * 3


def test_rates_that_are_no_numbers_do_not_stop_an_unknown_optimizer() -> None:
    """Catches a KeyError, or a refusal, where an optimizer has no learning rate of the usual kind."""
    for options in ({}, {"lr": None}, {"lr": math.inf}, {"lr": -1.0}):
        optimizer = torch.optim.Optimizer([torch.zeros(1)], options)
        assert UpdateRule.from_optimizer(optimizer).lr == 0.0
