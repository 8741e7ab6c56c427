r"""`StructuredProduct`: per-sample curvature products for the price of a few batched passes.

In a layer z = W a + b the gradient of sample i's loss is the outer product :math:`\delta_i a_i^\top`,
:math:`\delta_i` its gradient in z. Its derivative along v, that block of :math:`w_i = H_i v`, has rank
two, :math:`\dot\delta_i a_i^\top + \delta_i \dot a_i^\top`. The product

.. math:: \sum_i H_i (w_i - \bar w)
    = \nabla_\theta \sum_i \langle w_i - \bar w, \nabla f_i(\theta)\rangle,

is one backward pass from all :math:`a_i` and :math:`\delta_i`, with cotangents that follow from
:math:`a_i, \delta_i, \dot a_i, \dot\delta_i` layer by layer
(:mod:`~stableopt.curvature.layers.bilinear`). So an exact product costs a constant number of batched
passes for every n. Autograd differentiates everything between the layers. The samples must not see each
other.

Both the mean :math:`\bar w` over all samples and the product need the passes at theta. They are cached
between products for as many chunks as the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.plan import Plan, UnitError, rows_seen
from stableopt.curvature.layers.recording import recorded
from stableopt.curvature.per_sample.generic import loop_product
from stableopt.curvature.per_sample.passes import Chunk, Passes, inner_products
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.mean_loss import Memo
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
"""Rounding errors of the whole product that the part of one parameter may be off by: a flipped ReLU is
that large in single precision."""


@dataclass
class _Trial:
    """What trials of the structure in a problem have found.

    Attributes:
        untested: indices of the parameters whose part of a product was too small to tell so far.
        plan: the treatment of every parameter, once a trial has tested it.
        failure: why the structure does not hold.
    """

    untested: set[int]
    plan: Plan | None = None
    failure: str | None = None


_TRIALS: Memo[_Trial] = Memo()


class StructuredProduct:
    """Products with the covariance of the per-sample Hessians, for models of known layers.

    Args:
        of: the mean Hessian, at the point; its problem without weight decay.
        memory: bytes that the passes at the point may take.

    Raises:
        UnfitError: for a parameter without a layer, or if a product of samples drawn over the data
            differs from the loop's, or no samples tell whether it does.
    """

    def __init__(self, of: Hessian, memory: int | None) -> None:
        self._of, self._problem = of, of.problem
        self._squares = [factor**2 for factor in self._problem.scale]
        self._plan = self._found_fit()
        self._passes = LinearizationCache(
            self._problem, self._linearised, memory=memory, kind="structured"
        )

    @property
    def ways(self) -> dict[str, str]:
        """How each parameter is treated, by name."""
        ways = self._plan.ways
        names = enumerate(self._problem.names)
        return {name: " + ".join(sorted(ways.get(i, ()))) or "unused" for i, name in names}

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self._of.shape

    @property
    def copied(self) -> int:
        """The number of parameters that have a copy for each sample."""
        return sum(self._problem.shapes[i].numel() for i in self._plan.copied)

    def once(self, batch: Any, size: int, vector: Tensor) -> Callable[[], Tensor]:
        """Return a function for the sum of products of some samples, from their cached passes."""
        problem, passes = self._problem, self._linearised(batch, size)
        tangent = problem.unflatten(vector)

        def product() -> Tensor:
            chunk = Chunk(passes, tangent, self._squares)
            zero = problem.unflatten(torch.zeros_like(vector))
            return problem.flatten(chunk.pulled(zero))

        return product

    def _found_fit(self) -> Plan:
        """Return the plan, tried until each parameter had a part in a product that tells."""
        problem = self._problem
        every = set(range(len(problem.params)))
        trial = _TRIALS.on(problem).setdefault("structured", _Trial(untested=every))
        self._plan = trial.plan or Plan()
        if trial.failure is None and (trial.plan is None or trial.untested):
            try:
                found = problem.ranks.raise_together(self._tried)
            except UnfitError as error:
                trial.failure = str(error)
            else:
                tested = set[int]().union(*problem.ranks.all_gather_object(found))
                if not tested and trial.plan is None:
                    # Not for good: at other parameters they may.
                    raise UnfitError(
                        "no samples differ enough in curvature to tell whether it holds"
                    )
                trial.plan = self._plan
                trial.untested -= tested
        if trial.failure is not None:
            raise UnfitError(trial.failure)
        assert trial.plan is not None
        return trial.plan

    def _tried(self) -> set[int]:
        """Compare with the loop's product on a few samples; return which parameters that tells of."""
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
                lambda sample: loop_product(self._of, sample, 1, vector, zero),
            )
            if chosen is None:
                return set()
            batch, size = chosen
            seen = None
            if size > 1:
                seen = rows_seen(lambda part: problem.loss(self._of.theta, part), batch, size)
            self._plan = Plan(seen)
            try:
                return self._compared(batch, size, vector)
            except UnfitError:
                # A mask of a unit may have as many rows as the batch by chance.
                if size <= 2 or not self._plan.units:
                    raise
                self._plan = Plan(seen)
                return self._compared(cut(batch, 0, size - 1), size - 1, vector)

    def _compared(self, batch: Any, size: int, vector: Tensor) -> set[int]:
        """Compare with the loop, each sample's :math:`w_i` first, in every parameter by itself.

        In the sum of products, a parameter's own :math:`w_i` are a small part of what it receives.
        """
        problem, tangent = self._problem, self._problem.unflatten(vector)
        passes = self._with_units(batch, size)
        others = problem.unflatten(vector.flip(0))
        found = inner_products(passes, tangent, others)
        looped = torch.stack([self._of_sample(batch, i, tangent, others) for i in range(size)])
        self._check(found.unbind(1), looped.unbind(1))
        zero = torch.zeros_like(vector)
        chunk = Chunk(passes, tangent, self._squares)
        product = problem.flatten(chunk.pulled(problem.unflatten(zero)))
        expected = loop_product(self._of, batch, size, vector, zero)
        sizes = [shape.numel() for shape in problem.shapes]
        return self._check(torch.split(product, sizes), torch.split(expected, sizes))

    def _of_sample(
        self, batch: Any, index: int, tangent: list[Tensor], others: list[Tensor]
    ) -> Tensor:
        """Return a sample's :func:`inner_products` by its own passes."""
        of = self._of
        products = of.chunk_product(of.linearise(cut(batch, index, index + 1), 1), tangent)
        pairs = zip(products, others, strict=True)
        return torch.stack([u.new_zeros(()) if w is None else (w * u).sum() for w, u in pairs])

    def _check(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> set[int]:
        """Raise ``UnfitError`` if a parameter's numbers differ; return those large enough to tell."""
        # Norms in one host transfer.
        lengths = [part.norm() for part in expected]
        errors = [(part - true).norm() for part, true in zip(found, expected, strict=True)]
        numbers = torch.stack([*lengths, *errors]).tolist()
        overall = sum(length**2 for length in numbers[: len(lengths)]) ** 0.5
        noise = _ROUNDINGS * torch.finfo(self._problem.dtype).eps * overall
        tested = set()
        halves = zip(numbers[: len(lengths)], numbers[len(lengths) :], strict=True)
        for index, (length, error) in enumerate(halves):
            if not error <= _AGREES * length + noise:
                raise UnfitError(
                    "the samples see each other, or a weight is used outside of its layer"
                )
            if length > 2 * noise:
                tested.add(index)
        return tested

    def _with_units(self, batch: Any, size: int) -> Passes:
        """Return the passes, after finding the modules that are to be called as a whole."""
        while True:
            try:
                return self._linearised(batch, size)
            except UnitError as error:
                units = self._plan.units
                names = {self._problem.names[i] for i in error.parameters}
                more = [
                    module
                    for name, module in self._problem.model.named_modules()
                    if module is not self._problem.model
                    and any(of.rpartition(".")[0] == name for of in names)
                    and all(module is not unit for unit in units)
                ]
                if not more:
                    raise
                more_inside = {id(m) for unit in more for m in unit.modules() if m is not unit}
                kept = [unit for unit in (*units, *more) if id(unit) not in more_inside]
                self._plan = Plan(self._plan.seen, kept)

    def _linearised(self, batch: Any, size: int) -> Passes:
        of = self._of
        try:
            with recorded(self._plan, of.theta, size) as recorder:
                return Passes(recorder, of, batch)
        except (UnfitError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:  # vmap cannot follow a module
            raise UnfitError(str(error)) from error

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``, in one reading of the data."""
        problem, passes_over = self._problem, self._passes
        tangents = [problem.unflatten(vector) for vector in vectors]
        first: list[list[Chunk]] = []
        totals, results = ([torch.zeros_like(vector) for vector in vectors] for _ in range(2))

        def halves(passes: Passes) -> list[Chunk]:
            return [Chunk(passes, tangent, self._squares) for tangent in tangents]

        def add_products(passes: Passes, size: int) -> None:
            chunks = halves(passes)
            for total, chunk in zip(totals, chunks, strict=True):
                total.add_(problem.flatten(chunk.totals))
            if len(first) < passes_over.capacity:
                first.append(chunks)

        def add_results(passes: Passes, size: int) -> None:
            chunks = next(known, None) or halves(passes)
            for result, chunk, mean in zip(results, chunks, means, strict=True):
                result.add_(problem.flatten(chunk.pulled(mean)))

        with problem.evaluation():
            found = mean_over_chunks(problem, totals, add_products, passes_over, evaluating=True)
            means, known = [problem.unflatten(mean) for mean in found], iter(first)
            return mean_over_chunks(problem, results, add_results, passes_over, evaluating=True)
