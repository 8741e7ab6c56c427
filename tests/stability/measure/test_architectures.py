"""Forty architectures of transformers, tiny, with their own losses: products and margins are right.

``pytest -m "not architectures"`` leaves them out: they take about a second each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, N, built, causal, loss_of, of_next_words
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableopt.curvature import Hessian, NonUniformity, Problem, top_eigenpair

pytest.importorskip("transformers", reason="the architectures are those of transformers")

pytestmark = [
    pytest.mark.architectures,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:the model has batch norm in training mode"),
]


DIFFERENCED = ("Wav2Vec2", "HuBERT")
"""Models with torch's fused weight norm, whose own second derivative is wrong."""

STEP = 1e-5
"""Of the reference's differences, off by some STEP^2 and 1e-16 / STEP in double precision."""


def sample_products(name: str) -> Callable[[Tensor], Tensor]:
    """Return v -> the products ``(n, d)`` with each sample's weighted Hessian, or rows of v with them.

    Each sample is evaluated by itself and differentiated twice, or its gradients are differenced.
    """
    model, batch = built(name)
    model.eval()
    weights = ARCHITECTURES[name].weights(batch).double()
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}

    def gradient(index: int, *, twice: bool) -> Tensor:
        sample = {key: value[index : index + 1] for key, value in batch.items()}
        with sdpa_kernel(SDPBackend.MATH):
            loss = N * weights[index] / weights.sum() * loss_of(model, sample)
        return flat(torch.autograd.grad(loss, params, create_graph=twice, **options))

    # The mean of a sample without targets is 0 / 0.
    counting = [index for index in range(N) if weights[index] > 0]
    gradients = {} if name in DIFFERENCED else {i: gradient(i, twice=True) for i in counting}

    def product(index: int, vector: Tensor) -> Tensor:
        if name not in DIFFERENCED:
            images = torch.autograd.grad(
                gradients[index], params, vector, retain_graph=True, **options
            )
            return flat(images)
        length = vector.norm()
        slopes = []
        for step in (STEP, -2 * STEP):
            nn.utils.vector_to_parameters(flat(params) + step * vector / length, params)
            slopes.append(gradient(index, twice=False))
        nn.utils.vector_to_parameters(flat(params) + STEP * vector / length, params)
        return (slopes[0] - slopes[1]) / (2 * STEP) * length

    def products(vectors: Tensor) -> Tensor:
        rows = torch.zeros_like(vectors.expand(N, -1))
        for index in counting:
            rows[index] = product(index, vectors.expand(N, -1)[index])
        return rows

    return products


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_and_margins(name: str) -> None:
    """Catches weights of targets that a model's own loss hides, kernels without a second derivative, and
    samples that a structured product mixes.

    A random direction sees every entry of a matrix. 1e-5: many models compute their loss, and some
    their normalisations, in single precision, which leaves 1e-6 in a product.
    """
    model, batch = built(name)
    problem = Problem.from_batch_loss(model, loss_of, batch, chunk_size=3)
    products = sample_products(name)

    def mean(vector: Tensor) -> Tensor:
        return products(vector).mean(0)

    def covariance(vector: Tensor) -> Tensor:
        rows = products(vector)
        return products(rows).mean(0) - mean(rows.mean(0))

    generator = torch.Generator().manual_seed(1)
    random = torch.randn(problem.num_params, generator=generator, dtype=torch.float64)
    for operator, truth in ((Hessian(problem), mean), (NonUniformity(problem), covariance)):
        expected = truth(random)
        assert (operator @ random - expected).norm() <= 1e-5 * expected.norm()
        pair = top_eigenpair(operator, tol=1e-3)
        assert pair.converged
        assert pair.value > 0
        residual = truth(pair.vector) - pair.value * pair.vector
        assert residual.norm() <= 1.1e-3 * pair.value


def test_a_loss_that_divides_by_its_own_count() -> None:
    """Catches a number for a loss of the trainer, which transformers computes without torch's losses."""
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = built("GPT-2")

    def smoothed(model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        loss: Tensor = LabelSmoother(0.0)(model(**inputs), batch["labels"], shift_labels=True)
        return loss

    with pytest.raises(ValueError, match=r"sample_weight= \(often each sample's number of targets"):
        Problem.from_batch_loss(model, smoothed, batch, chunk_size=3)
    weighted = Problem.from_batch_loss(
        model, smoothed, batch, chunk_size=3, sample_weight=of_next_words
    )
    reference = Problem.from_batch_loss(model, loss_of, causal())
    vector = torch.ones(reference.num_params, dtype=torch.float64)
    expected = Hessian(reference) @ vector
    # The model's own loss is of single precision.
    assert (Hessian(weighted) @ vector - expected).norm() <= 1e-5 * expected.norm()
