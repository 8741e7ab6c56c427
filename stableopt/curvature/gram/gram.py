r"""`DualCurvature`: the Gauss–Newton matrices of all samples from one Gram matrix of Jacobians.

The Gauss–Newton matrices of n samples with C outputs each act on a common subspace of at most nC
dimensions, for any number of parameters. Let :math:`\hat J` be the rows :math:`L_i^{1/2}J_i` of all
samples (:mod:`.jacobian`). The Gram matrix :math:`K = \hat J \hat J^\top`, ``(nC, nC)``, determines
linear stability: the mean :math:`G = \frac1n\hat J^\top\hat J` has the eigenvalues of K/n, and in its
eigenbasis sample i's matrix is :math:`F_i^\top F_i` with :math:`K = FF^\top`, :math:`F^\top F =
n\Lambda`. Two examples::

    DualCurvature.from_problem(problem).sharpness
    DualCurvature.from_problem(problem).modes           # eigenvalues, and every sample's factor F_i
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt._support.deprecation import warn_renamed
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.gram.jacobian import check_outputs, pushed_rows, sample_rows
from stableopt.curvature.gram.layer_gram import fully_connected, gram_of_layers
from stableopt.curvature.problem.over_chunks import gather_over_chunks
from stableopt.curvature.problem.problem import Problem, Theta
from stableopt.curvature.products.linearization_cache import MEMORY

__all__ = ["DualCurvature", "Modes", "SampleSizes", "count_outputs", "project", "sample_sizes"]

_COPIES = 3
"""Row-sized tensors alive at once while a chunk of rows is computed."""


@dataclass(frozen=True)
class Modes:
    r"""The eigenvalues of the mean of samples' matrices, and these matrices in its eigenbasis.

    :math:`\frac1n\sum_i F_i^\top F_i = \mathrm{diag}(\text{eigenvalues})`, in double precision.

    Attributes:
        eigenvalues: those of the mean, positive and ascending, ``(r,)``.
        factors: :math:`F_i`, ``(n, C, r)``; sample i's matrix is :math:`F_i^\top F_i`.
    """

    eigenvalues: Tensor
    factors: Tensor

    @classmethod
    def from_factors(cls, factors: Tensor) -> Modes:
        r"""Return the modes of samples with the matrices :math:`A_i^\top A_i`, for A ``(n, C, d)``.

        >>> Modes.from_factors(torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])).eigenvalues.round()
        tensor([1., 1.], dtype=torch.float64)
        """
        n, outputs, d = factors.shape
        if d > n * outputs:
            return DualCurvature.from_factors(factors).modes
        rows = factors.double().flatten(0, 1)
        values, vectors = _positive_part(rows.T @ rows / n)
        return cls(values, (rows @ vectors).view(n, outputs, -1))


@dataclass(frozen=True)
class DualCurvature:
    r"""The Gram matrix :math:`K = \hat J\hat J^\top` of all samples' Gauss–Newton rows.

    Away from interpolation the Gauss–Newton matrix differs from the Hessian. The sharpness differs by at
    most the mean of :math:`\|H_i - G_i\|` over the samples, the non-uniformity by at most the root mean
    square; both are small where the residuals are. See :class:`~stableopt.curvature.GaussNewton` for
    products without K.

    Attributes:
        gram: K ``(nC, nC)`` in double precision; C consecutive rows per sample.
        num_samples: n.

    Raises:
        ValueError: for a matrix that is not square, or whose rows are not a multiple of n.
        NonFiniteError: for a matrix with an infinity or a NaN.

    >>> rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])     # C = 1: H_i = J_i J_i^T
    >>> dual = DualCurvature(rows @ rows.T, num_samples=3)
    >>> round(dual.sharpness, 6), round(dual.non_uniformity**2, 6)
    (1.0, 0.888889)
    """

    gram: Tensor
    num_samples: int

    def __post_init__(self) -> None:
        n, shape = whole("num_samples", self.num_samples), tuple(self.gram.shape)
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] % n or not shape[0]:
            raise ValueError(f"gram has shape {shape}: expected (nC, nC) with n = {n} samples")
        gram = self.gram.detach().double()
        if not bool(torch.isfinite(gram).all()):
            raise NonFiniteError("the Gram matrix of the output Jacobians is not finite")
        object.__setattr__(self, "gram", (gram + gram.T) / 2)

    @classmethod
    def from_problem(cls, problem: Problem, *, memory: int = MEMORY) -> DualCurvature:
        """Compute K at the problem's present parameters, in its coordinates.

        K does not include weight decay, which is part of the update rule.

        Args:
            problem: made of ``(model, loss_fn, data)``.
            memory: most bytes of Jacobian rows, in addition to K. If not all rows fit, each pair of
                chunks of samples is computed separately. Fully connected networks need no rows.

        Raises:
            ValueError: for a problem from a batch loss, or a loss that is not convex in the outputs.
            TypeError: for a model that does not return one tensor with a row for each sample.

        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
        >>> problem = Problem(model, torch.nn.MSELoss(), (x, y))    # L_i = 2
        >>> DualCurvature.from_problem(problem).gram.round()
        tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)
        """
        check_outputs(problem)
        theta, ranks = problem.theta(), problem.ranks
        outputs = count_outputs(problem)
        with problem.evaluation():
            layers = ranks.raise_together(lambda: fully_connected(problem, theta))
            gram = None
            if not ranks.any(layers is None) and layers is not None:
                gram = gram_of_layers(problem, theta, layers)
            if gram is None:
                gram = _gram_of_rows(problem, theta, outputs, _samples_at_once(problem, memory))
        return cls(gram, problem.num_samples)

    @classmethod
    def of(cls, problem: Problem, *, memory: int = MEMORY) -> DualCurvature:
        """Deprecated name of :meth:`from_problem`."""
        warn_renamed("DualCurvature.of", "DualCurvature.from_problem")
        return cls.from_problem(problem, memory=memory)

    @classmethod
    def from_factors(cls, factors: Tensor) -> DualCurvature:
        r"""Return K of samples with the matrices :math:`A_i^\top A_i`, for A ``(n, C, d)``."""
        rows = factors.double().flatten(0, 1)
        return cls(rows @ rows.T, factors.shape[0])

    @classmethod
    def of_factors(cls, factors: Tensor) -> DualCurvature:
        """Deprecated name of :meth:`from_factors`."""
        warn_renamed("DualCurvature.of_factors", "DualCurvature.from_factors")
        return cls.from_factors(factors)

    @property
    def num_outputs(self) -> int:
        """The number C of outputs of a sample."""
        return int(self.gram.shape[0] // self.num_samples)

    @property
    def blocks(self) -> Tensor:
        r"""The samples' own Gram matrices :math:`\hat J_i\hat J_i^\top`, ``(n, C, C)``."""
        n, outputs = self.num_samples, self.num_outputs
        tiled = self.gram.view(n, outputs, n, outputs)
        return torch.stack([tiled[i, :, i] for i in range(n)])

    @cached_property
    def modes(self) -> Modes:
        r"""Eigenvalues of the mean and the samples' factors: :math:`F = \sqrt n\,U\Lambda^{1/2}`."""
        values, vectors = _positive_part(self.gram / self.num_samples)
        factors = vectors * (self.num_samples * values).sqrt()
        return Modes(values, factors.view(self.num_samples, self.num_outputs, -1))

    @property
    def sharpness(self) -> float:
        r"""The largest eigenvalue of the mean, :math:`\lambda_{\max}(K)/n`."""
        values = self.modes.eigenvalues
        return float(values[-1]) if len(values) else 0.0

    @cached_property
    def non_uniformity(self) -> float:
        r"""The root of the largest eigenvalue of :math:`\Sigma = \frac1n\sum_i G_i^2 - G^2`.

        :math:`s^2 = \lambda_{\max}(\frac1n F^\top (K_d - K/n) F)`, :math:`K_d` the block diagonal.
        """
        values, factors = self.modes.eigenvalues, self.modes.factors
        if not len(values):
            return 0.0
        rows = factors.flatten(0, 1)
        block_rows = (self.blocks @ factors).flatten(0, 1)
        covariance = rows.T @ block_rows / self.num_samples - torch.diag(values**2)
        largest = torch.linalg.eigvalsh((covariance + covariance.T) / 2)[-1]
        return float(largest.clamp(min=0).sqrt())


def project(problem: Problem, basis: Tensor) -> Modes:
    """Return the modes of the curvature in the span of ``basis`` ``(d, k)``, with orthonormal columns.

    Raises:
        ValueError, TypeError: as :meth:`DualCurvature.from_problem`.
    """
    theta = problem.theta()

    def rows(batch: Any, size: int) -> Tensor:
        return pushed_rows(problem, theta, batch, size, basis)

    return Modes.from_factors(gather_over_chunks(problem, rows))


@dataclass(frozen=True)
class SampleSizes:
    """Sizes of the samples' own Gauss–Newton matrices.

    Attributes:
        count: the number n of samples.
        largest: the largest eigenvalue of any of the matrices.
        mean_trace: the mean of the traces, which is the trace of the mean.
        mean_square: the mean of the squared Frobenius norms.
    """

    count: int
    largest: float
    mean_trace: float
    mean_square: float


def sample_sizes(problem: Problem, *, memory: int = MEMORY) -> SampleSizes:
    """Return the sizes of single samples' Gauss–Newton matrices, from their rows.

    Raises:
        ValueError, TypeError: as :meth:`DualCurvature.from_problem`.
    """
    theta = problem.theta()

    def eigenvalues(batch: Any, size: int) -> Tensor:
        rows = sample_rows(problem, theta, batch, size)
        blocks = torch.stack([part.double() @ part.double().mT for part in rows]).sum(0)
        values: Tensor = torch.linalg.eigvalsh(blocks).clamp(min=0)
        return values

    values = gather_over_chunks(problem, eigenvalues, _samples_at_once(problem, memory))
    return SampleSizes(
        len(values),
        float(values.max()),
        float(values.sum(1).mean()),
        float(values.square().sum(1).mean()),
    )


def _gram_of_rows(problem: Problem, theta: Theta, outputs: int, at_once: int) -> Tensor:
    """Return K, from the rows of two chunks at a time.

    The ranks broadcast their chunks in turn. Each rank multiplies a broadcast chunk with its own chunks
    that are not before it.
    """
    ranks, size = problem.ranks, problem.num_samples * outputs
    offset = outputs * sum(ranks.all_gather_object(problem.own_samples)[: ranks.rank])
    gram = torch.zeros(size, size, dtype=torch.float64, device=problem.device)

    def local_chunks() -> Iterator[tuple[slice, Any, int]]:
        start = offset
        for batch, count in problem.chunks(at_once):
            stop = start + count * outputs
            yield slice(start, stop), batch, count
            start = stop

    def rows_of(batch: Any, count: int) -> list[Tensor]:
        rows = sample_rows(problem, theta, batch, count)
        _check_rows(rows, outputs)
        return rows

    def next_chunk(chunks: Iterator[tuple[slice, Any, int]]) -> tuple[slice, list[Tensor]] | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        place, batch, count = chunk
        return place, rows_of(batch, count)

    def add_products(other_place: slice, other_rows: list[Tensor]) -> None:
        for place, batch, count in local_chunks():
            if place.start >= other_place.start:
                if place == other_place:
                    block = _inner_products(other_rows, other_rows)
                else:
                    block = _inner_products(rows_of(batch, count), other_rows)
                gram[place, other_place], gram[other_place, place] = block, block.T

    for owner in range(ranks.size):
        chunks = local_chunks() if owner == ranks.rank else iter(())
        while True:
            chunk = ranks.raise_together(partial(next_chunk, chunks))
            bounds = [0, 0] if chunk is None else [chunk[0].start, chunk[0].stop]
            start, stop = ranks.broadcast_object(bounds, owner)
            if start == stop:
                break
            if chunk is None:
                shape = (stop - start) // outputs, outputs
                rows = [theta[0].new_empty(*shape, s.numel()) for s in problem.shapes]
            else:
                rows = chunk[1]
            rows = [ranks.broadcast(part, owner) for part in rows]
            ranks.raise_together(partial(add_products, slice(start, stop), rows))
    return ranks.all_reduce_sum(gram)


def _samples_at_once(problem: Problem, memory: int) -> int:
    """Return how many samples' rows fit into half of ``memory``: two chunks are alive at once."""
    sample_bytes = _COPIES * count_outputs(problem) * problem.num_params * problem.dtype.itemsize
    return max(1, int(memory / (2 * sample_bytes)))


def count_outputs(problem: Problem) -> int:
    """Return the number C of outputs of one sample.

    Raises:
        ValueError: for a problem from a batch loss.
        TypeError: for a model that does not return one tensor with a row for each sample.
    """
    check_outputs(problem)

    def count() -> int:
        with problem.evaluation():
            batch, size = next(problem.chunks(1))
            outputs: Any = problem.outputs(problem.theta(), batch)
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or outputs.shape[0] != size:
            raise TypeError(
                f"the model returned {type(outputs).__name__}: the Gauss–Newton matrix needs one"
                " output tensor with a row for each sample"
            )
        return outputs[0].numel()

    return problem.ranks.raise_together(count)


def _check_rows(rows: list[Tensor], outputs: int) -> None:
    if rows[0].shape[1] != outputs:
        raise ValueError(
            f"the model returned {rows[0].shape[1]} outputs for some samples and {outputs} for"
            " others: expected the same number for all samples"
        )


def _inner_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the rows' inner products, summed over the parameters in double precision."""
    total = left[0].new_zeros((), dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        total = total + a.flatten(0, 1).double() @ b.flatten(0, 1).double().T
    return total


def _positive_part(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of a positive semi-definite matrix whose values exceed rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = len(matrix) * torch.finfo(matrix.dtype).eps * values[-1:].sum()  # 0 for an empty matrix
    kept = values > floor.clamp(min=0)
    return values[kept], vectors[:, kept]
