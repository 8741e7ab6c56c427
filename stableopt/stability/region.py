"""`StabilityRegion`: where an update rule is stable, in sharpness and non-uniformity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["StabilityRegion"]

Kind = Literal["box", "exact"]


@dataclass(frozen=True)
class StabilityRegion:
    r"""The minima at which an update rule can settle, in the plane of sharpness and non-uniformity.

    It has two shapes, both in Wu, Ma & E (2018), section 3:

    - ``"box"``: :math:`a \le` :attr:`max_sharpness` and :math:`s \le` :attr:`max_non_uniformity`,
      equation (9); the dashed lines in the paper's figures.
    - ``"exact"``: the mean-square stable points of a *one-dimensional* problem, for plain SGD the
      half-ellipse :math:`(1-\eta a)^2 + \eta^2 p s^2 \le 1`, whose hull the box is.

    In several dimensions a and s may belong to different directions, and neither shape is necessary or
    sufficient.

    Args:
        rule: the update rule. Of a preconditioned one, as of Adam, the region is one of *preconditioned*
            sharpness and non-uniformity, those of the rule's own coordinates: the plain sharpness is
            not comparable, and neither is a rule without its preconditioner.
        batch_size: samples in a step; ``None`` for the full batch, which has no limit on s.
        dataset_size: samples in the training set; ``None`` for infinitely many.

    >>> region = StabilityRegion(UpdateRule(lr=0.1), batch_size=4)
    >>> region.max_sharpness, region.max_non_uniformity
    (20.0, 20.0)
    >>> region.contains(18.0, 18.0), region.contains(18.0, 18.0, kind="exact")
    (True, False)
    """

    rule: UpdateRule
    batch_size: int | None = None
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        self.rule.max_non_uniformity(self.batch_size, self.dataset_size)  # raises if B > n

    @property
    def min_sharpness(self) -> float:
        """The lower side: below it the regularised loss has no minimum."""
        return self.rule.min_sharpness

    @property
    def max_sharpness(self) -> float:
        """The right side of the box."""
        return self.rule.max_sharpness

    @property
    def max_non_uniformity(self) -> float:
        """The top of the box; infinity for the full batch."""
        return self.rule.max_non_uniformity(self.batch_size, self.dataset_size)

    def contains(self, sharpness: float, non_uniformity: float, *, kind: Kind = "box") -> bool:
        """Return whether the point lies in the region, its boundary included.

        Raises:
            ValueError: for an unknown ``kind`` or a negative non-uniformity.
        """
        if not non_uniformity >= 0:
            raise ValueError(f"non_uniformity={non_uniformity}: expected at least 0")
        if not self.min_sharpness <= sharpness <= self.max_sharpness:
            return False
        return non_uniformity <= self._height(sharpness, kind)

    def boundary(self, num: int = 200, *, kind: Kind = "box") -> NDArray[np.float64]:
        """Return ``num`` points ``(num, 2)`` of the upper boundary, from left to right.

        Columns are sharpness and the largest non-uniformity there (infinity for the full batch).

        Raises:
            ValueError: for fewer than two points, or a learning rate of zero.
        """
        if num < 2:
            raise ValueError(f"num={num}: expected at least 2")
        if not self.max_sharpness < np.inf:
            raise ValueError(f"lr={self.rule.lr}: a region without a right side has no boundary")
        sharpness = np.linspace(self.min_sharpness, self.max_sharpness, num)
        return np.array([(a, self._height(a, kind)) for a in sharpness])

    def _height(self, sharpness: float, kind: Kind) -> float:
        if kind == "box":
            return self.max_non_uniformity
        if kind == "exact":
            return self.rule.max_non_uniformity(
                self.batch_size, self.dataset_size, sharpness=float(sharpness)
            )
        raise ValueError(f"kind={kind!r}: expected 'box' or 'exact'")
