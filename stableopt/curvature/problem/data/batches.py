"""`Batches`: data in any of the usual forms as a re-iterable of batches with their sample counts.

Curvature is a mean over samples, so iteration yields ``(batch, size)``, and samples in a smaller last
batch have the same weight as all others. :class:`Batches` takes for example:

- ``(x, y)``: two tensors, cut into chunks, or tuples and dictionaries of tensors;
- a ``Dataset`` or a ``DataLoader``: read in order, by a fresh loader without workers, so that
  persistent workers of the original loader are not disturbed;
- a list, or any other re-iterable, of batches.

Each product with a curvature matrix reads the data, so a one-time iterator is refused.
:func:`~stableopt.curvature.problem.data.probe.fixed_probe` fixes data that differ at each reading.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from stableopt._support.arguments import whole, with_article

__all__ = ["Batches", "map_tensors", "sample_count", "tensors_in"]

DEFAULT_CHUNK = 1024
"""Default number of samples in a chunk."""

MOST_UNSIZED = 1_000_000
"""Number of samples after which data without a length count as endless."""


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return ``batch`` with ``function`` applied to every tensor in it.

    Dictionaries, lists, tuples and dataclasses are searched, and keep their types.

    >>> import torch
    >>> map_tensors(lambda t: t + 1, {"x": torch.zeros(2), "name": "a"})
    {'x': tensor([1., 1.]), 'name': 'a'}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
        return mapped if type(batch) is dict else _refilled(batch, mapped)
    if _is_record(batch):
        clone = copy.copy(batch)
        for field in dataclasses.fields(batch):
            value = map_tensors(function, getattr(batch, field.name))
            object.__setattr__(clone, field.name, value)  # works for frozen dataclasses too
        return clone
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def _refilled(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the type of ``batch``, whose entries may be attributes as well."""
    clone: Any = copy.copy(batch)
    try:
        for key, value in mapped.items():
            clone[key] = value  # outputs of transformers' models forbid update()
    except TypeError:
        return mapped
    return cast("Mapping[Any, Any]", clone)


def _is_record(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in ``batch`` that :func:`map_tensors` would change.

    >>> import torch
    >>> [t.shape[0] for t in tensors_in({"x": torch.zeros(2), "more": [torch.zeros(3)]})]
    [2, 3]
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif _is_record(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_in(getattr(batch, field.name))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_in(value)


def sample_count(batch: Any) -> int:
    """Return the number of samples: the leading dimension that all tensors of ``batch`` share.

    Tensors without dimensions belong to all samples and are ignored.

    Raises:
        ValueError: if no tensor has a leading dimension, or if the dimensions disagree.

    >>> import torch
    >>> sample_count((torch.zeros(5, 3), torch.zeros(5)))
    5
    """
    sizes = [t.shape[0] for t in tensors_in(batch) if t.dim()]
    if not sizes:
        raise ValueError(
            f"data: {_describe(batch)} as a batch holds no tensor with a leading dimension; expected"
            " tensors whose first dimension counts the samples (convert arrays with torch.as_tensor)"
        )
    if len(set(sizes)) > 1:
        raise ValueError(
            f"data: the tensors of one batch have {sizes} samples; expected the same leading dimension"
            " in all of them. For a graph, or texts in one tensor with their offsets, pass the samples'"
            " indices as data, torch.arange(n), and let the loss look up the rest; for time-first"
            " tensors, pass batch_dim="
        )
    return sizes[0]


def cut(batch: Any, start: int, stop: int) -> Any:
    """Return samples ``start`` to ``stop`` of ``batch``."""
    return map_tensors(lambda t: t[start:stop] if t.dim() else t, batch)


class Batches:
    """A data set as a re-iterable of ``(batch, size)``.

    Args:
        data: an ``(x, y)`` pair (one batch), a ``Dataset``, a ``DataLoader`` or any re-iterable of
            batches. With ``paired=False`` a dictionary, dataclass or tuple of tensors, or a single
            tensor, is one batch too. A list holds batches, unless it is an ``(x, y)`` pair.
        chunk_size: the most samples in a batch; larger batches are cut. ``None`` keeps the batches of
            a loader or an iterable, and cuts a pair at 1,024.
        paired: whether each batch must be an ``(x, y)`` pair.

    Attributes:
        chosen: the argument ``chunk_size``.
        known_counts: the numbers of samples and of chunks, ``None`` before the first reading.

    A ``DataLoader`` that shuffles or drops its last batch is read as the whole data set in order. A
    sampler that selects samples (a subset, weights) is used.

    Raises:
        TypeError: if ``data`` can be read only once, cannot be read at all, or have nested tensors.
        ValueError: if ``chunk_size`` is not positive; on iteration, if the data are empty, or have no
            length and no end within a million samples.

    >>> import torch
    >>> batches = Batches((torch.zeros(5, 3), torch.zeros(5)), chunk_size=2)
    >>> [size for _, size in batches], batches.num_samples
    ([2, 2, 1], 5)
    """

    def __init__(self, data: Any, *, chunk_size: int | None = None, paired: bool = True) -> None:
        if chunk_size is not None:
            chunk_size = whole("chunk_size", chunk_size)
        self.paired, self.chosen = paired, chunk_size
        self.known_counts: tuple[int, int] | None = None
        self.source, one_batch = _source(data, chunk_size, paired)
        self.chunk_size = DEFAULT_CHUNK if one_batch and chunk_size is None else chunk_size

    def with_chunk_size(self, chunk_size: int) -> Batches:
        """Return the same data cut into chunks of at most ``chunk_size`` samples."""
        other = object.__new__(Batches)
        other.__dict__ = {**self.__dict__, "chunk_size": chunk_size, "known_counts": None}
        return other

    @property
    def num_samples(self) -> int:
        """The number of samples n; the first call reads through data of unknown length."""
        return self._counted()[0]

    @property
    def num_chunks(self) -> int:
        """The number of chunks that one reading yields."""
        return self._counted()[1]

    def forget_counts(self) -> None:
        """Forget the number of samples after a change of ``source``."""
        self.known_counts = None

    def _counted(self) -> tuple[int, int]:
        if self.known_counts is None:
            for _ in self:
                pass
        assert self.known_counts is not None
        return self.known_counts

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        total = chunks = 0
        for batch in self.source:
            if self.paired and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise TypeError(
                    f"data: expected batches (x, y), got {_describe(batch)}; {_remedy(batch)}"
                )
            if any(tensor.is_nested for tensor in tensors_in(batch)):
                raise TypeError(
                    "data: a nested tensor cannot be cut into samples; pass padded tensors, or the"
                    " samples' indices as data, torch.arange(n), and let the loss look up the rest"
                )
            size = sample_count(batch)
            total += size
            if total > MOST_UNSIZED and not has_length(self.source):
                raise ValueError(
                    f"data: {total} samples were read, with no end in sight: expected"
                    " max_samples=, or data with a length (__len__)"
                )
            step = self.chunk_size or max(size, 1)
            if size <= step:
                if size:
                    chunks += 1
                    yield batch, size
                continue
            for start in range(0, size, step):
                stop = min(start + step, size)
                chunks += 1
                yield cut(batch, start, stop), stop - start
        if not total:
            raise ValueError("data is empty: expected at least one sample")
        self.known_counts = (total, chunks)


def has_length(source: Any) -> bool:
    """Return whether ``len(source)`` is defined: endless data have none."""
    try:
        len(source)
    except (TypeError, NotImplementedError):
        return False
    return True


def _describe(value: Any) -> str:
    kind = with_article("array" if _is_array(value) else type(value).__name__)
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Tensor)


def _remedy(value: Any) -> str:
    if _is_array(value):
        return "convert arrays with torch.as_tensor"
    return "for dictionaries and models with their own loss use Problem.from_batch_loss"


def _source(data: Any, chunk_size: int | None, paired: bool) -> tuple[Any, bool]:
    """Return a re-iterable of batches, and whether ``data`` is one batch."""
    if isinstance(data, DataLoader):
        return _reread(data), False
    if isinstance(data, Dataset):
        if isinstance(data, IterableDataset):
            _refuse_once_only(data)
            return QuietLoader(data, batch_size=chunk_size or DEFAULT_CHUNK), False
        return QuietLoader(data, batch_size=chunk_size or DEFAULT_CHUNK, shuffle=False), False
    if _is_batch(data, paired):
        return [data], True
    if isinstance(data, Tensor):
        raise TypeError("data is a single tensor: expected (x, y)")
    if isinstance(data, Mapping):
        raise TypeError(f"data is {_describe(data)}: expected (x, y); {_remedy(data)}")
    if isinstance(data, str):
        raise TypeError(f"data={data!r}: expected (x, y), a Dataset, a DataLoader or batches")
    try:
        iter(data)
    except TypeError:
        raise TypeError(
            f"data={data!r} cannot be iterated: expected (x, y), a Dataset, a DataLoader or a"
            " re-iterable of batches"
        ) from None
    _refuse_once_only(data)
    return data, False


def _refuse_once_only(data: Any) -> None:
    # The first reading would exhaust data that return the same iterator twice.
    first, second = iter(data), iter(data)
    if first is data or first is second:
        raise TypeError(
            f"data is a {type(data).__name__}, an iterator that can be read only once; each product"
            " reads the data again, so pass a list of batches, a Dataset or a DataLoader"
        )


def _is_batch(data: Any, paired: bool) -> bool:
    if isinstance(data, tuple) and not paired:
        named = hasattr(data, "_fields")
        if named or (len(data) > 2 and all(isinstance(part, Tensor) for part in data)):
            return True
    if isinstance(data, (tuple, list)):
        # Two parts are (x, y) if one is a tensor. A list of two tuples is a list of two batches.
        return len(data) == 2 and (
            any(isinstance(part, Tensor) for part in data)
            or (isinstance(data, tuple) and paired and _are_inputs_and_targets(*data))
        )
    return not paired and (isinstance(data, (Tensor, Mapping)) or _is_record(data))


def _are_inputs_and_targets(first: Any, second: Any) -> bool:
    """Return whether a tuple of two holds structured inputs and targets, and not two batches.

    In inputs and targets all tensors have the same number of samples. Two batches have the same
    structure, dtypes and, in two dimensions, numbers of features.
    """
    structures = [_structure_of(part) for part in (first, second)]
    sizes = {t.shape[0] if t.dim() else None for part in (first, second) for t in tensors_in(part)}
    if len(sizes) != 1 or not all(structures):
        return False
    if structures[0] != structures[1]:
        return True
    if isinstance(first, (tuple, list)) and len(first) == 2:
        warnings.warn(
            "data: a tuple of two tuples is read as two batches (x, y), since both have the same"
            " structure. If it is one batch of structured inputs and targets, write [(x, y)]",
            stacklevel=2,
        )
    return False


def _structure_of(part: Any) -> list[Any]:
    """Return the properties that batches of one data set share: type, keys, dtypes and dimensions."""
    keys = list(part) if isinstance(part, Mapping) else []
    tensors: list[Any] = [
        (t.dtype, t.dim(), t.shape[1] if t.dim() == 2 and t.is_floating_point() else None)
        for t in tensors_in(part)
    ]
    return [type(part), keys, *tensors] if tensors else []


class QuietLoader(DataLoader[Any]):
    """A loader whose iterators draw their seeds from a generator of its own."""

    def __iter__(self) -> Any:
        # Else torch draws from the global generator. It draws on the default device of this moment.
        device = torch.get_default_device()
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device)
        return super().__iter__()


def _reread(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader over the same samples that shares no state with ``loader``."""
    common: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": 0}
    if isinstance(loader.dataset, IterableDataset):
        _refuse_once_only(loader.dataset)
        return QuietLoader(loader.dataset, batch_size=loader.batch_size, **common)
    if _reads_all(loader.sampler, loader.dataset) and loader.batch_size is not None:
        return QuietLoader(loader.dataset, batch_size=loader.batch_size, shuffle=False, **common)
    batches: Any = loader.batch_sampler
    if batches is not None:
        # A sampler in the middle of an epoch may offer a whole epoch without advancing itself.
        whole_epoch = getattr(batches, "whole_epoch", None)
        if callable(whole_epoch):
            batches = whole_epoch()
            if _reads_all(batches.sampler, loader.dataset):
                return QuietLoader(loader.dataset, batch_size=batches.batch_size, **common)
        return QuietLoader(loader.dataset, batch_sampler=batches, **common)
    return QuietLoader(loader.dataset, batch_size=None, sampler=loader.sampler, **common)


def _reads_all(sampler: Any, dataset: Any) -> bool:
    """Return whether an epoch of ``sampler`` contains each sample of ``dataset`` once."""
    if isinstance(sampler, RandomSampler):
        size = len(sampler.data_source)
        return not sampler.replacement and sampler.num_samples == size == len(dataset)
    return isinstance(sampler, SequentialSampler) and len(sampler) == len(dataset)
