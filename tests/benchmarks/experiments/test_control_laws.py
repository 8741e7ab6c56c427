"""The comparison of control laws from one start, and its claims."""

from __future__ import annotations

from pathlib import Path

from small_runs import small_run

from benchmarks.experiments.control_laws.experiment import STAIRCASE, ControlLaws
from benchmarks.experiments.control_laws.jobs import LAWS
from benchmarks.framework.tables import table


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a law that does not fit the scheduler, or that starts where another law ended.

    Also catches a divergence that ends the comparison.
    """
    control_laws = ControlLaws(n=40, start_loss=0.06, steps=15, measure_every=5)
    tables, drawn, _ = small_run(control_laws, tmp_path)
    assert drawn == {"history"}
    ends = tables["ends"].set_index("law").to_dict("index")
    assert set(ends) == set(LAWS)
    assert ends["jump"]["target"] == ends["jump"]["start"] / 4
    assert ends["cut while too sharp"]["lr"] < 0.5 < ends[STAIRCASE]["lr"]
    first = tables["history"].query("step == 0")
    assert set(first.law) == set(LAWS)
    assert first.sharpness.nunique() == 1


def test_claims_follow_the_numbers() -> None:
    """Catches a verdict that ignores the end of a run, or all seeds but one."""
    control_laws = ControlLaws(seeds=(0, 1))

    def end(law: str, seed: int, sharpness: float, largest: float = 0.01) -> dict[str, object]:
        return {
            **{"law": law, "seed": seed, "start": 4.0, "target": 1.0, "sharpness": sharpness},
            **{"lr": 2.0, "limit": 1.0, "loss": 1e-3, "largest_loss": largest},
            "diverged_at": None,
        }

    def verdicts(*rows: dict[str, object]) -> dict[str, bool]:
        claims = control_laws.claims({"ends": table(rows)})
        return {claim.what.split(":")[0]: claim.reproduced for claim in claims}

    stairs = [end(STAIRCASE, 0, 1.09), end(STAIRCASE, 1, 0.95)]
    arrives = "the gated staircase reaches the target"
    assert verdicts(*stairs) == {arrives: True}
    assert verdicts(stairs[0], end(STAIRCASE, 1, 1.11)) == {arrives: False}
    assert verdicts(*stairs, end("jump", 0, 1.0, 0.021), end("jump", 1, 1.0, 0.03))["jump"]
    assert not verdicts(*stairs, end("jump", 0, 1.0, 0.019), end("jump", 1, 1.0, 0.03))["jump"]
    frozen = end("cut while too sharp", 0, 4.0)
    assert verdicts(*stairs, frozen)["cut while too sharp"]
    frozen["sharpness"] = 1.0
    assert not verdicts(*stairs, frozen)["cut while too sharp"]
