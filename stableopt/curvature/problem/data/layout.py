"""`Layout`: batches whose first dimension does not count samples, such as time-first sequences.

Inside a problem the samples' dimension is always first, so that batches can be cut and joined. A layout
moves it there when data are read, and back when the model and the loss are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stableopt.curvature.problem.data.batches import has_length, map_tensors, tensors_in

__all__ = ["BatchDim", "Layout"]

BatchDim = int | tuple[int, int]
"""The dimension that counts the samples: of all tensors, or of inputs and of targets."""


@dataclass(frozen=True)
class Layout:
    """The dimension that counts the samples of a batch: the first for tensors of fewer dimensions.

    Attributes:
        dims: the samples' dimension in inputs and in targets.
        paired: whether batches are pairs ``(x, y)``.

    >>> import torch
    >>> layout = Layout.of(1, paired=True)
    >>> x, y = layout.samples_first((torch.zeros(7, 2, 3), torch.zeros(2)))
    >>> x.shape, y.shape, layout.given((x, y))[0].shape
    (torch.Size([2, 7, 3]), torch.Size([2]), torch.Size([7, 2, 3]))
    """

    dims: tuple[int, int] = (0, 0)
    paired: bool = True

    @classmethod
    def of(cls, batch_dim: BatchDim | None, *, paired: bool) -> Layout:
        """Return the layout for the argument ``batch_dim`` of ``Problem``.

        Raises:
            ValueError: unless it is a dimension, or for pairs two dimensions.
        """
        dims = 0 if batch_dim is None else batch_dim
        both = dims if isinstance(dims, (tuple, list)) else (dims, dims)
        whole = all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in both)
        if not whole or len(both) != 2 or (not paired and both is dims):
            expected = ", or a pair of them for (x, y)" if paired else ""
            raise ValueError(
                f"batch_dim={batch_dim!r}: expected the dimension that counts the samples, 0 or more"
                f"{expected}"
            )
        return cls((both[0], both[1]), paired)

    def samples_first(self, batch: Any) -> Any:
        """Return ``batch`` with the samples' dimension first."""
        return self._moved(batch, lambda t, dim: t.movedim(dim, 0))

    def given(self, batch: Any) -> Any:
        """Return ``batch``, samples first, in the layout that the model and the loss expect."""
        return self._moved(batch, lambda t, dim: t.movedim(0, dim))

    def output_dim(self, batch: Any) -> int:
        """Return the dimension that counts samples in the model's outputs: that of the targets."""
        targets = next(tensors_in(batch[1]), None)
        return self.dims[1] if targets is not None and targets.dim() > self.dims[1] else 0

    def reading(self, source: Any, data: Any) -> Any:
        """Return ``source``, a re-iterable of the batches of ``data``, with samples first."""
        # Samples of a Dataset are stacked along a new first dimension.
        if not any(self.dims) or (isinstance(data, Dataset) and not isinstance(data, DataLoader)):
            return source
        if isinstance(source, DataLoader):
            source.collate_fn = _CollateSamplesFirst(source.collate_fn, self)
            return source
        if isinstance(source, (list, tuple)):
            return [self.samples_first(batch) for batch in source]
        return (_SamplesFirstSized if has_length(source) else _SamplesFirst)(source, self)

    def _moved(self, batch: Any, move: Callable[[Tensor, int], Tensor]) -> Any:
        if not any(self.dims):
            return batch

        def move_all(part: Any, dim: int) -> Any:
            return map_tensors(lambda t: move(t, dim) if t.dim() > dim else t, part)

        if not self.paired:
            return move_all(batch, self.dims[0])
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            return batch  # Batches refuses it
        return move_all(batch[0], self.dims[0]), move_all(batch[1], self.dims[1])


@dataclass(frozen=True)
class _CollateSamplesFirst:
    """A collate function whose batches have the samples first."""

    collate: Any
    layout: Layout

    def __call__(self, samples: Any) -> Any:
        return self.layout.samples_first(self.collate(samples))


@dataclass(frozen=True)
class _SamplesFirst:
    """A re-iterable whose batches have the samples first."""

    source: Any
    layout: Layout

    def __iter__(self) -> Iterator[Any]:
        return map(self.layout.samples_first, self.source)


class _SamplesFirstSized(_SamplesFirst):
    def __len__(self) -> int:
        return len(self.source)
