r"""Reader of ``torch_optimizer.Shampoo`` (0.3.0), whose preconditioner is a Kronecker product.

It multiplies the gradient of a parameter of k dimensions along dimension i by :math:`L_i^{-1/k}` (the
paper, Gupta, Koren & Singer, 2018, has :math:`L_i^{-1/2k}`), so that
:math:`P = \bigotimes_i L_i^{-1/k}`. Its momentum is an average with the last *update*, to which P has
already been applied:

.. math:: u' = P\,[(1-\beta)\nabla f + \lambda\theta + \beta u], \qquad \theta' = \theta - \eta u'.

Every matrix of the recursion :math:`z^2P^{-1} - z\,[P^{-1}+\beta-\eta((1-\beta)H+\lambda)] + \beta` is
symmetric, so the Rayleigh quotients of an eigenvector decide: if :math:`\beta\lambda_{\max}(P) < 1`, the
step is stable exactly if :math:`\lambda_{\max}(Q(H+\Lambda)) \le 2/\eta` with
:math:`Q = (1-\beta)P(1+\beta P)^{-1}` and :math:`\Lambda = \lambda/(1-\beta)`. It is therefore read as
plain gradient descent with the preconditioner Q. If :math:`\beta\lambda_{\max}(P) \ge 1`, as with small
gradients, the updates amplify themselves, and no limit on the sharpness is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.stability.rules.preconditioner import StepPreconditioner, UnknownPreconditioner
from stableopt.stability.rules.readers.param_groups import (
    NOT_STEPPED,
    decay_of,
    params_of,
    step_counts,
)
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["KroneckerPreconditioner", "read_shampoo"]


class KroneckerPreconditioner(StepPreconditioner):
    r"""For each parameter a matrix :math:`U\,\mathrm{diag}(p)\,U^\top`, U a Kronecker product.

    Args:
        params: the parameters.
        bases: for each parameter one orthogonal matrix for each of its dimensions.
        spectra: for each the eigenvalues p in its shape.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        bases: Sequence[Sequence[Tensor]],
        spectra: Sequence[Tensor],
    ) -> None:
        super().__init__(params)
        self._bases, self._spectra = list(bases), list(spectra)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Rotate each tensor into its eigenbasis, scale it there, and rotate it back."""
        images = []
        for tensor, bases, spectrum in zip(tensors, self._bases, self._spectra, strict=True):
            bases = [basis.to(tensor) for basis in bases]
            image = _along_each(tensor, [basis.T for basis in bases]) * spectrum.to(tensor)
            images.append(_along_each(image, bases))
        return images

    def over(self, params: Sequence[Tensor]) -> KroneckerPreconditioner:
        """Return the blocks of ``params``."""
        at = self._places(params)
        return KroneckerPreconditioner(
            params, [self._bases[i] for i in at], [self._spectra[i] for i in at]
        )


@torch.no_grad()
def read_shampoo(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch_optimizer.Shampoo``."""
    groups, params = optimizer.param_groups, params_of(optimizer)
    counts = step_counts(optimizer)
    lr = max(float(group["lr"]) for group in groups)
    bases, spectra, feedback = [], [], 0.0
    for group in groups:
        beta = float(group["momentum"])
        for p in group["params"]:
            inverses = _inverses(optimizer, p) if id(p) in counts else []
            spectrum = torch.ones_like(p) if id(p) in counts else torch.zeros_like(p)
            rotations = []
            for dim, inverse in enumerate(inverses):
                values, vectors = torch.linalg.eigh((inverse + inverse.T) / 2)
                spectrum = spectrum * values.view([-1] + [1] * (p.dim() - 1 - dim))
                rotations.append(vectors)
            if beta:
                feedback = max(feedback, beta * float(spectrum.max()))
            bases.append(rotations)
            rate = float(group["lr"]) / lr if lr else 1.0
            spectra.append(rate * (1 - beta) * spectrum / (1 + beta * spectrum))
    preconditioner: StepPreconditioner = KroneckerPreconditioner(params, bases, spectra)
    if not counts:
        reason = NOT_STEPPED.format("Shampoo")
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    elif not feedback < 1:
        reason = (
            "Shampoo multiplies its momentum by its preconditioner, which makes it grow by itself:"
            f" momentum times the largest eigenvalue is {feedback:.3g}, expected below 1; raise"
            " epsilon, or leave the momentum out"
        )
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    return UpdateRule(
        lr=lr,
        **decay_of([float(g["weight_decay"]) / (1 - float(g["momentum"])) for g in groups]),
        preconditioner=preconditioner,
    )


def _inverses(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    return [optimizer.state[p][f"inv_precond_{dim}"] for dim in range(p.dim())]


def _along_each(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return the tensor, multiplied by one matrix along each dimension."""
    for dim, matrix in enumerate(matrices):
        tensor = torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)
    return tensor
