"""`StabilityRegion`: where an update rule is stable, in sharpness and non-uniformity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stableopt._support.arguments import instance
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["StabilityRegion"]

Kind = Literal["box", "exact"]


@dataclass(frozen=True)
class StabilityRegion:
    r"""The stable minima of an update rule, in the plane of sharpness a and non-uniformity s.

    The region has two shapes, both in Wu, Ma & E (2018), section 3:

    - ``"box"``: :math:`a \le` :attr:`max_sharpness` and :math:`s \le` :attr:`max_non_uniformity`,
      equation (9); the dashed lines in the paper's figures.
    - ``"exact"``: the mean-square stable points of a *one-dimensional* problem. For plain SGD it is the
      half-ellipse :math:`(1-\eta a)^2 + \eta^2 p s^2 \le 1`, and the box is its bounding box.

    In several dimensions a and s may belong to different directions. Neither shape is then necessary or
    sufficient for stability.

    Args:
        rule: the update rule. The region of a preconditioned rule, such as Adam's, is one of
            *preconditioned* sharpness and non-uniformity. Plain ones are not comparable with it.
        batch_size: samples in a step; ``None`` for the full batch, which has no limit on s.
        dataset_size: samples in the training set; ``None`` or infinity for infinitely many.

    >>> region = StabilityRegion(UpdateRule(lr=0.1), batch_size=4)
    >>> region.max_sharpness, region.max_non_uniformity
    (20.0, 20.0)
    >>> region.contains(18.0, 18.0), region.contains(18.0, 18.0, kind="exact")
    (True, False)
    """

    rule: UpdateRule
    batch_size: int | None = None
    dataset_size: float | None = None

    def __post_init__(self) -> None:
        instance("rule", self.rule, UpdateRule)
        self.rule.max_non_uniformity(self.batch_size, self.dataset_size)  # raises if B > n

    @property
    def min_sharpness(self) -> float:
        """The left side of the box: below it the regularised loss has no minimum."""
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
            raise ValueError(
                f"lr={self.rule.lr}: expected a positive learning rate, as the sharpness has no limit"
            )
        sharpness = np.linspace(self.min_sharpness, self.max_sharpness, num)
        return np.array([(a, self._height(a, kind)) for a in sharpness])

    def _height(self, sharpness: float, kind: Kind) -> float:
        """Return the largest non-uniformity of the region at ``sharpness``."""
        if kind == "box":
            return self.max_non_uniformity
        if kind == "exact":
            return self.rule.max_non_uniformity(
                self.batch_size, self.dataset_size, sharpness=float(sharpness)
            )
        raise ValueError(f"kind={kind!r}: expected 'box' or 'exact'")
