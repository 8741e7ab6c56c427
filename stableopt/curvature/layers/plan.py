"""`Plan`: how passes of a problem are recorded; `rows_seen`: which tensors have rows of the samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.problem.data.batches import cut

__all__ = ["Plan", "Rows", "UnitError", "rows_seen", "tensors_of"]


class UnitError(UnfitError):
    """A call that cannot be vectorised over samples; ``parameters`` are the indices of those it uses."""

    def __init__(self, message: str, parameters: set[int]) -> None:
        super().__init__(message)
        self.parameters = parameters


Rows = list[tuple[str, list[bool]]]
"""For each call in a pass, the function's name, and whether each of its tensors has rows of the samples.
The list is empty if the number of tensors depends on the samples."""


@dataclass
class Plan:
    """How a problem's passes are recorded; the trial of the product completes it.

    Attributes:
        rows: the result of :func:`rows_seen` for the samples of the trial; with ``None``, every tensor
            counts as one with sample rows.
        units: modules that are called by vmap over the samples, each with copies of the parameters.
        decisions: the rows of those calls that take a parameter, in order. They hold for every pass,
            while other calls, such as those that make masks, may depend on the samples.
        ways: how each parameter is treated, by index.
        copied: indices of the parameters that have a copy for each sample.
    """

    rows: Rows | None = None
    units: list[nn.Module] = field(default_factory=list)
    decisions: Rows = field(default_factory=list)
    ways: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    copied: set[int] = field(default_factory=set)


def tensors_of(given: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    return [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]


class _CallLister(TorchFunctionMode):
    """Lists the calls in a pass, with the lengths of the tensors that go in and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass the call on."""
        inputs, output = tensors_of((args, kwargs)), function(*args, **(kwargs or {}))
        lengths = [len(t) if t.dim() else 0 for t in (*inputs, *tensors_of(output))]
        self.calls.append((getattr(function, "__name__", ""), lengths))
        return output


def rows_seen(run: Callable[[Any], object], batch: Any, size: int) -> Rows:
    """Return which tensors in a pass of ``batch`` have rows that belong to samples.

    Two passes are compared: without one sample, such tensors are shorter in proportion. The length alone
    would not do, since a constant may have as many rows as there are samples.

    Args:
        run: makes the pass of a batch.
        batch: the samples.
        size: their number, at least 2.

    Raises:
        UnfitError: if the two passes call different functions.
    """
    passes = []
    for count in (size, size - 1):
        part = cut(batch, 0, count)
        with _CallLister() as lister:
            run(part)
        passes.append(lister.calls)
    if [name for name, _ in passes[0]] != [name for name, _ in passes[1]]:
        raise UnfitError("the model calls other functions for other samples")

    def in_proportion(length: int, shorter: int) -> bool:
        return shorter < length and shorter * size == length * (size - 1)

    return [
        (name, list(map(in_proportion, lengths, shorter)) if len(lengths) == len(shorter) else [])
        for (name, lengths), (_, shorter) in zip(*passes, strict=True)
    ]
