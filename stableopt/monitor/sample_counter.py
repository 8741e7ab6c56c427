"""`SampleCounter`: counts the samples of each training step in the model's forward passes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stableopt._support.torch_internals import eager, in_backward, vmap_size
from stableopt._support.warn_once import WarnOnce
from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.data.batches import tensors_in
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.problem import Problem

__all__ = ["SampleCounter"]

_OBSERVED_STEPS = 5
"""The batch size is the median over so many steps: one ragged batch does not change it, nor does one
skipped step, whose samples are counted with the next step."""


class SampleCounter:
    """A forward pre-hook that counts samples; a copy made with its module counts nothing.

    A line search or SAM evaluates the batch at several points in a step. Only passes at the first point
    are counted; passes at later points follow an in-place change of a parameter. An error while counting
    never reaches training: the size of the step is then not known.

    Args:
        params: returns the trained parameters.
        dim: the dimension that counts samples; the first dimension for tensors without it.
        warn: warns of samples that could not be counted.

    Attributes:
        active: whether forward passes are counted.
        passed: the model's samples for each sample of the loss: two in a loss of pairs. 0 if they are
            not in proportion, so that the batch size is not known.
        dims: the number of dimensions of a batch loss's inputs; an input with one less is a sample.
        observed: the model's samples in each of the last five steps, oldest first.
        failed: whether the samples since the last recorded step could not be counted.
    """

    def __init__(
        self,
        params: Callable[[], Sequence[Tensor]] = list,
        dim: int = 0,
        warn: WarnOnce | None = None,
    ) -> None:
        self.active, self.dim, self.failed = True, dim, False
        self._warn = WarnOnce() if warn is None else warn
        self.observed: deque[int] = deque(maxlen=_OBSERVED_STEPS)
        self.passed = 1
        self.dims: int | None = None
        self._params, self._first_version = params, 0
        self._count, self._seen_forward, self._incomplete = 0, False, False
        self._calibrating, self._passes = False, list[list[float]]()

    @property
    def __name__(self) -> str:
        """Refuses ``torch.jit.script``, which reads the name of a hook before compiling it."""
        raise AttributeError(
            "torch.jit.script cannot compile the hook that counts the samples of a step: pass"
            " batch_size= to track() or StabilityMonitor, which then adds no hook, or close() the"
            " monitor before"
        )

    @property
    def batch_size(self) -> int | None:
        """The median of :attr:`observed`, in the loss's samples; ``None`` if it is not known."""
        if not self.observed or not self.passed:
            return None
        return max(1, median_low(self.observed) // self.passed)

    def restore(self, observed: Iterable[int]) -> None:
        """Continue after the ``observed`` steps of a resumed run."""
        self.observed.clear()
        self.observed.extend(observed)

    def calibrate(self, problem: MeanLoss) -> None:
        """Determine :attr:`dim`, :attr:`dims` and :attr:`passed` from evaluations of a batch loss.

        The dimension of samples is the one whose size, summed over all passes, is a multiple of the
        number of samples for any chunk size, on all ranks. Nodes of graphs, or lists of images, have
        none. Under ``fully_shard`` it is not known.
        """
        if problem.loss_fn is not None:
            return  # loss_fn(model(x), y) passes each sample once, in batches
        if not isinstance(problem, Problem):
            # FSDP's passes run without gradients, as targets do that a loss computes; and a rank
            # repeats a batch while another has more.
            self.passed = 0
            return
        with problem.evaluation():
            largest = next(size for _, size in problem.chunks())
        # Two evaluations on every rank, also on one with a single sample: they wait for each other.
        whole, halved = (self._totals(problem, size) for size in (largest, max(1, largest // 2)))
        samples = problem.own_samples
        own = {
            (dim, int(total) // samples)
            for dim, (total, same) in enumerate(zip(whole, halved, strict=False))
            if total == same and total % samples == 0
        }
        if self._incomplete:
            whole, own, self._incomplete = [math.nan], set(), False
        gathered = problem.ranks.all_gather_object((bool(whole), own))
        if not any(passes for passes, _ in gathered):
            return  # the loss calls parts of the model only
        multiples = dict(sorted(set.intersection(*(pairs for _, pairs in gathered))))
        if self.dim not in multiples:
            self.dim = next(iter(multiples), 0)
        self.passed = multiples.get(self.dim, 0)

    def _totals(self, problem: Problem, chunk_size: int) -> list[float]:
        """Return the sum over the passes of all data of the first input's size, by dimension.

        It is NaN in a dimension in which the samples of nested tensors differ.
        """
        self._calibrating, self._passes = True, []
        try:
            problem.value(chunk_size=chunk_size)
            if self._passes:
                self.dims = len(self._passes[-1])
            return [sum(sizes) for sizes in zip(*self._passes, strict=False)]
        finally:
            self._calibrating, self._passes = False, []

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the samples of a training forward pass."""
        # Skip validation, and targets that a loss computes: both run without gradients.
        if torch.is_grad_enabled():
            with self._guarded():
                self._count_pass((args, kwargs))

    def _count_pass(self, inputs: Any) -> None:
        if self._calibrating:
            first = next((t for t in tensors_in(inputs) if t.dim()), None)
            if first is not None:
                self._passes.append([size * vmap_size(first) for size in _sizes(first)])
            return
        if not self.active or measuring():
            return
        version = sum(p._version for p in self._params())
        if not self._count:
            self._first_version = version
        if version != self._first_version:
            return
        # Activation checkpointing repeats a forward pass in the backward pass, or runs it only there.
        recomputed = in_backward()
        if not (recomputed and self._seen_forward):
            self.add(inputs)
        self._seen_forward = self._seen_forward or not recomputed

    def count_only(self, batch: Any) -> None:
        """Count ``batch``, and stop counting forward passes."""
        if self.active:
            self.observed.clear()
        self.active, self.passed, self.dims = False, 1, None
        with self._guarded():
            self.add(batch)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Warn of an error while counting instead of raising it into training."""
        try:
            yield
        except Exception as error:
            self._incomplete = True
            if not self._calibrating:
                self.failed = True
                self.observed.clear()  # sizes of other steps are not that of this one
            self._warn(
                f"the samples of a step were not counted: {type(error).__name__}: {error}",
                "limits that depend on the batch size are not known; pass batch_size=",
            )

    def add(self, batch: Any) -> None:
        """Count the samples of ``batch``: the size of its first tensor."""
        packed = next(_packed_sequences(batch), None)
        first = next((t for t in tensors_in(batch) if t.dim()), None)
        if packed is not None:  # its first batch size is the number of its samples
            self._count += int(packed.batch_sizes[0])
        elif first is not None and self.dims is not None and first.dim() == self.dims - 1:
            self._count += vmap_size(first)
        elif first is not None:
            rows = first.size(self.dim if first.dim() > self.dim else 0)  # nested: no shape
            self._count += int(rows) * vmap_size(first)

    def end_step(self) -> None:
        """Record the samples since the last call, if any, as one step."""
        if self._count and not self._incomplete:
            self.observed.append(self._count)
            self.failed = False
        self._count, self._seen_forward, self._incomplete = 0, False, False

    def __deepcopy__(self, memo: Any) -> SampleCounter:
        return _inactive()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_inactive, ())


def _inactive() -> SampleCounter:
    counter = SampleCounter()
    counter.active = False
    return counter


def _sizes(tensor: Tensor) -> list[float]:
    """Return the size in each dimension, NaN where a nested tensor has none."""
    sizes: list[float] = []
    for dim in range(tensor.dim()):
        size: object = None
        with suppress(RuntimeError):
            size = tensor.size(dim)
        sizes.append(size if isinstance(size, int) else math.nan)  # jagged ones have a symbol
    return sizes


def _packed_sequences(batch: Any) -> Iterator[PackedSequence]:
    if isinstance(batch, PackedSequence):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _packed_sequences(value)
