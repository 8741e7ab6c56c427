"""`network`: the networks of the experiments, and the FLOPs of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "WIDTHS",
    "TransformerBlock",
    "flops_per_sample",
    "fully_connected",
    "network",
    "resnet14",
    "resnet18",
    "small_cnn",
    "small_gpt",
    "small_transformer",
    "small_vgg",
]

WIDTHS = {
    "digits": (64, 128, 128, 10),
    "fashion-mnist": (784, 500, 500, 500, 10),
}
"""Layer widths by data set. Those for Fashion-MNIST are the paper's: 898,510 parameters."""


def network(
    data: str, *, seed: int, kind: str | None = None, scale: float | None = None
) -> nn.Module:
    r"""Return the network that the paper trains on a data set.

    Args:
        data: name of the data set.
        seed: seed of the initialisation.
        kind: ``"fully-connected"``, the default for grey images; ``"vgg"``, the default for colour;
            or ``"resnet"``. Beyond the paper, for the digits: ``"cnn"`` and ``"transformer"``.
        scale: draw all weights and biases from :math:`U[-v/\sqrt{n_{in}}, v/\sqrt{n_{in}}]` with
            this v, as in the paper's Figure 6. By default each network has its own initialisation,
            which for fully connected ones is v = 1.

    Raises:
        ValueError: for an unknown kind.
    """
    kind = kind or ("fully-connected" if data in WIDTHS else "vgg")
    classes = 2 if data == "cifar10-2" else 10
    if kind == "fully-connected":
        model: nn.Module = fully_connected(WIDTHS[data], seed)
    elif kind == "vgg":
        model = small_vgg(seed, classes)
    elif kind == "resnet":
        model = resnet14(seed, classes)
    elif kind == "cnn":
        model = small_cnn(seed)
    elif kind == "transformer":
        model = small_transformer(seed)
    else:
        kinds = "fully-connected, vgg, resnet, cnn or transformer"
        raise ValueError(f"network={kind!r}: expected {kinds}")
    if scale is not None:
        _redraw_uniform(model, scale, seed)
    return model


@cache
def flops_per_sample(data: str, kind: str | None) -> float:
    """Return the floating-point operations of one sample's gradient."""
    model = network(data, seed=0, kind=kind).eval()
    colour = data.startswith("cifar10")
    x = torch.zeros(1, 3, 32, 32) if colour else torch.zeros(1, WIDTHS[data][0])
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return float(counter.get_total_flops())


def _redraw_uniform(model: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = scale / layer.weight[0].numel() ** 0.5
            for p in layer.parameters(recurse=False):
                nn.init.uniform_(p, -bound, bound, generator=generator)


def fully_connected(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Return a ReLU network with torch's default initialisation from ``seed``.

    >>> sum(p.numel() for p in fully_connected(WIDTHS["fashion-mnist"], seed=0).parameters())
    898510
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def small_vgg(seed: int, classes: int = 2) -> nn.Sequential:
    r"""Return the paper's small VGG for 32 x 32 colour images, with the paper's initialisation.

    Five 3 x 3 convolutions, each with ReLU and a 2 x 2 max-pool, then 64-128-``classes``;
    convolution weights are :math:`N(0, 2/(9\cdot\mathrm{channels\ out}))`, their biases 0.

    >>> sum(p.numel() for p in small_vgg(seed=0).parameters())
    71410
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((3, 16, 16, 32, 64, 64)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            nn.init.normal_(convolution.weight, std=(2 / (9 * outputs)) ** 0.5)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU(), nn.MaxPool2d(2)]
        head = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, classes)]
        return nn.Sequential(*layers, nn.Flatten(), *head)


class Residual(nn.Module):
    """Two 3 x 3 convolutions with norms, by default batch norm, and a shortcut around them."""

    def __init__(
        self, inputs: int, outputs: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.round = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(body + shortcut)."""
        return torch.relu(self.body(x) + self.round(x))


def resnet14(seed: int, classes: int = 10) -> nn.Sequential:
    """Return a residual network for 32 x 32 colour images: 13 convolutions, one linear layer.

    Three stages of two blocks with 16, 32 and 64 channels, as in He et al. (2016), section 4.2,
    with n = 2. In training mode batch norm couples the samples of a batch, so that a sample has no
    Hessian of its own. Measurements are therefore made in evaluation mode, with running statistics.

    >>> layers = [m for m in resnet14(seed=0).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    >>> len(layers) - 2  # without the two shortcuts' convolutions
    14
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = [Residual(*pair) for pair in pairwise((16, 16, 16, 32, 32, 64, 64))]
        return nn.Sequential(
            *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
        )


def resnet18(
    seed: int, classes: int = 10, norm: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """Return He et al.'s ResNet-18 for 32 x 32 colour images, by default with group norm.

    The first convolution is 3 x 3, and no pooling follows it, as is usual for small images.

    >>> sum(p.numel() for p in resnet18(seed=0).parameters())
    11173962
    """
    norm = norm or partial(nn.GroupNorm, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), norm(64), nn.ReLU()]
        widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        blocks = [Residual(*pair, norm) for pair in pairwise(widths)]
        return nn.Sequential(
            *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)
        )


def small_cnn(seed: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions with group norm for the digits' 8 x 8 images.

    >>> small_cnn(seed=0)(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
        for inputs, outputs in pairwise((1, 16, 16)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(4, outputs),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


def small_transformer(seed: int) -> nn.Sequential:
    """Return one transformer block over the eight rows of the digits' images.

    >>> small_transformer(seed=0)(torch.zeros(2, 64)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = [nn.Unflatten(1, (8, 8)), nn.Linear(8, 32), Positions(8, 32)]
        return nn.Sequential(*embedding, TransformerBlock(32, seed=seed))


def small_gpt(
    seed: int, vocabulary: int = 64, context: int = 64, width: int = 384, layers: int = 6
) -> nn.Sequential:
    """Return a GPT: tokens ``(n, context)`` to logits ``(n, vocabulary, context)``.

    Its attention is an explicit softmax, since the fused kernels have no second derivatives.

    >>> sum(p.numel() for p in small_gpt(seed=0).parameters())
    10721344
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding = [nn.Embedding(vocabulary, width), Positions(context, width)]
        blocks = [TransformerBlock(width, None, seed + k, causal=True) for k in range(layers)]
        head = [nn.LayerNorm(width), nn.Linear(width, vocabulary), Transpose()]
        return nn.Sequential(*embedding, *blocks, *head)


class Transpose(nn.Module):
    """Swaps the last two dimensions: torch's cross-entropy expects classes second."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x.mT``."""
        return x.mT


class Positions(nn.Module):
    """Adds a learned vector to each position."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.1 * torch.randn(positions, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``(n, positions, width)`` with the vectors added."""
        return x + self.vectors


class TransformerBlock(nn.Module):
    """One pre-norm transformer block, followed by an average over positions and a linear head.

    Args:
        width: features per position; an attention head has 16.
        classes: number of outputs; ``None`` for a block without average and head.
        seed: seed of torch's default initialisation.
        causal: whether positions attend only to themselves and earlier ones.

    Maps ``(n, positions, width)`` to ``(n, classes)``, or to the same shape without a head.

    >>> TransformerBlock(32)(torch.zeros(2, 5, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, width: int = 64, classes: int | None = 10, seed: int = 0, causal: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = width // 16
            self.before_attention = nn.LayerNorm(width)
            self.mix = nn.Linear(width, 3 * width)
            self.join = nn.Linear(width, width)
            self.before_network = nn.LayerNorm(width)
            self.network = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            self.head = None if classes is None else nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch of sequences."""
        size, positions, width = x.shape
        parts = self.mix(self.before_attention(x)).view(size, positions, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones(positions, positions, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        x = x + self.join((weights @ value).transpose(1, 2).reshape(size, positions, width))
        x = x + self.network(self.before_network(x))
        return x if self.head is None else self.head(x.mean(1))
