"""`blocks_of`: the blocks of parameters that a user names, by default the layers of the model.

Five examples of ``blocks=``::

    None                               # each module that holds parameters, as named_modules names it
    "encoder.*"                        # each module or parameter one level below the encoder
    ["*.attn", model.head]             # several, and modules and parameters themselves
    re.compile(r".*[.]norm[12]")        # what a regular expression matches as a whole
    {"norms": ["*.norm?", "norm"], "rest": "*.mlp"}   # a block with a name of its own
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

__all__ = ["Block", "Blocks", "blocks_of", "layer_of"]

Part = str | re.Pattern[str] | nn.Module | Tensor
"""Names modules or parameters, or is one."""

Blocks = Part | Iterable[Part] | Mapping[str, Part | Iterable[Part]]
"""What ``blocks=`` takes."""


@dataclass(frozen=True)
class Block:
    """Parameters that are looked at together.

    Attributes:
        name: of the layer, as the model names it, or as the user does.
        places: the positions of its parameters among those of the problem, in their order.
    """

    name: str
    places: tuple[int, ...]


def layer_of(parameter: str) -> str:
    """Return the name of the module that holds a parameter, as the model names it.

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
    r"""Return the blocks that ``blocks`` names, in the order of the model.

    A pattern is compared level by level, so that ``*`` stands for one level, as in the plans of
    ``torch.distributed.tensor.parallel.parallelize_module``. A module stands for all parameters in it,
    however deep. Blocks may overlap, and need not hold every parameter. A parameter that is tied is
    one parameter, in the layer that the model lists first; a pattern finds it by each of its names.

    Args:
        model: the model.
        names: of the parameters that count.
        params: these parameters.
        blocks: a pattern, a compiled regular expression, a module or a parameter; several of these,
            each match a block; or a mapping from names to these, each name one block. By default each
            module that holds parameters of its own.
        strict: whether what names no parameter is an error; else it is left out.

    Raises:
        ValueError: if something names no parameter that counts, or an empty selection is given.
        TypeError: for anything else.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    >>> names, params = zip(*model.named_parameters())
    >>> [block.name for block in blocks_of(model, names, params)]
    ['0', '1.0', '1.1']
    >>> blocks_of(model, names, params, "*")
    (Block(name='0', places=(0, 1)), Block(name='1', places=(2, 3, 4, 5)))
    >>> blocks_of(model, names, params, {"weights": ["*.weight", "*.*.weight"]})
    (Block(name='weights', places=(0, 2, 4)),)
    """
    search = _Search(model, names, params)
    found: dict[str, set[int]] = {}
    if isinstance(blocks, Mapping):
        for name, parts in blocks.items():
            if not isinstance(name, str):
                raise TypeError(f"blocks: the name {name!r} is not a string")
            for _, places in search.matches(parts, strict=strict):
                found.setdefault(name, set()).update(places)
    elif blocks is not None:
        for name, places in search.matches(blocks, strict=strict):
            found.setdefault(name, set()).update(places)
    if not found and blocks is not None and strict:
        raise ValueError(f"blocks={blocks!r} is empty: expected None for each layer")
    if not found:
        for place, name in enumerate(names):
            found.setdefault(layer_of(name), set()).add(place)
    if not isinstance(blocks, Mapping):
        found = dict(sorted(found.items(), key=lambda item: min(item[1])))
    return tuple(Block(name, tuple(sorted(places))) for name, places in found.items())


def _listed(parts: Any) -> list[Part]:
    if isinstance(parts, (str, re.Pattern, nn.Module, Tensor)):
        return [parts]
    if not isinstance(parts, Iterable):
        raise TypeError(
            f"blocks: {parts!r} is neither a pattern, a module or a parameter, nor several of them"
        )
    listed = list(parts)
    if not listed:
        raise ValueError(
            f"blocks: {parts!r} is empty: expected at least one pattern, module or parameter"
        )
    return listed


class _Search:
    """The names of all modules and parameters, and the places of the parameters in each."""

    def __init__(self, model: nn.Module, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self._model = model
        self._place = {id(p): place for place, p in enumerate(params)}
        of = {name: {place} for place, name in enumerate(names)}
        for name, p in model.named_parameters(remove_duplicate=False):  # tied ones by each name
            if id(p) in self._place:
                of.setdefault(name, set()).add(self._place[id(p)])
        modules: dict[str, set[int]] = {}
        for name, places in of.items():
            while name := name.rpartition(".")[0]:
                modules.setdefault(name, set()).update(places)
        self._named = {**modules, **of}

    def matches(
        self, parts: Part | Iterable[Part], *, strict: bool
    ) -> Iterator[tuple[str, set[int]]]:
        """Yield name and places of what ``parts`` name."""
        for part in _listed(parts):
            try:
                yield from list(self._matches(part))
            except ValueError:
                if strict:
                    raise

    def _matches(self, part: Part) -> Iterator[tuple[str, set[int]]]:
        if isinstance(part, nn.Module):
            yield self._module(part)
        elif isinstance(part, Tensor):
            yield self._parameter(part)
        elif isinstance(part, (str, re.Pattern)):
            yield from self._pattern(part)
        else:
            raise TypeError(f"blocks: {part!r} is not a pattern, a module or a parameter")

    def _module(self, module: nn.Module) -> tuple[str, set[int]]:
        names = (name for name, each in self._model.named_modules() if each is module)
        name = next(names, "") or type(module).__name__
        places = {self._place[id(p)] for p in module.parameters() if id(p) in self._place}
        if not places:
            raise ValueError(
                f"blocks: module {name!r} holds no parameter that counts: expected one of the model,"
                " with trainable parameters"
            )
        return name, places

    def _parameter(self, parameter: Tensor) -> tuple[str, set[int]]:
        if id(parameter) not in self._place:
            raise ValueError(
                f"blocks: a tensor of shape {tuple(parameter.shape)} is not among the parameters that"
                " count: expected a trainable parameter of the model"
            )
        place = self._place[id(parameter)]
        return next(name for name, places in self._named.items() if places == {place}), {place}

    def _pattern(self, pattern: str | re.Pattern[str]) -> Iterator[tuple[str, set[int]]]:
        found = [(n, places) for n, places in self._named.items() if _matches(pattern, n)]
        # A tied parameter is found by each of its names, and is one block.
        found = list({tuple(sorted(places)): (n, places) for n, places in found[::-1]}.values())[
            ::-1
        ]
        if not found:
            text = pattern if isinstance(pattern, str) else pattern.pattern
            near = difflib.get_close_matches(text, self._named, 3, 0.0)
            raise ValueError(
                f"blocks: {text!r} matches no module or parameter that counts: expected names such"
                f" as {', '.join(map(repr, near))}, where * stands for one level"
            )
        yield from found


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    levels, wanted = name.split("."), pattern.split(".")
    return len(levels) == len(wanted) and all(map(fnmatchcase, levels, wanted))
