"""Runs of transformers.Trainer for tests: a small model, its texts, and what a run leaves behind."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

TRAINERS_OWN_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Pinned memory without a GPU.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class Texts(Dataset):
    """Rows of random words, some of them shorter, as a language model's collator has them."""

    def __init__(self, n: int = 16) -> None:
        self.words = torch.randint(12, (n, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.words[index]}


def batch(n: int = 16) -> dict[str, Tensor]:
    words = Texts(n).words
    return {"input_ids": words, "labels": words}


def language_model() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=12, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    assert config.resid_pdrop == 0.1  # dropout is on
    return GPT2LMHeadModel(config)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def trainer_in(
    folder: Path, callbacks: Any = (), model: nn.Module | None = None, **options: Any
) -> Trainer:
    seed_all(0)
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **arguments)
    model = language_model() if model is None else model
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    for callback in callbacks:
        callback.attach(trainer)
    return trainer


def state_of(trainer: Trainer) -> list[Any]:
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return [
        *trainer.model.state_dict().values(),
        *(t for s in trainer.optimizer.state_dict()["state"].values() for t in s.values()),
        torch.get_rng_state(),
        torch.tensor(losses, dtype=torch.float64),
        np.random.get_state()[1],  # noqa: NPY002
        np.array(random.getstate()[1]),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def numbers(history: Any) -> list[dict[str, float]]:
    """Return records without the times."""
    return [{k: v for k, v in m.record().items() if k != "seconds"} for m in history]
