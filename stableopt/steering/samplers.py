"""Batch sizes that may change while training: of a sampler, or by accumulation.

Three examples::

    loader = DataLoader(data, batch_sampler=AdaptiveBatchSampler(RandomSampler(data), 32, max=512))
    loader.batch_sampler.batch_size = 64              # from the next batch that is asked for
    for group in AdaptiveAccumulation(loader, 4):     # for loaders whose batches cannot change
        for share, (x, y) in group:
            (share * loss_fn(model(x), y)).backward()
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice
from typing import Any, Protocol, cast

from torch.utils.data import BatchSampler, Sampler

from stableopt._arguments import whole
from stableopt.curvature.problem.data import sample_count
from stableopt.steering import agreement as ranks

__all__ = ["AdaptiveAccumulation", "AdaptiveBatchSampler", "Resizable"]


class Resizable(Protocol):
    """What a controller needs to change the batch size."""

    batch_size: int
    """Samples in a step of this process."""

    def nearest(self, batch_size: float) -> int:
        """Return the allowed size that is nearest."""

    def resize(self, batch_size: int) -> int:
        """Set the size on every rank, to what rank 0 says; return it."""


class _Sizes:
    """The sizes that are allowed, and the one that holds: what both classes share."""

    def __init__(self, batch_size: int, least: int, most: int | None, multiple_of: int) -> None:
        self._multiple_of = whole("multiple_of", multiple_of)
        least, unit = whole("min", least), self._multiple_of
        self._least = -(-least // unit) * unit
        self._most = None if most is None else whole("max", most) // unit * unit
        if self._most is not None and self._most < self._least:
            raise ValueError(
                f"min={least}, max={most}, multiple_of={unit}: no batch size is allowed"
            )
        self.set(batch_size)

    def nearest(self, batch_size: float) -> int:
        if not batch_size > 0:
            raise ValueError(f"batch_size={batch_size}: expected a positive number")
        top = batch_size if self._most is None else min(batch_size, self._most)
        return max(round(top / self._multiple_of) * self._multiple_of, self._least)

    def set(self, batch_size: int) -> None:
        size = whole("batch_size", batch_size)
        if self.nearest(size) != size:
            most = "" if self._most is None else f" to {self._most}"
            raise ValueError(
                f"batch_size={size}: expected a multiple of {self._multiple_of} from {self._least}"
                f"{most}; nearest() gives one"
            )
        self.now = size


class AdaptiveBatchSampler(BatchSampler):
    r"""A ``BatchSampler`` whose batch size may change at any time, also within an epoch.

    The size is read when a batch is asked for. A loader with workers asks ahead, by
    ``prefetch_factor * num_workers`` batches: a change shows that many steps later. The monitor goes
    by the batches that it observes.

    Whatever the sizes, an epoch's batches, one after the other, are the sampler's indices in its
    order, each exactly once. With ``drop_last`` a last batch that is short of the size *at that
    time* is left out, so that each index is there at most once, and fewer than a batch are missing.

    In a distributed run take a ``DistributedSampler``, and change the size by :meth:`resize` on
    every rank; sizes are those of one rank.

    Args:
        sampler: any sampler or iterable of indices.
        batch_size: samples in a batch to begin with.
        min: the smallest size allowed, rounded up to a multiple.
        max: the largest, rounded down; ``None`` for none.
        multiple_of: sizes are multiples of it.
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

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        *,
        min: int = 1,
        max: int | None = None,
        multiple_of: int = 1,
        drop_last: bool = False,
    ) -> None:
        self._sizes = _Sizes(batch_size, min, max, multiple_of)
        super().__init__(sampler, self._sizes.now, drop_last)
        self._indices: Iterator[int] = iter(())
        self._given: list[list[int]] = []
        self._resumed: list[int] | None = None

    @property
    def batch_size(self) -> int:
        """Samples in the next batch that is asked for."""
        return self._sizes.now

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._sizes.set(batch_size)

    def nearest(self, batch_size: float) -> int:
        """Return the allowed size nearest to ``batch_size``."""
        return self._sizes.nearest(batch_size)

    def resize(self, batch_size: int) -> int:
        """Set the size to rank 0's ``batch_size`` and return it; call it on every rank."""
        self.batch_size = ranks.shared_whole(batch_size)
        return self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Forward to the sampler, as ``DistributedSampler`` needs before every epoch."""
        if callable(forward := getattr(self.sampler, "set_epoch", None)):
            forward(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        # All of it only with the first batch: a loader with workers makes two iterators, and
        # discards one.
        rest, self._resumed = self._resumed, None
        indices = self._indices = iter(self.sampler if rest is None else rest)
        given = self._given = []
        while True:
            # Unless another iterator has taken over: state_dict puts back what it reads ahead.
            indices = self._indices if given is self._given else indices
            size = self.batch_size
            batch = list(islice(indices, size))
            if not batch or (self.drop_last and len(batch) < size):
                return
            given.append(batch)
            yield batch

    def __len__(self) -> int:
        """Return how many batches an epoch has at the present size: an estimate, if that changes.

        A loader's own length is this one. After :meth:`load_state_dict`, and until iteration
        begins, it is that of what is left.
        """
        samples = len(cast(Sized, self.sampler if self._resumed is None else self._resumed))
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the size and the indices that are left of this epoch: plain integers.

        Args:
            batches: how many batches of this iteration training has taken. A loader with workers
                has asked for more, which must be given again; by default all that were asked for.

        Raises:
            ValueError: if fewer were asked for.
            TypeError: for a sampler without length, which may have no end.
        """
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"sampler={self.sampler!r}: without a length, it may have no end")
        if self._resumed is not None:  # loaded, and not gone on with since
            return {"batch_size": self.batch_size, "rest": list(self._resumed)}
        taken = len(self._given) if batches is None else whole("batches", batches, least=0)
        if taken > len(self._given):
            raise ValueError(f"batches={batches}: only {len(self._given)} were asked for")
        ahead = list(self._indices)
        self._indices = iter(ahead)
        return {
            "batch_size": self.batch_size,
            "rest": [*chain.from_iterable(self._given[taken:]), *ahead],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue within the epoch: the next iteration gives what was left of it.

        If nothing was, the next iteration is a new epoch.

        Raises:
            ValueError: if something is missing, or the size is not allowed.
        """
        missing = {"batch_size", "rest"} - state_dict.keys()
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}")
        self.batch_size = state_dict["batch_size"]
        self._resumed = list(state_dict["rest"]) or None


class AdaptiveAccumulation:
    r"""Groups the batches of a loader into steps of several, for loaders that cannot change.

    Yields for each step a list of ``(share, batch)``, the shares being the batches' parts of the
    step's samples, so that the gradients of ``share * loss`` add up to that of the mean loss, ragged
    batches included. The number is read before each step. A loader that ends within a step makes a
    shorter one.

    Args:
        loader: a loader, or any re-iterable of batches.
        micro_batch_size: samples in one of its batches.
        batch_size: samples in a step to begin with, a multiple of ``micro_batch_size``; by default
            one batch.
        max: the largest size allowed; ``None`` for none.

    Raises:
        ValueError: for sizes out of range.

    >>> import torch
    >>> batches = [(torch.zeros(2), torch.zeros(2))] * 4
    >>> accumulation = AdaptiveAccumulation(batches, micro_batch_size=2, batch_size=6)
    >>> [[round(share, 3) for share, _ in group] for group in accumulation]
    [[0.333, 0.333, 0.333], [1.0]]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        micro_batch_size: int,
        batch_size: int | None = None,
        *,
        max: int | None = None,
    ) -> None:
        self.loader = loader
        unit = whole("micro_batch_size", micro_batch_size)
        self._unit = unit
        self._sizes = _Sizes(unit if batch_size is None else batch_size, unit, max, unit)

    @property
    def batch_size(self) -> int:
        """Samples in the next step."""
        return self._sizes.now

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._sizes.set(batch_size)

    def nearest(self, batch_size: float) -> int:
        """Return the allowed size nearest to ``batch_size``."""
        return self._sizes.nearest(batch_size)

    def resize(self, batch_size: int) -> int:
        """Set the size to rank 0's ``batch_size`` and return it; call it on every rank."""
        self.batch_size = ranks.shared_whole(batch_size)
        return self.batch_size

    def __iter__(self) -> Iterator[list[tuple[float, Any]]]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.batch_size // self._unit)):
            sizes = [sample_count(batch) for batch in group]
            total = sum(sizes)
            yield [(size / total, batch) for size, batch in zip(sizes, group, strict=True)]

    def __len__(self) -> int:
        """Return how many steps an epoch has at the present size: an estimate, if that changes."""
        return -(-len(cast(Sized, self.loader)) // (self.batch_size // self._unit))

    def state_dict(self) -> dict[str, int]:
        """Return the size; the place within the epoch is the loader's."""
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue with the size of a :meth:`state_dict`."""
        self.batch_size = state_dict["batch_size"]
