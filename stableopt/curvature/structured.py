r"""Per-sample Hessian products at the price of a few batched passes, from the structure of layers.

In a layer z = W a + b the gradient of sample i's loss is the outer product :math:`\delta_i a_i^\top`,
:math:`\delta_i` its gradient in z. Its derivative along v, that block of :math:`w_i = H_i v`, has rank
two, :math:`\dot\delta_i a_i^\top + \delta_i \dot a_i^\top`. What is wanted,

.. math:: \sum_i H_i (w_i - \bar w)
    = \nabla_\theta \sum_i \langle w_i - \bar w, \nabla f_i(\theta)\rangle,

is one backward pass from all :math:`a_i` and :math:`\delta_i`, with cotangents that follow from
:math:`a_i, \delta_i, \dot a_i, \dot\delta_i` layer by layer (:mod:`~stableopt.curvature.forms`). So an
exact product costs a constant number of batched passes, whatever n is. Whatever lies between the
layers is autograd's business. It applies where samples do not see each other.

Both the mean :math:`\bar w` over all samples and the product need the passes at theta: they are kept
from product to product for as many chunks as the memory allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.batches import map_tensors, tensors_in
from stableopt.curvature.forms import PLAIN, Form, Uses
from stableopt.curvature.layers import Kind, Layer, Plan, UnfitError, plan
from stableopt.curvature.passes import KeptPasses
from stableopt.curvature.per_sample import loop_product
from stableopt.curvature.problem import Problem, Theta
from stableopt.curvature.pull import pull

__all__ = ["StructuredProduct", "UnfitError"]


_CHECKED_SAMPLES = 3

_AGREES = 0.02
"""Relative difference up to which two ways of one product agree: a ReLU that rounding flips
moves a product in single precision by some 1e-3, and a structure that does not hold by all of it."""


@dataclass(frozen=True)
class _Part:
    """One use of one parameter: where its input and slope are, and how they are laid out."""

    parameter: int
    form: Form
    head: int | None
    slope: int
    kind: Kind | None
    module: nn.Module | None


@dataclass(frozen=True)
class Passes:
    """A chunk's passes at theta.

    ``transposed`` are the gradients in theta of the sum of all <a, u> + <delta, w>. They are linear
    in the dummies u and w, so their derivative in the dummies along a tangent is the tangent of a
    and delta, without forward mode.
    """

    size: int
    parts: list[_Part]
    heads: list[Tensor]
    slopes: list[Tensor]
    dummies: list[Tensor]
    transposed: tuple[Tensor | None, ...]


class _Recorder:
    """Inserts offsets of zero behind the layers of one pass, and takes down what passes there."""

    def __init__(self, way: Plan, theta: Theta, size: int) -> None:
        self.size = size
        self.parts: list[_Part] = []
        self.heads: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self._inside_unit = False
        self._mapped = way.mapped
        self.theta = list(theta)
        for i in way.expanded:
            self.theta[i] = self._copies(theta[i][0], i)

    def _offset(self, like: Tensor) -> int:
        self.offsets.append(torch.zeros_like(like, requires_grad=True))
        return len(self.offsets) - 1

    def _copies(self, parameter: Tensor, index: int) -> Tensor:
        """Return a parameter for each sample, and take its gradients down."""
        copies = parameter.expand(self.size, *parameter.shape)
        number = self._offset(copies)
        self.parts.append(_Part(index, PLAIN, None, number, None, None))
        return copies + self.offsets[number]

    def hook(self, layer: Layer) -> Callable[..., Any]:
        """Return the forward hook for ``layer``."""
        if layer.kind is None:
            return lambda module, args, kwargs, output: self._unit(layer, args, kwargs, output)
        return lambda module, args, kwargs, output: self._layer(layer, args, kwargs, output)

    def _layer(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Tensor:
        kind, module = layer.kind, layer.module
        if kind is None or len(args) != 1 or kwargs or not isinstance(output, Tensor):
            raise UnfitError(f"{type(module).__name__} was called with more than one input")
        head = None
        if "weight" in layer.indices:
            self.heads.append(kind.head(module, args[0], self.size))
            head = len(self.heads) - 1
        slope = self._offset(output)
        for name, index in layer.indices.items():
            form = kind.weight if name == "weight" else PLAIN
            where = head if name == "weight" else None
            self.parts.append(_Part(index, form, where, slope, kind, module))
        return output + self.offsets[slope]

    def _unit(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Any:
        if self._inside_unit:
            return None
        module, size = layer.module, self.size
        state = dict(module.named_parameters())
        owned = {name: self._copies(state[name], i) for name, i in layer.indices.items()}
        given = list(tensors_in((args, kwargs)))
        # Tensors that do not lead with the samples, such as masks, are the same for all of them.
        # Which do was settled when the plan was tried: by chance others have as many rows.
        leads = [t.dim() > 0 and t.shape[0] == size for t in given]
        mapped = self._mapped.setdefault(id(module), leads)
        fits = len(mapped) == len(leads) and any(mapped)
        if not fits or not all(lead for lead, m in zip(leads, mapped, strict=True) if m):
            raise UnfitError(f"{type(module).__name__} was not called with a batch")

        def one(own: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(t.unsqueeze(0) if m else t for t, m in zip(tensors, mapped, strict=True))
            own_args, own_kwargs = map_tensors(lambda _: next(rest), (args, kwargs))
            found = functional_call(module, own, own_args, own_kwargs)
            return tuple(t.squeeze(0) for t in tensors_in(found))

        dims = (dict.fromkeys(owned, 0), *(0 if m else None for m in mapped))
        self._inside_unit = True
        try:
            found = torch.vmap(one, in_dims=dims, randomness="same")(owned, *given)
        finally:
            self._inside_unit = False
        fresh = iter(found)
        return map_tensors(lambda _: next(fresh), output)


def linearise(problem: Problem, way: Plan, theta: Theta, batch: Any, size: int) -> Passes:
    """Return the passes over a chunk of ``size`` samples at ``theta``.

    Raises:
        UnfitError: if a layer was called in a way that its structure does not cover.
    """
    recorder = _Recorder(way, theta, size)
    with ExitStack() as hooks:
        for layer in way.layers:
            handle = layer.module.register_forward_hook(recorder.hook(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        loss = size * problem.loss(tuple(recorder.theta), batch)
    slopes = list(
        torch.autograd.grad(loss, recorder.offsets, create_graph=True, materialize_grads=True)
    )
    found = [*recorder.heads, *slopes]
    # Row numbers of a table have no tangent, but keep their place.
    dummies = [torch.zeros_like(t, dtype=slopes[0].dtype).requires_grad_() for t in found]
    live = [(t, dummy) for t, dummy in zip(found, dummies, strict=True) if t.requires_grad]
    if not live:
        return Passes(size, recorder.parts, recorder.heads, slopes, dummies, (None,) * len(theta))
    outputs, cotangents = zip(*live, strict=True)
    transposed = torch.autograd.grad(
        outputs, theta, cotangents, create_graph=True, allow_unused=True
    )
    return Passes(size, recorder.parts, recorder.heads, slopes, dummies, transposed)


class _Chunk:
    """A chunk's passes and its tangents along one vector: the uses of each parameter."""

    def __init__(self, passes: Passes, tangent: Sequence[Tensor]) -> None:
        self.passes = passes
        found = pull(passes.transposed, passes.dummies, tangent)
        count = len(passes.heads)
        self._head_tangents = [
            _materialised(dot, head) if head.requires_grad else None
            for dot, head in zip(found[:count], passes.heads, strict=True)
        ]
        self._slope_tangents = [
            _materialised(dot, slope)
            for dot, slope in zip(found[count:], passes.slopes, strict=True)
        ]

    def by_parameter(self) -> Iterator[tuple[int, Form, list[_Part], list[Uses]]]:
        """Yield each parameter with its form and its uses."""
        grouped: dict[int, list[_Part]] = defaultdict(list)
        for part in self.passes.parts:
            grouped[part.parameter].append(part)
        for index, parts in sorted(grouped.items()):
            if any(part.form is not parts[0].form for part in parts):
                raise UnfitError("a parameter is used by layers of two kinds")
            yield index, parts[0].form, parts, [self._uses(part) for part in parts]

    def _uses(self, part: _Part) -> Uses:
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


def _materialised(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found


def _joined(uses: Sequence[Uses]) -> Uses:
    """Return several uses as one, position after position."""
    if len(uses) == 1:
        return uses[0]
    dots = [use.input_tangents for use in uses]
    inputs = [use.inputs for use in uses]
    if any(dot is not None for dot in dots):
        # One of them looked at the data, the other at what depends on theta.
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
    chunk: _Chunk, theta: Theta, scale: Sequence[Tensor | float], mean: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the sum of :math:`H_i (D^2 w_i - m)` over the chunk, for each parameter."""
    passes = chunk.passes
    along_heads: list[Tensor | None] = [None] * len(passes.heads)
    along_slopes: list[Tensor | None] = [None] * len(passes.slopes)
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
    return pull([*passes.heads, *passes.slopes], theta, [*along_heads, *along_slopes])


def _add(to: list[Tensor | None], where: int, term: Tensor) -> None:
    before = to[where]
    to[where] = term if before is None else before + term


class StructuredProduct:
    """Products with the covariance of the per-sample Hessians, for a problem whose layers allow it.

    Args:
        problem: the problem, without weight decay.
        theta: the point.
        memory: bytes that the passes at theta may take.

    Raises:
        UnfitError: where it does not apply: some parameter has no layer, or a product of three
            samples differs from the plain one.
    """

    def __init__(self, problem: Problem, theta: Theta, memory: int) -> None:
        self._problem, self._theta = problem, theta
        self._squares = [factor**2 for factor in problem.scale]
        self._plan = self._found_fit()
        self._passes = KeptPasses(problem, self._linearised, memory=memory, kind="structured")

    @property
    def ways(self) -> dict[str, str]:
        """How each parameter goes, by name."""
        return self._plan.ways

    def _found_fit(self) -> Plan:
        """Return the plan; find out, once for a problem, whether it holds."""
        found = self._problem.memo.get("structured")
        if found is None:
            try:
                found = self._tried()
            except UnfitError as error:
                found = error
            self._problem.memo["structured"] = found
        if isinstance(found, UnfitError):
            raise UnfitError(str(found))
        assert isinstance(found, Plan)
        return found

    def _tried(self) -> Plan:
        """Compare with the plain product on a few samples."""
        problem, theta = self._problem, self._theta
        way = plan(problem)
        if way is None:
            raise UnfitError("some parameters are not in a layer that is called with a batch")
        self._plan = way
        generator = torch.Generator(problem.device).manual_seed(0)
        vector = torch.randn(
            problem.num_params, generator=generator, dtype=problem.dtype, device=problem.device
        )
        zero = torch.zeros_like(vector)
        with problem.evaluation():
            batch, size = next(problem.chunks(_CHECKED_SAMPLES))
            chunk = _Chunk(self._linearised(batch, size), problem.unflatten(vector))
            mean = problem.unflatten(zero)
            found = problem.flatten(_pulled(chunk, theta, self._squares, mean))
            expected = loop_product(problem, theta, batch, size, vector, zero)
        if not bool((found - expected).norm() <= _AGREES * expected.norm()):
            raise UnfitError("the samples see each other, or a weight is used outside of its layer")
        return way

    def _linearised(self, batch: Any, size: int) -> Passes:
        try:
            return linearise(self._problem, self._plan, self._theta, batch, size)
        except (UnfitError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:  # vmap cannot follow a module
            raise UnfitError(str(error)) from error

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``, in one reading of the data."""
        problem = self._problem
        tangents = [problem.unflatten(vector) for vector in vectors]
        with problem.evaluation():
            count, totals = 0, [torch.zeros_like(vector) for vector in vectors]
            kept: list[list[_Chunk]] = []
            for number, (passes, size) in enumerate(self._passes):
                chunks = [_Chunk(passes, tangent) for tangent in tangents]
                for total, chunk in zip(totals, chunks, strict=True):
                    total += problem.flatten(_sum_of_products(chunk, problem.shapes))
                count += size
                if number < self._passes.keepable:
                    kept.append(chunks)
            means = [problem.unflatten(total / count) for total in totals]
            results = [torch.zeros_like(vector) for vector in vectors]
            for number, (passes, _) in enumerate(self._passes):
                known = number < len(kept)
                chunks = kept[number] if known else [_Chunk(passes, t) for t in tangents]
                for result, chunk, mean in zip(results, chunks, means, strict=True):
                    result += problem.flatten(_pulled(chunk, self._theta, self._squares, mean))
        return [result / count for result in results]
