"""The callback in Lightning runs that resume from a checkpoint, or are fitted again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import (
    LIGHTNINGS_OWN_WARNINGS,
    Net,
    fitted,
    loader,
    logged,
    probe_set,
    same,
    seed_all,
)
from torch.utils.data import Sampler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch.callbacks import ModelCheckpoint

    from stableopt.integrations.lightning import StabilityCallback

pytestmark = LIGHTNINGS_OWN_WARNINGS


class Resumable(Net):
    """A module that draws the same numbers after a resume: Lightning saves no random state."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_all(self.global_step)


class ShuffledByEpoch(Sampler[int]):
    """A sampler whose order depends on the epoch alone, so that a resumed run repeats it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        return iter(
            torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )


def numbers(history: Any) -> list[dict[str, float]]:
    """Return records without the times."""
    return [{k: v for k, v in m.record().items() if k != "seconds"} for m in history]


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


def test_a_used_callback_continues_no_other_run(tmp_path: Path) -> None:
    """Catches history and steps of an earlier training in a run whose checkpoint has no state."""
    trainer, _ = fitted(tmp_path / "a", [], epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = StabilityCallback(probe_set(), every=2)
    fitted(tmp_path / "b", [callback], epochs=3)
    fitted(tmp_path / "c", [callback], ckpt_path=tmp_path / "a.ckpt", epochs=2)
    assert [m.step for m in callback.history] == [6, 8, 10]


def test_fit_called_twice(tmp_path: Path) -> None:
    """Catches a second fit that measures the first fit's optimizer, or counts steps from zero."""
    callback = StabilityCallback(probe_set(), every=2)
    trainer, net = fitted(tmp_path, [callback], epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, loader(), loader(shuffle=False))
    assert [m.step for m in callback.history] == [2, 4, 6, 8, 10]
    # Another trainer, another run.
    fitted(tmp_path / "again", [callback], epochs=1)
    assert [m.step for m in callback.history] == [2, 4]


def test_weights_loaded_after_fit_leave_its_history(tmp_path: Path) -> None:
    """Catches a history that is lost when ``trainer.test`` loads the best checkpoint."""
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
