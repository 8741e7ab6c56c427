"""`LinearizationCache`: differentiable passes over the data, cached between products.

Every product at a point starts with the same passes, from the parameters to the gradients with their
graph. The cache keeps them for as many chunks of the data as fit into a number of bytes, and repeats
them for the others. It also cuts chunks that fit a CPU's cache, where they are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakMethod

from stableopt.curvature.autodiff import saved_bytes
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.mean_loss import Memo
from stableopt.curvature.problem.problem import Problem

__all__ = ["MEMORY", "LinearizationCache"]

P = TypeVar("P")

MEMORY = 2**30
"""Default cache size in bytes: a thousand samples of a small convolutional network."""

_CPU_CHUNK = 96 * 2**20
"""Bytes of passes in one chunk on a CPU: more exceeded its cache, fewer were mostly overhead."""

_OWN = 8
"""Bytes of passes in one chunk at least, in sizes of the parameters: each chunk reads all of them, and
adds to vectors as long. A ResNet-18 took 0.6 of the time with 8 images at once instead of 2."""

_LEAST = 64 * 2**20
"""Minimum cache size, 64 MiB: below it, memory is never the bottleneck."""

_CACHED_PART, _CHUNK_PART = 4, 8
"""With a chunk size, the cache is limited to a quarter of a training step's memory, and one chunk to an
eighth. A product's own intermediates, and what the count misses, take as much again."""

_TRIED = 3

_BYTES: Memo[float | None] = Memo()
"""Bytes that one more sample takes in passes of a kind; ``None`` if they cannot be counted."""


class LinearizationCache(Generic[P]):
    """A re-iterable of ``(passes, size)`` over the chunks of a problem's data.

    Iterate inside :meth:`Problem.evaluation`.

    Args:
        problem: has the data.
        linearise: ``(batch, size) -> passes``, a method of the object that owns this cache.
        memory: bytes that cached passes may take; together with one chunk of passes that are not
            cached, this is the peak. ``None`` is 1 GiB, or, if that is less and the problem has a
            chunk size, what a training step of that many samples takes.
        kind: the name under which the passes' size is remembered for the problem.
    """

    def __init__(
        self, problem: Problem, linearise: Callable[[Any, int], P], *, memory: int | None, kind: str
    ) -> None:
        # A strong reference to the method would make a cycle with its owner, and keep passes in
        # memory after both are dropped, until the garbage collector runs.
        self._problem, self._method = problem, WeakMethod(linearise)
        self._memory, self._kind = memory, kind
        self._cached: list[tuple[P, int]] = []
        self._all_cached = False
        self._plan: tuple[int | None, int] | None = None

    def _linearise(self, batch: Any, size: int) -> P:
        linearise = self._method()
        assert linearise is not None, "its owner is gone"
        return linearise(batch, size)

    @property
    def cached(self) -> list[tuple[P, int]]:
        """The passes that are cached by now."""
        return self._cached

    @property
    def chunk_size(self) -> int | None:
        """The most samples in a chunk; ``None`` for the problem's own."""
        with self._problem.evaluation():
            return self._planned()[0]

    @property
    def capacity(self) -> int:
        """How many chunks, the first ones, are cached."""
        return self._planned()[1]

    def __iter__(self) -> Iterator[tuple[P, int]]:
        yield from self._cached
        if self._all_cached:
            return
        chunk_size, capacity = self._planned()
        number = 0
        for number, (batch, size) in enumerate(self._problem.chunks(chunk_size), start=1):
            if number <= len(self._cached):
                continue
            passes = self._linearise(batch, size)
            if number <= capacity:
                self._cached.append((passes, size))
            yield passes, size
        self._all_cached = number == len(self._cached)

    def _planned(self) -> tuple[int | None, int]:
        """Return the chunk size, and how many chunks to cache."""
        if self._plan is None:
            each = None
            if self._problem.equal_weights:
                each = self._bytes_of(self._kind, self._linearise)
            memory, at_once = self._budget()
            if self._problem.device.type == "cpu":
                at_once = min(at_once, _CPU_CHUNK)
            if each is None:
                # Batches stay as the user cut them if samples depend on their batch, or if their
                # bytes cannot be counted.
                self._plan = (None, int(self._problem.one_chunk))
            else:
                # Passes of any chunk hold gradients of the parameters' size, or, of a large model, use
                # as much for a moment: fewer chunks take less.
                own = self._problem.num_params * self._problem.dtype.itemsize
                held = 0 if self._problem.large else own
                chunk_size = max(1, int(max(at_once, min(_OWN * own, memory - held)) / each))
                size = min(chunk_size, self._problem.own_samples)
                self._plan = (chunk_size, int(memory / (size * each + held)))
        return self._plan

    def _budget(self) -> tuple[int, int]:
        """Return the bytes of passes that may be cached, and of those in one chunk."""
        if self._memory is not None:
            return self._memory, self._memory
        step = self._step_bytes()
        if step is None or step >= _CACHED_PART * MEMORY:
            return MEMORY, MEMORY
        least = max(step, _LEAST)
        return int(least / _CACHED_PART), int(least / _CHUNK_PART)

    def _step_bytes(self) -> float | None:
        """Return what a training step keeps for its backward pass, at the user's chunk size."""
        chosen = self._problem.batches.chosen
        if chosen is None or not self._problem.equal_weights:
            return None
        theta = self._problem.theta()
        each = self._bytes_of("loss", lambda batch, size: self._problem.loss(theta, batch))
        return None if each is None else chosen * each

    def _bytes_of(self, kind: str, made: Callable[[Any, int], Any]) -> float | None:
        """Return what ``made`` saves for one more sample; ``None`` if it cannot be counted."""
        known = _BYTES.on(self._problem)
        if kind not in known:
            batch, size = next(self._problem.chunks(_TRIED))
            try:
                more = saved_bytes(lambda: made(batch, size))
                more -= saved_bytes(lambda: made(cut(batch, 0, 1), 1))
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                known[kind] = None  # torch.func within the model excludes saved tensor hooks
            else:
                known[kind] = max(more / max(size - 1, 1), 1.0)
        return known[kind]
