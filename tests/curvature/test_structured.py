"""The structured product: where it applies it is the plain one, and elsewhere it is refused."""

from __future__ import annotations

import pytest
import torch
from oracles import covariance, dense_hessians, relative_error, small_data, small_network
from torch import Tensor, nn

from stableopt.curvature import NonUniformity, Problem
from stableopt.curvature.structured import linear_layers


def on(model: nn.Module, data: tuple[Tensor, Tensor] | None = None, **options) -> NonUniformity:
    problem = Problem(model, nn.MSELoss(), data or small_data(), **options)
    return NonUniformity(problem)


class Two(nn.Module):
    """Two layers with something between and after them."""

    def __init__(self, between=torch.tanh, after=lambda z: z, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 5, **options)
        self.second = nn.Linear(5, 3, **options)
        self.between, self.after = between, after
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.second(self.between(self.first(x))))


def skip(x: Tensor) -> Tensor:
    return x + x.sin() * x.roll(1, dims=1)


FITTING = {
    "smooth": lambda: Two(),
    "kinks": lambda: Two(torch.relu),
    "no bias": lambda: Two(bias=False),
    "mixing units": lambda: Two(skip),
    "softmax at the end": lambda: Two(after=lambda z: z.softmax(1)),
    "linear": lambda: Two(lambda z: z),
    "one layer": lambda: nn.Linear(3, 3).double(),
    "parameter-free normalisation": lambda: Two(lambda z: z / z.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("model", FITTING)
def test_it_is_the_covariance_of_dense_hessians(model: str, chunk_size: int | None) -> None:
    """Catches a lost term of the rank-two blocks, and a mean of one chunk for that of all."""
    network, data = FITTING[model](), small_data()
    operator = on(network, data, chunk_size=chunk_size)
    assert operator.method == "structured"
    expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    eye = torch.eye(len(expected), dtype=torch.float64)
    for _ in range(2):  # the second time by kept passes
        assert relative_error(operator @ eye, expected) < 1e-10


def test_frozen_parameters_drop_out() -> None:
    """Catches a frozen weight whose rank-two part is counted all the same."""
    network, data = Two(), small_data()
    network.first.weight.requires_grad_(False)
    network.second.bias.requires_grad_(False)
    chosen = [network.first.bias, network.second.weight]
    operator = on(network, data)
    assert operator.method == "structured"
    assert operator.shape == (20, 20)
    for p in network.parameters():
        p.requires_grad_(True)
    rows = list(range(15, 35))
    hessians = dense_hessians(network, nn.MSELoss(), *data)[:, rows][:, :, rows]
    eye = torch.eye(20, dtype=torch.float64)
    assert relative_error(operator @ eye, covariance(hessians)) < 1e-10
    assert on(network, data, params=chosen).method == "structured"


class Tied(Two):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(3, 5).double()
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.second(self.third(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class ByHand(Two):
    """Uses a weight outside of its layer as well: nothing in the modules tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.first.weight.T @ self.second.weight.T


class Coupled(Two):
    """Looks at the other samples of its batch, and leaves a doubled batch as it was."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z * (1 + (z - z.mean(0)).square().mean())


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Sequences(Two):
    """Rows of a sample are positions: their gradients add up before they are squared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x, -x, 2 * x], dim=1)).mean(1)


UNFIT = {
    "tied weights": Tied,
    "a layer used twice": Twice,
    "a weight used by hand": ByHand,
    "other parameters": lambda: nn.Sequential(Two(), nn.LayerNorm(3)).double(),
    "a subclass": lambda: Squared(3, 3).double(),
    "sequences": Sequences,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3).double()),
}


@pytest.mark.parametrize("model", UNFIT)
def test_where_the_structure_does_not_hold_it_is_refused(model: str) -> None:
    """Catches a product that is quick and wrong; the general one is right for all of these."""
    torch.manual_seed(0)
    network, data = UNFIT[model](), small_data()
    operator = on(network, data)
    assert operator.method in ("vmap", "loop")
    expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-10
    with pytest.raises(ValueError, match="method='structured'"):
        NonUniformity(operator.problem, method="structured")


def test_a_model_that_couples_its_samples_is_found_out() -> None:
    """Catches per-sample Hessians taken from a batch in which they do not exist."""
    with pytest.warns(UserWarning, match="samples that see each other"):
        problem = Problem(Coupled(), nn.MSELoss(), small_data())
    assert linear_layers(problem) is not None
    assert NonUniformity(problem).method != "structured"


def test_hooks_are_gone_afterwards() -> None:
    """Catches a layer that goes on adding offsets in training."""
    for network in (small_network(), Twice()):
        on(network) @ torch.ones(sum(p.numel() for p in network.parameters())).double()
        assert all(not module._forward_hooks for module in network.modules())


def test_single_precision_and_a_batch_loss() -> None:
    """Catches a path that only serves pairs, and one that loses accuracy: 1e-5 is some hundred
    roundings of 6e-8.
    """
    network, (x, y) = small_network(), small_data()
    v = torch.randn(38, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = on(network, (x, y)) @ v

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    batch = {"x": x.float(), "y": y.float()}
    rough = NonUniformity(Problem.from_batch_loss(small_network().float(), loss, batch))
    assert rough.method == "structured"
    assert relative_error((rough @ v.float()).double(), exact) < 1e-5
