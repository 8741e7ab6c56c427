"""Batches, outputs and data sets of all forms."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from hostile_models.blocks import MSE, mlp, next_token_loss, pair, tokens
from hostile_models.parameters import TiedLanguageModel
from hostile_models.setting import Setting, measured


class Reads(nn.Module):
    """Takes its inputs by name, and wraps its output."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda z: z) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, rows: Tensor, scale: Tensor) -> Any:
        return self.wrap(self.inner(rows) * scale)


def named_rows() -> dict[str, Any]:
    rows, targets = pair()
    return {"rows": rows, "scale": torch.rand(6, 1), "targets": targets, "name": "a batch"}


@measured("a dictionary as a batch")
def _dictionary() -> Setting:
    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return MSE(model(batch["rows"], batch["scale"]), batch["targets"])

    return Setting(Reads(), loss, named_rows(), whole=True)


class TakesDictionary(Reads):
    def forward(self, x: dict[str, Tensor]) -> Any:
        return super().forward(x["rows"], x["scale"])


@measured("a dictionary as the inputs")
def _dictionary_inputs() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    return Setting(TakesDictionary(), MSE, (batch, targets))


@dataclass
class Output:
    logits: Tensor
    extra: None = None


@measured("a model that returns a dictionary")
def _returns_dictionary() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    model = TakesDictionary(lambda z: {"logits": z})
    return Setting(model, lambda out, y: MSE(out["logits"], y), (batch, targets))


@measured("a model that returns a dataclass")
def _returns_dataclass() -> Setting:
    batch = named_rows()
    targets = batch.pop("targets")
    model = TakesDictionary(Output)
    return Setting(model, lambda out, y: MSE(out.logits, y), (batch, targets))


@dataclass
class Rows:
    rows: Tensor
    targets: Tensor
    name: str = "a batch"


@measured("a dataclass as a batch")
def _dataclass_batch() -> Setting:
    def loss(model: nn.Module, batch: Rows) -> Tensor:
        return MSE(model(batch.rows), batch.targets)

    return Setting(mlp(), loss, Rows(*pair()), whole=True)


class NamedRows(NamedTuple):
    rows: Tensor
    targets: Tensor


@measured("named tuples as batches")
def _named_tuples() -> Setting:
    def loss(model: nn.Module, batch: NamedRows) -> Tensor:
        return MSE(model(batch.rows), batch.targets)

    batches = [NamedRows(*pair()), NamedRows(*pair(2))]
    return Setting(mlp(), loss, batches, batches, whole=True)


class Encoding(UserDict):
    """A dictionary whose entries are attributes too, as tokenizers return."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class LanguageModelOutput(OrderedDict):
    """A dictionary whose entries are attributes too, as language models return."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class WithOwnLoss(nn.Module):
    """Computes its loss from the labels it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TiedLanguageModel()

    def forward(self, input_ids: Tensor, labels: Tensor) -> LanguageModelOutput:
        logits = self.inner(input_ids)
        return LanguageModelOutput(loss=next_token_loss(logits, labels), logits=logits)


@measured("a loss inside the model")
def _own_loss() -> Setting:
    ids = tokens()
    batch = Encoding(input_ids=ids, labels=ids.roll(-1, 1))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch.input_ids, labels=batch.labels).loss

    return Setting(WithOwnLoss(), loss, batch, whole=True)


@measured("several inputs and targets")
def _several() -> Setting:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), nn.Linear(2, 2)

        def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            z = self.left(x[0])
            return z, self.right(torch.tanh(z) * x[1])

    def loss(out: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return MSE(out[0], y[0]) + F.l1_loss(out[1], y[1])

    (x, y), (_, other) = pair(), pair()
    batches = [((x, y), (y, other))]
    return Setting(Two(), loss, batches, batches)


@measured("a ragged loader")
def _ragged() -> Setting:
    x, y = pair(7)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    return Setting(mlp(), MSE, loader, [(x, y)])


class Stream(IterableDataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.x, self.y, strict=True)))


@measured("a stream that can be read again")
def _stream() -> Setting:
    x, y = pair(5)
    return Setting(mlp(), MSE, DataLoader(Stream(x, y), batch_size=2), [(x, y)])


class Augmented(Dataset):
    """Draws random numbers at every access, so that a reading must restore the generators."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index] + 0.0 * torch.rand(2) * random.random()


@measured("a data set that draws random numbers")
def _augmented() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, Augmented(x, y), [(x, y)])


@measured("inputs that ask for gradients")
def _inputs_with_gradients() -> Setting:
    x, y = pair()
    return Setting(mlp(), MSE, (x.requires_grad_(), y))
