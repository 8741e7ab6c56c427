"""The training loop: its hooks, its end, and what it hands to the optimizer."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import stableopt
from benchmarks.runner import Place, Store, Work, run_all
from benchmarks.training.data import Dataset
from benchmarks.training.loops import (
    DivergedError,
    all_samples,
    evaluate,
    gd_until,
    reshuffled_batches,
    train,
)
from benchmarks.training.minimum import Solution, from_minimum
from benchmarks.training.networks import network

IMAGES = Dataset("digits", 16).load()


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_the_loop_is_the_plain_one() -> None:
    """Catches a batch that is skipped or used twice, a gradient that is kept from the last step, and
    losses of another step.
    """
    models = [network("digits", seed=0) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    calls: list[tuple[str, int, float]] = []
    taken = train(
        models[0],
        optimizers[0],
        reshuffled_batches(IMAGES, 5, torch.Generator().manual_seed(1)),
        steps=6,
        before_step=lambda step, loss: calls.append(("before", step, loss)),
        after_step=lambda step, loss: calls.append(("after", step, loss)),
    )
    expected = []
    batches = reshuffled_batches(IMAGES, 5, torch.Generator().manual_seed(1))
    for step, (x, y) in enumerate(itertools.islice(batches, 6)):
        optimizers[1].zero_grad()
        loss = nn.functional.mse_loss(models[1](x), y)
        loss.backward()
        optimizers[1].step()
        value = float(loss.detach())
        expected += [("before", step, value), ("after", step + 1, value)]
    assert taken == 6
    assert calls == expected
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize(("hook", "taken"), [("before_step", 2), ("after_step", 2)])
def test_a_hook_ends_the_training(hook: str, taken: int) -> None:
    """Catches a step that is taken, or a batch that is drawn, after a hook has said to stop."""
    model = network("digits", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = iter([(IMAGES.x[k : k + 4], IMAGES.y[k : k + 4]) for k in range(0, 16, 4)])
    steps = train(model, optimizer, batches, **{hook: lambda step, loss: step == 2})
    assert steps == taken
    assert len(list(batches)) == (1 if hook == "before_step" else 2)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # the graph is dropped below
def test_a_closure_takes_the_same_steps() -> None:
    """Catches a closure of the last batch, and a graph that is not kept for a second derivative."""
    models = [network("digits", seed=0) for _ in range(2)]
    for closure, model in zip((True, False), models, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        batches = reshuffled_batches(IMAGES, 5, torch.Generator().manual_seed(1))
        train(model, optimizer, batches, steps=4, closure=closure)
    assert torch.equal(weights(models[0]), weights(models[1]))
    train(
        models[0],
        torch.optim.SGD(models[0].parameters(), lr=0.0),
        all_samples(IMAGES),
        steps=1,
        before_step=lambda step, loss: (
            all(p.grad.requires_grad for p in models[0].parameters() if p.grad is not None)
            or pytest.fail("the graph is gone")
        ),
        create_graph=True,
    )
    for p in models[0].parameters():
        p.grad = None  # a graph that refers to its own parameters is garbage only then


def test_gd_until_ends_at_the_target_or_says_why_not() -> None:
    """Catches a step beyond the target, and a loss above it that passes for a minimum."""
    model = network("digits", seed=0)
    steps = gd_until(0.05, model, IMAGES, stableopt.GD(model.parameters(), lr=0.5), max_steps=500)
    assert evaluate(model, IMAGES) <= 0.05
    before = network("digits", seed=0)
    train(before, stableopt.GD(before.parameters(), lr=0.5), all_samples(IMAGES), steps=steps - 1)
    assert evaluate(before, IMAGES) > 0.05
    for lr, says in ((1e-6, "after 3 steps, above"), (1e9, "the loss is")):
        model = network("digits", seed=0)
        optimizer = stableopt.GD(model.parameters(), lr=lr)
        with pytest.raises(DivergedError, match=says):
            gd_until(0.05, model, IMAGES, optimizer, max_steps=3)


def test_a_minimum_is_loaded_only_if_it_is_one(tmp_path: Path) -> None:
    """Catches initial instead of final weights, and a run out of steps loaded as a minimum."""
    store = Store(tmp_path)
    data = Dataset("digits", 16)
    reached = Solution(data, lr=1.0, target_loss=3e-2)
    unfinished = Solution(data, lr=1.0, target_loss=1e-9, max_steps=2)
    lost = Solution(data, lr=1e6, target_loss=3e-2)
    assert not run_all([reached, unfinished, lost], store, Place()).failed
    work = Work(reached, store, Place())
    minimum, model, images = from_minimum(reached, work)
    # 1e-6: summed in other chunks.
    assert evaluate(model, images) == pytest.approx(minimum.loss, rel=1e-6)
    assert from_minimum(unfinished, work, allow_unfinished=True).minimum.outcome == "out of steps"
    for job, allowed in ((unfinished, False), (lost, False), (lost, True)):
        with pytest.raises(ValueError, match="has not reached a minimum"):
            from_minimum(job, work, allow_unfinished=allowed)
