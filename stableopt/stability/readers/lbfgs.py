"""``torch.optim.LBFGS``, whose preconditioner is the inverse Hessian of its memory."""

from __future__ import annotations

import torch

from stableopt.curvature import InverseHessian
from stableopt.stability.preconditioner import (
    DiagonalPreconditioner,
    MatrixPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
)
from stableopt.stability.readers.groups import NOT_STEPPED, params_of
from stableopt.stability.update_rule import UpdateRule

__all__ = ["read_lbfgs"]


def read_lbfgs(optimizer: torch.optim.LBFGS) -> UpdateRule:
    """Read ``torch.optim.LBFGS``, whose closure is taken to be of the full batch.

    The rate is the learning rate, and the last step's length where a line search has chosen it or the
    first iteration has cut it.
    """
    (group,), params = optimizer.param_groups, params_of(optimizer)
    state = optimizer.state.get(params[0], {})
    iterations, lr = state.get("n_iter", 0), float(group["lr"])
    preconditioner: StepPreconditioner
    if not iterations or state.get("t") is None:
        reason = NOT_STEPPED.format(type(optimizer).__name__)
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    elif not state["old_dirs"]:
        scale = float(state["H_diag"])
        preconditioner = DiagonalPreconditioner(params, [scale] * len(params))
    else:
        inverse = InverseHessian.from_pairs(
            state["old_dirs"], state["old_stps"], gamma=float(state["H_diag"])
        )
        preconditioner = MatrixPreconditioner(params, inverse)
    if state.get("t") is not None and (group["line_search_fn"] is not None or iterations == 1):
        lr = float(state["t"])
    return UpdateRule(lr=lr, full_batch=True, preconditioner=preconditioner)
