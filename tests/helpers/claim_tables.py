"""Small tables that uphold the claims of each experiment, and changes to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.experiments.control_laws.jobs import LAWS
from benchmarks.experiments.steering.methods import REGIONS

Rows = list[dict[str, Any]]
Change = Callable[[dict[str, Rows]], object]


def put(name: str, key: str, value: Any, row: int = 0) -> Change:
    """Return the change that sets one number of a table."""
    return lambda tables: tables[name][row].update({key: value})


def arrive(number: int) -> Change:
    """Return the change after which both seeds of law ``number`` end at the target."""
    return lambda tables: [
        row.update(sharpness=1.0, largest_loss=0.01)
        for row in tables["ends"][2 * number : 2 * number + 2]
    ]


def minima(name: str, *cells: tuple[float, int | None, float, float, float]) -> Callable[[], Any]:
    """Return a table of minima: η, B, a, s and the limit of s."""

    def rows() -> dict[str, Rows]:
        return {
            name: [
                {"lr": lr, "batch_size": size, "scale": 1.0, "seed": 0, "outcome": "reached"}
                | {"sharpness": a, "non_uniformity": s, "non_uniformity_limit": bound}
                for lr, size, a, s, bound in cells
            ]
        }

    return rows


def sharpness(*cells: tuple[float, float]) -> Callable[[], Any]:
    """Return a table of gradient descent's sharpness by learning rate."""
    return lambda: {
        "sharpness": [
            {"lr": lr, "seed": seed, "outcome": "reached", "sharpness": a}
            for lr, a in cells
            for seed in (0, 1)
        ]
    }


def toy() -> dict[str, Rows]:
    """Return escapes at three rates, one row with halved derivatives, and a trajectory of GD."""
    cells = (("true", 0.5, 0), ("true", 0.6, 100), ("true", 0.7, 100), ("halved", 0.7, 1))
    escapes = [
        {"derivatives": which, "lr": lr, "seed": 0, "runs": 100, "steps": 9, "escaped": escaped}
        | {"share": escaped / 100, "low": escaped / 100, "high": escaped / 100, "median_step": 3}
        for which, lr, escaped in cells
    ]
    path = [{"optimizer": "GD", "lr": 0.7, "run": 0, "step": k, "x": 1 + 0.1**k} for k in (1, 2)]
    return {"escapes": escapes, "trajectories": path}


def diagram() -> dict[str, Rows]:
    """Return a plane of 1,000 points, 21.5 % of the box unstable, and two widths."""
    grown = [1.5] * 215 + [0.5] * 785 + [2.0] * 10
    plane = [
        {"batch_size": 1, "n": 2, "lr": 0.1, "seed": 0, "in_box": k < 1000}
        | {"growth": growth, "simulated": growth}
        for k, growth in enumerate(grown)
    ]
    widths = [
        {"w": 0.5, "theorem1": 0.9, "box": 1.2, "exact": 1.0, "radius_at_box": 1.1},
        {"w": 1.0, "theorem1": 1.0, "box": 1.06, "exact": 1.1, "radius_at_box": 0.9},
    ]
    return {"plane": plane, "two-dimensions": widths}


def counterexample() -> dict[str, Rows]:
    """Return two points of the curve, runs that stay, and runs that leave."""
    curve = [
        {"sharpness": a, "measured_sharpness": a, "non_uniformity": s}
        | {"measured_non_uniformity": s, "risk_from_weights": risk}
        for a, s, risk in ((2.0, 1.8, 2.0), (10.0, 9.0, 0.0))
    ]
    runs = [
        {"optimizer": "GD", "lr": lr, "batch_size": "all", "seed": seed, "limit": bound}
        | {"outcome": "reached", "sharpness": a, "risk": risk}
        for lr, bound, a, risk in ((0.15, 13.3, 9.9, 0.01), (0.25, 8.0, 7.9, 0.15))
        for seed in (0, 1)
    ]
    return {"curve": curve, "runs": runs}


def control_laws() -> dict[str, Rows]:
    """Return two seeds of each law: the staircase ends at the target, the others off it."""
    return {
        "ends": [
            {"law": law, "seed": seed, "target": 1.0, "diverged_at": None, "lr": 1.0}
            | {"sharpness": 1.05 if law == "gated staircase" else 2.0}
            | {"largest_loss": 0.03 if law == "jump" else 0.01}
            for law in LAWS
            for seed in (0, 1)
        ]
    }


def loss_shape() -> dict[str, Rows]:
    """Return a minimum and a course for each loss.

    With the squared loss the sharpness rises; with cross-entropy it falls with the loss.
    """
    course = [
        {"trained_by": loss, "lr": 0.5, "seed": 0, "step": k, "loss": 0.1**k, "sharpness": a}
        for loss, sharpnesses in (
            ("squared", (1, 2, 3.9)),
            ("cross-entropy", (2, 0.3, 0.1, 0.04, 0.02)),
        )
        for k, a in enumerate(sharpnesses)
    ]
    for row in course[-3:]:  # within a decade of the last loss
        row["loss"] = row["sharpness"]
    return {"minima": [{"lr": 0.5, "seed": 0, "trusted_rise": 1.5}], "course": course}


def escape() -> dict[str, Rows]:
    """Return Table 3's minimum, a run that stays and one that escapes, and a scatter."""
    point = {"sharpness": 19.0, "non_uniformity": 46.0, "test_accuracy": 0.8}
    minimum = {"random_labels": 0, "seed": 0, "lr": 0.1}
    before = {f"{key}_before": value for key, value in point.items()}
    after = {"sharpness_after": 3.0, "test_accuracy_after": 0.82}
    shared = {**minimum, **before, "loss_before": 1e-4, "loss_after": 1e-4, "right": True}
    switches = [
        {**shared, "how": "SGD, B = 1", "predicted": "escape", "escaped_at": 10, **after},
        {**shared, "how": "SGD, B = 100", "predicted": "stay", "escaped_at": None},
    ]
    for row in switches:
        row |= {"largest_loss_ratio": 5.0, "returned": False}
    scatter = [{"sharpness": 10.0**k, "test_accuracy": 0.8 - 0.1 * k} for k in range(4)]
    scatter[0]["test_accuracy"] -= 0.01  # a correlation of 1 has no interval
    return {"minima": [minimum | point], "switches": switches, "scatter": scatter}


def after_lbfgs() -> dict[str, Rows]:
    """Return a gain of a point over two seeds, and a limit that single steps exceed."""
    courses = [
        {
            "method": "SGD",
            "lr": 0.3,
            "random_labels": 0,
            "seed": seed,
            "step": step,
            "diverged": False,
        }
        | {"loss": 1e-3, "sharpness": 2.0, "gain": 0.005 * gain, "test": 0.8 + 0.005 * gain}
        for seed in (0, 1)
        for step, gain in ((0, 0), (100, 1), (1000, 2 + seed))
    ]
    ratios = (0.5, 1.5, 0.6, 0.7)
    limits = [
        {"random_labels": 0, "seed": 0, "step": step, "applied": ratio, "after": ratio}
        for step, ratio in enumerate(ratios)
    ]
    return {"courses": courses, "limits": limits}


def prediction() -> dict[str, Rows]:
    """Return confusions for both samplings; the exact threshold of each is right most often."""
    shared = {"cases": 200, "said_escape_stayed": 1, "said_stay_escaped": 1}
    shares = {"box (9)": 0.97, "exact threshold": 0.98, "η/B alone": 0.95}
    epoch = {"threshold of the epoch": 0.99}
    return {
        "confusion": [
            {"sampling": sampling, "rule": rule, "right": right, **shared}
            for sampling, extra in (("independent", {}), ("reshuffled", epoch))
            for rule, right in {**shares, **extra}.items()
        ]
    }


def prediction_beyond() -> dict[str, Rows]:
    """Return confusions of two settings in which the exact threshold is well ahead."""
    shared = {"cases": 200, "said_escape_stayed": 1, "said_stay_escaped": 1}
    shares = {"box (9)": 0.95, "exact threshold": 0.99, "η/B alone": 0.9}
    return {
        "confusion": [
            {"setting": name, "rule": rule, "right": right, **shared}
            for name in ("heavy ball", "CNN")
            for rule, right in shares.items()
        ]
    }


def settling() -> dict[str, Rows]:
    """Return a run that stays within the mean-square threshold, and one that leaves for another."""
    shared = {"outcome": "reached", "start_sharpness": 4.0, "start_error": 1e-4, "end_error": 1e-4}
    stays = {"start_exponent": -1e-3, "end_sharpness": 3.9, "end_exponent": -1e-3, "end_ratio": 0.8}
    leaves = {"start_exponent": 1e-3, "end_sharpness": 2.0, "end_exponent": 2e-4, "end_ratio": 0.98}
    return {"settled": [shared | stays | {"end_box": 0.7}, shared | leaves | {"end_box": 0.9}]}


def edge() -> dict[str, Rows]:
    """Return a course of sharpness that ends at 2/η, and three places where SGD settles."""
    course = [
        {"lr": 1.0, "step": k, "loss": 0.1, "sharpness": a, "limit": 2.0}
        for k, a in enumerate((0.5, 3.0, 1.95, 2.1, 2.0))
    ]
    settled = [
        {"lr": 1.0, "batch_size": size, "outcome": "reached", "ratio": 1.05, "sharpness_ratio": 0.2}
        for size in (1, 4)
    ]
    unfinished = {**settled[0], "outcome": "out of steps", "ratio": 2.0}
    return {"sharpness": course, "settled": [*settled, unfinished]}


def quasi_newton() -> dict[str, Rows]:
    """Return L-BFGS's minimum of two seeds, and flatter and better ones by GD and SGD from there."""
    ends = {"L-BFGS": (10.0, 0.80), "L-BFGS, then GD": (4.0, 0.82), "L-BFGS, then SGD": (2.0, 0.84)}
    return {
        "solutions": [
            {"method": method, "seed": seed, "lr": 0.5, "sharpness": a, "test": test + seed / 500}
            | {"preconditioned_sharpness": 2.1, "preconditioned_sharpness_limit": 2.0}
            for method, (a, test) in ends.items()
            for seed in (0, 1)
        ]
    }


def steering() -> dict[str, Rows]:
    """Return runs of two seeds that keep their bounds: on sharpness above or below, and on s."""
    low, uniform = ("sharper",), ("more uniform", "both")
    keys = [("GD", "the minimum"), ("fixed", "none")]
    keys += [("steered", region) for region in (*REGIONS, "from scratch")]
    return {
        "runs": [
            {"method": method, "region": region, "seed": seed, "failed": 0.0, "loss": 1e-4}
            | {"sharpness": 4.0, "non_uniformity": 2.0, "said": "step 5: missed target"}
            | {"target_sharpness": None if region in (*low, "more uniform") else 2.0}
            | {"target_non_uniformity": 2.1 if region in uniform else None}
            | {"sharpness_to_target": None if region == "more uniform" else 1.05}
            for method, region in keys
            for seed in (0, 1)
        ]
    }
