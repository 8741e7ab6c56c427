"""The benchmark of L-BFGS, small: that it runs, and that it counts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console

import stableopt
from benchmarks.perf.lbfgs import Config, host_waits, run


def test_it_runs_and_skips_what_is_too_large(tmp_path: Path) -> None:
    """Catches an outdated import, key or unit after a change of the library."""
    config = Config(
        out=tmp_path / "new",
        sizes=(50, 1000),
        histories=(3,),
        rounds=1,
        iterations=1,
        memory_limit=1e-5,
        n=50,
        target_loss=0.05,
    )
    output = io.StringIO()
    results = run(config, Console(file=output, width=100))
    assert "skipped 1,000 parameters with 3 pairs" in output.getvalue()
    (row,) = results["iterations"]
    assert row["size"] == 50
    assert row["methods"].keys() == {"torch", "two_loop", "compact"}
    # One for the closure's loss and the gradient, one for the direction; torch asks 2 a pair.
    assert row["methods"]["compact"]["host_waits"] == 2
    assert row["methods"]["torch"]["host_waits"] > 6
    assert [entry["reached"] for entry in results["time_to_loss"]] == [True] * 3
    assert json.loads((config.out / "perf-lbfgs.json").read_text())["rows"] == results


def test_compact_search_waits_twice_an_iteration_and_once_a_trial() -> None:
    """Catches an extra wait for a number; an innocent comparison of tensors is enough for one."""
    x = torch.nn.Parameter(torch.linspace(-1, 2, 50))
    optimizer = stableopt.LBFGS([x], line_search_fn="strong_wolfe", max_iter=8)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        point = x.detach()
        x.grad = 4 * point**3 - point
        return (point**4 - point**2 / 2).sum()

    optimizer.step(closure)
    first = calls
    with host_waits() as count:
        optimizer.step(closure)
    iterations = optimizer.state_dict()["state"][0]["n_iter"] - 8
    assert iterations > 2
    assert count["waits"] <= 2 * iterations + calls - first


def test_waits_are_counted() -> None:
    """Catches reads of a number that are not counted, and other operations that are."""
    vector = torch.ones(3)
    with host_waits() as count:
        vector.add_(1).sum()
        assert count["waits"] == 0
        vector.sum().item()
        vector.tolist()
        float(vector[0])
        bool(vector[0] > 0)
        vector.add_(vector, alpha=vector[0])
    assert count["waits"] == 5
