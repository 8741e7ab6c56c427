"""Blocks that users name: by module, parameter, pattern or mapping."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from stableopt.stability.layers.blocks import blocks_of


class Layered(nn.Module):
    """Two layers with a norm, a tied head, a frozen bias and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.embed = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}) for _ in range(2)
        )
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.head.bias.requires_grad_(False)


MODEL = Layered()
NAMES, PARAMS = zip(*((n, p) for n, p in MODEL.named_parameters() if p.requires_grad), strict=True)


def names_in(blocks: Any) -> dict[str, list[str]]:
    chosen = blocks_of(MODEL, NAMES, PARAMS, blocks)
    return {block.name: [NAMES[index] for index in block.indices] for block in chosen}


def test_layers_are_the_modules_that_hold_parameters() -> None:
    """Catches a container as a layer, a frozen parameter, and a tied one in two layers."""
    layers = names_in(None)
    assert list(layers) == [
        "scale",
        "embed",
        *(f"blocks.{i}.{m}" for i in "01" for m in ("fc", "norm")),
    ]
    assert layers["blocks.1.norm"] == ["blocks.1.norm.weight", "blocks.1.norm.bias"]
    assert [name for names in layers.values() for name in names] == list(NAMES)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("*", ["scale", "embed", "blocks"]),  # the head is the embedding
        ("blocks.*.norm.weight", ["blocks.0.norm.weight", "blocks.1.norm.weight"]),
        (re.compile(r".*\.fc"), ["blocks.0.fc", "blocks.1.fc"]),
        ("head", ["head"]),
        ("head.weight", ["head.weight"]),
        (MODEL.blocks[1], ["blocks.1"]),
        (MODEL.scale, ["scale"]),
        ((part for part in ("blocks.1", MODEL.embed)), ["embed", "blocks.1"]),
        (MODEL, ["Layered"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_names_blocks(blocks: Any, expected: list[str]) -> None:
    """Catches a star that crosses levels, a tied name that is not found, and a wrong order."""
    assert list(names_in(blocks)) == expected


def test_a_mapping_gives_names_and_unions() -> None:
    """Catches a named pattern split into one block a match, and blocks in another order."""
    blocks = names_in({"norms": "blocks.*.norm", "first": [MODEL.blocks[0]["fc"], MODEL.scale]})
    assert list(blocks) == ["norms", "first"]
    assert blocks["norms"] == [n for n in NAMES if "norm" in n]
    assert blocks["first"] == ["scale", "blocks.0.fc.weight", "blocks.0.fc.bias"]
    assert names_in({"tied": "head"}) == {"tied": ["embed.weight"]}


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ("block.*", ValueError, r"'block\.\*' matches no module.*'blocks\.0'"),
        ("head.bias", ValueError, "head.bias"),
        (MODEL.head.bias, ValueError, r"shape \(5,\)"),
        (nn.Linear(1, 1), ValueError, "'Linear' holds no parameter"),
        ([], ValueError, "empty"),
        ({}, ValueError, "empty"),
        ({"a": []}, ValueError, "empty"),
        (3, TypeError, "3"),
        ([None], TypeError, "None"),
        ({1: "head"}, TypeError, "name 1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Parameter) else str(value),
)
def test_clumsy_users_learn_what_is_wrong(
    blocks: Any, error: type[Exception], message: str
) -> None:
    """Catches a misspelt name that silently measures nothing."""
    with pytest.raises(error, match=message):
        blocks_of(MODEL, NAMES, PARAMS, blocks)


def test_what_is_gone_is_left_out_where_that_is_no_error() -> None:
    """Catches a running measurement that ends because a named layer froze."""
    blocks = blocks_of(MODEL, NAMES, PARAMS, ["head.bias", "embed"], strict=False)
    assert [block.name for block in blocks] == ["embed"]
    assert blocks_of(MODEL, NAMES, PARAMS, "head.bias", strict=False) == blocks_of(
        MODEL, NAMES, PARAMS
    )
