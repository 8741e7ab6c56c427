"""L-BFGS, whose preconditioner is the inverse Hessian of its memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature import InverseHessian
from stableopt.stability.preconditioner import (
    DiagonalPreconditioner,
    MatrixPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
)
from stableopt.stability.readers.groups import NOT_STEPPED, one, params_of
from stableopt.stability.update_rule import UpdateRule

__all__ = ["read_lbfgs"]


def read_lbfgs(optimizer: torch.optim.LBFGS) -> UpdateRule:
    r"""Read ``torch.optim.LBFGS`` or :class:`stableopt.LBFGS`, with closures of the full batch.

    The rate is the learning rate, and the last step's length where a line search has chosen it or the
    first iteration has cut it. Where groups have rates of their own, with ratios
    :math:`\Lambda` to the largest, the preconditioner is :math:`\Lambda^{1/2}P\Lambda^{1/2}`.
    """
    groups, params = optimizer.param_groups, params_of(optimizer)
    lrs = [float(group["lr"]) for group in groups for _ in group["params"]]
    lr = max(lrs)
    roots = [(each / lr) ** 0.5 if lr else 1.0 for each in lrs]
    # Through the state dict: one of the two classes keeps its pairs elsewhere.
    state = optimizer.state_dict()["state"].get(0, {})
    iterations = state.get("n_iter", 0)
    preconditioner: StepPreconditioner
    if not iterations or state.get("t") is None:
        reason = NOT_STEPPED.format(type(optimizer).__name__)
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    elif not state["old_dirs"]:
        scale = float(state["H_diag"])
        preconditioner = DiagonalPreconditioner(params, [scale * root**2 for root in roots])
    else:
        inverse = InverseHessian.from_pairs(
            state["old_dirs"], state["old_stps"], gamma=float(state["H_diag"])
        )
        preconditioner = MatrixPreconditioner(params, inverse)
        if len(set(roots)) > 1:
            preconditioner = _Between(preconditioner, roots)
    searched = one("line_search_fn", [group["line_search_fn"] for group in groups])
    if state.get("t") is not None and (searched is not None or iterations == 1):
        lr = float(state["t"])
    decays = tuple(float(group.get("weight_decay", 0.0)) for group in groups)
    one_decay = len(set(decays)) == 1
    return UpdateRule(
        lr=lr,
        full_batch=True,
        maximize=one("maximize", [bool(group.get("maximize", False)) for group in groups]),
        weight_decay=decays[0] if one_decay else 0.0,
        group_weight_decays=() if one_decay else decays,
        preconditioner=preconditioner,
    )


class _Between(StepPreconditioner):
    """A preconditioner between two diagonal matrices of one number for each parameter."""

    def __init__(self, inner: StepPreconditioner, factors: Sequence[float]) -> None:
        super().__init__(inner.params)
        self._inner, self._factors = inner, list(factors)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return D P D times the tensors."""
        return self._scaled(self._inner.apply(self._scaled(tensors)))

    def _scaled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [factor * t for factor, t in zip(self._factors, tensors, strict=True)]
