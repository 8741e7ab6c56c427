"""The order in which missing experiments are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import agenda
from benchmarks.experiments import counterexample, edge
from benchmarks.runner import Place, Store, run_all


def test_the_order_is_unpublished_then_the_papers_then_the_quickest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours spent on what is known, and what is done offered again."""
    names = ("toy", "gd-sharpness", "counterexample", "edge")
    monkeypatch.setattr(agenda, "NAMES", names)
    store, published = Store(tmp_path / "runs"), tmp_path / "results"
    monkeypatch.setattr(edge.EXPERIMENT, "datasets", ("digits",))
    known = published / "small" / "toy" / "toy" / "about.json"
    known.parent.mkdir(parents=True)
    known.write_text("{}")
    found = agenda.missing("small", store, published)
    order = [(part.experiment.name, part.experiment.data) for part in found]
    assert order[0] == ("counterexample", "two-coordinates")  # its jobs state no operations
    assert {name for name, _ in order[1:4]} == {"gd-sharpness"}
    assert order[1][1] == "digits"  # the smallest
    assert order[4:] == [("edge", "digits"), ("toy", "toy")]
    assert [part.seconds for part in found[:4]] == sorted(part.seconds for part in found[:4])
    run_all(counterexample.EXPERIMENT.preset("small").jobs()[:1], store, Place())
    assert agenda.missing("small", store, published)[0].jobs == found[0].jobs - 1


@pytest.mark.parametrize("text", ["", "3", "h", "-1h", "3 h", "3d", "1e9s"])
def test_a_time_that_is_none(text: str) -> None:
    """Catches a budget of no length that is taken for one."""
    with pytest.raises(ValueError, match="expected a number of seconds"):
        agenda.seconds_of(text)


def test_times() -> None:
    """Catches units that are mixed up."""
    assert [agenda.seconds_of(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
