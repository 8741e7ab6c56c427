"""The structured product equals the general one where it applies, and is refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from hidden import HiddenGain
from layer_structures import FITTING, STRUCTURES, Twice, Two, jittered
from oracles import covariance, dense_hessians, relative_error, small_data, small_network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableopt.curvature import Hessian, NonUniformity, Problem


def non_uniformity(
    model: nn.Module, data: tuple[Tensor, Tensor] | None = None, **options
) -> NonUniformity:
    problem = Problem(model, nn.MSELoss(), data or small_data(), **options)
    return NonUniformity(problem)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("model", FITTING)
def test_it_is_the_covariance_of_dense_hessians(model: str, chunk_size: int | None) -> None:
    """Catches a lost term of the rank-two blocks, and a mean of one chunk for that of all."""
    network, data = FITTING[model](), small_data()
    operator = non_uniformity(network, data, chunk_size=chunk_size)
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
    operator = non_uniformity(network, data)
    assert operator.method == "structured"
    assert operator.shape == (20, 20)
    for p in network.parameters():
        p.requires_grad_(True)
    rows = list(range(15, 35))
    hessians = dense_hessians(network, nn.MSELoss(), *data)[:, rows][:, :, rows]
    eye = torch.eye(20, dtype=torch.float64)
    assert relative_error(operator @ eye, covariance(hessians)) < 1e-10
    assert non_uniformity(network, data, params=chosen).method == "structured"


# torch's own advice.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("model", STRUCTURES)
def test_layers_of_every_kind(model: str) -> None:
    """Catches a kind of layer whose layout, adjoint or sum over positions is wrong, and one that is
    not recognised.
    """
    build, kinds = STRUCTURES[model]
    torch.manual_seed(0)
    network, data = jittered(build()), small_data()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    v = torch.randn(len(expected), 3, dtype=torch.float64)
    for chunk_size in (None, 2):
        operator = non_uniformity(network, data, chunk_size=chunk_size)
        assert operator.method == "structured"
        assert set(operator.ways.values()) - {"linear"} == kinds
        for _ in range(2):
            assert relative_error(operator @ v, expected @ v) < 1e-10


@pytest.mark.parametrize(
    "model", ["linear", "conv1d", "conv2d on few positions", "layer norm", "embedding", "sequences"]
)
def test_a_diagonal_preconditioner_of_numbers_and_of_tensors(model: str) -> None:
    """Catches D applied once where it belongs twice, and a tensor taken for a number: with P = D^2
    the covariance is that of the D H_i D.
    """
    build = FITTING.get(model) or STRUCTURES[model][0]
    torch.manual_seed(0)
    network, data = jittered(build()), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    v = torch.randn(problem.num_params, 3, dtype=torch.float64)
    numbers = [0.5 + 0.25 * i for i in range(len(problem.params))]
    for scale in (numbers, [torch.rand_like(p) + 0.5 for p in problem.theta()]):
        d = problem.transformed(scale=scale).flatten([torch.ones_like(p) for p in problem.theta()])
        expected = covariance(d[:, None] * hessians * d)
        operator = NonUniformity(problem.transformed(scale=scale))
        assert operator.method == "structured"
        assert relative_error(operator @ v, expected @ v) < 1e-10


class Coupled(Two):
    """Depends on the other samples of its batch, but gives the same outputs for a doubled batch."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z * (1 + (z - z.mean(0)).square().mean())


class PositionsFirst(Two):
    """Merges positions and samples, samples last: the rows of a sample do not lie together."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, -x, 2 * x], dim=0)
        return super().forward(rows.reshape(-1, 3)).view(rows.shape).mean(0)


class InFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(HiddenGain.apply(x, self.second.bias))


UNFIT = {
    "positions first": PositionsFirst,
    "a bias in a custom function": InFunction,
}


@pytest.mark.parametrize("model", UNFIT)
def test_where_the_structure_does_not_hold_it_is_refused(model: str) -> None:
    """Catches a fast, wrong product; the general one is right for all of these."""
    torch.manual_seed(0)
    network, data = UNFIT[model]().double(), small_data()
    operator = non_uniformity(network, data)
    assert operator.method in ("vmap", "loop")
    assert set(operator.ways.values()) == {operator.method}
    expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-10
    with pytest.raises(ValueError, match="method='structured'"):
        NonUniformity(operator.problem, method="structured")


class Masked(nn.Module):
    """Adds a mask of one row a feature: with three samples it has as many rows as the batch."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, rows)
        self.gain = Gain(rows)
        self.head = nn.Linear(rows, 3)
        self.mask = torch.linspace(0.5, 1, rows * rows).view(rows, rows).double()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gain(torch.tanh(self.first(x)), self.mask))


class Gain(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(self.gain * (x @ mask))


@pytest.mark.parametrize("rows", [3, 4, 7, 5])
def test_a_mask_is_not_taken_for_samples(rows: int) -> None:
    """Catches a tensor that is split among the samples because it happens to have as many rows: as
    the few that the structure is tried on (4, and then 3), or as all (7).
    """
    network, data = Masked(rows), small_data(7)
    operator = non_uniformity(network, data)
    expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-10
    assert operator.method == "structured"


def mostly_blank(n: int) -> tuple[Tensor, Tensor]:
    """All but the last five samples are blank: without biases, their contributions vanish."""
    x, y = small_data(n)
    x[:-5] = 0
    return x, y


def alike(n: int) -> tuple[Tensor, Tensor]:
    x, y = small_data(n)
    x[:-8], y[:-8] = x[0], y[0]
    return x, y


@pytest.mark.parametrize(
    "cut", [[1, 8], [1] * 4 + [5], [9], [3, 3, 3]], ids=lambda sizes: str(len(sizes))
)
def test_the_trial_does_not_depend_on_the_first_chunk(cut: list[int]) -> None:
    """Catches a trial on the first chunk: every model passes it with a single sample."""
    x, y = small_data(9)
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    operator = NonUniformity(Problem(PositionsFirst(), nn.MSELoss(), batches))
    assert operator.method == "vmap"
    fitting = NonUniformity(Problem(Two(), nn.MSELoss(), batches))
    assert fitting.method == "structured"


@pytest.mark.parametrize("data", [mostly_blank, alike])
def test_the_trial_looks_for_samples_that_tell(data) -> None:
    """Catches a trial on samples whose contributions vanish or are equal: exchanging two of them
    changes nothing. Among 60 samples the informative ones are found; among 400 they are not, and
    the structure is not used.
    """
    assert non_uniformity(PositionsFirst(bias=False), data(60)).method == "vmap"
    assert non_uniformity(Two(bias=False), data(60)).method == "structured"
    assert non_uniformity(Two(bias=False), data(400)).method == "vmap"


def test_a_trial_is_repeated_for_parameters_that_had_no_part_in_it() -> None:
    """Catches a trial that is not repeated once a layer without curvature at the start has some."""

    class Late(Two):
        """Positions first, in a branch that starts at zero, where it has no curvature."""

        def __init__(self) -> None:
            super().__init__()
            self.branch = PositionsFirst()
            self.gain = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.gain * self.branch(x)

    network = Late()
    problem = Problem(network, nn.MSELoss(), small_data())
    assert NonUniformity(problem).method == "structured"
    network.gain = 1.0
    assert NonUniformity(problem).method == "vmap"


def test_a_call_may_take_as_many_tensors_as_there_are_samples() -> None:
    """Catches rows of the trial's calls that are matched by place although their numbers differ."""

    class Split(Two):
        """Takes the batch apart and joins it again, before any parameter."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat(x.split(1)))

    class Joined(Two):
        """Joins the samples with a parameter in one call; the parameter and the copies drop out."""

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.cat([self.first.bias[:1].expand(1, x.shape[1]), *x.split(1), *x.split(1)])
            return super().forward(rows[1 : len(x) + 1])

    data = small_data()
    for build, method in ((Split, "structured"), (Joined, "vmap")):
        network = build()
        operator = non_uniformity(network, data)
        assert operator.method == method
        expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
        eye = torch.eye(len(expected), dtype=torch.float64)
        assert relative_error(operator @ eye, expected) < 1e-10


@pytest.mark.parametrize("memory", [1, 100_000, 2**30])
def test_whatever_is_kept_the_product_is_the_same(memory: int) -> None:
    """Catches a chunk that is skipped, or read twice, where some passes are kept and others not."""
    network, data = small_network(), small_data(50)
    problem = Problem(network, nn.MSELoss(), data, chunk_size=7)
    v = torch.randn(38, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = NonUniformity(problem, method="loop") @ v
    operator = NonUniformity(problem, memory=memory)
    for _ in range(3):
        assert relative_error(operator @ v, expected) < 1e-12
    hessian = Hessian(problem, memory=memory)
    for _ in range(3):
        assert relative_error(hessian @ v, Hessian(problem, memory=1) @ v) < 1e-13


def test_a_model_that_couples_its_samples_is_found_out() -> None:
    """Catches per-sample Hessians taken from a batch in which they do not exist."""
    problem = Problem(Coupled(), nn.MSELoss(), small_data())
    with pytest.raises(ValueError, match="samples unequally, or they see each other"):
        NonUniformity(problem)


def test_hooks_are_gone_afterwards() -> None:
    """Catches a layer that goes on adding offsets in training."""
    for network in (small_network(), Twice()):
        non_uniformity(network) @ torch.ones(sum(p.numel() for p in network.parameters())).double()
        assert all(not module._forward_hooks for module in network.modules())


def test_single_precision_and_a_batch_loss() -> None:
    """Catches a path that only serves pairs, and one that loses accuracy: 1e-5 is some hundred
    roundings of 6e-8.
    """
    network, (x, y) = small_network(), small_data()
    v = torch.randn(38, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = non_uniformity(network, (x, y)) @ v

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch["x"]), batch["y"])

    batch = {"x": x.float(), "y": y.float()}
    rough = NonUniformity(Problem.from_batch_loss(small_network().float(), loss, batch))
    assert rough.method == "structured"
    assert relative_error((rough @ v.float()).double(), exact) < 1e-5
