"""What `Problem` and `ShardedProblem` share: coordinates, facts found once, and what samples allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableopt.curvature import GaussNewton, Hessian, Problem, ShardedProblem
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.sharded import require_samples

DATA = torch.ones(4, 2), torch.zeros(4, 1)


def small_problem(**options: bool) -> Problem:
    return Problem(nn.Linear(2, 1), nn.MSELoss(), DATA, **options)


def test_flatten_is_the_transpose_of_unflatten() -> None:
    """Catches factors that are applied one way only: <flatten(t), v> = <t, unflatten(v)>."""
    shapes = [torch.Size([2, 3]), torch.Size([3])]
    plain = Coordinates(["weight", "bias"], shapes, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    vector = torch.randn(9, generator=generator, dtype=torch.float64)
    for scale in (None, [2.0, 0.5], [tensors[0].abs(), 3.0]):
        coordinates = plain.transformed(scale=scale)
        tangent = zip(tensors, coordinates.unflatten(vector), strict=True)
        expected = sum(float((t * part).sum()) for t, part in tangent)
        assert float(coordinates.flatten(tensors) @ vector) == pytest.approx(expected)


def test_decay_is_added_in_the_same_coordinates() -> None:
    """Catches weight decay that is scaled once or not at all: its matrix is D Lambda D."""
    shapes = [torch.Size([2]), torch.Size([1])]
    plain = Coordinates(["weight", "bias"], shapes, torch.float32, torch.device("cpu"))
    coordinates = plain.transformed(scale=[2.0, 1.0], weight_decay=[0.5, 3.0])
    product, vector = torch.zeros(3), torch.ones(3)
    coordinates.add_decay(product, coordinates.unflatten(vector))
    assert product.tolist() == [2.0, 2.0, 3.0]


def test_coordinates_of_another_number_of_parameters_are_refused() -> None:
    """Catches values that are cut or repeated silently."""
    problem = small_problem()
    with pytest.raises(
        ValueError, match="weight_decay has 1 values: expected one for each of the 2"
    ):
        problem.transformed(weight_decay=[0.1])
    with pytest.raises(
        ValueError, match=r"scale of 'weight' has shape \(2, 1\): expected \(1, 2\)"
    ):
        problem.transformed(scale=[torch.ones(2, 1), 1.0])


def test_facts_are_shared_by_coordinates_but_not_by_problems() -> None:
    """Catches facts that are recomputed in each coordinate system, or kept for other parameters."""
    memo, problem = Memo[int](), small_problem()
    memo.of(problem)["found"] = 1
    assert memo.of(problem.transformed(sign=-1.0)) == {"found": 1}
    assert Memo[int]().of(problem) == {}
    problem.params[0].requires_grad_(False)
    assert memo.of(problem.current()) == {}
    assert memo.of(small_problem()) == {}


def test_sharded_problems_implement_the_protocol_by_themselves() -> None:
    """Catches a sharded problem that claims methods which it would have to refuse."""
    assert issubclass(ShardedProblem, MeanLoss)
    assert not issubclass(ShardedProblem, Problem)
    assert not hasattr(ShardedProblem, "loss")
    with pytest.raises(TypeError, match="model is not under fully_shard: expected a Problem"):
        ShardedProblem(nn.Linear(2, 1), nn.MSELoss(), DATA)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_products_at_other_parameters_need_whole_ones(kind: type) -> None:
    """Catches an attribute error where a message should name the operator to use."""
    sharded = object.__new__(ShardedProblem)
    with pytest.raises(TypeError, match=r"under fully_shard .* expected ShardedHessian"):
        kind(sharded)


def test_what_needs_samples_says_so() -> None:
    """Catches a problem with batch statistics that passes for one with samples of its own."""
    problem = small_problem()
    assert require_samples(problem, "the noise") is problem
    with pytest.raises(ValueError, match="the noise needs the samples' own Hessians"):
        require_samples(small_problem(batch_statistics=True), "the noise")
    with pytest.raises(ValueError, match="the noise needs per-sample gradients"):
        require_samples(object.__new__(ShardedProblem), "the noise")
