"""Every Python block of README and docs runs, and so do both sides of the README's diff.

``test_docs_commands.py`` tests the commands.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import stableopt
from stableopt.__main__ import main as stableopt_cli
from stableopt.stability import QUANTITIES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Frameworks warn about each other's deprecations, and give advice.
FRAMEWORKS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def registry() -> Iterator[None]:
    """Remove what a page registers."""
    with mock.patch.dict(QUANTITIES):
        yield


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=FRAMEWORKS if page.stem in ("diagnosing", "frameworks") else [],
        )
        for page in PAGES
    ],
)
def test_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches an outdated example, and a number or a quoted word in the comment after a ``print`` that
    differs from what is printed. The blocks of a page share one namespace.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page, "python"):
        printed: dict[int, str] = {}

        def show(*what: object, printed: dict[int, str] = printed, **options: object) -> None:
            printed[sys._getframe(1).f_lineno] = " ".join(map(str, what))

        namespace["print"] = show
        exec(compile(block, str(page), "exec"), namespace)
        for number, line in enumerate(block.splitlines(), start=1):
            said = re.fullmatch(r"print\(.*\)  # ([\d., ]+)", line)
            if said:
                shown = re.findall(r"[\d.]+\d", printed[number])
                expected = re.findall(r"[\d.]+\d", said[1])
                # To the digits that the page shows, with one unit of the last.
                for one, other in zip(expected, shown, strict=True):
                    unit = 10.0 ** -len(one.partition(".")[2])
                    assert float(other) == pytest.approx(float(one), abs=unit), line
            worded = re.fullmatch(r'print\(.*\)  # "(.+)"', line)
            if worded:
                assert printed[number] == worded[1], line


@pytest.mark.parametrize("which", [0, 1], ids=["SGD", "AdamW"])
def test_the_swap_is_a_swap(which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a diff in the README with a side that does not run, or with more than twelve lines, and
    one whose folder has nothing to report.
    """
    diffs = blocks(ROOT / "README.md", "diff")
    assert len(diffs) == 2
    lines = diffs[which].splitlines()
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
            "probe": (x, y),
            "stableopt": stableopt,
            "loader": list(zip(x.split(8), y.split(8), strict=True)) * 10,
        }
        code = "\n".join(line[1:] for line in lines if line[:1] in (" ", side))
        exec(compile(code, "README.md", "exec"), namespace)
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)
    assert namespace.get("monitor", namespace["opt"]).margins.step == 50
    assert stableopt_cli(["report", "runs"]) == 0


def test_pages_link_to_files_that_exist() -> None:
    """Catches a picture or a page that was moved."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_figures_need_no_display() -> None:
    """Catches pyplot, which would choose a backend for the user."""
    assert not any(
        "pyplot" in line
        for path in (ROOT / "stableopt").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("import ", "from "))
    )


def test_reference_lists_every_public_name() -> None:
    """Catches an exported name missing in the reference, and a listed name that is not exported."""
    listed: dict[str, set[str]] = {}
    package = ""
    for block in blocks(ROOT / "docs" / "api.md", "{eval-rst}"):
        module = re.search(r"currentmodule:: (\S+)", block)
        package = module[1] if module else package
        names = re.findall(r"^(?:   |\.\. data:: )(\w+)$", block, re.MULTILINE)
        listed.setdefault(package, set()).update(names)
    assert "stableopt.curvature" in listed
    top = set(stableopt.__all__)
    for package, names in listed.items():
        module = importlib.import_module(package)
        own = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
        expected = own - {"__version__"} - (top if package != "stableopt" else set())
        assert names == expected, package


def test_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    """Catches a link check that misses a broken link, or reports a good one."""
    (tmp_path / "other.html").write_text('<p id="there"></p>')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#there"></a><a href="other.html#gone"></a><a href="#gone"></a>'
        '<img src="gone.png"><a href="https://x.org"></a><script src="https://x.org/a.js"></script>'
    )
    specification = importlib.util.spec_from_file_location(
        "site_extension", ROOT / "docs" / "site_extension.py"
    )
    site_extension = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(site_extension)
    assert site_extension.broken_links(tmp_path) == [
        "page.html: #gone",
        "page.html: gone.png",
        "page.html: https://x.org/a.js",
        "page.html: other.html#gone",
    ]


def test_the_table_of_quantities_is_complete() -> None:
    """Catches a quantity that is registered and in no table, or that lost its name."""
    page = (ROOT / "docs" / "reading-margins.md").read_text()
    table = page.partition("## All quantities")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(QUANTITIES)
    for documented in (stableopt.measure, stableopt.StabilityMonitor):
        assert "docs/reading-margins.md" in str(documented.__doc__)
    assert "StabilityMonitor" in str(stableopt.SGD.track.__doc__)
