"""`self_attention`: torch's multi-head attention as linear maps and a softmax between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.layers.recorder import Recorder

__all__ = ["self_attention"]


def self_attention(
    linear: Callable[[Recorder, Tensor, Tensor, Tensor | None], Any],
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    **others: Any,
) -> Any:
    """Record ``F.multi_head_attention_forward`` of one sequence ``(T, n, E)`` with itself.

    ``linear`` records a linear map. Return ``NotImplemented`` for less common arguments.
    """
    plain = bias_k is None and bias_v is None and not add_zero_attn and in_proj_weight is not None
    has_dropout = training and dropout_p > 0
    separate = use_separate_proj_weight or any(t is not None for t in others.values())
    same_sequence = query is key and key is value and query.dim() == 3
    supported = plain and same_sequence and not has_dropout and not separate
    if not supported or query.shape[1] != recorder.size:
        return NotImplemented
    assert in_proj_weight is not None
    rows = query.transpose(0, 1)
    projected = linear(recorder, rows, in_proj_weight, in_proj_bias)
    if projected is NotImplemented:
        return NotImplemented
    n, length, features = rows.shape
    heads = projected.view(n, length, 3, num_heads, features // num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)
    scores = q @ k.mT * (features // num_heads) ** -0.5
    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(n, num_heads, length, length)
        scores = scores + _additive_mask(attn_mask, scores)
    if key_padding_mask is not None:
        scores = scores + _additive_mask(key_padding_mask.view(n, 1, 1, length), scores)
    weights = torch.softmax(scores, dim=-1)
    attended = (weights @ v).transpose(1, 2).reshape(n, length, features)
    output = linear(recorder, attended, out_proj_weight, out_proj_bias)
    if output is NotImplemented:
        return NotImplemented
    if not need_weights:
        return output.transpose(0, 1), None
    return output.transpose(0, 1), weights.mean(1) if average_attn_weights else weights


def _additive_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """Return the term that a mask adds to the scores: minus infinity where a boolean mask is true."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))
