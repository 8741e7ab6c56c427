"""The largest eigenvalue of the Hessian at a trained network: ours and other packages', and s.

All use the same parameters, data and, if they take one, tolerance: a residual of ``tol`` relative to
the eigenvalue, or twice that for Σ, since s is the square root of its eigenvalue. The reference is
Lanczos to a small residual. Residuals are computed afterwards with our operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

import stableopt
from benchmarks.framework.plotting import BLUE, panels
from benchmarks.perf import timing
from benchmarks.perf.eigenvalues.peers import PEERS
from benchmarks.perf.timing import interleaved, report
from benchmarks.training.data import Dataset
from benchmarks.training.loops import gd_until, mean_squared_error, train
from benchmarks.training.networks import WIDTHS, fully_connected, resnet18, small_gpt, small_vgg
from stableopt.curvature import Hessian, NonUniformity, Operator, Problem, top_eigenpair

__all__ = ["Config", "Network", "run", "trained"]

Network = Literal["fully-connected", "vgg", "resnet18", "gpt"]

_STEPS_BETWEEN = 50
"""Steps of gradient descent between the measurement that gives the warm start and this one."""

_TRUE = 1e-5
"""Residual of the reference value, whose error is of second order in it."""

_FEW_BETWEEN = 5
"""The same for the networks with millions of parameters, which train for fewer steps."""


@dataclass(frozen=True)
class Config(timing.Config):
    """What is timed.

    Attributes:
        network: ``"fully-connected"``, ``"vgg"`` or ``"resnet18"`` on the images of ``data``; or
            ``"gpt"`` on ``n`` sequences of 64 tokens from a Markov chain.
        steps: training steps of the last two; the others train to ``target_loss``.
        matrices: ``"H"``, the Hessian, and ``"Σ"``, which only this library has.
        power: whether to run hessian-eigenthings' power iteration too, with up to 200 products.
    """

    network: Network = "fully-connected"
    steps: int = 30
    matrices: tuple[str, ...] = ("H", "Σ")
    power: bool = True


@dataclass(frozen=True)
class _Row:
    """The result of a method, and its cost."""

    matrix: str
    way: str
    seconds: float
    products: int | None
    value: float
    truth: float
    residual: float

    @property
    def error(self) -> float:
        """The signed error relative to the reference."""
        return self.value / self.truth - 1


class Trained(NamedTuple):
    """A trained network, its copy some steps earlier, its loss and its data."""

    before: nn.Module
    model: nn.Module
    loss_fn: nn.Module
    data: tuple[Tensor, Tensor]


def trained(
    config: timing.Config, console: Console, network: Network = "fully-connected", steps: int = 30
) -> Trained:
    """Train by gradient descent to the target loss, or large networks for ``steps`` steps."""
    if network == "gpt":
        data, loss_fn = _chain(config), nn.CrossEntropyLoss()
        model: nn.Module = small_gpt(config.seed).to(config.device)
    else:
        images = Dataset(config.data, config.n).load(config.data_dir).to(config.device)
        data, loss_fn = images.samples, mean_squared_error
        classes = images.y.shape[1]
        if network == "fully-connected":
            model = fully_connected(WIDTHS[config.data], config.seed)
        else:
            model = (small_vgg if network == "vgg" else resnet18)(config.seed, classes)
        model.to(config.device)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    with console.status("training"):
        if network in ("fully-connected", "vgg"):
            gd_until(config.target_loss, model, images, optimizer, max_steps=200_000)
        else:
            train(model, optimizer, repeat(data), steps=steps, loss_fn=loss_fn)
        before = copy.deepcopy(model)
        later = _STEPS_BETWEEN if network in ("fully-connected", "vgg") else _FEW_BETWEEN
        train(model, optimizer, repeat(data), steps=later, loss_fn=loss_fn)
    return Trained(before, model, loss_fn, data)


def _chain(config: timing.Config, vocabulary: int = 64, context: int = 64) -> tuple[Tensor, Tensor]:
    """Return tokens ``(n, context)`` of a Markov chain, four successors each, and the next tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=generator)
    choices = torch.randint(4, (config.n, context + 1), generator=generator)
    tokens = [choices[:, 0]]
    for k in range(context):
        tokens.append(successors[tokens[-1], choices[:, k + 1]])
    text = torch.stack(tokens, dim=1).to(config.device)
    return text[:, :-1], text[:, 1:]


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every method, print and write the table; return its rows."""
    console = console or Console()
    start = trained(config, console, config.network, config.steps)
    problem, problem_before = (
        Problem(m, start.loss_fn, start.data) for m in (start.model, start.before)
    )
    with console.status("comparing"):
        rows = _compared(config, problem, problem_before, console)
    entries = [{**asdict(row), "error": row.error} for row in rows]
    t = pd.DataFrame(entries)
    columns = {key: t[key] for key in ("matrix", "way", "seconds", "products")}
    columns |= {"returned": t.value, "error": t.error, "residual": t.residual}
    title = (
        f"Largest eigenvalue to a residual of {config.tol:g}: {config.network},"
        f" d = {problem.num_params:,}, n = {config.n:,}"
    )
    is_default_network = config.network == "fully-connected"
    name = "eigenvalues" if is_default_network else f"eigenvalues-{config.network}"
    report(config, console, name, title, columns, entries)
    if is_default_network:
        _draw(rows, config, config.out / "perf-eigenvalues.png")
    return entries


def _compared(
    config: Config, problem: Problem, problem_before: Problem, console: Console
) -> list[_Row]:
    methods: dict[tuple[str, str], Callable[[], tuple[float, Tensor, int | None]]] = {}
    truths: dict[str, float] = {}
    operators: dict[str, Operator] = {}
    kinds = {"H": (Hessian, config.tol), "Σ": (NonUniformity, 2 * config.tol)}
    for matrix in config.matrices:
        kind, tol = kinds[matrix]
        operators[matrix] = operator = kind(problem)
        truths[matrix] = top_eigenpair(operator, tol=_TRUE, max_iter=2000).value
        start = top_eigenpair(kind(problem_before), tol=tol, max_iter=1000, keep=True)
        methods[matrix, "stableopt, cold"] = _ours(kind, problem, tol, config.seed, None)
        methods[matrix, "stableopt, warm"] = _ours(kind, problem, tol, config.seed, start.subspace)
    for find in methods.values():
        find()  # warm-up, as for the others
    for name, prepare in PEERS.items() if "H" in config.matrices else ():
        if "power" in name and not config.power:
            continue
        try:
            find = prepare(problem, config.tol, config.seed)
            find()
            methods["H", name] = find
        except ImportError as error:
            console.print(f"{name}: left out, {error}; pip install 'stableopt\\[bench-peers]'")
        except Exception as error:  # another package may fail in any way
            reason = escape(str(error).splitlines()[0] if str(error) else type(error).__name__)
            console.print(f"{name}: left out, {reason}")
    timings = interleaved(
        {"/".join(key): method for key, method in methods.items()},
        repeats=config.repeats,
        device=config.device,
        called_before=True,
        clock=config.clock,
    )
    rows = []
    for (matrix, method), measured in zip(methods, timings.values(), strict=True):
        value, vector, products = measured.result
        image = operators[matrix] @ vector
        residual = float((image - value * vector).norm()) / abs(value)
        rows.append(
            _Row(matrix, method, measured.median, products, value, truths[matrix], residual)
        )
    return rows


def _ours(
    kind: type[Hessian] | type[NonUniformity], problem: Problem, tol: float, seed: int, start: Any
) -> Callable[[], tuple[float, Tensor, int | None]]:
    def find() -> tuple[float, Tensor, int | None]:
        pair = top_eigenpair(kind(problem), start=start, tol=tol, max_iter=1000, seed=seed)
        return pair.value, pair.vector, pair.products

    return find


def _draw(rows: list[_Row], config: Config, path: Path) -> None:
    chosen = [row for row in rows if row.matrix == "H"]
    figure, (axes,) = panels(width=7, height=0.6 + 0.4 * len(chosen))
    reached = [row.residual <= 1.05 * config.tol for row in chosen]
    axes.barh(
        [row.way for row in chosen],
        [row.seconds for row in chosen],
        color=[BLUE if ok else "0.75" for ok in reached],
    )
    for place, (row, ok) in enumerate(zip(chosen, reached, strict=True)):
        note = f" error {abs(row.error):.1%}" + ("" if ok else f", residual {row.residual:.1%}")
        axes.annotate(note, (row.seconds, place), va="center", fontsize=8)
    axes.set_xlim(0, 1.5 * max(row.seconds for row in chosen))
    axes.invert_yaxis()
    axes.set(xlabel="seconds to the top eigenvalue (grey: not to the residual)")
    figure.savefig(path, dpi=150)
