"""Control laws that fail, and the one that works: why the learning rate follows the target.

From one point of gradient descent, on its way to a minimum, each law is given the
same target for the same number of steps. Each failure is of its own kind: the sharpness runs away,
the rate vanishes, the escape is cancelled, or the loss leaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.experiments.control_laws.jobs import LAWS, Laws
from benchmarks.framework.claims import Claim, all_of, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import (
    BLACK,
    coloured,
    finish,
    limit,
    panels,
    points,
    trace,
)
from benchmarks.framework.tables import Row
from benchmarks.runner import Store
from benchmarks.training.data import Dataset

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "ControlLaws"]

STAIRCASE = "gated staircase"
WITHIN = 0.1
"""Relative distance to the target that counts as there."""

FAILURES = {
    "0.8 of the measured limit": "the sharpness rises as the rate falls",
    "1.05 of the measured limit": "diverges within some steps",
    "cut while too sharp": "freezes the sharp minimum: the rate vanishes",
    "cut when the loss rises": "cancels the escape that is wanted",
    "jump": "and may diverge",
}
"""How each law that does not work is expected to fail."""


@dataclass(frozen=True)
class ControlLaws(Experiment):
    """Six laws and one target.

    Attributes:
        n: training images.
        lr: learning rate at the start.
        start_loss: training loss at which the laws take over.
        flatter: how many times flatter the target is than the start.
        steps: of each law.
        measure_every: steps between measurements.
    """

    name = "control-laws"
    shows = "Beyond the paper"
    columns: ClassVar = {
        "ends": ("law", "seed", "target", "sharpness", "lr", "largest_loss", "diverged_at"),
        "history": (),
    }
    presets: ClassVar = {
        ("smoke", ""): {"n": 60, "start_loss": 0.06, "steps": 40, "measure_every": 5},
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4)},
    }

    n: int = 200
    lr: float = 0.5
    start_loss: float = 2e-3
    flatter: float = 4.0
    steps: int = 1500
    measure_every: int = 10

    def cases(self) -> dict[str, list[Case]]:
        """Return all the laws from each seed's start, in both tables."""
        jobs = [
            Laws(
                Dataset(self.data, self.n),
                seed=seed,
                lr=self.lr,
                start_loss=self.start_loss,
                flatter=self.flatter,
                steps=self.steps,
                measure_every=self.measure_every,
            )
            for seed in self.seeds
        ]
        return {name: [case(job, "seed") for job in jobs] for name in ("ends", "history")}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return where each law ends, or each of its measurements."""
        start = found["start"]
        for law, its in found["laws"].items():
            keys = {"law": law, **one.keys, "start": start, "target": start / self.flatter}
            for row in [its["end"]] if name == "ends" else its["history"]:
                yield {**keys, **row}

    def draw(self, name: str, its: pd.DataFrame) -> Figure | None:
        """Return sharpness and learning rate over the steps, of the first seed."""
        if name != "history":
            return None
        figure, (sharpness, rate) = panels(2, width=4.75, height=3.6)
        first = its[its.seed == its.seed.iloc[0]]
        for law, colour in coloured(first.law):
            each = first[first.law == law]
            # After a divergence nothing is drawn: its loss is out of scale.
            good = each[~each.failed.astype(bool) & (each.loss.fillna(0.0) < 1.0)]
            width = 2.4 if law == STAIRCASE else 1.2
            trace(sharpness, good.step, good.sharpness, law, colour, linewidth=width)
            trace(rate, good.step, good.lr, law, colour, linewidth=width)
            if len(good) < len(each):
                end = good.tail(1)
                points(sharpness, end.step, end.sharpness, colour=BLACK, marker="x")
        limit(sharpness, y=first.target.iloc[0], label="target")
        finish(sharpness, "step", "sharpness", log="y", legend=False)
        finish(rate, "step", "learning rate", log="y")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return that the staircase arrives, and how each of the others fails, if it does."""
        ends = tables["ends"]
        for law in LAWS:
            its = ends[ends.law == law]
            if not len(its):
                continue
            if law == STAIRCASE:
                yield all_of(
                    "the gated staircase reaches the target",
                    _close(its),
                    theory="sharpness / target 1",
                    ours=_summary(its),
                    tolerance=f"{WITHIN:.0%}, every seed",
                )
            else:
                yield _fails(law, its, ends[ends.law == STAIRCASE])


def _close(its: Any) -> Any:
    """Return for each seed whether its law ended at the target."""
    return (its.diverged_at.isna() & ((its.sharpness / its.target - 1).abs() <= WITHIN)).fillna(
        False
    )


def _summary(its: Any) -> str:
    ended = its[its.diverged_at.isna() & its.sharpness.notna()]
    lost = len(its) - len(ended)
    losses = its.largest_loss.dropna()
    parts = [f"sharpness / target {spread(ended.sharpness / ended.target)}"] if len(ended) else []
    parts += [f"{lost} of {len(its)} diverged"] if lost else []
    parts += [f"rate at the end {spread(its.lr)}"]
    parts += [f"largest loss {losses.max():.2g}"] if len(losses) else []
    return "; ".join(parts)


def _fails(law: str, its: Any, stairs: Any) -> Claim:
    diverged = bool((its.diverged_at.notna() | its.sharpness.isna()).any())
    missed = not _close(its).all()
    tolerance = f"diverged, or {WITHIN:.0%} off the target, any seed"
    if law == "jump":
        pairs = its.merge(stairs, on="seed", suffixes=("", "_stairs")).dropna(subset="largest_loss")
        leaps = pairs.largest_loss > 2 * pairs.largest_loss_stairs
        missed = diverged or (len(its) > 0 and bool(leaps.all()))
        tolerance = "twice the staircase's largest loss"
    why = "" if missed else "here it reaches the target"
    if law.startswith("1.05") and not diverged:
        why = "it has not diverged here" + (", and reaches the target" if why else "")
    return all_of(
        "jump: the loss leaps" if law == "jump" else f"{law}: fails",
        [missed],
        theory=FAILURES[law],
        ours=_summary(its),
        tolerance=tolerance,
        why=why,
    )


EXPERIMENT = ControlLaws
