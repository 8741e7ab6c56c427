r"""`Recorder`: the inputs and slopes of every parameter, recorded in one pass of a model.

The recorder adds offsets of zero to the outputs of the layers of a
:class:`~stableopt.curvature.layers.kinds.Plan`. The gradient in an offset is the slope :math:`\delta`
there, as a differentiable function. A module without a known structure is called again, vectorised over
the samples, with copies of its parameters; a parameter whose first dimension is that of the samples is
copied for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.bilinear import PLAIN, Form
from stableopt.curvature.layers.kinds import Kind, Layer, Plan
from stableopt.curvature.problem.data.batches import map_tensors, tensors_in
from stableopt.curvature.problem.problem import Theta

__all__ = ["Part", "Recorder", "recorded"]


@dataclass(frozen=True)
class Part:
    """One use of one parameter.

    Attributes:
        parameter: its index in the problem.
        form: how the gradient depends on input and slope.
        head: which of the recorded heads its input is, or ``None``.
        slope: which of the recorded offsets its slope belongs to.
        kind: the kind of the layer, which lays out head and slope; ``None`` for a parameter that is
            copied for each sample.
        module: the layer.
    """

    parameter: int
    form: Form
    head: int | None
    slope: int
    kind: Kind | None
    module: nn.Module | None


class Recorder:
    """The record of one pass over ``size`` samples.

    Attributes:
        size: the number of samples.
        theta: the parameters to call the model with.
        parts: the uses of parameters, in the order of the pass.
        heads: the heads that gradients are linear in, with their graphs.
        offsets: the zeros that were added.
    """

    def __init__(self, way: Plan, theta: Theta, size: int) -> None:
        self.size = size
        self.parts: list[Part] = []
        self.heads: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self._inside_unit = False
        self._mapped = way.mapped
        expanded = list(theta)
        for i in way.expanded:
            expanded[i] = self._copies(theta[i][0], i)
        self.theta: Theta = tuple(expanded)

    def hook(self, layer: Layer) -> Callable[..., Any]:
        """Return the forward hook for ``layer``."""
        if layer.kind is None:
            return lambda module, args, kwargs, output: self._unit(layer, args, kwargs, output)
        return lambda module, args, kwargs, output: self._layer(layer, args, kwargs, output)

    def _offset(self, like: Tensor) -> int:
        self.offsets.append(torch.zeros_like(like, requires_grad=True))
        return len(self.offsets) - 1

    def _copies(self, parameter: Tensor, index: int) -> Tensor:
        """Return a copy of a parameter for each sample, and record its gradients."""
        copies = parameter.expand(self.size, *parameter.shape)
        number = self._offset(copies)
        self.parts.append(Part(index, PLAIN, None, number, None, None))
        return copies + self.offsets[number]

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
            self.parts.append(Part(index, form, where, slope, kind, module))
        return output + self.offsets[slope]

    def _unit(self, layer: Layer, args: Any, kwargs: Any, output: Any) -> Any:
        if self._inside_unit:
            return None
        module, size = layer.module, self.size
        state = dict(module.named_parameters())
        owned = {name: self._copies(state[name], i) for name, i in layer.indices.items()}
        given = list(tensors_in((args, kwargs)))
        # Tensors without the samples' dimension, such as masks, are the same for all samples. The trial
        # of the plan decides which they are, since masks may have as many rows by chance.
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


@contextmanager
def recorded(way: Plan, theta: Theta, size: int) -> Iterator[Recorder]:
    """Record the pass inside, in which the model is called once, with the recorder's ``theta``."""
    recorder = Recorder(way, theta, size)
    with ExitStack() as hooks:
        for layer in way.layers:
            handle = layer.module.register_forward_hook(recorder.hook(layer), with_kwargs=True)
            hooks.callback(handle.remove)
        yield recorder
