"""`NonUniformity`: products with the covariance of the per-sample Hessians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.operator import Operator
from stableopt.curvature.per_sample.choice import fastest_method, may_be_slow
from stableopt.curvature.per_sample.generic import (
    VMAP_MEMORY,
    ChunkProduct,
    loop_product,
    samples_at_once,
    vmap_product,
)
from stableopt.curvature.per_sample.structured import StructuredProduct
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.hessian import Hessian

__all__ = ["NonUniformity"]

Method = Literal["auto", "structured", "vmap", "loop"]

_METHODS = ("auto", "structured", "vmap", "loop")


class NonUniformity(Operator):
    r"""The covariance of the per-sample Hessians, :math:`\Sigma = \frac1n\sum_i H_i^2 - H^2`.

    The square root of its largest eigenvalue is the non-uniformity s (Wu, Ma & E, 2018, section 3).
    A product is :math:`\Sigma v = \frac1n\sum_i H_i(H_i v - Hv)`: exact, positive semi-definite up
    to rounding, in memory independent of n.

    Args:
        problem: the mean loss.
        method: ``"structured"`` takes a few gradients for any n. It requires that each torch function
            that uses a parameter is of a known kind (linear map, convolution, normalisation, embedding;
            in a module or called directly), or can be called for one sample at a time. A parameter may
            have several uses. ``"vmap"`` takes many samples at once, ``"loop"`` one at a time, for any
            module. ``"auto"`` prefers the structured method, after checking it against the loop on
            samples drawn over the data. If that does not apply, or copies many parameters for each
            sample, ``"auto"`` times a few samples and takes the fastest method.
        preconditioner: a symmetric positive definite P, anything with ``@`` on ``(d,)``. The matrix
            is then :math:`\frac1n\sum_i H_iPH_i - HPH`, whose largest eigenvalue in P's inner
            product is :math:`s^2` of the preconditioned :math:`P^{1/2}H_iP^{1/2}`:
            ``top_eigenpair(NonUniformity(problem, preconditioner=P), preconditioner=P)``. Products then
            use vmap or the loop; for a diagonal P, :meth:`Problem.transformed` is faster.
        memory: most bytes of products, in addition to the model: by default 1 GiB for cached passes, and
            128 MiB for a vmapped chunk.

    Attributes:
        method: the method in use.
        ways: the treatment of each parameter, by name.

    Raises:
        ValueError: for arguments out of range; for ``"structured"`` if it does not apply, or with a
            preconditioner; for a problem with batch statistics.
        SecondDerivativeError: for a model that cannot be differentiated twice, unless ``method`` is
            ``"loop"`` or ``"auto"``.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # f_i = x_i^2 w^2, H_i = 2 x_i^2
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> sigma = NonUniformity(problem)
    >>> sigma @ torch.ones(1).double()                       # variance of 2 and 8
    tensor([9.], dtype=torch.float64)
    >>> sigma.method, sigma.ways
    ('structured', {'weight': 'linear'})
    """

    def __init__(
        self,
        problem: Problem,
        *,
        method: Method = "auto",
        preconditioner: Any = None,
        memory: int | None = None,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: expected one of {_METHODS}")
        if memory is not None and memory < 1:
            raise ValueError(f"memory={memory}: expected a positive number of bytes")
        if preconditioner is not None and method == "structured":
            raise ValueError(
                "method='structured' with a preconditioner: expected another method, or, for a diagonal"
                " preconditioner, Problem.transformed(scale=...)"
            )
        problem.check_samples("the non-uniformity")
        if problem.obstacle is not None and method == "auto":
            method = "loop"  # finite differences work one sample at a time
        if method != "loop":
            problem.check_twice()
        super().__init__(problem.num_params, problem.dtype, problem.device)
        # Weight decay adds the same matrix to every H_i and cancels in their covariance.
        self.problem = problem.without_weight_decay()
        self._memory = memory
        self._preconditioner = preconditioner
        self._mean = Hessian(self.problem)
        self.inner_product = self._mean.inner_product
        self._structured: StructuredProduct | None = None
        self._may_fall_back = method == "auto"
        if method in ("auto", "structured") and preconditioner is None:
            self._structured = self._try_structured(required=method == "structured")
        faster = self._faster_than_structured() if method == "auto" else None
        if faster is not None:
            self._structured = None
            self._use(faster)
            self.ways = dict.fromkeys(self.problem.names, f"{faster}, faster than structured")
        elif self._structured is not None:
            self.method, self.ways = "structured", dict(self._structured.ways)
        elif method == "auto":
            self._use(self._fastest_unstructured())
        else:
            self._use(method)

    def _try_structured(self, *, required: bool) -> StructuredProduct | None:
        try:
            return StructuredProduct(self._mean, self._memory)
        except UnfitError as error:
            if required:
                raise ValueError(
                    "method='structured': expected a model whose parameters are all in layers of a"
                    f" known kind that are called with a batch; {error}"
                ) from error
        return None

    def _faster_than_structured(self) -> str | None:
        """Return a method that is faster than the structured one, if there is one."""
        if self._structured is None or not may_be_slow(self._structured):
            return None
        method = fastest_method(self._mean, self._vmap_memory, self._structured)
        return None if method == "structured" else method

    def _fastest_unstructured(self) -> str:
        return fastest_method(self._mean, self._vmap_memory, None)

    @property
    def _vmap_memory(self) -> int:
        return VMAP_MEMORY if self._memory is None else self._memory

    def _use(self, method: str) -> None:
        self.method = method
        self.ways = dict.fromkeys(self.problem.names, method)

    def product(self, vector: Tensor) -> Tensor:
        """Return ``Sigma @ vector`` for ``(d,)``."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``Sigma`` times each vector; the structured method reads the data once for all."""
        if self._structured is not None:
            try:
                return self._structured(vectors)
            except UnfitError:
                # The structure held for the samples of its trial, but not for these.
                if not self._may_fall_back:
                    raise
                self._structured = None
                self._use(self._fastest_unstructured())
        return [self._unstructured_product(vector) for vector in vectors]

    def _unstructured_product(self, vector: Tensor) -> Tensor:
        mean = self._mean.product(vector)
        if self.method == "vmap":
            try:
                at_once = max(1, samples_at_once(self.problem, self._vmap_memory))
                return self._mean_over_samples(vmap_product, vector, mean, at_once)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if not self._may_fall_back:
                    raise
                self._use("loop")
        return self._mean_over_samples(loop_product, vector, mean, None)

    def _mean_over_samples(
        self, chunk_product: ChunkProduct, vector: Tensor, mean: Tensor, chunk_size: int | None
    ) -> Tensor:
        problem, total = self.problem, torch.zeros_like(vector)

        def add(batch: Any, size: int) -> None:
            total.add_(chunk_product(self._mean, batch, size, vector, mean, self._precondition))

        return mean_over_chunks(problem, [total], add, problem.chunks(chunk_size))[0]

    def _precondition(self, vector: Tensor) -> Tensor:
        if self._preconditioner is None:
            return vector
        preconditioned: Tensor = self._preconditioner @ vector
        return preconditioned
