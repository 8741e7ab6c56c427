"""`Frozen`: a real optimizer that repeats its step t on a quadratic, for tests of its linear stability.

A quadratic whose minimum is at zero, and an optimizer that has taken some steps far from it, so that its
preconditioner is not trivial. Linear stability asks what the *next* steps do if the preconditioner stays
as it is, which no adaptive optimizer lets it do; so before each further step everything in its state and
its groups is put back to where it was before step t, other than the momentum: the real class takes its
real step t over and over. Near the minimum gradients are of the order of 1e-9, whose squares are lost on
a second moment, so that all these steps have one and the same preconditioner and are linear. L-BFGS
needs nothing put back: torch's memory, and the two-loop one of this package, take no pair with y @ s
below 1e-10.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from oracles import dense_hessians
from scipy.optimize import brentq
from torch import Tensor, nn

from stableopt import UpdateRule

TINY = 1e-9


@dataclass(frozen=True)
class Case:
    """An optimizer of two groups, weight and bias, and the part of its state that is momentum."""

    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    momentum: str | tuple[str, ...] = ()
    weight: dict[str, Any] | None = None
    bias: dict[str, Any] | None = None
    sign: float = 1.0
    scalar: bool = True  # one scalar mode for each eigenvalue: C and beta P are multiples of 1
    kept: str | None = None  # an entry of the state that is neither momentum nor put back
    least: int = 3  # the first step that can be repeated
    sparse: bool = False
    second_order: bool = False  # it differentiates the gradients, along random vectors

    @property
    def momenta(self) -> tuple[str, ...]:
        return (self.momentum,) if isinstance(self.momentum, str) else self.momentum


def of(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: kind(groups, **options)


SPREAD = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
DATA = (
    torch.randn(9, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * SPREAD,
    torch.zeros(9, 2, dtype=torch.float64),
)
HESSIAN = dense_hessians(nn.Linear(3, 2).double(), nn.MSELoss(), *DATA).mean(0)


class Frozen:
    """An optimizer that takes its step t, and can then repeat that step only."""

    def __init__(self, case: Case, t: int) -> None:
        torch.manual_seed(0)
        self.case = case
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
        for key in (*case.momenta, "d", "prev_flat_grad"):
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
        graph = self.case.second_order
        if graph:
            torch.manual_seed(1)

        def closure() -> Tensor:
            with torch.set_grad_enabled(graph):
                theta = torch.cat([p.reshape(-1) for p in self.params])
                gradient = hessian @ theta
                for p, part in zip(self.params, gradient.split([6, 2]), strict=True):
                    p.grad = part.view(p.shape).clone()
                    if self.case.sparse:  # with every row
                        rows = torch.arange(len(p)).unsqueeze(0)
                        p.grad = torch.sparse_coo_tensor(
                            rows, p.grad, p.shape, is_coalesced=True, check_invariants=True
                        )
            return theta @ gradient / 2

        if self.remembers:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def snapshot(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return (
            [copied(self.optimizer.state[p]) for p in self.params],
            [
                {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "lr")}
                for group in self.optimizer.param_groups
            ],
        )

    def again(self) -> None:
        """Take step t again."""
        if not self.remembers:
            for p, before in zip(self.params, self.put_back[0], strict=True):
                state, after = copied(before), self.optimizer.state[p]
                for key in (*self.case.momenta, self.case.kept):
                    if key in after:
                        state[key] = after[key]
                self.optimizer.state[p] = state
            for group, settings in zip(self.optimizer.param_groups, self.put_back[1], strict=True):
                group.update(copy.deepcopy(settings))
        self.step()

    @property
    def size(self) -> int:
        return 8 * (1 + len(self.case.momenta))

    def set(self, flat: Tensor) -> None:
        """Set parameters ``(8,)``, or parameters and momenta ``(8 (1 + k),)``."""
        self.place(flat[:8])
        for index, key in enumerate(self.case.momenta, start=1):
            own = flat[8 * index : 8 * (index + 1)]
            for p, part in zip(self.params, own.split([6, 2]), strict=True):
                self.optimizer.state[p][key] = part.view(p.shape).clone()

    def matrix(self) -> Tensor:
        """Return the matrix of the step on (theta, momenta), read off step by step."""
        columns = []
        for column in TINY * torch.eye(self.size, dtype=torch.float64):
            self.set(column)
            self.again()
            momenta = [
                self.optimizer.state[p][key].reshape(-1)
                for key in self.case.momenta
                for p in self.params
            ]
            columns.append(torch.cat([self.theta, *momenta]).detach() / TINY)
        return torch.stack(columns, dim=1)

    def rescale(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        self.settle()

    def settle(self) -> None:
        """Let what follows from a new learning rate become so."""
        if not self.remembers:
            self.place(torch.zeros(8, dtype=torch.float64))
            self.again()

    def preconditioned(self) -> Tensor:
        """Return P (H + Lambda), dense, as the rule has them, with the decay of groups after P."""
        rule = UpdateRule.from_optimizer(self.optimizer)
        eye = torch.eye(8, dtype=torch.float64)
        p = (
            torch.stack([rule.preconditioner @ row for row in eye], dim=1)
            if rule.preconditioner is not None
            else torch.diag(self.by_group(rule.group_lrs or (rule.lr,) * 2)) / rule.lr
        )
        # Without a preconditioner the limit includes the decay.
        shared = rule.weight_decay if rule.preconditioned else 0.0
        decays = rule.group_weight_decays or (shared,) * 2
        after = torch.diag(self.by_group(rule.group_filtered_decays or (0.0, 0.0)))
        return p @ (self.hessian + torch.diag(self.by_group(decays))) + after

    @staticmethod
    def by_group(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor([6, 2]))

    def ratio(self) -> float:
        top = float(torch.linalg.eigvals(self.preconditioned()).real.max())
        limit = UpdateRule.from_optimizer(self.optimizer).max_sharpness
        return top / limit if limit > 0 else float("inf")

    def to_the_edge(self) -> None:
        """Scale the learning rates so that the rule says 1: decoupled decay makes it nonlinear."""
        rates = [group["lr"] for group in self.optimizer.param_groups]

        def beyond(factor: float) -> float:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.settle()
            try:
                found = self.ratio()
            except ValueError:  # decay of more than all of it
                return 1.0
            return found - 1 if found > 0 else 1.0

        first = 1 / self.ratio()
        most = 1.01 * max(1.0, first)
        while beyond(most) < 0:
            most *= 1.1
        # Digits that the tolerances of the eigenvalues, 1e-6, do not see.
        beyond(float(brentq(beyond, 0.99 * min(1.0, first), most, rtol=1e-12)))


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v)
        for k, v in state.items()
    }
