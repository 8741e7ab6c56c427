r"""`Recorder`: the heads and slopes of every use of a parameter, recorded in one pass of a model.

The recorder sees every call of a torch function that takes a parameter, within modules or by hand. To
outputs of calls with a known structure (:mod:`~stableopt.curvature.layers.calls`) it adds offsets of
zero: the gradient in an offset is the slope :math:`\delta` there, as a differentiable function. Any
other call is made for all samples at once, vectorised, with copies of the parameter for each of them.
What depends on parameters alone, such as a position bias looked up in a table, is computed from the
copies where it meets the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
"""Takes the recorder and the arguments of a function; see :mod:`~stableopt.curvature.layers.calls`."""

_OPAQUE = (F.multi_head_attention_forward,)
"""Functions that hide their samples in a dimension other than the first."""


@dataclass(frozen=True)
class Part:
    """One use of one parameter.

    Attributes:
        parameter: its index in the problem.
        kind: how the output depends on it.
        head: which of the recorded heads the output is linear in, or ``None``.
        slope: which of the recorded offsets its slope belongs to.
    """

    parameter: int
    kind: Kind
    head: int | None
    slope: int


class _Call(NamedTuple):
    """A call whose results depend on parameters, but not on samples."""

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

    def __init__(self, way: Plan, theta: Theta, size: int, calls: Mapping[Any, Call]) -> None:
        super().__init__()
        self.size = size
        self.parts: list[Part] = []
        self.heads: list[Tensor] = []
        self.offsets: list[Tensor] = []
        self._way, self._theta, self._known_calls = way, theta, calls
        # Tensors are held for as long as their ids are used.
        self._index = {id(t): i for i, t in enumerate(theta)}
        self._derived: dict[int, _Call] = {}
        self._sources: dict[int, frozenset[int]] = {
            key: frozenset((i,)) for key, i in self._index.items()
        }
        self._copied: dict[int, Tensor] = {}
        self._known_heads: dict[int, int] = {}
        self._paused = self._again = False
        self._calls = self._decided = 0
        self._in_unit = False
        self._name = ""
        self._given: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record a call that takes a parameter."""
        kwargs = kwargs or {}
        if self._again:
            return function(*args, **kwargs)
        self._calls += 1
        if (
            self._paused
            or not self._takes_parameter((args, kwargs))
            or not torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
        ):
            return function(*args, **kwargs)
        self._name, self._given = getattr(function, "__name__", ""), tensors_of((args, kwargs))
        known = self._known_calls.get(function)
        found = NotImplemented if known is None else known(self, *args, **kwargs)
        return self.any_call(function, args, kwargs) if found is NotImplemented else found

    def _takes_parameter(self, given: Any) -> bool:
        if isinstance(given, Tensor):
            return id(given) in self._sources
        if isinstance(given, tuple | list):
            return any(map(self._takes_parameter, given))
        return isinstance(given, dict) and any(map(self._takes_parameter, given.values()))

    def known(self, tensor: Tensor | None) -> bool:
        """Whether the tensor is a parameter, or was computed from parameters alone."""
        return tensor is not None and id(tensor) in self._sources

    def parameter(self, tensor: Tensor) -> int | None:
        """Return the index of a parameter, or of that which ``tensor`` is a reshaped view of."""
        found = self._alias(tensor)
        return None if found is None or found[1] else found[0]

    def matrix(self, tensor: Tensor) -> tuple[int, bool] | None:
        """Return the index of a parameter, and whether the matrix ``tensor`` is its transpose."""
        return self._alias(tensor) if tensor.dim() == 2 else None

    def _alias(self, tensor: Tensor) -> tuple[int, bool] | None:
        if id(tensor) in self._index:
            return self._index[id(tensor)], False
        sources = self._sources[id(tensor)]
        if len(sources) > 1:
            return None
        (index,) = sources
        leaf = self._theta[index]
        same = tensor.data_ptr() == leaf.data_ptr() and tensor.numel() == leaf.numel()
        if not same or tensor.dtype != leaf.dtype or not leaf.is_contiguous():
            return None
        if tensor.is_contiguous():
            return index, False
        return (index, True) if tensor.dim() == 2 and tensor.mT.is_contiguous() else None

    def leads(self, name: str, *tensors: Tensor) -> list[bool]:
        """Return which arguments of the present call have rows of the samples, as the trial found."""
        number, self._decided = self._decided, self._decided + 1
        decisions = self._way.decisions
        if number == len(decisions):
            decisions.append((name, [self._has_rows(t) for t in tensors]))
        before, found = decisions[number]
        fits = before == name and len(found) == len(tensors)
        pairs = zip(found, tensors, strict=False)
        if not fits or any(lead and (t.dim() == 0 or t.shape[0] % self.size) for lead, t in pairs):
            raise UnfitError("the model calls other functions for other samples")
        return found

    def _has_rows(self, tensor: Tensor) -> bool:
        if tensor.dim() == 0 or tensor.shape[0] % self.size:
            return False
        if self._in_unit:
            return len(tensor) == self.size
        if self._way.seen is None:
            return True
        number = self._calls - 1
        name, rows = self._way.seen[number] if number < len(self._way.seen) else ("", [])
        if name != self._name:
            raise UnfitError(f"the model calls {self._name} for some samples alone")
        places = [place for place, known in enumerate(self._given) if known is tensor]
        # Others are made from these within the call.
        return rows[places[0]] if places else True

    def head(self, tensor: Tensor) -> int:
        """Record a head, and return its number."""
        number = self._known_heads.setdefault(id(tensor), len(self.heads))
        if number == len(self.heads):
            self.heads.append(tensor)
        return number

    def use(self, parameter: int, kind: Kind, head: int | None, slope: int, way: str) -> None:
        """Record a use of a parameter."""
        self.parts.append(Part(parameter, kind, head, slope))
        self._way.ways[parameter].add(way)

    def offset(self, output: Tensor) -> tuple[Tensor, int]:
        """Return ``output`` plus an offset, and the number of the offset."""
        zeros = output.new_zeros(()).expand(output.shape).requires_grad_()
        self.offsets.append(zeros)
        return output + zeros, len(self.offsets) - 1

    def copies(self, tensor: Tensor, way: str = "vmap") -> Tensor:
        """Return ``(n, *shape)``: a parameter, or what was computed from some, for each sample."""
        key = id(tensor)
        if key in self._index:
            self._way.ways[self._index[key]].add(way)
            self._way.copied.add(self._index[key])
        if key in self._copied:
            return self._copied[key]
        if key in self._index:
            copies, number = self.offset(tensor.expand(self.size, *tensor.shape))
            self.parts.append(Part(self._index[key], Copies(), None, number))
            self._copied[key] = copies
        else:
            call = self._derived[key]
            results = self._vectorised(call.function, call.args, call.kwargs, way=way)[0]
            for plain, result in zip(call.results, results, strict=True):
                self._copied[id(plain)] = result
        return self._copied[key]

    def any_call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Make a call without a known structure."""
        tensors = tensors_of((args, kwargs))
        others = [t for t in tensors if not self.known(t)]
        name = getattr(function, "__name__", "")
        if function in _LIKE and not self.known(tensors[0]):
            return function(*args, **kwargs)
        leads = self.leads(name, *others) if others else []
        sources = frozenset[int]().union(*(self._sources[id(t)] for t in tensors if self.known(t)))
        if not any(leads):
            found = function(*args, **kwargs)
            results = tensors_of(found)
            if not any(t.requires_grad for t in results):
                return found
            if function in _SPREADING and len(tensors) == 1:
                spread = self._spread(name, tensors[0], results[0])
                if spread is not None:
                    return spread
            if function in _OPAQUE or any(t.requires_grad for t in others):
                raise UnitError(f"{name} was not called with a batch", set(sources))
            call = _Call(function, args, kwargs, results)
            for result in results:
                self._derived[id(result)] = call
                self._sources[id(result)] = sources
            return found
        if function in _OPAQUE:
            raise UnitError(f"{name} is not known", set(sources))
        mapped = {id(t) for t, lead in zip(others, leads, strict=True) if lead}
        try:
            results, rebuilt = self._vectorised(_out_of_place(function), args, kwargs, mapped)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:  # vmap cannot follow the function
            raise UnitError(str(error), set(sources)) from error
        if any(t.dim() < 2 for t in results):
            raise UnitError(f"{name} did not return a batch", set(sources))
        return rebuilt([t.flatten(0, 1) for t in results])

    def _spread(self, name: str, given: Tensor, result: Tensor) -> Tensor | None:
        """Return copies for what was repeated for all samples, such as a class token."""
        added = result.dim() - given.dim()
        if added == 0 and given.shape[0] != 1:
            return None
        self._given.append(result)
        if not self.leads(name, result)[0]:
            return None
        rows = given.shape[1:] if added == 0 else given.shape
        places = [1] * (result.dim() - 1 - len(rows))
        try:
            return self.copies(given).reshape(self.size, *places, *rows).expand(result.shape)
        except RuntimeError as error:  # repeated in other dimensions too
            raise UnitError(str(error), set(self._sources[id(given)])) from error

    def _vectorised(
        self, function: Any, args: Any, kwargs: Any, mapped: Any = (), way: str = "vmap"
    ) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
        """Call a function for each sample at once; return the tensors, and how to put others for them.

        Tensors in ``mapped``, by their ids, are cut into the samples' rows.
        """
        leaves, spec = tree_flatten((args, kwargs))
        given, dims = list[Tensor](), list[int | None]()
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                apart = self.known(leaf) or id(leaf) in mapped
                dims.append(0 if apart else None)
                if self.known(leaf):
                    leaf = self.copies(leaf, way)
                elif apart:
                    leaf = leaf.reshape(self.size, -1, *leaf.shape[1:])
                given.append(leaf)
        shape: list[Any] = []

        def one(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own_args, own_kwargs = tree_unflatten(filled, spec)
            found, found_spec = tree_flatten(function(*own_args, **own_kwargs))
            shape[:] = [found, found_spec]
            return tuple(t for t in found if isinstance(t, Tensor))

        results = list(quiet_vmap(one, tuple(dims), *given))

        def rebuilt(tensors: Sequence[Tensor]) -> Any:
            rest = iter(tensors)
            found, found_spec = shape
            return tree_unflatten(
                [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in found], found_spec
            )

        return results, rebuilt

    def enter_unit(self, module: nn.Module, args: Any) -> None:
        """Stop recording within a unit."""
        self._paused = self._in_unit = True

    def leave_unit(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Call a unit again, for each sample."""
        self._again, size = True, self.size
        named = module.named_parameters(remove_duplicate=False)
        owned = {name: self.copies(t) for name, t in named if id(t) in self._index}
        given = list(tensors_in((args, kwargs)))
        mapped = self.leads(type(module).__name__, *given)
        if not any(mapped) or not all(
            t.shape[0] == size for t, lead in zip(given, mapped, strict=True) if lead
        ):
            raise UnfitError(f"{type(module).__name__} was not called with a batch")

        def one(own: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            rest = iter(t.unsqueeze(0) if m else t for t, m in zip(tensors, mapped, strict=True))
            own_args, own_kwargs = map_tensors(lambda _: next(rest), (args, kwargs))
            found = functional_call(module, own, own_args, own_kwargs)
            return tuple(t.squeeze(0) for t in tensors_in(found))

        dims = (dict.fromkeys(owned, 0), *(0 if m else None for m in mapped))
        found = quiet_vmap(one, dims, owned, *given)
        self._again = self._paused = self._in_unit = False
        fresh = iter(found)
        return map_tensors(lambda _: next(fresh), output)


_LIKE = frozenset(
    (
        Tensor.to,
        Tensor.type_as,
        Tensor.view_as,
        Tensor.expand_as,
        Tensor.reshape_as,
        Tensor.new_tensor,
    )
)
"""Functions that take from another tensor what it is like, but none of its values."""


_SPREADING = frozenset((Tensor.expand, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to))
"""Functions that repeat a tensor."""


def _out_of_place(function: Any) -> Any:
    """Return the function without the effect on its first argument, which is one of all samples."""
    name = getattr(function, "__name__", "")
    if name.startswith("__i") and name.endswith("__"):
        return getattr(Tensor, f"__{name[3:]}", function)
    if name.endswith("_") and not name.endswith("__"):
        return getattr(Tensor, name[:-1], function)
    return function
