"""Sketches: linear, and with about the norms and the distances of random and of constant vectors."""

from __future__ import annotations

import pytest
import torch

from stableopt.curvature.problem.derivatives import sketch as module
from stableopt.curvature.problem.derivatives.sketch import sketch


@pytest.mark.parametrize("size", [5_000, 70_000, 130_001])
@pytest.mark.parametrize("kind", ["constant", "random", "one", "alternating"])
def test_norms_of_many_blocks(size: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches signs that repeat: those of a constant vector then add up to any multiple of its norm."""
    monkeypatch.setattr(module, "_BLOCK", 8192)
    vector = {
        "constant": torch.ones(size),
        "random": torch.randn(size, generator=torch.Generator().manual_seed(1)),
        "one": torch.eye(1, size).flatten(),
        "alternating": 1.0 - 2 * (torch.arange(size) % 2),
    }[kind]
    # Five standard errors, 1/sqrt(2 * 1024) each.
    assert float(sketch([vector]).norm() / vector.norm()) == pytest.approx(1, abs=0.11)


def test_parts_and_linearity() -> None:
    """The same places have the same signs in each call."""
    parts = [torch.randn(3, 700), torch.randn(5000), torch.randn(10)]
    others = [torch.randn_like(part) for part in parts]
    combined = [2 * a - b for a, b in zip(parts, others, strict=True)]
    # Sums of some ten numbers in double precision, from parts in single precision.
    assert torch.allclose(sketch(combined), 2 * sketch(parts) - sketch(others), atol=1e-4)
    assert not sketch([]).any()
