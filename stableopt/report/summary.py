"""What a run comes to: a sentence, the table of the latest margins, and counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stableopt.report.run import Record, Run, number
from stableopt.sinks.console import NEAR, OVER
from stableopt.stability.measure.quantities import QUANTITIES

__all__ = ["Row", "counts", "rows", "sentence", "shown", "titled", "with_ratio"]


@dataclass(frozen=True)
class Row:
    """A quantity in the table of the latest margins.

    Attributes:
        title: the quantity in words.
        value, limit, ratio: as shown.
        share: the ratio as a length from 0 to 1, for a bar with the limit in the middle.
        level: ``"inside"``, ``"near"``, ``"over"`` or ``""``.
    """

    title: str
    value: str
    limit: str
    ratio: str
    share: float
    level: str


def titled(name: str) -> str:
    """Return a quantity in words.

    >>> titled("non_uniformity"), titled("my_own")
    ('non-uniformity', 'my own')
    """
    chart = QUANTITIES[name].chart if name in QUANTITIES else None
    return chart.title if chart else name.replace("_", " ")


def shown(value: float) -> str:
    """Return a number as the page shows it.

    >>> shown(0.123456), shown(0.00015), shown(123456.7), shown(math.nan), shown(math.inf)
    ('0.1235', '1.5e-4', '1.235e5', '–', '∞')
    """
    if math.isnan(value):
        return "–"
    if 0 < abs(value) < 1e-3 or 1e5 <= abs(value) < math.inf:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def with_ratio(record: Record) -> list[str]:
    """Return the quantities that ``record`` has a ratio of, other than those without a limit."""
    names = [key.removesuffix("_ratio") for key in record if str(key).endswith("_ratio")]
    # A ratio of zero belongs to an infinite limit.
    return [name for name in names if number(record[f"{name}_ratio"]) != 0]


def level(ratio: float) -> str:
    """Return where a ratio stands.

    >>> level(0.5), level(1.0), level(1.2)
    ('inside', 'near', 'over')
    """
    return "over" if ratio > OVER else "near" if ratio >= NEAR else "inside"


def sentence(run: Run) -> str:
    """Return the run in one sentence.

    >>> sentence(Run("demo"))
    'Nothing has been measured yet.'
    >>> record = {"step": 50, "sharpness": 9.0, "sharpness_ratio": 0.45, "failed": 0.0}
    >>> sentence(Run("demo", [record]))
    'Step 50 is inside the region of stability: the sharpness is at 0.45 of its limit.'
    """
    if run.reports:
        first, more = run.reports[0], len(run.reports) - 1
        where = f", seen in layer {first.layer}" if first.layer else ""
        rest = f" (and {more} more alarm{'s'[: more > 1]})" if more else ""
        return (
            f"At step {first.step:,} {first.alarm}; the likely cause: {first.cause}{where}{rest}."
        )
    if not run.records:
        return "Nothing has been measured yet."
    good = [record for record in run.records if number(record.get("failed")) != 1]
    if not good:
        return "Every measurement failed."
    last = good[-1]
    tail = "; the last measurement failed." if last is not run.records[-1] else "."
    step = f"Step {last['step']:,}"
    ratios = {name: number(last[f"{name}_ratio"]) for name in with_ratio(last)}
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if not known:
        return f"{step} was measured, and no limit is known{tail}"
    name = max(known, key=lambda each: known[each])
    ratio = known[name]
    place = {
        "inside": "is inside the region of stability",
        "near": "is at the edge of stability",
        "over": "is beyond the edge of stability",
    }[level(ratio)]
    much = f"at {ratio:.3g} of" if ratio <= 1 else f"{ratio:.3g} times"
    return f"{step} {place}: the {titled(name)} is {much} its limit{tail}"


def rows(run: Run) -> Iterator[Row]:
    """Yield the quantities of the latest measurement that has any."""
    last = next((one for one in reversed(run.records) if number(one.get("failed")) != 1), None)
    if last is None:
        return
    names = [name for name in last if name in QUANTITIES]
    for name in dict.fromkeys([*names, *with_ratio(last)]):
        ratio, limit = number(last.get(f"{name}_ratio")), number(last.get(f"{name}_limit"))
        if f"{name}_limit" in last and last[f"{name}_limit"] is None:
            limit = math.inf  # which JSON has no number for
        yield Row(
            titled(name),
            shown(number(last.get(name))),
            "none" if limit == math.inf else shown(limit),
            shown(float(f"{ratio:.3g}")) if limit != math.inf else "–",
            0.0 if math.isnan(ratio) else min(max(ratio / 2, 0.0), 1.0),
            "" if math.isnan(ratio) or limit == math.inf else level(ratio),
        )


def counts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield what there is of a run, in words and numbers."""
    last = run.records[-1] if run.records else {}
    if run.records:
        yield "steps", f"{run.records[0]['step']:,} to {last['step']:,}"
    yield "measurements", f"{len(run.records):,}"
    yield "failed", f"{run.failed:,}"
    unsettled = sum(number(one.get("converged")) == 0 for one in run.records) - run.failed
    yield "not converged", f"{max(unsettled, 0):,}"
    if run.reports:
        yield "alarms", f"{len(run.reports):,}"
    if run.superseded:
        yield "replaced by a later run", f"{run.superseded:,}"
    if run.unreadable:
        yield "unreadable", f"{run.unreadable:,}"
    if run.skipped:
        yield "skipped", f"{len(run.skipped):,}"
    for name, title in (("lr", "learning rate"), ("batch_size", "batch size")):
        if name in last:
            yield title, shown(number(last[name]))
    seconds = sum(its for _, its in run.numbers("seconds") if math.isfinite(its))
    yield "time measuring", f"{seconds:,.1f} s"
