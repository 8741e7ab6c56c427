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

For Gauss–Newton, :math:`G_i = J_i^\top L_i J_i`, it is simpler: :math:`w_i = J_i^\top q_i` with
:math:`q_i = L_i J_i v` has rank one in each layer, :math:`\delta_i(q_i)\, a_i^\top`, and
:math:`J_i(w_i - \bar w)` is a forward derivative along offsets behind the layers.

Both the mean :math:`\bar w` over all samples and the product need the passes at theta. They are cached
between products for as many chunks as the memory allows.
"""

from __future__ import annotations

import abc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import DoubleVjp, vjp
from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.bilinear import Form, Uses
from stableopt.curvature.layers.kinds import Plan, plan
from stableopt.curvature.layers.recorder import Part, Recorder, recorded
from stableopt.curvature.per_sample.generic import loop_product
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.mean_loss import Memo
from stableopt.curvature.problem.over_chunks import (
    drawn_samples,
    mean_over_chunks,
    telling_samples,
)
from stableopt.curvature.products.gauss_newton import GaussNewton
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

Tangents = list[Tensor | None]


class _Passes(abc.ABC):
    """A chunk's passes at theta, ready for the two halves of a product.

    ``heads`` and ``slopes`` are a and delta of every layer.
    """

    def __init__(self, recorder: Recorder, slopes: Sequence[Tensor]) -> None:
        self.size, self.parts, self.heads = recorder.size, recorder.parts, recorder.heads
        self.slopes = slopes

    @abc.abstractmethod
    def tangents(self, tangent: Sequence[Tensor]) -> tuple[Tangents, Tangents]:
        """Return the tangents of heads and slopes along v, which make up the :math:`w_i`."""

    @abc.abstractmethod
    def pulled(self, along_heads: Tangents, along_slopes: Tangents) -> tuple[Tensor | None, ...]:
        """Return the second half of the product, from the cotangents of heads and slopes."""


class _HessianPasses(_Passes):
    """The passes for :math:`H_i`."""

    def __init__(self, recorder: Recorder, of: Hessian, batch: Any) -> None:
        loss, theta = recorder.size * of.problem.loss(recorder.theta, batch), of.theta
        slopes = torch.autograd.grad(
            loss, recorder.offsets, create_graph=True, materialize_grads=True
        )
        super().__init__(recorder, slopes)
        self._theta = theta
        found = [*self.heads, *slopes]
        # Row numbers of a table have no tangent, but keep their place, with a dummy of another dtype.
        dummies = [torch.zeros_like(t, dtype=loss.dtype).requires_grad_() for t in found]
        self._forward = DoubleVjp(found, theta, dummies)

    def tangents(self, tangent: Sequence[Tensor]) -> tuple[Tangents, Tangents]:
        found = self._forward.jvp(tangent)
        count = len(self.heads)
        # A head that depends on theta has a cotangent even where its tangent vanishes.
        along_heads = [
            torch.zeros_like(head) if dot is None and head.requires_grad else dot
            for dot, head in zip(found[:count], self.heads, strict=True)
        ]
        return along_heads, list(found[count:])

    def pulled(self, along_heads: Tangents, along_slopes: Tangents) -> tuple[Tensor | None, ...]:
        return vjp([*self.heads, *self.slopes], self._theta, [*along_heads, *along_slopes])


class _GaussNewtonPasses(_Passes):
    """The passes for :math:`G_i`; slopes are linear in a dummy for the cotangent of the outputs."""

    def __init__(self, recorder: Recorder, of: GaussNewton, batch: Any) -> None:
        self._passes = of.linearise(batch, recorder.size, at=recorder.theta)
        offsets = recorder.offsets
        self._along_offsets = DoubleVjp(
            [self._passes.outputs], offsets, self._passes.forward.dummies
        )
        found = zip(self._along_offsets.transposed, offsets, strict=True)
        slopes = [torch.zeros_like(offset) if slope is None else slope for slope, offset in found]
        super().__init__(recorder, slopes)
        self._theta, self._offsets = of.theta, recorder.offsets

    def tangents(self, tangent: Sequence[Tensor]) -> tuple[Tangents, Tangents]:
        bent = self._bent(self._passes.forward.jvp(tangent))
        along_slopes = vjp((self._passes.outputs,), self._offsets, bent)
        return [None] * len(self.heads), list(along_slopes)

    def pulled(self, along_heads: Tangents, along_slopes: Tangents) -> tuple[Tensor | None, ...]:
        bent = self._bent(self._along_offsets.jvp(along_slopes))
        return vjp((self._passes.outputs,), self._theta, bent)

    def _bent(self, pushed: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return L_i times each sample's part; the passes have those of the chunk's mean loss."""
        (bent,) = self._passes.bent(pushed)
        return (None if bent is None else self.size * bent,)


class _Chunk:
    """A chunk's passes and its tangents along one vector: the uses of each parameter."""

    def __init__(self, passes: _Passes, tangent: Sequence[Tensor]) -> None:
        self.passes = passes
        self._head_tangents, slope_tangents = passes.tangents(tangent)
        self._slope_tangents = [
            torch.zeros_like(slope) if dot is None else dot
            for dot, slope in zip(slope_tangents, passes.slopes, strict=True)
        ]

    def by_parameter(self) -> Iterator[tuple[int, Form, list[Part], list[Uses]]]:
        """Yield each parameter with its form and its uses."""
        grouped: dict[int, list[Part]] = defaultdict(list)
        for part in self.passes.parts:
            grouped[part.parameter].append(part)
        for index, parts in sorted(grouped.items()):
            if any(part.form is not parts[0].form for part in parts):
                raise UnfitError("a parameter is used by layers of two kinds")
            yield index, parts[0].form, parts, [self._uses(part) for part in parts]

    def _uses(self, part: Part) -> Uses:
        size, kind, module = self.passes.size, part.kind, part.module
        slope, dot = self.passes.slopes[part.slope].detach(), self._slope_tangents[part.slope]
        if kind is None:
            return Uses(None, slope.reshape(size, -1, 1), None, dot.reshape(size, -1, 1))
        slope, dot = kind.slopes(module, slope, size), kind.slopes(module, dot, size)
        if part.head is None:
            return Uses(None, slope, None, dot)
        head, head_dot = self.passes.heads[part.head].detach(), self._head_tangents[part.head]
        inputs = kind.inputs(module, head, size)
        if head_dot is None:
            return Uses(inputs, slope, None, dot)
        return Uses(inputs, slope, kind.inputs(module, head_dot, size), dot)


def _joined(uses: Sequence[Uses]) -> Uses:
    """Return several uses as one, position after position."""
    if len(uses) == 1:
        return uses[0]
    dots = [use.input_tangents for use in uses]
    inputs = [use.inputs for use in uses]
    if any(dot is not None for dot in dots):
        # The inputs of one use may be data, while those of another depend on theta.
        dots = [
            torch.zeros_like(a) if dot is None and a is not None else dot
            for a, dot in zip(inputs, dots, strict=True)
        ]
    return Uses(
        _concatenated(inputs),
        torch.cat([use.slopes for use in uses], dim=-1),
        _concatenated(dots),
        torch.cat([use.slope_tangents for use in uses], dim=-1),
    )


def _concatenated(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [t for t in tensors if t is not None]
    return torch.cat(known, dim=-1) if known else None


def _sum_of_products(chunk: _Chunk, shapes: Sequence[torch.Size]) -> list[Tensor | None]:
    """Return the sum of :math:`w_i` over the chunk, for each parameter."""
    sums: list[Tensor | None] = [None] * len(shapes)
    for index, form, _, uses in chunk.by_parameter():
        sums[index] = form.total(_joined(uses), shapes[index])
    return sums


def _pulled(
    chunk: _Chunk, scale: Sequence[Tensor | float], mean: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the sum of :math:`H_i (D^2 w_i - m)` over the chunk, for each parameter."""
    passes = chunk.passes
    along_heads: Tangents = [None] * len(passes.heads)
    along_slopes: Tangents = [None] * len(passes.slopes)
    for index, form, parts, uses in chunk.by_parameter():
        found = form.cotangents(_joined(uses), scale[index], mean[index])
        start = 0
        for part, use in zip(parts, uses, strict=True):
            stop = start + use.slopes.shape[-1]
            cotangent = found.slopes[..., start:stop]
            shape = passes.slopes[part.slope].shape
            if part.kind is None or part.module is None:
                _add(along_slopes, part.slope, cotangent.reshape(shape))
            else:
                back = part.kind.slopes_back(part.module, cotangent, shape)
                _add(along_slopes, part.slope, back)
                if part.head is not None and use.input_tangents is not None:
                    assert found.inputs is not None
                    back = part.kind.inputs_back(
                        part.module, found.inputs[..., start:stop], passes.heads[part.head].shape
                    )
                    _add(along_heads, part.head, back)
            start = stop
    return passes.pulled(along_heads, along_slopes)


def _add(to: Tangents, where: int, term: Tensor) -> None:
    before = to[where]
    to[where] = term if before is None else before + term


class StructuredProduct:
    """Products with the covariance of the per-sample curvatures, for models of known layers.

    Args:
        of: the mean curvature, at the point; its problem without weight decay.
        memory: bytes that the passes at the point may take.

    Raises:
        UnfitError: for a parameter without a layer, or if a product of samples drawn over the data
            differs from the loop's, or no samples tell whether it does.
    """

    def __init__(self, of: Hessian | GaussNewton, memory: int | None) -> None:
        self._of, self._problem = of, of.problem
        self._squares = [factor**2 for factor in self._problem.scale]
        kind = f"structured {type(of).__name__}"
        self._plan = self._found_fit(kind)
        self._passes = LinearizationCache(self._problem, self._linearised, memory=memory, kind=kind)

    @property
    def ways(self) -> dict[str, str]:
        """How each parameter is treated, by name."""
        return self._plan.ways

    def _found_fit(self, kind: str) -> Plan:
        """Return the plan, tried until each parameter had a part in a product that tells."""
        problem = self._problem
        every = set(range(len(problem.params)))
        trial = _TRIALS.on(problem).setdefault(kind, _Trial(untested=every))
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
        self._plan = self._planned()
        generator = torch.Generator(problem.device).manual_seed(0)
        vector = torch.randn(
            problem.num_params, generator=generator, dtype=problem.dtype, device=problem.device
        )
        zero = torch.zeros_like(vector)
        with problem.evaluation():
            chosen = telling_samples(
                drawn_samples(problem),
                lambda sample: loop_product(self._of, sample, 1, vector, zero),
            )
            if chosen is None:
                return set()
            batch, size = chosen
            try:
                return self._compared(batch, size, vector)
            except UnfitError:
                # A mask may have as many rows as the batch by chance.
                if size <= 2:
                    raise
                self._plan = self._planned()
                return self._compared(cut(batch, 0, size - 1), size - 1, vector)

    def _planned(self) -> Plan:
        way = plan(self._problem)
        if way is None:
            raise UnfitError("some parameters are not in a layer that is called with a batch")
        return way

    def _compared(self, batch: Any, size: int, vector: Tensor) -> set[int]:
        problem, zero = self._problem, torch.zeros_like(vector)
        chunk = _Chunk(self._linearised(batch, size), problem.unflatten(vector))
        found = problem.flatten(_pulled(chunk, self._squares, problem.unflatten(zero)))
        expected = loop_product(self._of, batch, size, vector, zero)
        sizes = [shape.numel() for shape in problem.shapes]
        # Norms of whole and parts in one host transfer.
        lengths = torch.stack([part.norm() for part in (expected, *torch.split(expected, sizes))])
        pairs = zip(torch.split(found, sizes), torch.split(expected, sizes), strict=True)
        errors = torch.stack([(part - true).norm() for part, true in pairs])
        overall, *numbers = torch.cat([lengths, errors]).tolist()
        noise = _ROUNDINGS * torch.finfo(problem.dtype).eps * overall
        tested = set()
        halves = zip(numbers[: len(sizes)], numbers[len(sizes) :], strict=True)
        for index, (length, error) in enumerate(halves):
            if not error <= _AGREES * length + noise:
                raise UnfitError(
                    "the samples see each other, or a weight is used outside of its layer"
                )
            if length > 2 * noise:
                tested.add(index)
        return tested

    def _linearised(self, batch: Any, size: int) -> _Passes:
        of = self._of
        try:
            with recorded(self._plan, of.theta, size) as recorder:
                if isinstance(of, GaussNewton):
                    return _GaussNewtonPasses(recorder, of, batch)
                return _HessianPasses(recorder, of, batch)
        except (UnfitError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:  # vmap cannot follow a module
            raise UnfitError(str(error)) from error

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``, in one reading of the data."""
        problem, passes_over = self._problem, self._passes
        tangents = [problem.unflatten(vector) for vector in vectors]
        first: list[list[_Chunk]] = []
        totals, results = ([torch.zeros_like(vector) for vector in vectors] for _ in range(2))

        def add_products(passes: _Passes, size: int) -> None:
            chunks = [_Chunk(passes, tangent) for tangent in tangents]
            for total, chunk in zip(totals, chunks, strict=True):
                total.add_(problem.flatten(_sum_of_products(chunk, problem.shapes)))
            if len(first) < passes_over.capacity:
                first.append(chunks)

        def add_results(passes: _Passes, size: int) -> None:
            chunks = next(known, None) or [_Chunk(passes, tangent) for tangent in tangents]
            for result, chunk, mean in zip(results, chunks, means, strict=True):
                result.add_(problem.flatten(_pulled(chunk, self._squares, mean)))

        with problem.evaluation():
            found = mean_over_chunks(problem, totals, add_products, passes_over, evaluating=True)
            means, known = [problem.unflatten(mean) for mean in found], iter(first)
            return mean_over_chunks(problem, results, add_results, passes_over, evaluating=True)
