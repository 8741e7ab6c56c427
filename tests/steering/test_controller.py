"""Steering the learning rate and the batch size together, on a network that takes a second."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from steered_runs import network
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import stableopt
from stableopt import (
    AdaptiveAccumulation,
    AdaptiveBatchSampler,
    StabilityController,
    StabilityLR,
    TargetRegion,
)
from stableopt.steering import batch_staircase
from stableopt.steering.controller import STATE_KEYS

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 2, generator=GENERATOR)
MSE = nn.MSELoss()


# Targets that the network can fit, so that noise vanishes at a minimum.
Y = network(7)(X).detach()
BOTH = ("sharpness", "non_uniformity")


class Run:
    """A model, a loader whose batches may change, and an endless supply of them."""

    def __init__(
        self, lr: float = 0.2, batch_size: int = 12, seed: int = 0, **options: Any
    ) -> None:
        self.model = network(seed)
        self.optimizer = stableopt.SGD(self.model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(1)
        self.sampler = AdaptiveBatchSampler(
            RandomSampler(range(24), generator=generator), batch_size, max_batch_size=24
        )
        self.loader = DataLoader(TensorDataset(X, Y), batch_sampler=self.sampler)
        options = {"every": 5, "quantities": BOTH, "tol": 0.03, "max_iter": 100, **options}
        options.setdefault("dataset_size", 24)
        self.monitor = self.optimizer.track(self.model, MSE, (X, Y), **options)
        self.batches = self._supply()

    def _supply(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def go(self, steps: int, controller: Any = None, scale: float = 1.0) -> None:
        for _ in range(steps):
            x, y = next(self.batches)
            self.optimizer.zero_grad()
            MSE(self.model(x), y * scale).backward()
            self.optimizer.step()
            if controller is not None:
                controller.step()

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]


WIDE = TargetRegion(sharpness=(0, 100.0), non_uniformity=(0, 0.2))


@pytest.mark.parametrize(("sharpness", "what"), [(0.5, "lr"), (100.0, "batch_size")])
def test_a_dry_run_is_the_run_without(sharpness: float, what: str) -> None:
    """Catches a dry run that changes weights, the rate, or the batches and their order."""
    bare, dry = Run(), Run()
    target = TargetRegion(sharpness=(0, sharpness), non_uniformity=(0, 0.2))
    controller = StabilityController(
        dry.monitor, target, batch=dry.sampler, dry_run=True, lr={"kick": 0.1, "restore": True}
    )
    bare.go(16)
    dry.go(16, controller)
    assert all(map(torch.equal, bare.model.state_dict().values(), dry.model.state_dict().values()))
    assert (dry.lr, dry.sampler.batch_size) == (0.2, 12)
    assert any(decision.what == what and decision.changes for decision in controller.decisions)
    assert all(decision.dry_run for decision in controller.decisions)


def test_the_sharpness_comes_first() -> None:
    """Catches a batch size that changes before the sharpness has settled, or never changes."""
    run = Run(lr=0.4)
    target = TargetRegion(sharpness=(0, 4.0), non_uniformity=(0, 1.5))
    law = partial(batch_staircase, dwell=20)
    controller = StabilityController(
        run.monitor, target, batch=run.sampler, settle=2, batch_law=law
    )
    run.go(120, controller)
    rates = [d for d in controller.decisions if d.what == "lr" and d.changes]
    batches = [d for d in controller.decisions if d.what == "batch_size" and d.changes]
    assert rates
    assert batches
    sharp = {m.step: m.sharpness for m in run.monitor.history}
    settled = [step for step, a in sharp.items() if a <= 4.0 * 1.05]
    assert batches[0].step > rates[-1].step
    assert batches[0].step >= settled[1]  # the second measurement within the target
    # What the monitor observes is what was decided, though it learns of it a few steps later.
    assert run.monitor.margins.batch_size == run.sampler.batch_size < 12


def test_its_turn_has_hysteresis() -> None:
    """Catches batch-size steering that stops and starts as measurements vary around the bound."""
    run = Run()
    controller = StabilityController(run.monitor, WIDE, batch=run.sampler, settle=2, band=0.05)
    turns, memory = [], controller._memory
    for a in (104.0, 106.0, 104.0, 103.0, 109.0, 111.0, 104.0, 104.0):
        margins = stableopt.StabilityMargins(sharpness=a)
        is_settled, settled = controller._sharpness_settled(margins, memory)
        turns.append(is_settled)
        memory = replace(memory, settled=settled)
    assert turns == [False, False, False, True, True, False, False, True]


def test_every_decision_reaches_the_sinks_with_its_reason(tmp_path: Path) -> None:
    """Catches decisions that do not reach the sinks."""
    delivered: list[tuple[int, dict[str, float]]] = []
    lines = stableopt.JSONLinesSink(tmp_path / "run.jsonl")
    run = Run(sinks=[lambda step, record: delivered.append((step, record)), lines])
    controller = StabilityController(run.monitor, WIDE, batch=run.sampler)
    run.go(30, controller)
    sent = [(step, record) for step, record in delivered if "decision" in record]
    assert sent == [(d.step, d.record()) for d in controller.decisions]
    written = [json.loads(line) for line in lines.path.read_text().splitlines()]
    notes = [line["note"] for line in written if "note" in line]
    assert notes == [str(decision) for decision in controller.decisions]
    assert any(d.what == "batch_size" and d.measured is not None for d in controller.decisions)


def test_decisions_are_marks_in_the_figures(tmp_path: Path) -> None:
    """Catches marks that lie off the trajectory, and TensorBoard figures without marks."""
    sink = stableopt.TensorBoardSink(tmp_path, max_diagrams=2)
    run = Run(sinks=[sink])
    controller = StabilityController(run.monitor, WIDE, batch=run.sampler, settle=1)
    run.go(15, controller)
    assert "lower batch size" in {label for _, label in controller.marks}
    figure = stableopt.plot.diagram(None, run.monitor.history, marks=controller.marks)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    points = [(m.sharpness, m.non_uniformity) for m in run.monitor.history]
    line = drawn["lower batch size"]
    assert set(zip(*line.get_data(), strict=True)) <= set(points)
    lines = stableopt.plot.margins(run.monitor.history, marks=controller.marks).axes[0]
    assert "lower batch size" in [text.get_text() for text in lines.get_legend().get_texts()]
    assert sink._diagrams._marks[0][1] == "lower batch size"
    sink.close()


def test_reached_and_unreachable_are_said() -> None:
    """Catches a controller that does not report the outcome."""
    run = Run(lr=0.2, every=2)
    controller = StabilityController(
        run.monitor, TargetRegion(sharpness=(500.0, None)), patience=5, lr={"law": stay}
    )
    run.optimizer.param_groups[0]["lr"] = 2 / 500  # where the target wants it
    run.go(40, controller)
    verdicts = [d for d in controller.decisions if d.what == "target"]
    assert verdicts[0].kind == "unreachable"
    assert "target sharpness 500 is above what the loss left to descend" in verdicts[0].why
    easy = Run()
    controller = StabilityController(easy.monitor, TargetRegion(sharpness=(0, 500.0)))
    easy.go(10, controller)
    assert [d.kind for d in controller.decisions if d.what == "target"] == ["reached"]


def stay(measured: Any, state: Any) -> Any:
    return measured.decide("keep", measured.lr, "as asked"), state


def test_losses_that_are_lost_end_nothing() -> None:
    """Catches a crash, or silence, over weights that are not finite."""
    run = Run()
    controller = StabilityController(run.monitor, WIDE, batch=run.sampler)
    run.go(10, controller)
    before = run.lr
    with pytest.warns(RuntimeWarning, match="not finite"):
        run.go(30, controller, math.nan)
    kinds = [(d.what, d.kind) for d in controller.decisions]
    assert kinds.count(("lr", "cut")) == 1
    assert run.lr == pytest.approx(0.7 * before)


def test_a_run_resumes_where_it_was() -> None:
    """Catches a law that restarts, a batch size that is forgotten, decisions that are lost."""
    target = TargetRegion(sharpness=(0, 1 / 2), non_uniformity=(0, 1 / 3), unit="present")
    whole = Run()
    controller = StabilityController(whole.monitor, target, batch=whole.sampler, settle=1)
    whole.go(40, controller)
    state = {
        "model": whole.model.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
        "monitor": whole.monitor.state_dict(),
        "controller": controller.state_dict(),
    }
    state = {name: copy.deepcopy(value) for name, value in state.items()}
    json.dumps(state["controller"])  # plain values only
    batches = []
    original = whole._supply()
    for _ in range(20):
        batches.append(next(original))
    whole.batches = iter(batches)
    whole.go(20, controller)

    again = Run(lr=0.9, seed=5)
    resumed = StabilityController(again.monitor, target, batch=again.sampler, settle=1)
    again.model.load_state_dict(state["model"])
    again.optimizer.load_state_dict(state["optimizer"])
    again.monitor.load_state_dict(state["monitor"])
    resumed.load_state_dict(state["controller"])
    assert resumed.target.unit == "absolute"
    again.batches = iter(batches)
    again.go(20, resumed)
    assert again.lr == whole.lr
    assert again.sampler.batch_size == whole.sampler.batch_size
    assert list(resumed.decisions) == list(controller.decisions)
    with pytest.raises(ValueError, match="lacks"):
        resumed.load_state_dict({})
    with pytest.raises(ValueError, match="batch_size does not fit"):
        StabilityController(Run().monitor, TargetRegion(sharpness=(0, 1.0))).load_state_dict(
            state["controller"]
        )


def test_a_state_that_is_refused_changes_nothing() -> None:
    """Catches a controller that is half the one of the checkpoint after an error."""
    run = Run(every=1)
    target = TargetRegion(sharpness=(0, 100.0), non_uniformity=(0, 0.2))
    controller = StabilityController(run.monitor, target, batch=run.sampler)
    run.go(3, controller)
    good = copy.deepcopy(controller.state_dict())
    assert good["target"] == good["scheduler"]["target"] == target.to_dict()
    wrong: dict[str, Any] = {
        "batch_size": 48,  # above the largest
        "target": {"sharpness": [3.0, 1.0]},
        "batch_law": None,
        "verdict": None,
    }
    within = {"target": {}, "law": None, "bounds": {"min_lr": 0.1}, "decisions": [{}], "last_lr": 1}
    states = [{name: value} for name, value in wrong.items()]
    states += [{"scheduler": {**other(good["scheduler"]), name: within[name]}} for name in within]
    states.append({"scheduler": {}})
    for state in states:
        with pytest.raises((TypeError, ValueError)):
            controller.load_state_dict({**good, **{"scheduler": other(good["scheduler"])}, **state})
        assert controller.state_dict() == good, state


def test_decisions_are_in_one_place_of_a_state() -> None:
    """Catches two copies of a shared log, a lost one, and a wrong one that changes something."""
    target = TargetRegion(non_uniformity=(0, 0.2))
    run = Run(every=1)
    both = StabilityController(
        run.monitor, replace(target, sharpness=(0, 100.0)), batch=run.sampler
    )
    alone = StabilityController(run.monitor, target, batch=run.sampler, lr=False)
    run.go(3, both)
    run.go(3, alone)
    for controller in (both, alone):
        state = controller.state_dict()
        decisions = list(controller.decisions)
        assert decisions
        assert set(state) == set(STATE_KEYS)
        controller.decisions.clear()
        controller.load_state_dict(state)
        assert list(controller.decisions) == decisions
    assert both.state_dict()["decisions"] is None
    repeated = {**both.state_dict(), "decisions": [d.to_dict() for d in both.decisions]}
    both.load_state_dict(repeated)  # as older versions wrote it
    good = alone.state_dict()
    with pytest.raises(TypeError):
        alone.load_state_dict({**good, "batch_size": 2, "decisions": [{"what": "lr"}]})
    assert alone.state_dict() == good


def other(scheduler: dict[str, Any]) -> dict[str, Any]:
    """Return a changed state of a scheduler."""
    return {**scheduler, "last_epoch": 77, "seen": 77, "decisions": []}


def test_accumulation_is_a_knob_as_well() -> None:
    """Catches a decided or used size that is not a multiple of the loader's batch size."""
    run = Run(batch_size=4)
    accumulation = AdaptiveAccumulation(run.loader, 4, 24)
    law = partial(batch_staircase, dwell=5)
    controller = StabilityController(run.monitor, WIDE, batch=accumulation, settle=1, batch_law=law)
    sizes = set()
    for _ in range(15):
        for group in accumulation:
            run.optimizer.zero_grad()
            for share, (x, y) in group:
                (share * MSE(run.model(x), y)).backward()
            run.optimizer.step()
            controller.step()
            sizes.add(accumulation.batch_size)
    assert sizes == {24, 12, 8, 4}  # 6 and 4.2 are nearest to 8 and 4
    for decision in controller.decisions:
        if decision.what == "batch_size":
            assert decision.new % 4 == 0
    assert run.monitor.margins.batch_size == 4


def test_a_margin_needs_no_batch_and_uses_one() -> None:
    """Catches a margin refused because it has no batch sampler, and a margin that adds noise."""
    run = Run()
    StabilityController(run.monitor, TargetRegion.within_limits(0.8))
    noisy = Run(lr=0.4, batch_size=1)
    controller = StabilityController(
        noisy.monitor, TargetRegion.within_limits(0.3), batch=noisy.sampler
    )
    noisy.go(30, controller)
    assert noisy.sampler.batch_size > 1
    assert not any(d.what == "batch_size" and d.kind == "lower" for d in controller.decisions)


def test_what_cannot_be_steered_is_refused() -> None:
    """Catches a target that nothing the controller may change can reach."""
    run = Run()
    flat = TargetRegion(sharpness=(0, 1.0))
    plain = Run(quantities=("sharpness",))
    gd = stableopt.GD(run.model.parameters(), lr=0.1)
    full = gd.track(run.model, MSE, (X, Y), every=5, quantities=BOTH)
    ready = StabilityLR(run.optimizer, run.monitor, flat)
    for arguments, options, error, says in (
        ((run.optimizer, flat), {}, TypeError, "monitor="),
        ((run.monitor, 3.0), {}, TypeError, "target=3.0"),
        ((run.monitor, flat), {"lr": 0.1}, TypeError, "lr=0.1"),
        ((run.monitor, flat), {"batch": 8}, TypeError, "batch=8"),
        ((run.monitor, flat), {"lr": False}, ValueError, "lr=False leaves the learning rate alone"),
        ((run.monitor, WIDE), {}, ValueError, "pass batch="),
        ((plain.monitor, WIDE), {"batch": run.sampler}, ValueError, "bounds the non-uniformity"),
        ((full, WIDE), {"batch": run.sampler}, ValueError, "needs SGD"),
        ((run.monitor, flat), {"lr": ready, "dry_run": True}, ValueError, "dry_run"),
        ((run.monitor, flat), {"settle": 0}, ValueError, "settle=0"),
        ((run.monitor, flat), {"patience": 1.5}, ValueError, "patience=1.5"),
    ):
        with pytest.raises(error, match=says):
            StabilityController(*arguments, **options)
    assert StabilityController(run.monitor, flat, lr=ready).scheduler is ready
    only = TargetRegion(non_uniformity=(0, 1.0))
    assert StabilityController(run.monitor, only, batch=run.sampler).scheduler is None
    full.close()
