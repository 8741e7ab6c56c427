"""The callback in real Lightning runs, compared with the same runs without it."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import stableopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    import pytorch_lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from stableopt.curvature.isolation.isolated import measuring
    from stableopt.integrations.lightning import StabilityCallback

pytestmark = [
    # Lightning's advice on loaders, and what it finds deprecated in itself and its neighbours.
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

MUTE = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


def probe_set() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 4, generator=generator), torch.randn(40, 2, generator=generator)


class Net(pl.LightningModule):
    """A module that draws random numbers, keeps running statistics, logs, and counts its calls."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.kind = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Not through forward(): samples must be counted all the same.
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return stableopt.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Reporting(Net):
    """A module that reports its losses, as docs/diagnosing.md says, and lists those of its batches."""

    callback: StabilityCallback

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.callback.recorder.loss(loss, batch=[batch_idx])
        if not measuring():
            self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        squares = [p.grad.square().sum() for p in self.parameters()]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


class Resumable(Net):
    """A module that draws the same numbers after a resume: Lightning saves no random state."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_all(self.global_step)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


class ShuffledByEpoch(Sampler[int]):
    """An order that a resumed run finds again."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        return iter(
            torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )


def loader(**options: Any) -> DataLoader[Any]:
    options = options or {"shuffle": True}
    return DataLoader(TensorDataset(*probe_set()), batch_size=8, **options)


def fitted(
    folder: Path,
    callbacks: list[Any],
    kind: Any = Net,
    ckpt_path: Path | None = None,
    epochs: int = 3,
    sampler: Any = None,
    **options: Any,
) -> tuple[pl.Trainer, Net]:
    seed_all(0)
    net = kind()
    trainer = pl.Trainer(
        **{**MUTE, "logger": CSVLogger(folder), **options},
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    data = loader() if sampler is None else loader(sampler=sampler)
    trainer.fit(net, data, loader(shuffle=False), ckpt_path=ckpt_path)
    return trainer, net


def logged(trainer: pl.Trainer, name: str) -> dict[int, str]:
    path = Path(trainer.logger.log_dir) / "metrics.csv"
    with path.open() as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


def random_state() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002


def flat(state: Any) -> Iterator[Any]:
    if isinstance(state, dict):
        for key in state:
            yield from flat(state[key])
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from flat(value)
    else:
        yield state


def same(a: Any, b: Any) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(np.array_equal(np.asarray(left), np.asarray(right)) for left, right in pairs)


def numbers(history: Any) -> list[dict[str, float]]:
    """Return records without the times."""
    return [{k: v for k, v in m.record().items() if k != "seconds"} for m in history]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_the_run_without_it(tmp_path: Path, kind: str, accumulate: int) -> None:
    """Catches a callback that draws a random number, leaves a mode, logs a loss or steps."""
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


@pytest.mark.parametrize("every_steps", [None, 6])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, every_steps: int | None) -> None:
    """Catches state that a checkpoint lacks, or that is loaded before there is a monitor."""

    def callbacks(folder: Path) -> list[Any]:
        when = (
            {"every_n_epochs": 1} if every_steps is None else {"every_n_train_steps": every_steps}
        )
        return [
            StabilityCallback(probe_set(), every=4, cold_every=3),
            ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when),
        ]

    run: dict[str, Any] = {"kind": Resumable, "sampler": ShuffledByEpoch()}
    whole = callbacks(tmp_path / "whole")
    _, straight = fitted(tmp_path / "whole", whole, **run, epochs=4)
    part = callbacks(tmp_path / "part")
    fitted(tmp_path / "part", part, **run, epochs=2)
    (checkpoint,) = (tmp_path / "part").glob(f"step={'10' if every_steps is None else '6'}.ckpt")
    rest = callbacks(tmp_path / "rest")
    _, resumed = fitted(tmp_path / "rest", rest, **run, ckpt_path=checkpoint, epochs=4)
    assert [m.step for m in rest[0].history] == [4, 8, 12, 16, 20]
    if every_steps is None:
        # In the middle of an epoch Lightning itself does not go on with the same batches.
        assert same(straight.state_dict(), resumed.state_dict())
        assert numbers(rest[0].history) == numbers(whole[0].history)


def test_a_checkpoint_from_before_the_callback(tmp_path: Path) -> None:
    """Catches steps that differ from the trainer's after a checkpoint without the callback's state."""
    trainer, _ = fitted(tmp_path / "a", [], epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = StabilityCallback(probe_set(), every=2)
    trainer, _ = fitted(tmp_path / "b", [callback], ckpt_path=tmp_path / "a.ckpt", epochs=2)
    assert [m.step for m in callback.history] == [6, 8, 10]
    assert list(logged(trainer, "stability/sharpness")) == [6, 8, 10]


def test_fit_called_twice(tmp_path: Path) -> None:
    """Catches a second fit that measures the optimizer of the first, or counts from zero."""
    callback = StabilityCallback(probe_set(), every=2)
    trainer, net = fitted(tmp_path, [callback], epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, loader(), loader(shuffle=False))
    assert [m.step for m in callback.history] == [2, 4, 6, 8, 10]
    # Another trainer, another run.
    fitted(tmp_path / "again", [callback], epochs=1)
    assert [m.step for m in callback.history] == [2, 4]


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
    """Catches an error of the loss on the probe set that escapes once training runs."""
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
    """Catches a callback that only the package it was made with accepts."""

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
    """A module whose step needs what a hook of training makes, and takes any arguments."""

    def on_train_epoch_start(self) -> None:
        self.weight = torch.ones(2, dtype=self.net[0].weight.dtype)

    def training_step(self, *arguments: Any) -> Tensor:
        (x, y), _ = arguments
        return nn.functional.mse_loss(self.net(x) * self.weight, y)


def test_steps_that_need_the_modules_hooks_and_another_precision(tmp_path: Path) -> None:
    """Catches a probe pass before the module's own hooks, without the index of the batch, or in
    another precision than the batches of training.
    """
    callback = StabilityCallback(probe_set(), every=2)
    fitted(tmp_path, [callback], MadeInAHook, epochs=1, precision="64-true")
    assert callback.margins is not None
    assert callback.margins.failure is None


def test_weights_loaded_after_fit_leave_its_history(tmp_path: Path) -> None:
    """Catches measurements that end with ``trainer.test`` of the best checkpoint."""
    callback = StabilityCallback(probe_set(), every=2)
    fitted(tmp_path, [callback], epochs=1)
    before = list(callback.history)
    callback.load_state_dict({"step": 0})
    assert before
    assert list(callback.history) == before


def test_state_of_fewer_layers_does_not_end_the_run(tmp_path: Path) -> None:
    """Catches a resumed run that stops because layers thawed: only searches start at random."""
    callback = StabilityCallback(probe_set(), every=2)
    fitted(tmp_path, [callback], epochs=1)
    assert callback.monitor is not None
    state = callback.monitor.state_dict()
    state["starts"] = {name: start[..., :-1] for name, start in state["starts"].items()}
    with pytest.warns(RuntimeWarning, match="start at random"):
        callback._restore(callback.monitor, state)
    assert len(callback.history) == len(state["history"])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_training_step_reports_to_the_recorder(tmp_path: Path, micro_batches: int) -> None:
    """Catches a recipe that ends the training before its first batch, losses of the probe set among
    those of batches, and a step that has the loss or the gradient of another.
    """
    seed_all(0)
    callback = StabilityCallback(probe_set(), every=1, recorder=tmp_path)
    module = Reporting()
    module.callback = callback
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[callback],
        accumulate_grad_batches=micro_batches,
        logger=False,
        enable_checkpointing=False,
        **MUTE,
    )
    trainer.fit(module, loader())
    steps = callback.recorder.evidence.steps
    # Five batches in an epoch, whose last step has fewer.
    batches = 2 * [list(range(k, min(k + micro_batches, 5))) for k in range(0, 5, micro_batches)]
    assert [its.batch for its in steps] == batches
    left = iter(module.losses)
    means = [sum(next(left) for _ in group) / len(group) for group in batches]
    assert next(left, None) is None
    # 1e-6: in single precision.
    assert [its.loss for its in steps] == pytest.approx(means, rel=1e-6)
    assert [its.grad_norm for its in steps] == pytest.approx(module.norms, rel=1e-6)
    assert callback.recorder.reports == []


def test_a_resumed_fit_keeps_its_evidence(tmp_path: Path) -> None:
    """Catches a window, and a first loss, that begin at the checkpoint."""
    found = []
    for epochs, resumed in ((1, None), (2, tmp_path / "last.ckpt")):
        callback = StabilityCallback(probe_set(), every=2, recorder=tmp_path)
        module = Reporting()
        module.callback = callback
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            **MUTE,
        )
        trainer.fit(module, loader(), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        found.append(callback.recorder.evidence)
    before, after = found
    assert [its.step for its in after.steps] == list(range(1, 11))
    assert after.steps[:5] == before.steps
    assert after.first_loss == before.first_loss
