"""What a measurement found, beside the largest values that the step allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Measurement", "StabilityMargins"]


@dataclass(frozen=True)
class Measurement:
    """One measured value and what is known of its accuracy and cost.

    Attributes:
        value: the value itself.
        residual: the eigen-solver's residual ``|Av - xv|``, relative to the eigenvalue x, and half
            of that for a value that is its root; of an average, its relative standard error.
        products: products with the operator that it took.
        seconds: wall time.
        converged: whether the residual fell below the tolerance.
    """

    value: float
    residual: float
    products: int
    seconds: float
    converged: bool

    def within(self, error: float, tol: float) -> Measurement:
        """Return it for products that are off by ``error`` themselves, as differences are."""
        if error == 0:
            return self
        residual = max(self.residual, error)
        return dataclasses.replace(
            self, residual=residual, converged=self.converged and residual <= tol
        )


@dataclass(frozen=True)
class StabilityMargins:
    r"""Sharpness and non-uniformity at one step, and the largest values that the step allows.

    ``None`` means "not measured" or "not known"; infinity means "no limit", as for the
    non-uniformity of full-batch gradient descent.

    Attributes:
        step: optimizer steps done.
        lr: learning rate, the largest of all groups'.
        batch_size: samples B in a step.
        dataset_size: samples n in all; ``None`` for so many that they do not matter.
        loss: mean loss over the probe data, in eval mode.
        sharpness: :math:`a = \lambda_{\max}(H)`.
        sharpness_limit: the largest a at which gradient descent is stable, :math:`2/\eta` for
            plain SGD; ``None`` where the step is preconditioned, since H alone then has no limit.
        preconditioned_sharpness: :math:`\lambda_{\max}(P(H+\Lambda))`, P the preconditioner of the
            optimizer's last step and :math:`\Lambda` its coupled weight decay; ``None`` where the
            step is not preconditioned, or P not known. Groups with different learning rates, or
            different weight decays, count as preconditioned.
        preconditioned_sharpness_limit: the largest at which the step with P held is stable,
            :math:`(2+2\beta_1)/((1-\beta_1)\eta)` for Adam.
        non_uniformity: :math:`s = \lambda_{\max}(\Sigma)^{1/2}`, of the per-sample
            :math:`P^{1/2}H_iP^{1/2}` where the step is preconditioned.
        non_uniformity_limit: the side of the box (9), :math:`\sqrt{B(n-1)/(n-B)}/\eta` for plain
            SGD.
        theorem1: the left side of condition (8), stable up to 1.
        critical_lr: the largest learning rate that is stable in mean square, exactly or, where there
            are too many directions, an upper bound:
            :func:`~stableopt.stability.critical_lr`. It is of the Gauss–Newton matrix.
        critical_lr_lower: a learning rate up to which all is certainly stable.
        batch_sharpness: :func:`~stableopt.stability.batch_sharpness`, at most :math:`2/\eta` where
            plain SGD stays.
        measurements: residual, products, seconds and convergence of each measured quantity.
        failure: why the measurement failed, or ``None``.
        method: how products with the Hessian were taken, and what of the model's way to train they
            went without: ``"double backward"``, ``"central differences"``, then, separated by
            commas, such as ``"math attention"`` or ``"without autocast"``.

    >>> margins = StabilityMargins(lr=0.1, sharpness=15.0, sharpness_limit=20.0)
    >>> margins.sharpness_ratio, margins.sharpness_margin, margins.stable
    (0.75, 5.0, True)
    """

    step: int = 0
    lr: float | None = None
    batch_size: int | None = None
    dataset_size: int | None = None
    loss: float | None = None
    sharpness: float | None = None
    sharpness_limit: float | None = None
    preconditioned_sharpness: float | None = None
    preconditioned_sharpness_limit: float | None = None
    non_uniformity: float | None = None
    non_uniformity_limit: float | None = None
    theorem1: float | None = None
    critical_lr: float | None = None
    critical_lr_lower: float | None = None
    batch_sharpness: float | None = None
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    failure: str | None = None
    method: str | None = None

    @property
    def sharpness_ratio(self) -> float | None:
        """Sharpness over its limit: the edge of stability is at 1."""
        return _ratio(self.sharpness, self.sharpness_limit)

    @property
    def preconditioned_sharpness_ratio(self) -> float | None:
        """Preconditioned sharpness over its limit: the edge of stability is at 1."""
        return _ratio(self.preconditioned_sharpness, self.preconditioned_sharpness_limit)

    @property
    def non_uniformity_ratio(self) -> float | None:
        """Non-uniformity over its limit; 0 where there is no limit."""
        return _ratio(self.non_uniformity, self.non_uniformity_limit)

    @property
    def critical_lr_ratio(self) -> float | None:
        """Learning rate over the critical one: the edge of mean-square stability is at 1."""
        return _ratio(self.lr, self.critical_lr)

    @property
    def sharpness_margin(self) -> float | None:
        """What is left of the limit: limit minus sharpness."""
        return _margin(self.sharpness, self.sharpness_limit)

    @property
    def preconditioned_sharpness_margin(self) -> float | None:
        """What is left of the limit: limit minus preconditioned sharpness."""
        return _margin(self.preconditioned_sharpness, self.preconditioned_sharpness_limit)

    @property
    def non_uniformity_margin(self) -> float | None:
        """What is left of the limit: limit minus non-uniformity."""
        return _margin(self.non_uniformity, self.non_uniformity_limit)

    @property
    def limited_sharpness(self) -> float | None:
        """The sharpness that a limit belongs to: the preconditioned one, where there is one."""
        own = self.preconditioned_sharpness
        return self.sharpness if own is None else own

    @property
    def edge_ratio(self) -> float | None:
        """:attr:`limited_sharpness` over its limit, whatever the optimizer: 1 at the edge.

        >>> StabilityMargins(sharpness=15.0, sharpness_limit=20.0).edge_ratio
        0.75
        """
        own = self.preconditioned_sharpness_ratio
        return self.sharpness_ratio if own is None else own

    @property
    def stable(self) -> bool | None:
        """Whether every ratio that is known is at most 1: the box (9). ``None`` if none is."""
        ratios = [r for r in (self.edge_ratio, self.non_uniformity_ratio) if r is not None]
        return all(r <= 1 for r in ratios) if ratios else None

    @property
    def converged(self) -> bool:
        """Whether the measurement did not fail and every value reached its tolerance."""
        return self.failure is None and all(m.converged for m in self.measurements.values())

    @property
    def seconds(self) -> float:
        """Wall time of the eigen-solvers."""
        return sum(m.seconds for m in self.measurements.values())

    def record(self) -> dict[str, float]:
        """Return what a sink is given: every known number by name, ratios included.

        Infinite limits stay; a failed measurement has no values, and ``failed`` is 1.

        >>> StabilityMargins(sharpness=15.0, sharpness_limit=20.0).record()["sharpness_ratio"]
        0.75
        """
        names = [f.name for f in dataclasses.fields(self)]
        names = [n for n in names if n not in _NOT_NUMBERS]
        names += [
            "sharpness_ratio",
            "preconditioned_sharpness_ratio",
            "non_uniformity_ratio",
            "critical_lr_ratio",
        ]
        known = {name: getattr(self, name) for name in names}
        record = {name: float(value) for name, value in known.items() if value is not None}
        record["seconds"] = self.seconds
        record["failed"] = float(self.failure is not None)
        record["converged"] = float(self.converged)
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and dicts, for checkpoints; :meth:`from_dict` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> StabilityMargins:
        """Return the margins that :meth:`to_dict` wrote.

        >>> margins = StabilityMargins(step=3, sharpness=1.0)
        >>> StabilityMargins.from_dict(margins.to_dict()) == margins
        True
        """
        measurements = {name: Measurement(**m) for name, m in state["measurements"].items()}
        return cls(**{**state, "measurements": measurements})


_NOT_NUMBERS = ("step", "measurements", "failure", "method")


def _ratio(value: float | None, limit: float | None) -> float | None:
    if value is None or limit is None:
        return None
    # A limit of zero or less admits nothing: any step is over the edge.
    return value / limit if limit > 0 else float("inf")


def _margin(value: float | None, limit: float | None) -> float | None:
    return None if value is None or limit is None else limit - value
