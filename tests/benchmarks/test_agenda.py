"""The order in which missing experiments are run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import agenda
from benchmarks.experiments import counterexample, edge, experiment
from benchmarks.runner import Place, Store, in_order, run_all


def test_the_order_is_unpublished_then_the_papers_then_the_quickest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours spent on published results, and finished jobs that are offered again."""
    names = ("toy", "gd-sharpness", "counterexample", "edge")
    monkeypatch.setattr(agenda, "NAMES", names)
    store, published = Store(tmp_path / "runs"), tmp_path / "results"
    monkeypatch.setattr(edge.EXPERIMENT, "datasets", ("digits",))
    about = published / "small" / "toy" / "toy" / "about.json"
    about.parent.mkdir(parents=True)
    about.write_text("{}")
    missing = agenda.missing("small", store, published)
    order = [(part.experiment.name, part.experiment.data) for part in missing]
    assert order[0] == ("counterexample", "two-coordinates")  # its jobs state no operations
    assert {name for name, _ in order[1:4]} == {"gd-sharpness"}
    assert order[1][1] == "digits"  # the smallest
    assert order[4:] == [("edge", "digits"), ("toy", "toy")]
    assert [part.seconds for part in missing[:4]] == sorted(part.seconds for part in missing[:4])
    run_all(counterexample.EXPERIMENT.preset("small").jobs()[:1], store, Place())
    assert agenda.missing("small", store, published)[0].jobs == missing[0].jobs - 1


def test_times_by_the_speed_of_what_is_published(tmp_path: Path) -> None:
    """Catches a rate measured on other data, and the time of half of the jobs used for all."""

    def publish(name: str, data: str, seconds: float, done: int = 4) -> None:
        folder = tmp_path / "small" / data / name
        folder.mkdir(parents=True)
        about = {"seconds": seconds, "jobs": 4, "done": done}
        (folder / "about.json").write_text(json.dumps(about))

    assert agenda.Rates(tmp_path).seconds("edge", "small", "digits") is None
    publish("edge", "digits", 30.0)
    publish("edge", "cifar10-2", 500.0, done=2)
    publish("steering", "fashion-mnist", 70.0)
    publish("quasi-newton", "fashion-mnist", 0.0, done=0)  # all failed: no rate
    rates = agenda.Rates(tmp_path)
    assert rates.seconds("edge", "small", "digits") == pytest.approx(30)
    assert rates.seconds("edge", "small", "cifar10-2") == pytest.approx(1000)
    of_steering = rates.seconds("steering", "small", "fashion-mnist")
    assert of_steering == pytest.approx(70)
    larger = rates.seconds("edge", "paper", "digits")
    assert larger is not None
    assert larger > 60
    # The only rate on these data.
    flops = [
        sum(job.flops for job in in_order(kind.preset("small", "fashion-mnist").jobs()))
        for kind in (edge.EXPERIMENT, experiment("steering"))
    ]
    by_flops = rates.seconds("edge", "small", "fashion-mnist")
    assert by_flops == pytest.approx(70 * flops[0] / flops[1])


@pytest.mark.parametrize("text", ["", "3", "h", "-1h", "3 h", "3d", "1e9s"])
def test_a_time_that_is_none(text: str) -> None:
    """Catches a budget of no length that is taken for one."""
    with pytest.raises(ValueError, match="expected a number of seconds"):
        agenda.seconds_of(text)


def test_times() -> None:
    """Catches units that are mixed up."""
    assert [agenda.seconds_of(text) for text in ("90s", "20m", "1.5h")] == [90, 1200, 5400]
