"""The cost of an L-BFGS iteration: compact and two-loop directions against torch.optim.LBFGS.

Three measurements on a quadratic, without the time of its closure: a whole iteration without line
search, the direction alone (update with a pair, and -Pg), and the number of host synchronizations. The
methods alternate, so that drifts in the machine's speed affect all alike. Finally, the time to a given
loss on the fully connected network, including the closure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stableopt
from benchmarks.perf import timing
from benchmarks.perf.timing import show, write
from benchmarks.training.data import Dataset
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.networks import WIDTHS, fully_connected
from stableopt.optim.lbfgs.compact import CompactPairs
from stableopt.optim.lbfgs.memory import Move
from stableopt.optim.lbfgs.two_loop import TwoLoopPairs

__all__ = ["Config", "host_waits", "run"]

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": torch.optim.LBFGS,
    "two_loop": lambda params, **options: stableopt.LBFGS(params, direction="two_loop", **options),
    "compact": lambda params, **options: stableopt.LBFGS(params, direction="compact", **options),
}


@dataclass(frozen=True)
class Config(timing.Config):
    """What is timed.

    Attributes:
        sizes: numbers of parameters.
        histories: history sizes, in pairs.
        rounds: number of turns of each method.
        iterations: timed iterations per turn, once the history is full.
        memory_limit: largest size of one method's pairs, in gigabytes.
        max_steps: largest number of steps, of 20 iterations each, to the target loss.
    """

    device: str = "cpu"
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    histories: tuple[int, ...] = (10, 100)
    rounds: int = 7
    iterations: int = 3
    memory_limit: float = 4.0
    max_steps: int = 100


def run(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Run all comparisons, print their tables, write ``perf-lbfgs.json``; return what it holds."""
    console = console or Console()
    iterations = []
    for size in config.sizes:
        for history in config.histories:
            gigabytes = 2 * history * size * 4 / 1e9
            if gigabytes > config.memory_limit:
                console.print(
                    f"skipped {size:,} parameters with {history} pairs: {gigabytes:.1f} GB a method,"
                    f" above memory_limit={config.memory_limit:g}"
                )
                continue
            with console.status(f"{size:,} parameters, {history} pairs"):
                iterations.append(_compare_iterations(config, size, history))
    training = [_time_to_loss(config, name) for name in METHODS]
    results = {"iterations": iterations, "time_to_loss": training}
    _print(config, results, console)
    write(config.out / "perf-lbfgs.json", results, config.device)
    return results


def _print(config: Config, results: dict[str, Any], console: Console) -> None:
    t = pd.DataFrame(
        {**row, **timing, "method": name, "faster": row["methods"]["torch"]["iteration_ms"]}
        for row in results["iterations"]
        for name, timing in row["methods"].items()
    )
    columns = {
        **{"parameters": t["size"], "pairs": t.history, "method": t.method, "ms": t.iteration_ms},
        **{"direction, ms": t.direction_ms, "faster": t.faster / t.iteration_ms},
        "host waits": t.host_waits,
    }
    show(console, f"L-BFGS iterations without the closure, float32, {config.device}", columns)
    t = pd.DataFrame(results["time_to_loss"])
    columns = {"method": t.method, "seconds": t.seconds.where(t.reached)}
    columns |= {"calls of the closure": t.calls, "loss": t.loss}
    title = f"Time to loss {config.target_loss:g}: {config.data}, n = {config.n:,}"
    show(console, title, columns)


class _Quadratic:
    """A diagonal quadratic and an optimizer on it, timed without the closure."""

    def __init__(self, config: Config, size: int, name: str, history: int) -> None:
        generator = torch.Generator().manual_seed(config.seed)
        self._scales = torch.logspace(0, 2, size, device=config.device)
        start = torch.randn(size, generator=generator).to(config.device)
        self.x = nn.Parameter(start)
        self._closure_seconds = 0.0
        self.optimizer = METHODS[name](
            [self.x],
            max_iter=1,
            history_size=history,
            tolerance_grad=0,
            tolerance_change=0,
            lr=0.5,
        )

    def _closure(self) -> Tensor:
        start = _now(self.x.device)
        x = self.x.detach()
        # Without a little noise, the quadratic would be solved before the history is full.
        x.add_(torch.rand_like(x), alpha=1e-2)
        self.x.grad = self._scales * x
        loss = 0.5 * x.dot(self.x.grad)
        self._closure_seconds += _now(self.x.device) - start
        return loss

    def seconds(self, iterations: int) -> list[float]:
        """Take iterations; return the time of each without its closure."""
        times = []
        for _ in range(iterations):
            self._closure_seconds, start = 0.0, _now(self.x.device)
            self.optimizer.step(self._closure)
            times.append(_now(self.x.device) - start - self._closure_seconds)
        return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compare_iterations(config: Config, size: int, history: int) -> dict[str, Any]:
    """Fill the histories, then time the methods in turns."""
    directions = _directions(config, size, history)
    quadratics = {name: _Quadratic(config, size, name, history) for name in METHODS}
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    waits = {}
    with torch.random.fork_rng(devices=[]):
        for quadratic in quadratics.values():
            quadratic.seconds(history + 2)
        for _ in range(config.rounds):
            for name, quadratic in quadratics.items():
                times[name] += quadratic.seconds(config.iterations)
        for name, quadratic in quadratics.items():
            with host_waits(config.device) as count:
                quadratic.seconds(1)
            waits[name] = count["waits"]
    methods = {
        name: {
            "iteration_ms": 1e3 * median(times[name]),
            "direction_ms": directions.get(name),
            "host_waits": waits[name],
        }
        for name in METHODS
    }
    return {"size": size, "history": history, "methods": methods}


def _directions(config: Config, size: int, history: int) -> dict[str, float]:
    """Return the median milliseconds of an update with a pair and a direction."""
    generator = torch.Generator().manual_seed(config.seed)
    kinds: dict[str, type[Any]] = {"two_loop": TwoLoopPairs, "compact": CompactPairs}
    memories = {name: kind(history, {}) for name, kind in kinds.items()}
    scales = torch.logspace(0, 2, size, device=config.device)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    previous = torch.zeros(size, device=config.device)
    for turn in range(history + 1 + config.rounds * config.iterations):
        step = torch.randn(size, generator=generator).to(config.device)
        gradient = previous + scales * step
        for name, memory in memories.items():
            start = _now(step.device)
            last = Move(step, 1.0, previous, loss=0.0)
            products = memory.numbers(*memory.products(last, gradient))
            memory.update(last, gradient, products, 0.0)
            memory.descent(gradient)
            if turn > history:
                times[name].append(_now(step.device) - start)
        previous = gradient
    return {name: 1e3 * median(values) for name, values in times.items()}


class _Waits(TorchDispatchMode):
    """Counts reads of a scalar, and copies from a device to the CPU."""

    def __init__(self, count: dict[str, int], device: str) -> None:
        super().__init__()
        self.count, self.device = count, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::_local_scalar_dense" and args[0].device.type == self.device:
            self.count["waits"] += 1
        elif name == "aten::_to_copy" and args[0].device.type != "cpu":
            target = (kwargs or {}).get("device")
            self.count["waits"] += target is not None and torch.device(target).type == "cpu"
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts ``tolist`` on a CPU, which dispatches nothing; elsewhere ``_Waits`` sees its copy."""

    def __init__(self, count: dict[str, int], device: str) -> None:
        super().__init__()
        self.count, self.device = count, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0].device.type == self.device == "cpu":
            self.count["waits"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_waits(device: str = "cpu") -> Iterator[dict[str, int]]:
    """Count how often the host reads a number from the device, which synchronizes the two."""
    count = {"waits": 0}
    kind = torch.device(device).type
    with _Lists(count, kind), _Waits(count, kind):
        yield count


def _time_to_loss(config: Config, name: str) -> dict[str, Any]:
    """Train the fully connected network to the target, checked with the loss that ``step`` returns."""
    images = Dataset(config.data, config.n).load(config.data_dir)
    model = fully_connected(WIDTHS[config.data], config.seed).to(config.device)
    x, y = images.x.to(config.device), images.y.to(config.device)
    optimizer = METHODS[name](model.parameters(), line_search_fn="strong_wolfe", history_size=10)
    calls, loss = 0, float("inf")

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        value = mean_squared_error(model(x), y)
        value.backward()
        return value.detach()

    start = _now(x.device)
    for _ in range(config.max_steps):
        loss = float(optimizer.step(closure))
        if not loss > config.target_loss:
            break
    return {
        "method": name,
        "seconds": _now(x.device) - start,
        "calls": calls,
        "loss": loss,
        "reached": loss <= config.target_loss,
    }
