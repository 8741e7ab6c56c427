"""`LAWS`: the compared control laws; `Laws`: the job that runs all of them from the same start."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import all_samples, evaluate, gd_until, mean_squared_error, train
from benchmarks.training.networks import flops_per_sample, network
from stableopt import StabilityLR, StabilityMargins, TargetRegion
from stableopt.steering import Decision, Law, LRMeasured, State, gated_staircase

__all__ = ["LAWS", "Laws"]


def follow(measured: LRMeasured, state: State, *, share: float) -> tuple[Decision, State]:
    """Set the rate at which the measured sharpness is ``share`` of its limit."""
    if measured.margins.sharpness is None:
        return measured.decide("hold", measured.lr, "not measured"), state
    lr = 2 * share / measured.margins.sharpness
    return measured.decide("raise" if lr > measured.lr else "lower", lr, "measured"), state


def cut_while_sharp(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    """Lower the rate by 10 % as long as the sharpness is above the target."""
    a, high = measured.margins.sharpness, measured.target.sharpness[1]
    if a is None or high is None or a <= high:
        return measured.decide("keep", measured.lr, "flat enough, or not measured"), state
    return measured.decide("lower", 0.9 * measured.lr, "too sharp"), state


def cut_on_a_rise(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    """Follow the gated staircase, but return to the first rate whenever the loss has doubled."""
    loss = measured.margins.loss
    best = min(state.get("best", math.inf), math.inf if loss is None else loss)
    first = state.get("first", measured.lr)
    if loss is not None and loss > 2 * best:
        return measured.decide("cut", first, "the loss rose"), {**state, "first": first}
    decision, after = gated_staircase(measured, state)
    return decision, {**after, "best": best, "first": first}


def jump(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    """Set the target's learning rate at once."""
    return measured.decide("raise", measured.target.lr_for(measured.rule), "at once"), state


LAWS: Mapping[str, Law] = {
    "0.8 of the measured limit": partial(follow, share=0.8),
    "1.05 of the measured limit": partial(follow, share=1.05),
    "cut while too sharp": cut_while_sharp,
    "cut when the loss rises": cut_on_a_rise,
    "jump": jump,
    "gated staircase": gated_staircase,
}


@dataclass(frozen=True)
class Laws(Job):
    """Gradient descent towards a minimum, and a run of every law from there.

    Attributes:
        data: the images.
        seed: seed of the initialisation.
        lr: learning rate at the start.
        start_loss: training loss at which the laws take over.
        flatter: factor by which the target's sharpness is below that of the start.
        steps: steps of each law.
        measure_every: steps between measurements.

    The result has the sharpness at the ``start``, and for each of the ``laws`` its ``history`` of
    measurements and its ``end``.
    """

    kind = "control-laws"

    data: Dataset
    seed: int = 0
    lr: float = 0.5
    start_loss: float = 2e-3
    flatter: float = 4.0
    steps: int = 1500
    measure_every: int = 10

    @property
    def flops(self) -> float:
        """The steps to the start, and the steps and measurements of the laws."""
        products = 15 / self.measure_every
        steps = 2 / (self.lr * self.start_loss) + len(LAWS) * self.steps * (1 + 3 * products)
        return steps * self.data.n * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, and run every law."""
        images = images_for(self.data, work)
        model = network(self.data.name, seed=self.seed).to(work.place.device)
        initial_loss = evaluate(model, images)
        optimizer = stableopt.GD(model.parameters(), lr=self.lr)
        gd_until(self.start_loss, model, images, optimizer, max_steps=10**6)
        laws = {}
        for index, (name, law) in enumerate(LAWS.items()):
            work.progress(index / len(LAWS), name)
            laws[name] = _summary(self._run_law(law, model, images, initial_loss))
        return {"start": laws["gated staircase"]["history"][0]["sharpness"], "laws": laws}

    def _run_law(
        self, law: Law, start: nn.Module, images: Images, loss_cap: float
    ) -> list[StabilityMargins]:
        model = copy.deepcopy(start)
        optimizer = stableopt.GD(model.parameters(), lr=self.lr)
        with (
            warnings.catch_warnings(),
            optimizer.track(
                model, mean_squared_error, images.samples, every=self.measure_every
            ) as monitor,
        ):
            warnings.simplefilter("ignore", RuntimeWarning)  # divergence is expected here
            monitor.measure()
            scheduler = StabilityLR(
                optimizer,
                monitor,
                TargetRegion.flatter(by=self.flatter),
                law=law,
                loss_cap=loss_cap,
            )

            def steer(step: int, loss: float) -> bool:
                scheduler.step()
                return monitor.margins is not None and monitor.margins.failure is not None

            batches = all_samples(images)
            train(model, optimizer, batches, steps=self.steps, after_step=steer)
        return list(monitor.history)


def _summary(history: list[StabilityMargins]) -> dict[str, Any]:
    """Return a law's history and its end, as stored in the result."""
    finite = [m for m in history if m.failure is None]
    end = finite[-1]
    diverged = next((m.step for m in history if m.failure is not None), None)
    return {
        "history": [
            {"step": m.step, "sharpness": m.sharpness, "lr": m.lr, "loss": m.loss}
            | {"failed": m.failure is not None}
            for m in history
        ],
        "end": {
            "sharpness": end.sharpness,
            "lr": end.lr,
            "limit": end.sharpness_limit,
            "loss": end.loss,
            "largest_loss": None if diverged is not None else max(m.loss or 0.0 for m in finite),
            "diverged_at": diverged,
        },
    }
