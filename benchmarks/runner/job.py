"""`Job`: a frozen configuration of something to compute, with an id that is a hash of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from benchmarks.runner.context import Work

__all__ = ["Job", "in_order"]


@dataclass(frozen=True)
class Job(ABC):
    """A frozen configuration: the fields of a dataclass that inherits this.

    Fields hold strings, numbers, booleans, ``None``, tuples of these and other jobs. The same
    fields must give the same result: draw from generators that a field seeds.

    Class attributes:
        kind: the first part of the id.
        schema: raise it when the same fields come to mean something else, so that old results are
            not reused.
        Result: a dataclass for what ``run`` returns; without one, results stay dictionaries. A
            field may have a default for results in which it is absent.

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
    Result: ClassVar[type | None] = None

    @abstractmethod
    def run(self, work: Work) -> dict[str, Any]:
        """Compute the result; :class:`~benchmarks.runner.context.Work` has what it needs."""

    @property
    def needs(self) -> tuple[Job, ...]:
        """Jobs that are done before this one, whose results and tensors ``run`` may read."""
        return ()

    @property
    def flops(self) -> float:
        """Rough number of floating-point operations, for the time estimate; 0 for hardly any."""
        return 0.0

    @property
    def together(self) -> tuple[object, ...] | None:
        """Jobs of one class with equal values here can run as one ensemble; ``None`` runs alone."""
        return None

    @classmethod
    def run_together(cls, jobs: list[Job], works: list[Work]) -> list[dict[str, Any]]:
        """Compute the results of jobs whose ``together`` is equal, to rounding those of ``run``.

        By default one after the other.
        """
        return [job.run(work) for job, work in zip(jobs, works, strict=True)]

    @classmethod
    def typed(cls, found: dict[str, Any]) -> Any:
        """Return what ``run`` returned, as read from a file, as a ``Result`` if the job has one."""
        if cls.Result is None:
            return found
        known = {field.name for field in fields(cls.Result)}
        return cls.Result(**{key: value for key, value in found.items() if key in known})

    @property
    def config(self) -> dict[str, Any]:
        """The fields in JSON's types."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return fields

    @cached_property  # hashing jobs that need jobs that need jobs takes a while
    def id(self) -> str:
        """The kind and 48 bits of a hash of kind, schema and fields.

        Fields at their default are left out, so that results stay valid when a field is added.
        Raise ``schema`` when a default changes.
        """
        content = json.dumps(_identity(self), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _identity(value: Any) -> Any:
    """Return what identifies a value."""
    if isinstance(value, tuple):
        return [_identity(part) for part in value]
    if not is_dataclass(value):
        return value
    identity = {
        field.name: _identity(getattr(value, field.name))
        for field in fields(value)
        if getattr(value, field.name) != field.default
    }
    return [value.kind, value.schema, identity] if isinstance(value, Job) else identity


def in_order(jobs: list[Job]) -> list[Job]:
    """Return ``jobs`` and all that they need, each once and after its own needs."""
    found: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.id not in found:
            for need in job.needs:
                visit(need)
            found[job.id] = job

    for job in jobs:
        visit(job)
    return list(found.values())
