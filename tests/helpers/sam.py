"""SAM over any optimizer, with its step in two parts, as people copy it into their projects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al., 2021)."""

    def __init__(
        self, params: Any, base: Any, rho: float, adaptive: bool = False, **options: Any
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        """Ascend by rho along the gradient, and drop it."""
        norm = torch.cat([p.grad.flatten() for p in self._params()]).norm() + 1e-12
        rho = self.param_groups[0]["rho"]
        self.climbed = [(p, rho / norm * p.grad) for p in self._params()]
        for p, distance in self.climbed:
            p += distance
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Return, step along the gradient from above, and drop it."""
        for p, distance in self.climbed:
            p -= distance
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take both parts; the gradient before the ascent is ready."""
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
