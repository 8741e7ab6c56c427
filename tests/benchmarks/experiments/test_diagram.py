"""The stability diagram: growth against all batches, and the family in two dimensions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from small_runs import small_run

from benchmarks.experiments.diagram.experiment import Diagram
from benchmarks.experiments.diagram.jobs import Family, Plane, growth, rows, second_moment_radius
from benchmarks.runner import Place, Store, run_all


def cells(job, folder: Path):  # type: ignore[no-untyped-def]
    store = Store(folder)
    assert not run_all([job], store, Place()).failed
    return store.result(job)["cells"]


def test_growth_in_the_plane_is_that_of_all_batches(tmp_path: Path) -> None:
    """Catches a noise factor of drawing with replacement, and an s that is not a standard deviation."""
    job = Plane(lr=0.5, batch_size=3, n=6, points=4, runs=10, steps=2)
    for cell in cells(job, tmp_path):
        h = np.array([cell["a"] + cell["s"]] * 3 + [cell["a"] - cell["s"]] * 3)
        batches = itertools.combinations(h, 3)
        exact = np.mean([(1 - 0.5 * np.mean(batch)) ** 2 for batch in batches])
        assert cell["growth"] == pytest.approx(exact, rel=1e-12)
        assert cell["in_box"] == (cell["a"] <= 4 and cell["s"] <= math.sqrt(3 * 5 / 3) / 0.5)


def test_simulated_growth_is_unbiased() -> None:
    """Catches batches drawn with replacement, and growth averaged over a wrong number of steps."""
    job = Plane(lr=0.5, batch_size=3, n=6, runs=100_000, steps=2)
    exact = (1 - 0.5 * 3.0) ** 2 + 0.25 * (1 / 3 * 3 / 5) * 2.0**2
    simulated = growth(job, 3.0, 2.0, np.random.default_rng(0))
    # Four standard errors of the mean of x⁴ products, E factor⁴ / (E factor²)² < 3 a step.
    assert simulated == pytest.approx(exact, rel=4 * math.sqrt(9 / job.runs) / 2)


def test_the_family_has_the_known_rates(tmp_path: Path) -> None:
    """Catches limits of another batch size or of other rows: Theorem 1 at 1, the box at 3/√8."""
    (cell,) = cells(Family((1.0,)), tmp_path)
    # To the solver's tolerance, whose square is the error.
    assert cell["theorem1"] == pytest.approx(1.0, abs=1e-6)
    assert cell["box"] == pytest.approx(3 / math.sqrt(8), abs=1e-6)
    assert cell["exact"] == pytest.approx(1.10102, abs=1e-5)
    assert cell["radius_at_box"] < 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_exact_rate_is_where_second_moments_begin_to_grow(
    batch_size: int, tmp_path: Path
) -> None:
    """Catches an exact rate that is only a bound: all batches, by a dense matrix, on both sides."""
    for cell in cells(Family((0.3, 0.6, 1.4), batch_size), tmp_path):
        j, rate = rows(cell["w"]), cell["exact"]
        assert second_moment_radius(j, rate, batch_size) == pytest.approx(1, abs=1e-6)
        assert second_moment_radius(j, 0.999 * rate, batch_size) < 1
        assert second_moment_radius(j, 1.001 * rate, batch_size) > 1
        assert cell["radius_at_box"] == second_moment_radius(j, cell["box"], batch_size)


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a claim that ignores the results, and a figure that is not drawn."""
    diagram = Diagram(points=8, runs=300, widths=5, batch_sizes=(1, 4))
    tables, drawn, _ = small_run(diagram, tmp_path)
    assert drawn == {"plane", "two-dimensions"}
    claims = list(diagram.claims(tables))
    assert claims[0].reproduced
    assert claims[3].reproduced
    assert claims[4].reproduced
    shrinking = {**tables, "plane": tables["plane"].assign(growth=0.5)}
    assert not next(iter(diagram.claims(shrinking))).reproduced
