r"""`EqualWeights`, `LossWeights`, `GivenWeights`: weighted losses as plain means over samples.

A loss that averages with weights,

.. math:: f = \frac{\sum_i w_i f_i}{\sum_i w_i} = \frac1n\sum_i \tilde f_i,
    \qquad \tilde f_i = \frac{n\,w_i}{\sum_j w_j} f_i,

is the plain mean of the :math:`\tilde f_i`. A problem evaluates every chunk as the mean of its
:math:`\tilde f_i`, so that the Hessian, the covariance and the critical learning rate belong to the same
n functions, for any chunks and ranks. Three examples::

    Problem(model, nn.CrossEntropyLoss(weight=w), (x, y))    # read from the call of torch's loss
    Problem(model, nn.CrossEntropyLoss(), (x, y))            # targets of -100 have weight zero
    Problem(model, own_loss, (x, y), sample_weight=lambda batch: mask_of(batch[1]).sum(1))

Calls of torch's losses are intercepted, also within a function or a model that computes its own loss. If
a loss adds several weighted means, each has its own weights.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stableopt._support.arguments import shown
from stableopt.curvature.problem.data.batches import map_tensors, sample_count, tensors_in

__all__ = [
    "EqualWeights",
    "GivenWeights",
    "LossWeights",
    "SampleWeights",
    "WeightedMean",
    "WeightedMeans",
    "form_of",
]

_OF_CLASSES = (
    nn.functional.cross_entropy,
    nn.functional.nll_loss,
    *filter(None, [getattr(nn.functional, "linear_cross_entropy", None)]),
)
"""Losses of class indices: ``weight`` has a weight for each class, and ``ignore_index`` weight zero."""

_OF_ENTRIES = (nn.functional.mse_loss, nn.functional.l1_loss, nn.functional.huber_loss)
"""Losses whose ``weight``, since torch 2.7, has a weight for each entry."""


@dataclass(frozen=True)
class WeightedMean:
    """A call of one of torch's losses that divides by a sum of weights.

    >>> means = WeightedMeans(lambda number, mean: mean.value())
    >>> with means:
    ...     _ = nn.functional.cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
    >>> [float(mean.total()) for mean in means.seen]
    [2.0]
    """

    function: Callable[..., Tensor]
    arguments: dict[str, Any]

    @classmethod
    def of_call(
        cls, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> WeightedMean | None:
        """Return the weighted mean that a call computes, or ``None`` if it computes none."""
        if function not in _OF_CLASSES and function not in _OF_ENTRIES:
            return None
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        deprecated = [arguments.get(name) for name in ("size_average", "reduce")]
        if arguments["reduction"] != "mean" or any(value is not None for value in deprecated):
            return None
        if function in _OF_ENTRIES:
            return cls(function, arguments) if arguments.get("weight") is not None else None
        # With probabilities as targets the mean is not weighted.
        return None if arguments["target"].is_floating_point() else cls(function, arguments)

    def detached(self) -> WeightedMean:
        """Return the same mean of detached arguments."""
        arguments = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        return WeightedMean(self.function, arguments)

    @property
    def ignore_index(self) -> int | None:
        """The target that is ignored, if there is one."""
        return self.arguments.get("ignore_index")

    @property
    def weighs(self) -> bool:
        """Whether weights are given."""
        return self.arguments["weight"] is not None

    @property
    def entries(self) -> int:
        """Number of targets."""
        return int(self.arguments["target"].numel())

    def value(self) -> Tensor:
        """Return the weighted mean."""
        value: Tensor = self.function(**self.arguments)
        return value

    def sum(self) -> Tensor:
        """Return the weighted sum: the mean without its division."""
        value: Tensor = self.function(**{**self.arguments, "reduction": "sum"})
        return value

    def total(self) -> Tensor:
        """Return the sum of the weights, in double precision."""
        weight: Tensor | None = self.arguments["weight"]
        target: Tensor = self.arguments["target"]
        if self.function in _OF_ENTRIES and weight is not None:
            return weight.detach().sum(dtype=torch.float64)
        counted = target.ne(self.arguments["ignore_index"])
        if weight is None:
            return counted.sum().double()
        return weight.detach().double()[target[counted].long()].sum()


class WeightedMeans(TorchFunctionMode):
    """Context in which ``replace(index, mean)`` computes torch's weighted means.

    Attributes:
        seen: the means so far; ``index`` counts them.
    """

    def __init__(self, replace: Callable[[int, WeightedMean], Tensor]) -> None:
        super().__init__()
        self._replace = replace
        self.seen: list[WeightedMean] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``function``, or ``replace`` for a weighted mean."""
        mean = WeightedMean.of_call(function, args, kwargs or {})
        if mean is None:
            return function(*args, **(kwargs or {}))
        self.seen.append(mean)
        return self._replace(len(self.seen) - 1, mean)


class SampleWeights(abc.ABC):
    """The weights of the samples in a loss."""

    def attached(self, batch: Any, start: int, size: int) -> Any:
        """Return the batch of samples ``start`` to ``start + size`` with their weights, if needed."""
        return batch

    @abc.abstractmethod
    def mean(
        self, evaluate: Callable[[Any], Tensor], batch: Any, *, in_loss: bool = False
    ) -> Tensor:
        r"""Return the mean of the samples' :math:`\tilde f_i`.

        Args:
            evaluate: returns the loss of a batch.
            batch: a batch with its weights.
            in_loss: whether ``evaluate`` calls only ``loss_fn``, and not the model.
        """


class EqualWeights(SampleWeights):
    """A loss that is a plain mean over its samples."""

    def mean(
        self, evaluate: Callable[[Any], Tensor], batch: Any, *, in_loss: bool = False
    ) -> Tensor:
        r"""Return the loss of the batch, which is the mean of the samples' :math:`\tilde f_i`."""
        return evaluate(batch)


@dataclass(frozen=True)
class LossWeights(SampleWeights):
    """The weights that torch's losses take from classes and targets.

    Attributes:
        means: the average weight of a sample, for each weighted mean in the loss.
        in_model: how many of these means the model takes before ``loss_fn``.

    >>> weights = LossWeights((1.5,))                            # classes with weights 1 and 2
    >>> loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), label_smoothing=0.0)
    >>> batch = torch.zeros(1, 2), torch.tensor([1])
    >>> round(float(weights.mean(lambda batch: loss(*batch), batch)), 4)     # 2 / 1.5 log 2
    0.9242
    """

    means: tuple[float, ...]
    in_model: int = 0

    def mean(
        self, evaluate: Callable[[Any], Tensor], batch: Any, *, in_loss: bool = False
    ) -> Tensor:
        r"""Return the mean of the samples' :math:`\tilde f_i`."""
        size, before = sample_count(batch), self.in_model if in_loss else 0

        def over_samples(index: int, mean: WeightedMean) -> Tensor:
            # From the sum: the mean divides by zero if all samples of a batch have weight zero.
            return mean.sum() / (size * self.means[before + index])

        with WeightedMeans(over_samples):
            return evaluate(batch)


class _WeightedPair(NamedTuple):
    x: Any
    y: Any
    weight: Tensor


class _WeightedBatch(NamedTuple):
    batch: Any
    weight: Tensor


@dataclass(frozen=True)
class GivenWeights(SampleWeights):
    """The user's weights, for a loss that divides by their sum over a batch.

    Attributes:
        given: the samples' weights ``(n,)``, or a function of a batch that returns them.
        paired: whether batches are pairs.
        average: the average weight of a sample.
        stand_ins: samples with a positive weight, by :func:`form_of`, if some sample has weight zero.
            They replace batches without weight, whose loss is 0/0; their own loss is then multiplied by
            zero. Each batch is copied for that.

    >>> weights = GivenWeights(torch.tensor([1.0, 3.0]), paired=True, average=2.0)
    >>> batch = weights.attached((torch.ones(1), torch.zeros(1)), 1, 1)
    >>> float(weights.mean(lambda batch: (batch[0] - batch[1]).mean(), batch))
    1.5
    """

    given: Tensor | Callable[[Any], Tensor]
    paired: bool
    average: float = 1.0
    stand_ins: Mapping[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.given, Tensor) and not callable(self.given):
            raise TypeError(
                f"sample_weight={shown(self.given)}: expected a tensor with a weight for each sample,"
                " or a function of a batch that returns one"
            )

    def check_number(self, n: int) -> None:
        """Raise ``ValueError`` unless a tensor of weights has length ``n``."""
        if isinstance(self.given, Tensor) and self.given.shape != (n,):
            raise ValueError(
                f"sample_weight has shape {tuple(self.given.shape)}: expected ({n},), a weight for each"
                " sample of data, in its order"
            )

    def attached(self, batch: Any, start: int, size: int) -> Any:
        """Return the batch with its weights.

        Raises:
            ValueError: for a wrong number of weights, or weights that are negative or not finite.
            TypeError: if the function does not return a tensor.
        """
        weight = self._of(batch, start, size).detach()
        if weight.shape != (size,):
            raise ValueError(
                f"sample_weight gives weights of shape {tuple(weight.shape)} for samples {start} to"
                f" {start + size - 1}: expected ({size},), a weight for each sample"
            )
        if bool((weight < 0).any()) or not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"sample_weight gives weights from {float(weight.min()):.6g} to"
                f" {float(weight.max()):.6g}: expected finite weights that are not negative"
            )
        device = next((t.device for t in tensors_in(batch)), weight.device)
        weight = weight.to(device=device, dtype=torch.float64)
        return (
            _WeightedPair(batch[0], batch[1], weight)
            if self.paired
            else _WeightedBatch(batch, weight)
        )

    def _of(self, batch: Any, start: int, size: int) -> Tensor:
        if isinstance(self.given, Tensor):
            return self.given[start : start + size] if self.given.dim() == 1 else self.given
        weight = self.given(batch)
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"sample_weight returned {type(weight).__name__}: expected a tensor with a weight for"
                " each sample of the batch"
            )
        return weight

    def mean(
        self, evaluate: Callable[[Any], Tensor], batch: Any, *, in_loss: bool = False
    ) -> Tensor:
        r"""Return the mean of the samples' :math:`\tilde f_i`."""
        weight: Tensor = batch.weight
        if self.stand_ins:
            batch = _with_weight(batch, self.stand_ins.get(form_of(batch)))
        loss = evaluate(batch if self.paired else batch.batch)
        return loss * (weight.mean() / self.average).to(loss.dtype)


def form_of(batch: Any) -> tuple[Any, ...]:
    """Return what the batches have in common in which one sample can replace another.

    >>> form_of((torch.zeros(3, 2), torch.tensor(1.0))) == form_of((torch.ones(1, 2), torch.tensor(2.0)))
    True
    """
    return tuple(t.shape[1:] if t.dim() else None for t in tensors_in(batch))


def _with_weight(batch: Any, stand_in: Any | None) -> Any:
    """Return the batch, or copies of the sample ``stand_in`` if all of its samples have weight zero.

    The choice is part of the computation, since vmap takes no branches. No sample of the same form may
    have a weight, as in padded texts of several lengths; then the batch stays as it is.
    """
    if stand_in is None:
        return batch
    weightless = (batch.weight == 0).all()
    others = iter(list(tensors_in(stand_in)))

    def chosen(t: Tensor) -> Tensor:
        other = next(others)
        return torch.where(weightless.to(t.device), other.to(t), t) if t.dim() else t

    return map_tensors(chosen, batch)
