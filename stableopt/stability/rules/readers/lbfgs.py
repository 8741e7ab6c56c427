r"""Reader of L-BFGS, whose preconditioner is the inverse Hessian of its memory.

The limit is :math:`2/\eta`. Near a minimum that the memory describes well PH is about 1, so every rate
below 2 is stable: L-BFGS can settle at almost any minimum (Wu, Ma & E, 2018, section 5).
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
from stableopt.stability.rules.readers.param_groups import NOT_STEPPED, decay_of, one, params_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_lbfgs"]


class _Scaled:
    """Products with the matrix D P D, D diagonal."""

    def __init__(self, matrix: InverseHessian | None, scale: float, roots: Tensor) -> None:
        self._matrix, self._scale, self._roots = matrix, scale, roots

    def __matmul__(self, vector: Tensor) -> Tensor:
        scaled = self._roots.to(vector) * vector
        image = self._scale * scaled if self._matrix is None else self._matrix @ scaled
        return self._roots.to(vector) * image


def read_lbfgs(optimizer: torch.optim.LBFGS) -> UpdateRule:
    r"""Read ``torch.optim.LBFGS``, and subclasses with its state dict.

    The closure is assumed to use the full batch. The rate is the learning rate, or the length of the
    last step if a line search chose it or the first iteration shortened it. If a subclass allows rates
    by group, the preconditioner is :math:`\Lambda^{1/2}P\Lambda^{1/2}`,
    :math:`\Lambda=\mathrm{diag}(\eta_g)/\eta`.
    """
    groups, params = optimizer.param_groups, params_of(optimizer)
    # The state dict has the memory in torch's form, wherever a subclass keeps it.
    state = optimizer.state_dict()["state"].get(0, {})
    iterations, length = state.get("n_iter", 0), float(state.get("t") or 0.0)
    rates = [float(group["lr"]) for group in groups]
    lr = max(rates)
    preconditioner: StepPreconditioner
    if not iterations or state.get("old_dirs") is None:
        reason = NOT_STEPPED.format(type(optimizer).__name__)
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    else:
        pairs, gamma = state["old_dirs"], float(state["H_diag"])
        inverse = None
        if pairs:
            inverse = InverseHessian.from_pairs(s=state["old_stps"], y=pairs, gamma=gamma)
        shares = [rate / lr if lr else 1.0 for rate in rates]
        roots = [
            torch.full_like(real_view(p.detach()), share**0.5).reshape(-1)
            for share, group in zip(shares, groups, strict=True)
            for p in group["params"]
        ]
        preconditioner = MatrixPreconditioner(params, _Scaled(inverse, gamma, torch.cat(roots)))
        if length and (groups[0]["line_search_fn"] is not None or iterations == 1):
            lr = length
    return UpdateRule(
        lr=lr,
        full_batch=True,
        **decay_of([float(group.get("weight_decay", 0.0)) for group in groups]),
        maximize=bool(one("maximize", [group.get("maximize", False) for group in groups])),
        preconditioner=preconditioner,
    )
