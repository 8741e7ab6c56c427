"""Every registered optimizer, by its real class, becomes unstable exactly at the limit of its rule.

A quadratic whose minimum is at zero, and an optimizer that has taken some steps far from it, so that its
preconditioner is not trivial. Linear stability asks what the *next* steps do if the preconditioner stays
as it is, which no adaptive optimizer lets it do; so before each further step everything in its state is
put back to where it was before step t, other than the momentum: the real class takes its real step t
over and over. Near the minimum gradients are of the order of 1e-9, whose squares are lost on a second
moment, so that all these steps have one and the same preconditioner and are linear. L-BFGS needs nothing
put back: torch's memory, and the two-loop one of this package, take no pair with y @ s below 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch_optimizer
from oracles import dense_hessians
from scipy.optimize import brentq
from torch import Tensor, nn

import stableopt
from stableopt import UpdateRule, measure

TINY = 1e-9


@dataclass(frozen=True)
class Case:
    """An optimizer of two groups, weight and bias, and the part of its state that is momentum."""

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    momentum: str | None = None
    weight: dict[str, Any] | None = None
    bias: dict[str, Any] | None = None
    sign: float = 1.0
    scalar: bool = True  # one scalar mode for each eigenvalue: C and beta P are multiples of 1


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, **{"lr": 0.1, **options})


def of(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: kind(groups, **options)


optim = torch.optim
ONE_ITERATION = {"max_iter": 1, "tolerance_grad": 0, "tolerance_change": 0}
CASES = {
    "SGD, rates": Case(sgd(), bias={"lr": 0.03}),
    "SGD, rates and decays": Case(
        sgd(momentum=0.9, nesterov=True), "momentum_buffer", {"weight_decay": 0.2}, {"lr": 0.2}
    ),
    "SGD, decays": Case(sgd(momentum=0.5), "momentum_buffer", {"weight_decay": 0.3}),
    "Adam": Case(of(optim.Adam, lr=0.01), "exp_avg"),
    "Adam, loop, no average": Case(of(optim.Adam, lr=0.01, betas=(0.0, 0.99), foreach=False)),
    "Adam, amsgrad, L2": Case(
        of(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.3, foreach=True), "exp_avg"
    ),
    "Adam, fused, rates, L2, eps": Case(
        of(optim.Adam, lr=0.01, fused=True),
        "exp_avg",
        {"weight_decay": 0.5, "eps": 0.1},
        {"lr": 0.002, "betas": (0.9, 0.9)},
    ),
    "Adam, maximize, L2": Case(
        of(optim.Adam, lr=0.01, maximize=True, weight_decay=0.1), "exp_avg", sign=-1.0
    ),
    "AdamW": Case(of(optim.AdamW, lr=0.01, weight_decay=20.0), "exp_avg"),
    "AdamW, tensor lr": Case(
        of(optim.AdamW, lr=torch.tensor(0.01).double(), foreach=False), "exp_avg"
    ),
    "AdamW, bias does not decay": Case(
        of(optim.AdamW, lr=0.01, weight_decay=30.0),
        "exp_avg",
        bias={"weight_decay": 0.0, "lr": 0.02},
        scalar=False,
    ),
    "NAdam": Case(of(optim.NAdam, lr=0.01), "exp_avg"),
    "NAdam, mu at a half": Case(of(optim.NAdam, lr=0.01, momentum_decay=0.0), "exp_avg"),
    "NAdam, fast schedule, L2": Case(
        of(optim.NAdam, lr=0.01, momentum_decay=0.5, weight_decay=0.4, foreach=True), "exp_avg"
    ),
    "NAdam, decoupled": Case(
        of(optim.NAdam, lr=0.01, weight_decay=20.0, decoupled_weight_decay=True), "exp_avg"
    ),
    "RMSprop": Case(of(optim.RMSprop, lr=0.01)),
    "RMSprop, momentum, L2": Case(
        of(optim.RMSprop, lr=0.01, momentum=0.8, weight_decay=0.3), "momentum_buffer"
    ),
    "RMSprop, centered": Case(
        of(optim.RMSprop, lr=0.01, momentum=0.9, centered=True, alpha=0.9), "momentum_buffer"
    ),
    "Adagrad": Case(of(optim.Adagrad, lr=0.1, eps=0.1)),
    "Adagrad, decay of both kinds": Case(
        of(optim.Adagrad, lr=0.1, lr_decay=0.2, weight_decay=0.3, initial_accumulator_value=0.5),
        bias={"weight_decay": 0.1},
    ),
    "LBFGS": Case(
        lambda groups: optim.LBFGS([p for g in groups for p in g["params"]], 0.5, **ONE_ITERATION)
    ),
    "LBFGS of this package, two-loop, rates, L2": Case(
        of(stableopt.LBFGS, lr=0.5, direction="two_loop", weight_decay=0.1, **ONE_ITERATION),
        bias={"lr": 0.3},
    ),
    "Yogi": Case(of(torch_optimizer.Yogi, lr=0.01, weight_decay=0.2), "exp_avg"),
    "AdaBelief": Case(of(torch_optimizer.AdaBelief, lr=0.01, eps=1e-3), "exp_avg"),
    "AdaBelief, amsgrad, L2": Case(
        of(torch_optimizer.AdaBelief, lr=0.01, eps=1e-3, amsgrad=True, weight_decay=0.2), "exp_avg"
    ),
    "AdaBelief, decoupled": Case(
        of(torch_optimizer.AdaBelief, lr=0.01, weight_decouple=True, weight_decay=9.0), "exp_avg"
    ),
    "AdaBelief, fixed decay": Case(
        of(
            torch_optimizer.AdaBelief,
            lr=0.01,
            weight_decouple=True,
            fixed_decay=True,
            weight_decay=0.1,
        ),
        "exp_avg",
    ),
    "Adahessian": Case(of(torch_optimizer.Adahessian, lr=0.1, hessian_power=1.0), "exp_avg"),
    "Adahessian, power, decay": Case(
        of(torch_optimizer.Adahessian, lr=0.1, hessian_power=0.5, weight_decay=1.5), "exp_avg"
    ),
    "Apollo": Case(of(torch_optimizer.Apollo, lr=0.5, weight_decay=0.1), "exp_avg_grad"),
    "Shampoo": Case(of(torch_optimizer.Shampoo, lr=0.1, epsilon=1.0, weight_decay=0.2)),
    "Shampoo, update_freq": Case(of(torch_optimizer.Shampoo, lr=0.1, epsilon=2.0, update_freq=3)),
    "Shampoo, momentum, rates": Case(
        of(torch_optimizer.Shampoo, lr=0.1, epsilon=3.0, momentum=0.8, weight_decay=0.1),
        "momentum_buffer",
        bias={"lr": 0.05, "momentum": 0.4},
        scalar=False,
    ),
}


SPREAD = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
DATA = (
    torch.randn(9, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * SPREAD,
    torch.zeros(9, 2, dtype=torch.float64),
)
HESSIAN = dense_hessians(nn.Linear(3, 2).double(), nn.MSELoss(), *DATA).mean(0)


class Frozen:
    """An optimizer that takes its step t, and can then repeat that step only."""

    def __init__(self, name: str, t: int) -> None:
        torch.manual_seed(0)
        self.case = case = CASES[name]
        self.model, self.data = nn.Linear(3, 2).double(), DATA
        self.hessian = HESSIAN  # of what the optimizer descends
        self.params = [self.model.weight, self.model.bias]
        self.optimizer = case.make(
            [
                {"params": [self.model.weight], **(case.weight or {})},
                {"params": [self.model.bias], **(case.bias or {})},
            ]
        )
        for _ in range(t - 1):
            if not self.remembers:
                self.place(torch.randn(8, dtype=torch.float64))
            self.step()
        self.put_back = self.snapshot()
        for key in (case.momentum, "d", "prev_flat_grad"):
            for state in self.optimizer.state.values():
                if isinstance(state.get(key), Tensor):
                    state[key].zero_()
        self.place(TINY * torch.randn(8, dtype=torch.float64))
        self.step()

    @property
    def remembers(self) -> bool:
        return isinstance(self.optimizer, torch.optim.LBFGS)

    def loss_fn(self, z: Tensor, y: Tensor) -> Tensor:
        return self.case.sign * (z - y).square().mean()

    def place(self, flat: Tensor) -> None:
        for p, part in zip(self.params, flat.split([6, 2]), strict=True):
            p.data.copy_(part.view(p.shape))

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def step(self) -> None:
        """Take one step with the gradient of f = sign theta^T H theta / 2."""
        hessian = self.case.sign * self.hessian
        # Adahessian differentiates the gradients, along random vectors.
        graph = isinstance(self.optimizer, torch_optimizer.Adahessian)
        if graph:
            torch.manual_seed(1)

        def closure() -> Tensor:
            with torch.set_grad_enabled(graph):
                theta = torch.cat([p.reshape(-1) for p in self.params])
                gradient = hessian @ theta
                for p, part in zip(self.params, gradient.split([6, 2]), strict=True):
                    p.grad = part.view(p.shape).clone()
            return theta @ gradient / 2

        if self.remembers:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def snapshot(self) -> list[dict[str, Any]]:
        return [copied(self.optimizer.state[p]) for p in self.params]

    def again(self) -> None:
        """Take step t again."""
        if not self.remembers:
            for p, before in zip(self.params, self.put_back, strict=True):
                momentum = self.optimizer.state[p].get(self.case.momentum)
                self.optimizer.state[p] = copied(before)
                if momentum is not None:
                    self.optimizer.state[p][self.case.momentum] = momentum
        self.step()

    def set(self, flat: Tensor) -> None:
        """Set parameters ``(8,)``, or parameters and momentum ``(16,)``."""
        self.place(flat[:8])
        if self.case.momentum:
            for p, part in zip(self.params, flat[8:].split([6, 2]), strict=True):
                self.optimizer.state[p][self.case.momentum] = part.view(p.shape).clone()

    def matrix(self) -> Tensor:
        """Return the matrix of the step on (theta, momentum), read off step by step."""
        key = self.case.momentum
        columns = []
        for column in TINY * torch.eye(16 if key else 8, dtype=torch.float64):
            self.set(column)
            self.again()
            momenta = [self.optimizer.state[p][key].reshape(-1) for p in self.params] if key else []
            columns.append(torch.cat([self.theta, *momenta]).detach() / TINY)
        return torch.stack(columns, dim=1)

    def rescale(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def preconditioned(self) -> Tensor:
        """Return P (H + Lambda), dense, as the rule has them."""
        rule = UpdateRule.from_optimizer(self.optimizer)
        eye = torch.eye(8, dtype=torch.float64)
        p = (
            torch.stack([rule.preconditioner @ row for row in eye], dim=1)
            if rule.preconditioner is not None
            else torch.diag(self.by_group(rule.group_lrs or (rule.lr,) * 2)) / rule.lr
        )
        decays = rule.group_weight_decays or (rule.weight_decay,) * 2
        return p @ (self.hessian + torch.diag(self.by_group(decays)))

    @staticmethod
    def by_group(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor([6, 2]))

    def ratio(self) -> float:
        top = float(torch.linalg.eigvals(self.preconditioned()).real.max())
        return top / UpdateRule.from_optimizer(self.optimizer).max_sharpness

    def to_the_edge(self) -> None:
        """Scale the learning rates so that the rule says 1: decoupled decay makes it nonlinear."""
        rates = [group["lr"] for group in self.optimizer.param_groups]

        def beyond(factor: float) -> float:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            try:
                found = self.ratio()
            except ValueError:  # decay of more than all of it
                return 1.0
            return found - 1 if found > 0 else 1.0

        first = 1 / self.ratio()
        # Digits that the tolerances of the eigenvalues, 1e-6, do not see.
        beyond(float(brentq(beyond, 0.99 * min(1.0, first), 1.01 * max(1.0, first), rtol=1e-12)))


def every(*times: int) -> list[Any]:
    # L-BFGS has found the minimum after ten steps.
    return [
        pytest.param(name, min(t, 8 if "LBFGS" in name else t), id=f"{name}, step {t}")
        for name in CASES
        for t in times
    ]


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


@pytest.mark.parametrize(("name", "t"), every(3, 30))
def test_the_real_class_crosses_where_its_rule_says(name: str, t: int) -> None:
    """Catches a wrong limit, a wrong preconditioner, a state entry read for another, a bias correction
    left out or made twice. At the critical rate the matrix of the real step has the eigenvalue -1 and
    none beyond, and all others are the roots of the rule's scalar modes; at 0.98 of it real steps
    shrink, at 1.02 they grow.
    """
    frozen = Frozen(name, t)
    frozen.to_the_edge()
    values, vectors = torch.linalg.eig(frozen.matrix())
    # Columns have the rounding of steps of the order of 1e-9 next to preconditioners of up to 1e3;
    # roots that almost coincide are accurate to the root of the rounding only.
    assert float((values + 1).abs().min()) < 1e-6
    assert float(values.abs().max()) < 1 + 1e-6
    if frozen.case.scalar:
        expected = scalar_roots(
            UpdateRule.from_optimizer(frozen.optimizer), frozen.preconditioned()
        )
        assert float((values[:, None] - expected).abs().min(dim=1).values.max()) < 1e-5

    critical = vectors[:, (values + 1).abs().argmin()].real
    for factor, grows in ((0.98, False), (1.02, True)):
        frozen.rescale(factor)
        frozen.set(TINY * critical / critical[:8].norm())
        for _ in range(80):
            frozen.again()
        # Without momentum 1.04^80 = 23 and 0.96^80 = 0.04; with it, both are further from 1.
        distance = float(frozen.theta.norm()) / TINY
        assert distance > 10 if grows else distance < 0.1
        frozen.rescale(1 / factor)


def scalar_roots(rule: UpdateRule, matrix: Tensor) -> Tensor:
    """Return the roots of the mode of each eigenvalue of ``matrix``."""
    beta, c = rule.momentum, 1 - rule.lr * rule.decoupled_weight_decay
    now, mean = (1.0, beta) if rule.nesterov else (1 - rule.momentum_share, rule.momentum_share)
    found = []
    for k in torch.linalg.eigvals(matrix).real.tolist():
        trace = c + beta - rule.lr * (now + mean * (1 - rule.dampening)) * k
        found.append(np.roots([1, -trace, beta * c - rule.lr * beta * now * k]))
    return torch.from_numpy(np.concatenate(found))


@pytest.mark.parametrize(("name", "t"), every(3))
def test_measured_and_dense_preconditioned_sharpness_agree(name: str, t: int) -> None:
    """Catches a preconditioner applied in another order of parameters than the Hessian's, a decay on
    the wrong side of it, or a root that is none.
    """
    frozen = Frozen(name, t)
    found = measure(
        frozen.model,
        frozen.loss_fn,
        frozen.data,
        optimizer=frozen.optimizer,
        quantities=("sharpness",),
        tol=1e-10,
    )
    top = float(torch.linalg.eigvals(frozen.preconditioned()).real.max())
    assert found.preconditioned_sharpness == pytest.approx(top, rel=1e-8)
    assert found.preconditioned_sharpness_ratio == pytest.approx(frozen.ratio(), rel=1e-8)
    assert found.sharpness == pytest.approx(
        float(torch.linalg.eigvalsh(frozen.hessian)[-1]), rel=1e-8
    )
    assert found.sharpness_limit is None
    assert found.stable == (frozen.ratio() <= 1)
