"""Every optimizer of three packages is known with a tested limit, or measured without one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_optimizer
from reader_cases import CASES, PACKAGED, installed
from torch import nn

from stableopt import StabilityMonitor, UpdateRule
from stableopt.stability.rules.readers import READERS

READ = [
    kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}" for kind in READERS
]

AROUND = {"torch_optimizer.lookahead.Lookahead"}
"""Read with tests of their own, in test_around_another.py."""


def classes(package: str) -> list[Any]:
    """Return a parameter for each public class of ``package`` with a step."""
    if importlib.util.find_spec(package.split(".")[0]) is None:
        return [pytest.param(package, marks=pytest.mark.skip(reason=f"needs {package}"))]
    members = vars(importlib.import_module(package)).values()
    return [
        pytest.param(kind, id=f"{package}.{kind.__name__}")
        for kind in members
        if inspect.isclass(kind)
        and kind is not torch.optim.Optimizer
        and callable(getattr(kind, "step", None))
        and callable(getattr(kind, "zero_grad", None))
    ]


EVERY = [
    parameter
    for name in ("torch.optim", "torch_optimizer", "schedulefree")
    for parameter in classes(name)
]


def build(kind: type, model: nn.Module) -> Any:
    """Return an optimizer of ``kind``, around SGD if it needs another one."""
    if "params" not in inspect.signature(kind).parameters:
        return kind(torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[call-arg]
    return kind(model.parameters())


def step(optimizer: Any, model: nn.Module) -> None:
    """Take a step, by a closure where it is needed."""
    kind = type(optimizer)

    def closure() -> torch.Tensor:
        loss = model(torch.ones(1, 3)).square().sum()
        graph = kind is torch_optimizer.Adahessian
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=graph), strict=True):
            p.grad = g.to_sparse() if kind is torch.optim.SparseAdam else g.clone()
        return loss

    if kind is torch.optim.LBFGS or "Closure" in kind.__name__:
        optimizer.step(closure)
        return
    closure()
    optimizer.step()


@functools.cache
def with_edges() -> set[str]:
    """Return the classes that repeat their step in test_readers.py."""
    groups = [
        {"params": [nn.Parameter(torch.ones(2, 2))]},
        {"params": [nn.Parameter(torch.ones(2))]},
    ]
    available = [case for name, case in PACKAGED.items() if installed(name)]
    cases = [*CASES.values(), *available]
    kinds = [type(case.make([dict(g) for g in groups])) for case in cases]
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("kind", EVERY)
def test_every_optimizer_is_known_or_measured(kind: type) -> None:
    """Catches a class that is refused, or stops the monitor, as one without a learning rate would; and
    one with a limit that no test has seen it cross.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=kind is not getattr(torch.optim, "Muon", None))
    optimizer, data = build(kind, model), (torch.randn(8, 3), torch.randn(8, 2))
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    with StabilityMonitor(optimizer, model, nn.MSELoss(), data, every=3, batch_size=4) as monitor:
        for _ in range(3):
            step(optimizer, model)
    (margins,) = monitor.history
    assert margins.failure is None
    assert margins.sharpness is not None
    rule = UpdateRule.from_optimizer(optimizer)
    if rule.unknown is None:
        assert margins.edge_ratio is not None
        assert f"{kind.__module__}.{kind.__qualname__}" in with_edges() | AROUND
    else:
        assert kind.__name__ in rule.unknown
        assert margins.edge_ratio is None
        assert (
            "register" in rule.unknown or rule.norm is not None or "does not move" in rule.unknown
        )


def test_most_are_known() -> None:
    """Catches a class that has lost its reader: as many of each package as today, at least."""
    counts: dict[str, int] = {}
    for parameter in EVERY:
        kind = parameter.values[0]
        if isinstance(kind, type) and UpdateRule.reader_of(kind)[1] is not None:
            package = kind.__module__.split(".")[0]
            counts[package] = counts.get(package, 0) + 1
    # Muon came with a later version of torch than the oldest that is supported.
    assert counts["torch"] >= 14
    assert counts["torch_optimizer"] == 12
    assert counts.get("schedulefree", 4) == 4


def test_the_table_of_optimizers_has_every_reader() -> None:
    """Catches a reader that the page on optimizers does not list, and a name there without a reader."""
    page = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text()
    table = page[page.index("| optimizer | P |") :].split("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines()]
    listed = set(re.findall(r"\w+", " ".join(rows)))
    names = {name.rsplit(".")[-1] for name in READ}
    # One class stands for all of its package.
    bases = {"_AdamBase": "torchao", "Optimizer2State": "bitsandbytes"}
    missing = {bases.get(name, name) for name in names} - listed
    assert missing == set()
    words = {
        "optimizer",
        "P",
        "at",
        "y",
        "also",
        "of",
        "over",
        "another",
        "both",
        "packages",
        "with",
    }
    words |= {
        "and",
        "8",
        "bits",
        "under",
        "a",
        "monitor",
        "torch",
        "optim",
        "prodigyopt",
        *bases.values(),
    }
    words |= {name.split(".")[0] for name in READ}
    assert listed - names - words == set()
