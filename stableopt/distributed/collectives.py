r"""Collectives over the processes that measure together, by their ``torch.distributed`` names.

Each rank of a process group holds its shard of the data and the same parameters. It sums over its own
samples, and one all-reduce of one flat vector makes that the mean over all of them,

.. math:: \frac{\sum_r \sum_{i \in r} H_i v}{\sum_r n_r},

so that shards may be unequal. Every rank then does the same with the result. Three rules keep the ranks
together:

- rank 0 decides, and broadcasts its decision;
- an error on one rank is raised on all of them: the rank that fails says so in the same all-reduce that
  the others wait for. Within :meth:`Ranks.attempt` that holds for errors between collectives as well;
- a rank that has ended is a :class:`LostRankError` on the others, after the timeout of the group.

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

__all__ = ["LostRankError", "Ranks", "world"]

T = TypeVar("T")

_EVERYWHERE = "_stableopt_on_every_rank"
"""Attribute of errors that all ranks have raised together."""


class LostRankError(ConnectionError):
    """Another rank has ended, or did not answer within the timeout of the process group."""


class Ranks:
    """The ranks of a process group, or this process alone, and collectives over them.

    Every rank must call every collective, in the same order.

    Args:
        group: a ``torch.distributed`` process group that includes this process; ``None`` for this
            process alone.

    Attributes:
        size: the number of ranks.
        rank: the rank of this process.

    Raises:
        TypeError: if ``group`` is neither.
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
                f"process_group={group!r}: expected a torch.distributed process group, such as"
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
        return float(self._all_reduced(torch.tensor(value, dtype=torch.float64)))

    def all_reduce_mean(self, totals: list[Tensor], add: Callable[[], int]) -> list[Tensor]:
        """Return the means over the samples of all ranks.

        ``add()`` adds the samples of this rank to ``totals``, in place, and returns their number. If
        it raises on one rank, all ranks raise. ``totals`` are used up.
        """
        if not self.several:
            count = add()
            return [total.div_(count) for total in totals]
        count, error = 0, None
        try:
            count = add()
        except Exception as own:
            error = own
        numbers = totals[0].new_tensor([count, error is not None])
        flat = torch.cat([*(total.reshape(-1) for total in totals), numbers])
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
        """Return the rows ``(n_r, ...)`` of all ranks in one tensor; their numbers may differ."""
        if not self.several:
            return rows
        counts = self.all_gather_object(len(rows))
        every = rows.new_zeros(sum(counts), *rows.shape[1:])
        start = sum(counts[: self.rank])
        every[start : start + len(rows)] = rows
        return self._all_reduced(every)

    def all_gather_object(self, own: T) -> list[T]:
        """Return the objects of all ranks, rank 0's first. They are pickled."""
        found: list[Any] = [own] * self.size
        if self.several:
            self._answered(lambda: dist.all_gather_object(found, own, group=self.group))
        return found

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Return the tensor of rank ``source``; the other ranks pass one of its shape and dtype."""
        if not self.several:
            return tensor
        carrier = tensor.detach().to(self._reachable(tensor.device), copy=True)
        sender = dist.get_global_rank(self.group, source)
        self._answered(lambda: dist.broadcast(carrier, src=sender, group=self.group))
        return carrier.to(tensor.device)

    def broadcast_object(self, own: T, source: int = 0) -> T:
        """Return the object of rank ``source``. It is pickled."""
        if not self.several:
            return own
        found = [own]
        sender = dist.get_global_rank(self.group, source)
        self._answered(lambda: dist.broadcast_object_list(found, src=sender, group=self.group))
        return found[0]

    def raise_together(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns on this rank; if it raises on any rank, all ranks raise."""
        if not self.several:
            return function()
        found, error = None, None
        try:
            found = function()
        except Exception as own:
            error = own
        if self.any(error is not None):
            self._raise_first(error)
        return found  # type: ignore[return-value]

    def attempt(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns on this rank; it may call collectives.

        If it raises on any rank, also between two collectives, all ranks raise and can go on together.
        Each collective inside takes another one, of a single number.
        """
        if not self.several or self._attempting:
            return function()
        self._attempting = True
        try:
            found = function()
            self._meet(None)
        except Exception as error:
            if not isinstance(error, LostRankError) and not getattr(error, _EVERYWHERE, False):
                self._meet(error)
            raise
        finally:
            self._attempting = False
        return found

    def _meet(self, error: Exception | None) -> None:
        """Raise on every rank if any passes an error."""
        failed = torch.tensor(float(error is not None), dtype=torch.float64)
        carrier = failed.to(self._reachable(failed.device))
        self._called(lambda: dist.all_reduce(carrier, group=self.group))
        if float(carrier) > 0:
            self._raise_first(error)

    def _all_reduced(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; ``tensor`` may be overwritten."""
        carrier = tensor.to(self._reachable(tensor.device))
        self._answered(lambda: dist.all_reduce(carrier, group=self.group))
        return carrier.to(tensor.device)

    def _reachable(self, device: torch.device) -> torch.device:
        """Return ``device`` if the group's backend can send from it, else one that it can."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _answered(self, collective: Callable[[], Any]) -> None:
        if self._attempting:
            self._meet(None)
        self._called(collective)

    def _called(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size} got no answer from the others: a process has ended,"
                f" or is elsewhere in the program ({str(error).splitlines()[0]})"
            ) from error

    def _raise_first(self, own: Exception | None) -> NoReturn:
        """Raise, on every rank, the error of the first rank that has one.

        Each rank raises its own if all have the same.
        """
        described = self.all_gather_object(None if own is None else (_class_names(own), str(own)))
        failed, (names, message) = next((r, d) for r, d in enumerate(described) if d is not None)
        error: Exception
        if own is not None and (failed == self.rank or all(d == described[0] for d in described)):
            error, cause = own, own.__cause__
        else:
            error, cause = _error_class(names, message)(f"on rank {failed}: {message}"), own
        with contextlib.suppress(AttributeError):  # an error without a dictionary
            setattr(error, _EVERYWHERE, True)
        raise error from cause


def world() -> Ranks:
    """Return the ranks of the default process group, or this process alone without one."""
    there = dist.is_available() and dist.is_initialized()
    return Ranks(dist.group.WORLD if there else None)


def _class_names(error: Exception) -> list[tuple[str, str]]:
    """Return module and name of an error's class and of its bases, the closest first."""
    return [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]


def _error_class(names: list[tuple[str, str]], message: str) -> Callable[[str], Exception]:
    """Return the first of the classes that this process knows and can make from a message alone."""
    # By name, since a class that only one rank can import could not be unpickled here.
    for module, name in names:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                kind(message)
            except TypeError:
                continue
            return kind
    return RuntimeError
