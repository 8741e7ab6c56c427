"""Lightning runs for tests: a small module, its loaders, and what a run has logged."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

LIGHTNINGS_OWN_WARNINGS = [
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


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


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
