"""Step hooks of every optimizer of this package, and of torch's own classes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOOKS = """
import itertools, os, sys
import torch
import torch._dynamo  # once here, which each child would do by itself
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
import stableopt

KINDS = {
    "SGD": [torch.optim.SGD, stableopt.SGD, stableopt.GD],
    "LBFGS": [torch.optim.LBFGS, stableopt.LBFGS, stableopt.LBFGS],
}[sys.argv[1]]

def check(order):
    calls = []
    register_optimizer_step_pre_hook(lambda o, a, k: calls.append("global pre"))
    register_optimizer_step_post_hook(lambda o, a, k: calls.append("global post"))
    optimizers = []
    for kind in order:
        p = nn.Parameter(torch.ones(1))
        optimizer = kind([p], lr=0.5)
        optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
        optimizers.append((optimizer, p))
    for optimizer, p in optimizers:
        def closure():
            p.grad = p.detach().clone()
            return p.detach().square().sum() / 2
        calls.clear()
        if sys.argv[1] == "LBFGS":
            optimizer.step(closure)
            assert abs(p.item()) < 1e-3, p
        else:
            closure()
            optimizer.step()
            assert p.item() == 0.5, (order, p)
        assert calls == ["global pre", "pre", "post", "global post"], (order, calls)

# Torch wraps `step` on the first instance of a class, for good: each order needs a fresh process.
for order in itertools.permutations(KINDS):
    child = os.fork()
    if child == 0:
        try:
            check(order)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, order
print("all orders")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
@pytest.mark.parametrize("family", ["SGD", "LBFGS"])
def test_step_hooks_fire_once_whichever_class_comes_first(family: str) -> None:
    """Catches ``step`` wrapped twice by torch, once for a class and once for its base."""
    done = subprocess.run(
        [sys.executable, "-c", HOOKS, family],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all orders"
