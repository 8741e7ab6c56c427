"""`MobileNet`, `UNet` and `Encoder`: small models of kinds that the package transformers lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Encoder", "MobileNet", "UNet"]


def _normed(convolution: nn.Conv2d, *, active: bool = True) -> list[nn.Module]:
    activation: list[nn.Module] = [nn.Hardswish()] if active else []
    return [convolution, nn.BatchNorm2d(convolution.out_channels), *activation]


class _Excitation(nn.Module):
    """Squeeze and excitation: scales each channel by a gate computed from all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)


class _InvertedResidual(nn.Module):
    """A wide depthwise convolution between two pointwise ones, with a shortcut if shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1) -> None:
        super().__init__()
        width = inputs * expansion
        self.layers = nn.Sequential(
            *_normed(nn.Conv2d(inputs, width, 1, bias=False)),
            *_normed(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)),
            _Excitation(width),
            *_normed(nn.Conv2d(width, outputs, 1, bias=False), active=False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.shortcut else y


class MobileNet(nn.Sequential):
    """Blocks of MobileNetV3 (Howard et al., 2019) with hardswish, for small images."""

    def __init__(self) -> None:
        super().__init__(
            *_normed(nn.Conv2d(3, 16, 3, 2, 1, bias=False)),
            _InvertedResidual(16, 16, 4),
            _InvertedResidual(16, 32, 4, stride=2),
            _InvertedResidual(32, 32, 4),
            _InvertedResidual(32, 64, 6, stride=2),
            _InvertedResidual(64, 64, 6),
            *_normed(nn.Conv2d(64, 384, 1, bias=False)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(384, 256),
            nn.Hardswish(),
            nn.Linear(256, 10),
        )


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        convolution = nn.Conv2d(width, outputs, 3, padding=1)
        layers += [convolution, nn.GroupNorm(4, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A three-level U-Net (Ronneberger et al., 2015), which classifies each pixel."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.first, self.second = _pair(3, width), _pair(width, 2 * width)
        self.lowest = _pair(2 * width, 4 * width)
        self.to_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.to_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.second_up, self.first_up = _pair(4 * width, 2 * width), _pair(2 * width, width)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(n, classes, height, width)``."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        lowest = self.lowest(F.max_pool2d(second, 2))
        up = self.second_up(torch.cat([self.to_second(lowest), second], 1))
        logits: Tensor = self.out(self.first_up(torch.cat([self.to_first(up), first], 1)))
        return logits


class Encoder(nn.Module):
    """torch's transformer encoder, which classifies each token."""

    def __init__(self, words: int, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, words)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits ``(n, words, length)``."""
        logits: Tensor = self.out(self.layers(self.embedding(words)))
        return logits.mT
