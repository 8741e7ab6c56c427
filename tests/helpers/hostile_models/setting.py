"""`Setting`: one thing to measure, and the tables `MEASURED` and `REFUSED` of their builders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Setting:
    """One thing to measure.

    Attributes:
        model: the model as the user holds it.
        loss: ``loss(outputs, targets)``, or ``loss(model, batch)`` where ``whole`` is set.
        data: the data as the user passes them.
        batches: the same data as a list of batches, for the reference.
        whole: whether the loss takes the model and a whole batch.
        params: which parameters count; all trainable ones if ``None``.
        options: of ``Problem``.
        around: the context in which it is measured.
    """

    model: nn.Module
    loss: Any
    data: Any
    batches: list[Any] = field(default_factory=list)
    whole: bool = False
    params: Callable[[nn.Module], list[nn.Parameter]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] = contextlib.nullcontext

    def batch_loss(self, batch: Any) -> Tensor:
        """Return the loss of one batch as a user's training loop computes it."""
        if self.whole:
            return self.loss(self.model, batch)
        x, y = batch
        return self.loss(self.model(x), y)

    def read(self) -> list[Any]:
        """Return the batches of the data."""
        return self.batches or [self.data]


MEASURED: dict[str, tuple[Callable[[], Setting], str]] = {}
"""Builder, and what ``margins.method`` must be, by name."""

REFUSED: dict[str, tuple[Callable[[], Setting], str]] = {}
"""Builder, and what the error, or the reason of the failure, must match."""


def measured(name: str, method: str = "double backward") -> Callable[..., Any]:
    """Enter a builder that can be measured, with the method that must be reported."""

    def enter(build: Callable[[], Setting]) -> Callable[[], Setting]:
        assert name not in MEASURED
        MEASURED[name] = (build, method)
        return build

    return enter


def refused(name: str, match: str) -> Callable[..., Any]:
    """Enter a builder that cannot be measured, with the reason that must be given."""

    def enter(build: Callable[[], Setting]) -> Callable[[], Setting]:
        assert name not in REFUSED
        REFUSED[name] = (build, match)
        return build

    return enter
