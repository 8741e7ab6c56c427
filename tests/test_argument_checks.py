"""Checks that constructors and `load_state_dict` share: what they name, and what they let through."""

from __future__ import annotations

import pytest

from stableopt._support.arguments import instance, require_keys


def test_an_instance_is_returned_and_anything_else_is_named() -> None:
    """Catches a check that lets a wrong type through, or hides which argument it was."""
    assert instance("name", "value", str) == "value"
    assert instance("flag", True, int) is True
    with pytest.raises(TypeError, match=r"lr=0\.1: expected a str"):
        instance("lr", 0.1, str)


def test_missing_keys_are_named_and_others_allowed() -> None:
    """Catches a checkpoint of a later version that is refused for a key too many."""
    require_keys({"step": 1, "later": 2}, ("step",))
    with pytest.raises(ValueError, match=r"state_dict lacks \['seen', 'step'\]"):
        require_keys({"later": 2}, {"step": 0, "seen": 1})
