"""Members of an ensemble take the same steps as alone, and each ends by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.runner import Place, Store, run_all
from benchmarks.training import ensemble
from benchmarks.training.data import Dataset, Images
from benchmarks.training.minimum import Solution

DIGITS = Dataset("digits", 60)
HERE = Place(threads=1)

TOLERANCE = 1e-5
"""Relative, of float32 weights after some 30 steps: each step adds a few units in the last place,
6e-8, in another order of summation; and steps at rates below 2/sharpness do not enlarge what was
added before. It is not bitwise since a batched product sums in another order than a plain one."""


def both_ways(jobs: list[Solution], tmp_path: Path) -> tuple[Store, Store]:
    """Run jobs one by one, and as one ensemble."""
    alone, together = Store(tmp_path / "alone"), Store(tmp_path / "together")
    for store, members in ((alone, 1), (together, len(jobs))):
        summary = run_all(jobs, store, HERE, members=members)
        assert summary.done == jobs, [store.failure(job) for job in summary.failed]
    assert [together.about(job)["ensemble"] for job in jobs] == [len(jobs)] * len(jobs)
    return alone, together


def same(job: Solution, alone: Store, together: Store) -> None:
    """Compare a member with the lone run: weights, trace and result, in form and in value."""
    expected, weights = alone.tensors(job), together.tensors(job)
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        assert weights[name].shape == weight.shape
        assert float((weights[name] - weight).norm()) <= TOLERANCE * float(weight.norm())
    result, other = alone.result(job), together.result(job)
    assert {k: v is None for k, v in vars(other).items()} == {
        k: v is None for k, v in vars(result).items()
    }
    assert (other.outcome, other.steps) == (result.outcome, result.steps)
    lines, others = alone.trace(job), together.trace(job)
    assert [line["step"] for line in others] == [line["step"] for line in lines]
    for line, member in zip(lines, others, strict=True):
        assert member["loss"] == pytest.approx(line["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("batch_size", [None, 16], ids=["GD", "SGD"])
def test_members_take_the_steps_of_lone_runs(tmp_path: Path, batch_size: int | None) -> None:
    """Catches another member's rate, seed, scale or batches, and results in another form.

    Also catches a last batch that is left out: 60 samples in batches of 16 leave 12.
    """
    more: dict[str, Any] = {"batch_size": batch_size, "target_loss": 1e-9, "max_steps": 30}
    jobs = [
        Solution(DIGITS, lr=0.1, **more),
        Solution(DIGITS, lr=0.3, non_uniformity=False, **more),
        Solution(DIGITS, lr=0.1, seed=1, non_uniformity=False, **more),
        Solution(DIGITS, lr=0.2, scale=1.5, non_uniformity=False, **more),
    ]
    assert len({job.together for job in jobs}) == 1
    alone, together = both_ways(jobs, tmp_path)
    for job in jobs:
        same(job, alone, together)
        result, other = alone.result(job), together.result(job)
        # The eigenvalue's residual, 1e-3 of it: each starts from a random vector of its own.
        assert other.sharpness == pytest.approx(result.sharpness, rel=2e-3)
    weights = [together.tensors(job)["0.weight"] for job in jobs]
    assert not any(torch.equal(weights[0], weight) for weight in weights[1:])


def test_each_member_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a member that trains on after its end, and infinities that reach other members.

    Also catches wrong members kept: four of five end, at different steps, in two ways.
    """
    sizes = []
    training_losses = ensemble.Stack.training_losses

    def watched(self: Any) -> list[float]:
        sizes.append(len(self.members))
        return training_losses(self)

    monkeypatch.setattr(ensemble.Stack, "training_losses", watched)
    jobs = [
        Solution(DIGITS, lr=lr, target_loss=0.08, max_steps=60, non_uniformity=False)
        for lr in (0.02, 1e6, 0.5, 3e5, 0.3)
    ]
    alone, together = both_ways(jobs, tmp_path)
    outcomes = [together.result(job).outcome for job in jobs]
    assert outcomes == ["out of steps", "diverged", "reached", "diverged", "reached"]
    for job in (jobs[0], jobs[2], jobs[4]):
        same(job, alone, together)
    for job in (jobs[1], jobs[3]):
        assert together.result(job) == alone.result(job)
    assert len({together.result(job).steps for job in jobs}) >= 4
    assert sizes[0] == 5
    assert sizes[-1] == 1
    assert sorted(sizes, reverse=True) == sizes
    assert len(sizes) == 61


def test_the_network_for_colour_images_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches chunks of equal weight (the last is smaller), and mixed-up stacked convolutions.

    The oracle is autograd on each network alone.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(10, 3, 32, 32, generator=generator), torch.rand(10, 2, generator=generator)
    monkeypatch.setattr("benchmarks.training.data.COLOUR_CHUNK", 4)
    data = Dataset("cifar10-2", 10)
    jobs = [Solution(data, lr=0.1, seed=0), Solution(data, lr=0.2, seed=1)]
    stack = ensemble.Stack(jobs, Images(x, y, x, y.argmax(1)), "cpu")
    losses = stack.training_losses()
    assert losses == pytest.approx(stack.losses())
    for k, job in enumerate(jobs):
        model = job.model()
        loss = torch.nn.functional.mse_loss(model(x), y)
        # Float32, sums of ten samples' terms in another order.
        assert losses[k] == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for stacked, gradient in zip(stack.gradients, expected, strict=True):
            assert float((stacked[k] - gradient).norm()) <= 1e-4 * float(gradient.norm())


def test_who_may_be_trained_as_one() -> None:
    """Catches members whose data, batches or ends differ, and batch norm, in one ensemble."""
    base = Solution(DIGITS, lr=0.1)
    for other in (
        Solution(Dataset("digits", 61), lr=0.1),
        Solution(Dataset("digits", 60, random_labels=2), lr=0.1),
        Solution(DIGITS, lr=0.1, batch_size=4),
        Solution(DIGITS, lr=0.1, target_loss=0.1),
        Solution(DIGITS, lr=0.1, max_steps=3),
        Solution(Dataset("cifar10", 60), lr=0.1, network="vgg"),
    ):
        assert other.together != base.together
    resnet = Solution(Dataset("cifar10", 60), lr=0.1, network="resnet")
    assert resnet.together is None
    assert Solution(DIGITS, lr=0.1, sharpness_every=5).together is None
    with pytest.raises(ValueError, match=r"running_mean.*cannot be trained as one"):
        ensemble.Stack([resnet, resnet], Images(*map(torch.zeros, (1, 1, 1, 1))), "cpu")


def test_a_trace_that_a_killed_ensemble_left_is_not_gone_on_with(tmp_path: Path) -> None:
    """Catches a new trace appended to that of a killed ensemble, whose weights are lost."""
    job = Solution(DIGITS, lr=0.3, target_loss=1e-9, max_steps=4)
    other = Solution(DIGITS, lr=0.2, target_loss=1e-9, max_steps=4)
    store = Store(tmp_path)
    store.part(job).mkdir(parents=True)
    (store.part(job) / "trace.jsonl").write_text('{"step": 0, "loss": 7}\n')
    run_all([job, other], store, HERE, members=2)
    assert [line["step"] for line in store.trace(job)] == [0, 1, 2, 4]
    assert all(math.isfinite(line["loss"]) and line["loss"] < 7 for line in store.trace(job))
