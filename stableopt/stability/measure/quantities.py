r"""The registry of quantities: what each needs, how it is measured, its limit and its chart.

:func:`~stableopt.measure`, the monitor, :class:`~stableopt.StabilityMargins`, sinks and plots take
quantities from here, so that a new one is one entry::

    def trace(at):                                  # at: an Evaluation, with at.problem, at.rule, ...
        return QuantityResult(value=float(...))

    register(Quantity("trace", trace))
    measure(model, loss_fn, data, quantities=("sharpness", "trace"))["trace"].value
"""

from __future__ import annotations

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
from stableopt.stability.measure.generalised_sharpness import measured_in_norm
from stableopt.stability.measure.measurement import Measurement, QuantityResult
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
"""What :func:`~stableopt.measure` and the monitor measure unless asked for more: it costs a few
gradients, needs no batch size, and is defined for every optimizer, precision and sharding."""

_PARTS = ("limit", "lower", "ratio", "margin", "upper_bound")

_LONGEST_TAG, _LONGEST_SHORT_TAG = 9, 5


@dataclass(frozen=True)
class Chart:
    r"""How plots and TensorBoard show a quantity and its limit.

    Attributes:
        title: the quantity in words.
        symbol: in LaTeX, for axis labels.
        tag: its tag in TensorBoard, at most 9 characters, since legends have room for 25:
            ``stability/<tag>_value``.
        short_tag: at most 5 characters, by default the first of ``tag``:
            ``stability/<short_tag>_ratio_low``.
        band: half the width of the band around the limit, as a share of it.

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
        """The label of an axis."""
        return f"{self.title} {self.symbol}"


@dataclass(frozen=True)
class Quantity:
    """One quantity that can be measured.

    Attributes:
        name: its name in ``quantities=``, in ``margins[...]`` and in records, which also have
            ``<name>_limit``, ``<name>_lower`` and ``<name>_ratio`` if they are known.
        measured: takes an :class:`~stableopt.stability.measure.evaluation.Evaluation` and returns the
            result without limit and seconds.
        needs: what it requires. ``"rule"``: an update rule. ``"batch_size"``: the samples in a step.
            ``"per_sample"``: derivatives of single samples, which ``fully_shard`` cannot provide, and
            a diagonal preconditioner, since its root enters them. ``"no_momentum"``: a rule without
            momentum. ``"preconditioner"``: a preconditioned rule. ``"step"``: that an adaptive
            optimizer has taken a step, which makes its preconditioner known. ``"norm"``: an optimizer
            that descends in a norm, and whole parameters. ``"taken_step"``: a step whose beginning was
            recorded, as by a monitor. ``"blocks"``: several optimizers without a common limit.
        limit: maps ``(rule, batch_size, dataset_size)`` to the largest value that the rule allows, or
            to ``None`` if it is not known. A ``batch_size`` of ``None`` is not known.
        any_rule: whether ``limit`` also holds for rules that are not known, and takes ``None``.
        first_order: whether losses and gradients suffice, so that second derivatives need no check.
        limits_lr: whether the value is itself a limit on the learning rate.
        rare: whether a monitor measures it once in ``spectrum_every`` measurements only.
        in_box: whether it is a side of the box (9) of Wu, Ma & E: margins contain its limit even if
            it is not measured.
        chart: its chart, or ``None``.

    Raises:
        ValueError: for a name that is not an identifier, or has the ending of a part such as
            ``_limit``.
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
        """Raise ``ValueError`` if it is undefined for the rule, a sharded problem, or without steps."""
        if "norm" in self.needs and (rule is None or rule.norm is None):
            raise ValueError(
                f"quantities: {self.name} needs an optimizer whose steps have a length of their own,"
                " such as Muon, Lion or Rprop; for others the limit is on the sharpness"
            )
        if "norm" in self.needs and sharded:
            raise ValueError(
                f"quantities: {self.name} needs whole matrices, and fully_shard holds parts of them;"
                " measure a replica"
            )
        if "taken_step" in self.needs and not steps:
            raise ValueError(
                f"quantities: {self.name} belongs to a step, and measure() sees none: expected a"
                " StabilityMonitor, which records steps; critical_sharpness() tries one"
            )
        of_rule = self.needs & {"rule", "preconditioner"}
        unread = rule is not None and isinstance(rule.preconditioner, UnknownStep)
        if of_rule and rule is not None and unread and rule.norm is None:
            raise ValueError(f"quantities: {self.name} needs the update rule. {rule.unknown}")
        if "blocks" in self.needs and not (
            rule is not None and isinstance(rule.preconditioner, SeparateBlocks)
        ):
            raise ValueError(
                f"quantities: {self.name} needs several optimizers whose momenta differ; for others"
                " the limit is on the sharpness, or the preconditioned sharpness"
            )
        if "no_momentum" in self.needs and rule is not None and not rule.plain:
            raise ValueError(
                f"quantities: {self.name} is a condition on SGD without momentum, and momentum is"
                f" {rule.memory}, decoupled weight decay {rule.decoupled_weight_decay}; leave it out"
            )
        if "per_sample" in self.needs and not (rule is None or rule.diagonal):
            raise ValueError(
                f"quantities: {self.name} needs a preconditioner with a root that can be multiplied"
                " by, and this one is not diagonal; leave it out"
            )
        if "per_sample" in self.needs and sharded:
            raise ValueError(
                f"quantities: {self.name} needs the gradients of single samples, and fully_shard sums"
                " them over samples and ranks; expected sharpness alone. Measure a replica for the"
                " others"
            )
        if "preconditioner" in self.needs and (rule is None or not rule.preconditioned):
            raise ValueError(
                f"quantities: {self.name} needs an optimizer with a preconditioner; for others the"
                " limit is on the sharpness"
            )

    def check_known(self, rule: UpdateRule | None, batch_size: int | None) -> None:
        """Raise ``ValueError`` if the rule or the batch size is needed and not known."""
        needed = {"a learning rate": ("rule", rule), "a batch size": ("batch_size", batch_size)}
        names = [name for name, (need, _) in needed.items() if need in self.needs]
        if any(need in self.needs and known is None for need, known in needed.values()):
            raise ValueError(
                f"quantities: {self.name} needs {' and '.join(names)}; pass optimizer= or lr=, and"
                " batch_size="
            )


QUANTITIES: dict[str, Quantity] = {}
"""All quantities by name, in the order in which they are measured."""


def register(quantity: Quantity) -> Quantity:
    """Add ``quantity`` to :data:`QUANTITIES`, and return it.

    Raises:
        ValueError: if the name is taken.

    >>> register(Quantity("parameters", lambda at: QuantityResult(at.problem.num_params))).name
    'parameters'
    >>> QUANTITIES.pop("parameters").limit is None
    True
    """
    if quantity.name in QUANTITIES:
        raise ValueError(f"name={quantity.name!r}: a quantity of that name is registered already")
    QUANTITIES[quantity.name] = quantity
    return quantity


def split(key: str) -> tuple[str, str]:
    """Return the quantity and the part of its result that a key of a record names.

    >>> split("sharpness"), split("sharpness_limit")
    (('sharpness', 'value'), ('sharpness', 'limit'))
    """
    for part in _PARTS:
        if key.endswith(f"_{part}"):
            return key.removesuffix(f"_{part}"), part
    return key, "value"


# -- the top eigenvalue of an operator -------------------------------------------------------------


def _sharpness(at: Evaluation) -> QuantityResult:
    return at.top_eigenvalue("sharpness", at.plain_hessian(), shares=True)


def _preconditioned_sharpness(at: Evaluation) -> QuantityResult:
    name, preconditioner = "preconditioned_sharpness", at.preconditioner
    return at.top_eigenvalue(name, at.hessian(), preconditioner=preconditioner, shares=True)


def _non_uniformity(at: Evaluation) -> QuantityResult:
    def root(eigenvalue: float) -> float:
        return float(max(eigenvalue, 0.0) ** 0.5)  # rounding may leave it below zero

    return at.top_eigenvalue("non_uniformity", at.non_uniformity(), value=root, degree=2)


def _non_uniformity_limit(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> float | None:
    known = rule.full_batch or (batch_size is not None and rule.diagonal and rule.noise_known)
    return rule.max_non_uniformity(batch_size, dataset_size) if known else None


def _theorem1(at: Evaluation) -> QuantityResult:
    rule, hessian = at.rule, at.hessian()
    assert rule is not None
    assert isinstance(hessian, Hessian)
    noise = 0.0
    if not rule.full_batch and at.batch_size is not None:
        noise = noise_factor(at.batch_size, at.dataset_size)
    excess = SecondMomentExcess(
        hessian,
        at.non_uniformity(),
        lr=rule.lr,
        noise=noise,
        weight_decay=0.0 if rule.preconditioned else rule.weight_decay,
    )
    # The operator is the left side of (8) minus 1.
    return at.top_eigenvalue("theorem1", excess, value=lambda excess: excess + 1.0)


# -- other searches and averages -------------------------------------------------------------------

_MANY = 10**12
"""Number of batches in a finite data set that represents an infinite one, with p = 1/B."""


def _critical_lr(at: Evaluation) -> QuantityResult:
    size = at.dataset_size
    if size is None and at.batch_size is not None:
        size = _MANY * at.batch_size
    found = critical_lr(
        require_samples(at.problem, "critical_lr"),
        at.batch_size,
        update_rule=at.rule,
        dataset_size=size,
        with_hessian=False,
        seed=at.seed,
    )
    measurement = Measurement(found.value, found.residual, found.products, 0.0, found.converged)
    return QuantityResult.from_measurement(measurement, lower=found.lower)


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
        measured_in_norm,
        needs={"norm"},
        chart=Chart(
            "generalised sharpness, at least", r"$\max_{\|d\|=1}d^\top Hd$", "gen_sharp", "gen"
        ),
    )
)
