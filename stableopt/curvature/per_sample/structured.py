r"""`StructuredProduct`: products with the covariance of per-sample Hessians, from a few batched passes.

In a layer z = W a + b the gradient of sample i's loss is the outer product :math:`\delta_i a_i^\top`,
:math:`\delta_i` its gradient in z. Its derivative along v, that block of :math:`w_i = H_i v`, has rank
two, :math:`\dot\delta_i a_i^\top + \delta_i \dot a_i^\top`. The product

.. math:: \sum_i H_i (w_i - \bar w)
    = \nabla_\theta \sum_i \langle w_i - \bar w, \nabla f_i(\theta)\rangle,

is one backward pass from all :math:`a_i` and :math:`\delta_i`, with cotangents that follow from
:math:`a_i, \delta_i, \dot a_i, \dot\delta_i` layer by layer
(:mod:`~stableopt.curvature.layers.bilinear`). An exact product therefore takes a constant number of
batched passes for every n. Autograd differentiates everything between the layers. No sample may depend
on another.

Both the mean :math:`\bar w` over all samples and the product need the passes at theta. The passes of as
many chunks as fit into memory are cached between products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.plan import Plan, UnitError, rows_seen
from stableopt.curvature.layers.recording import recorded
from stableopt.curvature.per_sample.generic import loop_product
from stableopt.curvature.per_sample.passes import Chunk, Passes, inner_products
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.over_chunks import (
    distinct_samples,
    drawn_samples,
    mean_over_chunks,
)
from stableopt.curvature.products.hessian import Hessian
from stableopt.curvature.products.linearization_cache import LinearizationCache

__all__ = ["StructuredProduct"]

_AGREES = 0.02
"""Relative difference up to which two computations of a product agree: a ReLU that rounding flips
changes a product in single precision by about 1e-3, a wrong structure changes all of it."""

_ROUNDINGS = 1e4
"""Tolerated error of one parameter's part, in rounding errors of the whole product: a flipped ReLU is
that large in single precision."""


@dataclass
class _Trial:
    """The results of comparing the structured product of a problem with the loop's.

    Attributes:
        untested: indices of the parameters whose parts of products have been too small to compare.
        plan: the treatment of every parameter; ``None`` before the first successful trial.
        failure: why the structure does not hold; ``None`` if it may.
    """

    untested: set[int]
    plan: Plan | None = None
    failure: str | None = None


_TRIALS: Memo[_Trial] = Memo()


class StructuredProduct:
    """Products with the covariance of the per-sample Hessians, for models of known layers.

    Args:
        mean: the mean Hessian at the point, of a problem without weight decay.
        memory: bytes of the cache of passes.

    Raises:
        UnfitError: for a parameter without a layer; if the product for samples drawn over the data
            differs from the loop's; if no samples differ enough to compare.
    """

    def __init__(self, mean: Hessian, memory: int | None) -> None:
        self._mean, self._problem = mean, mean.problem
        self._squared_scale = [factor**2 for factor in self._problem.scale]
        self._plan = self._tested_plan()
        self._passes = LinearizationCache(
            self._problem, self._linearise, memory=memory, kind="structured"
        )

    @property
    def ways(self) -> dict[str, str]:
        """The treatment of each parameter, by name."""
        ways = self._plan.ways
        return {
            name: " + ".join(sorted(ways.get(index, ()))) or "unused"
            for index, name in enumerate(self._problem.names)
        }

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self._mean.shape

    @property
    def copied(self) -> int:
        """The number of parameters that are copied for each sample."""
        return sum(self._problem.shapes[i].numel() for i in self._plan.copied)

    def cached_product(self, batch: Any, size: int, vector: Tensor) -> Callable[[], Tensor]:
        """Return a function that computes the sum of the products of some samples, passes cached."""
        problem, passes = self._problem, self._linearise(batch, size)
        tangent = problem.unflatten(vector)

        def product() -> Tensor:
            chunk = Chunk(passes, tangent, self._squared_scale)
            zero = problem.unflatten(torch.zeros_like(vector))
            return problem.flatten(chunk.pull_back(zero))

        return product

    def _tested_plan(self) -> Plan:
        """Return the problem's plan; test it again as long as some parameters are untested."""
        problem = self._problem
        all_indices = set(range(len(problem.params)))
        trial = _TRIALS.of(problem).setdefault("structured", _Trial(untested=all_indices))
        self._plan = trial.plan or Plan()
        if trial.failure is None and (trial.plan is None or trial.untested):
            try:
                tested_here = problem.ranks.raise_together(self._try_plan)
            except UnfitError as error:
                trial.failure = str(error)
            else:
                tested = set[int]().union(*problem.ranks.all_gather_object(tested_here))
                if not tested and trial.plan is None:
                    # Not recorded as a failure: at other parameters, samples may differ.
                    raise UnfitError("no samples differ enough in curvature to check the structure")
                trial.plan = self._plan
                trial.untested -= tested
        if trial.failure is not None:
            raise UnfitError(trial.failure)
        assert trial.plan is not None
        return trial.plan

    def _try_plan(self) -> set[int]:
        """Compare with the loop's product on a few samples; return the indices of tested parameters."""
        problem = self._problem
        if any(p.is_complex() for p in problem.params):
            raise UnfitError("some parameters are complex")
        generator = torch.Generator(problem.device).manual_seed(0)
        vector = torch.randn(
            problem.num_params, generator=generator, dtype=problem.dtype, device=problem.device
        )
        zero = torch.zeros_like(vector)
        with problem.evaluation():
            chosen = distinct_samples(
                drawn_samples(problem),
                lambda sample: loop_product(self._mean, sample, 1, vector, zero),
            )
            if chosen is None:
                return set()
            batch, size = chosen
            rows = None
            if size > 1:
                rows = rows_seen(lambda part: problem.loss(self._mean.theta, part), batch, size)
            self._plan = Plan(rows)
            try:
                return self._compare(batch, size, vector)
            except UnfitError:
                # A mask in a unit may have as many rows as the batch by chance: try one sample fewer.
                if size <= 2 or not self._plan.units:
                    raise
                self._plan = Plan(rows)
                return self._compare(cut(batch, 0, size - 1), size - 1, vector)

    def _compare(self, batch: Any, size: int, vector: Tensor) -> set[int]:
        """Compare with the loop: each sample's :math:`w_i`, then the sum of products, per parameter.

        A wrong :math:`w_i` of one parameter may be a small part of that parameter's sum.
        """
        problem, tangent = self._problem, self._problem.unflatten(vector)
        passes = self._linearise_with_units(batch, size)
        others = problem.unflatten(vector.flip(0))
        structured = inner_products(passes, tangent, others)
        looped = torch.stack(
            [self._sample_inner_products(batch, i, tangent, others) for i in range(size)]
        )
        self._check(structured.unbind(1), looped.unbind(1))
        zero = torch.zeros_like(vector)
        chunk = Chunk(passes, tangent, self._squared_scale)
        product = problem.flatten(chunk.pull_back(problem.unflatten(zero)))
        expected = loop_product(self._mean, batch, size, vector, zero)
        sizes = [shape.numel() for shape in problem.shapes]
        return self._check(torch.split(product, sizes), torch.split(expected, sizes))

    def _sample_inner_products(
        self, batch: Any, index: int, tangent: list[Tensor], others: list[Tensor]
    ) -> Tensor:
        """Return :func:`inner_products` of one sample, from its own passes."""
        passes = self._mean.linearise(cut(batch, index, index + 1), 1)
        pairs = zip(self._mean.chunk_product(passes, tangent), others, strict=True)
        return torch.stack([u.new_zeros(()) if w is None else (w * u).sum() for w, u in pairs])

    def _check(self, computed: Sequence[Tensor], expected: Sequence[Tensor]) -> set[int]:
        """Raise ``UnfitError`` if a parameter's numbers differ.

        Return the indices of the parameters whose numbers are large enough to compare.
        """
        norms = [part.norm() for part in expected]
        errors = [(part - true).norm() for part, true in zip(computed, expected, strict=True)]
        # One host transfer.
        norms_then_errors = torch.stack([*norms, *errors]).tolist()
        norm_of, error_of = norms_then_errors[: len(norms)], norms_then_errors[len(norms) :]
        total_norm = sum(norm**2 for norm in norm_of) ** 0.5
        noise = _ROUNDINGS * torch.finfo(self._problem.dtype).eps * total_norm
        tested = set()
        for index, (norm, error) in enumerate(zip(norm_of, error_of, strict=True)):
            if not error <= _AGREES * norm + noise:
                raise UnfitError(
                    "the samples see each other, or a weight is used outside of its layer"
                )
            if norm > 2 * noise:
                tested.add(index)
        return tested

    def _linearise_with_units(self, batch: Any, size: int) -> Passes:
        """Return the passes, after adding to the plan the modules to call as a whole, its units."""
        while True:
            try:
                return self._linearise(batch, size)
            except UnitError as error:
                units = self._plan.units
                new_units = self._owners(error.parameters)
                new_units = [new for new in new_units if all(new is not unit for unit in units)]
                if not new_units:
                    raise
                inside = {id(m) for unit in new_units for m in unit.modules() if m is not unit}
                outermost = [unit for unit in (*units, *new_units) if id(unit) not in inside]
                self._plan = Plan(self._plan.rows, outermost)

    def _owners(self, parameters: set[int]) -> list[nn.Module]:
        """Return the modules that hold the parameters of these indices, except the model itself."""
        names = {self._problem.names[index].rpartition(".")[0] for index in parameters}
        model = self._problem.model
        return [
            module
            for name, module in model.named_modules()
            if module is not model and name in names
        ]

    def _linearise(self, batch: Any, size: int) -> Passes:
        try:
            with recorded(self._plan, self._mean.theta, size) as recorder:
                return Passes(recorder, self._mean, batch)
        except (UnfitError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:  # vmap does not support a module
            raise UnfitError(str(error)) from error

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``, in one reading of the data."""
        problem, cache = self._problem, self._passes
        tangents = [problem.unflatten(vector) for vector in vectors]
        cached_chunks: list[list[Chunk]] = []
        totals = [torch.zeros_like(vector) for vector in vectors]
        results = [torch.zeros_like(vector) for vector in vectors]

        def first_halves(passes: Passes) -> list[Chunk]:
            return [Chunk(passes, tangent, self._squared_scale) for tangent in tangents]

        def add_totals(passes: Passes, size: int) -> None:
            chunks = first_halves(passes)
            for total, chunk in zip(totals, chunks, strict=True):
                total.add_(problem.flatten(chunk.totals))
            if len(cached_chunks) < cache.capacity:
                cached_chunks.append(chunks)

        def add_results(passes: Passes, size: int) -> None:
            chunks = next(remaining_chunks, None) or first_halves(passes)
            for result, chunk, mean in zip(results, chunks, means, strict=True):
                result.add_(problem.flatten(chunk.pull_back(mean)))

        with problem.evaluation():
            flat_means = mean_over_chunks(problem, totals, add_totals, cache, evaluating=True)
            means = [problem.unflatten(mean) for mean in flat_means]
            remaining_chunks = iter(cached_chunks)
            return mean_over_chunks(problem, results, add_results, cache, evaluating=True)
