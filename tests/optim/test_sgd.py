"""``stableopt.SGD`` is equal to ``torch.optim.SGD`` bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sgd_runs import ARITHMETIC, accepted, name_of, random_tensors, same
from torch import Tensor, nn

import stableopt

SHAPES = [(3, 2), (5,), (1,)]
"""More than one parameter, so that foreach and fused paths have lists to walk."""


IMPLEMENTATIONS = [
    dict(zip(("foreach", "fused", "differentiable"), values, strict=True))
    for values in itertools.product((None, False, True), (None, False, True), (False, True))
]


def descend(
    kind: type[torch.optim.SGD],
    options: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 4,
) -> list[Tensor] | type[Exception]:
    """Return parameters and momentum buffers after ``steps``, or the type of the error.

    Differentiable steps add the gradient of the result in the initial parameters.
    """
    leaves = [nn.Parameter(t) for t in random_tensors(SHAPES, dtype, seed=0)]
    differentiable = options.get("differentiable", False)
    params: list[Tensor] = [p.clone() for p in leaves] if differentiable else list(leaves)
    try:
        optimizer = kind(params, **options)
        for step in range(steps):
            slopes = random_tensors(SHAPES, dtype, seed=1 + step)
            for p, slope in zip(params, slopes, strict=True):
                p.grad = p * slope if differentiable else p.detach() * slope
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return type(error)
    state = [optimizer.state[p].get("momentum_buffer") for p in params]
    results = params + [buffer for buffer in state if buffer is not None]
    if differentiable and not options["foreach"]:
        # Torch's foreach steps overwrite what this graph needs.
        results += torch.autograd.grad(sum(p.square().sum() for p in params), leaves)
    return [t.detach() for t in results]


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=name_of)
def test_every_combination_of_options_is_torchs(
    implementation: dict[str, Any], tensor_lr: bool
) -> None:
    """Catches an option that is dropped, or refused, in one combination only: the full grid."""
    clash = implementation["fused"] and (
        implementation["foreach"] or implementation["differentiable"]
    )
    for arithmetic in ARITHMETIC:
        options = {"lr": 0.1, **arithmetic, **implementation}
        if tensor_lr:
            options["lr"] = torch.tensor(0.1)
        ours = descend(stableopt.SGD, options)
        assert same(ours, descend(torch.optim.SGD, options)), options
        # Were everything refused, the comparison above would compare error types only.
        assert isinstance(ours, list) == (accepted(options) and not clash), (options, ours)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.complex128, torch.bfloat16]
)
@pytest.mark.parametrize(
    "path", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
def test_other_dtypes_are_torchs(dtype: torch.dtype, path: dict[str, Any]) -> None:
    """Catches arithmetic of our own that casts or conjugates, which float32 cannot show."""
    for arithmetic in filter(accepted, ARITHMETIC):
        options = {"lr": 0.1, **arithmetic, **path}
        ours = descend(stableopt.SGD, options, dtype=dtype)
        assert same(ours, descend(torch.optim.SGD, options, dtype=dtype)), options
        # The fused kernel takes no complex numbers; everything else must have run.
        assert isinstance(ours, list) == (not (dtype.is_complex and "fused" in path))


def grouped(kind: type[torch.optim.SGD]) -> list[Tensor]:
    params = [nn.Parameter(t) for t in random_tensors([(4,)] * 5, torch.float32, seed=3)]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.3, "weight_decay": 0.2},
        {"params": params[2:3], "momentum": 0.5, "dampening": 0.1, "foreach": True},
        {"params": params[3:], "momentum": 0.9, "nesterov": True, "maximize": True, "fused": True},
    ]
    optimizer = kind(groups, lr=0.1)
    for step in range(4):
        gradients = random_tensors([(4,)] * 5, torch.float32, seed=4 + step)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        params[4].grad = None if step < 2 else params[4].grad
        if step == 2:
            # The fused kernel wants all buffers or none.
            optimizer.param_groups[3]["fused"] = False
        optimizer.step()
    return [p.detach() for p in params] + [
        optimizer.state[p]["momentum_buffer"] for p in params[2:]
    ]


def test_groups_with_different_options_are_torchs() -> None:
    """Catches one group's option used for all, and state lost for a parameter without gradient."""
    assert same(grouped(stableopt.SGD), grouped(torch.optim.SGD))


def with_sparse_gradients(kind: type[torch.optim.SGD], options: dict[str, Any]) -> Any:
    weight = random_tensors([(6, 3)], torch.float32, seed=0)[0]
    table = nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
    try:
        optimizer = kind(table.parameters(), lr=0.1, **options)
        for rows in ([0, 2, 2], [1, 2, 5], [0, 0, 0]):
            optimizer.zero_grad()
            table(torch.tensor(rows)).square().sum().backward()
            assert table.weight.grad is not None
            assert table.weight.grad.is_sparse
            optimizer.step()
    except (RuntimeError, ValueError) as error:
        return type(error)
    return [table.weight.detach()]


@pytest.mark.parametrize(
    "options", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str
)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_gradients_are_torchs(options: dict[str, Any], momentum: float) -> None:
    """Catches a step that makes gradients dense, or takes a sparse one where torch refuses."""
    options = {"momentum": momentum, **options}
    ours = with_sparse_gradients(stableopt.SGD, options)
    assert same(ours, with_sparse_gradients(torch.optim.SGD, options))
    assert isinstance(ours, list) == ("fused" not in options)


def test_tracked_sparse_gradients() -> None:
    """Catches curvature code that fails on sparse gradients, or drops repeated rows.

    The dense embedding is the oracle: the same function, so the same curvature.
    """
    rows = torch.tensor([0, 2, 2, 1, 5, 2])
    targets = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    weight = random_tensors([(6, 2)], torch.float64, seed=0)[0]

    def run(sparse: bool, tracked: bool) -> tuple[list[Tensor], Any]:
        table = nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse)
        head = nn.Linear(2, 1).double()
        with torch.no_grad():
            head.weight.fill_(0.5)
            head.bias.zero_()
        model = nn.Sequential(table, nn.Tanh(), head)
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        if tracked:
            optimizer.track(model, nn.MSELoss(), (rows, targets), every=1, tol=1e-10)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(rows), targets).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], optimizer.monitor

    weights, monitor = run(sparse=True, tracked=True)
    assert same(weights, run(sparse=True, tracked=False)[0])
    _, dense = run(sparse=False, tracked=True)
    assert [m.failure for m in monitor.history] == [None] * 3
    # Weights may differ by the rounding of sums, and eigenvalues by it and tol^2: 1e-20.
    assert [m.sharpness for m in monitor.history] == pytest.approx(
        [m.sharpness for m in dense.history], rel=1e-12
    )
