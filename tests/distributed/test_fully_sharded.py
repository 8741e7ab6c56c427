"""Models under ``fully_shard`` against the same models whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import small_data
from rank_processes import NEEDS_FSDP_ON_CPU, run, shard
from rank_workers.fully_sharded import (
    divided_by_own_weights,
    fsdp_counted,
    fsdp_measured,
    fsdp_tracked,
    fsdp_weighted,
    labelled,
    of_classes,
    refusals,
    unsure,
    weight_of,
    wide_network,
)
from rank_workers.shares import SAMPLES
from torch import nn

from stableopt import Problem, StabilityMonitor, measure
from stableopt.curvature import Hessian

pytestmark = NEEDS_FSDP_ON_CPU

MSE = nn.MSELoss()


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_models_have_the_sharpness_of_whole_ones(size: int, tmp_path: Path) -> None:
    """Catches inner products of one rank's piece, gradients that FSDP has scaled, samples that weigh
    by their rank, and parameters, gradients or random numbers that a measurement leaves changed.
    """
    names = ["float64", "float32"] if size == 2 else ["float64"]
    ranks = run(fsdp_measured, size, tmp_path, names)
    for name in names:
        dtype = getattr(torch, name)
        x, y = (t.to(dtype) for t in small_data(SAMPLES))
        alone = measure(wide_network(dtype), MSE, (x, y), tol=1e-4)
        for found in ranks:
            assert found[f"{name} failure"] is None
            assert found[f"{name} samples"] == SAMPLES
            assert found[f"{name} untouched"]
            # What is promised. The differences leave 1e-9 in float64 and 1e-4 in float32, and a
            # residual of 0.01 its square, times the gap.
            assert found[f"{name} sharpness"] == pytest.approx(alone.sharpness, rel=1e-3)
            assert found[f"{name} loss"] == pytest.approx(alone.loss, rel=1e-5)
    problem = Problem(wide_network(), MSE, small_data(SAMPLES))
    assert sum(found["pieces"] for found in ranks) == problem.num_params
    vector = torch.tensor(ranks[0]["vector"], dtype=torch.float64)
    exact, gradient = Hessian(problem) @ vector, problem.gradient()
    for found in ranks:
        # What a step of 4e-7 of the norm leaves out is 1e-12, and rounding over the step 1e-9.
        product = torch.tensor(found["product"], dtype=torch.float64)
        assert (product - exact).norm() <= 1e-8 * exact.norm()
        own = torch.tensor(found["gradient"], dtype=torch.float64)
        torch.testing.assert_close(own, gradient)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_samples_have_their_weights(chunk_size: int | None, tmp_path: Path) -> None:
    """Catches weights that are left out, or cancel within a chunk or a rank, and a rank whose samples
    all have weight zero.
    """
    zero, one = run(fsdp_weighted, 2, tmp_path, chunk_size)
    assert bool((labelled()[1][shard(SAMPLES, 0, 2), 0] == -100).all())
    cases: dict[str, tuple[Any, Any]] = {
        "of torch": (of_classes, None),
        "a function": (divided_by_own_weights, weight_of),
        "a tensor": (divided_by_own_weights, weight_of(labelled())),
    }
    for name, (loss, weight) in cases.items():
        problem = Problem(wide_network(), loss, labelled(), sample_weight=weight)
        vector = torch.tensor(zero[f"{name} vector"], dtype=torch.float64)
        for found in (zero, one):
            assert found[f"{name} value"] == pytest.approx(problem.value(), rel=1e-12)
            own = torch.tensor(found[f"{name} gradient"], dtype=torch.float64)
            torch.testing.assert_close(own, problem.gradient())
            # Differences, as for plain means: 1e-12 is left out, and rounding over the step 1e-9.
            product = torch.tensor(found[f"{name} product"], dtype=torch.float64)
            exact = Hessian(problem) @ vector
            assert (product - exact).norm() <= 1e-8 * exact.norm()


def test_sharded_models_are_tracked(tmp_path: Path) -> None:
    """Catches a training that is disturbed, subspaces that are followed in pieces of the wrong size,
    and a preconditioner that is not cut as the parameters are.
    """
    zero, one = run(fsdp_tracked, 2, tmp_path)
    assert zero["untouched"]
    assert one["untouched"]
    assert zero == one
    model = wide_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = small_data(SAMPLES)
    options: dict[str, Any] = {"every": 2, "tol": 1e-4, "cold_every": 0}
    monitor = StabilityMonitor(optimizer, model, MSE, (x, y), **options)
    for _ in range(6):
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
    assert zero["failures"] == [None] * 3
    # The error of a value is the square of its residual, of 0.01, times the gap.
    expected = [margins.sharpness for margins in monitor.history]
    assert zero["sharpness"] == pytest.approx(expected, rel=1e-3)
    expected = [margins.preconditioned_sharpness for margins in monitor.history]
    assert zero["preconditioned"] == pytest.approx(expected, rel=1e-3)


def test_samples_of_a_loss_of_pairs_are_unknown_unless_the_loop_counts_them(tmp_path: Path) -> None:
    """Catches twice the batch size, where the probe set's passes do not show how often the loss runs
    the model: they run without gradients, and a rank repeats a batch where another has more.
    """
    for found in run(fsdp_counted, 2, tmp_path):
        assert found == {"observed": None, "counted": 6}


def test_what_sharded_models_cannot_give_is_refused(tmp_path: Path) -> None:
    """Catches a number of something else, or a hang, where there should be a reason."""
    zero, one = run(refusals, 2, tmp_path)
    for name in ("a sum", "no scalar"):
        assert zero.pop(name).startswith("ValueError: loss_fn")
        assert "loss_fn" in one.pop(name)
    for found in (zero, one):
        assert "expected finite weights that are not negative" in found.pop("negative weights")
    assert zero == one
    for name in ("non_uniformity", "critical_lr", "batch_sharpness"):
        assert zero[name].startswith(
            f"ValueError: quantities: {name} needs the gradients of single"
        )
    assert "'0.weight' is a DTensor" in zero["tensor parallel"]
    assert "Tensor-parallel parameters" in zero["tensor parallel"]
    assert "fully_shard on a mesh of one dimension" in zero["hybrid"]
    assert "is whole on every rank" in zero["partly"]
    assert "FSDP's gradients are 2 times the slope" in zero["summed"]
    assert "has a post-accumulate-grad hook" in zero["hooked"]
    assert "leave them out" in zero["precision"]
    assert "process_group" in zero["other group"]
    assert "expected a ShardedProblem" in zero["problem"]
    assert "weighs samples unequally, or they see each other" in zero["unknown weights"]
    assert "Pass the weights as sample_weight=. If" in zero["unknown weights"]
    assert "sample_weight: with these weights the gradient of a batch" in zero["wrong weights"]


def test_differences_that_are_none_are_warned_of(tmp_path: Path) -> None:
    """Catches a step below the precision in which FSDP runs the model, which gives a number as well;
    and batches of other forms than pairs.
    """
    zero, one = run(unsure, 2, tmp_path)
    assert len(zero["half"]) == 1
    assert "by differences of FSDP's gradients changes by" in zero["half"][0]
    assert one["half"] == []  # rank 0 says it
    assert zero["single"] == one["single"] == []


def test_the_older_wrapper_is_refused() -> None:
    """Catches a flat parameter that is taken for the model's."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(TypeError, match=r"expected torch\.distributed\.fsdp\.fully_shard"):
        Problem(FullyShardedDataParallel(wide_network()), MSE, small_data(SAMPLES))
