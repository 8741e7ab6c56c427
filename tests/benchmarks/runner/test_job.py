"""A job's id depends on its computation alone, and jobs are ordered by their needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from runner_jobs import Number, Sum

from benchmarks.runner import Job, Work
from benchmarks.runner.job import in_order
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution


def test_an_id_is_the_hash_of_what_differs_from_the_defaults() -> None:
    """Catches an id by Python's hash, which differs between processes, and any change of ids.

    After a change all existing results would be lost. The hashed content is written out by hand.
    """
    content = '["sum", 1, {"terms": [["number", 1, {"unit": "km", "x": 1.5}]]}]'
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert Sum((Number(1.5, unit="km"),)).id == f"sum-{digest[:12]}"
    content = '["solution", 1, {"data": {"n": 100}, "lr": 0.5}]'
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert Solution(Dataset("digits", 100), lr=0.5).id == f"solution-{digest[:12]}"


def test_every_field_tells_jobs_apart_also_those_of_a_need() -> None:
    """Catches a field that is left out of the id: two jobs would share one result."""
    base = Solution(Dataset("digits", 100), lr=0.5)
    others = [
        Solution(Dataset("digits", 101), lr=0.5),
        Solution(Dataset("digits", 100, random_labels=1), lr=0.5),
        Solution(Dataset("digits", 100), lr=0.25),
        Solution(Dataset("digits", 100), lr=0.5, seed=1),
        Solution(Dataset("digits", 100), lr=0.5, batch_size=4),
        Solution(Dataset("digits", 100), lr=0.5, non_uniformity=False),
        Sum((base,)),
        Sum((base, base)),
        Sum((Number(1.0),)),
        Sum((Number(2.0),)),
    ]
    assert len({job.id for job in [base, *others]}) == 1 + len(others)
    assert base.id == Solution(Dataset("digits", 100), lr=0.5).id
    assert base.id.startswith("solution-")


def test_a_field_that_is_added_leaves_ids_as_they_were() -> None:
    """Catches ids that change, also those of dependent jobs, when a class gains a field."""

    @dataclass(frozen=True)
    class Later(Number):
        added: int = 3

    assert Later(1.0).id == Number(1.0).id
    assert Later(1.0, added=4).id != Number(1.0).id
    assert Number(1.0, unit="m").id == Number(1.0).id != Number(1.0, unit="km").id
    assert Sum((Later(1.0),)).id == Sum((Number(1.0),)).id


def test_a_schema_makes_new_ids_also_of_those_that_need_it() -> None:
    """Catches an old result, or one computed from an old result, that counts as a new one."""

    @dataclass(frozen=True)
    class Newer(Number):
        schema = 2

    assert Newer(1.0).id != Number(1.0).id
    assert Sum((Newer(1.0),)).id != Sum((Number(1.0),)).id


def test_the_configuration_is_what_was_given() -> None:
    """Catches a record that leaves out the defaults, as the id does."""
    config = Solution(Dataset("digits", 100), lr=0.5).config
    assert config["data"] == {"name": "digits", "n": 100, "random_labels": 0}
    assert (config["lr"], config["seed"], config["batch_size"]) == (0.5, 0, None)


def test_needs_come_first_and_once() -> None:
    """Catches a job before what it needs, and one that is listed for each that needs it."""
    first, second = Number(1.0), Number(2.0)
    both = Sum((first, second))
    top = Sum((both, first))
    assert in_order([top, second, both]) == [first, second, both, top]


def test_what_a_job_does_not_say_of_itself() -> None:
    """Catches defaults under which a plain job would be grouped, or need something."""

    @dataclass(frozen=True)
    class Plain(Job):
        kind = "plain"

        def run(self, work: Work) -> dict[str, Any]:
            return {}

    assert (Plain().needs, Plain().flops, Plain().together) == ((), 0.0, None)
