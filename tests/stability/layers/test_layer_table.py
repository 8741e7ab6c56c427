"""The table of layers: columns, rows, text, and checkpoints."""

from __future__ import annotations

import math

import pytest

from stableopt import StabilityMargins
from stableopt.stability import Layers, QuantityResult

NAMES = (
    "embed",
    *(f"transformer.h.{i}.{m}.projection" for i in range(75) for m in ("attn", "mlp")),
)
SHARES = tuple(1 / len(NAMES) for _ in NAMES)
MANY = Layers(
    NAMES,
    (10,) * len(NAMES),
    {
        "share": SHARES,
        "sharpness": tuple(float(k) for k in range(len(NAMES))),
        "limit": (20.0,) * len(NAMES),
        "mean_curvature": (1.0,) * len(NAMES),
        "mean_curvature_error": (0.3,) * len(NAMES),
        "non_uniformity": (None, *(1e-4,) * (len(NAMES) - 1)),
    },
)


def test_the_text_fits_a_terminal() -> None:
    """Catches lines above 80 columns, and names that only differ where they are cut."""
    lines = str(MANY).splitlines()
    assert len(lines) == len(NAMES) + 2
    assert lines[-1] == "limit of the sharpness: 20"
    assert max(map(len, lines)) <= 80
    assert "–" in lines[1]
    assert len({line.split()[0] for line in lines[1:-1]}) == len(NAMES)
    short = MANY.to_text(3).splitlines()
    assert short[1].split()[0].endswith("mlp.projection")
    assert short[-2] == f"… and {len(NAMES) - 3} more"


def test_one_kind_of_layer_is_one_row() -> None:
    """Catches a mean of shares, a sum of ratios, and errors added as if they were dependent."""
    kinds = MANY.by_kind()
    assert kinds.names == (
        "embed",
        "transformer.h.*.attn.projection",
        "transformer.h.*.mlp.projection",
    )
    assert kinds["embed"].share == SHARES[0]
    attention = kinds["transformer.h.*.attn.projection"]
    assert attention.share == pytest.approx(75 * SHARES[0])
    assert attention.sharpness == 149.0
    assert attention.ratio == 149 / 20
    assert attention.parameters == 750
    assert attention.mean_curvature == pytest.approx(1.0)
    assert attention.mean_curvature_error == pytest.approx(0.3 / math.sqrt(75))


def test_ratios_and_the_largest() -> None:
    """Catches a division by a limit of zero, and rows ordered by another column than requested."""
    layers = Layers(("a", "b"), (1, 1), {"sharpness": (2.0, 1.0), "limit": (8.0, 0.0)})
    assert layers.column("ratio") == (0.25, math.inf)
    assert [layer.name for layer in layers.largest(2)] == ["b", "a"]
    assert layers.largest(1, "sharpness")[0].name == "a"
    assert layers.largest(1, "share") == []


def test_wrong_names_are_refused() -> None:
    """Catches a misspelt column that reads as not measured."""
    with pytest.raises(ValueError, match="'sharpnes'"):
        MANY.column("sharpnes")
    with pytest.raises(KeyError, match="embed"):
        MANY["embedding"]
    with pytest.raises(ValueError, match=r"'share' has 1 values: expected 2"):
        Layers(("a", "b"), (1, 1), {"share": (1.0,)})


def test_margins_carry_layers_through_checkpoints() -> None:
    """Catches layers lost between ``to_dict`` and ``from_dict``, and the shares before the table."""
    shares = Layers(("a",), (1,), {"share": (1.0,)}, rest=0.0)
    margins = StabilityMargins(
        results={
            "sharpness": QuantityResult(1.0, layers=shares),
            "layers": QuantityResult(2.0, layers=MANY),
        }
    )
    assert margins.layers is MANY
    assert margins["sharpness"].layers is shares
    assert StabilityMargins.from_dict(margins.to_dict()) == margins
    assert StabilityMargins().layers is None
    hash(margins["layers"])
