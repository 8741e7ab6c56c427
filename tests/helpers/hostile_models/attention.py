"""Attention: torch's fused function, and the modules made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hostile_models.blocks import MSE, sequences
from hostile_models.setting import Setting, measured


class Attention(nn.Module):
    """Causal attention by torch's own fused function, with dropout in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.project(x).chunk(3, dim=-1))
        dropout = 0.2 if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return out.squeeze(1)


@measured("scaled-dot-product attention", "double backward, math attention")
def _sdpa() -> Setting:
    return Setting(Attention(), MSE, sequences())


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.need_weights = False

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@measured("multi-head attention", "double backward, math attention")
def _multi_head() -> Setting:
    return Setting(SelfAttention(), MSE, sequences())


@measured("transformer encoder layer", "double backward, math attention")
def _encoder() -> Setting:
    layer = nn.TransformerEncoderLayer(4, 2, 2, dropout=0.1, batch_first=True, activation="gelu")
    return Setting(layer, MSE, sequences())
