"""`Claim` and its constructors: what is printed or predicted, what came out, and the verdict.

Each constructor writes printed value, theory, our value, tolerance and verdict in the same way:

    close_to("sharpness at η = 0.1", [19.2, 19.4], 19.6, rel=0.05)
    at_most("sharpness at η = 0.5", [3.1, 3.3], 4.0, "2/η", rel=0.05)
    increasing("sharpness by batch size", {"B = 4": [0.7], "GD": [3.1]}, printed="rises with B")
    all_of("SGD leaves as predicted", [True, True, False])

Any text of the claim can be given instead, as in ``at_most(…, why="at a loss of 1e-4")``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

__all__ = [
    "Claim",
    "all_of",
    "at_least",
    "at_most",
    "clearly_positive",
    "close_to",
    "increasing",
    "span",
    "spread",
]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper or of the theory, and what came out here.

    Attributes:
        what: the subject, with its place in the paper.
        printed: the paper's value or statement; empty where it has none.
        ours: the value here with its spread, or what was observed.
        tolerance: within which the two count as the same.
        reproduced: whether they are the same.
        why: a remark; where the claim is not reproduced, the reason.
        theory: the value or statement that follows from theory, where it is not the printed one.
    """

    what: str
    printed: str
    ours: str
    tolerance: str
    reproduced: bool
    why: str = ""
    theory: str = ""


def close_to(
    what: str,
    values: Iterable[float],
    printed: float,
    *,
    rel: float,
    printed_spread: float | None = None,
    form: str = ".4g",
    why: str = "",
    **texts: str,
) -> Claim:
    """Return the claim that the mean of our values is within ``rel`` of the printed value.

    Args:
        what: see :class:`Claim`.
        values: ours, one for each seed.
        printed: the paper's value.
        rel: relative tolerance.
        printed_spread: the paper's standard deviation.
        form: format of our values.
        why: added to the relative difference.
        texts: fields of the claim to use instead.

    >>> claim = close_to("a", [1.9, 1.95], 2.0, rel=0.05)
    >>> claim.printed, claim.ours, claim.tolerance, claim.reproduced, claim.why
    ('2', '1.925 ± 0.03536 (2 seeds)', '5%', True, '-3.8%')
    """
    known = list(values)
    away = mean(known) / printed - 1
    more = "" if printed_spread is None else f" ± {printed_spread:g}"
    return _claim(
        abs(away) <= rel,
        texts,
        what=what,
        printed=f"{printed:g}{more}",
        ours=spread(known, form),
        tolerance=f"{rel:.0%}",
        why="; ".join(filter(None, [f"{away:+.1%}", why])),
    )


def at_most(
    what: str,
    values: Iterable[float],
    bound: float,
    bound_is: str = "",
    *,
    rel: float = 0.0,
    of_mean: bool = False,
    form: str = ".4g",
    **texts: str,
) -> Claim:
    """Return the claim that each of our values is at most ``bound``.

    Args:
        what: see :class:`Claim`.
        values: ours, one for each seed or run.
        bound: the theory's.
        bound_is: its formula, such as ``"2/η"``.
        rel: share of the bound by which it may be exceeded.
        of_mean: compare the mean, not each value.
        form: format of our values.
        texts: fields of the claim to use instead.

    >>> claim = at_most("a", [3.9, 4.1], 4.0, "2/η", rel=0.05)
    >>> claim.theory, claim.tolerance, claim.reproduced
    ('at most 2/η = 4', '5%', True)
    """
    known = list(values)
    compared = mean(known) if of_mean else max(known)
    held = compared <= bound * (1 + rel)
    return _bounded(held, "most", what, known, bound, bound_is, rel, form, texts)


def at_least(
    what: str,
    values: Iterable[float],
    bound: float,
    bound_is: str = "",
    *,
    rel: float = 0.0,
    of_mean: bool = False,
    form: str = ".4g",
    **texts: str,
) -> Claim:
    """Return the claim that each of our values is at least ``bound``; see :func:`at_most`.

    >>> at_least("correlation", [0.79], 0.8).reproduced
    False
    """
    known = list(values)
    compared = mean(known) if of_mean else min(known)
    held = compared >= bound * (1 - rel)
    return _bounded(held, "least", what, known, bound, bound_is, rel, form, texts)


def increasing(
    what: str, groups: Mapping[str, Sequence[float]], *, form: str = ".3g", **texts: str
) -> Claim:
    """Return the claim that the means of groups, in their order, do not fall.

    >>> increasing("a", {"B = 4": [0.7, 0.8], "GD": [3.0]}).ours
    'B = 4: 0.75 ± 0.0707 (2 seeds), GD: 3 (1 seed)'
    """
    means = [mean(values) for values in groups.values()]
    return _claim(
        all(a <= b for a, b in pairwise(means)),
        texts,
        what=what,
        ours=", ".join(f"{name}: {spread(values, form)}" for name, values in groups.items()),
        tolerance="in order, by means of seeds",
    )


def all_of(what: str, held: Iterable[object], **texts: str) -> Claim:
    """Return the claim that something held in every case, and that there was one.

    >>> claim = all_of("stays", [True, False])
    >>> claim.ours, claim.tolerance, claim.reproduced
    ('1 of 2', 'every one', False)
    """
    each = [bool(one) for one in held]
    ours = f"{sum(each)} of {len(each)}"
    return _claim(bool(each) and all(each), texts, what=what, ours=ours, tolerance="every one")


def spread(values: Iterable[float], form: str = ".3g", of: str = "seed") -> str:
    """Return mean and standard deviation over seeds, or what ``of`` names in the singular.

    >>> spread([1.0, 2.0, 3.0])
    '2 ± 1 (3 seeds)'
    >>> spread([2.0])
    '2 (1 seed)'
    >>> spread([1.0, 2.0], "+.1f")    # a sign is for the mean alone
    '+1.5 ± 0.7 (2 seeds)'
    >>> spread([1.0, 2.0, 3.0], of="run")
    '2 ± 1 (3 runs)'
    """
    known = list(values)
    if len(known) == 1:
        return f"{known[0]:{form}} (1 {of})"
    return f"{mean(known):{form}} ± {stdev(known):{form.lstrip('+')}} ({len(known)} {of}s)"


def clearly_positive(values: Iterable[float]) -> bool:
    """Return whether the mean is two standard errors above 0: a single value has none.

    >>> clearly_positive([0.5, 0.7, 0.6]), clearly_positive([1.0, 2.0, -1.5]), clearly_positive([0.1])
    (True, False, True)
    """
    known = list(values)
    error = stdev(known) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return mean(known) > 2 * error


def span(values: Iterable[float], form: str = ".2f") -> str:
    """Return the smallest and the largest value, or one number if they print alike.

    >>> span([0.5, 0.7, 0.6]), span([0.72, 0.721])
    ('0.50 to 0.70', '0.72')
    """
    known = list(values)
    return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(known), max(known))))


def _bounded(
    held: bool,
    least_or_most: str,
    what: str,
    values: Sequence[float],
    bound: float,
    bound_is: str,
    rel: float,
    form: str,
    texts: Mapping[str, str],
) -> Claim:
    equals = f"{bound_is} = " if bound_is else ""
    return _claim(
        held,
        texts,
        what=what,
        theory=f"at {least_or_most} {equals}{bound:.4g}",
        ours=spread(values, form),
        tolerance=f"{rel:.0%}" if rel else "none",
    )


def _claim(held: bool, given: Mapping[str, str], **texts: str) -> Claim:
    return Claim(reproduced=bool(held), **{"printed": "", **texts, **given})
