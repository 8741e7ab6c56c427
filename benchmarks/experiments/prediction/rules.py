"""`confusion`: the rules' predictions against outcomes; `calibration`: escapes against η/η*."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

__all__ = ["RULES", "calibration", "confusion"]

RULES = {
    "sharpness alone": "sharpness_alone",
    "box (9)": "box",
    "condition (8)": "condition_8",
    "exact threshold": "exact",
    "threshold of the epoch": "reshuffled",
    "η/B alone": "",
}
"""The rules, and the columns of their predictions of an escape; η/B has none, as it is fitted."""

EDGES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 2.0, 4.0, np.inf)
"""Edges of the bins of η/η*, finer near the threshold."""


def confusion(
    cases: pd.DataFrame, sampling: str = "", *, fixed_on: pd.DataFrame | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each rule: its confusion matrix and its accuracy.

    The threshold on η/B is the most accurate one on ``fixed_on``, by default on the same cases. Rules
    without a prediction in some case are left out.

    >>> from benchmarks.framework.tables import table
    >>> cases = table(
    ...     {"lr": lr, "batch_size": 1, "sharpness_alone": False, "box": lr > 2, "condition_8": True,
    ...      "exact": lr > 1, "escaped_at": 10 if lr > 1 else None}
    ...     for lr in (0.5, 1.5, 2.5)
    ... )
    >>> [round(row["right"], 2) for row in confusion(cases)]
    [0.33, 0.67, 0.67, 1.0, 1.0]
    """
    escaped = cases.escaped_at.notna().to_numpy()
    noise_threshold = _best_noise(cases if fixed_on is None else fixed_on)
    for rule, column in RULES.items():
        if column and (column not in cases or cases[column].isna().any()):
            continue
        predicted = cases[column].to_numpy(bool) if column else _noise(cases) > noise_threshold
        yield {
            "sampling": sampling,
            "rule": rule,
            "cases": len(cases),
            "said_escape_escaped": int((predicted & escaped).sum()),
            "said_escape_stayed": int((predicted & ~escaped).sum()),
            "said_stay_escaped": int((~predicted & escaped).sum()),
            "said_stay_stayed": int((~predicted & ~escaped).sum()),
            "right": float((predicted == escaped).mean()),
        }


def calibration(cases: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the fraction of escaped runs, with its 95 % Wilson interval, for each bin of η/η*.

    >>> from benchmarks.framework.tables import table
    >>> cases = table({"lr": lr, "critical_lr": 1.0, "escaped_at": None} for lr in (0.4, 0.45, 3.0))
    >>> [(round(row["ratio"], 3), row["cases"], row["escaped"]) for row in calibration(cases)]
    [(0.424, 2, 0.0), (3.0, 1, 0.0)]
    """
    ratio = (cases.lr / cases.critical_lr).to_numpy(float)
    escaped = cases.escaped_at.notna().to_numpy()
    bins = np.digitize(ratio, EDGES)
    for bin_index in np.unique(bins):
        in_bin = bins == bin_index
        test = binomtest(int(escaped[in_bin].sum()), int(in_bin.sum()))
        interval = test.proportion_ci(method="wilson")
        yield {
            "ratio": float(np.exp(np.log(ratio[in_bin]).mean())),
            "cases": int(in_bin.sum()),
            "escaped": float(escaped[in_bin].mean()),
            "lowest": float(interval.low),
            "highest": float(interval.high),
        }


def _noise(cases: pd.DataFrame) -> np.ndarray:
    noise: np.ndarray = cases.lr.to_numpy() / cases.batch_size.to_numpy()
    return noise


def _best_noise(cases: pd.DataFrame) -> float:
    """Return the most accurate threshold on η/B."""
    escaped, noise = cases.escaped_at.notna().to_numpy(), _noise(cases)
    return max([0.0, *np.unique(noise)], key=lambda bound: ((noise > bound) == escaped).sum())
