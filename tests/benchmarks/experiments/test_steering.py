"""Steering and its rivals, small; the summary and the claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run
from torch import nn

from benchmarks.experiments.steering.experiment import Steering, summary
from benchmarks.experiments.steering.methods import REGIONS, noise_scale
from benchmarks.framework.tables import records, table
from benchmarks.training.data import Images

SMALL = Steering(
    n=30,
    start_loss=0.06,
    steps=8,
    sgd_steps=8,
    batch_size=16,
    measure_every=4,
    grid_lrs=(1.5, 2.0),
    grid_ramps=(1,),
    scratch_steps=8,
    scratch_lrs=(0.1,),
)


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a method that does not fit the loop, a wrong summary, and a figure that is not drawn.

    The few steps are too short to test where the runs end.
    """
    tables, drawn, _ = small_run(SMALL, tmp_path)
    assert drawn == {"paths", "diagram-both", "diagram-more-uniform"}
    runs = {(row["method"], row["region"]): row for row in records(tables["runs"])}
    assert {region for method, region in runs if method == "steered"} == {
        *REGIONS,
        "from scratch",
    }
    minimum = runs["GD", "the minimum"]
    assert minimum["loss"] <= 0.06
    for region, by in (("1.5x flatter", 1.5), ("4x flatter", 4)):
        # The monitor's tolerance, against the tighter one of the end.
        for method in ("steered", "grid-searched"):
            target = runs[method, region]["target_sharpness"]
            assert target == pytest.approx(minimum["sharpness"] / by, rel=0.05)
    assert runs["grid-searched", "2x flatter"]["steps"] == 16
    assert runs["CDAT", "none"]["lr"] != 0.5
    assert set(zip(tables["summary"].by, tables["summary"].to, strict=True)) == set(runs)
    assert set(tables["paths"].region) == set(REGIONS)
    assert tables["paths"].step.max() <= 8
    assert len(list(SMALL.claims(tables))) == len(REGIONS) + 2


def row(region: str, **found: Any) -> dict[str, Any]:
    """Return the row of a run that was steered to a region and reached it."""
    reached = {
        **{"method": "steered", "region": region, "seed": 0, "steps": 10, "products": 5},
        **{"loss": 1e-4, "sharpness": 1.0, "non_uniformity": 2.0, "failed": False},
        **{"test_accuracy": 0.9, "largest_loss": 0.1, "target_sharpness": 1.0},
        **{"target_non_uniformity": None, "sharpness_to_target": 1.0, "said": ""},
    }
    return {**reached, **found}


def test_the_summary_is_of_those_that_live() -> None:
    """Catches a diverged run that enters a mean, or that is not counted."""
    lost = row("2x flatter", failed=True, sharpness=None, sharpness_to_target=None, loss=None)
    lost |= {"non_uniformity": None, "largest_loss": None}
    off = row("2x flatter", sharpness=1.3, sharpness_to_target=1.3)
    (common,) = records(summary(table([row("2x flatter"), off, lost])))
    assert (common["seeds"], common["diverged"], common["trained"]) == (3, 1, 2)
    assert (common["least_to_target"], common["most_to_target"]) == (1.0, 1.3)
    assert common["sharpness"] == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("region", "found", "reached"),
    [
        ("2x flatter", {"sharpness_to_target": 1.09}, True),
        ("2x flatter", {"sharpness_to_target": 1.11}, False),
        ("2x flatter", {"sharpness_to_target": 0.5}, True),
        ("sharper", {"sharpness_to_target": 1.5, "target_sharpness": None}, True),
        ("sharper", {"sharpness_to_target": 0.89, "target_sharpness": None}, False),
        ("2x flatter", {"failed": True}, False),
        ("both", {"target_non_uniformity": 2.5, "sharpness_to_target": 0.5}, True),
        ("both", {"target_non_uniformity": 1.5, "sharpness_to_target": 0.5}, False),
        (
            "more uniform",
            {
                "target_non_uniformity": 2.5,
                "sharpness_to_target": None,
                "target_sharpness": None,
            },
            True,
        ),
    ],
)
def test_a_region_is_reached_by_every_seed_or_not(
    region: str, found: dict[str, Any], reached: bool
) -> None:
    """Catches a claim upheld by the best seed, or by a run that diverged."""
    extra = {key: value for key, value in found.items() if key.startswith("target")}
    (claim,) = SMALL.claims({"runs": table([row(region, **extra), row(region, **found)])})
    assert claim.reproduced is reached


def test_the_noise_scale_is_that_of_per_sample_gradients() -> None:
    """Catches a covariance divided by n − 1, and gradients of another loss, by a plain loop."""
    model = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)
    rows = []
    for i in range(5):
        loss = (model(x[i]) - y[i]).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]).double())
    each = torch.stack(rows)
    spread = each.var(0, correction=0).sum() / each.mean(0).square().sum()
    estimate = noise_scale(model, Images(x, y, x, torch.zeros(5)))
    assert estimate == pytest.approx(float(spread), rel=1e-4)  # gradients in single precision
