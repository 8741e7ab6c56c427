"""The speed comparisons run and write the right columns; their times are not tested."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import benchmarks.__main__ as cli
from benchmarks.perf import (
    along_step,
    eigenvalues,
    ensemble,
    growth,
    imports,
    large,
    models,
    products,
    spectrum,
    timing,
    tracking,
)
from benchmarks.perf.large import phases
from benchmarks.training.networks import TransformerBlock, small_gpt, small_vgg
from stableopt.curvature import NonUniformity, Problem


class Pixels(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 10), nn.Tanh())


def quiet() -> Console:
    return Console(file=io.StringIO())


def config(out: Path, **options) -> timing.Config:
    return timing.Config(out=out, device="cpu", repeats=1, **options)


def rows_of(path: Path) -> list[dict]:
    written = json.loads(path.read_text())
    assert written["machine"]["torch"] == str(torch.__version__)
    return written["rows"]


def test_products_of_all_ways_agree(tmp_path: Path) -> None:
    """Catches two ways that are timed on different things, and one that scales by the wrong n."""
    rows = products.run(config(tmp_path, sizes=(3,)), quiet())
    assert [row["network"] for row in rows] == ["FNN", "VGG", "transformer"]
    assert [row["d"] for row in rows][:2] == [898_510, 71_410]
    # A product in single precision in which rounding may flip a ReLU.
    assert all(row["difference"] < 0.01 for row in rows)
    assert rows_of(tmp_path / "perf-products.json") == rows
    assert (tmp_path / "perf-products.png").exists()


def test_models_are_timed_by_their_own_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ways timed on different samples, and a missing package that stops all models."""
    tiny = models.Case(lambda: models._Classifier(Pixels()), models._images(2), 3, None)
    other = models.Case(Pixels, models._images(2), package="no_such_package")
    monkeypatch.setattr(models, "CASES", {"tiny": tiny, "other": other})
    rows = models.run(config(tmp_path), quiet())
    assert [(row["model"], row["method"], row["d"]) for row in rows] == [
        ("tiny", "structured", 130)
    ]
    # Single precision, a hundred roundings of 6e-8.
    assert rows[0]["difference"] < 1e-5
    assert rows_of(tmp_path / "perf-models.json") == rows


def test_eigenvalues_end_to_end(tmp_path: Path) -> None:
    """Catches a value compared with the eigenvalue of another matrix, and a wrong residual."""
    asked = eigenvalues.Config(
        out=tmp_path, device="cpu", repeats=1, n=60, target_loss=0.05, lr=0.5
    )
    rows = eigenvalues.run(asked, quiet())
    ours = [row for row in rows if row["way"].startswith("stableopt")]
    assert [row["matrix"] for row in ours] == ["H", "H", "Σ", "Σ"]
    for row in ours:
        assert row["residual"] <= (1e-3 if row["matrix"] == "H" else 2e-3)
        # Of second order in the residual, where the gap is not much below the value itself.
        assert abs(row["error"]) < 1e-3
    assert rows_of(tmp_path / "perf-eigenvalues.json") == rows


def test_eigenvalues_of_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the fully connected network's loss or data in use, and its results overwritten."""
    small = partial(small_gpt, width=16, layers=1)
    monkeypatch.setattr(eigenvalues, "small_gpt", small)
    monkeypatch.setattr(eigenvalues, "PEERS", {"broken": lambda *_: 1 / 0})
    options = {"out": tmp_path, "device": "cpu", "repeats": 1, "n": 2, "lr": 0.3}
    asked = eigenvalues.Config(network="gpt", steps=2, matrices=("H",), **options)
    console = Console(file=io.StringIO())
    rows = eigenvalues.run(asked, console)
    assert "broken: left out, division by zero" in console.file.getvalue()
    assert [row["way"] for row in rows] == ["stableopt, cold", "stableopt, warm"]
    assert all(row["residual"] <= 1e-3 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["perf-eigenvalues-gpt.json"]


def test_tracking_end_to_end(tmp_path: Path) -> None:
    """Catches an accounting that loses measurements."""
    options = {"every": 5, "max_overhead": 0.5, "segments": 3, "segment_steps": 20, "warm_up": 5}
    every, share = tracking.run(config(tmp_path, n=100, lr=0.5, **options), quiet())
    assert every["measurements"] == 12
    assert share["measurements"] >= 1
    assert every["median_products"] >= 1
    assert rows_of(tmp_path / "perf-tracking.json") == [every, share]


def test_along_step_end_to_end(tmp_path: Path) -> None:
    """Catches a search that is not counted, and a plain run that is measured."""
    rows = along_step.run(config(tmp_path, n=10, segments=1, segment_steps=2), quiet())
    assert rows[0]["quantities"] == "plain"
    assert rows[0]["training_steps"] == 0
    assert rows[2]["passes"] >= 2
    assert math.isnan(rows[0]["passes"])
    assert math.isnan(rows[1]["passes"])


def test_growth_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a series that varies a quantity other than its name says."""
    monkeypatch.setattr(growth, "SERIES", {"n": [(8, 4, 2), (16, 4, 2)], "d": [(8, 4, 2)]})
    rows = growth.run(config(tmp_path), quiet())
    assert [(row["series"], row["n"]) for row in rows] == [("n", 8), ("n", 16), ("d", 8)]
    assert rows_of(tmp_path / "perf-growth.json") == rows


def test_large_model_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a phase that is lost, and one that measures at another point than the next."""
    pytest.importorskip("transformers")
    ways = {"ours": phases.ours, "theirs": lambda *_: []}
    monkeypatch.setattr(large, "_in_process", lambda way, *given: ways[way](*given))
    small = {"layers": 1, "width": 8, "heads": 2, "vocabulary": 20, "tokens": 4, "steps": 2}
    rows = large.run(large.Config(out=tmp_path, max_overhead=100.0, **small), quiet())
    assert len(rows) == 8
    assert all("measurements" in row for row in rows[5:])
    search = rows[2]
    assert search["products"] > 2
    assert search["residual"] <= 0.03
    assert [row["phase"] for row in rows_of(tmp_path / "perf-large.json")][2] == "sharpness"


def test_command_line_takes_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a part that is dropped, and an unknown one that is silently ignored."""
    monkeypatch.setattr(growth, "SERIES", {"n": [(8, 4, 2)]})
    arguments = ["--set", "repeats=1", "--device", "cpu"]
    assert cli.main(["perf", "growth", "--out", str(tmp_path), *arguments]) == 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["perf-growth.json"]
    assert cli.main(["perf", "speed"]) == 2
    assert "speed: expected some of products" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "shape", "ways"),
    [
        (small_vgg(0), (3, 32, 32), {"convolution", "linear"}),
        (TransformerBlock(16), (3, 16), {"linear", "normalisation"}),
    ],
)
def test_the_networks_have_structure(model: nn.Module, shape: tuple, ways: set[str]) -> None:
    """Catches a network that silently takes the general path, which knows no structure."""
    outputs = model(torch.zeros(2, *shape)).shape[1]
    problem = Problem(model, nn.MSELoss(), (torch.rand(2, *shape), torch.rand(2, outputs)))
    assert set(NonUniformity(problem, method="structured").ways.values()) == ways


def test_ensembles_end_to_end(tmp_path: Path) -> None:
    """Catches two ways that take other steps than each other: then a time says nothing."""
    small = ensemble.Config(
        out=tmp_path, device="cpu", repeats=1, n=40, lr=0.2, members=3, steps=4, batch_size=16
    )
    rows = ensemble.run(small, quiet())
    assert [(row["batch_size"], row["steps"]) for row in rows] == [(40, 4), (16, 6)]
    # Ten steps of float32, summed in another order.
    assert all(row["difference"] < 1e-5 for row in rows)
    assert rows_of(tmp_path / "perf-ensemble.json") == rows


def test_imports_are_timed_in_fresh_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a module that is imported already, or a start of Python that counts as import."""
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(0.2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert all(0.2 <= imports.seconds_of("slow_module") < 60 for _ in range(2))


def test_imports_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ratio of the wrong way round, the first import counted, and modules not in turns."""
    seconds = {"torch": [9.0, 1.0, 4.0, 2.0], "stableopt": [9.0, 3.0, 5.0, 8.0]}
    imported: list[str] = []

    def seconds_of(module: str) -> float:
        imported.append(module)
        return seconds[module].pop(0)

    monkeypatch.setattr(imports, "seconds_of", seconds_of)
    torch_alone, ours = imports.run(config(tmp_path), quiet())
    assert imported == ["torch", "stableopt"] * 4
    assert (torch_alone["module"], torch_alone["of_torch"]) == ("torch", 1.0)
    assert (torch_alone["seconds"], ours["seconds"], ours["of_torch"]) == (2.0, 5.0, 2.5)
    assert ours["of_torch_in_turns"] == [3.0, 1.25, 4.0]
    assert rows_of(tmp_path / "perf-imports.json") == [torch_alone, ours]


def test_spectrum_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error relative to another reference, and a way that does not reach it."""
    monkeypatch.setattr(spectrum, "peers", lambda *_: iter(()))  # a minute, and not installed
    monkeypatch.setattr(spectrum, "COUNT", 2)
    monkeypatch.setattr(spectrum, "_REFERENCE", (1, 20))
    small = spectrum.Config(
        out=tmp_path, device="cpu", repeats=1, n=20, lr=0.2, target_loss=0.09, seeds=1
    )
    rows = spectrum.run(replace(small, trace_error=0.3, density_error=0.1), quiet())
    assert [row["task"] for row in rows] == ["top 2", "trace", "density"]
    assert all(row["way"] == "stableopt" and row["reached"] for row in rows)
    assert rows_of(tmp_path / "perf-spectrum.json") == rows
