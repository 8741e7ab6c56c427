"""`Job`: a frozen configuration of a computation, with a hash of it as id."""

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
    """A computation, configured by the fields of a frozen dataclass that inherits this class.

    Fields hold strings, numbers, booleans, ``None``, tuples of these, and other jobs. Equal fields
    must give equal results, so random numbers come from generators that a field seeds.

    Class attributes:
        kind: the first part of the id.
        schema: version of the meaning of the fields. Increase it when that meaning changes, so that
            old results are not reused.
        Result: dataclass of the result; ``None`` leaves it a dictionary. Defaults of its fields
            apply to stored results that lack them.

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
        """Compute the result. ``work`` gives inputs, folder, trace and checkpoints."""

    @property
    def needs(self) -> tuple[Job, ...]:
        """Jobs that must be done before this one; ``run`` may read their results and tensors."""
        return ()

    @property
    def flops(self) -> float:
        """Rough number of floating-point operations, for the time estimate; 0 if negligible."""
        return 0.0

    @property
    def together(self) -> tuple[object, ...] | None:
        """Jobs of one class with equal values can run as one ensemble; ``None`` means alone."""
        return None

    @classmethod
    def run_together(cls, jobs: list[Job], works: list[Work]) -> list[dict[str, Any]]:
        """Compute the results of jobs with equal ``together``; they equal those of ``run`` to rounding.

        By default the jobs run one after the other.
        """
        return [job.run(work) for job, work in zip(jobs, works, strict=True)]

    @classmethod
    def typed(cls, content: dict[str, Any]) -> Any:
        """Convert the content of ``result.json`` to ``Result``, if the job declares one."""
        if cls.Result is None:
            return content
        names = {field.name for field in fields(cls.Result)}
        return cls.Result(**{key: value for key, value in content.items() if key in names})

    @property
    def config(self) -> dict[str, Any]:
        """The fields in JSON's types."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return config

    @cached_property  # nested jobs are slow to hash
    def id(self) -> str:
        """The kind, and 48 bits of a hash of kind, schema and fields.

        Fields at their default are left out, so that adding a field keeps results valid. Increase
        ``schema`` when a default changes.
        """
        content = json.dumps(_identity(self), sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _identity(value: Any) -> Any:
    """Return the part of a value that is hashed: its fields that differ from their default."""
    if isinstance(value, tuple):
        return [_identity(item) for item in value]
    if not is_dataclass(value):
        return value
    identity = {
        field.name: _identity(getattr(value, field.name))
        for field in fields(value)
        if getattr(value, field.name) != field.default
    }
    return [value.kind, value.schema, identity] if isinstance(value, Job) else identity


def in_order(jobs: list[Job]) -> list[Job]:
    """Return ``jobs`` and all jobs that they need, each once, in topological order."""
    ordered: dict[str, Job] = {}

    def visit(job: Job) -> None:
        if job.id not in ordered:
            for need in job.needs:
                visit(need)
            ordered[job.id] = job

    for job in jobs:
        visit(job)
    return list(ordered.values())
