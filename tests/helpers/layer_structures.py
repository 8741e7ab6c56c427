"""Models whose layers have a known structure, and the ways by which each is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
