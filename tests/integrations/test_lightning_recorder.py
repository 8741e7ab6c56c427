"""The flight recorder of the callback, in Lightning runs that report their losses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import (
    LIGHTNINGS_OWN_WARNINGS,
    MUTE,
    Net,
    loader,
    probe_set,
    seed_all,
)
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    from stableopt.curvature.isolation.isolated import measuring
    from stableopt.integrations.lightning import StabilityCallback

pytestmark = LIGHTNINGS_OWN_WARNINGS


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


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_training_step_reports_to_the_recorder(tmp_path: Path, micro_batches: int) -> None:
    """Catches a documented recipe that fails, and probe-set losses recorded as those of batches.

    Also catches a step with the loss or the gradient norm of another step.
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
    assert [step.batch for step in steps] == batches
    left = iter(module.losses)
    means = [sum(next(left) for _ in group) / len(group) for group in batches]
    assert next(left, None) is None
    # 1e-6: in single precision.
    assert [step.loss for step in steps] == pytest.approx(means, rel=1e-6)
    assert [step.grad_norm for step in steps] == pytest.approx(module.norms, rel=1e-6)
    assert callback.recorder.reports == []


def test_a_resumed_fit_keeps_its_evidence(tmp_path: Path) -> None:
    """Catches a window, and a first loss, that begin at the checkpoint."""
    evidences = []
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
        evidences.append(callback.recorder.evidence)
    before, after = evidences
    assert [step.step for step in after.steps] == list(range(1, 11))
    assert after.steps[:5] == before.steps
    assert after.first_loss == before.first_loss
