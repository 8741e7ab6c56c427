"""Control laws that fail, beside the one that works: why the learning rate follows the target.

Beyond the paper. From one point of gradient descent, on its way to a minimum, each law is given the
same target for the same number of steps. What fails does so in its own way: the sharpness runs away,
the rate vanishes, the escape is cancelled, or the loss leaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks.experiments.control_laws.jobs import LAWS, Laws
from benchmarks.framework.experiment import Claim, RowExperiment, Rows, spread
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "ControlLaws"]

STAIRCASE = "gated staircase"
WITHIN = 0.1
"""Relative distance to the target that counts as there."""

FAILURES = {
    "0.8 of the measured limit": "the sharpness rises as the rate falls, for ever",
    "1.05 of the measured limit": "diverges within some steps",
    "cut while too sharp": "freezes the sharp minimum: the rate vanishes",
    "cut when the loss rises": "cancels the escape that is wanted",
    "jump": "and may diverge",
}
"""What is expected of those that are no good."""


@dataclass(frozen=True)
class ControlLaws(RowExperiment):
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
    shows = "beyond the paper"
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

    def _laws(self) -> list[Laws]:
        return [
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

    def jobs(self) -> list[Job]:
        """Return all the laws from each seed's start."""
        return list(self._laws())

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``ends`` and ``history``."""
        ends, history = [], []
        for job in filter(store.done, self._laws()):
            found = store.result(job)
            start = found["start"]
            which = {"seed": job.seed, "start": start, "target": start / job.flatter}
            for law, its in found["laws"].items():
                ends.append({"law": law, **which, **its["end"]})
                history += [{"law": law, **which, **row} for row in its["history"]]
        return {"ends": ends, "history": history}

    def row_summary(self, tables: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return where each law ends."""
        return {"ends": tables["ends"]}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return sharpness and learning rate over the steps, of the first seed."""
        from matplotlib.figure import Figure

        if name != "history":
            return None
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        sharpness, rate = figure.subplots(1, 2)
        first = [row for row in rows if row["seed"] == rows[0]["seed"]]
        for law in dict.fromkeys(row["law"] for row in first):
            its = [row for row in first if row["law"] == law]
            # What diverges soon leaves the panels, and its loss all measure.
            good = [r for r in its if not r["failed"] and (r["loss"] or 0.0) < 1.0]
            steps = [row["step"] for row in good]
            width = 2.4 if law == STAIRCASE else 1.2
            sharpness.plot(steps, [r["sharpness"] for r in good], label=law, linewidth=width)
            rate.plot(steps, [row["lr"] for row in good], label=law, linewidth=width)
            if len(good) < len(its) and good:
                sharpness.plot(steps[-1], good[-1]["sharpness"], "kx")
        sharpness.axhline(first[0]["target"], color="black", linestyle=":", label="target")
        sharpness.set(yscale="log", ylabel="sharpness", xlabel="step")
        rate.set(yscale="log", ylabel="learning rate", xlabel="step")
        rate.legend(fontsize="small")
        for axes in (sharpness, rate):
            axes.grid(alpha=0.25)
        return figure

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return that the staircase arrives, and how each of the others fails, if it does."""
        claims = []
        for law in LAWS:
            rows = [row for row in tables.get("ends", []) if row["law"] == law]
            if rows:
                claims.append(_arrives(rows) if law == STAIRCASE else _fails(law, rows, tables))
        return claims


def _ratios(rows: Rows) -> list[float]:
    return [
        row["sharpness"] / row["target"]
        for row in rows
        if row["diverged_at"] is None and row["sharpness"] is not None
    ]


def _told(rows: Rows) -> str:
    ratios = _ratios(rows)
    lost = len(rows) - len(ratios)
    parts = [f"sharpness / target {spread(ratios)}"] if ratios else []
    parts += [f"{lost} of {len(rows)} diverged"] if lost else []
    rates = [row["lr"] for row in rows]
    losses = [row["largest_loss"] for row in rows if row["largest_loss"] is not None]
    parts += [f"rate at the end {spread(rates)}"]
    parts += [f"largest loss {max(losses):.2g}"] if losses else []
    return "; ".join(parts)


def _arrives(rows: Rows) -> Claim:
    ratios = _ratios(rows)
    return Claim(
        what="the gated staircase reaches the target",
        printed="sharpness / target 1",
        ours=_told(rows),
        tolerance=f"{WITHIN:.0%}, every seed",
        reproduced=len(ratios) == len(rows) and all(abs(r - 1) <= WITHIN for r in ratios),
    )


def _fails(law: str, rows: Rows, tables: Mapping[str, Rows]) -> Claim:
    ratios = _ratios(rows)
    diverged = len(rows) - len(ratios)
    missed = diverged > 0 or any(abs(ratio - 1) > WITHIN for ratio in ratios)
    if law == "jump":
        stairs = {r["seed"]: r["largest_loss"] for r in tables["ends"] if r["law"] == STAIRCASE}
        leaps = [row["largest_loss"] for row in rows if row["largest_loss"] is not None]
        higher = [
            row["largest_loss"] > 2 * stairs[row["seed"]]
            for row in rows
            if row["largest_loss"] is not None and stairs.get(row["seed"])
        ]
        missed = diverged > 0 or (bool(leaps) and all(higher))
    why = "" if missed else "here it gets there"
    if law.startswith("1.05") and not diverged:
        why = "it has not diverged here" + ("" if not why else ", and gets there")
    return Claim(
        what="jump: the loss leaps" if law == "jump" else f"{law}: fails",
        printed=FAILURES[law],
        ours=_told(rows),
        tolerance="twice the staircase's largest loss"
        if law == "jump"
        else f"diverged, or {WITHIN:.0%} off the target, any seed",
        reproduced=missed,
        why=why,
    )


EXPERIMENT = ControlLaws
