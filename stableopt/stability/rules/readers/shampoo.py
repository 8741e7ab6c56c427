r"""Readers of Shampoo and SOAP, whose eigenbases are Kronecker products.

``torch_optimizer.Shampoo`` (0.3.0) multiplies the gradient of a parameter of k dimensions along
dimension i by :math:`L_i^{-1/k}` (the paper, Gupta, Koren & Singer, 2018, has :math:`L_i^{-1/2k}`), so
that :math:`P = \bigotimes_i L_i^{-1/k}`. Its momentum is an average with the last *update*, to which P
has already been applied:

.. math:: u' = P\,[(1-\beta)\nabla f + \lambda\theta + \beta u], \qquad \theta' = \theta - \eta u'.

Every matrix of the recursion :math:`z^2P^{-1} - z\,[P^{-1}+\beta-\eta((1-\beta)H+\lambda)] + \beta` is
symmetric, so stability follows from the Rayleigh quotients of an eigenvector. If
:math:`\beta\lambda_{\max}(P) < 1`, the step is stable exactly if
:math:`\lambda_{\max}(Q(H+\Lambda)) \le 2/\eta` with :math:`Q = (1-\beta)P(1+\beta P)^{-1}` and
:math:`\Lambda = \lambda/(1-\beta)`: the rule is gradient descent with the preconditioner Q. If
:math:`\beta\lambda_{\max}(P) \ge 1`, for instance with small gradients, the momentum grows without any
gradient, and no limit on the sharpness is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.preconditioner import StepPreconditioner, UnknownPreconditioner
from stableopt.stability.rules.readers.adaptive import averaged
from stableopt.stability.rules.readers.diagonal import Step, lr_times_decay, stepped_rule
from stableopt.stability.rules.readers.param_groups import (
    NOT_STEPPED,
    decay_of,
    params_of,
    step_counts,
)
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["KroneckerPreconditioner", "read_shampoo", "read_soap"]


class KroneckerPreconditioner(StepPreconditioner):
    r"""A block-diagonal P of blocks :math:`U\,\mathrm{diag}(p)\,U^\top`, each U a Kronecker product.

    Args:
        params: the parameters, one for each block.
        bases: for each parameter one orthogonal matrix per dimension; ``None`` stands for the identity.
        spectra: for each parameter the eigenvalues p, in its shape.
    """

    by_parameter = True

    def __init__(
        self,
        params: Sequence[Tensor],
        bases: Sequence[Sequence[Tensor | None]],
        spectra: Sequence[Tensor],
    ) -> None:
        super().__init__(params)
        self._bases, self._spectra = list(bases), list(spectra)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Rotate each tensor into its eigenbasis, scale it there, and rotate it back."""
        images = []
        for tensor, bases, spectrum in zip(tensors, self._bases, self._spectra, strict=True):
            bases = [None if basis is None else basis.to(tensor) for basis in bases]
            transposed = [None if basis is None else basis.T for basis in bases]
            scaled = _multiply_dims(tensor, transposed) * spectrum.to(tensor)
            images.append(_multiply_dims(scaled, bases))
        return images

    def over(self, params: Sequence[Tensor]) -> KroneckerPreconditioner:
        """Return the blocks of ``params``."""
        indices = self._indices(params)
        return KroneckerPreconditioner(
            params, [self._bases[i] for i in indices], [self._spectra[i] for i in indices]
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
        rate = float(group["lr"]) / lr if lr else 1.0
        for p in group["params"]:
            eigenbases: list[Tensor] = []
            spectrum = torch.zeros_like(p)
            if id(p) in counts:
                eigenbases, spectrum = _eigenbases(optimizer.state[p], p)
            if beta:
                feedback = max(feedback, beta * float(spectrum.max()))
            bases.append(eigenbases)
            spectra.append(rate * (1 - beta) * spectrum / (1 + beta * spectrum))
    preconditioner: StepPreconditioner = KroneckerPreconditioner(params, bases, spectra)
    if not counts:
        reason = NOT_STEPPED.format("Shampoo")
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    elif not feedback < 1:
        reason = (
            "Shampoo multiplies its momentum by its preconditioner, so the momentum grows by itself:"
            f" momentum times the preconditioner's largest eigenvalue is {feedback:.3g}, expected below"
            " 1; raise epsilon, or set momentum=0"
        )
        preconditioner = UnknownPreconditioner(reason, diagonal=False)
    return UpdateRule(
        lr=lr,
        **decay_of([float(g["weight_decay"]) / (1 - float(g["momentum"])) for g in groups]),
        preconditioner=preconditioner,
    )


def _eigenbases(state: dict[str, Any], p: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the eigenvectors of each dimension's matrix, and the eigenvalues of their product."""
    eigenbases = []
    spectrum = torch.ones_like(p)
    for dim in range(p.dim()):
        inverse = state[f"inv_precond_{dim}"]
        values, vectors = torch.linalg.eigh((inverse + inverse.T) / 2)
        spectrum = spectrum * values.view([-1] + [1] * (p.dim() - 1 - dim))
        eigenbases.append(vectors)
    return eigenbases, spectrum


def _multiply_dims(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Return the tensor multiplied by one matrix along each dimension; ``None`` is the identity."""
    for dim, matrix in enumerate(matrices):
        if matrix is None:
            continue
        tensor = torch.tensordot(matrix, tensor, dims=([1], [dim])).movedim(0, dim)
    return tensor


def read_soap(optimizer: Any) -> UpdateRule:
    r"""Read ``pytorch_optimizer.SOAP`` (Vyas et al., 2024): Adam in the eigenbasis Q of Shampoo.

    :math:`P = Q\,\mathrm{diag}\bigl[\sqrt{1-\beta_2^t}/((\sqrt v+\epsilon)(1-\beta_1^t))\bigr]Q^\top`.
    The first call of ``step`` takes no step. Right after a refresh Q is already that of the next step.
    Weight decay follows the step.
    """
    for name in ("merge_dims", "normalize_gradient"):
        if any(group[name] for group in optimizer.param_groups):
            reason = f"SOAP with {name}=True takes steps without a known limit"
            return UpdateRule.unknown_step(optimizer, reason)
    if all(group.get("step", 0) <= 1 for group in optimizer.param_groups):
        preconditioner = UnknownPreconditioner(NOT_STEPPED.format("SOAP"), diagonal=False)
        lr = max(float(group["lr"]) for group in optimizer.param_groups)
        return UpdateRule(lr=lr, preconditioner=preconditioner)

    def spectrum(step: Step) -> Tensor:
        group = step.group
        beta1, beta2 = (float(beta) for beta in group["betas"])
        correction = 1.0
        if group["correct_bias"]:
            steps = step.steps - 1
            correction = (1 - beta2**steps) ** 0.5 / (1 - beta1**steps)
        inverse: Tensor = correction / (step.state["exp_avg_sq"].sqrt() + group["eps"])
        return inverse

    @torch.no_grad()
    def build(
        params: Sequence[Tensor], steps: Sequence[tuple[Step | None, float]]
    ) -> StepPreconditioner:
        spectra, bases = [], []
        for p, (step, factor) in zip(params, steps, strict=True):
            spectra.append(torch.zeros_like(p) if step is None else factor * spectrum(step))
            matrices = [] if step is None else step.state["Q"]
            bases.append([matrix.clone() if len(matrix) else None for matrix in matrices])
        return KroneckerPreconditioner(params, bases, spectra)

    return stepped_rule(
        optimizer,
        build,
        diagonal=False,
        momentum=averaged,
        rate=lambda step: float(step.group["lr"]) * (1 - lr_times_decay(step)),
        decoupled=True,
    )
