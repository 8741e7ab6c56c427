"""Modules, tensors and generators that functions and objects hold: found, and restored."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stableopt.curvature.isolation.reachable import HeldState, reachable

GLOBAL = nn.Linear(2, 1)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held

    def by_global(self) -> Any:
        return [GLOBAL for _ in range(1)]


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


def identity(x: Any, default: Any = None) -> Any:
    return x


HOLDERS = {
    "attribute": Holder,
    "slot": Slotted,
    "closure": lambda held: lambda: held,
    "containers": lambda held: {"a": [(held,)]},
    "bound method": lambda held: Holder(held).by_global,
    "partial": lambda held: functools.partial(identity, default=held),
    "default": lambda held: lambda x, more=held: more,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_every_way_of_holding_is_followed(kind: str) -> None:
    """Catches a closure or container whose contents stay unseen."""
    held = nn.Linear(2, 1)
    assert any(item is held for item in reachable([HOLDERS[kind](held)]))


def test_global_names_of_functions_are_followed() -> None:
    """Catches a script's loss that uses a second network by its name."""
    assert any(item is GLOBAL for item in reachable([Holder(None)]))
    assert any(item is GLOBAL for item in reachable([lambda: lambda: GLOBAL]))


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator(), lambda g: torch.rand(1, generator=g).item()),
        (np.random.default_rng(0), lambda g: g.random()),
        (np.random.RandomState(0), lambda g: g.random_sample()),
        (random.Random(0), lambda g: g.random()),
    ],
    ids=["torch", "numpy", "numpy, old", "python"],
)
def test_generators_are_put_back(generator: Any, draw: Any) -> None:
    """Catches a kind of generator that is found but not restored."""
    state = HeldState([Holder([generator])])
    assert not state.drew
    first_draw = draw(generator)
    assert state.drew
    state.restore()
    assert not state.drew
    assert draw(generator) == first_draw


def test_attributes_and_containers_are_put_back() -> None:
    """Catches state that appears only when data are read, such as a first attribute or a cache."""
    holder, cache = Holder(None), {}
    del holder.held
    count = torch.zeros(1)
    state = HeldState([lambda: (holder, cache, count)])
    holder.held = cache["read"] = 1
    count += 1
    assert state.changed
    assert not state.drew
    state.restore()
    assert (vars(holder), cache, count.item()) == ({}, {}, 0.0)
