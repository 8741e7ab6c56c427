"""The cost of a product with the Hessian, compiled by ``torch.compile`` and not.

A compiled function cannot be differentiated twice, so the compiled product is one function of the vector
that computes forward-over-reverse derivatives, instead of graphs that are kept between products. The
time to compile is also shown, since a measurement takes only a few products.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.perf.timing import Config, interleaved, once, random_data, report
from benchmarks.training.networks import WIDTHS, fully_connected
from stableopt.curvature import Hessian, Problem

__all__ = ["Config", "run"]


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time the three ways on each network, print and write the table; return its rows."""
    console = console or Console()
    rows = []
    for name, widths in WIDTHS.items():
        model, shape, outputs = fully_connected(widths, config.seed), (widths[0],), widths[-1]
        with console.status(f"compiling for {name}"):
            rows.append({"network": name, **_row(config, model, shape, outputs)})

    t = pd.DataFrame(rows)
    names = {"kept passes (ours)": "kept", "torch.func": "eager", "compiled": "compiled"}
    costs = {name: t[column] / t.gradient for name, column in names.items()}
    columns = {"network": t.network, **costs, "seconds to compile": t.compile_seconds}
    title = "One product with the Hessian, in gradients"
    return report(config, console, "compiled", title, columns, rows)


def _row(config: Config, model: nn.Module, shape: tuple[int, ...], outputs: int) -> dict[str, Any]:
    model.to(config.device)
    x, y = random_data(config, config.n, shape, outputs)
    problem = Problem(model, nn.functional.mse_loss, (x, y))
    hessian = Hessian(problem)
    vector = torch.randn(problem.num_params, device=config.device)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    tangent = dict(zip(problem.names, problem.unflatten(vector), strict=True))

    def loss(params: dict[str, Tensor]) -> Tensor:
        # Spelt out, since mse_loss has no forward-mode derivative.
        return (functional_call(model, params, (x,)) - y).square().mean()

    def product(along: dict[str, Tensor]) -> dict[str, Tensor]:
        image: dict[str, Tensor] = torch.func.jvp(torch.func.grad(loss), (theta,), (along,))[1]
        return image

    torch.compiler.reset()
    compiled = torch.compile(product, dynamic=False)
    first = once(lambda: compiled(tangent), config.device)
    flat = torch.cat([first.result[name].reshape(-1) for name in problem.names])
    difference = float((flat - hessian @ vector).norm() / flat.norm())

    def gradient() -> None:
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()

    timings = interleaved(
        {
            "gradient": gradient,
            "kept": lambda: hessian @ vector,
            "eager": lambda: product(tangent),
            "compiled": lambda: compiled(tangent),
        },
        repeats=config.repeats,
        device=config.device,
    )
    return {
        "d": problem.num_params,
        **{name: timing.median for name, timing in timings.items()},
        "compile_seconds": first.median,
        "difference": difference,
    }
