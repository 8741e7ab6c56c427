"""The inner product of a search: with a preconditioner, and over shards of vectors."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import top_eigenpair
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.distributed.collectives import Ranks


class Halves:
    """Stands for two ranks that hold the same shard: sums double, the largest entry stays."""

    rank, size = 1, 2

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return 2 * value

    def all_gather(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows])

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor


SHARDED = InnerProduct(ranks=cast(Ranks, Halves()), sharded_size=6)


def test_a_preconditioner_makes_its_own_norm() -> None:
    """Catches a Euclidean norm where P's is meant, and the other way round. By hand: 1 + 4 * 9."""
    inner = InnerProduct(preconditioner=torch.diag(torch.tensor([1.0, 4.0]).double()))
    pair = inner.dual(torch.tensor([1.0, 3.0]).double())
    assert float(pair.norm) ** 2 == pytest.approx(37.0)
    unit = pair.normalised()
    assert float(unit.covector @ unit.vector) == pytest.approx(1.0)
    assert float(inner.norm(torch.tensor([3.0, 4.0]))) == 5.0


def test_shards_are_summed_over_ranks() -> None:
    """Catches an operation that takes a shard for the whole vector."""
    shard = torch.tensor([1.0, 2.0, 2.0])
    assert SHARDED.whole_size(3) == 6
    assert float(SHARDED.dot(shard, shard)) == 18.0
    assert float(SHARDED.norm(shard)) == pytest.approx(18.0**0.5)
    assert float(SHARDED.dual(shard).norm) == pytest.approx(18.0**0.5)
    doubled = SHARDED.add(SHARDED.dual(shard), 1.0, SHARDED.dual(shard))
    assert float(doubled.norm) == pytest.approx(72.0**0.5)
    assert float(SHARDED.magnitude(8 * shard)) == 16.0


def test_noise_has_norm_one_in_the_inner_product() -> None:
    """Catches a shard of norm 1, whose whole vector is longer, and draws that a seed does not decide."""
    shard, whole = (inner.noise(torch.ones(5), 7) for inner in (SHARDED, InnerProduct()))
    assert float(shard.covector.norm()) == pytest.approx(0.5**0.5)
    assert float(whole.covector.norm()) == pytest.approx(1.0)
    assert torch.equal(whole.covector, InnerProduct().noise(torch.ones(5), 7).covector)
    assert not torch.equal(whole.covector, InnerProduct().noise(torch.ones(5), 8).covector)


def test_each_rank_and_each_draw_has_noise_of_its_own() -> None:
    """Catches a rank in bits of the seed that torch's generator on the CPU ignores: all ranks then held
    the same shard, and a start of equal shards is not uniform.
    """

    def noise_of(rank: int, draw: int = 0, sharded_size: int | None = 10) -> Tensor:
        ranks = Halves()
        ranks.rank = rank
        inner = InnerProduct(ranks=cast(Ranks, ranks), sharded_size=sharded_size)
        return inner.noise(torch.ones(5), 7, draw).covector

    different = [noise_of(0), noise_of(1), noise_of(2), noise_of(0, draw=1), noise_of(1, draw=1)]
    for i, shard in enumerate(different):
        for earlier in different[:i]:
            assert not torch.equal(shard, earlier)
    # Whole vectors are the same on every rank, and what torch draws with the seed.
    drawn = torch.randn(5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise_of(1, sharded_size=None), noise_of(0, sharded_size=None))
    torch.testing.assert_close(noise_of(0, sharded_size=None), drawn / drawn.norm())


def test_the_operator_says_which_inner_product_its_vectors_have() -> None:
    """Catches an operator's inner product that is ignored: two equal shards of an eigenvector have a
    norm of 1 together.
    """
    values = torch.linspace(0, 1, 100, dtype=torch.float64)
    values[3] = 3.0
    operator: Any = Dense(torch.diag(values))
    operator.inner_product = InnerProduct(ranks=cast(Ranks, Halves()), sharded_size=200)
    pair = top_eigenpair(operator, tol=1e-5)
    assert pair.converged
    assert pair.value == pytest.approx(3.0)
    assert float(pair.vector.norm()) == pytest.approx(0.5**0.5)
