"""The passes over the data at one point, kept from product to product as far as memory allows.

The first part of every product, from the parameters to the gradients with their graph, is the same
for all products at a point. :class:`KeptPasses` does it once for as many chunks of the data as fit
into a number of bytes, and each time anew for the others; and it cuts chunks that are small enough
for a CPU's cache, where they are quicker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from stableopt.curvature.problem.data import cut
from stableopt.curvature.problem.problem import Problem

__all__ = ["MEMORY", "KeptPasses"]

P = TypeVar("P")

MEMORY = 2**30
"""Bytes of kept passes where nobody chose: a thousand samples of a small convolutional network."""

_CPU_CHUNK = 96 * 2**20
"""Bytes of passes in one chunk on a CPU: more fell out of its cache, fewer were all overhead."""

_LEAST = 64 * 2**20
"""Bytes of passes that are no matter on any machine, however little a training step takes."""

_LEAN_KEPT, _LEAN_CHUNK = 4, 8
"""Parts of a training step's memory that passes take where a chunk size was chosen: a quarter kept, an
eighth in one chunk. A product's own intermediates, and what the count does not see, take as much
again."""

_TRIED = 3


class KeptPasses(Generic[P]):
    """A re-iterable of ``(passes, size)`` over the chunks of a problem's data.

    Args:
        problem: whose data they are.
        linearise: ``(batch, size) -> passes``, a method of the object that owns this one.
        memory: bytes that kept passes may take; in all, since what is not kept is made of one chunk.
            ``None`` is 1 GiB, or where the problem has a chunk size what a training step of so many
            samples takes, if that is less.
        kind: names the passes, so that what they take is found out once for each kind.

    To be iterated inside :meth:`Problem.evaluation`.
    """

    def __init__(
        self, problem: Problem, linearise: Callable[[Any, int], P], *, memory: int | None, kind: str
    ) -> None:
        # Held, the method would hold its owner, which holds this: a circle, and passes that stay in
        # memory after both are dropped, until Python looks for circles.
        self._problem, self._method = problem, WeakMethod(linearise)
        self._memory, self._kind = memory, kind
        self._kept: list[tuple[P, int]] = []
        self._all_kept = False
        self._plan: tuple[int | None, int] | None = None

    def _linearise(self, batch: Any, size: int) -> P:
        linearise = self._method()
        assert linearise is not None, "its owner is gone"
        return linearise(batch, size)

    @property
    def kept(self) -> list[tuple[P, int]]:
        """The passes that are there."""
        return self._kept

    @property
    def chunk_size(self) -> int | None:
        """The most samples in a chunk; ``None`` for the problem's own."""
        with self._problem.evaluation():
            return self._planned()[0]

    @property
    def keepable(self) -> int:
        """How many chunks, the first ones, are kept."""
        return self._planned()[1]

    def __iter__(self) -> Iterator[tuple[P, int]]:
        yield from self._kept
        if self._all_kept:
            return
        chunk_size, keepable = self._planned()
        number = 0
        for number, (batch, size) in enumerate(self._problem.chunks(chunk_size), start=1):
            if number <= len(self._kept):
                continue
            passes = self._linearise(batch, size)
            if number <= keepable:
                self._kept.append((passes, size))
            yield passes, size
        self._all_kept = number == len(self._kept)

    def _planned(self) -> tuple[int | None, int]:
        """Return the chunk size, and how many chunks to keep."""
        if self._plan is None:
            each = self._bytes_each() if self._problem.equal_weights else None
            memory, at_once = self._budget()
            if self._problem.device.type == "cpu":
                at_once = min(at_once, _CPU_CHUNK)
            if each is None:
                # A batch that is more than its samples, or that cannot be weighed, stays as the
                # user cut it.
                self._plan = (None, int(self._problem.one_chunk))
            else:
                chunk_size = max(1, int(at_once / each))
                size = min(chunk_size, self._problem.own_samples)
                self._plan = (chunk_size, int(memory / (size * each)))
        return self._plan

    def _budget(self) -> tuple[int, int]:
        """Return the bytes of passes that may be kept, and of those in one chunk."""
        if self._memory is not None:
            return self._memory, self._memory
        step = self._step_bytes()
        if step is None or step >= _LEAN_KEPT * MEMORY:
            return MEMORY, MEMORY
        least = max(step, _LEAST)
        return int(least / _LEAN_KEPT), int(least / _LEAN_CHUNK)

    def _step_bytes(self) -> float | None:
        """Return what a training step keeps for its backward pass, at the chunk size chosen."""
        chosen = self._problem.batches.chosen
        if chosen is None or not self._problem.equal_weights:
            return None
        theta = self._problem.theta()
        each = self._bytes_of("loss", lambda batch, size: self._problem.loss(theta, batch))
        return None if each is None else chosen * each

    def _bytes_each(self) -> float | None:
        """Return what the passes of one more sample take; ``None`` where it cannot be told."""
        return self._bytes_of(self._kind, self._linearise)

    def _bytes_of(self, kind: str, made: Callable[[Any, int], Any]) -> float | None:
        memo = self._problem.memo
        key = f"bytes of {kind}"
        if key not in memo:
            batch, size = next(self._problem.chunks(_TRIED))
            try:
                more = _bytes(made, batch, size) - _bytes(made, cut(batch, 0, 1), 1)
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                memo[key] = None  # torch.func within the model does not let itself be watched
            else:
                memo[key] = max(more / max(size - 1, 1), 1.0)
        known: float | None = memo[key]
        return known


def _bytes(made: Callable[[Any, int], Any], batch: Any, size: int) -> int:
    with _SavedBytes() as saved:
        made(batch, size)
    return saved.count


class _SavedBytes:
    """Counts the bytes that autograd saves for the backward pass of what is done inside."""

    def __init__(self) -> None:
        self.count = 0
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        # A sparse gradient has no storage of its own, but its indices and values have.
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self._alive.append(part)  # or its address would be used again
                self.count += storage.nbytes()
        return tensor

    def __enter__(self) -> _SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
