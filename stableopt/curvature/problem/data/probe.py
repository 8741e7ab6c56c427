"""`fixed_probe`: data as a fixed set of samples, read without side effects on training.

Every product with a curvature matrix reads the data, and all must see the same function. Three examples:

- a sampler that draws (``WeightedRandomSampler``): its indices are drawn once;
- a data set with random augmentation: its samples are read once and kept in memory, up to 1 GiB;
- a stream: read each time if readings are equal, and otherwise once.

Generators, epoch counters and other attributes of data sets, samplers and collate functions are restored
afterwards, so that training reads the same samples as without a measurement.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from stableopt._support.arguments import whole
from stableopt.curvature.isolation.reachable import HeldState, generator_states
from stableopt.curvature.problem.data.batches import (
    MOST_UNSIZED,
    Batches,
    QuietLoader,
    cut,
    has_length,
    map_tensors,
    sample_count,
    tensors_in,
)
from stableopt.curvature.problem.data.layout import Layout

__all__ = ["fixed_probe"]

_MOST_BYTES = 2**30
"""Largest size in bytes of samples kept in memory, 1 GiB: that of the cache of forward passes."""

_SEED = 0
"""Seed of the choice of ``max_samples`` samples, so that each run measures the same samples."""


def fixed_probe(
    data: Any,
    *,
    chunk_size: int | None,
    paired: bool,
    max_samples: int | None = None,
    layout: Layout | None = None,
) -> Batches:
    """Return ``data`` as :class:`Batches` that give the same samples at each reading.

    Args:
        data: in any form that :class:`Batches` takes.
        chunk_size: as for :class:`Batches`.
        paired: as for :class:`Batches`.
        max_samples: the most samples to use, by default all. Tensors and data sets read in order give
            a random choice, the same each time; other data give their first samples.
        layout: the samples' dimension in the tensors of ``data``, by default the first.

    Raises:
        ValueError: without ``max_samples``, for endless data, and for more than 1 GiB of data whose
            readings differ and cannot be repeated.
        TypeError: as :class:`Batches` does.
    """
    if max_samples is not None:
        max_samples = whole("max_samples", max_samples)
    held = HeldState(_read_by(data))
    try:
        batches = Batches(data, chunk_size=chunk_size, paired=paired)
        batches.source = (layout or Layout()).reading(batches.source, data)
        if isinstance(batches.source, DataLoader):
            batches.source = _in_fixed_order(batches.source, max_samples)
        elif max_samples is not None:
            batches.source = _cut(batches.source, max_samples)
        if not isinstance(batches.source, (list, tuple)):
            _fix_content(batches, held)
        return batches
    finally:
        held.restore()


def _read_by(data: Any) -> list[Any]:
    """Return the objects whose state a reading of ``data`` may change."""
    if isinstance(data, DataLoader):
        samplers = [data.batch_sampler, data.sampler, data.generator]
        return [data.dataset, data.collate_fn, *samplers]
    # Lists and tensors hold samples only.
    return [] if isinstance(data, (list, tuple, Tensor)) else [data]


def _in_fixed_order(source: DataLoader[Any], max_samples: int | None) -> Any:
    """Return ``source`` with the indices of one epoch of its sampler."""
    if isinstance(source.dataset, IterableDataset):
        return source if max_samples is None else _First(source, max_samples)
    whole_batches = source.batch_sampler is None
    sampler: Any = source.sampler if whole_batches else source.batch_sampler
    if type(sampler) is BatchSampler and isinstance(sampler.sampler, SequentialSampler):
        if max_samples is None or max_samples >= len(sampler.sampler):
            return source
        chosen = _choice(len(sampler.sampler), max_samples)
        size = sampler.batch_size
        order: list[Any] = [chosen[i : i + size].tolist() for i in range(0, len(chosen), size)]
    elif whole_batches:
        order = list(_indices(sampler, None))
        _check_choice(order, list(_indices(sampler, None)))
    else:
        order = list(_indices(sampler, max_samples))
        _check_choice(
            list(chain.from_iterable(order)),
            list(chain.from_iterable(_indices(sampler, max_samples))),
        )
    if whole_batches:
        fixed = QuietLoader(
            source.dataset, batch_size=None, sampler=order, collate_fn=source.collate_fn
        )
        return fixed if max_samples is None else _First(fixed, max_samples)
    return QuietLoader(source.dataset, batch_sampler=order, collate_fn=source.collate_fn)


def _indices(sampler: Any, max_samples: int | None) -> Iterator[Any]:
    """Yield the batches of ``sampler``, with at most ``max_samples`` indices in total."""
    total = 0
    for batch in sampler:
        size = len(batch) if isinstance(batch, (list, tuple)) else 1
        if max_samples is not None and total + size >= max_samples:
            yield batch[: max_samples - total]
            return
        total += size
        if total > MOST_UNSIZED and not has_length(sampler):
            raise ValueError(
                f"data: its sampler gave {total} indices, with no end in sight: expected"
                " max_samples=, or a sampler with a length (__len__)"
            )
        yield batch


def _check_choice(drawn: list[Any], again: list[Any]) -> None:
    """Warn if a second epoch has other samples; another order is fine."""
    if drawn != again and Counter(map(repr, drawn)) != Counter(map(repr, again)):
        _warn_of("its sampler draws other samples in each epoch", len(drawn))


def _warn_of(reason: str, samples: int) -> None:
    warnings.warn(
        f"data: {reason}; {samples} samples, drawn once, are the fixed probe that is measured",
        stacklevel=2,
    )


def _choice(size: int, max_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(size, generator=generator, device="cpu")[:max_samples].sort().values


def _cut(source: Any, max_samples: int) -> Any:
    if not isinstance(source, list) or len(source) != 1:
        return _First(source, max_samples)
    batch, size = source[0], sample_count(source[0])
    if size <= max_samples:
        return source
    chosen = _choice(size, max_samples)
    return [map_tensors(lambda t: t[chosen.to(t.device)] if t.dim() else t, batch)]


class _First:
    """The first samples of a re-iterable of batches."""

    def __init__(self, source: Any, max_samples: int) -> None:
        self._source, self._most = source, max_samples

    def __len__(self) -> int:
        return self._most  # an upper bound suffices for readers

    def __iter__(self) -> Iterator[Any]:
        remaining = self._most
        for batch in self._source:
            size = sample_count(batch)
            yield batch if size <= remaining else cut(batch, 0, remaining)
            remaining -= min(size, remaining)
            if not remaining:
                return


def _fix_content(batches: Batches, held: HeldState) -> None:
    """Keep copies of the batches in memory if readings differ or change any state."""
    source = batches.source
    loader = source._source if isinstance(source, _First) else source
    # The first batch tells enough of data that are read by index. A stream may change state at its end.
    by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    held.restore()
    before = generator_states()
    first = _first_of(source) if by_index else _first_of_all(batches)
    drew_globally = generator_states() != before
    second = _first_of(source)
    drew_from_held, changed, equal = held.drew, held.changed, _same(first, second)
    if equal and not changed and not drew_globally:
        return
    held.restore()
    # A reading that differs although the state was restored depends on a generator out of reach.
    hidden = not drew_globally and not _same(first, _first_of(source))
    held.restore()
    kept = _copies(source, required=hidden)
    if kept is not None:
        batches.source = kept
    elif changed:
        batches.source = _Restored(source, held)
    batches.forget_counts()
    if drew_globally or drew_from_held or not equal:
        samples = batches.num_samples
        reason = ", from a generator that cannot be found and restored" if hidden else ""
        _warn_of(f"reading it draws random numbers{reason}", samples)


class _Restored:
    """A re-iterable that starts each reading from the same state, and restores the state it found."""

    def __init__(self, source: Any, start: HeldState) -> None:
        self._source, self._start = source, start

    def __iter__(self) -> Iterator[Any]:
        present = HeldState(self._start.roots)
        try:
            self._start.restore()
            yield from self._source
        finally:
            present.restore()


def _first_of(source: Any) -> Any:
    return next(iter(source), None)


def _first_of_all(batches: Batches) -> Any:
    """Read all batches; return a copy of the first."""
    first = None
    for batch, _ in batches:
        first = map_tensors(torch.clone, batch) if first is None else first
    return first


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors_in(first), tensors_in(second), strict=False))
    return all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs
    )


def _copies(source: Any, *, required: bool) -> list[Any] | None:
    """Return copies of the batches, or ``None`` if they are too large, an error if ``required``."""
    copies: list[Any] = []
    samples = size = 0
    for batch in source:
        copies.append(map_tensors(torch.clone, batch))
        samples += sample_count(batch)
        size += sum(t.numel() * t.element_size() for t in tensors_in(batch))
        if size > _MOST_BYTES:
            if not required:
                return None
            raise ValueError(
                f"data: they differ at each reading, and {samples} samples take"
                f" {size / 2**30:.1f} GiB: expected max_samples=, so that a fixed probe fits into 1 GiB"
            )
    return copies
