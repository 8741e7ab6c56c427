"""Parts that time training, ensembles, CUDA graphs and ``perf``, and that reproduce Table 2."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.experiments import experiment as experiment_class
from benchmarks.framework.publish import claims_in, publish
from benchmarks.framework.settings import configured
from benchmarks.gpu.setting import CannotRunError, PartResult, Setting
from benchmarks.perf import along_step, eigenvalues, ensemble, lbfgs, products, tracking
from benchmarks.perf.timing import interleaved
from benchmarks.runner import Place, Store, run_all
from benchmarks.training.data import Dataset
from benchmarks.training.ensemble import Stack
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.minimum import Solution
from benchmarks.training.networks import WIDTHS, fully_connected
from stableopt.curvature import Hessian, Problem

__all__ = [
    *("all_products", "ensembles", "graphs", "iterations_of_lbfgs", "largest_eigenvalues"),
    *("losses_along_step", "table_2", "table_2_small_rates", "tracked"),
]


def _perf(setting: Setting, module: Any, miniature: str, full: str = "") -> Any:
    """Run a part of ``perf`` with settings ``KEY=VALUE …``; return its rows."""
    given = {"data": setting.data, "data_dir": setting.data_dir, "device": setting.device}
    texts = (miniature if setting.miniature else full).split()
    config = configured(module.Config(**given, out=setting.out), texts)
    return module.run(config, Console(width=100))


def ensembles(setting: Setting) -> PartResult:
    """Several training runs as one, against one after the other."""
    rows = _perf(
        setting, ensemble, "repeats=1 n=20 members=2 steps=2", "repeats=3 members=16 steps=200"
    )
    gains = (
        f"batch {row['batch_size']:,}: {row['one_by_one'] / row['as_one']:.1f}" for row in rows
    )
    return PartResult(
        f"{rows[0]['members']} trainings as one, times as fast: {', '.join(gains)}", rows
    )


def graphs(setting: Setting) -> PartResult:
    """A step of an ensemble and a product with the Hessian, alone and as CUDA graphs."""
    if not setting.device.startswith("cuda"):
        raise CannotRunError(f"device {setting.device} has no CUDA graphs")
    images = setting.images()
    data = Dataset(setting.data, len(images.x))
    stack = Stack([Solution(data, lr=0.1, seed=k) for k in range(8)], images, setting.device)

    def step() -> None:
        stack._step(stack._gradients(stack._loss(images.x, images.y, shared=True)))

    model = fully_connected(WIDTHS[setting.data], seed=0).to(setting.device)
    hessian = Hessian(Problem(model, mean_squared_error, images.samples))
    vector = torch.randn(hessian.shape[0], device=setting.device)
    rows: list[dict[str, Any]] = []
    functions: dict[str, Callable[[], Any]] = {
        "step of 8 trainings": step,
        "product": lambda: hessian @ vector,
    }
    for name, function in functions.items():
        try:
            graph, result = _captured(function)
            timings = interleaved(
                {"eager": function, "graph": graph.replay}, repeats=50, device=setting.device
            )
            row = {key: timing.median for key, timing in timings.items()}
            if isinstance(result, Tensor):
                expected = function()
                row["difference"] = float((result - expected).norm() / expected.norm())
            rows.append({"work": name, **row})
        except RuntimeError as error:
            rows.append({"work": name, "error": str(error).splitlines()[0]})
            break  # a failed capture can leave CUDA unusable
    return PartResult("as a graph, " + "; ".join(map(_graph_headline, rows)), rows)


def _graph_headline(row: dict[str, Any]) -> str:
    if "graph" not in row:
        return f"{row['work']}: not captured, {row['error']}"
    return f"{row['work']}: {row['eager'] / row['graph']:.2f} times as fast"


def _captured(function: Callable[[], Any]) -> tuple[Any, Any]:
    """Return a CUDA graph of ``function``, and the tensor that replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm-up on a side stream, as torch.cuda.graph requires
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def table_2(setting: Setting) -> PartResult:
    """Table 2 of the paper as one ensemble: gradient descent's minima lie just below 2/η."""
    rates = "0.5,1,5" if setting.data == "fashion-mnist" else "0.5,1,2"
    return _table_2(setting, rates, seeds="0,1,2,3,4")


def table_2_small_rates(setting: Setting) -> PartResult:
    """Table 2 at the learning rates that take the most steps."""
    return _table_2(setting, "0.1,0.2", seeds="0,1")


def _table_2(setting: Setting, rates: str, seeds: str) -> PartResult:
    settings = [f"lrs={rates}", f"seeds={seeds}"]
    if setting.miniature:
        settings = ["lrs=0.5,1", "seeds=0", "n=30", "target_loss=0.085"]
    preset = experiment_class("gd-sharpness").preset("small", setting.data)
    experiment, store = configured(preset, settings), Store(setting.out)
    jobs = experiment.jobs()
    place = Place(setting.device, setting.data_dir, None)
    summary = run_all(jobs, store, place, members=len(jobs), retry=True)
    for job in summary.failed:
        print((store.failure(job) or {}).get("error"))
    tables = experiment.tables(store)
    if "sharpness" not in tables:
        raise RuntimeError(str((store.failure(jobs[0]) or {}).get("error")))
    files = publish(experiment, "small", store, setting.out)
    rows: list[dict[str, Any]] = tables["sharpness"].to_dict("records")
    mean_ratio = mean(row["sharpness"] / row["limit"] for row in rows if row["sharpness"])
    claims = claims_in(files[-1].parent)
    reproduced = sum(claim.reproduced for claim in claims)
    seconds = sum(store.about(job)["seconds"] for job in jobs if store.done(job))
    return PartResult(
        f"{len(rows)} of {len(jobs)} minima as one in {seconds:.0f} s, sharpness {mean_ratio:.3f} of 2/η"
        f" on average, {reproduced} of {len(claims)} lines of the table hold",
        rows,
    )


def tracked(setting: Setting) -> PartResult:
    """The cost of tracking the sharpness."""
    rows = _perf(
        setting,
        tracking,
        "n=20 every=2 max_overhead=0.5 segments=2 segment_steps=4 warm_up=1",
        "lr=0.5 segments=5",
    )
    return PartResult(
        ", ".join(
            f"{row['tracking']}: {100 * row['overhead']:.0f} % of the training" for row in rows
        ),
        rows,
    )


def largest_eigenvalues(setting: Setting) -> PartResult:
    """The largest eigenvalue, by this library and the installed peers."""
    rows = _perf(
        setting,
        eigenvalues,
        "n=20 repeats=1 target_loss=0.09",
        "lr=1 target_loss=1e-3 repeats=3 power=false",
    )
    return PartResult(
        ", ".join(f"{row['matrix']} {row['way']} {row['seconds']:.3g} s" for row in rows), rows
    )


def all_products(setting: Setting) -> PartResult:
    """Products with the covariance of per-sample Hessians, in gradients."""
    rows = _perf(setting, products, "repeats=1 sizes=2", "repeats=3 sizes=1000")
    return PartResult(
        ", ".join(f"{row['network']} {row['structured'] / row['gradient']:.1f}" for row in rows),
        rows,
    )


def losses_along_step(setting: Setting) -> PartResult:
    """The cost of margins along the step."""
    rows = _perf(setting, along_step, "n=10 repeats=1 segments=1 segment_steps=2")
    return PartResult(
        ", ".join(f"{row['quantities']}: {row['training_steps']:.2f} steps" for row in rows), rows
    )


def iterations_of_lbfgs(setting: Setting) -> PartResult:
    """Iterations of L-BFGS, compact and by two loops, against torch's."""
    results = _perf(
        setting,
        lbfgs,
        "n=20 sizes=50 histories=3 rounds=1 iterations=1 target_loss=0.09",
        "sizes=1000000,10000000 histories=10,100 memory_limit=16",
    )
    rows = results["iterations"]
    gains = (
        f"{row['size']:,} parameters, {row['history']} pairs: {_gain(row['methods']):.1f}"
        for row in rows
    )
    return PartResult(f"compact, times as fast as torch's: {'; '.join(gains)}", rows)


def _gain(methods: dict[str, Any]) -> float:
    gain: float = methods["torch"]["iteration_ms"] / methods["compact"]["iteration_ms"]
    return gain
