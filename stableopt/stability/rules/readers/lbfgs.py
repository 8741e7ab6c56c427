r"""Reader of L-BFGS, whose preconditioner is the inverse Hessian of its memory.

The limit is :math:`2/\eta`. If the memory approximates the Hessian well, PH is about 1 and every
learning rate below 2 is stable: L-BFGS can settle at almost any minimum (Wu, Ma & E, 2018, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature import InverseHessian
from stableopt.curvature.problem.parameters import real_view
from stableopt.stability.rules.preconditioner import (
    MatrixPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
)
from stableopt.stability.rules.readers.param_groups import (
    NOT_STEPPED,
    common_value,
    decay_of,
    params_of,
)
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_lbfgs"]


class _Scaled:
    """Products with the matrix D P D, where D is diagonal; P is gamma I without a ``matrix``."""

    def __init__(self, matrix: InverseHessian | None, gamma: float, roots: Tensor) -> None:
        self._matrix, self._gamma, self._roots = matrix, gamma, roots

    def __matmul__(self, vector: Tensor) -> Tensor:
        scaled = self._roots.to(vector) * vector
        image = self._gamma * scaled if self._matrix is None else self._matrix @ scaled
        return self._roots.to(vector) * image


def read_lbfgs(optimizer: torch.optim.LBFGS) -> UpdateRule:
    r"""Read ``torch.optim.LBFGS``, and subclasses with the same state dict.

    The closure is assumed to use the full batch. ``lr`` is the learning rate, or the length of the last
    step if a line search chose it or the first iteration shortened it. If a subclass has learning rates
    by group, the preconditioner is :math:`\Lambda^{1/2}P\Lambda^{1/2}` with
    :math:`\Lambda=\mathrm{diag}(\eta_g)/\eta`.
    """
    groups, params = optimizer.param_groups, params_of(optimizer)
    # The state dict has torch's keys, also if a subclass stores its memory elsewhere.
    state = optimizer.state_dict()["state"].get(0, {})
    iterations, step_length = state.get("n_iter", 0), float(state.get("t") or 0.0)
    rates = [float(group["lr"]) for group in groups]
    lr = max(rates)
    preconditioner: StepPreconditioner
    if not iterations or state.get("old_dirs") is None:
        reason = NOT_STEPPED.format(type(optimizer).__name__)
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    else:
        # In torch "old_dirs" are gradient differences y, and "old_stps" are steps s.
        y, gamma = state["old_dirs"], float(state["H_diag"])
        inverse = InverseHessian.from_pairs(s=state["old_stps"], y=y, gamma=gamma) if y else None
        ratios = [rate / lr if lr else 1.0 for rate in rates]
        roots = [
            torch.full_like(real_view(p.detach()), ratio**0.5).reshape(-1)
            for ratio, group in zip(ratios, groups, strict=True)
            for p in group["params"]
        ]
        preconditioner = MatrixPreconditioner(params, _Scaled(inverse, gamma, torch.cat(roots)))
        if step_length and (groups[0]["line_search_fn"] is not None or iterations == 1):
            lr = step_length
    return UpdateRule(
        lr=lr,
        full_batch=True,
        **decay_of([float(group.get("weight_decay", 0.0)) for group in groups]),
        maximize=bool(common_value("maximize", [group.get("maximize", False) for group in groups])),
        preconditioner=preconditioner,
    )
