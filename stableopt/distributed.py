r"""The processes that measure together: sums over all their samples, and one decision for all.

Each rank of a ``torch.distributed`` group holds its shard of the data and the same parameters. It sums
over its own samples, and one all-reduce of one flat vector makes that the mean over all of them,

.. math:: \frac{\sum_r \sum_{i \in r} H_i v}{\sum_r n_r},

so that shards may be unequal. Everything else is done by every rank alike. Three rules keep the ranks
together:

- a decision is rank 0's (:meth:`Ranks.first`);
- an error on one rank is raised on all of them: whoever fails says so in the very all-reduce that the
  others wait for;
- a rank that is gone is a :class:`LostRankError` for the others, when the group's timeout is over.

Alone, or without a group, nothing here communicates. This is the one module that does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["LostRankError", "Ranks", "world"]

T = TypeVar("T")

_MESSAGE = 2048
"""Bytes in which an error is told to the other ranks."""


class LostRankError(ConnectionError):
    """Another rank did not answer within the timeout of the process group, or has ended."""


class Ranks:
    """The ranks of a process group, or this process alone.

    Every method that takes part in a sum or a decision must be called on every rank, in one order.

    Args:
        group: a ``torch.distributed`` process group of which this process is a member; ``None`` for
            this process alone.

    Attributes:
        size: how many there are.
        rank: which of them this is.

    Raises:
        TypeError: for anything else.
        ValueError: if this process is not a member.

    >>> alone, total = Ranks(), torch.tensor([6.0])
    >>> alone.mean([total], lambda: 3)                 # three samples were summed
    [tensor([2.])]
    >>> alone.size, alone.several, alone.agree(lambda: "done")
    (1, False, 'done')
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.size, self.rank = group, 1, 0
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
        """Whether there are other ranks."""
        return self.size > 1

    def mean(self, totals: list[Tensor], add: Callable[[], int]) -> list[Tensor]:
        """Return the means over the samples of all ranks.

        ``add()`` adds those of this rank to ``totals``, in place, and returns their number.
        """
        if not self.several:
            count = add()
            return [total / count for total in totals]
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
            self._raise_together(error)
        parts = torch.split(sums / count, [total.numel() for total in totals])
        return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]

    def agree(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns on this rank, or raise if it raised on any."""
        if not self.several:
            return function()
        found, error = None, None
        try:
            found = function()
        except Exception as own:
            error = own
        if self.sum(error is not None):
            self._raise_together(error)
        return found  # type: ignore[return-value]

    def sum(self, number: float) -> float:
        """Return the sum of the ranks' numbers, exact for whole ones."""
        return self.sums([number])[0]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' numbers, one by one."""
        if not self.several:
            return list(numbers)
        return list(self.summed(torch.tensor(numbers, dtype=torch.float64)).tolist())

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors."""
        return self._all_reduced(tensor.clone()) if self.several else tensor

    def counts(self, own: int) -> list[int]:
        """Return every rank's number."""
        return [int(n) for n in self.sums([own if r == self.rank else 0 for r in range(self.size)])]

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows ``(n_r, ...)`` of all ranks, one after the other."""
        if not self.several:
            return rows
        counts = self.counts(len(rows))
        every = rows.new_zeros(sum(counts), *rows.shape[1:])
        start = sum(counts[: self.rank])
        every[start : start + len(rows)] = rows
        return self._all_reduced(every)

    def first(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; the others give one of its shape and dtype."""
        return self.of(0, tensor)

    def of(self, rank: int, tensor: Tensor) -> Tensor:
        """Return the tensor of one rank; the others give one of its shape and dtype."""
        if not self.several:
            return tensor
        carrier = tensor.detach().to(self._reachable(tensor.device), copy=True)
        source = dist.get_global_rank(self.group, rank)
        self._answered(lambda: dist.broadcast(carrier, src=source, group=self.group))
        return carrier.to(tensor.device)

    def _all_reduced(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; ``tensor`` may be overwritten."""
        carrier = tensor.to(self._reachable(tensor.device))
        self._answered(lambda: dist.all_reduce(carrier, group=self.group))
        return carrier.to(tensor.device)

    def _reachable(self, device: torch.device) -> torch.device:
        """Return where the group's backend can send from, the device itself if it can."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def _answered(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size} got no answer from the others: a process has ended,"
                f" or is elsewhere in the program ({str(error).splitlines()[0]})"
            ) from error

    def _raise_together(self, own: Exception | None) -> NoReturn:
        """Raise the error of the first rank that has one, on every rank."""
        failed = [bool(n) for n in self.counts(own is not None)]
        culprit = failed.index(True)
        said = b"" if own is None else _spelt(own)
        letter = torch.tensor([*said.ljust(_MESSAGE, b"\0")], dtype=torch.uint8)
        letter = self.of(culprit, letter)
        if culprit == self.rank and own is not None:
            raise own
        kind, message = _read(bytes(letter.tolist()))
        raise kind(f"on rank {culprit}: {message}") from own


def world() -> Ranks:
    """Return the ranks of the default process group, or this process alone if there is none."""
    there = dist.is_available() and dist.is_initialized()
    return Ranks(dist.group.WORLD if there else None)


def _spelt(error: Exception) -> bytes:
    """Return the classes of an error, the closest first, and its message."""
    kinds = [f"{kind.__module__}:{kind.__qualname__}" for kind in type(error).__mro__]
    return "\n".join([" ".join(kinds), str(error)]).encode()[:_MESSAGE]


def _read(letter: bytes) -> tuple[Callable[[str], Exception], str]:
    """Return the closest class that is made of a message alone, and the message."""
    kinds, _, message = letter.rstrip(b"\0").decode(errors="ignore").partition("\n")
    for name in kinds.split():
        module, _, attribute = name.partition(":")
        kind = getattr(sys.modules.get(module), attribute, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            continue
        try:
            kind(message)
        except TypeError:
            continue
        return kind, message
    return RuntimeError, message
