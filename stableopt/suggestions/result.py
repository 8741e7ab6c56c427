"""`Suggestions`, `Suggestion`: the stable learning rates that `suggest` returns, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from stableopt._support.deprecation import warn_renamed
from stableopt._support.text_table import aligned

__all__ = ["Suggestion", "Suggestions"]


@dataclass(frozen=True)
class Suggestion:
    """The answer for one optimizer and one batch size.

    Attributes:
        optimizer: ``"SGD"``, ``"SGD, momentum 0.9"``, ``"AdamW"``, or the name of a running optimizer
            of another class.
        batch_size: samples in a step.
        lr: the largest stable learning rate, or an upper bound.
        lower: a learning rate up to which no second moment grows, as for
            :class:`~stableopt.stability.CriticalLR`; ``None`` if none is known.
        exact: whether ``lr`` is the threshold rather than a bound.
        seconds: wall time, without the work that all answers share.
    """

    optimizer: str
    batch_size: int
    lr: float
    lower: float | None
    exact: bool
    seconds: float


@dataclass(frozen=True)
class Suggestions:
    r"""All answers; ``print`` shows a table.

    Attributes:
        rows: one for each optimizer and batch size.
        sharpness: sharpness of the Hessian at the point; ``None`` with ``curvature=False``.
        num_samples: number of samples evaluated.
        seconds: total wall time.
        notes: the assumptions, one sentence each.
        method: how Hessian-vector products were computed.
        one_step: by optimizer, the learning rate from which one full-batch step raises the loss:
            :math:`2/\lambda_c` of :func:`~stableopt.critical_sharpness`, infinite if no rate tried
            does. Keys: ``"SGD"`` and the given optimizer (``"SGD, running"`` for SGD). Empty if it
            cannot take a trial step.
    """

    rows: tuple[Suggestion, ...]
    sharpness: float | None
    num_samples: int
    seconds: float
    notes: tuple[str, ...]
    method: str
    one_step: Mapping[str, float] = field(default_factory=dict)

    def answer(self, optimizer: str, batch_size: int) -> Suggestion:
        """Return the answer for one optimizer and one batch size.

        Raises:
            KeyError: for an optimizer or a batch size without an answer.
        """
        for row in self.rows:
            if (row.optimizer, row.batch_size) == (optimizer, batch_size):
                return row
        raise KeyError(f"no answer for {optimizer!r} at batch size {batch_size}")

    def of(self, optimizer: str, batch_size: int) -> Suggestion:
        """Former name of :meth:`answer`."""
        warn_renamed("Suggestions.of", "Suggestions.answer")
        return self.answer(optimizer, batch_size)

    def __str__(self) -> str:
        names = list(dict.fromkeys([*(row.optimizer for row in self.rows), *self.one_step]))
        sizes = list(dict.fromkeys(row.batch_size for row in self.rows))
        lines = [["batch size", *names]]
        for size in sizes:
            lines.append([str(size), *(_cell(self.answer(name, size)) for name in names)])
        if self.one_step:
            rates = [self.one_step.get(name) for name in names]
            lines.append(["one step", *("–" if lr is None else f"{lr:.3g}" for lr in rates)])
        head = f"Largest linearly stable learning rate, from {self.num_samples} samples"
        cost = f"found in {self.seconds:.1f} s"
        if self.sharpness is not None:
            cost = f"sharpness {self.sharpness:.4g} ({self.method}); {cost}"
        return "\n".join([head, *aligned(lines, flush_left=False), cost, *self.notes])


def _cell(row: Suggestion) -> str:
    return f"{'' if row.exact else '<= '}{row.lr:.3g}"
