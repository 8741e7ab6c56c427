"""`Layers`: the measured numbers of each block of parameters, as columns, rows, or printed table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from stableopt._support.text_table import aligned

__all__ = ["COLUMNS", "Layer", "Layers"]


@dataclass(frozen=True)
class Layer:
    r"""The numbers of one block of parameters; ``None`` means not measured, or not known.

    Attributes:
        name: the name of the module in the model, or the user's name of the block.
        parameters: the number of parameters.
        share: :math:`\sum_{j\in b} v_j^2` of the unit top eigenvector v.
        sharpness: :math:`\lambda_{\max}(P_bH_{bb})`, with the optimizer's preconditioner, if it has one.
        limit: the largest stable sharpness under the update rule, :math:`2/\eta` for plain SGD.
        ratio: sharpness over limit.
        residual: the eigen-solver's residual, relative to the sharpness.
        converged: whether the sharpness reached its tolerance.
        mean_curvature: :math:`\mathrm{tr}(H_{bb})` over the number of parameters, without P.
        mean_curvature_error: the standard error of ``mean_curvature``.
        non_uniformity: :math:`\lambda_{\max}(\Sigma_b)^{1/2}` of the per-sample
            :math:`P_b^{1/2}H_{i,bb}P_b^{1/2}`.
        non_uniformity_limit: the largest stable non-uniformity under the update rule.
    """

    name: str
    parameters: int
    share: float | None = None
    sharpness: float | None = None
    limit: float | None = None
    residual: float | None = None
    converged: bool | None = None
    mean_curvature: float | None = None
    mean_curvature_error: float | None = None
    non_uniformity: float | None = None
    non_uniformity_limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Sharpness over limit: 1 at the edge of stability."""
        if self.sharpness is None or self.limit is None:
            return None
        return self.sharpness / self.limit if self.limit > 0 else math.inf


COLUMNS = tuple(item.name for item in fields(Layer) if item.name not in ("name", "parameters"))
"""The possible columns of a table: the measured attributes of :class:`Layer`."""

_HEADINGS = {
    "share": "share",
    "sharpness": "sharpness",
    "limit": "limit",
    "ratio": "ratio",
    "mean_curvature": "tr/size",
    "non_uniformity": "non-unif.",
}

_WIDTH = 80


@dataclass(frozen=True)
class Layers:
    """The measured numbers of each block at one step: ``margins.layers``.

    ``layers["blocks.3.mlp.fc2"]`` is a :class:`Layer`. Iteration yields all of them in the order of
    the model, ``column("share")`` returns one number of each, and ``print(layers)`` shows a table.

    Attributes:
        names: the names of the blocks.
        parameters: the number of parameters in each block.
        columns: one number of each block, by the name of the attribute of :class:`Layer`.
        rest: the share of the top eigenvector on parameters outside all blocks.

    >>> layers = Layers(("0", "2"), (10, 20), {"share": (0.25, 0.75), "sharpness": (3.0, 5.0)})
    >>> layers["2"].sharpness, layers.largest(1)[0].name
    (5.0, '2')
    >>> print(layers)
    layer  size  share  sharpness
    0        10   25 %          3
    2        20   75 %          5
    """

    names: tuple[str, ...]
    parameters: tuple[int, ...]
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    rest: float | None = None

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if name not in COLUMNS or len(values) != len(self.names):
                raise ValueError(
                    f"columns: {name!r} has {len(values)} values: expected {len(self.names)} of one"
                    f" of {', '.join(COLUMNS)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Layer]:
        for row, (name, size) in enumerate(zip(self.names, self.parameters, strict=True)):
            yield Layer(name, size, **{key: values[row] for key, values in self.columns.items()})

    def __getitem__(self, name: str) -> Layer:
        """Return one block.

        Raises:
            KeyError: for an unknown name.
        """
        if name not in self.names:
            raise KeyError(f"{name!r}: expected one of {', '.join(self.names)}")
        return list(self)[self.names.index(name)]

    def column(self, name: str) -> tuple[float | None, ...]:
        """Return an attribute of :class:`Layer` for each block.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in (*COLUMNS, "ratio", "parameters"):
            raise ValueError(f"column={name!r}: expected one of {', '.join((*COLUMNS, 'ratio'))}")
        return tuple(getattr(layer, name) for layer in self)

    def largest(self, most: int, by: str | None = None) -> list[Layer]:
        """Return the blocks with the largest values of a column, the largest first.

        The default is the ratio to the limit, else the sharpness, else the share, as far as measured.
        """
        column = by or self._main_column()
        measured = [layer for layer in self if getattr(layer, column) is not None]
        return sorted(measured, key=lambda layer: -getattr(layer, column))[:most]

    def _main_column(self) -> str:
        for name in ("ratio", "sharpness"):
            if any(value is not None for value in self.column(name)):
                return name
        return "share"

    def by_kind(self) -> Layers:
        """Return a table that merges blocks whose names differ only in numbers, as ``blocks.*.attn``.

        Shares are summed, and mean curvatures averaged over the parameters. The other columns are
        those of the member with the largest ratio, or sharpness without a limit.

        >>> names = ("embed", "blocks.0.fc", "blocks.1.fc")
        >>> Layers(names, (8, 4, 4), {"share": (0.5, 0.25, 0.25)}).by_kind().column("share")
        (0.5, 0.5)
        """
        kinds: dict[str, list[Layer]] = {}
        for layer in self:
            kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name), []).append(layer)
        rows = [_merged(members) for members in kinds.values()]
        columns = {name: tuple(row[name] for row in rows) for name in self.columns}
        sizes = tuple(sum(layer.parameters for layer in members) for members in kinds.values())
        return Layers(tuple(kinds), sizes, columns, self.rest)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts, for checkpoints; :meth:`from_dict` reads them."""
        return {
            "names": list(self.names),
            "parameters": list(self.parameters),
            "columns": {name: list(values) for name, values in self.columns.items()},
            "rest": self.rest,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Layers:
        """Return the table that :meth:`to_dict` wrote; unknown columns are left out.

        >>> layers = Layers(("0",), (3,), {"share": (1.0,)}, rest=0.0)
        >>> Layers.from_dict(layers.to_dict()) == layers
        True
        """
        columns = {
            name: tuple(state["columns"][name]) for name in COLUMNS if name in state["columns"]
        }
        return cls(tuple(state["names"]), tuple(state["parameters"]), columns, state["rest"])

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, most: int | None = None) -> str:
        """Return the table, at most 80 columns wide, of the ``most`` largest blocks or of all.

        A limit that all blocks share is printed below the table.
        """
        shown = list(self) if most is None else self.largest(most)
        limits = {layer.limit for layer in shown}
        keys = [key for key in _HEADINGS if any(getattr(layer, key) is not None for layer in shown)]
        if len(limits) == 1:
            keys = [key for key in keys if key != "limit"]
        rows = [["size", *(_HEADINGS[key] for key in keys)]]
        for layer in shown:
            cells = (_cell(key, getattr(layer, key)) for key in keys)
            rows.append([compact(layer.parameters), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        room = _WIDTH - sum(widths) - 2 * len(widths)
        names = [shortened(name, room) for name in ("layer", *(layer.name for layer in shown))]
        lines = aligned([[name, *row] for name, row in zip(names, rows, strict=True)])
        if most is not None and len(self) > len(shown):
            lines.append(f"… and {len(self) - len(shown)} more")
        if len(limits) == 1 and (limit := limits.pop()) is not None:
            lines.append(f"limit of the sharpness: {limit:.4g}")
        return "\n".join(lines)


def compact(count: int) -> str:
    """Return ``count`` in at most five characters.

    >>> compact(640), compact(12_345), compact(124_000_000), compact(7_300_000_000)
    ('640', '12.3K', '124M', '7.3B')
    """
    for unit, symbol in ((10**9, "B"), (10**6, "M"), (10**4, "K")):
        if count >= unit:
            number = count / (1000 if symbol == "K" else unit)
            return f"{number:.3g}{symbol}" if number < 999.5 else f"{number:.0f}{symbol}"
    return str(count)


def shortened(name: str, width: int) -> str:
    """Return ``name``, its middle left out if it is longer than ``width``.

    >>> shortened("transformer.h.11.mlp.c_fc", 16)
    'tra….11.mlp.c_fc'
    """
    if len(name) <= width:
        return name
    front = (width - 1) // 4  # the end of a name tells more than its beginning
    return f"{name[:front]}…{name[len(name) - (width - 1 - front) :]}"


def _merged(members: Sequence[Layer]) -> dict[str, Any]:
    leading = max(members, key=lambda layer: layer.ratio or layer.sharpness or -math.inf)
    row = {name: getattr(leading, name) for name in COLUMNS}
    shares = [layer.share for layer in members if layer.share is not None]
    row["share"] = math.fsum(shares) if shares else None
    measured = [layer for layer in members if layer.mean_curvature is not None]
    if measured:
        size = sum(layer.parameters for layer in measured)
        row["mean_curvature"] = math.fsum(_trace(layer) for layer in measured) / size
        errors = [layer.parameters * (layer.mean_curvature_error or 0.0) for layer in measured]
        row["mean_curvature_error"] = math.hypot(*errors) / size
    return row


def _trace(layer: Layer) -> float:
    assert layer.mean_curvature is not None
    return layer.parameters * layer.mean_curvature


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if key == "share" else f"{value:.3g}"
