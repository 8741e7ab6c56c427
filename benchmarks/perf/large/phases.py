"""Time and peak memory of the phases of one process, of this library or of another."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import stableopt
from benchmarks.perf import timing
from stableopt.curvature import Problem

__all__ = ["Config", "ours", "theirs"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Config(timing.Config):
    """What is measured.

    Attributes:
        layers: transformer layers. The default network is GPT-2 small.
        width: width of the embedding.
        heads: attention heads per layer.
        vocabulary: size of the vocabulary.
        samples: sequences in the probe set, and in a training step.
        tokens: tokens per sequence.
        steps: tracked training steps.
    """

    device: str = "cpu"
    tol: float = 0.03
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_257
    samples: int = 4
    tokens: int = 64
    steps: int = 30


class _Phases:
    """Records time and peak memory of named phases as rows of a table."""

    def __init__(self, parameters: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._parameters = parameters

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure time and peak memory of the block, which may add to the row."""
        row: dict[str, Any] = {"phase": name, "parameters": self._parameters}
        row |= dict.fromkeys(("products", "value", "residual"), float("nan"))
        _reset_peak()
        start, cpu_start = time.perf_counter(), time.process_time()
        yield row
        row["seconds"] = time.perf_counter() - start
        row["cpu_seconds"] = time.process_time() - cpu_start
        row["peak_gib"] = _peak_gib()
        self.rows.append(row)


def _peak_gib() -> float:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peaks = [float(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else float("nan")


def _reset_peak() -> None:
    if _RESET.exists():
        _RESET.write_text("5")


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _prepared(
    config: Config,
) -> tuple[nn.Module, dict[str, Tensor], torch.optim.Optimizer, Callable[[], None]]:
    """Return a model, a batch, AdamW with initialised state, and a function that takes a step."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(config.seed)
    shape = transformers.GPT2Config(
        vocab_size=config.vocabulary,
        n_layer=config.layers,
        n_embd=config.width,
        n_head=config.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(shape)
    ids = torch.randint(config.vocabulary, (config.samples, config.tokens))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model, batch).backward()
        optimizer.step()

    step()  # initialises the optimizer's state
    optimizer.zero_grad()
    return model, batch, optimizer, step


def ours(config: Config) -> list[dict[str, Any]]:
    """Return the rows of this library."""
    model, batch, optimizer, step = _prepared(config)
    phases = _Phases(sum(p.numel() for p in model.parameters()))
    with phases.phase("training step"):
        step()
    optimizer.zero_grad()
    with phases.phase("making the Problem"):
        problem = Problem.from_batch_loss(model, _loss, batch)
    with phases.phase("sharpness") as row:
        margins = stableopt.measure(problem, tol=config.tol)
        search = margins["sharpness"].measurement
        assert search is not None
        row |= {"products": search.products, "value": search.value, "residual": search.residual}
    with phases.phase("critical sharpness") as row:
        critical = stableopt.critical_sharpness(problem, optimizer=optimizer)
        row |= {"value": critical.value, "passes": critical.passes}
    monitor = stableopt.StabilityMonitor(
        optimizer, problem, every=1, batch_size=config.samples, quantities=("realised_edge",)
    )
    with monitor, phases.phase("a step and its edge") as row:
        step()
        row["value"] = monitor.history[-1]["realised_edge"].value
    within, half = {"max_overhead": config.max_overhead}, {"every": config.steps // 2}
    for quantity, when in (("sharpness", within), ("realised_edge", within), ("sharpness", half)):
        monitor = stableopt.StabilityMonitor(
            optimizer, problem, batch_size=config.samples, quantities=(quantity,), **when
        )
        [(schedule, number)] = when.items()
        name = f"{config.steps} steps, {quantity}, {schedule}={number}"
        with monitor, phases.phase(name) as row:
            for _ in range(config.steps):
                step()
            row |= _tracked(monitor, quantity)
    return phases.rows


def _tracked(monitor: stableopt.StabilityMonitor, quantity: str) -> dict[str, Any]:
    """Return a monitor's cost, and the last value of ``quantity``."""
    searches = ("sharpness", "preconditioned_sharpness")
    products = [
        m.products
        for margins in monitor.history
        for name, m in margins.measurements.items()
        if name in searches
    ]
    row = {"measurements": len(monitor.history), "overhead": monitor.overhead}
    row |= {"products": sum(products)} if products else {}
    if monitor.history:
        last = monitor.history[-1][quantity]
        row["value"] = last.value
        if last.measurement is not None:
            row["residual"] = last.measurement.residual
    return row


def theirs(config: Config, products: int) -> list[dict[str, Any]]:
    """Return the row of hessian-eigenthings' Lanczos, with the same number of products."""
    from hessian_eigenthings import HessianOperator, lanczos

    model, batch, optimizer, step = _prepared(config)
    step()  # the weights at which ours is measured
    optimizer.zero_grad()
    phases = _Phases(sum(p.numel() for p in model.parameters()))
    operator = HessianOperator(model.eval(), [batch], _loss)
    with phases.phase("hessian-eigenthings") as row, sdpa_kernel(SDPBackend.MATH):
        result = lanczos(
            operator, k=1, max_iter=products, tol=config.tol, which="LA", seed=config.seed
        )
        value = float(result.eigenvalues[0])
        residual = float(torch.as_tensor(result.residuals).reshape(-1)[0]) / abs(value)
        row |= {"products": products, "value": value, "residual": residual}
    return phases.rows


if __name__ == "__main__":
    options, *others = json.loads(sys.argv[2])
    options["sizes"] = tuple(options["sizes"])
    chosen = {"ours": ours, "theirs": theirs}[sys.argv[1]]
    print(json.dumps(chosen(Config(**options), *others)))  # type: ignore[operator]
