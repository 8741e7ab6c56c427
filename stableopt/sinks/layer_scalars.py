"""`LayerScalars`: the layers of a run that have scalars of their own in TensorBoard.

TensorBoard colours lines by run, so that layers in one chart look alike: each has a chart,
where runs are compared. Heat maps show all layers.
"""

from __future__ import annotations

import math

from stableopt.stability.layers.table import Layers

__all__ = ["LayerScalars"]

MOST = 16
"""Charts in one group of TensorBoard's scalars: two pages of them."""

_COLUMNS = ("share", "ratio", "sharpness", "mean_curvature")


def _columns(layers: Layers) -> list[str]:
    """Return the columns that are written: the sharpness only where limits are not known."""
    known = [name for name in _COLUMNS if any(v is not None for v in layers.column(name))]
    return [name for name in known if name != "sharpness" or "ratio" not in known]


class LayerScalars:
    """Chooses which layers of a run have scalars, the same at every measurement."""

    def __init__(self) -> None:
        self._names: list[str] | None = None

    def of(self, layers: Layers) -> dict[str, float]:
        """Return the finite numbers by tag, ``stability_layers_<column>/<name>``.

        More than 16 layers are one scalar a kind; of more than 16 kinds, those with the largest
        shares at the first measurement have one.

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
