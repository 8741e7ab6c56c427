"""The summary of a run: one sentence, the table of the latest margins, and counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stableopt.report.run import Record, Run, number
from stableopt.stability.measure.measurement import level
from stableopt.stability.measure.registry import QUANTITIES

__all__ = ["Row", "counts", "rows", "sentence", "shown", "titled", "with_ratio"]


@dataclass(frozen=True)
class Row:
    """A quantity in the table of the latest margins.

    Attributes:
        title: the quantity in words.
        value, limit, ratio: the numbers as text.
        share: the filled share of a bar, from 0 to 1, with the limit at one half.
        level: ``"inside"``, ``"near"``, ``"over"``, or ``""`` without a limit.
    """

    title: str
    value: str
    limit: str
    ratio: str
    share: float
    level: str


def titled(name: str) -> str:
    """Return the name of a quantity in words.

    >>> titled("non_uniformity"), titled("my_own")
    ('non-uniformity', 'my own')
    """
    return QUANTITIES[name].title if name in QUANTITIES else name.replace("_", " ")


def shown(value: float) -> str:
    """Return a number as the page shows it.

    >>> shown(0.123456), shown(0.00015), shown(12345.6), shown(math.nan), shown(math.inf)
    ('0.1235', '1.5e-4', '1.235e4', '–', '∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    plain = f"{value:.4g}"
    return scientific(value) if "e" in plain or 0 < abs(value) < 1e-3 else plain


def scientific(value: float) -> str:
    """Return a finite number as mantissa and exponent.

    >>> scientific(10_000.0), scientific(-0.00015), scientific(0.0)
    ('1e4', '-1.5e-4', '0')
    """
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def with_ratio(record: Record) -> list[str]:
    """Return the quantities of ``record`` that have a limit, and so a ratio."""
    names = [key.removesuffix("_ratio") for key in record if str(key).endswith("_ratio")]
    # The ratio to an infinite limit is zero.
    return [name for name in names if number(record[f"{name}_ratio"]) != 0]


def sentence(run: Run) -> str:
    """Return the state of the run in one sentence.

    >>> sentence(Run("demo"))
    'Nothing has been measured yet.'
    >>> record = {"step": 50, "sharpness": 9.0, "sharpness_ratio": 0.45, "failed": 0.0}
    >>> sentence(Run("demo", [record]))
    'Step 50 is inside the region of stability: the sharpness is at 0.45 of its limit.'
    """
    if run.reports:
        first, further = run.reports[0], len(run.reports) - 1
        place = f", seen in layer {first.layer}" if first.layer else ""
        more = ""
        if further:
            more = f" (and {further} more {'alarm' if further == 1 else 'alarms'})"
        return (
            f"At step {first.step:,} {first.alarm}; the likely cause: {first.cause}{place}{more}."
        )
    if not run.records:
        return "Nothing has been measured yet."
    last = _last_good(run)
    if last is None:
        return "Every measurement failed."
    end = "; the last measurement failed." if last is not run.records[-1] else "."
    step = f"Step {last['step']:,}"
    ratios = {name: number(last[f"{name}_ratio"]) for name in with_ratio(last)}
    ratios = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if not ratios:
        return f"{step} was measured, and no limit is known{end}"
    name = max(ratios, key=lambda name: ratios[name])
    ratio = ratios[name]
    position = {
        "inside": "is inside the region of stability",
        "near": "is at the edge of stability",
        "over": "is beyond the edge of stability",
    }[level(ratio)]
    factor = f"at {ratio:.3g} of" if ratio <= 1 else f"{ratio:.3g} times"
    return f"{step} {position}: the {titled(name)} is {factor} its limit{end}"


def _last_good(run: Run) -> Record | None:
    """Return the latest measurement that did not fail, or ``None``."""
    good = (record for record in reversed(run.records) if number(record.get("failed")) != 1)
    return next(good, None)


def rows(run: Run) -> Iterator[Row]:
    """Yield a row for each quantity of the latest measurement that did not fail."""
    last = _last_good(run)
    if last is None:
        return
    names = [name for name in last if name in QUANTITIES]
    for name in dict.fromkeys([*names, *with_ratio(last)]):
        ratio, limit = number(last.get(f"{name}_ratio")), number(last.get(f"{name}_limit"))
        if f"{name}_limit" in last and last[f"{name}_limit"] is None:
            limit = math.inf  # null in JSON
        has_limit = limit != math.inf
        yield Row(
            titled(name),
            shown(number(last.get(name))),
            shown(limit) if has_limit else "none",
            shown(float(f"{ratio:.3g}")) if has_limit else "–",
            0.0 if math.isnan(ratio) else min(max(ratio / 2, 0.0), 1.0),
            level(ratio) if has_limit and not math.isnan(ratio) else "",
        )


def counts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the counts and settings of a run, each with its name."""
    last = run.records[-1] if run.records else {}
    if run.records:
        yield "steps", f"{run.records[0]['step']:,} to {last['step']:,}"
    yield "measurements", f"{len(run.records):,}"
    yield "failed", f"{run.failed:,}"
    unconverged = sum(number(record.get("converged")) == 0 for record in run.records) - run.failed
    yield "not converged", f"{max(unconverged, 0):,}"
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
    seconds = sum(value for _, value in run.numbers("seconds") if math.isfinite(value))
    yield "time measuring", f"{seconds:,.1f} s"
