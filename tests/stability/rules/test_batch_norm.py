"""Biases in front of batch norm: without a gradient in training, and with one in a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import dense_hessians
from torch import Tensor, nn

from stableopt import Problem, UpdateRule, measure

CE = nn.CrossEntropyLoss()

pytestmark = pytest.mark.filterwarnings("ignore:the model has batch norm")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long()


def trained(bias: bool = True, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, Any]:
    """Return a network with batch norm, in training mode, and its optimizer after some steps."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    optimizer, (x, y) = kind(model.parameters(), lr=3e-3), data()
    for rows in torch.randperm(48).repeat(10).split(16):
        optimizer.zero_grad()
        CE(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model, optimizer


def preconditioned(model: nn.Module, optimizer: Any, left_out: str = "") -> float:
    """Return the top eigenvalue of P H in eval mode, without one parameter, from dense matrices."""
    hessian = dense_hessians(model.eval(), CE, *data()).mean(0)
    model.train()
    rule = UpdateRule.from_optimizer(optimizer)
    entries = rule.preconditioner @ torch.ones(len(hessian), dtype=torch.float64)  # type: ignore[operator]
    kept = torch.cat(
        [torch.full((p.numel(),), name != left_out) for name, p in model.named_parameters()]
    )
    roots = entries.sqrt() * kept
    return float(torch.linalg.eigvalsh(roots[:, None] * hessian * roots)[-1])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_they_are_constant_for_an_adaptive_optimizer(mode: str) -> None:
    """Catches a division by their zero gradient: a sharpness of thousands of times its limit."""
    model, optimizer = trained()
    expected = preconditioned(model, optimizer, left_out="0.bias")
    assert preconditioned(model, optimizer) > 100 * expected
    getattr(model, mode)()
    margins = measure(
        model,
        CE,
        data(),
        optimizer=optimizer,
        batch_size=16,
        quantities=("sharpness", "non_uniformity"),
        tol=1e-9,
    )
    assert margins.preconditioned_sharpness == pytest.approx(expected, rel=1e-8)
    assert margins.non_uniformity is not None
    assert margins.non_uniformity < 100 * expected


def cases() -> Iterator[Any]:
    frozen, _ = trained()
    frozen[1].eval()  # type: ignore[index]
    grouped = nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 2)).double()
    yield pytest.param(frozen, {}, id="frozen statistics")
    yield pytest.param(trained(bias=False)[0], {}, id="no bias")
    yield pytest.param(trained()[0], {"batch_statistics": True, "chunk_size": 16}, id="as trained")
    yield pytest.param(grouped, {}, id="group norm")


@pytest.mark.parametrize(("model", "options"), list(cases()))
def test_other_parameters_are_not(model: nn.Module, options: dict[str, Any]) -> None:
    """Catches a parameter left out that training does move."""
    assert Problem(model, CE, data(), **options).cancelled == frozenset()


def test_sgd_keeps_the_curvature_of_eval_mode() -> None:
    """Catches parameters that vanish from the plain sharpness, that of the loss in eval mode, also where
    two optimizers have different rates.
    """
    model, optimizer = trained(kind=torch.optim.SGD)
    hessian = dense_hessians(model.eval(), CE, *data()).mean(0)
    model.train()
    margins = measure(model, CE, data(), optimizer=optimizer, tol=1e-9)
    assert margins.sharpness == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-8)

    parts = {True: [model.get_parameter("0.bias")], False: []}
    parts[False] = [p for p in model.parameters() if p is not parts[True][0]]
    pair = [torch.optim.SGD(part, lr=2e-3 if is_bias else 1e-3) for is_bias, part in parts.items()]
    roots = torch.cat(
        [
            torch.full_like(p, 1.0 if p is parts[True][0] else 0.5**0.5).flatten()
            for p in model.parameters()
        ]
    )
    top = torch.linalg.eigvalsh(roots[:, None] * hessian * roots)[-1]
    margins = measure(model, CE, data(), optimizer=pair, tol=1e-9)
    assert margins.preconditioned_sharpness == pytest.approx(float(top), rel=1e-8)
