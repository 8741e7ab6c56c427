"""The doctor's report on the machine and on models, and its command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.__main__ import main
from stableopt.doctor import diagnosis, machine, product_method


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing package that is reported as installed."""
    assert any(torch.__version__ in line for line in machine())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert any(line.startswith("tensorboard: missing") for line in machine())


def test_what_models_would_get() -> None:
    """Catches a method that a measurement would not take."""

    def first(model: nn.Module) -> str:
        return product_method(model)[0]

    assert first(nn.Linear(2, 1)) == "Hessian: double backward"
    assert "math attention" in first(nn.MultiheadAttention(4, 2))
    assert "uncompiled" in first(torch.compile(nn.Linear(2, 1), backend="eager"))
    assert "central differences" in first(nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)))
    half = product_method(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16())
    assert any("dtype=torch.float32" in line for line in half)
    assert any("eval mode" in line for line in half)


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    """Catches a command that names a model and looks at none, and a trace instead of a reason."""
    assert main(["doctor", "torch.nn:Identity"]) == 0
    assert "Hessian: double backward" in capsys.readouterr().out
    for target in ("torch.nn", "no_such_module:model", "torch.nn:NoSuch", "builtins:dict"):
        with pytest.raises(SystemExit):
            main(["doctor", target])
    assert "expected a torch.nn.Module" in capsys.readouterr().err
    assert diagnosis().startswith("stableopt ")
