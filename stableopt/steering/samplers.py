"""`AdaptiveBatchSampler` and `AdaptiveAccumulation`: batch sizes that can change during training.

Three examples::

    sampler = AdaptiveBatchSampler(RandomSampler(data), 32, max_batch_size=512)
    loader = DataLoader(data, batch_sampler=sampler)
    sampler.batch_size = 64                           # from the next batch that is requested
    for group in AdaptiveAccumulation(loader, 4):     # for loaders whose batches cannot change
        for share, (x, y) in group:
            (share * loss_fn(model(x), y)).backward()
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from stableopt._support.arguments import require_keys, shown, whole
from stableopt._support.deprecation import renamed_keywords
from stableopt.curvature.problem.data.batches import sample_count, tensors_in
from stableopt.curvature.problem.weights.weights import GivenWeights
from stableopt.distributed.collectives import world

__all__ = ["AdaptiveAccumulation", "AdaptiveBatchSampler", "Resizable"]

_IGNORED = -100
"""The target that torch's losses and the models of transformers ignore."""


class Resizable(Protocol):
    """The interface by which a controller changes the batch size."""

    batch_size: int
    """Samples in a step of this process."""

    def nearest(self, batch_size: float) -> int:
        """Return the nearest allowed size."""

    def resize(self, batch_size: int) -> int:
        """Set the size on every rank to that of rank 0, and return it."""


class _BatchSize:
    """Mixin: a batch size that can be set to multiples of a unit, within bounds."""

    def _set_bounds(
        self, batch_size: int, smallest: int, largest: int | None, multiple_of: int
    ) -> None:
        """Set the unit, the bounds and the first size."""
        unit = self._unit = whole("multiple_of", multiple_of)
        smallest = whole("min_batch_size", smallest)
        self._smallest = -(-smallest // unit) * unit
        self._largest = largest
        if largest is not None:
            self._largest = whole("max_batch_size", largest) // unit * unit
            if self._largest < self._smallest:
                raise ValueError(
                    f"min_batch_size={smallest}, max_batch_size={largest}, multiple_of={unit}:"
                    " no multiple is within these bounds"
                )
        self.batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """Samples in the next batch or step."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        size = whole("batch_size", batch_size)
        if self.nearest(size) != size:
            upper = "" if self._largest is None else f" to {self._largest}"
            raise ValueError(
                f"batch_size={size}: expected a multiple of {self._unit} from {self._smallest}"
                f"{upper}; nearest() gives one"
            )
        self._batch_size = size

    def nearest(self, batch_size: float) -> int:
        """Return the allowed size nearest to ``batch_size``."""
        if not batch_size > 0:
            raise ValueError(f"batch_size={batch_size}: expected a positive number")
        capped = batch_size if self._largest is None else min(batch_size, self._largest)
        return max(round(capped / self._unit) * self._unit, self._smallest)

    def resize(self, batch_size: int) -> int:
        """Set the size to that of rank 0 and return it; every rank must call it."""
        self.batch_size = world().broadcast_object(batch_size)
        return self.batch_size


@dataclass
class _Epoch:
    """The position within an epoch, which its iterator and the sampler share."""

    indices: Iterator[int]  # not yet requested
    ahead: list[int] = field(default_factory=list)  # the sizes of the first batches of ``indices``
    taken: int = 0  # batches that were used before the loaded state was saved
    yielded: list[list[int]] = field(default_factory=list)  # batches that were requested since

    def remaining(self) -> list[int]:
        """Return the indices that were not requested."""
        remaining = list(self.indices)
        self.indices = iter(remaining)
        return remaining


class AdaptiveBatchSampler(_BatchSize, BatchSampler):
    r"""A ``BatchSampler`` whose batch size may change at any time, also within an epoch.

    The size is read when a batch is requested. A loader with workers prefetches
    ``prefetch_factor * num_workers`` batches, so a change takes effect that many steps later. The
    monitor uses the size of the batches that it observes.

    For any sequence of sizes, the batches of an epoch contain each of the sampler's indices exactly
    once, in its order. ``drop_last`` leaves out a last batch that is shorter than the size *at that
    time*: then each index occurs at most once, and fewer than a batch are missing.

    A copy or a pickle has the same :meth:`state_dict`, also within an epoch.

    In a distributed run use a ``DistributedSampler``, and change the size by :meth:`resize` on
    every rank. Sizes count the samples of one rank.

    Args:
        sampler: any sampler or iterable of indices.
        batch_size: samples in a batch at the start.
        min_batch_size: the smallest allowed size, rounded up to a multiple.
        max_batch_size: the largest allowed size, rounded down; ``None`` for no bound.
        multiple_of: the number whose multiples are allowed sizes.
        drop_last: leave out a last batch that is too short.

    Raises:
        ValueError: for sizes out of range.

    >>> sampler = AdaptiveBatchSampler(range(10), 2)
    >>> batches = iter(sampler)
    >>> next(batches)
    [0, 1]
    >>> sampler.batch_size = 5
    >>> list(batches)
    [[2, 3, 4, 5, 6], [7, 8, 9]]
    """

    @renamed_keywords(min="min_batch_size", max="max_batch_size")
    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        *,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        multiple_of: int = 1,
        drop_last: bool = False,
    ) -> None:
        self._set_bounds(batch_size, min_batch_size, max_batch_size, multiple_of)
        super().__init__(sampler, self.batch_size, drop_last)
        self._epoch = _Epoch(iter(()))
        self._resumes = False  # the next iteration continues a loaded epoch

    def set_epoch(self, epoch: int) -> None:
        """Forward to the sampler, as ``DistributedSampler`` needs before every epoch."""
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator runs only when the first batch is requested. That matters for a loader with
        # workers, which makes two iterators and discards one.
        if not self._resumes:
            self._epoch = _Epoch(iter(self.sampler))
        self._resumes = False
        # A newer iterator replaces self._epoch; this one goes on with its own.
        epoch = self._epoch
        while True:
            size = epoch.ahead.pop(0) if epoch.ahead else self.batch_size
            batch = list(islice(epoch.indices, size))
            if not batch or (self.drop_last and len(batch) < size):
                return
            epoch.yielded.append(batch)
            yield batch

    def whole_epoch(self) -> BatchSampler:
        """Return a sampler of a whole epoch's batches that does not move the position of this one.

        Measurements read the data with it, also within an epoch and after :meth:`load_state_dict`.

        >>> sampler = AdaptiveBatchSampler(range(3), 2)
        >>> _ = next(iter(sampler))
        >>> list(sampler.whole_epoch()), sampler.state_dict()["rest"]
        ([[0, 1], [2]], [2])
        """
        return BatchSampler(self.sampler, self.batch_size, drop_last=False)

    def __len__(self) -> int:
        """Return the number of batches in an epoch at the present size: an estimate if it changes.

        It is also the length of the ``DataLoader``. Between :meth:`load_state_dict` and the next
        iteration it counts the remaining batches of the epoch.
        """
        ahead = self._epoch.ahead if self._resumes else []
        rest = self._epoch.remaining() if self._resumes else self.sampler
        samples = len(cast(Sized, rest)) - sum(ahead)
        whole_batches, short = divmod(samples, self.batch_size)
        return len(ahead) + whole_batches + (short > 0 and not self.drop_last)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the size and the position in this epoch: plain integers and lists.

        ``rest`` lists the remaining indices, also those of prefetched batches. ``ahead`` lists the
        sizes of those batches, so that a resumed run yields the same ones. ``taken`` is ``batches``.

        Args:
            batches: the number of batches of this epoch that training has used, with those before
                the last :meth:`load_state_dict`. A loader with workers prefetches more, and those
                must be yielded again. By default all requested batches.

        Raises:
            ValueError: if fewer batches were requested, or if the loaded state was saved after more.
            TypeError: for a sampler without a length, which may be endless.
        """
        if not isinstance(self.sampler, Sized):
            raise TypeError(
                f"sampler={shown(self.sampler)}: expected a sampler with a length (__len__)"
            )
        epoch = self._epoch
        requested = epoch.taken + len(epoch.yielded)
        used = requested if batches is None else whole("batches", batches, least=0)
        if used > requested:
            raise ValueError(f"batches={batches}: only {requested} were requested")
        if used < epoch.taken:
            raise ValueError(
                f"batches={batches}: the loaded state was saved after {epoch.taken} batches of this"
                " epoch; count them too"
            )
        unused = epoch.yielded[used - epoch.taken :]
        return {
            "batch_size": self.batch_size,
            "rest": [*chain.from_iterable(unused), *epoch.remaining()],
            "ahead": [*map(len, unused), *epoch.ahead],
            "taken": used,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue within the epoch: the next iteration yields its remaining batches.

        If the epoch was complete, the next iteration is a new epoch.

        Raises:
            ValueError: for a missing entry, a size that is not allowed, or entries that contradict
                each other.
        """
        require_keys(state_dict, ("batch_size", "rest"))
        # Read everything that can raise before changing anything; a refused size changes nothing.
        rest = list(state_dict["rest"])
        # States of earlier versions lack the other entries.
        ahead = [whole("ahead", size) for size in state_dict.get("ahead", ())]
        if sum(ahead) > len(rest):
            raise ValueError(f"ahead={ahead}: expected at most {len(rest)} samples, those of rest")
        taken = whole("taken", state_dict.get("taken", 0), least=0)
        self.batch_size = state_dict["batch_size"]
        self._resumes = bool(rest)
        self._epoch = _Epoch(iter(rest), ahead, taken if rest else 0)

    def __getstate__(self) -> dict[str, Any]:
        # Samplers' iterators are mostly generators, which cannot be copied or pickled; those of lists
        # can. A sampler without a length may be endless, and has no state of its position.
        epoch, finite = self._epoch, self._resumes or isinstance(self.sampler, Sized)
        copied = replace(
            epoch,
            indices=iter(epoch.remaining() if finite else ()),
            ahead=list(epoch.ahead),
            yielded=list(epoch.yielded),
        )
        return {**vars(self), "_epoch": copied}


class AdaptiveAccumulation(_BatchSize):
    r"""Gradient accumulation: groups the batches of a loader of fixed batch size into steps.

    Yields for each step a list of ``(share, batch)``. The share is the batch's fraction of the step's
    samples, or of the sum of their weights. So the gradients of ``share * loss`` add up to the gradient
    of the mean loss, also if the last batch is smaller. The size is read before each step. The last
    step of an epoch may be shorter.

    Args:
        loader: a loader, or any re-iterable of batches.
        micro_batch_size: samples in each of its batches; the last one may have fewer.
        batch_size: samples in a step at the start, a multiple of ``micro_batch_size``; by default
            one batch.
        max_batch_size: the largest allowed size; ``None`` for no bound.
        sample_weight: a function of a batch that returns the weights of its samples ``(m,)``, for a
            loss that divides by their sum: class weights ``w[y]``, or the number of targets that are
            not ignored, ``(y != -100).sum(1)``. By default all samples have the same weight.

    Raises:
        ValueError: for sizes out of range; while iterating, for a batch of another size than
            ``micro_batch_size``, and for a batch with targets of -100, which torch's losses ignore,
            without ``sample_weight``.

    >>> import torch
    >>> batches = [(torch.zeros(2), torch.zeros(2))] * 4
    >>> accumulation = AdaptiveAccumulation(batches, micro_batch_size=2, batch_size=6)
    >>> [[round(share, 3) for share, _ in group] for group in accumulation]
    [[0.333, 0.333, 0.333], [1.0]]
    """

    @renamed_keywords(max="max_batch_size")
    def __init__(
        self,
        loader: Iterable[Any],
        micro_batch_size: int,
        batch_size: int | None = None,
        *,
        max_batch_size: int | None = None,
        sample_weight: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.loader, self._sample_weight = loader, sample_weight
        unit = whole("micro_batch_size", micro_batch_size)
        self._set_bounds(unit if batch_size is None else batch_size, unit, max_batch_size, unit)

    def __iter__(self) -> Iterator[list[tuple[float, Any]]]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.batch_size // self._unit)):
            for place, batch in enumerate(group, start=1):
                self._check_size(batch, chain(group[place:], batches))
            weights = [self._weight(batch) for batch in group]
            total = sum(weights)
            # A batch of weight 0 is left out, since its mean loss is 0/0.
            pairs = zip(weights, group, strict=True)
            yield [(weight / total, batch) for weight, batch in pairs if weight]

    def _check_size(self, batch: Any, later: Iterator[Any]) -> None:
        """Raise a ``ValueError`` unless ``batch`` has the unit's size, or is the last and smaller."""
        size = sample_count(batch)
        # The loader is asked for a batch ahead only where that decides.
        if size > self._unit or (size < self._unit and any(True for _ in later)):
            raise ValueError(
                f"micro_batch_size={self._unit}: a batch of the loader has {size} samples; pass the"
                " loader's batch size"
            )

    def _weight(self, batch: Any) -> float:
        """Return the sum of the weights of a batch's samples."""
        if self._sample_weight is not None:
            weights = GivenWeights(self._sample_weight, paired=False)
            return float(weights.attached(batch, 0, sample_count(batch)).weight.sum())
        integers = (t for t in tensors_in(batch) if t.dtype in (torch.int32, torch.int64))
        if any(bool((t == _IGNORED).any()) for t in integers):
            raise ValueError(
                f"loader: a batch has ignored targets ({_IGNORED}), so a mean over the other targets"
                " gives batches different weights: pass the weights of a batch's samples, such as"
                f" sample_weight=lambda batch: (batch[1] != {_IGNORED}).flatten(1).sum(1), or"
                " lambda batch: torch.ones(len(batch[1])) if all samples have the same weight"
            )
        return sample_count(batch)

    def __len__(self) -> int:
        """Return the number of steps in an epoch at the present size: an estimate if it changes."""
        return -(-len(cast(Sized, self.loader)) // (self.batch_size // self._unit))

    def state_dict(self) -> dict[str, int]:
        """Return the size. The position within the epoch belongs to the loader's state."""
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue with the size of a :meth:`state_dict`.

        Raises:
            ValueError: for a missing entry, or a size that is not allowed.
        """
        require_keys(state_dict, ("batch_size",))
        self.batch_size = state_dict["batch_size"]
