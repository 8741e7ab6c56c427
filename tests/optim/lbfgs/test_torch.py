"""With ``direction="two_loop"``, ``stableopt.LBFGS`` is torch's bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lbfgs_runs import DIRECTIONS, SEARCHES, X, Y, flat, network, train
from torch import Tensor, nn

import stableopt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lr", [1, 0.3, torch.tensor(0.5), torch.tensor([0.5])], ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("history_size", [2, 100])
def test_two_loop_is_torchs(
    dtype: torch.dtype, lr: Any, line_search_fn: str | None, history_size: int
) -> None:
    """Catches an operation in another order or precision: every evaluation must be equal bit for bit."""
    options = {
        "lr": lr,
        "line_search_fn": line_search_fn,
        "history_size": history_size,
        "dtype": dtype,
        "max_iter": 15,
    }
    if isinstance(lr, torch.Tensor) and lr.dim() and torch.__version__ < "2.7":
        pytest.skip("torch's own takes no rate of one element before 2.7")
    ours, losses, optimizer = train(stableopt.LBFGS, direction="two_loop", **options)
    expected, torchs_losses, reference = train(torch.optim.LBFGS, **options)
    assert losses == torchs_losses
    assert len(losses) > 40
    assert torch.equal(ours, expected)
    (state,) = optimizer.state_dict()["state"].values()
    (torchs,) = reference.state_dict()["state"].values()
    assert state.keys() | {"al"} == torchs.keys()
    for name, value in state.items():
        left = value if isinstance(value, list) else [value]
        right = torchs[name] if isinstance(value, list) else [torchs[name]]
        assert len(left) == len(right), name
        for a, b in zip(left, right, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 1},
        {"max_iter": 0},
        {"max_eval": 3},
        {"tolerance_grad": 0.02},
        {"tolerance_change": 1e-3},
        {"history_size": 1},
        {"max_iter": 30, "lr": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_two_loop_ends_steps_where_torch_does(
    options: dict[str, Any], line_search_fn: str | None
) -> None:
    """Catches a stopping criterion that is checked at another moment, or not in every kind of step."""
    options = {**options, "line_search_fn": line_search_fn}
    ours, losses, _ = train(stableopt.LBFGS, direction="two_loop", **options)
    expected, torchs, _ = train(torch.optim.LBFGS, **options)
    assert losses == torchs
    assert torch.equal(ours, expected)


def stochastic(kind: Any, **options: Any) -> Tensor:
    """Take steps with another batch each, where torch forms pairs across batches."""
    model = network()
    optimizer = kind(model.parameters(), max_iter=3, **options)
    for step in range(12):
        rows = slice(5 * (step % 4), 5 * (step % 4) + 5)

        def closure(rows: slice = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    return flat(model)


def test_batches_that_change_are_torchs_too() -> None:
    """Catches pairs formed at the end of a step, where torch waits for the next gradient."""
    for options in ({}, {"line_search_fn": "strong_wolfe", "lr": 0.5}):
        with pytest.warns(RuntimeWarning, match="different losses at the same point"):
            ours = stochastic(stableopt.LBFGS, direction="two_loop", **options)
        assert torch.equal(ours, stochastic(torch.optim.LBFGS, **options))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_complex_sparse_missing_and_mixed_gradients_are_torchs(direction: str) -> None:
    """Catches a flattening that drops imaginary parts, or shifts everything after a missing one."""

    def run(kind: Any, **options: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        embedding = nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(4, 3, generator=generator, dtype=torch.float64))
        wave = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.complex128))
        unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        single = nn.Parameter(torch.ones(3, 2))
        params = [embedding.weight, unused, wave, single]
        optimizer = kind(params, line_search_fn="strong_wolfe", max_iter=8, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            rows = embedding(torch.tensor([0, 2]))
            loss = (rows.sum(0) * wave - 1).abs().square().sum() + rows.square().sum()
            loss = loss + (single.double() @ torch.ones(2, dtype=torch.float64) - 3).square().sum()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        return [torch.view_as_real(p) if p.is_complex() else p for p in map(Tensor.detach, params)]

    ours, expected = run(stableopt.LBFGS, direction=direction), run(torch.optim.LBFGS)
    for a, b in zip(ours, expected, strict=True):
        if direction == "two_loop":
            assert torch.equal(a, b)
        else:
            # Eight iterations on a dozen parameters, some in single precision.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert float(ours[0].detach()[1].sum()) == pytest.approx(float(expected[0].detach()[1].sum()))


def test_gradients_in_another_order_of_memory() -> None:
    """Catches a ``view`` of channels-last gradients, where torch's own step raises."""

    def run(memory_format: torch.memory_format) -> Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).double().to(memory_format=memory_format)
        images = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=memory_format)
        optimizer = stableopt.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(images).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.cat([p.detach().contiguous().reshape(-1) for p in model.parameters()])

    # Convolutions sum in another order: five iterations from rounding.
    torch.testing.assert_close(
        run(torch.channels_last), run(torch.contiguous_format), rtol=1e-10, atol=1e-12
    )
