"""Does the theory say what SGD will do? Every rule against every outcome. Beyond the paper.

At each of several minima, for each batch size and learning rate of a grid that knows nothing of the
rules, each rule says "stay" or "escape"; then SGD is run from there, and has escaped if the
training loss rises tenfold. The rules: condition (8), which is sufficient for stability; the box
(9); the exact mean-square threshold; 2/η alone; and, as what one would do without measuring, the
best threshold on η/B, which is chosen with hindsight, in its favour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.framework.experiment import Claim, RowExperiment, Rows
from benchmarks.runner import Job, Store, Work
from benchmarks.training.data import Dataset
from benchmarks.training.escape import Switch, box
from benchmarks.training.minimum import Solution, from_minimum
from benchmarks.training.threshold import Thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "RULES", "Prediction", "confusion"]

RULES = ("sharpness alone", "box (9)", "condition (8)", "exact threshold", "η/B alone")

LEAST_CASES = 200
"""So that the shares in the confusion matrices mean something."""


@dataclass(frozen=True)
class Prediction(RowExperiment):
    """Confusion matrices.

    Attributes:
        lrs: of the gradient descents that find the minima.
        n: training images: few, since the exact threshold takes time as (nC)^3.
        target_loss: at which gradient descent stops.
        batch_sizes: of SGD.
        fractions: learning rates of SGD, as fractions of the minimum's 2/a.
        steps: of SGD, for it to leave in.
        samplings: how batches are drawn: ``"independent"``, as in the theory, or ``"reshuffled"``.
    """

    name = "prediction"
    shows = "Beyond the paper"
    columns: ClassVar = {"cases": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 16,
            "lrs": (1.0,),
            "target_loss": 3e-3,
            "batch_sizes": (1, 4),
            "fractions": (0.1, 0.5, 1.2),
            "steps": 100,
        },
        ("small", ""): {"seeds": (0, 1)},
        ("paper", ""): {
            "seeds": (0, 1, 2, 3, 4),
            "n": 120,
            "steps": 4000,
            "target_loss": 1e-6,
            "fractions": (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
        },
    }

    lrs: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    n: int = 64
    target_loss: float = 1e-5
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    fractions: tuple[float, ...] = (0.1, 0.16, 0.26, 0.42, 0.68, 1.1)
    steps: int = 1000
    samplings: tuple[str, ...] = ("independent", "reshuffled")

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an unknown sampling."""
        super().__post_init__()
        for sampling in self.samplings:
            if sampling not in ("independent", "reshuffled"):
                raise ValueError(f"samplings: {sampling!r}, expected independent or reshuffled")

    def _minima(self) -> list[Solution]:
        return [
            Solution(Dataset(self.data, self.n), lr=lr, seed=seed, target_loss=self.target_loss)
            for lr in self.lrs
            for seed in self.seeds
        ]

    def _cases(self, start: Solution) -> list[Trial]:
        return [
            Trial(
                Thresholds(start, self.batch_sizes),
                fraction=fraction,
                batch_size=size,
                steps=self.steps,
                independent=sampling == "independent",
            )
            for sampling in self.samplings
            for size in self.batch_sizes
            for fraction in self.fractions
        ]

    def jobs(self) -> list[Job]:
        """Return every case; each needs its minimum and that minimum's thresholds."""
        return [case for start in self._minima() for case in self._cases(start)]

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``cases``, and one ``confusion`` for all rules and samplings."""
        cases: Rows = []
        for start in self._minima():
            for trial in filter(store.done, self._cases(start)):
                found = store.result(trial)
                cases.append(
                    {
                        "sampling": "independent" if trial.independent else "reshuffled",
                        "minimum_lr": start.lr,
                        "seed": start.seed,
                        "batch_size": trial.batch_size,
                        **{key: found[key] for key in ("lr", "full_batch", "theorem1")},
                        "critical_lr": found["critical_lr"],
                        "sharpness_alone": found["said"]["sharpness alone"],
                        "box": found["said"]["box (9)"],
                        "condition_8": found["said"]["condition (8)"],
                        "exact": found["said"]["exact threshold"],
                        "escaped_at": found["escaped_at"],
                        "largest_loss_ratio": found["largest_loss_ratio"],
                    }
                )
        tables = {"cases": cases}
        if cases:
            tables["confusion"] = [
                line
                for sampling in self.samplings
                for line in confusion([c for c in cases if c["sampling"] == sampling], sampling)
            ]
        return tables

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return, for the cases, η/η* against batch size, marked by what SGD did."""
        from matplotlib.figure import Figure

        if name != "cases":
            return None
        figure = Figure(figsize=(5 * len(self.samplings), 4), layout="constrained")
        panels = figure.subplots(1, len(self.samplings), sharey=True, squeeze=False)[0]
        for axes, sampling in zip(panels, self.samplings, strict=True):
            its = [r for r in rows if r["sampling"] == sampling]
            for escaped, style in (
                (False, {"marker": "o", "color": "#0072B2", "label": "stayed"}),
                (True, {"marker": "x", "color": "#D55E00", "label": "escaped"}),
            ):
                chosen = [r for r in its if (r["escaped_at"] is not None) == escaped]
                # A little sideways, so that marks do not hide each other.
                nudge = [1 + 0.03 * (r["seed"] - 0.5) + 0.05 * escaped for r in chosen]
                axes.plot(
                    [r["batch_size"] * by for r, by in zip(chosen, nudge, strict=True)],
                    [r["lr"] / r["critical_lr"] for r in chosen],
                    linestyle="none",
                    markersize=5,
                    fillstyle="none",
                    **style,
                )
            axes.axhline(1, color="black", linewidth=1, linestyle="--", label="exact threshold η*")
            axes.set(xscale="log", yscale="log", xlabel="batch size B", title=f"{sampling} batches")
            axes.set_xticks(self.batch_sizes, [str(size) for size in self.batch_sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("learning rate / exact threshold")
        panels[0].legend(frameon=False)
        return figure

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return how often each rule was right, with the exact threshold beside the others."""
        rows = tables.get("confusion", [])
        claims = []
        for sampling in self.samplings:
            its = {r["rule"]: r for r in rows if r["sampling"] == sampling}
            if not its:
                continue
            best = its["exact threshold"]
            enough = best["cases"] >= LEAST_CASES
            others = [r for r in its.values() if r is not best]
            level = [r["rule"] for r in others if r["right"] >= best["right"]]
            claims.append(
                Claim(
                    what=f"The exact threshold says what SGD does ({sampling} batches)",
                    printed="better than every other rule",
                    ours="; ".join(
                        f"{rule}: {r['right']:.1%} right ({r['said_escape_stayed']} false alarms,"
                        f" {r['said_stay_escaped']} missed)"
                        for rule, r in its.items()
                    ),
                    tolerance=f"none; at least {LEAST_CASES} cases",
                    reproduced=enough and not level,
                    why=f"{best['cases']} cases"
                    + ("" if enough else ": too few to say")
                    + "".join(f"; {rule} is right as often, or more" for rule in level),
                )
            )
        return claims


@dataclass(frozen=True)
class Trial(Job):
    """SGD from a minimum at a fraction of its 2/a: a :class:`Switch` whose rate the minimum sets.

    What each rule says is in the first line of the trace, before a step is taken.
    """

    kind = "trial"

    thresholds: Thresholds
    fraction: float
    batch_size: int
    steps: int
    independent: bool

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum and its thresholds."""
        return (self.thresholds.start, self.thresholds)

    def run(self, work: Work) -> dict[str, Any]:
        """Foretell by every rule, then run SGD."""
        start = self.thresholds.start
        allowed = work.result(self.thresholds)
        mine = allowed.at(self.batch_size)
        begun = from_minimum(start, work)
        lr = self.fraction * allowed.full_batch
        said = {
            "sharpness alone": lr > allowed.full_batch,
            "box (9)": box(
                begun.found.sharpness,
                begun.found.non_uniformity,
                lr=lr,
                batch_size=self.batch_size,
                n=start.data.n,
            ).escapes,
            "condition (8)": lr > mine.theorem1,
            "exact threshold": lr > mine.critical_lr,
        }
        work.restored()
        work.trace(lr=lr, said=said)
        switch = Switch(
            start,
            lr=lr,
            batch_size=self.batch_size,
            steps=self.steps,
            independent=self.independent,
            measure_after=False,
        )
        done = switch.go(begun, work)
        return {
            "lr": lr,
            "said": said,
            "full_batch": allowed.full_batch,
            "theorem1": mine.theorem1,
            "critical_lr": mine.critical_lr,
            "escaped_at": done.escaped_at,
            "largest_loss_ratio": done.largest_loss_ratio,
        }


def confusion(cases: Rows, sampling: str = "") -> Rows:
    """Return a row for each rule: how often it said what, and what SGD did.

    The threshold on η/B is the one that is right most often on these very cases.

    >>> cases = [
    ...     {"lr": lr, "batch_size": 1, "sharpness_alone": False, "box": lr > 2, "condition_8": True,
    ...      "exact": lr > 1, "escaped_at": 10 if lr > 1 else None}
    ...     for lr in (0.5, 1.5, 2.5)
    ... ]
    >>> [(row["rule"], round(row["right"], 2)) for row in confusion(cases)]
    [('sharpness alone', 0.33), ('box (9)', 0.67), ('condition (8)', 0.67), ('exact threshold',
    1.0), ('η/B alone', 1.0)]
    """
    escaped = [case["escaped_at"] is not None for case in cases]
    said = {
        rule: [case[key] for case in cases]
        for rule, key in zip(
            RULES, ("sharpness_alone", "box", "condition_8", "exact"), strict=False
        )
    }
    noise = [case["lr"] / case["batch_size"] for case in cases]
    best = max(
        [0.0, *sorted(set(noise))],
        key=lambda t: sum((x > t) == out for x, out in zip(noise, escaped, strict=True)),
    )
    said["η/B alone"] = [x > best for x in noise]
    rows = []
    for rule in RULES:
        pairs = list(zip(said[rule], escaped, strict=True))
        rows.append(
            {
                "sampling": sampling,
                "rule": rule,
                "cases": len(pairs),
                "said_escape_escaped": pairs.count((True, True)),
                "said_escape_stayed": pairs.count((True, False)),
                "said_stay_escaped": pairs.count((False, True)),
                "said_stay_stayed": pairs.count((False, False)),
                "right": sum(a == b for a, b in pairs) / len(pairs),
            }
        )
    return rows


EXPERIMENT = Prediction
