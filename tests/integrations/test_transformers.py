"""The callback in real runs of transformers.Trainer, compared with the same runs without it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trainer_runs import (
    TRAINERS_OWN_WARNINGS,
    Texts,
    batch,
    language_model,
    numbers,
    same,
    state_of,
    trainer_in,
)

import stableopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
    )

    from stableopt.integrations.transformers import StabilityCallback

pytestmark = TRAINERS_OWN_WARNINGS


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_run_is_the_run_without_it(tmp_path: Path, accumulate: int) -> None:
    """Catches a callback that draws random numbers, changes a mode, or loses a loss."""
    ends = []
    quantities = ("sharpness", "batch_sharpness")
    callback = StabilityCallback(batch(8), every=3, quantities=quantities, dataset_size=16)
    for name, callbacks in (("with", [callback]), ("without", [])):
        trainer = trainer_in(
            tmp_path / name, callbacks, gradient_accumulation_steps=accumulate, max_steps=8
        )
        trainer.train()
        ends.append(state_of(trainer))
        assert len(ends[-1][-3]) == 2  # losses
    assert same(*ends)
    assert [m.step for m in callback.history] == [3, 6]
    assert all(m.failure is None for m in callback.history)
    assert callback.margins.batch_size == 4 * accumulate


def shown(trainer: Trainer, name: str) -> dict[int, float]:
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_margins_reach_what_the_trainer_reports_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches margins that do not reach the trainer's reports, or are shown at another step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = tmp_path / "runs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(runs))
    callback = StabilityCallback(batch(8), every=4)
    trainer = trainer_in(tmp_path, [callback], report_to="tensorboard")
    trainer.train()
    expected = {m.step: m.edge_ratio for m in callback.history}
    name = "stability/preconditioned_sharpness_ratio"
    assert list(expected) == [4, 8, 12]
    assert shown(trainer, name) == expected
    (path,) = runs.rglob("events*")
    events = EventAccumulator(str(path)).Reload()
    scalars = {e.step: e.value for e in events.Scalars(f"train/{name}")}
    assert scalars == pytest.approx(expected, rel=1e-6)  # single precision
    assert {e.step for e in events.Scalars("train/loss")} == {3, 6, 9, 12}


def test_without_being_attached_margins_are_in_the_history(tmp_path: Path) -> None:
    """Catches a callback that needs the trainer for more than reporting."""
    callback = StabilityCallback(Texts(8), every=4)
    trainer = trainer_in(tmp_path)
    trainer.add_callback(callback)
    trainer.train()
    expected = {m.step: m.sharpness for m in callback.history}
    assert list(expected) == [4, 8, 12]
    assert shown(trainer, "stability/sharpness") == expected
    assert list(shown(trainer, "loss")) == [3, 6, 9, 12]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("stop", [4, 6])  # at the end of an epoch, and in the middle of one
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, elsewhere: bool) -> None:
    """Catches state that a checkpoint lacks, or that is looked for in the wrong place."""
    # The trainer forgets losses that it has summed but not yet logged.
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 2}

    def callback(**more: Any) -> StabilityCallback:
        return StabilityCallback(batch(8), every=3, cold_every=3, **more)

    whole = callback()
    straight = trainer_in(tmp_path / "whole", [whole], **options)
    straight.train()
    first = trainer_in(tmp_path / "part", [callback()], **options)
    first.add_callback(StopAt(stop))
    first.train()
    checkpoint = str(tmp_path / "part" / f"checkpoint-{stop}")
    folder = tmp_path / ("rest" if elsewhere else "part")
    rest = callback(resume_from_checkpoint=checkpoint) if elsewhere else callback()
    resumed = trainer_in(folder, [rest], **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(state_of(straight), state_of(resumed))
    assert numbers(rest.history) == numbers(whole.history)
    name = "stability/sharpness"
    assert shown(resumed, name) == shown(straight, name)


def test_a_checkpoint_from_before_the_callback(tmp_path: Path) -> None:
    """Catches a silent loss of the state, and margins whose steps are not the trainer's."""
    options = {"save_strategy": "steps", "save_steps": 4}
    first = trainer_in(tmp_path, **options)
    first.add_callback(StopAt(4))
    first.train()
    callback = StabilityCallback(batch(8), every=3)
    resumed = trainer_in(tmp_path, [callback], **options)
    with pytest.warns(RuntimeWarning, match=r"without a state of the margins.*checkpoint-4"):
        resumed.train(resume_from_checkpoint=True)
    assert [m.step for m in callback.history] == [6, 9, 12]


def test_margins_go_to_the_trainer_that_trains(tmp_path: Path) -> None:
    """Catches margins of a trainer in the log of the one to which the callback was attached last."""
    callback = StabilityCallback(batch(), every=2)
    first, second = (trainer_in(tmp_path / name, [callback], max_steps=4) for name in "ab")
    for trainer, other in ((second, first), (first, second)):
        before = len(other.state.log_history)
        trainer.train()
        assert [
            log["step"] for log in trainer.state.log_history if "stability/sharpness" in log
        ] == [
            2,
            4,
        ]
        assert len(other.state.log_history) == before


def test_trained_twice(tmp_path: Path) -> None:
    """Catches a second training with two active monitors, or with steps counted from the first."""
    callback = StabilityCallback(batch(8), every=4)
    trainer = trainer_in(tmp_path, [callback], max_steps=4)
    callback.attach(trainer)  # again, which changes nothing
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    former = callback.monitor
    trainer.train()
    assert former.step == 4
    assert [m.step for m in callback.history] == [4]
    assert not callback.monitor._handles


class Bare(nn.Module):
    """A model that returns no loss, with what Trainer needs to know of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 4), nn.Linear(4, 12)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(input_ids))}


def test_what_cannot_be_measured_is_an_error_that_helps(tmp_path: Path) -> None:
    """Catches errors that do not speak of the callback, and errors after training has begun."""
    with pytest.raises(TypeError, match="data=None: expected the probe set"):
        StabilityCallback(None)
    with pytest.raises(TypeError, match="batch_loss='mse': expected a function"):
        StabilityCallback(batch(), "mse")
    with pytest.raises(TypeError, match=r"expected a transformers\.Trainer"):
        StabilityCallback(batch()).attach("trainer")
    for options, callback, error, message in (
        ({"model": Bare()}, StabilityCallback(batch()), TypeError, "returned no loss.*'logits'"),
        ({}, StabilityCallback([(torch.ones(2), torch.ones(2))]), TypeError, "a dictionary of"),
        (
            {"label_smoothing_factor": 0.1},
            StabilityCallback(batch()),
            ValueError,
            "batch_loss=None",
        ),
    ):
        trainer = trainer_in(tmp_path, [callback], **options)
        with pytest.raises(error, match=message):
            trainer.train()
        assert callback.monitor is None

    class OwnLoss(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("training went on")

    trainer = trainer_in(tmp_path, [StabilityCallback(batch())])
    trainer.__class__ = OwnLoss
    with pytest.raises(ValueError, match="has its compute_loss: expected batch_loss"):
        trainer.train()
    trainer = trainer_in(tmp_path, [StabilityCallback(batch())])
    trainer.compute_loss_func = nn.functional.cross_entropy
    with pytest.raises(ValueError, match="has its compute_loss_func: expected batch_loss"):
        trainer.train()


def test_a_loss_of_the_users_own(tmp_path: Path) -> None:
    """Catches a loss that is ignored, and options that do not reach the monitor."""

    def smoothed_loss(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"])["logits"]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1
        )

    callback = StabilityCallback(
        batch(8), smoothed_loss, every=4, chunk_size=4, dtype=torch.float64
    )
    trainer = trainer_in(tmp_path, [callback], label_smoothing_factor=0.1, max_steps=4)
    trainer.train()
    assert callback.margins.failure is None
    assert callback.monitor.problem.loss_fn is None
    assert callback.monitor.problem.dtype == torch.float64


def test_nothing_about_measuring_ends_the_training(tmp_path: Path) -> None:
    """Catches a failing measurement, report or sink that escapes."""

    class Fragile(Trainer):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            if any(name.startswith("stability/") for name in logs):
                raise ConnectionError("no route to host")
            super().log(logs, *args)

    def flaky(model: Any, batch: Any) -> Tensor:
        if gone:
            raise RuntimeError("the file is gone")
        return model(**batch)["loss"]

    gone: list[int] = []
    callback = StabilityCallback(batch(4), flaky, every=4, sinks=[lambda *_: gone.append(1)])
    trainer = trainer_in(tmp_path, [callback])
    trainer.__class__ = Fragile
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = " ".join(str(w.message) for w in caught)
    assert "no route to host" in messages
    assert "the file is gone" in messages
    assert trainer.state.global_step == 12
    assert [m.failure is None for m in callback.history] == [True, False, False]
    assert list(shown(trainer, "loss")) == [3, 6, 9, 12]


def test_the_checkpoint_is_readable_without_the_callback(tmp_path: Path) -> None:
    """Catches monitor state in the trainer's own files, or state that JSON cannot hold."""
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_in(tmp_path, [StabilityCallback(batch(8), every=2)], **options, max_steps=4).train()
    folder = tmp_path / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert "StabilityCallback" not in state["stateful_callbacks"]
    monitor_state = torch.load(folder / "stability.pt", weights_only=True)
    assert [margins["step"] for margins in monitor_state["history"]] == [2, 4]
    trainer = trainer_in(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 12


def test_any_optimizer_that_the_monitor_takes(tmp_path: Path) -> None:
    """Catches a rule read from Accelerate's wrapper, and steps that are counted twice."""
    model = language_model()
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.5)
    callback = StabilityCallback(batch(8), every=4)
    trainer = trainer_in(tmp_path, [callback], model, lr_scheduler_type="constant")
    trainer.optimizer = optimizer
    trainer.train()
    assert callback.monitor.optimizer is optimizer
    assert callback.margins.sharpness_limit == pytest.approx(2 * 1.5 / 0.05)


class Streamed(IterableDataset):
    """The same rows, without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Texts()[k] for k in range(16))


@pytest.mark.parametrize("rows", [Texts(), [Texts()[k] for k in range(16)]], ids=["own", "list"])
def test_the_training_set_is_a_probe_set(tmp_path: Path, rows: Any) -> None:
    """Catches rows of the training set used as batches."""
    callback = StabilityCallback(rows, every=2)
    trainer = trainer_in(tmp_path, [callback], max_steps=2)
    trainer.train_dataset = rows
    trainer.train()
    reference = StabilityCallback(batch(16), every=2)
    trainer_in(tmp_path, [reference], max_steps=2).train()
    # The same samples, in chunks of another size.
    assert callback.margins.sharpness == pytest.approx(reference.margins.sharpness, rel=1e-2)


def test_a_streamed_training_set_is_a_probe_set(tmp_path: Path) -> None:
    """Catches a check of the rows that needs their number."""
    rows = Streamed()
    callback = StabilityCallback(rows, every=2)
    trainer = trainer_in(tmp_path, [callback], max_steps=2)
    trainer.train_dataset = rows
    trainer.train()
    problem = stableopt.Problem.from_batch_loss(
        trainer.model, lambda model, rows: model(**rows).loss, batch(16)
    )
    expected = stableopt.measure(problem, lr=1.0, quantities=("sharpness",)).sharpness
    assert callback.margins.sharpness == pytest.approx(expected, rel=1e-2)


def test_a_collator_that_joins_rows_makes_samples_as_in_training(tmp_path: Path) -> None:
    """Catches a probe whose samples are eight batches of training joined: B is in other units."""
    rows = [{"input_ids": words.tolist()} for words in Texts(64).words]
    joining = DataCollatorWithFlattening()

    def hidden(features: Any) -> dict[str, Any]:
        return {k: v for k, v in joining(features).items() if isinstance(v, Tensor)}

    for collate, samples in ((joining, 16), (hidden, 2)):
        callback = StabilityCallback(rows, every=2)
        trainer = trainer_in(tmp_path, [callback], max_steps=2)
        trainer.model.config.n_positions = 8
        trainer.train_dataset, trainer.data_collator = rows, collate
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        texts = [str(w.message) for w in caught if "collator makes" in str(w.message)]
        assert callback.monitor.problem.num_samples == samples
        assert callback.monitor.batch_size == 1
        assert texts == ([] if collate is joining else [mock.ANY])


def test_files_have_names_of_their_own(tmp_path: Path) -> None:
    """Catches a prefix that overwrites the optimizer's file, leaves the folder, or is there twice."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    names = ["optimizer", "../mine", "train/stability"]
    callbacks = [StabilityCallback(batch(8), every=2, prefix=name) for name in names]
    trainer_in(tmp_path, callbacks, **options).train()
    files = {path.name for path in (tmp_path / "checkpoint-2").glob("stability*")}
    assert files == {
        "stability-optimizer.pt",
        "stability-___mine.pt",
        "stability-train_stability.pt",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    first, second = (StabilityCallback(batch(8), every=each) for each in (1, 2))
    with pytest.raises(ValueError, match="another callback"):
        trainer_in(tmp_path, [first, second])


def test_a_broken_state_does_not_end_the_run(tmp_path: Path) -> None:
    """Catches a resumed run that stops because half of the margins' file is missing."""
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_in(tmp_path, [StabilityCallback(batch(8), every=2)], max_steps=2, **options).train()
    (tmp_path / "checkpoint-2" / "stability.pt").write_bytes(b"half")
    callback = StabilityCallback(batch(8), every=2)
    with pytest.warns(RuntimeWarning, match="was not read"):
        trainer_in(tmp_path, [callback], max_steps=4, **options).train(resume_from_checkpoint=True)
    assert [m.step for m in callback.history] == [4]
