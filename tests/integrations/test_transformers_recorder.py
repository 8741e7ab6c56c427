"""The flight recorder of the callback, in runs of transformers.Trainer that report their losses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_runs import TRAINERS_OWN_WARNINGS, batch, trainer_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainerCallback

    from stableopt.integrations.transformers import StabilityCallback

pytestmark = TRAINERS_OWN_WARNINGS


def reporting_trainer(callback: StabilityCallback, *args: Any, **options: Any) -> Trainer:
    """Return a trainer that reports its losses, as docs/diagnosing.md says."""

    class Reporting(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            callback.recorder.loss(loss * self.current_gradient_accumulation_steps)
            return loss

    made = trainer_in(*args, [callback], **options)
    made.__class__ = Reporting
    return made


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_recorder_that_the_callback_makes(tmp_path: Path, micro_batches: int) -> None:
    """Catches a recorder that is missing during training or never closed, and scaled micro-batch losses.

    The oracle is the trainer's log. A step at the end of an epoch has fewer micro-batches.
    """
    with pytest.raises(TypeError, match="recorder=3"):
        StabilityCallback(batch(), recorder=3)
    callback = StabilityCallback(batch(), every=4, recorder=tmp_path / "reports")
    assert callback.recorder is None
    made = reporting_trainer(
        callback, tmp_path / "run", gradient_accumulation_steps=micro_batches, logging_steps=1
    )
    made.train()
    steps = callback.recorder.evidence.steps
    assert [step.step for step in steps] == list(range(1, 13))
    logged = [log["loss"] for log in made.state.log_history if "loss" in log]
    # 1e-4: the trainer may round what it logs.
    assert [step.loss for step in steps] == pytest.approx(logged, abs=1e-4)
    assert callback.recorder.reports == []
    assert callback.recorder not in callback.monitor.sinks


def test_an_error_in_training_closes_the_recorder(tmp_path: Path) -> None:
    """Catches a recorder that does not check the last steps before an error."""
    callback = StabilityCallback(batch(), every=50, recorder=tmp_path / "reports")
    made = reporting_trainer(callback, tmp_path / "run")

    class Failing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                callback.recorder.loss(torch.nan)
            if state.global_step == 7:
                raise ArithmeticError

    made.add_callback(Failing())
    callback.attach(made)  # a second time
    with pytest.raises(ArithmeticError):
        made.train()
    assert [path.name for path in callback.recorder.reports] == ["step-7"]
    assert callback.monitor.sinks[1:] == []
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_resumed_run_keeps_its_evidence(tmp_path: Path) -> None:
    """Catches a window, and a first loss, that begin at the checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    whole = StabilityCallback(batch(8), every=2, recorder=tmp_path / "reports")
    reporting_trainer(whole, tmp_path / "run", max_steps=4, **options).train()
    callback = StabilityCallback(batch(8), every=2, recorder=tmp_path / "reports")
    reporting_trainer(callback, tmp_path / "run", max_steps=6, **options).train(
        resume_from_checkpoint=True
    )
    before, after = whole.recorder.evidence, callback.recorder.evidence
    assert [step.step for step in after.steps] == [1, 2, 3, 4, 5, 6]
    assert after.steps[:4] == before.steps
    assert [step.step for step in after.measured] == [2, 4, 6]
    assert after.first_loss == before.first_loss
    callback = StabilityCallback(batch(8), every=2, recorder=tmp_path / "reports")
    path = tmp_path / "run" / "checkpoint-4" / "stability.pt"
    torch.save({**torch.load(path, weights_only=True), "recorder": {}}, path)
    with pytest.warns(
        RuntimeWarning, match="starts without evidence of the run before: ValueError"
    ):
        reporting_trainer(callback, tmp_path / "run", max_steps=5, **options).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4")
        )
    assert [m.step for m in callback.history] == [2, 4]
