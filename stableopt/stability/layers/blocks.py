"""`blocks_of`: the blocks of parameters that ``blocks=`` selects, by default the layers.

Five examples of ``blocks=``::

    None                               # each module that holds parameters, as named_modules names it
    "encoder.*"                        # each module or parameter one level below the encoder
    ["*.attn", model.head]             # several, and modules and parameters themselves
    re.compile(r".*[.]norm[12]")        # a regular expression for the full name
    {"norms": ["*.norm?", "norm"], "rest": "*.mlp"}   # blocks named by the user
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from stableopt._support.arguments import shown

__all__ = ["Block", "Blocks", "blocks_of", "layer_of"]

Part = str | re.Pattern[str] | nn.Module | Tensor
"""A pattern of names, a module or a parameter."""

Blocks = Part | Iterable[Part] | Mapping[str, Part | Iterable[Part]]
"""The type of ``blocks=``."""


@dataclass(frozen=True)
class Block:
    """Parameters that are measured together, such as those of one layer.

    Attributes:
        name: the name of the layer in the model, or the user's.
        indices: the indices of its parameters in the problem, ascending.
    """

    name: str
    indices: tuple[int, ...]


def layer_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter, from the parameter's name.

    >>> layer_of("blocks.3.mlp.weight"), layer_of("scale")
    ('blocks.3.mlp', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def blocks_of(
    model: nn.Module,
    names: Sequence[str],
    params: Sequence[Tensor],
    blocks: Blocks | None = None,
    *,
    strict: bool = True,
) -> tuple[Block, ...]:
    r"""Return the blocks that ``blocks`` selects, in the order of the model.

    In a pattern ``*`` stands for one level of a name, as in the plans of
    ``torch.distributed.tensor.parallel.parallelize_module``. A module stands for all parameters in it
    and its submodules. Blocks may overlap, and need not hold every parameter. A tied parameter counts
    once, in the layer that the model lists first; patterns match each of its names.

    Args:
        model: the model.
        names: names of the measured parameters.
        params: the measured parameters.
        blocks: a pattern, a compiled regular expression, a module or a parameter; or several of these,
            one block for each match; or a mapping from a block's name to its parts. By default one
            block for each module that holds parameters directly.
        strict: whether a part that selects no parameter is an error; else it is left out.

    Raises:
        ValueError: for a part that selects no measured parameter, and for an empty selection.
        TypeError: for a part of another type.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    >>> names, params = zip(*model.named_parameters())
    >>> [block.name for block in blocks_of(model, names, params)]
    ['0', '1.0', '1.1']
    >>> blocks_of(model, names, params, "*")
    (Block(name='0', indices=(0, 1)), Block(name='1', indices=(2, 3, 4, 5)))
    >>> blocks_of(model, names, params, {"weights": ["*.weight", "*.*.weight"]})
    (Block(name='weights', indices=(0, 2, 4)),)
    """
    lookup = _Lookup(model, names, params)
    members: dict[str, set[int]] = {}
    if isinstance(blocks, Mapping):
        for name, parts in blocks.items():
            if not isinstance(name, str):
                raise TypeError(f"blocks: the name {name!r} is not a string")
            for _, indices in lookup.matches(parts, strict=strict):
                members.setdefault(name, set()).update(indices)
    elif blocks is not None:
        for name, indices in lookup.matches(blocks, strict=strict):
            members.setdefault(name, set()).update(indices)
    if not members and blocks is not None and strict:
        raise ValueError(f"blocks={blocks!r} is empty: expected None for each layer")
    if not members:
        for index, name in enumerate(names):
            members.setdefault(layer_of(name), set()).add(index)
    if not isinstance(blocks, Mapping):
        members = dict(sorted(members.items(), key=lambda item: min(item[1])))
    return tuple(Block(name, tuple(sorted(indices))) for name, indices in members.items())


def _listed(parts: Any) -> list[Part]:
    if isinstance(parts, (str, re.Pattern, nn.Module, Tensor)):
        return [parts]
    if not isinstance(parts, Iterable):
        raise TypeError(
            f"blocks: {shown(parts)}: expected a pattern, a module, a parameter, or several of them"
        )
    listed = list(parts)
    if not listed:
        raise ValueError(
            f"blocks: {parts!r} is empty: expected at least one pattern, module or parameter"
        )
    return listed


class _Lookup:
    """Finds the indices of the parameters that a pattern, a module or a parameter selects."""

    def __init__(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self._model = model
        self._index_of = {id(p): index for index, p in enumerate(params)}
        parameters = {name: {index} for index, name in enumerate(names)}
        for name, p in model.named_parameters(remove_duplicate=False):  # tied ones by each name
            if id(p) in self._index_of:
                parameters.setdefault(name, set()).add(self._index_of[id(p)])
        modules: dict[str, set[int]] = {}
        for name, indices in parameters.items():
            while name := name.rpartition(".")[0]:
                modules.setdefault(name, set()).update(indices)
        self._indices_of = {**modules, **parameters}

    def matches(
        self, parts: Part | Iterable[Part], *, strict: bool
    ) -> Iterator[tuple[str, set[int]]]:
        """Yield the name and the parameter indices of each match of ``parts``."""
        for part in _listed(parts):
            try:
                yield from list(self._part_blocks(part))
            except ValueError:
                if strict:
                    raise

    def _part_blocks(self, part: Part) -> Iterator[tuple[str, set[int]]]:
        if isinstance(part, nn.Module):
            yield self._module_block(part)
        elif isinstance(part, Tensor):
            yield self._parameter_block(part)
        elif isinstance(part, (str, re.Pattern)):
            yield from self._pattern_blocks(part)
        else:
            raise TypeError(f"blocks: {shown(part)}: expected a pattern, a module or a parameter")

    def _module_block(self, module: nn.Module) -> tuple[str, set[int]]:
        names = (name for name, other in self._model.named_modules() if other is module)
        name = next(names, "") or type(module).__name__
        indices = {self._index_of[id(p)] for p in module.parameters() if id(p) in self._index_of}
        if not indices:
            raise ValueError(
                f"blocks: module {name!r} holds no parameter to measure: expected a module of the model"
                " with trainable parameters"
            )
        return name, indices

    def _parameter_block(self, parameter: Tensor) -> tuple[str, set[int]]:
        if id(parameter) not in self._index_of:
            raise ValueError(
                f"blocks: a tensor of shape {tuple(parameter.shape)} is not among the measured"
                " parameters: expected a trainable parameter of the model"
            )
        indices = {self._index_of[id(parameter)]}
        return next(name for name, found in self._indices_of.items() if found == indices), indices

    def _pattern_blocks(self, pattern: str | re.Pattern[str]) -> Iterator[tuple[str, set[int]]]:
        matches = [item for item in self._indices_of.items() if _matches(pattern, item[0])]
        if not matches:
            text = pattern if isinstance(pattern, str) else pattern.pattern
            near = difflib.get_close_matches(text, self._indices_of, 3, 0.0)
            raise ValueError(
                f"blocks: {text!r} matches no module and no measured parameter: expected names such"
                f" as {', '.join(map(repr, near))}, where * stands for one level"
            )
        # A tied parameter matches by each of its names, and is one block, by its first name.
        unique = {tuple(sorted(indices)): (name, indices) for name, indices in reversed(matches)}
        yield from reversed(unique.values())


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    levels, wanted = name.split("."), pattern.split(".")
    return len(levels) == len(wanted) and all(map(fnmatchcase, levels, wanted))
