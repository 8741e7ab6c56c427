r"""`sample_rows`: Jacobian rows whose outer products sum to per-sample Gauss–Newton matrices.

With :math:`J_i` the Jacobian ``(C, d)`` of the outputs for sample i and :math:`L_i` the second
derivative of its loss in them, :math:`G_i = J_i^\top L_i J_i = \hat J_i^\top \hat J_i` for
:math:`\hat J_i = L_i^{1/2} J_i`, C rows per sample. :math:`L_i` is a number for squared loss and
:math:`\mathrm{diag}(\pi) - \pi\pi^\top` for cross-entropy; autograd computes it for any loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import DoubleVjp, vjp
from stableopt.curvature.problem.over_chunks import over_samples
from stableopt.curvature.problem.problem import Problem, Theta

__all__ = ["check_outputs", "curvature_roots", "pushed_rows", "sample_rows"]

_INDEFINITE = 1e-4
"""Relative size from which a negative eigenvalue of the loss's second derivative is not rounding."""


def check_outputs(problem: Problem) -> None:
    """Check that each sample of ``problem`` has its own Jacobian rows.

    Raises:
        ValueError: if outputs and loss are not separate, or samples depend on each other.
        SecondDerivativeError: if the loss may have no second derivative.
    """
    problem.check_samples("a Gauss–Newton matrix of samples")
    problem.check_twice()
    if problem.names_in_loss:
        raise ValueError(
            f"params: {', '.join(problem.names_in_loss[:3])} belong to the loss. Gauss–Newton matrices"
            " need parameters that the model's outputs depend on: leave these out for this quantity"
        )
    if problem.loss_fn is None:
        raise ValueError(
            "problem: the Gauss–Newton matrix needs the model's outputs apart from the loss; build it"
            " as Problem(model, loss_fn, data)"
        )


def curvature_roots(problem: Problem, theta: Theta, batch: Any, size: int) -> Tensor:
    r"""Return :math:`L_i^{1/2}` for each sample, ``(n, C, C)``, symmetric and in double precision.

    Raises:
        ValueError: if the loss is not convex in the outputs.
        TypeError: for a model that does not return one tensor with a row for each sample.
    """
    check_outputs(problem)
    # Not under no_grad: a model may differentiate in its forward pass, such as forces from energies.
    outputs = _check_output_tensor(problem.outputs(theta, batch), size).detach()

    def loss(flat: Tensor, sample: Any) -> Tensor:
        return problem.loss_of_outputs(flat.view(1, *outputs.shape[1:]), sample)

    def second_derivative(sample: Any, flat: Tensor) -> Any:
        # Reverse over reverse: torch's mse_loss does not support forward mode.
        return torch.func.jacrev(torch.func.grad(loss))(flat, sample)

    def second_derivative_without_vmap(sample: Any, flat: Tensor) -> Any:
        point = flat.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(point, sample), point, create_graph=True)
        rows = [vjp([entry], [point], [torch.ones_like(entry)])[0] for entry in slope]
        return torch.stack([torch.zeros_like(point) if row is None else row for row in rows])

    flat_outputs = outputs.reshape(size, -1)
    second = over_samples(
        second_derivative, second_derivative_without_vmap, batch, size, flat_outputs
    ).double()
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    if bool((values[:, 0] < -_INDEFINITE * values[:, -1].abs()).any()):
        raise ValueError(
            f"loss_fn: its second derivative in the outputs has the eigenvalue"
            f" {float(values.min()):.3g}; expected a loss that is convex in the outputs and is"
            " minimised, as Gauss–Newton matrices need"
        )
    # Rounding errors are set to zero: their square roots would be much larger.
    floor = values.shape[1] * torch.finfo(outputs.dtype).eps * values[:, -1:]
    kept = torch.where(values > floor, values, 0.0)
    roots: Tensor = (vectors * kept.sqrt().unsqueeze(1)) @ vectors.mT
    return roots


def sample_rows(problem: Problem, theta: Theta, batch: Any, size: int) -> list[Tensor]:
    r"""Return :math:`\hat J_i` of a chunk, ``(size, C, numel)`` for each parameter.

    They are in the problem's coordinates and take the memory of ``size * C`` gradients. Call it inside
    :meth:`Problem.evaluation`.

    Raises:
        ValueError, TypeError: as :func:`curvature_roots`.
    """
    roots = curvature_roots(problem, theta, batch, size)

    def flat_outputs(point: Theta, sample: Any) -> Tensor:
        outputs: Tensor = problem.outputs(point, sample)
        return outputs.flatten()

    def rows(sample: Any, root: Tensor) -> list[Tensor]:
        # Indexed, not unpacked: torch types the result of vjp as possibly a triple.
        pair = torch.func.vjp(lambda point: flat_outputs(point, sample), theta)
        (gradients,) = torch.vmap(pair[1])(root.to(pair[0]))
        return list(gradients)

    def rows_without_vmap(sample: Any, root: Tensor) -> list[Tensor]:
        outputs = flat_outputs(theta, sample)
        gradients = [
            torch.autograd.grad(
                outputs, theta, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for row in root.to(outputs)
        ]
        return [torch.stack(parts) for parts in zip(*gradients, strict=True)]

    unscaled = over_samples(rows, rows_without_vmap, batch, size, roots)
    return [
        (part.detach() * factor).reshape(*part.shape[:2], -1)
        for part, factor in zip(unscaled, problem.scale, strict=True)
    ]


def pushed_rows(problem: Problem, theta: Theta, batch: Any, size: int, basis: Tensor) -> Tensor:
    r"""Return :math:`\hat J_i Q` ``(size, C, k)`` in double precision, for ``basis`` Q ``(d, k)``.

    This takes one derivative along each column. Of its memory, only the basis grows with d.

    Raises:
        ValueError, TypeError: as :func:`curvature_roots`.
    """
    roots = curvature_roots(problem, theta, batch, size)
    outputs = _check_output_tensor(problem.outputs(theta, batch), size)
    jacobian, columns = DoubleVjp([outputs], theta), []
    for vector in basis.unbind(1):
        (pushed,) = jacobian.jvp(problem.unflatten(vector))
        pushed = torch.zeros_like(outputs) if pushed is None else pushed
        columns.append(pushed.reshape(size, -1).double())
    if not columns:  # an empty basis
        return roots.new_zeros(size, roots.shape[1], 0, dtype=torch.float64)
    return roots @ torch.stack(columns, dim=2)


def _check_output_tensor(outputs: Any, size: int) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}: the Gauss–Newton matrix needs one output"
            " tensor"
        )
    if outputs.is_complex():
        raise TypeError(
            "the model returned complex outputs: Gauss–Newton matrices need real outputs, such as"
            " torch.view_as_real(outputs)"
        )
    if outputs.dim() == 0 or outputs.shape[0] != size:
        raise TypeError(
            f"the model returned shape {tuple(outputs.shape)} for {size} samples: expected {size} rows"
        )
    return outputs
