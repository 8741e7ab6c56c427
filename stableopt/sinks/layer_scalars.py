"""`LayerScalars`: the layers of a run that get their own scalar charts in TensorBoard.

TensorBoard colours lines by run, so layers in one chart would look alike. Each layer therefore has a
chart, which compares runs. Heat maps show all layers.
"""

from __future__ import annotations

import math

from stableopt.stability.layers.table import Layers

__all__ = ["LayerScalars"]

MOST = 16
"""Charts in one group of TensorBoard's scalars, which fill two pages."""

_COLUMNS = ("share", "ratio", "sharpness", "mean_curvature")


def _columns(layers: Layers) -> list[str]:
    """Return the columns to write: the sharpness only if no ratio to a limit is known."""
    known = [name for name in _COLUMNS if any(v is not None for v in layers.column(name))]
    return [name for name in known if name != "sharpness" or "ratio" not in known]


class LayerScalars:
    """Selects the layers of a run that have scalars, the same at every measurement."""

    def __init__(self) -> None:
        self._names: list[str] | None = None

    def of(self, layers: Layers) -> dict[str, float]:
        """Return the finite numbers by tag, ``stability_layers_<column>/<name>``.

        More than 16 layers are merged by kind. Of more than 16 kinds, those with the largest shares
        at the first measurement have scalars.

        >>> LayerScalars().of(Layers(("0", "2"), (3, 3), {"share": (0.25, 0.75)}))
        {'stability_layers_share/0': 0.25, 'stability_layers_share/2': 0.75}
        """
        shown = layers if len(layers) <= MOST else layers.by_kind()
        names: list[str] | tuple[str, ...] = shown.names
        if len(names) > MOST:
            if self._names is None:
                self._names = [layer.name for layer in shown.largest(MOST, "share")]
            names = self._names
        chosen = set(names)
        return {
            f"stability_layers_{column}/{name}": value
            for column in _columns(shown)
            for name, value in zip(shown.names, shown.column(column), strict=True)
            if name in chosen and value is not None and math.isfinite(value)
        }
