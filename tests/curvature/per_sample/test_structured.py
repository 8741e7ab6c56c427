"""The structured product equals the general one where it applies, and is refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from hidden import HiddenGain
from oracles import covariance, dense_hessians, relative_error, small_data, small_network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableopt.curvature import Hessian, NonUniformity, Problem


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


class Sequences(Two):
    """Rows of a sample are positions: their gradients add up before they are squared."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x, -x, 2 * x], dim=1)).mean(1)


class MergedSequences(Two):
    """As above, with the positions merged into the leading dimension."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, -x, 2 * x], dim=1)
        return super().forward(rows.reshape(-1, 3)).view(rows.shape).mean(1)


class Attention(nn.Module):
    """A block with normalisation, attention and positions of its own, as transformers have it."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, 4))
        self.places = nn.Parameter(0.3 * torch.randn(1, 4, 4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attention else None
        self.mix = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x.unsqueeze(2))], dim=1)
        rows = rows + self.places
        normed = self.norm(rows)
        if self.attention is not None:
            rows = rows + self.attention(normed, normed, normed, need_weights=False)[0]
        q, k, v = self.mix(normed).chunk(3, dim=2)
        rows = rows + torch.softmax(q @ k.mT, dim=2) @ v
        return self.head(rows[:, 0])


class Words(nn.Module):
    """An embedding of integers, which come as floats here."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 5, padding_idx=3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        words = (2 * x).long().remainder(4)
        return self.head(torch.tanh(self.table(words).sum(1)))


class ByHand(Two):
    """Uses a weight outside of its layer as well, which the modules do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.first.weight.T @ self.second.weight.T


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class TiedTable(nn.Module):
    """The table of an embedding is the weight of the last layer too, at every position."""

    def __init__(self, words: int, length: int, by_hand: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(words, 5, padding_idx=words - 1)
        self.mix = nn.Linear(5, 5)
        self.length, self.by_hand = length, by_hand
        self.back = nn.Linear(5, words)
        self.back.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(self.length, dtype=x.dtype)
        words = (3 * x[:, :1] + steps * x[:, 1:2]).long().remainder(self.table.num_embeddings)
        rows = torch.tanh(self.mix(self.table(words).cumsum(1)))
        if self.by_hand:
            logits = nn.functional.linear(rows, self.table.weight, self.back.bias)
        else:
            logits = self.back(rows)
        return logits.tanh().sum(1)[:, :3]


class MeanSquare(nn.Module):
    """The norm of LLaMA and T5, or with ``shifted`` that of Gemma."""

    def __init__(self, features: int, shifted: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, features))
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (1.0 + self.weight.to(x.dtype)) if self.shifted else self.weight * x


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as transformers writes it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], -1)


class Windows(nn.Module):
    """Attention in windows, with a table of relative positions and a mask of each window, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.mix = Conv1D(4, 8)
        self.table = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Embedding(4, 2)
        self.head = nn.Linear(4, 3)
        self.register_buffer("places", torch.tensor([1, 2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x, x.sin()], dim=1)  # six positions in three windows of two
        rows = self.embed(wide.unsqueeze(2)).view(-1, 2, 4)
        q, k = self.mix(rows).view(-1, 2, 2, 4).transpose(1, 2).chunk(2, dim=-1)
        bias = self.table[self.places].view(2, 2, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
        bias = bias + self.bias(self.places.view(2, 2)).permute(2, 0, 1)
        mask = torch.tensor([0.0, -1.0, 0.5], dtype=x.dtype).view(3, 1, 1).expand(3, 2, 2)
        mask = mask.repeat(len(x), 1, 1).unsqueeze(1)
        scores = q @ k.mT + (bias + mask)
        found = torch.softmax(scores, dim=-1) @ torch.tanh(rows).unsqueeze(1)
        return self.head(found.sum(1).view(len(x), -1, 4).mean(1))


class Depthwise(nn.Module):
    """A block of ConvNeXt: a depthwise convolution, and a layer scale that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.tensor([0.5, -0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.view(-1, 1, 1) * torch.tanh(self.depthwise(x))


class Crossed(nn.Module):
    """Attention over a shorter sequence, which is called for each sample as a whole module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 2)
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.unsqueeze(2))
        return self.head(self.attention(rows, rows[:, :2], rows[:, :2])[0].sum(1))


class GainAndWeight(nn.Module):
    """A vector that is a gain, a bias, and the only row of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.vector * self.first(x) + self.vector)
        return torch.cat([z @ self.vector.view(4, 1), z[:, :2]], dim=1).sin()


class Shared(nn.Module):
    """A weight in two linear maps, one of them transposed, and in a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        return (z @ self.first.weight).tanh() * self.first.weight.sum(0)


def convolutions(*layers: nn.Module, features: int) -> nn.Module:
    """Return a network that looks at the three inputs through convolutions."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


def spread(*shape: int) -> nn.Module:
    """Return layers from the three inputs to a map of this shape."""
    return nn.Sequential(
        nn.Linear(3, torch.Size(shape).numel(), bias=False), nn.Unflatten(1, shape)
    )


STRUCTURES = {
    "sequences": (Sequences, set()),
    "merged sequences": (MergedSequences, set()),
    "tied weights": (Tied, set()),
    "a layer used twice": (Twice, set()),
    "conv1d": (
        lambda: convolutions(spread(2, 6), nn.Conv1d(2, 3, 3), nn.Tanh(), features=12),
        {"convolution"},
    ),
    "conv2d with everything": (
        lambda: convolutions(
            spread(2, 4, 3),
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
            nn.Tanh(),
            nn.AvgPool2d((3, 1)),
            features=4 * 3,
        ),
        {"convolution"},
    ),
    "conv2d on one position": (
        lambda: convolutions(spread(2, 3, 3), nn.Conv2d(2, 4, 3), nn.Tanh(), features=4),
        {"convolution"},
    ),
    "conv2d on few positions": (
        lambda: convolutions(spread(3, 3, 2), nn.Conv2d(3, 6, 2), nn.Tanh(), features=12),
        {"convolution"},
    ),
    "grouped conv2d on one position": (
        lambda: convolutions(spread(2, 2, 2), nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), features=4),
        {"convolution"},
    ),
    "same padding": (
        lambda: convolutions(
            spread(2, 4, 3),
            nn.Conv2d(2, 2, (1, 3), padding="same", dilation=(1, 2)),
            nn.Tanh(),
            features=24,
        ),
        {"convolution"},
    ),
    "conv3d": (
        lambda: convolutions(
            spread(1, 2, 2, 1), nn.Conv3d(1, 2, 2, padding=(0, 0, 1)), nn.Tanh(), features=4
        ),
        {"convolution"},
    ),
    "padding by reflection": (
        lambda: convolutions(
            spread(1, 4),
            nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"),
            nn.Tanh(),
            features=8,
        ),
        {"convolution"},
    ),
    "layer norm": (lambda: nn.Sequential(Two(), nn.LayerNorm(3), nn.Tanh()), {"normalisation"}),
    "group norm": (
        lambda: convolutions(spread(4, 3), nn.GroupNorm(2, 4), nn.Tanh(), features=12),
        {"normalisation"},
    ),
    "instance norm": (
        lambda: convolutions(
            spread(2, 5), nn.InstanceNorm1d(2, affine=True), nn.Tanh(), features=10
        ),
        {"normalisation"},
    ),
    "batch norm": (
        lambda: nn.Sequential(Two(), nn.BatchNorm1d(3), nn.Tanh()).eval(),
        {"normalisation"},
    ),
    "embedding": (Words, {"embedding"}),
    "a gain without structure": (
        lambda: nn.Sequential(Two(), nn.PReLU(3), nn.Tanh()),
        {"vmap"},
    ),
    "a transposed convolution": (
        lambda: convolutions(spread(1, 3), nn.ConvTranspose1d(1, 2, 2), nn.Tanh(), features=8),
        {"convolution"},
    ),
    "transposed conv2d with everything": (
        lambda: convolutions(
            spread(2, 2, 3),
            nn.ConvTranspose2d(
                2,
                4,
                (3, 2),
                stride=(2, 1),
                padding=(2, 1),
                output_padding=(1, 0),
                groups=2,
                dilation=(1, 2),
            ),
            nn.Tanh(),
            nn.AvgPool2d((2, 1)),
            features=4 * 3,
        ),
        {"convolution"},
    ),
    "transposed conv3d": (
        lambda: convolutions(
            spread(1, 2, 1, 1), nn.ConvTranspose3d(1, 2, (2, 1, 2)), nn.Tanh(), features=12
        ),
        {"convolution"},
    ),
    "same padding of an even kernel": (
        lambda: convolutions(spread(1, 4), nn.Conv1d(1, 2, 2, padding="same"), features=8),
        {"convolution"},
    ),
    "depthwise with layer scale": (
        lambda: convolutions(spread(2, 3, 2), Depthwise(), Depthwise(), features=12),
        {"convolution", "vmap"},
    ),
    "root mean square norm": (
        lambda: nn.Sequential(Two(), nn.RMSNorm(3), MeanSquare(3), MeanSquare(3, shifted=True)),
        {"normalisation", "vmap"},
    ),
    "tied table, formed": (lambda: TiedTable(4, 6), {"embedding + linear"}),
    "tied table, by rows": (lambda: TiedTable(7, 2), {"embedding + linear"}),
    "tied table by hand": (lambda: TiedTable(7, 2, by_hand=True), {"embedding + linear"}),
    "windows, tables and a mask": (Windows, {"vmap"}),
    "a weight used by hand": (ByHand, set()),
    "a subclass": (lambda: Squared(3, 3), set()),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).eval(),
        {"vmap"},
    ),
    "a vector of three forms": (GainAndWeight, {"linear + vmap"}),
    "a weight of three forms": (Shared, {"linear + vmap"}),
    "attention by hand, with places": (Attention, {"normalisation", "vmap"}),
    "attention by torch": (lambda: Attention(attention=True), {"normalisation", "vmap"}),
    "attention over another sequence": (Crossed, {"vmap"}),
}


def jittered(network: nn.Module) -> nn.Module:
    """Return the network in double precision, with gains away from 1 and biases away from 0."""
    network.double()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.2 * torch.randn(p.shape, dtype=p.dtype)
    return network


# torch's own advice.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("model", STRUCTURES)
def test_layers_of_every_kind(model: str) -> None:
    """Catches a kind whose layout, adjoint or sum over positions is wrong, and one that is not
    taken for what it is.
    """
    build, kinds = STRUCTURES[model]
    torch.manual_seed(0)
    network, data = jittered(build()), small_data()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    v = torch.randn(len(expected), 3, dtype=torch.float64)
    for chunk_size in (None, 2):
        operator = on(network, data, chunk_size=chunk_size)
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
    """Looks at the other samples of its batch, and leaves a doubled batch as it was."""

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
    operator = on(network, data)
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
    operator = on(network, data)
    expected = covariance(dense_hessians(network, nn.MSELoss(), *data))
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-10
    assert operator.method == "structured"


def says_nothing(n: int) -> tuple[Tensor, Tensor]:
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
    """Catches a trial on the first chunk, which with one sample in it every structure passes."""
    x, y = small_data(9)
    batches = list(zip(x.split(cut), y.split(cut), strict=True))
    operator = NonUniformity(Problem(PositionsFirst(), nn.MSELoss(), batches))
    assert operator.method == "vmap"
    fitting = NonUniformity(Problem(Two(), nn.MSELoss(), batches))
    assert fitting.method == "structured"


@pytest.mark.parametrize("data", [says_nothing, alike])
def test_the_trial_looks_for_samples_that_tell(data) -> None:
    """Catches a trial on samples whose contributions vanish, or are alike: the exchange of two is then
    invisible. In 60 samples those that tell are found; in 400 they are not, and nothing is believed.
    """
    assert on(PositionsFirst(bias=False), data(60)).method == "vmap"
    assert on(Two(bias=False), data(60)).method == "structured"
    assert on(Two(bias=False), data(400)).method == "vmap"


def test_a_trial_is_repeated_for_parameters_that_had_no_part_in_it() -> None:
    """Catches a verdict from a start at which a layer has no curvature, kept when it has some."""

    class Late(Two):
        """Positions first in a branch that starts at zero, and is without curvature there."""

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
