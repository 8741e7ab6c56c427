"""The covariance of the per-sample Hessians as an operator."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from stableopt.curvature import structured
from stableopt.curvature.batches import cut
from stableopt.curvature.operators import Hessian, Operator
from stableopt.curvature.per_sample import (
    MEMORY,
    ChunkProduct,
    loop_product,
    samples_at_once,
    vmap_product,
)
from stableopt.curvature.problem import Problem, Theta

__all__ = ["NonUniformity"]

Method = Literal["auto", "structured", "vmap", "loop"]

_WORTH_VMAP = 16
"""Samples at once below which the overhead of vmap outweighs what it saves."""

_CHECKED_SAMPLES = 3

_AGREES = 0.02
"""Relative difference up to which two ways of one product agree: a ReLU that rounding flips
moves a product in single precision by some 1e-3, and a structure that does not hold by all of it."""


class NonUniformity(Operator):
    r"""The covariance of the per-sample Hessians, :math:`\Sigma = \frac1n\sum_i H_i^2 - H^2`.

    The square root of its largest eigenvalue is the non-uniformity s (Wu, Ma & E, 2018, section 3).
    A product is :math:`\Sigma v = \frac1n\sum_i H_i(H_i v - Hv)`: exact, positive semi-definite up
    to rounding, and in memory that does not grow with n.

    Args:
        problem: what it is the non-uniformity of.
        method: ``"structured"`` takes a few gradients whatever n is, where all parameters are those
            of fully connected layers; ``"vmap"`` takes many samples at once, ``"loop"`` one at a time,
            for any module. ``"auto"`` picks the first that applies, by the size of the model between
            the last two, and has checked the structured one against the loop on three samples.
        memory: bytes that the samples taken at once by ``"vmap"`` may need.

    Raises:
        ValueError: for arguments out of range, and ``"structured"`` where it does not apply.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # f_i = x_i^2 w^2, H_i = 2 x_i^2
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> sigma = NonUniformity(problem)
    >>> sigma @ torch.ones(1).double(), sigma.method         # variance of 2 and 8
    (tensor([9.], dtype=torch.float64), 'structured')
    """

    def __init__(self, problem: Problem, *, method: Method = "auto", memory: int = MEMORY) -> None:
        if method not in ("auto", "structured", "vmap", "loop"):
            raise ValueError(f"method={method!r}: expected 'auto', 'structured', 'vmap' or 'loop'")
        if memory < 1:
            raise ValueError(f"memory={memory}: expected a positive number of bytes")
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem = problem
        # Weight decay adds the same matrix to every H_i, so it is no part of their covariance.
        self._hessian = Hessian(problem.without_weight_decay())
        self._theta = self._hessian.theta
        self._at_once = max(1, samples_at_once(problem, memory))
        self._layers: list[structured.Layer] = []
        self._kept: structured.LayerPasses | None = None
        self._may_fall_back = method == "auto"
        self.method: str = self._chosen(method)

    def _chosen(self, method: Method) -> str:
        """Return the way that products go, and prepare it."""
        if method in ("auto", "structured"):
            layers = structured.linear_layers(self.problem)
            if layers is not None and self._holds(layers):
                self._layers = layers
                return "structured"
            if method == "structured":
                raise ValueError(
                    "method='structured': expected a model whose parameters are all weights and"
                    " biases of nn.Linear layers, each called once with one row a sample"
                )
        if method == "auto":
            return "vmap" if self._at_once >= _WORTH_VMAP else "loop"
        return method

    def _holds(self, layers: list[structured.Layer]) -> bool:
        """Whether the structured product is the plain one: on a few samples, by trying it."""
        problem, theta = self.problem, self._theta
        generator = torch.Generator(self.device).manual_seed(0)
        vector = torch.randn(
            self.shape[0], generator=generator, dtype=self.dtype, device=self.device
        )
        zero = torch.zeros_like(vector)
        with problem.evaluation():
            batch, size = next(problem.chunks())
            size = min(size, _CHECKED_SAMPLES)
            batch = cut(batch, 0, size)
            try:
                passes = structured.linearise(problem, layers, theta, batch, size)
            except structured.UnfitError:
                return False
            found = self._structured(layers, passes, vector, zero)
            expected = loop_product(problem, theta, batch, size, vector, zero)
        return bool((found - expected).norm() <= _AGREES * expected.norm())

    def _structured(
        self,
        layers: list[structured.Layer],
        passes: structured.LayerPasses,
        vector: Tensor,
        mean: Tensor | None,
    ) -> Tensor:
        """Return the sum over a chunk; ``mean=None`` stands for the chunk's own."""
        problem = self.problem
        tangents = structured.tangents_along(passes, problem.unflatten(vector))
        if mean is None:
            mean = problem.flatten(structured.mean_from(layers, passes, tangents))
        subtracted = problem.unflatten(mean)
        return problem.flatten(
            structured.product_from(
                layers, self._theta, passes, tangents, subtracted, problem.scale
            )
        )

    def product(self, vector: Tensor) -> Tensor:
        """Return ``Sigma @ vector`` for ``(d,)``."""
        if self.method == "structured" and self.problem.one_chunk:
            return self._structured_at_once(vector)
        mean = self._hessian.product(vector)
        if self.method == "structured":
            return self._sum(self._structured_chunk, vector, mean, None)
        if self.method == "vmap":
            try:
                return self._sum(vmap_product, vector, mean, self._at_once)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if not self._may_fall_back:
                    raise
                self.method = "loop"
        return self._sum(loop_product, vector, mean, None)

    def _structured_at_once(self, vector: Tensor) -> Tensor:
        # As for the Hessian, the passes at theta are kept; and they have the mean too.
        problem = self.problem
        with problem.evaluation():
            if self._kept is None:
                batch, size = next(problem.chunks())
                self._kept = structured.linearise(problem, self._layers, self._theta, batch, size)
            total = self._structured(self._layers, self._kept, vector, None)
        return total / self._kept.size

    def _structured_chunk(
        self, problem: Problem, theta: Theta, batch: Any, size: int, vector: Tensor, mean: Tensor
    ) -> Tensor:
        passes = structured.linearise(problem, self._layers, theta, batch, size)
        return self._structured(self._layers, passes, vector, mean)

    def _sum(
        self, chunk_product: ChunkProduct, vector: Tensor, mean: Tensor, chunk_size: int | None
    ) -> Tensor:
        problem = self.problem
        total, count = torch.zeros_like(vector), 0
        with problem.evaluation():
            for batch, size in problem.chunks(chunk_size):
                total += chunk_product(problem, self._theta, batch, size, vector, mean)
                count += size
        return total / count
