"""Control laws that fail, and the one that works: why the learning rate follows the target.

All laws start from the same point of gradient descent, on its way to a minimum, with the same target
and number of steps. They fail in different ways: the sharpness grows without end, the learning rate
vanishes, the escape is cancelled, or the loss jumps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.experiments.control_laws.jobs import LAWS, Laws
from benchmarks.framework.claims import Claim, all_of, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
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
"""Largest relative distance to the target that counts as reaching it."""

FAILURES = {
    "0.8 of the measured limit": "the sharpness rises as the rate falls",
    "1.05 of the measured limit": "diverges within some steps",
    "cut while too sharp": "freezes the sharp minimum: the rate vanishes",
    "cut when the loss rises": "cancels the escape that is wanted",
    "jump": "and may diverge",
}
"""The expected failure of each law that does not work."""


@dataclass(frozen=True)
class ControlLaws(Experiment):
    """Six laws and one target.

    Attributes:
        n: training images.
        lr: learning rate at the start.
        start_loss: training loss at which the laws take over.
        flatter: factor by which the target's sharpness is below that of the start.
        steps: steps of each law.
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
        """Return a job with all laws for each seed, in both tables."""
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
        return {name: [case_of(job, "seed") for job in jobs] for name in ("ends", "history")}

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return the end of each law's run, or all its measurements."""
        start = result["start"]
        for law, run in result["laws"].items():
            keys = {"law": law, **case.keys, "start": start, "target": start / self.flatter}
            for row in [run["end"]] if name == "ends" else run["history"]:
                yield {**keys, **row}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return sharpness and learning rate against steps, for the first seed."""
        if name != "history":
            return None
        figure, (sharpness, rate) = panels(2, width=4.75, height=3.6)
        first = frame[frame.seed == frame.seed.iloc[0]]
        for law, colour in coloured(first.law):
            run = first[first.law == law]
            # Diverged records are left out, and marked by a cross at the last point.
            finite = run[~run.failed.astype(bool) & (run.loss.fillna(0.0) < 1.0)]
            width = 2.4 if law == STAIRCASE else 1.2
            trace(sharpness, finite.step, finite.sharpness, law, colour, linewidth=width)
            trace(rate, finite.step, finite.lr, law, colour, linewidth=width)
            if len(finite) < len(run):
                end = finite.tail(1)
                points(sharpness, end.step, end.sharpness, colour=BLACK, marker="x")
        limit(sharpness, y=first.target.iloc[0], label="target")
        finish(sharpness, "step", "sharpness", log="y", legend=False)
        finish(rate, "step", "learning rate", log="y")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the claims that the staircase reaches the target and that the other laws fail."""
        ends = tables["ends"]
        for law in LAWS:
            runs = ends[ends.law == law]
            if not len(runs):
                continue
            if law == STAIRCASE:
                yield all_of(
                    "the gated staircase reaches the target",
                    _at_target(runs),
                    theory="sharpness / target 1",
                    ours=_summary(runs),
                    tolerance=f"{WITHIN:.0%}, every seed",
                )
            else:
                yield _fails(law, runs, ends[ends.law == STAIRCASE])


def _at_target(runs: Any) -> Any:
    """Return for each seed whether its law ended at the target."""
    is_near = (runs.sharpness / runs.target - 1).abs() <= WITHIN
    return (runs.diverged_at.isna() & is_near).fillna(False)


def _summary(runs: Any) -> str:
    ended = runs[runs.diverged_at.isna() & runs.sharpness.notna()]
    diverged = len(runs) - len(ended)
    losses = runs.largest_loss.dropna()
    parts = [f"sharpness / target {spread(ended.sharpness / ended.target)}"] if len(ended) else []
    parts += [f"{diverged} of {len(runs)} diverged"] if diverged else []
    parts += [f"rate at the end {spread(runs.lr)}"]
    parts += [f"largest loss {losses.max():.2g}"] if len(losses) else []
    return "; ".join(parts)


def _fails(law: str, runs: Any, staircase: Any) -> Claim:
    diverged = bool((runs.diverged_at.notna() | runs.sharpness.isna()).any())
    missed = not _at_target(runs).all()
    tolerance = f"diverged, or {WITHIN:.0%} off the target, any seed"
    if law == "jump":
        pairs = runs.merge(staircase, on="seed", suffixes=("", "_stairs")).dropna(
            subset="largest_loss"
        )
        leaps = pairs.largest_loss > 2 * pairs.largest_loss_stairs
        missed = diverged or (len(runs) > 0 and bool(leaps.all()))
        tolerance = "twice the staircase's largest loss"
    why = "" if missed else "here it reaches the target"
    if law.startswith("1.05") and not diverged:
        why = "it has not diverged here" + (", and reaches the target" if why else "")
    return all_of(
        "jump: the loss leaps" if law == "jump" else f"{law}: fails",
        [missed],
        theory=FAILURES[law],
        ours=_summary(runs),
        tolerance=tolerance,
        why=why,
    )


EXPERIMENT = ControlLaws
