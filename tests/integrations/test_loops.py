"""Accelerate and Ignite: the ordinary monitor, and the examples that show it."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt
from stableopt import StabilityMonitor, UpdateRule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from ignite.engine import create_supervised_trainer

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 2)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*DATA), batch_size=8, shuffle=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def accelerated(tracked: bool) -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.Adam((model := network()).parameters(), lr=0.01)
    model, prepared, data = accelerator.prepare(model, optimizer, batches())
    monitor = None
    if tracked:
        monitor = StabilityMonitor(prepared, model, nn.MSELoss(), DATA, every=2)
        assert monitor.optimizer is optimizer
        assert UpdateRule.from_optimizer(prepared).preconditioned
        target = stableopt.TargetRegion.flatter(by=2)
        stableopt.StabilityLR(prepared, monitor, target)  # takes the pair as it is
    for _ in range(2):
        for x, y in data:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                prepared.step()
                prepared.zero_grad()
    return model, torch.get_rng_state(), monitor


def test_what_accelerate_prepared_is_tracked_as_it_is() -> None:
    """Catches hooks on a wrapper that never fires them, and accumulation that counts as steps."""
    (plain, state, _), (model, own_state, monitor) = accelerated(False), accelerated(True)
    assert same(plain, model)
    assert torch.equal(state, own_state)
    # 5 batches an epoch; the last steps without a partner.
    assert [m.step for m in monitor.history] == [2, 4, 6]
    assert monitor.batch_size == 16
    assert all(m.failure is None for m in monitor.history)


def test_accelerate_saves_a_monitor_that_is_registered(tmp_path: Path) -> None:
    """Catches a state that Accelerate cannot write, or will not read."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD((model := network()).parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    monitor = StabilityMonitor(optimizer, model, nn.MSELoss(), DATA, every=1)
    accelerator.register_for_checkpointing(monitor)
    nn.functional.mse_loss(model(DATA[0]), DATA[1]).backward()
    optimizer.step()
    former = monitor.margins
    accelerator.save_state(str(tmp_path))
    optimizer.step()
    accelerator.load_state(str(tmp_path))
    assert monitor.step == 1
    assert list(monitor.history) == [former]


def test_an_optimizer_that_steps_by_itself_is_not_looked_into() -> None:
    """Catches a wrapper assumed for every ``.optimizer``: Lookahead's steps are not its optimizer's."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    unknown = UpdateRule.from_optimizer(Lookahead(inner)).unknown
    assert "optimizer is Lookahead, whose update rule is not known" in str(unknown)


def test_a_trainer_of_ignite_is_tracked_as_it_is() -> None:
    """Catches hooks that miss steps or samples of Ignite's loop, or disturb it."""
    ends = []
    for tracked in (False, True):
        model = network()
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        if tracked:
            optimizer.track(model, nn.MSELoss(), DATA, every=4)
        trainer = create_supervised_trainer(model, optimizer, nn.MSELoss())
        trainer.run(batches(), max_epochs=2)
        ends.append((model, torch.get_rng_state()))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert [m.step for m in optimizer.monitor.history] == [4, 8]
    assert optimizer.monitor.batch_size == 8


@pytest.mark.parametrize("name", ["accelerate_loop", "ignite_loop"])
def test_the_examples_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches an example that is outdated after a change of the library or the framework."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    space = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert len(space["monitor"].history) == space["monitor"].step // 10 >= 3
    assert len(capsys.readouterr().out.splitlines()) >= 3
