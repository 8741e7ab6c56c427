"""Claim constructors: on either side of each tolerance."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.framework.claims import (
    Claim,
    all_of,
    at_least,
    at_most,
    close_to,
    increasing,
    spread,
)


@pytest.mark.parametrize(
    ("claim", "held"),
    [
        (lambda: close_to("a", [1.9, 2.3], 2.0, rel=0.05), True),  # the mean is 5 % above
        (lambda: close_to("a", [1.9, 2.32], 2.0, rel=0.05), False),
        (lambda: close_to("a", [1.89], 2.0, rel=0.05), False),
        (lambda: at_most("a", [1.0, 2.0], 2.0), True),
        (lambda: at_most("a", [1.0, 2.1], 2.0), False),
        (lambda: at_most("a", [1.0, 2.1], 2.0, rel=0.1), True),
        (lambda: at_most("a", [1.0, 2.1], 2.0, of_mean=True), True),
        (lambda: at_least("a", [2.0, 3.0], 2.0), True),
        (lambda: at_least("a", [1.9, 3.0], 2.0), False),
        (lambda: at_least("a", [1.9, 3.0], 2.0, rel=0.1), True),
        (lambda: at_least("a", [1.9, 3.0], 2.0, of_mean=True), True),
        (lambda: increasing("a", {"x": [1.0, 3.0], "y": [2.0], "z": [4.0]}), True),
        (lambda: increasing("a", {"x": [1.0, 3.1], "y": [2.0]}), False),
        (lambda: all_of("a", [True, 1, "yes"]), True),
        (lambda: all_of("a", [True, False]), False),
        (lambda: all_of("a", []), False),  # nothing was observed
    ],
)
def test_verdicts(claim: Callable[[], Claim], held: bool) -> None:
    """Catches a verdict by the best seed, a wrong direction, and a tolerance in another unit."""
    assert claim().reproduced is held


def test_texts_say_what_the_verdict_compares() -> None:
    """Catches a bound without its formula, a printed value without its spread, and a given text
    that is ignored.
    """
    close = close_to("a", [1.9, 1.95], 2.0, rel=0.05, printed_spread=0.1, why="at a loss of 1e-4")
    assert (close.printed, close.ours) == ("2 ± 0.1", "1.925 ± 0.03536 (2 seeds)")
    assert (close.tolerance, close.why) == ("5%", "-3.8%; at a loss of 1e-4")
    most = at_most("a", [3.0], 4.0, "2/η", rel=0.1)
    assert (most.printed, most.theory, most.tolerance) == ("", "at most 2/η = 4", "10%")
    assert at_least("r", [0.9], 0.8).theory == "at least 0.8"
    assert at_most("a", [3.0], 4.0, printed="flatter", ours="less").ours == "less"
    assert (
        increasing("a", {"B = 4": [1.0], "GD": [2.0]}).ours == "B = 4: 1 (1 seed), GD: 2 (1 seed)"
    )
    assert all_of("a", [True, False]).ours == "1 of 2"
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1 (3 seeds)"
