r"""`Ranks`: collectives over the ranks that measure together, by their ``torch.distributed`` names.

Each rank of a process group holds a shard of the data and the same parameters. It sums over its own
samples, and one all-reduce of a flat vector gives the mean over all samples,

.. math:: \frac{\sum_r \sum_{i \in r} H_i v}{\sum_r n_r},

also for unequal shards. Every rank then continues with the same result. Three rules keep the ranks in
step:

- rank 0 decides, and broadcasts its decision;
- all ranks raise an error of one rank: the failing rank reports it in the all-reduce that the others
  wait for. Within :meth:`Ranks.attempt` this includes errors between collectives;
- if a rank has ended, the others raise a :class:`LostRankError` after the timeout of the group.

With one process, or without a group, nothing here communicates. No other module calls a collective.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from stableopt._support.arguments import shown

__all__ = ["LostRankError", "Ranks", "world"]

T = TypeVar("T")

_RAISED_TOGETHER = "_stableopt_on_every_rank"
"""Attribute that marks errors which all ranks have raised together."""


class LostRankError(ConnectionError):
    """Another rank has ended, or did not answer within the timeout of the process group."""


class Ranks:
    """Collectives over the ranks of a process group, or over this process alone.

    Every rank must call every collective, in the same order.

    Args:
        group: a ``torch.distributed`` process group that includes this process; ``None`` for this
            process alone.

    Attributes:
        size: the number of ranks.
        rank: the rank of this process.

    Raises:
        TypeError: if ``group`` is neither a process group nor ``None``.
        ValueError: if this process is not a member.

    >>> alone, total = Ranks(), torch.tensor([6.0])
    >>> alone.all_reduce_mean([total], lambda: 3)                 # a sum over three samples
    [tensor([2.])]
    >>> alone.size, alone.several, alone.raise_together(lambda: "done")
    (1, False, 'done')
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size, self.rank = group, 1, 0
        self._attempting = False
        if group is None:
            return
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group: this process is not one of its members")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group={shown(group)}: expected a torch.distributed process group, such as"
                " torch.distributed.group.WORLD after init_process_group()"
            )
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    @property
    def several(self) -> bool:
        """Whether the group has more than one rank."""
        return self.size > 1

    @overload
    def all_reduce_sum(self, value: Tensor) -> Tensor: ...
    @overload
    def all_reduce_sum(self, value: float) -> float: ...
    def all_reduce_sum(self, value: Tensor | float) -> Tensor | float:
        """Return the sum over the ranks of a tensor or a number; whole numbers are summed exactly."""
        if not self.several:
            return value
        if isinstance(value, Tensor):
            return self._all_reduced(value.clone())
        return float(self._all_reduced(torch.tensor(value, dtype=torch.float64, device="cpu")))

    def all_reduce_mean(self, totals: list[Tensor], add: Callable[[], int]) -> list[Tensor]:
        """Return the means over the samples of all ranks.

        ``add()`` adds this rank's samples to ``totals``, in place, and returns their number. If it
        raises on one rank, all ranks raise. ``totals`` are overwritten.
        """
        if not self.several:
            count = add()
            return [total.div_(count) for total in totals]
        count, error = 0, None
        try:
            count = add()
        except Exception as local_error:
            error = local_error
        counters = totals[0].new_tensor([count, error is not None])
        flat = torch.cat([*(total.reshape(-1) for total in totals), counters])
        flat = self._all_reduced(flat)
        sums, (count, failures) = flat[:-2], flat[-2:].tolist()
        if failures:
            self._raise_first(error)
        parts = torch.split(sums / count, [total.numel() for total in totals])
        return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        return self.all_reduce_sum(float(flag)) > 0

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows ``(n_r, ...)`` of all ranks as one tensor; the numbers of rows may differ."""
        if not self.several:
            return rows
        counts = self.all_gather_object(len(rows))
        gathered = rows.new_zeros(sum(counts), *rows.shape[1:])
        start = sum(counts[: self.rank])
        gathered[start : start + len(rows)] = rows
        return self._all_reduced(gathered)

    def all_gather_object(self, own: T) -> list[T]:
        """Return the objects of all ranks, in the order of the ranks. They are pickled."""
        gathered: list[Any] = [own] * self.size
        if self.several:
            self._run_collective(lambda: dist.all_gather_object(gathered, own, group=self.group))
        return gathered

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Return the tensor of rank ``source``; other ranks pass one of the same shape and dtype."""
        if not self.several:
            return tensor
        buffer = tensor.detach().to(self._backend_device(tensor.device), copy=True)
        sender = dist.get_global_rank(self.group, source)
        self._run_collective(lambda: dist.broadcast(buffer, src=sender, group=self.group))
        return buffer.to(tensor.device)

    def broadcast_object(self, own: T, source: int = 0) -> T:
        """Return the object of rank ``source``. It is pickled."""
        if not self.several:
            return own
        objects = [own]
        sender = dist.get_global_rank(self.group, source)
        self._run_collective(
            lambda: dist.broadcast_object_list(objects, src=sender, group=self.group)
        )
        return objects[0]

    def raise_together(self, function: Callable[[], T]) -> T:
        """Return this rank's ``function()``; if the function raises on any rank, all ranks raise."""
        if not self.several:
            return function()
        result, error = None, None
        try:
            result = function()
        except Exception as local_error:
            error = local_error
        if self.any(error is not None):
            self._raise_first(error)
        return result  # type: ignore[return-value]

    def attempt(self, function: Callable[[], T]) -> T:
        """Return this rank's ``function()``, which may call collectives.

        If the function raises on any rank, also between two collectives, all ranks raise, and stay in
        step. Each collective inside costs an extra all-reduce of one number.
        """
        if not self.several or self._attempting:
            return function()
        self._attempting = True
        try:
            result = function()
            self._raise_on_all_if_any(None)
        except Exception as error:
            if not isinstance(error, LostRankError) and not getattr(error, _RAISED_TOGETHER, False):
                self._raise_on_all_if_any(error)
            raise
        finally:
            self._attempting = False
        return result

    def _raise_on_all_if_any(self, error: Exception | None) -> None:
        """Raise on every rank if any rank passes an error."""
        failed = torch.tensor(float(error is not None), dtype=torch.float64, device="cpu")
        failures = failed.to(self._backend_device(failed.device))
        self._run_or_lose_rank(lambda: dist.all_reduce(failures, group=self.group))
        if float(failures) > 0:
            self._raise_first(error)

    def _all_reduced(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; ``tensor`` may be overwritten."""
        buffer = tensor.to(self._backend_device(tensor.device))
        self._run_collective(lambda: dist.all_reduce(buffer, group=self.group))
        return buffer.to(tensor.device)

    def _backend_device(self, device: torch.device) -> torch.device:
        """Return ``device`` if the group's backend supports it, else a device that it supports."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _run_collective(self, collective: Callable[[], Any]) -> None:
        if self._attempting:
            self._raise_on_all_if_any(None)
        self._run_or_lose_rank(collective)

    def _run_or_lose_rank(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size} got no answer from the others: a process has ended,"
                f" or is elsewhere in the program ({str(error).splitlines()[0]})"
            ) from error

    def _raise_first(self, own: Exception | None) -> NoReturn:
        """Raise, on every rank, the error of the first rank that has one.

        If all ranks have equal errors, each raises its own.
        """
        described = self.all_gather_object(None if own is None else (_class_names(own), str(own)))
        failed, (names, message) = next((r, d) for r, d in enumerate(described) if d is not None)
        error: Exception
        if own is not None and (failed == self.rank or all(d == described[0] for d in described)):
            error, cause = own, own.__cause__
        else:
            error, cause = _error_class(names, message)(f"on rank {failed}: {message}"), own
        with contextlib.suppress(AttributeError):  # an exception that refuses new attributes
            setattr(error, _RAISED_TOGETHER, True)
        raise error from cause


def world() -> Ranks:
    """Return the ranks of the default process group, or this process alone without one."""
    has_group = dist.is_available() and dist.is_initialized()
    return Ranks(dist.group.WORLD if has_group else None)


def _class_names(error: Exception) -> list[tuple[str, str]]:
    """Return module and name of an error's class and of its bases, the closest first."""
    return [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]


def _error_class(names: list[tuple[str, str]], message: str) -> Callable[[str], Exception]:
    """Return the first of the named classes that is imported here and accepts a message alone."""
    # By name, since unpickling fails here for a class that only another rank can import.
    for module, name in names:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                kind(message)
            except TypeError:
                continue
            return kind
    return RuntimeError
