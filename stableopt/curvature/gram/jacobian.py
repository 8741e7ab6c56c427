r"""`sample_rows`: rows whose outer products are the per-sample Gauss–Newton matrices.

With :math:`J_i` the Jacobian ``(C, d)`` of the outputs for sample i and :math:`L_i` the second
derivative of its loss in them, :math:`G_i = J_i^\top L_i J_i = \hat J_i^\top \hat J_i` for
:math:`\hat J_i = L_i^{1/2} J_i`: C rows a sample. For squared loss :math:`L_i` is a number, for
cross-entropy :math:`\mathrm{diag}(\pi) - \pi\pi^\top`; here autograd computes it.
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
"""Relative size of a negative eigenvalue of the loss's second derivative that exceeds rounding."""


def check_outputs(problem: Problem) -> None:
    """Raise unless each sample of ``problem`` has rows of its own, apart from the loss.

    Raises:
        ValueError: if outputs and loss are not separate, or samples see each other.
        SecondDerivativeError: if the loss may have no second derivative.
    """
    problem.check_samples("a Gauss–Newton matrix of samples")
    problem.check_twice()
    if problem.of_loss:
        raise ValueError(
            f"params: {', '.join(problem.of_loss[:3])} belong to the loss, and the model's outputs do"
            " not depend on them, as Gauss–Newton matrices need: leave them out for this quantity"
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
    # With gradients, since a model may differentiate in forward, as for forces from energies.
    outputs = _checked(problem.outputs(theta, batch), size).detach()

    def loss(flat: Tensor, sample: Any) -> Tensor:
        return problem.loss_of_outputs(flat.view(1, *outputs.shape[1:]), sample)

    def one(sample: Any, flat: Tensor) -> Any:
        # Reverse over reverse: the forward mode of torch's own mse_loss raises.
        return torch.func.jacrev(torch.func.grad(loss))(flat, sample)

    def one_alone(sample: Any, flat: Tensor) -> Any:
        at = flat.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at, sample), at, create_graph=True)
        rows = [vjp([entry], [at], [torch.ones_like(entry)])[0] for entry in slope]
        return torch.stack([torch.zeros_like(at) if row is None else row for row in rows])

    second = over_samples(one, one_alone, batch, size, outputs.reshape(size, -1)).double()
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    if bool((values[:, 0] < -_INDEFINITE * values[:, -1].abs()).any()):
        raise ValueError(
            f"loss_fn: its second derivative in the outputs has the eigenvalue"
            f" {float(values.min()):.3g}; expected a loss that is convex in them and is minimised,"
            " since the mean-square recursion is taken in the Gauss–Newton form"
        )
    # The root of a rounding error would be much larger than the error.
    floor = values.shape[1] * torch.finfo(outputs.dtype).eps * values[:, -1:]
    kept = torch.where(values > floor, values, 0.0)
    roots: Tensor = (vectors * kept.sqrt().unsqueeze(1)) @ vectors.mT
    return roots


def sample_rows(problem: Problem, theta: Theta, batch: Any, size: int) -> list[Tensor]:
    r"""Return :math:`\hat J_i` of a chunk, in the problem's coordinates: for each parameter
    ``(size, C, numel)``.

    Call it inside :meth:`Problem.evaluation`. Memory is that of ``size * C`` gradients.

    Raises:
        ValueError, TypeError: as :func:`curvature_roots`.
    """
    roots = curvature_roots(problem, theta, batch, size)

    def outputs(at: Theta, sample: Any) -> Tensor:
        found: Tensor = problem.outputs(at, sample)
        return found.flatten()

    def one(sample: Any, root: Tensor) -> list[Tensor]:
        # Indexed, since the type of vjp allows for an auxiliary output as well.
        passes = torch.func.vjp(lambda at: outputs(at, sample), theta)
        (gradients,) = torch.vmap(passes[1])(root.to(passes[0]))
        return list(gradients)

    def one_alone(sample: Any, root: Tensor) -> list[Tensor]:
        found = outputs(theta, sample)
        rows = [
            torch.autograd.grad(
                found, theta, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for row in root.to(found)
        ]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    found = over_samples(one, one_alone, batch, size, roots)
    scaled = zip(found, problem.scale, strict=True)
    return [(part.detach() * factor).reshape(*part.shape[:2], -1) for part, factor in scaled]


def pushed_rows(problem: Problem, theta: Theta, batch: Any, size: int, basis: Tensor) -> Tensor:
    r"""Return :math:`\hat J_i Q` ``(size, C, k)`` in double precision, for ``basis`` Q ``(d, k)``.

    Takes one derivative along each column, so that only the basis itself grows with d.

    Raises:
        ValueError, TypeError: as :func:`curvature_roots`.
    """
    roots = curvature_roots(problem, theta, batch, size)
    outputs = _checked(problem.outputs(theta, batch), size)
    forward, columns = DoubleVjp([outputs], theta), []
    for vector in basis.unbind(1):
        (pushed,) = forward.jvp(problem.unflatten(vector))
        pushed = torch.zeros_like(outputs) if pushed is None else pushed
        columns.append(pushed.reshape(size, -1).double())
    if not columns:  # an empty basis
        return roots.new_zeros(size, roots.shape[1], 0, dtype=torch.float64)
    return roots @ torch.stack(columns, dim=2)


def _checked(outputs: Any, size: int) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}: the Gauss–Newton matrix needs one output"
            " tensor"
        )
    if outputs.is_complex():
        raise TypeError(
            "the model returned complex outputs: Gauss–Newton matrices need real ones, such as"
            " torch.view_as_real of them"
        )
    if outputs.dim() == 0 or outputs.shape[0] != size:
        raise TypeError(
            f"the model returned shape {tuple(outputs.shape)} for {size} samples: expected {size} rows"
        )
    return outputs
