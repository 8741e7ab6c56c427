r"""`TargetRegion`: the region of the sharpness / non-uniformity diagram that steering aims at.

Three examples::

    TargetRegion(sharpness=(0, 10), non_uniformity=(0, 5))  # absolute, either end may be None
    TargetRegion.flatter(by=2)                              # relative to the present point
    TargetRegion.within_limits(0.8)                         # at most 80 % of the limits

Learning rate and batch size make all *other* minima unstable, by linear stability: those sharper than
:math:`a` if the limit on the sharpness is :math:`a`, and those less uniform than :math:`s` if the limit
on the non-uniformity is :math:`s`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from stableopt import plot
from stableopt._support.arguments import positive, require_keys, whole
from stableopt._support.deprecation import warn_renamed
from stableopt.stability import StabilityMargins, UpdateRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "OPEN",
    "Bounds",
    "TargetRegion",
    "at_lr",
    "bounded_values",
    "lr_at_limit",
    "resolved",
    "why_unknown",
]

Bounds = tuple[float, float]
"""The lower and the upper bound; 0 and infinity are open ends."""

OPEN: Bounds = (0.0, math.inf)
"""Bounds that every value is within."""

_UNRESOLVED = "the target is relative to a measurement, and no good one exists yet"

_ROUNDED = 1 + 1e-9
"""Relative rounding error within which a batch size counts as a whole number."""


@dataclass(frozen=True)
class TargetRegion:
    r"""A box of sharpness and non-uniformity that steering aims at.

    The sharpness is the one that the optimizer's limit applies to: with a preconditioner (Adam, groups
    with their own rates) the preconditioned sharpness, else that of the loss.

    Args:
        sharpness: ``(low, high)``, in units of the curvature; ``None`` for an open end.
        non_uniformity: ``(low, high)``, likewise.
        unit: the unit of the bounds: ``"absolute"`` values, multiples of the values measured at the
            start of steering (``"present"``), or shares of the limits (``"limit"``), which are upper
            bounds below 1.

    Raises:
        ValueError: for bounds that are negative or in the wrong order, a box without a bound, an
            unknown unit, or bounds that are not shares of a limit.

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
        if self.unit == "limit":
            for name in ("sharpness", "non_uniformity"):
                low, high = self.bounds(name)
                if low > 0 or 1 <= high < math.inf:
                    raise ValueError(
                        f"{name}={(low, high)} with unit='limit': expected an upper bound below 1, and"
                        " no lower bound"
                    )

    @classmethod
    def flatter(cls, by: float) -> TargetRegion:
        """Return the region of minima at least ``by`` times flatter than the present point.

        >>> TargetRegion.flatter(by=2).resolve(StabilityMargins(sharpness=8.0)).sharpness
        (0.0, 4.0)
        """
        return cls(sharpness=(0.0, 1 / _above_one("by", by)), unit="present")

    @classmethod
    def sharper(cls, by: float) -> TargetRegion:
        """Return the region of minima at least ``by`` times sharper than the present point."""
        return cls(sharpness=(_above_one("by", by), math.inf), unit="present")

    @classmethod
    def more_uniform(cls, by: float) -> TargetRegion:
        """Return the region of minima with at most a ``by``-th of the present non-uniformity."""
        return cls(non_uniformity=(0.0, 1 / _above_one("by", by)), unit="present")

    @classmethod
    def within_limits(cls, share: float) -> TargetRegion:
        """Return the region of points at up to ``share`` of each limit, at any sharpness.

        This region keeps training stable and selects no minima. The learning rate then follows the
        measurement, which is safe only with a floor; see
        :func:`~stableopt.steering.lr_laws.keep_margin`.

        Raises:
            ValueError: unless ``share`` is between 0 and 1.
        """
        if not positive("share", share) < 1:
            raise ValueError(f"share={share!r}: expected a number between 0 and 1")
        return cls((0.0, float(share)), (0.0, float(share)), unit="limit")

    @classmethod
    def margin(cls, share: float) -> TargetRegion:
        """Return :meth:`within_limits`: the old name."""
        warn_renamed("TargetRegion.margin", "TargetRegion.within_limits")
        return cls.within_limits(share)

    @property
    def share(self) -> float | None:
        """The largest share of the sharpness's limit; ``None`` for a region in other units."""
        return self.bounds("sharpness")[1] if self.unit == "limit" else None

    def bounds(self, name: str) -> Bounds:
        """Return the bounds of ``"sharpness"`` or ``"non_uniformity"``, open ends as 0 and infinity.

        >>> TargetRegion(sharpness=(None, 4)).bounds("sharpness")
        (0.0, 4.0)
        """
        low, high = getattr(self, name)
        return low, high

    def resolve(self, margins: StabilityMargins) -> TargetRegion:
        """Return the region in absolute numbers, if it is relative to the values in ``margins``.

        A region in another unit, such as :meth:`within_limits`, stays as it is.

        Raises:
            ValueError: if a quantity that it is relative to was not measured.
        """
        if self.unit != "present":
            return self
        bounds: dict[str, Bounds] = {}
        for name, value in bounded_values(margins).items():
            low, high = bounds[name] = self.bounds(name)
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
        """The sharpness limit to set: the upper bound, else the lower one, else ``None``.

        Training ends with a sharpness at or just below this limit.
        """
        low, high = self.bounds("sharpness")
        return high if high < math.inf else low or None

    def lr_for(self, update_rule: UpdateRule) -> float:
        r"""Return the learning rate at which every sharper minimum is unstable.

        At this rate the limit is :attr:`aim`: for plain SGD :math:`\eta = 2/a`. The rate depends only on
        the target, not on a measurement.

        Args:
            update_rule: the rule, with its momentum, decay and ratios between groups.

        Returns:
            The rate, of the fastest group if groups differ; the rule's own if the region does not
            bound the sharpness.

        Raises:
            ValueError: for a region that is not absolute.

        >>> round(TargetRegion(sharpness=(0, 38.0)).lr_for(UpdateRule(lr=1.0, momentum=0.9)), 6)
        0.1
        """
        self._require_absolute("lr_for")
        return update_rule.lr if self.aim is None else lr_at_limit(update_rule, self.aim)

    def batch_size_for(
        self, lr: float | UpdateRule, n: int, *, sharpness: float | None = None
    ) -> int:
        r"""Return the batch size at which every less uniform minimum is unstable.

        The limit on the non-uniformity is the upper bound s if the noise factor is
        :math:`p = v/s^2`, with v the square of the limit at p = 1: for plain SGD
        :math:`1/\eta^2` (the box (9)), or :math:`(2/(\eta a) - 1)a^2` at sharpness a. Then
        :math:`B = n/(1 + p(n-1))`, rounded down, so that minima above s are unstable. For a region
        with only a lower bound, B is rounded up, so that minima above this bound are stable.

        Args:
            lr: the learning rate of plain SGD, or a rule.
            n: samples in the training set.
            sharpness: the sharpness a at which the limit is taken; by default the largest limit
                over all sharpnesses.

        Returns:
            A size from 1 to n; n if the region does not bound the non-uniformity.

        Raises:
            ValueError: for a region that is not absolute, or arguments out of range.

        >>> TargetRegion(non_uniformity=(0, 4.0)).batch_size_for(0.5, 1000)
        3
        """
        self._require_absolute("batch_size_for")
        n = whole("n", n)
        low, high = self.bounds("non_uniformity")
        if (low, high) == OPEN:
            return n
        rule = lr if isinstance(lr, UpdateRule) else UpdateRule(lr=positive("lr", lr))
        rule = replace(rule, full_batch=False)
        s = high if high < math.inf else low
        limit_at_one = rule.max_non_uniformity(1, None, sharpness=sharpness)
        p = (limit_at_one / s) ** 2 if s > 0 else math.inf
        size = n / (1 + p * (n - 1)) if n > 1 else 1.0
        size = math.floor(size * _ROUNDED) if high < math.inf else math.ceil(size / _ROUNDED)
        return min(max(size, 1), n)

    def contains(self, sharpness: float | None, non_uniformity: float | None = None) -> bool:
        """Return whether both values, in the region's unit, are within their bounds.

        ``None``, for a value that was not measured, is only within open bounds.
        """
        for value, name in ((sharpness, "sharpness"), (non_uniformity, "non_uniformity")):
            low, high = self.bounds(name)
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
            ValueError: for a region that is not absolute.
        """
        self._require_absolute("plot")
        target = (self.bounds("sharpness"), self.bounds("non_uniformity"))
        return plot.diagram(region, points, target=target, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for checkpoints; :meth:`from_dict` reads them."""
        return {
            "sharpness": list(self.sharpness),
            "non_uniformity": list(self.non_uniformity),
            "unit": self.unit,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TargetRegion:
        """Return the region that :meth:`to_dict` wrote.

        Raises:
            TypeError: for anything but a mapping.

        >>> target = TargetRegion.flatter(by=2)
        >>> TargetRegion.from_dict(target.to_dict()) == target
        True
        """
        require_keys(state, (), name="target")
        return cls(**state)

    def __str__(self) -> str:
        unit = {"absolute": "", "present": " of the present", "limit": " of the limit"}[self.unit]
        return ", ".join(
            f"{name.replace('_', '-')} {_interval(self.bounds(name))}{unit}"
            for name in ("sharpness", "non_uniformity")
            if self.bounds(name) != OPEN
        )

    def _require_absolute(self, what: str) -> None:
        if self.unit == "present":
            raise ValueError(
                f"{what} of a region relative to the present: call resolve(margins) first"
            )
        if self.unit == "limit":
            raise ValueError(f"{what} of a share of the limits: expected an absolute region")


def resolved(target: TargetRegion, margins: StabilityMargins) -> TargetRegion:
    """Return ``target`` in absolute numbers, or unchanged while ``margins`` lack a value for that."""
    if margins.failure is not None or not margins.converged:
        return target
    for name, value in bounded_values(margins).items():
        if target.bounds(name) != OPEN and not (value is not None and value > 0):
            return target
    return target.resolve(margins)


def why_unknown(target: TargetRegion, rule: UpdateRule) -> str | None:
    """Return why steering cannot act yet: no absolute region, or no limit; else ``None``."""
    if target.unit == "present":
        return _UNRESOLVED
    return None if rule.has_limit else f"the limit is not known: {rule.unknown}"


def bounded_values(margins: StabilityMargins) -> dict[str, float | None]:
    """Return the measured values of the bounded quantities by name; ``None`` if not measured."""
    return {"sharpness": margins.limited_sharpness, "non_uniformity": margins.non_uniformity}


def at_lr(rule: UpdateRule, lr: float) -> UpdateRule:
    """Return ``rule`` at another learning rate, with the same ratios between groups.

    >>> at_lr(UpdateRule(lr=0.4, group_lrs=(0.4, 0.1)), 0.2).group_lrs
    (0.2, 0.05)
    """
    group_lrs = tuple(lr * (group_lr / rule.lr) for group_lr in rule.group_lrs)
    return replace(rule, lr=lr, group_lrs=group_lrs)


def lr_at_limit(rule: UpdateRule, sharpness: float) -> float:
    r"""Return the learning rate at which ``rule``'s limit is ``sharpness``.

    The limit of every rule with momentum has the form :math:`A/\eta - D`, such as 2/η minus the weight
    decay. The limits at the rates 1 and 2 give A and D.

    >>> lr_at_limit(UpdateRule(lr=1.0, weight_decay=0.5), 3.5)
    0.5
    """
    sharpness = positive("sharpness", sharpness)
    if rule.ascent:
        inner = replace(rule, ascent=0.0)
        return lr_at_limit(inner, sharpness + rule.ascent * sharpness**2)
    if rule.lookahead is not None and rule.decoupled_weight_decay:
        raise ValueError(
            f"lookahead={rule.lookahead} with decoupled weight decay: the learning rate at a limit is"
            " not known"
        )
    if rule.filter is not None and rule.lookahead is None:
        return rule.linear_step.max_lr(sharpness)
    limit_at_1, limit_at_2 = (at_lr(rule, lr).max_sharpness for lr in (1.0, 2.0))
    scale = 2 * (limit_at_1 - limit_at_2)  # A
    return scale / (sharpness + (scale - limit_at_1))


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
