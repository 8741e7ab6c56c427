"""`Plan`: how passes of a problem are recorded; `rows_seen`: which tensors in a pass are of samples."""

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
    """A call cannot be vectorised over the samples; ``parameters`` are the indices of its own."""

    def __init__(self, message: str, parameters: set[int]) -> None:
        super().__init__(message)
        self.parameters = parameters


Rows = list[tuple[str, list[bool]]]
"""For each call in a pass, the function's name, and which of its tensors have rows of the samples."""


@dataclass
class Plan:
    """How a problem's passes are recorded; the trial of the product completes it.

    Attributes:
        seen: of all calls in a pass over the samples of the trial, by :func:`rows_seen`; ``None`` for
            any tensor.
        units: modules that are called for each sample, vectorised, with copies of their parameters.
        decisions: the same of the calls that take a parameter, in any pass: these calls do not depend
            on the samples, while others, such as those that make masks, may.
        ways: how each parameter is treated, by index.
        copied: parameters with copies for each sample.
    """

    seen: Rows | None = None
    units: list[nn.Module] = field(default_factory=list)
    decisions: Rows = field(default_factory=list)
    ways: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    copied: set[int] = field(default_factory=set)


def tensors_of(given: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    return [t for t in tree_flatten(given)[0] if isinstance(t, Tensor)]


class _Look(TorchFunctionMode):
    """Lists the calls in a pass, with the rows of the tensors that go in and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[int]]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass the call on."""
        given, found = tensors_of((args, kwargs)), function(*args, **(kwargs or {}))
        rows = [len(t) if t.dim() else 0 for t in (*given, *tensors_of(found))]
        self.calls.append((getattr(function, "__name__", ""), rows))
        return found


def rows_seen(run: Callable[[Any], object], batch: Any, size: int) -> Rows:
    """Return which tensors in a pass of ``batch`` have rows of its samples.

    With one sample fewer they have fewer rows. Constants, too, may have as many as there are samples.

    Args:
        run: makes the pass of a batch.
        batch: the samples.
        size: their number, at least 2.

    Raises:
        UnfitError: if other functions are called with one sample fewer.
    """
    looks = []
    for count in (size, size - 1):
        part = cut(batch, 0, count)
        with _Look() as look:
            run(part)
        looks.append(look.calls)
    if [name for name, _ in looks[0]] != [name for name, _ in looks[1]]:
        raise UnfitError("the model calls other functions for other samples")
    return [
        (
            name,
            [
                few < most and few * size == most * (size - 1)
                for most, few in zip(all_, fewer, strict=True)
            ],
        )
        for (name, all_), (_, fewer) in zip(*looks, strict=True)
    ]
