r"""The minima that are wanted: a region of the sharpness / non-uniformity diagram.

Three examples::

    TargetRegion(sharpness=(0, 10), non_uniformity=(0, 5))  # absolute, either end may be None
    TargetRegion.flatter(by=2)                              # relative to the present
    TargetRegion.margin(0.8)                                # at most 80 % of the limits

Linear stability says which learning rate and batch size make the *other* minima unstable: those
sharper than :math:`a` when the limit on the sharpness is :math:`a`, those less uniform than
:math:`s` when the limit on the non-uniformity is :math:`s`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from stableopt import plot
from stableopt._arguments import positive, whole
from stableopt.stability import StabilityMargins, UpdateRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bounds", "TargetRegion", "at_lr", "lr_at_limit"]

Bounds = tuple[float, float]
"""The lower and the upper end of what is wanted; 0 and infinity are open ends."""

OPEN: Bounds = (0.0, math.inf)

_ROUNDED = 1 + 1e-9
"""A batch size that is whole but for rounding is that whole number."""


@dataclass(frozen=True)
class TargetRegion:
    r"""A box of wanted sharpness and non-uniformity.

    The sharpness is the one that the optimizer's limit is on: of the loss, or, with a preconditioner
    (Adam, groups with rates of their own), the preconditioned one.

    Args:
        sharpness: ``(low, high)``, in units of the curvature; ``None`` for an open end.
        non_uniformity: ``(low, high)``, likewise.
        unit: what the bounds count in: ``"absolute"`` values, multiples of what is measured when
            steering begins (``"present"``), or shares of the limits (``"limit"``).

    Raises:
        ValueError: for bounds that are negative or in the wrong order, a box without any bound, or
            an unknown unit.

    >>> target = TargetRegion(sharpness=(None, 4.0))
    >>> target.lr_for(UpdateRule(lr=0.1)), target.contains(3.0, 50.0), target.contains(5.0, 1.0)
    (0.5, True, False)
    """

    sharpness: tuple[float | None, float | None] = (None, None)
    non_uniformity: tuple[float | None, float | None] = (None, None)
    unit: Literal["absolute", "present", "limit"] = "absolute"

    def __post_init__(self) -> None:
        for name in ("sharpness", "non_uniformity"):
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if self.unit not in ("absolute", "present", "limit"):
            raise ValueError(f"unit={self.unit!r}: expected 'absolute', 'present' or 'limit'")
        if self.sharpness == OPEN and self.non_uniformity == OPEN:
            raise ValueError("sharpness and non_uniformity: expected a bound in at least one")

    @classmethod
    def flatter(cls, by: float) -> TargetRegion:
        """Return the minima that are ``by`` times flatter than the present point.

        >>> TargetRegion.flatter(by=2).resolve(StabilityMargins(sharpness=8.0)).sharpness
        (0.0, 4.0)
        """
        return cls(sharpness=(0.0, 1 / _above_one("by", by)), unit="present")

    @classmethod
    def sharper(cls, by: float) -> TargetRegion:
        """Return the minima that are at least ``by`` times sharper than the present point."""
        return cls(sharpness=(_above_one("by", by), math.inf), unit="present")

    @classmethod
    def more_uniform(cls, by: float) -> TargetRegion:
        """Return the minima whose non-uniformity is at most a ``by``-th of the present one."""
        return cls(non_uniformity=(0.0, 1 / _above_one("by", by)), unit="present")

    @classmethod
    def margin(cls, share: float) -> TargetRegion:
        """Return the points at up to ``share`` of each limit, whatever their sharpness.

        For stability rather than selection: no minimum is made unstable. The learning rate then
        follows the measurement, which is safe only with a floor; see
        :func:`~stableopt.steering.lr_laws.keep_margin`.

        Raises:
            ValueError: unless ``share`` is between 0 and 1.
        """
        if not positive("share", share) < 1:
            raise ValueError(f"share={share!r}: expected a number between 0 and 1")
        return cls((0.0, float(share)), (0.0, float(share)), unit="limit")

    @property
    def share(self) -> float | None:
        """The largest share of the limits, where that is what is asked for."""
        return _number(self.sharpness[1]) if self.unit == "limit" else None

    def resolve(self, margins: StabilityMargins) -> TargetRegion:
        """Return the region in absolute numbers, if it is relative to what ``margins`` measured.

        A region of :meth:`margin` stays as it is.

        Raises:
            ValueError: if a quantity it is relative to was not measured.
        """
        if self.unit != "present":
            return self
        bounds: dict[str, Bounds] = {"sharpness": OPEN, "non_uniformity": OPEN}
        present = {
            "sharpness": margins.limited_sharpness,
            "non_uniformity": margins.non_uniformity,
        }
        for name, value in present.items():
            low, high = _bounds(getattr(self, name))
            if (low, high) == OPEN:
                continue
            if value is None or not value > 0:
                raise ValueError(
                    f"target is relative to the present {name}, which is {value}: expected a"
                    " positive measured value; add it to the monitor's quantities"
                )
            bounds[name] = (low * value, high * value)
        return TargetRegion(bounds["sharpness"], bounds["non_uniformity"])

    @property
    def aim(self) -> float | None:
        """The sharpness to settle at: the upper bound, else the lower one, else ``None``.

        Training ends at or just below the limit that the learning rate sets, so the limit belongs
        at the upper bound; where only a lower one is named, at that.
        """
        low, high = _bounds(self.sharpness)
        return high if high < math.inf else low or None

    def lr_for(self, update_rule: UpdateRule) -> float:
        r"""Return the learning rate at which every sharper minimum is unstable.

        The rate whose limit is :attr:`aim`: for plain SGD :math:`\eta = 2/a`. It follows from the
        target alone, never from a measurement.

        Args:
            update_rule: the rule, whose momentum, decay and ratios between groups are kept.

        Returns:
            The rate, of the fastest group where groups differ; the rule's own where the region has
            no bound on the sharpness.

        Raises:
            ValueError: for a region in other units than absolute ones.

        >>> round(TargetRegion(sharpness=(0, 38.0)).lr_for(UpdateRule(lr=1.0, momentum=0.9)), 6)
        0.1
        """
        self._require_absolute("lr_for")
        return update_rule.lr if self.aim is None else lr_at_limit(update_rule, self.aim)

    def batch_size_for(
        self, lr: float | UpdateRule, n: int, *, sharpness: float | None = None
    ) -> int:
        r"""Return the batch size at which every less uniform minimum is unstable.

        The limit on the non-uniformity is s, the upper bound, where the noise factor is
        :math:`p = v/s^2`, with v the square of the limit at p = 1: for plain SGD
        :math:`1/\eta^2` (the box (9)), or :math:`(2/(\eta a) - 1)a^2` at sharpness a. Then
        :math:`B = n/(1 + p(n-1))`, rounded down, so that what is above s is unstable. Where only a
        lower bound is named, B is rounded up, so that what is above *it* is stable.

        Args:
            lr: the learning rate of plain SGD, or a rule.
            n: samples in the training set.
            sharpness: the sharpness a at which the limit is taken; by default the largest limit
                over all sharpnesses.

        Returns:
            From 1 to n; n where the region has no bound on the non-uniformity.

        Raises:
            ValueError: for a region in other units than absolute ones, or arguments out of range.

        >>> TargetRegion(non_uniformity=(0, 4.0)).batch_size_for(0.5, 1000)
        3
        """
        self._require_absolute("batch_size_for")
        n = whole("n", n)
        low, high = _bounds(self.non_uniformity)
        if (low, high) == OPEN:
            return n
        rule = lr if isinstance(lr, UpdateRule) else UpdateRule(lr=positive("lr", lr))
        rule = replace(rule, full_batch=False)
        wanted = high if high < math.inf else low
        at_one = rule.max_non_uniformity(1, None, sharpness=sharpness)
        p = (at_one / wanted) ** 2 if wanted > 0 else math.inf
        size = n / (1 + p * (n - 1)) if n > 1 else 1.0
        size = math.floor(size * _ROUNDED) if high < math.inf else math.ceil(size / _ROUNDED)
        return min(max(size, 1), n)

    def contains(self, sharpness: float | None, non_uniformity: float | None = None) -> bool:
        """Return whether both values are within their bounds, in the region's units.

        A bounded quantity that is ``None``, not measured, is not.
        """
        for value, bounds in ((sharpness, self.sharpness), (non_uniformity, self.non_uniformity)):
            low, high = _bounds(bounds)
            if (low, high) != OPEN and (value is None or not low <= value <= high):
                return False
        return True

    def plot(
        self,
        points: Iterable[StabilityMargins | Sequence[float]] = (),
        *,
        region: plot.Region | None = None,
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the region in the diagram, with a trajectory and a stability region if given.

        Raises:
            ImportError: without matplotlib.
            ValueError: for a region in other units than absolute ones.
        """
        self._require_absolute("plot")
        target = (_bounds(self.sharpness), _bounds(self.non_uniformity))
        return plot.diagram(region, points, target=target, ax=ax)

    def __str__(self) -> str:
        names = {"sharpness": self.sharpness, "non-uniformity": self.non_uniformity}
        unit = {"absolute": "", "present": " of the present", "limit": " of the limit"}[self.unit]
        return ", ".join(
            f"{name} {_interval(_bounds(bounds))}{unit}"
            for name, bounds in names.items()
            if bounds != OPEN
        )

    def _require_absolute(self, what: str) -> None:
        if self.unit == "present":
            raise ValueError(f"{what} of a region relative to the present: resolve(margins) first")
        if self.unit == "limit":
            raise ValueError(
                f"{what} of a margin: it asks for a share of the limit, not for a sharpness"
            )


def at_lr(rule: UpdateRule, lr: float) -> UpdateRule:
    """Return ``rule`` at another learning rate, with the same ratios between groups.

    >>> at_lr(UpdateRule(lr=0.4, group_lrs=(0.4, 0.1)), 0.2).group_lrs
    (0.2, 0.05)
    """
    groups = tuple(lr * (each / rule.lr) for each in rule.group_lrs)
    return replace(rule, lr=lr, group_lrs=groups)


def lr_at_limit(rule: UpdateRule, sharpness: float) -> float:
    r"""Return the learning rate at which ``rule``'s limit is ``sharpness``.

    Every rule's limit has the form :math:`A/\eta - D`, as 2/η minus the weight decay; A and D
    follow from the limits at two rates.

    >>> lr_at_limit(UpdateRule(lr=1.0, weight_decay=0.5), 3.5)
    0.5
    """
    sharpness = positive("sharpness", sharpness)
    at_one, at_two = (at_lr(rule, lr).max_sharpness for lr in (1.0, 2.0))
    reach = 2 * (at_one - at_two)
    return reach / (sharpness + (reach - at_one))


def _checked(name: str, bounds: object) -> Bounds:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(f"{name}={bounds!r}: expected (low, high), None for an open end")
    try:
        low = 0.0 if bounds[0] is None else float(bounds[0])
        high = math.inf if bounds[1] is None else float(bounds[1])
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low <= high or high == 0 or low == math.inf:
        raise ValueError(f"{name}={bounds!r}: expected numbers with 0 ≤ low ≤ high, and 0 < high")
    return low, high


def _bounds(bounds: tuple[float | None, float | None]) -> Bounds:
    """Return the ends as the constructor left them: numbers."""
    return _number(bounds[0]), _number(bounds[1])


def _number(value: float | None) -> float:
    assert value is not None
    return value


def _above_one(name: str, value: float) -> float:
    number = positive(name, value)
    if not number > 1:
        raise ValueError(f"{name}={value!r}: expected a factor above 1")
    return number


def _interval(bounds: Bounds) -> str:
    low, high = bounds
    if low == 0:
        return f"up to {high:.4g}"
    return f"from {low:.4g}" if high == math.inf else f"from {low:.4g} to {high:.4g}"
