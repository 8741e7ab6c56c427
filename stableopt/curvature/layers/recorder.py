r"""`Recorder`: records the heads and slopes of every use of a parameter in one pass of a model.

The recorder intercepts every call of a torch function that takes a parameter, inside modules or not. To
the outputs of calls with a known structure (:mod:`~stableopt.curvature.layers.calls`) it adds offsets of
zero: the gradient in an offset is the slope :math:`\delta` there, as a differentiable function. Any
other call is vectorised over the samples by vmap, with one copy of the parameter for each sample. Values
computed from parameters only, such as a position bias looked up in a table, are computed again from the
copies when they are combined with samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from stableopt.curvature.errors import UnfitError
from stableopt.curvature.layers.kinds import Copies, Kind
from stableopt.curvature.layers.plan import Plan, UnitError, tensors_of
from stableopt.curvature.problem.data.batches import map_tensors, tensors_in
from stableopt.curvature.problem.over_chunks import quiet_vmap
from stableopt.curvature.problem.problem import Theta

__all__ = ["Call", "Part", "Recorder"]

Call = Callable[..., Any]
"""A function of the recorder and the call's arguments; see :mod:`~stableopt.curvature.layers.calls`."""

_OPAQUE = (F.multi_head_attention_forward,)
"""Functions that may have the samples in another dimension than the first."""


@dataclass(frozen=True)
class Part:
    """One use of one parameter.

    Attributes:
        parameter: the parameter's index in the problem.
        kind: how the output depends on the parameter.
        head: the index of the recorded head that the output is linear in, or ``None``.
        slope: the index of the recorded offset whose gradient is the slope.
    """

    parameter: int
    kind: Kind
    head: int | None
    slope: int


class _ParameterCall(NamedTuple):
    """A call whose results depend on parameters only, and not on samples."""

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]


class Recorder(TorchFunctionMode):
    """The record of one pass over ``size`` samples.

    Attributes:
        size: the number of samples.
        parts: the uses of parameters, in the order of the pass.
        heads: the heads that outputs are linear in, with their graphs.
        offsets: the zeros that were added.
    """

    def __init__(self, plan: Plan, theta: Theta, size: int, calls: Mapping[Any, Call]) -> None:
        super().__init__()
        self.size = size
        self.parts: list[Part] = []
        self.heads: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self._plan, self._theta, self._structured_calls = plan, theta, calls
        # Keys are ids of tensors that stay alive during the pass.
        self._index_of = {id(t): i for i, t in enumerate(theta)}
        self._parameter_calls: dict[int, _ParameterCall] = {}
        self._sources: dict[int, frozenset[int]] = {
            key: frozenset((i,)) for key, i in self._index_of.items()
        }
        self._copies: dict[int, Tensor] = {}
        self._head_numbers: dict[int, int] = {}
        self._paused = self._replaying = False
        self._num_calls = self._num_decisions = 0
        self._call_name = ""
        self._call_tensors: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record a call that takes a parameter."""
        kwargs = kwargs or {}
        if self._replaying:
            return function(*args, **kwargs)
        self._num_calls += 1
        if (
            self._paused
            or not self._takes_parameter((args, kwargs))
            or not torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
        ):
            return function(*args, **kwargs)
        self._call_name = getattr(function, "__name__", "")
        self._call_tensors = tensors_of((args, kwargs))
        structured = self._structured_calls.get(function)
        if structured is not None:
            output = structured(self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        return self.any_call(function, args, kwargs)

    def _takes_parameter(self, arguments: Any) -> bool:
        if isinstance(arguments, Tensor):
            return id(arguments) in self._sources
        if isinstance(arguments, tuple | list):
            return any(map(self._takes_parameter, arguments))
        return isinstance(arguments, dict) and any(map(self._takes_parameter, arguments.values()))

    def known(self, tensor: Tensor | None) -> bool:
        """Return whether the tensor is a parameter, or was computed from parameters only."""
        return tensor is not None and id(tensor) in self._sources

    def parameter(self, tensor: Tensor) -> int | None:
        """Return the index of the parameter that ``tensor`` is, or is a reshaped view of."""
        alias = self._alias(tensor)
        return None if alias is None or alias[1] else alias[0]

    def matrix(self, tensor: Tensor) -> tuple[int, bool] | None:
        """Return the index of a parameter, and whether the matrix ``tensor`` is its transpose."""
        return self._alias(tensor) if tensor.dim() == 2 else None

    def _alias(self, tensor: Tensor) -> tuple[int, bool] | None:
        """Return the index of the parameter behind a view, and whether the view is its transpose."""
        if id(tensor) in self._index_of:
            return self._index_of[id(tensor)], False
        sources = self._sources[id(tensor)]
        if len(sources) > 1:
            return None
        (index,) = sources
        leaf = self._theta[index]
        same_memory = tensor.data_ptr() == leaf.data_ptr() and tensor.numel() == leaf.numel()
        if not same_memory or tensor.dtype != leaf.dtype or not leaf.is_contiguous():
            return None
        if tensor.is_contiguous():
            return index, False
        return (index, True) if tensor.dim() == 2 and tensor.mT.is_contiguous() else None

    def batch_arguments(self, name: str, *tensors: Tensor) -> list[bool]:
        """Return which of the call's ``tensors`` have sample rows, as decided in the first pass."""
        index = self._num_decisions
        self._num_decisions += 1
        decisions = self._plan.decisions
        if index == len(decisions):
            decisions.append((name, [self._has_rows(t) for t in tensors]))
        decided_name, batched = decisions[index]
        same_call = decided_name == name and len(batched) == len(tensors)
        pairs = zip(batched, tensors, strict=False)
        if not same_call or any(b and (t.dim() == 0 or t.shape[0] % self.size) for b, t in pairs):
            raise UnfitError("the model calls other functions for other samples")
        return batched

    def _has_rows(self, tensor: Tensor) -> bool:
        seen, index = self._plan.rows, self._num_calls - 1
        if not self._paused and seen is not None and seen[index:][:1] == [(self._call_name, [])]:
            raise UnfitError(f"{self._call_name} takes another number of tensors for other samples")
        if tensor.dim() == 0 or tensor.shape[0] % self.size:
            return False
        if self._paused:
            return len(tensor) == self.size
        if seen is None:
            return True
        name, rows = seen[index] if index < len(seen) else ("", [])
        if name != self._call_name:
            raise UnfitError(f"the model calls {self._call_name} only for some samples")
        positions = [i for i, t in enumerate(self._call_tensors) if t is tensor]
        # Tensors that are not arguments were made from them within the call.
        return rows[positions[0]] if positions else True

    def head(self, tensor: Tensor) -> int:
        """Record a head, and return its number."""
        number = self._head_numbers.setdefault(id(tensor), len(self.heads))
        if number == len(self.heads):
            self.heads.append(tensor)
        return number

    def use(self, parameter: int, kind: Kind, head: int | None, slope: int, way: str) -> None:
        """Record a use of a parameter."""
        self.parts.append(Part(parameter, kind, head, slope))
        self._plan.ways[parameter].add(way)

    def offset(self, output: Tensor) -> tuple[Tensor, int]:
        """Return ``output`` plus an offset, and the number of the offset."""
        zeros = output.new_zeros(()).expand(output.shape).requires_grad_()
        self.offsets.append(zeros)
        return output + zeros, len(self.offsets) - 1

    def copies(self, tensor: Tensor, way: str = "vmap") -> Tensor:
        """Return one copy per sample, ``(n, *shape)``, of a parameter or a value computed from some."""
        key = id(tensor)
        index = self._index_of.get(key)
        if index is not None:
            self._plan.ways[index].add(way)
            self._plan.copied.add(index)
        if key in self._copies:
            return self._copies[key]
        if index is not None:
            self._copies[key], slope = self.offset(tensor.expand(self.size, *tensor.shape))
            self.parts.append(Part(index, Copies(), None, slope))
        else:
            call = self._parameter_calls[key]
            results = self._vectorised(call.function, call.args, call.kwargs, way=way)[0]
            for plain, result in zip(call.results, results, strict=True):
                self._copies[id(plain)] = result
        return self._copies[key]

    def any_call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Make a call without a known structure."""
        tensors = tensors_of((args, kwargs))
        others = [t for t in tensors if not self.known(t)]
        name = getattr(function, "__name__", "")
        if function in _METADATA_ONLY and not self.known(tensors[0]):
            return function(*args, **kwargs)
        batched = self.batch_arguments(name, *others) if others else []
        sources = frozenset[int]().union(*(self._sources[id(t)] for t in tensors if self.known(t)))
        if not any(batched):
            output = function(*args, **kwargs)
            results = tensors_of(output)
            if not any(t.requires_grad for t in results):
                return output
            if function in _REPEATING and len(tensors) == 1:
                copies = self._repeated_copies(name, tensors[0], results[0])
                if copies is not None:
                    return copies
            if function in _OPAQUE or any(t.requires_grad for t in others):
                raise UnitError(f"{name} was not called with a batch", set(sources))
            call = _ParameterCall(function, args, kwargs, results)
            for result in results:
                self._parameter_calls[id(result)] = call
                self._sources[id(result)] = sources
            return output
        if function in _OPAQUE:
            raise UnitError(f"{name} has no known structure", set(sources))
        mapped = {id(t) for t, has_rows in zip(others, batched, strict=True) if has_rows}
        try:
            results, rebuild = self._vectorised(_out_of_place(function), args, kwargs, mapped)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:  # vmap does not support it
            raise UnitError(str(error), set(sources)) from error
        if any(t.dim() < 2 for t in results):
            raise UnitError(f"{name} did not return a batch", set(sources))
        return rebuild([t.flatten(0, 1) for t in results])

    def _repeated_copies(self, name: str, tensor: Tensor, result: Tensor) -> Tensor | None:
        """Return copies of a tensor that was repeated for all samples, such as a class token."""
        new_dims = result.dim() - tensor.dim()
        if new_dims == 0 and tensor.shape[0] != 1:
            return None
        self._call_tensors.append(result)
        if not self.batch_arguments(name, result)[0]:
            return None
        row_shape = tensor.shape[1:] if new_dims == 0 else tensor.shape
        ones = [1] * (result.dim() - 1 - len(row_shape))
        try:
            return self.copies(tensor).reshape(self.size, *ones, *row_shape).expand(result.shape)
        except RuntimeError as error:  # repeated in other dimensions too
            raise UnitError(str(error), set(self._sources[id(tensor)])) from error

    def _vectorised(
        self, function: Any, args: Any, kwargs: Any, mapped: Any = (), way: str = "vmap"
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """Call a function by vmap over the samples.

        Tensors in ``mapped``, by their ids, are split into the samples' rows.

        Returns:
            the tensors in the output, and a function that replaces them in the output's structure.
        """
        leaves, spec = tree_flatten((args, kwargs))
        inputs: list[Tensor] = []
        dims: list[int | None] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            if self.known(leaf):
                inputs.append(self.copies(leaf, way))
                dims.append(0)
            elif id(leaf) in mapped:
                inputs.append(leaf.reshape(self.size, -1, *leaf.shape[1:]))
                dims.append(0)
            else:
                inputs.append(leaf)
                dims.append(None)
        output: list[Any] = []

        def of_sample(*tensors: Tensor) -> tuple[Tensor, ...]:
            own_args, own_kwargs = _with_tensors(leaves, spec, tensors)
            output[:] = tree_flatten(function(*own_args, **own_kwargs))
            return tuple(t for t in output[0] if isinstance(t, Tensor))

        results = list(quiet_vmap(of_sample, tuple(dims), *inputs))
        output_leaves, output_spec = output
        return results, lambda tensors: _with_tensors(output_leaves, output_spec, tensors)

    def enter_unit(self, module: nn.Module, args: Any) -> None:
        """Pause the recording inside a unit: a forward pre-hook."""
        if not self._replaying:
            self._paused = True

    def leave_unit(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Call a unit again, by vmap over the samples, and end the pause: a forward hook."""
        if self._replaying:
            return None
        self._replaying, size = True, self.size
        named = module.named_parameters(remove_duplicate=False)
        copies = {name: self.copies(t) for name, t in named if id(t) in self._index_of}
        inputs = list(tensors_in((args, kwargs)))
        mapped = self.batch_arguments(type(module).__name__, *inputs)
        lengths = [t.shape[0] for t, m in zip(inputs, mapped, strict=True) if m]
        if not lengths or any(length != size for length in lengths):
            raise UnfitError(f"{type(module).__name__} was not called with a batch")

        def of_sample(parameters: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            rows = iter(t.unsqueeze(0) if m else t for t, m in zip(tensors, mapped, strict=True))
            own_args, own_kwargs = map_tensors(lambda _: next(rows), (args, kwargs))
            result = functional_call(module, parameters, own_args, own_kwargs)
            return tuple(t.squeeze(0) for t in tensors_in(result))

        dims = (dict.fromkeys(copies, 0), *(0 if m else None for m in mapped))
        results = iter(quiet_vmap(of_sample, dims, copies, *inputs))
        self._replaying = self._paused = False
        return map_tensors(lambda _: next(results), output)


def _with_tensors(leaves: Sequence[Any], spec: Any, tensors: Iterable[Tensor]) -> Any:
    """Return the nested structure of ``leaves`` with ``tensors`` instead of the tensors among them."""
    replacements = iter(tensors)
    filled = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(filled, spec)


_METADATA_ONLY = frozenset(
    (
        Tensor.to,
        Tensor.type_as,
        Tensor.view_as,
        Tensor.expand_as,
        Tensor.reshape_as,
        Tensor.new_tensor,
    )
)
"""Functions that use the shape, dtype or device of another tensor, but not its values."""


_REPEATING = frozenset((Tensor.expand, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to))
"""Functions that repeat a tensor."""


def _out_of_place(function: Any) -> Any:
    """Return the out-of-place twin of a function: its first argument is shared by all samples."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i") and name.endswith("__"):
        return getattr(Tensor, f"__{name[3:]}", function)
    if name.endswith("_") and not name.endswith("__"):
        return getattr(Tensor, name[:-1], function)
    return function
