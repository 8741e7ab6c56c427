"""The doctor's report on the machine and on models, and its command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.__main__ import main
from stableopt.doctor import diagnosis, machine, optimizer_rule, product_method


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
    assert "central differences" in first(nn.EmbeddingBag(2, 1))
    half = product_method(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16())
    assert any("dtype=torch.float32" in line for line in half)
    assert any("eval mode" in line for line in half)
    assert any("about 22 products" in line for line in half)


def test_the_command(capsys: pytest.CaptureFixture) -> None:
    """Catches a command that names a model and looks at none, and a trace instead of a reason."""
    assert main(["doctor", "torch.nn:Identity"]) == 0
    assert "Hessian: double backward" in capsys.readouterr().out
    for target in ("torch.nn", "no_such_module:model", "torch.nn:NoSuch", "builtins:dict"):
        with pytest.raises(SystemExit):
            main(["doctor", target])
    assert "expected a torch.nn.Module" in capsys.readouterr().err
    assert diagnosis().startswith("stableopt ")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("torch.optim:SGD", "= 2/lr at lr=0.001"),
        ("torch.optim:AdamW", "readers.adaptive.read_adam"),
        ("torch.optim:LBFGS", "preconditioner: not diagonal"),
        ("torch.optim:SparseAdam", "on lambda_max(PH) = 38/lr"),
        ("torch.optim:Rprop", "limit: not known: Rprop takes steps of a length"),
        ("torch_optimizer:Lookahead", "on lambda_max(H) = 2.246/lr"),
        ("torch_optimizer:Lamb", "not known: Lamb has no reader"),
        ("builtins:dict", "expected a class of optimizers"),
        ("torch.optim:NoSuch", "NoSuch"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch_optimizer's calls
def test_what_is_known_of_an_optimizer(name: str, says: str, capsys: pytest.CaptureFixture) -> None:
    """Catches a reader or a limit that is not the one that measurements use, and a class that fails."""
    try:
        main(["doctor", "--optimizer", name])
    except SystemExit:
        assert name.split(":")[1] in ("dict", "NoSuch")
    shown = capsys.readouterr()
    assert says in shown.out + shown.err


def test_an_overridden_step_is_named() -> None:
    """Catches the limit of the parent, shown for other steps."""

    class Own(torch.optim.Adam):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            pass

    assert optimizer_rule(Own)[0] == "not known: Own overrides the step of Adam"
