"""The covariance of per-sample Hessians for any model: by vmap, or sample by sample."""

from __future__ import annotations

import pytest
import torch
from hidden import HiddenGain
from oracles import (
    LOSSES,
    PRODUCT,
    covariance,
    dense_hessians,
    eye,
    relative_error,
    small_data,
)
from torch import Tensor, nn

from stableopt.curvature import (
    NonUniformity,
    Problem,
)
from stableopt.curvature.per_sample.generic import samples_at_once


@pytest.mark.parametrize("method", ["structured", "vmap", "loop"])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: type(f).__name__)
def test_non_uniformity_is_the_covariance_of_the_dense_per_sample_hessians(
    network: nn.Module, data: tuple[Tensor, Tensor], loss_fn: nn.Module, method: str
) -> None:
    """Catches a Hessian of the mean where the mean of squares belongs, and the reverse."""
    x, y = data
    y = y.softmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    operator = NonUniformity(Problem(network, loss_fn, (x, y)), method=method)
    expected = covariance(dense_hessians(network, loss_fn, x, y))
    assert relative_error(operator @ eye(operator), expected) < PRODUCT


class Unstructured(nn.Module):
    """A model with a parameter that belongs to no layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(HiddenGain.apply(self.inner(x), self.gain))


def test_a_module_that_vmap_cannot_follow_is_measured_by_the_loop(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a crash, or a silent wrong answer, for control flow that depends on the data."""

    class Branching(Unstructured):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    # The sum of several samples decides for all of them.
    with pytest.warns(UserWarning, match="f is the mean over the samples by themselves"):
        problem = Problem(Branching(network), nn.MSELoss(), data, chunk_size=1)
    operator = NonUniformity(problem)
    assert operator.method == "vmap"
    product = operator @ eye(operator)
    assert operator.method == "loop"
    expected = covariance(dense_hessians(operator.problem.model, nn.MSELoss(), *data))
    assert relative_error(product, expected) < PRODUCT
    strict = NonUniformity(operator.problem, method="vmap")
    with pytest.raises(RuntimeError):
        strict @ eye(operator)


def test_large_models_take_few_samples_at_once(problem: Problem) -> None:
    """Catches memory that grows with the model times the data."""
    unstructured = Problem(Unstructured(problem.model), nn.MSELoss(), small_data())
    assert NonUniformity(unstructured, memory=1).method == "loop"
    roomy = 8 * 41 * 8 * 20  # eight copies of 41 parameters in double precision, for 20 samples
    assert NonUniformity(unstructured, memory=roomy).method == "vmap"
    assert samples_at_once(unstructured, roomy) == 20
