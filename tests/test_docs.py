"""Every Python block of README and docs runs, as does what the README's diff makes of a loop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# What frameworks find deprecated in each other, and their advice.
FRAMEWORKS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=FRAMEWORKS if page.stem == "frameworks" else [])
        for page in PAGES
    ],
)
def test_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches an example that the code has left behind. Blocks of a page share their names."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_swap_is_a_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a diff in the README that does not run on either side, or is longer than it says."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    lines = diff.splitlines()
    assert len(lines) <= 12
    monkeypatch.chdir(tmp_path)
    results = []
    for side in ("-", "+"):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        x, y = torch.randn(64, 4), torch.randn(64, 2)
        namespace = {
            "torch": torch,
            "model": model,
            "loss_fn": nn.MSELoss(),
            "x": x,
            "y": y,
            "loader": list(zip(x.split(8), y.split(8), strict=True)) * 10,
        }
        code = "\n".join(line[1:] for line in lines if line[:1] in (" ", side))
        exec(compile(code, "README.md", "exec"), namespace)
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)
    assert namespace["opt"].margins.step == 50
    assert (tmp_path / "runs").exists()


def test_pages_link_to_files_that_exist() -> None:
    """Catches a picture or a page that was moved."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_figures_need_no_display() -> None:
    """Catches pyplot: a library that chooses a backend for its user."""
    assert not any(
        "pyplot" in line
        for path in (ROOT / "stableopt").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("import ", "from "))
    )
