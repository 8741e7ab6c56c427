"""Which parameters count: chosen, frozen, tied and unused ones."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    PRODUCT,
    dense_hessians,
    eye,
    relative_error,
)
from torch import Tensor, nn

from stableopt.curvature import (
    Hessian,
    Problem,
)


def test_some_parameters_only(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Catches a block of the Hessian taken from the wrong rows."""
    full = dense_hessians(network, nn.MSELoss(), *data).mean(0)
    chosen = [network[2].weight, network[0].bias]  # in another order than the model's
    hessian = Hessian(Problem(network, nn.MSELoss(), data, params=chosen))
    rows = list(range(15, 20)) + list(range(20, 35))
    assert relative_error(hessian @ eye(hessian), full[rows][:, rows]) < PRODUCT


def test_frozen_tied_and_unused_parameters(data: tuple[Tensor, Tensor]) -> None:
    """Catches tied weights counted twice or swapped once, and a crash on a missing gradient."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(2, 2)
            self.second.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied().double()
    x, y = data
    hessian = Hessian(Problem(model, nn.MSELoss(), data))
    weight, bias = model.first.weight, model.first.bias

    def loss(flat: Tensor) -> Tensor:
        w, b = flat[:9].view(3, 3), flat[9:12]
        out = torch.tanh(x @ w.T + b) @ w.T + model.second.bias.detach()
        return nn.functional.mse_loss(out, y)

    point = torch.cat([weight.detach().reshape(-1), bias.detach()])
    expected = torch.zeros(18, 18, dtype=torch.float64)
    expected[:12, :12] = torch.autograd.functional.hessian(loss, point)
    assert hessian.shape == (18, 18)
    assert relative_error(hessian @ eye(hessian), expected) < PRODUCT


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_scaled_by_frequencies_is_refused_for_all_data(make: type[nn.Module]) -> None:
    """Catches a number for some losses and chunk sizes and a refusal for others."""
    model = nn.Sequential(make(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.LazyLinear(2))
    tokens = torch.arange(6)[:, None]
    model(tokens)
    data = (tokens, torch.randn(6, 2))
    for chunk_size in (None, 1):
        with pytest.raises(ValueError, match=r"module '0' .* has scale_grad_by_freq=True"):
            Problem(model, nn.MSELoss(), data, chunk_size=chunk_size)
    head = list(model[2].parameters())
    assert Problem(model, nn.MSELoss(), data, params=head).num_params == 10


class QuantizedWithAdapter(nn.Module):
    """A frozen layer of integer codes, repacked by the first pass, and a trained low-rank adapter.

    With ``dense=True`` the frozen layer has the weights for which the codes stand.
    """

    def __init__(self, dense: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(256, (9, 1), generator=generator, dtype=torch.uint8)
        self.base: Tensor
        if dense:
            self.register_buffer("base", self.decoded(codes))
        else:
            self.base = nn.Parameter(codes, requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, 3, generator=generator).double())
        self.b = nn.Parameter(torch.randn(3, 2, generator=generator).double())

    @staticmethod
    def decoded(codes: Tensor) -> Tensor:
        return (codes.double() / 128 - 1).view(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base
        if not weight.is_floating_point():
            self.base.data = self.base.data.view(3, 3)
            weight = self.decoded(self.base)
        return torch.tanh(x @ weight.T + x @ self.a.T @ self.b.T)


def test_a_quantized_base_with_an_adapter(data: tuple[Tensor, Tensor]) -> None:
    """Catches integer codes that are restored in another shape, or taken for a moving average."""
    quantized, dense = QuantizedWithAdapter(False), QuantizedWithAdapter(True)
    expected = dense_hessians(dense, nn.MSELoss(), *data).mean(0)
    hessian = Hessian(Problem(quantized, nn.MSELoss(), data))
    assert relative_error(hessian @ eye(hessian), expected) < PRODUCT
