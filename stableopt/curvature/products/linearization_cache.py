"""`LinearizationCache`: differentiable passes over the data, cached between products.

Every product at a point starts with the same passes, from the parameters to the gradients with their
autograd graph. The cache keeps the passes of as many chunks as fit into a number of bytes, and
recomputes the others. On a CPU, it cuts chunks to the size of the processor's cache, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakMethod

from stableopt.curvature.autodiff import saved_bytes
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.problem import Problem

__all__ = ["MEMORY", "LinearizationCache"]

P = TypeVar("P")

MEMORY = 2**30
"""Default cache size in bytes: a thousand samples of a small convolutional network."""

_CPU_CHUNK = 96 * 2**20
"""Most bytes of passes in one chunk on a CPU: more exceeded its cache, fewer were mostly overhead."""

_MIN_CHUNK_IN_PARAMETERS = 8
"""Fewest bytes of passes in one chunk, in units of the parameters' bytes: each chunk reads all
parameters and adds to vectors as long. A ResNet-18 took 0.6 of the time with 8 images at once instead of
2."""

_MIN_STEP_BYTES = 64 * 2**20
"""Fewest bytes, 64 MiB, assumed for a training step: below it, memory is never the bottleneck."""

_CACHED_PART, _CHUNK_PART = 4, 8
"""With a chunk size, the cache is limited to a quarter of a training step's memory, and one chunk to an
eighth. The intermediates of a product, and uncounted tensors, take as much again."""

_TRIED = 3
"""Samples on which the bytes of passes are counted."""

_BYTES: Memo[float | None] = Memo()
"""Bytes of one more sample in passes of a kind; ``None`` if they cannot be counted."""


class LinearizationCache(Generic[P]):
    """A re-iterable of ``(passes, size)`` over the chunks of a problem's data.

    Iterate inside :meth:`Problem.evaluation`.

    Args:
        problem: the problem with the data.
        linearise: ``(batch, size) -> passes``, a method of the object that owns this cache.
        memory: bytes of the cache; the peak is one uncached chunk more. ``None`` is 1 GiB, or, with the
            problem's chunk size, a quarter of a training step's memory if that is less.
        kind: the name under which the passes' size is remembered for the problem.
    """

    def __init__(
        self, problem: Problem, linearise: Callable[[Any, int], P], *, memory: int | None, kind: str
    ) -> None:
        # A strong reference to the method would be a cycle with its owner, and would keep passes in
        # memory until the garbage collector runs.
        self._problem, self._method = problem, WeakMethod(linearise)
        self._memory, self._kind = memory, kind
        self._cached: list[tuple[P, int]] = []
        self._is_complete = False
        self._plan: tuple[int | None, int] | None = None

    def _linearise(self, batch: Any, size: int) -> P:
        linearise = self._method()
        assert linearise is not None, "the owner of this cache was deleted"
        return linearise(batch, size)

    @property
    def cached(self) -> list[tuple[P, int]]:
        """The cached passes."""
        return self._cached

    @property
    def chunk_size(self) -> int | None:
        """The most samples in a chunk; ``None`` for the problem's own chunks."""
        with self._problem.evaluation():
            return self._planned_chunks()[0]

    @property
    def capacity(self) -> int:
        """The number of chunks cached, from the first one on."""
        return self._planned_chunks()[1]

    def __iter__(self) -> Iterator[tuple[P, int]]:
        yield from self._cached
        if self._is_complete:
            return
        chunk_size, capacity = self._planned_chunks()
        number = 0
        for number, (batch, size) in enumerate(self._problem.chunks(chunk_size), start=1):
            if number <= len(self._cached):
                continue
            passes = self._linearise(batch, size)
            if number <= capacity:
                self._cached.append((passes, size))
            yield passes, size
        self._is_complete = number == len(self._cached)

    def _planned_chunks(self) -> tuple[int | None, int]:
        """Return the chunk size, and the number of chunks to cache."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self) -> tuple[int | None, int]:
        problem = self._problem
        sample_bytes = None
        if problem.equal_weights:
            sample_bytes = self._bytes_per_sample(self._kind, self._linearise)
        cache_bytes, chunk_bytes = self._budget()
        if problem.device.type == "cpu":
            chunk_bytes = min(chunk_bytes, _CPU_CHUNK)
        if sample_bytes is None:
            # Samples depend on their batch, or bytes cannot be counted: keep the user's batches.
            _, num_chunks = problem.counts()
            return None, int(num_chunks == 1)
        # Each chunk's passes hold gradients of the parameters' size; a large model's only for a moment.
        parameter_bytes = problem.num_params * problem.dtype.itemsize
        gradient_bytes = 0 if problem.large else parameter_bytes
        chunk_bytes = max(
            chunk_bytes,
            min(_MIN_CHUNK_IN_PARAMETERS * parameter_bytes, cache_bytes - gradient_bytes),
        )
        chunk_size = max(1, int(chunk_bytes / sample_bytes))
        size = min(chunk_size, problem.own_samples)
        return chunk_size, int(cache_bytes / (size * sample_bytes + gradient_bytes))

    def _budget(self) -> tuple[int, int]:
        """Return the most bytes of the cache, and of the passes of one chunk."""
        if self._memory is not None:
            return self._memory, self._memory
        step_bytes = self._step_bytes()
        if step_bytes is None or step_bytes >= _CACHED_PART * MEMORY:
            return MEMORY, MEMORY
        step_bytes = max(step_bytes, _MIN_STEP_BYTES)
        return int(step_bytes / _CACHED_PART), int(step_bytes / _CHUNK_PART)

    def _step_bytes(self) -> float | None:
        """Return the bytes a training step saves for its backward pass, at the user's chunk size."""
        chunk_size = self._problem.batches.chosen
        if chunk_size is None or not self._problem.equal_weights:
            return None
        theta = self._problem.theta()
        sample_bytes = self._bytes_per_sample(
            "loss", lambda batch, size: self._problem.loss(theta, batch)
        )
        return None if sample_bytes is None else chunk_size * sample_bytes

    def _bytes_per_sample(self, kind: str, compute: Callable[[Any, int], Any]) -> float | None:
        """Return the bytes ``compute`` saves for one more sample; ``None`` if they cannot be counted."""
        bytes_by_kind = _BYTES.of(self._problem)
        if kind not in bytes_by_kind:
            batch, size = next(self._problem.chunks(_TRIED))
            try:
                difference = saved_bytes(lambda: compute(batch, size))
                difference -= saved_bytes(lambda: compute(cut(batch, 0, 1), 1))
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                bytes_by_kind[kind] = None  # torch.func in the model excludes saved tensor hooks
            else:
                bytes_by_kind[kind] = max(difference / max(size - 1, 1), 1.0)
        return bytes_by_kind[kind]
