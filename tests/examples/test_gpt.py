"""The GPT example: a few of its steps."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def example() -> Any:
    """Return the example's module."""
    spec = importlib.util.spec_from_file_location("gpt", ROOT / "examples" / "gpt.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_and_writes(tmp_path: Path) -> None:
    """Catches an example that the library has left behind, or margins that lack what it promises."""
    history = example().train(2, batch_size=2, context=8, every=2, logdir=str(tmp_path / "runs"))
    (margins,) = history
    assert margins.failure is None
    assert margins.method == "double backward, math attention"
    assert margins.preconditioned_sharpness_limit is not None
    # 38 / lr, lowered by AdamW's weight decay of 1e-2: a factor of 1 - lr * 1e-2 / 2.
    assert math.isclose(margins.preconditioned_sharpness_limit, 38 / 3e-3, rel_tol=1e-4)
    assert None not in (margins.sharpness, margins.preconditioned_sharpness)
    assert margins.batch_sharpness is not None
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("events*"))
    for tag in (b"stability/sharpness", b"stability/pre_sharp_ratio", b"stability/batch_sharpness"):
        assert tag in written
