"""A job: what is to be computed, and nothing of where."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from benchmarks.runner.execute import Work

__all__ = ["Job", "Place", "in_order"]


@dataclass(frozen=True)
class Place:
    """Where a job is run; no part of what it is.

    Attributes:
        device: that tensors lie on.
        data_dir: where the data are; see :func:`benchmarks.training.data.load`.
        threads: of torch in each worker; ``None`` leaves it.
    """

    device: str = "cpu"
    data_dir: Path | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Job(ABC):
    """A frozen configuration: the fields of a dataclass that inherits this.

    Fields hold strings, numbers, booleans, ``None``, tuples of these and other jobs. The same
    fields must give the same result: draw from generators that a field seeds.

    Class attributes:
        kind: the first part of the id.
        schema: a number to raise when the same fields come to mean something else, so that old
            results are not taken for new ones.

    >>> @dataclass(frozen=True)
    ... class Square(Job):
    ...     kind = "square"
    ...     x: float
    ...
    ...     def run(self, work):
    ...         return {"square": self.x**2}
    >>> Square(3.0).id == Square(3.0).id != Square(4.0).id
    True
    >>> Square(3.0).id
    'square-bfc771a91024'
    """

    kind: ClassVar[str]
    schema: ClassVar[int] = 1

    @abstractmethod
    def run(self, work: Work) -> dict[str, Any]:
        """Compute the result; see :class:`~benchmarks.runner.execute.Work` for what there is to use."""

    @property
    def needs(self) -> tuple[Job, ...]:
        """Jobs that are to be done before, whose results and tensors ``run`` may read."""
        return ()

    @property
    def flops(self) -> float:
        """About how many floating-point operations it takes, for the estimate; 0 for next to none."""
        return 0.0

    @property
    def together(self) -> tuple[object, ...] | None:
        """Jobs of a class for which this is equal, and not ``None``, can be run as one ensemble."""
        return None

    @classmethod
    def run_together(cls, jobs: list[Job], works: list[Work]) -> list[dict[str, Any]]:
        """Compute the results of jobs whose ``together`` is equal: to rounding, those of ``run``.

        One after the other, unless a class knows better.
        """
        return [job.run(work) for job, work in zip(jobs, works, strict=True)]

    @property
    def config(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields

    @cached_property  # jobs that need jobs that need jobs take a while to be told
    def id(self) -> str:
        """The kind and 48 bits of a hash of kind, schema and fields.

        Fields at their default are left out, so that results stay valid when a field is added. A
        default that changes wants a new ``schema``.
        """
        content = json.dumps(_told(self), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _told(value: Any) -> Any:
    """Return what tells a value from others of its kind."""
    if isinstance(value, tuple):
        return [_told(part) for part in value]
    if not is_dataclass(value):
        return value
    told = {
        field.name: _told(getattr(value, field.name))
        for field in fields(value)
        if getattr(value, field.name) != field.default
    }
    return [value.kind, value.schema, told] if isinstance(value, Job) else told


def in_order(jobs: list[Job]) -> list[Job]:
    """Return ``jobs`` and all they need, each once, after what it needs."""
    found: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.id not in found:
            for need in job.needs:
                visit(need)
            found[job.id] = job

    for job in jobs:
        visit(job)
    return list(found.values())
