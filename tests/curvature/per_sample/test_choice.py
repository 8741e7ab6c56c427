"""Choice of the quickest method: structured products, vmap or the loop."""

from __future__ import annotations

import pytest
import torch
from hidden import HiddenGain
from oracles import covariance, dense_hessians, relative_error, small_data
from torch import Tensor, nn

from stableopt.curvature import Hessian, NonUniformity, Problem
from stableopt.curvature.per_sample import choice


class Bilinear(nn.Module):
    """Most of its parameters are in a function that is vectorised with a copy for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Bilinear(3, 3, 4)
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(x, x.sin())))


class Branching(nn.Module):
    """Takes a gain in a custom function, and a branch that vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 3).double()
        self.branches = True

    def forward(self, x: Tensor) -> Tensor:
        z = HiddenGain.apply(torch.tanh(self.head(x)), self.head.bias)
        return z.sin() if self.branches and float(x.sum()) > 1e9 else z


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return the seconds that each method pretends to take, for models of any size."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(choice, "_LARGE", 1)
    monkeypatch.setattr(choice, "_seconds", lambda *arguments: dict(seconds))
    return seconds


def non_uniformity(model: nn.Module) -> NonUniformity:
    return NonUniformity(Problem(model, nn.MSELoss(), small_data()))


@pytest.mark.parametrize("quickest", ["structured", "vmap", "loop"])
def test_the_quickest_way_is_taken_where_copies_are_many(
    quickest: str, clock: dict[str, float]
) -> None:
    """Catches structured products used although another method is quicker, and wrong products."""
    clock |= dict.fromkeys(("structured", "vmap", "loop"), 2.0)
    clock[quickest] = 1.0
    network = Bilinear()
    operator = non_uniformity(network)
    assert operator.method == quickest
    if quickest == "structured":
        assert set(operator.ways.values()) == {"vmap", "linear"}
    else:
        assert set(operator.ways.values()) == {f"{quickest}, faster than structured"}
    expected = covariance(dense_hessians(network, nn.MSELoss(), *small_data()))
    v = torch.randn(len(expected), 2, dtype=torch.float64)
    assert relative_error(operator @ v, expected @ v) < 1e-10


def test_a_structure_without_copies_is_not_timed(clock: dict[str, float]) -> None:
    """Catches a timing run where structured products always win: here no method has a time."""
    assert non_uniformity(nn.Linear(3, 3).double()).method == "structured"


@pytest.mark.parametrize("quickest", ["vmap", "loop"])
def test_without_structure_the_quicker_of_the_others(
    quickest: str, clock: dict[str, float]
) -> None:
    """Catches the choice by size alone, which takes vmap for this model."""
    clock |= {"vmap": 2.0, "loop": 2.0, quickest: 1.0}
    assert non_uniformity(Branching()).method == quickest


def test_times_of_every_way() -> None:
    """Catches a method timed on too many samples for its memory, and one whose failure stops all."""
    model = Branching()
    hessian = Hessian(Problem(model, nn.MSELoss(), small_data()))
    assert choice._seconds(hessian, 4, None)["vmap"] == float("inf")
    model.branches = False
    for at_once, finite in ((4, True), (1, False)):
        seconds = choice._seconds(hessian, at_once, None)
        assert seconds.keys() == {"loop", "vmap"}
        assert 0 < seconds["loop"] < float("inf")
        assert (0 < seconds["vmap"] < float("inf")) == finite
    operator = non_uniformity(Bilinear())
    assert choice._seconds(operator._mean, 4, operator._structured)["structured"] > 0
