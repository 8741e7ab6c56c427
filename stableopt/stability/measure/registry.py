r"""The registry of quantities: what each needs, how it is measured, its limit and its chart.

:func:`~stableopt.measure`, the monitor, :class:`~stableopt.StabilityMargins`, sinks and plots read this
registry. A new quantity is one entry::

    def trace(evaluation):                          # has evaluation.problem, evaluation.rule, ...
        return QuantityResult(value=float(...))

    register(Quantity("trace", trace))
    measure(model, loss_fn, data, quantities=("sharpness", "trace"))["trace"].value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from stableopt._support.text_table import aligned
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "DEFAULT_QUANTITIES",
    "QUANTITIES",
    "Chart",
    "Need",
    "Quantity",
    "register",
    "split",
    "text_lines",
]

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

    @property
    def title(self) -> str:
        """The quantity in words."""
        return self.chart.title if self.chart else self.name.replace("_", " ")

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
        unreadable = rule is not None and not rule.has_limit
        needs_rule = bool(self.needs & {"rule", "preconditioner"})
        if needs_rule and rule is not None and unreadable and rule.norm is None:
            raise ValueError(f"quantities: {self.name} needs the update rule. {rule.unknown}")
        if "blocks" in self.needs and not (rule is not None and rule.blocks):
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


def text_lines(
    numbers: Mapping[str, float | None], results: Mapping[str, QuantityResult]
) -> list[str]:
    """Return known numbers, a table of results, and what failed, as lines of text.

    >>> for line in text_lines({"step": 1000}, {"sharpness": QuantityResult(15.0, 20.0, 0.75)}):
    ...     print(line)
    step 1,000
    quantity   value  limit  ratio
    sharpness     15     20   0.75
    """
    known = {name: number for name, number in numbers.items() if number is not None}
    head = ", ".join(
        f"{name} {x:,}" if isinstance(x, int) else f"{name} {x:.4g}" for name, x in known.items()
    )
    rows, failures = [["quantity", "value", "limit", "ratio"]], []
    for name, result in results.items():
        title = QUANTITIES[name].title if name in QUANTITIES else name
        if result.failure is not None:
            failures.append(f"{title} was not measured: {result.failure}")
        if result.value is not None:
            cells = (result.value, result.limit, result.ratio)
            rows.append([title, *("–" if x is None else f"{x:.4g}" for x in cells)])
    return [head, *(aligned(rows) if len(rows) > 1 else []), *failures]


def split(key: str) -> tuple[str, str]:
    """Split a key of a record into the name of a quantity and the part of its result.

    >>> split("sharpness"), split("sharpness_limit")
    (('sharpness', 'value'), ('sharpness', 'limit'))
    """
    for part in _PARTS:
        if key.endswith(f"_{part}"):
            return key.removesuffix(f"_{part}"), part
    return key, "value"
