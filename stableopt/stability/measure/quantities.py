r"""The registry of quantities: what each needs, how it is measured, its limit and its chart.

:func:`~stableopt.measure`, the monitor, :class:`~stableopt.StabilityMargins`, sinks and plots read this
registry. A new quantity is one entry::

    def trace(evaluation):                          # has evaluation.problem, evaluation.rule, ...
        return QuantityResult(value=float(...))

    register(Quantity("trace", trace))
    measure(model, loss_fn, data, quantities=("sharpness", "trace"))["trace"].value
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal

from stableopt.curvature import Hessian
from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.mean_square.critical_lr import critical_lr
from stableopt.stability.mean_square.theorem1 import SecondMomentExcess
from stableopt.stability.measure.batch_quantities import (
    measured_batch_sharpness,
    measured_largest_batch_sharpness,
    measured_mean_batch_sharpness,
)
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.generalised_sharpness import measured_generalised_sharpness
from stableopt.stability.measure.measurement import Measurement, QuantityResult, root
from stableopt.stability.rules.limits import noise_factor
from stableopt.stability.rules.preconditioner import UnknownStep
from stableopt.stability.rules.several import SeparateBlocks
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["DEFAULT_QUANTITIES", "QUANTITIES", "Chart", "Need", "Quantity", "register", "split"]

Need = Literal[
    "rule",
    "batch_size",
    "per_sample",
    "no_momentum",
    "preconditioner",
    "step",
    "norm",
    "taken_step",
    "blocks",
]

DEFAULT_QUANTITIES = ("sharpness",)
"""The default of :func:`~stableopt.measure` and the monitor. The sharpness costs a few gradients, needs
no batch size, and is defined for every optimizer, precision and sharding."""

_PARTS = ("limit", "lower", "ratio", "margin", "upper_bound")

_LONGEST_TAG, _LONGEST_SHORT_TAG = 9, 5


@dataclass(frozen=True)
class Chart:
    r"""How plots and TensorBoard show a quantity and its limit.

    Attributes:
        title: the quantity in words.
        symbol: its symbol in LaTeX, for axis labels.
        tag: its tag in TensorBoard, ``stability/<tag>_value``: at most 9 characters, since legends
            have room for 25.
        short_tag: its tag in ``stability/<short_tag>_ratio_low``: at most 5 characters, by default
            the first ones of ``tag``.
        band: half the width of the band around the limit, relative to the limit.

    Raises:
        ValueError: for a tag that is too long.
    """

    title: str
    symbol: str
    tag: str
    short_tag: str = ""
    band: float = 0.01

    def __post_init__(self) -> None:
        if not self.short_tag:
            object.__setattr__(self, "short_tag", self.tag[:_LONGEST_SHORT_TAG])
        for name, most in (("tag", _LONGEST_TAG), ("short_tag", _LONGEST_SHORT_TAG)):
            if not 0 < len(getattr(self, name)) <= most:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected 1 to {most} characters")

    @property
    def label(self) -> str:
        """The axis label: title and symbol."""
        return f"{self.title} {self.symbol}"


@dataclass(frozen=True)
class Quantity:
    """One quantity that can be measured.

    Attributes:
        name: its name in ``quantities=``, ``margins[...]`` and records. Records also have
            ``<name>_limit``, ``<name>_lower`` and ``<name>_ratio``, if known.
        measured: takes an :class:`~stableopt.stability.measure.evaluation.Evaluation` and returns the
            result without limit and seconds.
        needs: its requirements. ``"rule"``: an update rule. ``"batch_size"``: the samples in a step.
            ``"per_sample"``: derivatives of single samples, which ``fully_shard`` cannot provide, and
            a diagonal preconditioner, whose root multiplies them. ``"no_momentum"``: a rule without
            momentum. ``"preconditioner"``: a preconditioned rule. ``"step"``: a first step of an
            adaptive optimizer, which makes its preconditioner known. ``"norm"``: an optimizer that
            descends in a norm, and unsharded parameters. ``"taken_step"``: the parameters before the
            last step, which a monitor records. ``"blocks"``: optimizers without a common limit.
        limit: maps ``(rule, batch_size, dataset_size)`` to the largest stable value, or to ``None`` if
            it is not known. ``batch_size`` is ``None`` if it is not known.
        any_rule: whether ``limit`` also accepts unknown rules, and ``None`` as the rule.
        first_order: whether losses and gradients suffice: second derivatives are then not checked.
        limits_lr: whether the value is itself a limit on the learning rate.
        rare: whether a monitor measures it only once in ``spectrum_every`` measurements.
        in_box: whether it is a side of the box (9) of Wu, Ma & E: margins contain its limit even if
            it is not measured.
        chart: its chart, or ``None``.

    Raises:
        ValueError: for a name that is not an identifier, or ends like a part, such as ``_limit``.
    """

    name: str
    measured: Callable[[Evaluation], QuantityResult]
    needs: Set[Need] = frozenset()
    limit: Callable[[Any, int | None, int | None], float | None] | None = None
    any_rule: bool = False
    first_order: bool = False
    limits_lr: bool = False
    rare: bool = False
    in_box: bool = False
    chart: Chart | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or split(self.name)[1] != "value":
            raise ValueError(
                f"name={self.name!r}: expected an identifier that does not end in"
                f" {', '.join('_' + part for part in _PARTS)}"
            )

    def limit_of(
        self, rule: UpdateRule | None, batch_size: int | None, dataset_size: int | None
    ) -> float | None:
        """Return the limit, or ``None`` if it is not known."""
        if self.limit is None:
            return None
        if not self.any_rule and (rule is None or rule.unknown is not None):
            return None
        return self.limit(rule, batch_size, dataset_size)

    def check(self, rule: UpdateRule | None, *, sharded: bool, steps: bool) -> None:
        """Raise ``ValueError`` if the rule, a ``sharded`` problem or a lack of ``steps`` excludes it."""
        if "norm" in self.needs and (rule is None or rule.norm is None):
            raise ValueError(
                f"quantities: {self.name} needs an optimizer whose steps have a length that does not"
                " depend on the gradient, such as Muon, Lion or Rprop; measure the sharpness instead"
            )
        if "norm" in self.needs and sharded:
            raise ValueError(
                f"quantities: {self.name} needs whole matrices, but fully_shard splits them; measure"
                " an unsharded copy of the model"
            )
        if "taken_step" in self.needs and not steps:
            raise ValueError(
                f"quantities: {self.name} belongs to a step, and measure() sees no step: expected a"
                " StabilityMonitor, which records steps, or critical_sharpness(), which tries one"
            )
        unreadable = rule is not None and isinstance(rule.preconditioner, UnknownStep)
        needs_rule = bool(self.needs & {"rule", "preconditioner"})
        if needs_rule and rule is not None and unreadable and rule.norm is None:
            raise ValueError(f"quantities: {self.name} needs the update rule. {rule.unknown}")
        if "blocks" in self.needs and not (
            rule is not None and isinstance(rule.preconditioner, SeparateBlocks)
        ):
            raise ValueError(
                f"quantities: {self.name} needs several optimizers whose momenta differ; measure the"
                " sharpness instead"
            )
        if "no_momentum" in self.needs and rule is not None and not rule.plain:
            raise ValueError(
                f"quantities: {self.name} is defined for plain SGD, but momentum is {rule.memory} and"
                f" decoupled weight decay {rule.decoupled_weight_decay}; leave it out"
            )
        if "per_sample" in self.needs and not (rule is None or rule.diagonal):
            raise ValueError(
                f"quantities: {self.name} needs a preconditioner with a root to multiply by, and this"
                " one is not diagonal; leave it out"
            )
        if "per_sample" in self.needs and sharded:
            raise ValueError(
                f"quantities: {self.name} needs the gradients of single samples, but fully_shard sums"
                " them over samples and ranks; measure the sharpness alone, or an unsharded copy of"
                " the model"
            )
        if "preconditioner" in self.needs and (rule is None or not rule.preconditioned):
            raise ValueError(
                f"quantities: {self.name} needs an optimizer with a preconditioner; measure the"
                " sharpness instead"
            )

    def check_known(self, rule: UpdateRule | None, batch_size: int | None) -> None:
        """Raise ``ValueError`` if it needs a rule or a batch size that is ``None``."""
        needed = {"a learning rate": ("rule", rule), "a batch size": ("batch_size", batch_size)}
        arguments = {name: value for name, (need, value) in needed.items() if need in self.needs}
        if None in arguments.values():
            raise ValueError(
                f"quantities: {self.name} needs {' and '.join(arguments)}; pass optimizer= or lr=,"
                " and batch_size="
            )


QUANTITIES: dict[str, Quantity] = {}
"""All quantities by name, in the order of measurement."""


def register(quantity: Quantity) -> Quantity:
    """Add ``quantity`` to :data:`QUANTITIES`, and return it.

    Raises:
        ValueError: if the name is taken.

    >>> register(Quantity("parameters", lambda e: QuantityResult(e.problem.num_params))).name
    'parameters'
    >>> QUANTITIES.pop("parameters").limit is None
    True
    """
    if quantity.name in QUANTITIES:
        raise ValueError(f"name={quantity.name!r}: a quantity of that name is registered already")
    QUANTITIES[quantity.name] = quantity
    return quantity


def split(key: str) -> tuple[str, str]:
    """Split a key of a record into the name of a quantity and the part of its result.

    >>> split("sharpness"), split("sharpness_limit")
    (('sharpness', 'value'), ('sharpness', 'limit'))
    """
    for part in _PARTS:
        if key.endswith(f"_{part}"):
            return key.removesuffix(f"_{part}"), part
    return key, "value"


# -- the top eigenvalue of an operator -------------------------------------------------------------


def _sharpness(evaluation: Evaluation) -> QuantityResult:
    return evaluation.top_eigenvalue("sharpness", evaluation.plain_hessian(), shares=True)


def _preconditioned_sharpness(evaluation: Evaluation) -> QuantityResult:
    name, preconditioner = "preconditioned_sharpness", evaluation.preconditioner
    return evaluation.top_eigenvalue(
        name, evaluation.hessian(), preconditioner=preconditioner, shares=True
    )


def _non_uniformity(evaluation: Evaluation) -> QuantityResult:
    return evaluation.top_eigenvalue(
        "non_uniformity", evaluation.non_uniformity(), value=root, degree=2
    )


def _non_uniformity_limit(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> float | None:
    noise_known = batch_size is not None and rule.diagonal and rule.noise_known
    known = rule.full_batch or noise_known
    return rule.max_non_uniformity(batch_size, dataset_size) if known else None


def _theorem1(evaluation: Evaluation) -> QuantityResult:
    rule, hessian = evaluation.rule, evaluation.hessian()
    assert rule is not None
    assert isinstance(hessian, Hessian)
    noise = 0.0
    if not rule.full_batch and evaluation.batch_size is not None:
        noise = noise_factor(evaluation.batch_size, evaluation.dataset_size)
    excess = SecondMomentExcess(
        hessian,
        evaluation.non_uniformity(),
        lr=rule.lr,
        noise=noise,
        weight_decay=0.0 if rule.preconditioned else rule.weight_decay,
    )
    # The operator's largest eigenvalue is the left side of (8) minus 1.
    return evaluation.top_eigenvalue("theorem1", excess, value=lambda excess: excess + 1.0)


# -- other searches and averages -------------------------------------------------------------------


def _critical_lr(evaluation: Evaluation) -> QuantityResult:
    rate = critical_lr(
        require_samples(evaluation.problem, "critical_lr"),
        evaluation.batch_size,
        update_rule=evaluation.rule,
        dataset_size=math.inf if evaluation.dataset_size is None else evaluation.dataset_size,
        with_hessian=False,
        seed=evaluation.seed,
    )
    measurement = Measurement(rate.value, rate.residual, rate.products, rate.converged)
    return QuantityResult.from_measurement(measurement, lower=rate.lower)


# -- the registry ----------------------------------------------------------------------------------

register(
    Quantity(
        "sharpness",
        _sharpness,
        limit=lambda rule, _, __: None if rule.preconditioned else rule.max_sharpness,
        in_box=True,
        chart=Chart("sharpness", r"$\lambda_{\max}(H)$", tag="sharpness"),
    )
)
register(
    Quantity(
        "preconditioned_sharpness",
        _preconditioned_sharpness,
        needs={"preconditioner", "step"},
        limit=lambda rule, _, __: rule.max_sharpness if rule.preconditioned else None,
        in_box=True,
        chart=Chart("preconditioned sharpness", r"$\lambda_{\max}(PH)$", "pre_sharp", "pre"),
    )
)
register(
    Quantity(
        "non_uniformity",
        _non_uniformity,
        needs={"per_sample", "step"},
        limit=_non_uniformity_limit,
        in_box=True,
        chart=Chart("non-uniformity", r"$\lambda_{\max}(\Sigma)^{1/2}$", "non_unif", "nonuf"),
    )
)
register(
    Quantity(
        "theorem1",
        _theorem1,
        needs={"rule", "batch_size", "per_sample", "no_momentum", "step"},
        limit=lambda *_: 1.0,
    )
)
register(
    Quantity(
        "critical_lr",
        _critical_lr,
        needs={"rule", "batch_size", "per_sample", "step"},
        limits_lr=True,
    )
)
register(
    Quantity(
        "batch_sharpness",
        measured_batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        chart=Chart("batch sharpness", r"$E[g_B^\top H_Bg_B]/E\|g_B\|^2$", "batch", "batch"),
    )
)
register(
    Quantity(
        "mean_batch_sharpness",
        measured_mean_batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        chart=Chart(
            "mean batch sharpness", r"$E[g_B^\top H_Bg_B/\|g_B\|^2]$", "meanbatch", "meanb"
        ),
    )
)
register(
    Quantity(
        "largest_batch_sharpness",
        measured_largest_batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        limit=lambda rule, _, __: 2 / rule.lr if rule.plain and rule.lr else None,
        chart=Chart("sharpest batch, at most", r"$\max_B\lambda_{\max}(H_B)$", "max_batch", "maxb"),
    )
)
register(
    Quantity(
        "generalised_sharpness",
        measured_generalised_sharpness,
        needs={"norm"},
        chart=Chart(
            "generalised sharpness, at least", r"$\max_{\|d\|=1}d^\top Hd$", "gen_sharp", "gen"
        ),
    )
)
