"""Jobs for the tests of the runner, in a module that workers can import."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import Job, Place, Store, Work, run_all
from benchmarks.runner.workers import executor


@dataclass(frozen=True)
class Number(Job):
    kind = "number"

    x: float
    unit: str = "m"

    def run(self, work: Work) -> dict[str, Any]:
        work.restored()
        work.trace(x=self.x)
        work.save({"x": torch.tensor(self.x)})
        return {"value": self.x}


@dataclass(frozen=True)
class Sum(Job):
    """The sum of other jobs' numbers, read once as results and once as tensors."""

    kind = "sum"

    terms: tuple[Job, ...]

    @property
    def needs(self) -> tuple[Job, ...]:
        return self.terms

    def run(self, work: Work) -> dict[str, Any]:
        total = sum(work.result(term)["value"] for term in self.terms)
        assert total == sum(float(work.tensors(term)["x"]) for term in self.terms)
        work.save({"x": torch.tensor(total)})
        return {"value": total}


@dataclass(frozen=True)
class Failing(Job):
    """Fails until there is a file at ``cure``."""

    kind = "failing"

    cure: str

    def run(self, work: Work) -> dict[str, Any]:
        if not Path(self.cure).exists():
            raise ArithmeticError("no cure")
        work.save({"x": torch.tensor(1.0)})
        return {"value": 1.0}


@dataclass(frozen=True)
class Dying(Job):
    """Ends its process."""

    kind = "dying"

    way: str

    def run(self, work: Work) -> dict[str, Any]:
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit("which is an exception that no job is expected to raise")


@dataclass(frozen=True)
class Unwritable(Job):
    """Returns a value that JSON cannot hold."""

    kind = "unwritable"

    def run(self, work: Work) -> dict[str, Any]:
        return {"value": torch.zeros(1)}


@dataclass(frozen=True)
class Member(Job):
    """Can be run with others of its group; records how many ran together."""

    kind = "member"

    x: int
    group: str | None = "a"

    @property
    def together(self) -> tuple[object, ...] | None:
        return None if self.group is None else (self.group,)

    def run(self, work: Work) -> dict[str, Any]:
        return {"x": self.x, "with": [self.x]}

    @classmethod
    def run_together(cls, jobs: list[Job], works: list[Work]) -> list[dict[str, Any]]:
        members = [job.x for job in jobs if isinstance(job, Member)]
        return [{"x": x, "with": members} for x in members]


INSIDE = [0, 0]
"""How many jobs of the next class run in this process, and the most that there were."""


@dataclass(frozen=True)
class Alone(Job):
    kind = "alone"

    x: int

    def run(self, work: Work) -> dict[str, Any]:
        INSIDE[0] += 1
        INSIDE[1] = max(INSIDE)
        time.sleep(0.01)
        INSIDE[0] -= 1
        return {"threads": threading.active_count() > 1}


@dataclass(frozen=True)
class Walk(Job):
    """A random walk with a checkpoint at every tenth step, which is not where the trace ends.

    Between two steps it sleeps for as long as the environment's ``PACE`` says.
    """

    kind = "walk"

    seed: int
    steps: int = 95

    def run(self, work: Work) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        at, first = torch.zeros(3), 1
        state = work.restored()
        if state is not None:
            at, first = state["at"], state["step"] + 1
            generator.set_state(state["generator"])
        for step in range(first, self.steps + 1):
            at = at + torch.randn(3, generator=generator)
            work.trace(step=step, at=at.tolist())
            work.progress(step / self.steps, f"walk {self.seed}, step {step}")
            if step % 10 == 0:
                work.checkpoint({"at": at, "step": step, "generator": generator.get_state()})
            time.sleep(float(os.environ.get("PACE", "0")))
        work.save({"x": at})
        return {"value": at.tolist(), "inf": float("inf")}


WALKS = [Walk(seed) for seed in range(5)]


def sweep(root: str, workers: int) -> None:
    """Run the walks in processes, as the command line does."""
    run_all(
        list(WALKS),
        Store(Path(root)),
        Place(threads=1),
        make_executor=executor("processes", workers),
        in_flight=workers,
    )
