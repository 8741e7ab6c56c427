r"""Curvature matrices that are never formed: ``operator @ v`` for ``(d,)`` and ``(d, k)``.

An operator is the matrix at one point: the parameters that count are copied when it is built, so it
stays what it was while training moves them. Two examples::

    Hessian(problem) @ v          # H v
    GaussNewton(problem) @ v      # (1/n) sum J_i^T (second derivative of the loss) J_i v
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.autodiff import pull
from stableopt.curvature.problem.data import map_tensors
from stableopt.curvature.problem.problem import Problem, Theta
from stableopt.curvature.products.finite_differences import CentralDifferences
from stableopt.curvature.products.linearization_cache import KeptPasses

__all__ = ["GaussNewton", "Hessian", "MeanOverSamples", "Operator"]


class Operator(abc.ABC):
    """A real symmetric matrix of shape ``(d, d)`` known by its products alone.

    ``operator @ v`` takes ``(d,)`` or ``(d, k)`` of the operator's dtype and device, and raises
    ``ValueError`` for anything else. A subclass defines :meth:`product`.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector: what ``@`` does with the columns of a block.

        A subclass overrides it where several products cost less than one after the other.
        """
        return [self.product(vector) for vector in vectors]

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return the ``numbers`` by which a search with this operator decides.

        They are what this process found, unless a product takes several: then all go by the same.
        """
        return numbers

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.shape[1]:
            raise ValueError(
                f"{type(self).__name__} of shape {self.shape} @ {tuple(vectors.shape)}:"
                f" expected ({self.shape[1]},) or ({self.shape[1]}, k)"
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"{type(self).__name__} is {self.dtype} on {self.device}, but the vector is"
                f" {vectors.dtype} on {vectors.device}: expected the same"
            )
        # Sums begun in an ambient inference mode could not be added to inside an evaluation.
        with torch.inference_mode(False):
            if vectors.dim() == 1:
                return self.product(vectors)
            columns = self.products(vectors.unbind(1))
            return torch.stack(columns, dim=1) if columns else torch.zeros_like(vectors)


class MeanOverSamples(Operator):
    """A mean over samples, plus the problem's weight decay: the point, and the sum over chunks."""

    def __init__(self, problem: Problem, memory: int | None) -> None:
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem = problem
        self.theta = problem.theta()
        self._passes = KeptPasses(problem, self.linearise, memory=memory, kind=type(self).__name__)

    @abc.abstractmethod
    def linearise(self, batch: Any, size: int) -> Any:
        """Return the differentiable passes over ``batch`` at theta, ready for products."""

    @abc.abstractmethod
    def chunk_product(self, passes: Any, tangent: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter."""

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector, in one reading of the data.

        Column by column within a chunk: taken as one vectorised pass, four of them were slower on a
        CPU, by a tenth for fully connected networks and twofold for convolutions.
        """
        problem = self.problem
        tangents = [problem.unflatten(vector) for vector in vectors]
        totals = [torch.zeros_like(vector) for vector in vectors]

        def add() -> int:
            count = 0
            with problem.evaluation():
                for passes, size in self._passes:
                    for total, tangent in zip(totals, tangents, strict=True):
                        total.add_(problem.flatten(self.chunk_product(passes, tangent)), alpha=size)
                    count += size
            return count

        means = problem.ranks.mean(totals, add)
        if any(problem.weight_decay):
            for mean, tangent in zip(means, tangents, strict=True):
                decays = zip(problem.weight_decay, tangent, strict=True)
                mean += problem.flatten([decay * part for decay, part in decays])
        return means

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return ``numbers`` as rank 0 has them."""
        return self.problem.ranks.first(numbers)


class _GradientPasses(NamedTuple):
    """A chunk's loss, and its gradients with their graph, or the batch to take them of anew."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    batch: Any


class Hessian(MeanOverSamples):
    r"""The Hessian :math:`H = \nabla^2 f(\theta)` of the mean loss.

    A product is the gradient of :math:`\langle\nabla f(\theta), v\rangle`, by double
    backpropagation (Pearlmutter, *Fast exact multiplication by the Hessian*, 1994), or where the
    model has no second derivative by central differences of the gradient
    (:mod:`~stableopt.curvature.products.finite_differences`), which take two gradients, four at times. In the
    coordinates of :meth:`Problem.transformed` the matrix is :math:`D(\pm H + \Lambda)D`.

    Args:
        problem: whose Hessian it is.
        memory: bytes that passes kept from product to product may take: by default 1 GiB, and no more
            than a training step where the problem has a ``chunk_size``.

    Attributes:
        differences: how central differences are taken, and how far they can be trusted; ``None``
            for double backpropagation.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, y))   # f = (w_1^2 + 4 w_2^2) / 2
    >>> Hessian(problem) @ torch.eye(2).double()
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        super().__init__(problem, memory)
        self.differences = CentralDifferences() if problem.obstacle else None

    def linearise(self, batch: Any, size: int) -> _GradientPasses:
        """Return the loss of ``batch`` and its gradients, with their graph."""
        loss = self.problem.loss(self.theta, batch)
        if self.differences is not None:
            return _GradientPasses(loss.detach(), (), batch)
        gradients = torch.autograd.grad(loss, self.theta, create_graph=True, allow_unused=True)
        return _GradientPasses(loss.detach(), gradients, None)

    def chunk_product(
        self, passes: _GradientPasses, tangent: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients' derivative along ``tangent``, per parameter."""
        if self.differences is not None:
            return self._differenced(self.differences, passes.batch, tangent)
        return pull(passes.gradients, self.theta, tangent)

    def _differenced(
        self, differences: CentralDifferences, batch: Any, tangent: list[Tensor]
    ) -> tuple[Tensor, ...]:
        shapes = [part.shape for part in tangent]
        norm = float(torch.stack([part.norm() for part in tangent]).norm())
        if norm == 0:
            return tuple(torch.zeros_like(part) for part in tangent)

        def gradient(distance: float) -> Tensor:
            at = tuple(
                (t.detach() + distance / norm * part).requires_grad_()
                for t, part in zip(self.theta, tangent, strict=True)
            )
            # Some modules write to their inputs.
            copied = map_tensors(Tensor.clone, batch)
            loss = self.problem.loss(at, copied)
            found = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
            dense = [g.to_dense() if g.is_sparse else g for g in found]
            return torch.cat([g.reshape(-1) for g in dense])

        size = float(torch.stack([t.detach().norm() for t in self.theta]).norm())
        slopes = torch.split(norm * differences.along(gradient, size), [s.numel() for s in shapes])
        return tuple(part.view(shape) for part, shape in zip(slopes, shapes, strict=True))

    def loss(self) -> float:
        """Return the problem's mean loss at the point: for nothing where the passes are kept."""
        problem, kept = self.problem, self._passes.kept
        missing = sum(size for _, size in kept) < problem.own_samples
        if problem.ranks.sum(missing):
            return problem.value(self.theta, self._passes.chunk_size)
        losses = torch.stack([size * passes.loss.double() for passes, size in kept])
        return problem.ranks.sum(float(losses.sum())) / problem.num_samples


class _OutputPasses(NamedTuple):
    """A chunk's passes for Gauss–Newton: outputs z, J^T u for a dummy u, and the loss's slope."""

    outputs: Tensor
    dummy: Tensor
    pulled: tuple[Tensor | None, ...]
    slope: Tensor
    slope_at: Tensor


class GaussNewton(MeanOverSamples):
    r"""The generalised Gauss–Newton matrix :math:`G = \frac1n\sum_i J_i^\top L_i J_i`.

    :math:`J_i` is the Jacobian of the model's outputs for sample i, :math:`L_i` the second
    derivative of the loss in the outputs (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, 2002). It is positive semi-definite for a convex loss, and equals
    the Hessian where the model is linear or the residuals vanish.

    Args:
        problem: whose matrix it is.
        memory: bytes that passes kept from product to product may take: by default 1 GiB, and no more
            than a training step where the problem has a ``chunk_size``.

    Raises:
        ValueError: for a problem from a batch loss, in which outputs and loss cannot be told apart.
        SecondDerivativeError: for a model that cannot be differentiated twice; it names the module.
        TypeError: for a model that does not return one tensor.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> GaussNewton(Problem(model, torch.nn.MSELoss(), (x, y))) @ torch.ones(2).double()
    tensor([1., 4.], dtype=torch.float64)
    """

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        if problem.loss_fn is None:
            raise ValueError(
                "GaussNewton needs the model's outputs apart from the loss: build the problem as"
                " Problem(model, loss_fn, data)"
            )
        problem.check_twice()
        super().__init__(problem, memory)
        self._loss_fn = problem.loss_fn

    def linearise(self, batch: Any, size: int, at: Theta | None = None) -> _OutputPasses:
        """Return the passes over ``batch``; the model is called with ``at``, functions of theta."""
        outputs = self.problem.outputs(self.theta if at is None else at, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned {type(outputs).__name__}: GaussNewton needs one output tensor"
            )
        # J^T u is linear in u: its gradient along a tangent v is J v, by reverse mode alone.
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, self.theta, dummy, create_graph=True, allow_unused=True
        )
        slope_at = outputs.detach().requires_grad_()
        loss = self.problem.sign * self._loss_fn(slope_at, batch[1])
        (slope,) = torch.autograd.grad(loss, slope_at, create_graph=True)
        return _OutputPasses(outputs, dummy, pulled, slope, slope_at)

    def chunk_product(
        self, passes: _OutputPasses, tangent: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter."""
        pushed = pull(passes.pulled, (passes.dummy,), tangent)
        bent = pull((passes.slope,), (passes.slope_at,), pushed)
        return pull((passes.outputs,), self.theta, bent)
