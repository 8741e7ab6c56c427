"""Recurrent networks, packed sequences, and state carried from call to call."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from hostile_models.blocks import MSE, pair, sequences
from hostile_models.setting import Setting, measured


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], hidden: int = 2, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(2, hidden, batch_first=True, **options)
        self.head = nn.Linear(hidden * (2 if self.rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@measured("LSTM")
def _lstm() -> Setting:
    return Setting(Recurrent(nn.LSTM), MSE, sequences(3, 3, 2))


@measured("GRU")
def _gru() -> Setting:
    return Setting(Recurrent(nn.GRU), MSE, sequences(3, 3, 2))


@measured("deep bidirectional LSTM with dropout")
def _deep_lstm() -> Setting:
    model = Recurrent(nn.LSTM, hidden=1, num_layers=2, bidirectional=True, dropout=0.3)
    return Setting(model, MSE, sequences(2, 2, 2))


class Packed(Recurrent):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        packed = rnn.pack_padded_sequence(
            x["rows"], x["lengths"].cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.rnn(packed)
        return self.head(hidden[-1])


@measured("packed sequences")
def _packed() -> Setting:
    x = {"rows": torch.randn(4, 5, 2), "lengths": torch.tensor([5, 2, 3, 4])}
    return Setting(Packed(nn.LSTM), MSE, (x, torch.randn(4, 2)))


class Stateful(nn.Module):
    """Carries its hidden state from call to call, as truncated backpropagation through time does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)
        self.hidden: Tensor | None = None
        self.count = torch.zeros(())
        self.seen: list[float] = []
        self.latest: deque[float] = deque([1.0], maxlen=1)
        self.statistics = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, None)
        self.count += 1
        self.seen.append(float(x.sum()))
        self.latest.append(float(x.sum()))
        self.statistics["calls"] += 1
        return self.head(self.hidden)


@measured("state in attributes, lists and plain tensors")
def _stateful() -> Setting:
    return Setting(Stateful(), MSE, pair())


@measured("connectionist temporal classification", "central differences")
def _ctc() -> Setting:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).log_softmax(-1)

    def loss(logs: Tensor, y: Tensor) -> Tensor:
        size, steps = logs.shape[:2]
        lengths = torch.full((size,), steps), torch.full((size,), y.shape[1])
        # Its mean divides by the lengths of the targets, which are all the same here.
        return F.ctc_loss(logs.transpose(0, 1), y, *lengths)

    return Setting(Speech(), loss, (torch.randn(3, 6, 4), torch.randint(1, 4, (3, 2))))


@measured("a recurrent weight used many times")
def _reused() -> Setting:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return self.head(x)

    return Setting(Unrolled(), MSE, pair())
