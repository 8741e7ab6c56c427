"""The log of decisions: repeated reasons, the latest decision, and checkpoints."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from stableopt.steering.decision import Decision, DecisionLog


def hold(what: str, why: str, step: int = 0) -> Decision:
    return Decision(what, "hold", 0.1, 0.1, why, step=step)


def test_a_reason_repeats_even_with_other_numbers() -> None:
    """Catches a log full of one reason, and one that mixes up the rate and the batch size."""
    log = DecisionLog([hold("lr", "the ratio is 1.21, at the gate")], maxlen=9)
    assert log.repeats(hold("lr", "the ratio is 1.3e-07, at the gate", step=5))
    assert not log.repeats(hold("lr", "until step 5"))
    assert not log.repeats(hold("batch_size", "the ratio is 1.21, at the gate"))
    assert not log.repeats(Decision("lr", "keep", 0.1, 0.1, "the ratio is 1.21, at the gate"))


def test_the_latest_is_of_its_own_subject() -> None:
    """Catches the last decision about another quantity."""
    log = DecisionLog([hold("lr", "a"), hold("lr", "b", step=1), hold("target", "c")], maxlen=9)
    assert log.latest("lr") == hold("lr", "b", step=1)
    assert log.latest("weights") is None


def test_it_survives_checkpoints_and_copies() -> None:
    """Catches a copy that loses ``maxlen``, and a bad checkpoint that empties the log."""
    log = DecisionLog([hold("lr", "a"), hold("lr", "b"), hold("lr", "c")], maxlen=2)
    assert [decision.why for decision in log] == ["b", "c"]
    other = DecisionLog(maxlen=2)
    other.replace(log.read(json.loads(json.dumps(log.state()))))
    for twin in (other, copy.deepcopy(log), pickle.loads(pickle.dumps(log))):
        assert (type(twin), list(twin), twin.maxlen) == (DecisionLog, list(log), 2)
    with pytest.raises(TypeError, match="unknown"):
        log.replace(log.read([{"unknown": 1}]))
    assert len(log) == 2
