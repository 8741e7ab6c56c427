"""The callback in real Lightning runs, compared with the same runs without it."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_runs import (
    LIGHTNINGS_OWN_WARNINGS,
    MUTE,
    Net,
    fitted,
    loader,
    logged,
    probe_set,
    same,
)
from torch import Tensor, nn

import stableopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning

    from stableopt.integrations.lightning import StabilityCallback

pytestmark = LIGHTNINGS_OWN_WARNINGS


def random_state() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_the_run_without_it(tmp_path: Path, kind: str, accumulate: int) -> None:
    """Catches a callback that draws random numbers, changes a mode, logs a loss or takes a step."""
    ends = []
    callback = StabilityCallback(
        loader(), every=2, quantities=("sharpness", "non_uniformity"), dataset_size=40
    )
    for name, callbacks in (("with", [callback]), ("without", [])):
        trainer, net = fitted(
            tmp_path / name, callbacks, partial(Net, kind), accumulate_grad_batches=accumulate
        )
        ends.append(
            (
                net.state_dict(),
                trainer.optimizers[0].state_dict(),
                random_state(),
                logged(trainer, "loss"),
                logged(trainer, "val_loss"),
            )
        )
    assert same(*ends)
    # 5 batches an epoch; the last of them steps whether or not it has a partner.
    steps = 15 if accumulate == 1 else 9
    assert [m.step for m in callback.history] == list(range(2, steps + 1, 2))
    assert all(m.failure is None for m in callback.history)
    assert callback.margins.batch_size == 8 * accumulate


def test_margins_are_in_the_logger_at_the_trainers_step(tmp_path: Path) -> None:
    """Catches values that are lost between logging steps, or shown at another step."""
    callback = StabilityCallback(probe_set(), every=2)
    trainer, _ = fitted(tmp_path, [callback], log_every_n_steps=7)
    shown = logged(trainer, "stability/sharpness_ratio")
    assert {k: float(v) for k, v in shown.items()} == {
        m.step: m.sharpness_ratio for m in callback.history
    }
    last = callback.margins.sharpness_ratio
    # callback_metrics holds single precision.
    assert float(trainer.callback_metrics["stability/sharpness_ratio"]) == pytest.approx(last, 1e-6)


class TwoOptimizers(Net):
    """Manual optimization of two halves, accumulated over two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.batch_loss(batch) / 2
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def batch_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        body, head = self.net[0].parameters(), self.net[3].parameters()
        return torch.optim.SGD(body, lr=0.1), torch.optim.Adam(head, lr=0.01)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """Catches parameters of the other optimizer, its steps, and batches that are not counted."""
    first = StabilityCallback(probe_set(), TwoOptimizers.batch_loss, optimizer=0, every=1)
    second = StabilityCallback(
        probe_set(), TwoOptimizers.batch_loss, optimizer=1, every=1, prefix="head"
    )
    trainer, net = fitted(tmp_path / "with", [first, second], TwoOptimizers, epochs=2)
    _, plain = fitted(tmp_path / "without", [], TwoOptimizers, epochs=2)
    assert same(net.state_dict(), plain.state_dict())
    assert first.monitor.problem.names == ["net.0.weight", "net.0.bias"]
    assert second.monitor.problem.names == ["net.3.weight", "net.3.bias"]
    assert [m.step for m in first.history] == [m.step for m in second.history] == [1, 2, 3, 4]
    assert first.margins.batch_size == 16
    assert second.margins.preconditioned_sharpness_ratio is not None
    # Both on Lightning's axis, which counts batches: two steps in five batches an epoch.
    shown = list(logged(trainer, "stability/sharpness"))
    assert shown == list(logged(trainer, "head/preconditioned_sharpness")) == [2, 4, 7, 9]


def test_optimizers_of_one_model_are_measured_together(tmp_path: Path) -> None:
    """Catches a step of one optimizer that counts as a step of both, and an unknown one refused."""
    callback = StabilityCallback(probe_set(), TwoOptimizers.batch_loss, every=1)
    with pytest.warns(RuntimeWarning, match="limits are not known.*momenta differ"):
        _, net = fitted(tmp_path / "with", [callback], TwoOptimizers, epochs=2)
    _, plain = fitted(tmp_path / "without", [], TwoOptimizers, epochs=2)
    assert same(net.state_dict(), plain.state_dict())
    assert [m.step for m in callback.history] == [1, 2, 3, 4]
    for margins in callback.history:
        assert margins.failure is None
        assert margins.realised_edge is not None
        assert {"SGD", "Adam"} <= margins["block_edge"].details.keys()


def test_what_cannot_be_measured_is_an_error_that_helps(tmp_path: Path) -> None:
    """Catches errors that do not speak of the callback, and errors after training has begun."""

    class NoLoss(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(TypeError, match="data=None: expected the probe set"):
        StabilityCallback(None)
    with pytest.raises(TypeError, match="batch_loss='mse': expected a function"):
        StabilityCallback(probe_set(), "mse")
    for kind, options, error, message in (
        (NoLoss, {}, TypeError, "training_step returned NoneType"),
        (TwoOptimizers, {"optimizer": 0}, ValueError, "batch_loss=None with manual"),
        (TwoOptimizers, {}, ValueError, "batch_loss=None with manual"),
        (TwoOptimizers, {"optimizer": 2}, ValueError, "an index into 2 optimizers"),
    ):
        with pytest.raises(error, match=message):
            fitted(tmp_path, [StabilityCallback(probe_set(), every=1, **options)], kind)
    with pytest.raises(RuntimeError, match="state_key` must be unique"):
        fitted(tmp_path, [StabilityCallback(probe_set()), StabilityCallback(probe_set())])


def test_a_rule_makes_an_unknown_optimizer_known(tmp_path: Path) -> None:
    """Catches options that do not reach the monitor."""
    callback = StabilityCallback(
        probe_set(), every=5, update_rule=stableopt.UpdateRule(lr=0.05), chunk_size=8, tol=0.1
    )
    fitted(tmp_path, [callback], epochs=1)
    assert callback.margins.sharpness_limit == 40.0
    assert callback.monitor.problem.batches.chunk_size == 8


def test_without_a_logger_and_with_a_failing_sink(tmp_path: Path) -> None:
    """Catches a measurement, or a sink, that ends the training."""

    def full_disk(step: int, record: Any) -> None:
        raise OSError("no space left")

    callback = StabilityCallback(probe_set(), every=5, sinks=[full_disk])
    with pytest.warns(RuntimeWarning, match="no space left"):
        trainer, _ = fitted(tmp_path, [callback], logger=False, enable_checkpointing=False)
    assert trainer.global_step == 15
    assert len(callback.history) == 3


def test_a_failing_measurement_does_not_end_the_training(tmp_path: Path) -> None:
    """Catches an error of the loss on the probe set that ends training."""
    calls = 0

    def flaky(module: Net, batch: Any) -> Tensor:
        nonlocal calls
        if module.trainer.global_step > 3:
            calls += 1
            raise RuntimeError("the file is gone")
        return nn.functional.mse_loss(module.net(batch[0]), batch[1])

    callback = StabilityCallback(probe_set(), flaky, every=5)
    with pytest.warns(RuntimeWarning, match="the file is gone"):
        trainer, _ = fitted(tmp_path, [callback])
    assert trainer.global_step == 15
    assert calls
    assert callback.margins.failure == "RuntimeError: the file is gone"


def test_the_monitor_is_detached_when_training_ends_early(tmp_path: Path) -> None:
    """Catches hooks that stay on an optimizer after an error."""

    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 3:
                raise KeyError("lost")
            return super().training_step(batch, batch_idx)

    callback = StabilityCallback(probe_set(), every=1)
    with pytest.raises(KeyError, match="lost"):
        fitted(tmp_path, [callback], Fails)
    assert [m.step for m in callback.history] == [1, 2, 3]
    assert not callback.monitor._handles


def test_the_other_package(tmp_path: Path) -> None:
    """Catches a callback accepted by only one of ``lightning`` and ``pytorch_lightning``."""

    class Other(pytorch_lightning.LightningModule):
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.kind = nn.Linear(4, 2), "sgd"

    callback = StabilityCallback(probe_set(), every=2)
    trainer = pytorch_lightning.Trainer(
        **MUTE, logger=False, max_steps=4, callbacks=[callback], default_root_dir=tmp_path
    )
    trainer.fit(Other(), loader())
    assert [m.step for m in callback.history] == [2, 4]
    assert callback.margins.failure is None


class MadeInAHook(Net):
    """A module whose step needs an attribute that a training hook sets, and takes any arguments."""

    def on_train_epoch_start(self) -> None:
        self.weight = torch.ones(2, dtype=self.net[0].weight.dtype)

    def training_step(self, *arguments: Any) -> Tensor:
        (x, y), _ = arguments
        return nn.functional.mse_loss(self.net(x) * self.weight, y)


def test_steps_that_need_the_modules_hooks_and_another_precision(tmp_path: Path) -> None:
    """Catches a probe pass before the module's hooks, without a batch index, or in another precision."""
    callback = StabilityCallback(probe_set(), every=2)
    fitted(tmp_path, [callback], MadeInAHook, epochs=1, precision="64-true")
    assert callback.margins is not None
    assert callback.margins.failure is None
