"""`UpdateRule`: one step of an optimizer, reduced to what determines linear stability.

Three examples::

    UpdateRule(lr=0.1, momentum=0.9).max_sharpness          # 38.0
    UpdateRule.from_optimizer(optimizer)                    # read from any known optimizer
    UpdateRule.register(MyOptimizer, lambda opt: UpdateRule(lr=opt.param_groups[0]["lr"]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stableopt._support.arguments import shown
from stableopt._support.deprecation import warn_renamed
from stableopt.stability.rules.filters import Filter, lookahead_edge
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.stability.rules.norms import StepNorm
from stableopt.stability.rules.preconditioner import (
    AwaitedStep,
    StepPreconditioner,
    UnknownPreconditioner,
    UnknownStep,
)
from stableopt.stability.rules.reader_registry import ReaderRegistry, base_optimizer

__all__ = ["REGISTRY", "Reader", "UpdateRule", "maximizes"]


Reader = Callable[[Any], "UpdateRule"]

REGISTRY: ReaderRegistry[UpdateRule] = ReaderRegistry()
"""The readers of known optimizers, which the package of the readers registers."""


def maximizes(optimizer: torch.optim.Optimizer) -> list[bool]:
    """Return for each group whether it ascends; some packages have one setting for all groups."""
    default = getattr(optimizer, "maximize", False)
    return [bool(group.get("maximize", default)) for group in optimizer.param_groups]


@dataclass(frozen=True)
class UpdateRule:
    r"""One linearised step: a preconditioner, and the coefficients that determine stability.

    .. math::
        g = P(\nabla f + \lambda\theta) + \lambda''\theta, \quad m' = \beta m + (1-\tau) g, \quad
        \theta' = (1-\eta\lambda')\theta - \eta\,[(1-\nu)\, g + \nu\, m']

    covers ``torch.optim.SGD`` (P = 1; with Nesterov's momentum the bracket is :math:`g + \beta m'`)
    and adaptive optimizers, where P is a snapshot of the last step. With P = 1 the limit is on
    :math:`\lambda_{\max}(H)`, and weight decay lowers the limit. Otherwise it is on
    :math:`\lambda_{\max}(P(H+\Lambda))`, the *preconditioned* sharpness, with coupled weight decay, and
    a :math:`\lambda''` that differs between groups, in :math:`\Lambda`. Two cases of SGD also count as
    preconditioned: learning rates by group, which are :math:`P = \mathrm{diag}(\eta_g)/\eta` at the
    largest rate :math:`\eta`; and weight decay that differs between groups.

    Attributes:
        lr: learning rate, the largest among the groups.
        momentum: beta.
        dampening: tau.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: coupled weight decay lambda if all groups share it, else 0.
        maximize: whether steps ascend, and so minimise -f.
        full_batch: whether each step uses the gradient of all samples (gradient descent).
        group_lrs: learning rate of each group; empty if all are ``lr``.
        group_weight_decays: weight decay of each group; empty if all are ``weight_decay``.
        decoupled_weight_decay: lambda', which shrinks parameters directly, as in AdamW.
        momentum_share: nu; below 1 the step includes a share of the gradient itself, as in NAdam.
        preconditioner: P; ``None`` for 1.
        filter: ``(num, den)`` of another linear filter Q of the preconditioned gradients, with the step
            :math:`\theta' = (1-\eta\lambda')\theta - \eta\,Q*g`, as in
            :class:`~stableopt.stability.LinearStep`. It replaces momentum, dampening, nesterov and
            momentum_share.
        filtered_weight_decay: lambda'', which is added to the gradient after P and before the momentum,
            as in schedule-free AdamW; 0 if it differs between groups.
        group_filtered_decays: this decay of each group, times the group's learning rate over ``lr``;
            empty if all are ``filtered_weight_decay``. The preconditioner has to be diagonal.
        lookahead: ``(k, alpha)`` of Lookahead (Zhang et al., 2019): after every k steps the parameters
            move a share 1 - alpha of the way back; ``None`` without it.
        ascent: rho / norm of SAM, which takes its gradient after an ascent step of length rho, where
            norm is that of the gradient before it. A mode of curvature h then steps like one of
            curvature :math:`h + \mathrm{ascent}\,h^2`.

    Raises:
        ValueError: for values out of range.

    >>> UpdateRule(lr=0.5).max_sharpness
    4.0
    >>> UpdateRule.from_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)).momentum
    0.9
    >>> UpdateRule.from_optimizer(torch.optim.Adam([torch.zeros(1)], lr=0.01)).preconditioned
    True
    >>> round(UpdateRule(lr=0.5, filter=((0.5, 0.5), (1.0,))).max_sharpness, 6)    # mean of two
    4.0
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    maximize: bool = False
    full_batch: bool = False
    group_lrs: tuple[float, ...] = ()
    group_weight_decays: tuple[float, ...] = ()
    decoupled_weight_decay: float = 0.0
    momentum_share: float = 1.0
    preconditioner: StepPreconditioner | None = None
    filter: Filter | None = None
    filtered_weight_decay: float = 0.0
    group_filtered_decays: tuple[float, ...] = ()
    lookahead: tuple[int, float] | None = None
    ascent: float = 0.0

    def __post_init__(self) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "ascent")
        for name in (*names, "decoupled_weight_decay", "filtered_weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number")
        if not (self.preconditioner is None or isinstance(self.preconditioner, StepPreconditioner)):
            raise TypeError(
                f"preconditioner={shown(self.preconditioner)}: expected a StepPreconditioner, such as"
                " MatrixPreconditioner(params, matrix), or None"
            )
        if self.lookahead is not None:
            every, share = self.lookahead
            if not (isinstance(every, int) and every >= 1 and 0 < share <= 1):
                raise ValueError(
                    f"lookahead={self.lookahead}: expected (k, alpha), k at least 1 and 0 < alpha <= 1"
                )
        if self.ascent < 0 or (self.ascent and (self.preconditioned or self.lookahead)):
            raise ValueError(
                f"ascent={self.ascent}: expected at least 0, and 0 with a preconditioner, groups or"
                " lookahead"
            )
        if self.preconditioner is not None and self.group_lrs:
            raise ValueError(
                "group_lrs with a preconditioner: expected the preconditioner to contain the rates"
            )
        if self.group_filtered_decays and (self.preconditioner is None or not self.diagonal):
            raise ValueError("group_filtered_decays: expected a diagonal preconditioner")
        checked = self.linear_step  # raises for values out of range
        object.__setattr__(self, "filter", checked.filter)

    @property
    def linear_step(self) -> LinearStep:
        """The coefficients on one mode, in the preconditioner's coordinates."""
        # The coordinates of a preconditioned rule already include its coupled weight decay.
        coupled = 0.0 if self.preconditioned else self.weight_decay
        return LinearStep(
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            weight_decay=self.filtered_weight_decay + coupled,
            decoupled_weight_decay=self.decoupled_weight_decay,
            momentum_share=self.momentum_share,
            filter=self.filter,
        )

    @property
    def plain(self) -> bool:
        """Whether the step is SGD without momentum, as in the paper's conditions."""
        without_momentum = self.momentum == 0 and self.filter is None
        return self.noise_known and without_momentum and self.decoupled_weight_decay == 0

    @property
    def noise_known(self) -> bool:
        """Whether limits under batch noise are known: without lookahead and ascent."""
        return self.lookahead is None and self.ascent == 0

    @property
    def memory(self) -> float:
        """The decay factor per step of past gradients: beta, or the filter's largest pole.

        >>> round(UpdateRule(lr=0.1, filter=((0.1,), (1.0, -1.3, 0.4))).memory, 6)
        0.8
        """
        if self.filter is None:
            return self.momentum
        return float(np.abs(np.roots(self.filter[1])).max(initial=0.0))

    @property
    def preconditioned(self) -> bool:
        """Whether the limit is on the top eigenvalue of P(H + Lambda) instead of H."""
        by_group = bool(self.group_lrs or self.group_weight_decays)
        return self.preconditioner is not None or by_group

    @property
    def diagonal(self) -> bool:
        """Whether scaled coordinates turn the step into one learning rate for all parameters."""
        return self.preconditioner is None or self.preconditioner.diagonal

    @property
    def unknown(self) -> str | None:
        """Why margins are unknown, for instance before the first step; ``None`` if they are known."""
        p = self.preconditioner
        return p.reason if isinstance(p, UnknownPreconditioner) else None

    @property
    def has_limit(self) -> bool:
        """Whether the limits are known, perhaps without P, which an optimizer's first step shows."""
        return not isinstance(self.preconditioner, UnknownStep)

    @property
    def awaits_step(self) -> bool:
        """Whether a monitor finds the limits by observing a step, as for SAM."""
        return isinstance(self.preconditioner, AwaitedStep)

    @property
    def blocks(self) -> tuple[Any, ...]:
        """The optimizers of a step without a joint limit, each with its rule; empty for other steps."""
        return () if self.has_limit else getattr(self.preconditioner, "blocks", ())

    @property
    def norm(self) -> StepNorm | None:
        """The norm of a normalised step, such as Muon's or that of signs; ``None`` for other steps.

        The preconditioner of a normalised step is a :class:`~stableopt.stability.NormedStep`.
        """
        return getattr(self.preconditioner, "norm", None)

    def _require_limit(self) -> None:
        if not self.has_limit:
            raise ValueError(f"the limit of the update rule is not known: {self.unknown}")

    @property
    def max_sharpness(self) -> float:
        """The largest stable sharpness: :func:`~stableopt.stability.rules.limits.max_sharpness`.

        If the rule is :attr:`preconditioned`, it limits the preconditioned sharpness.

        Raises:
            ValueError: if the optimizer's step is unknown, like every other limit.
        """
        self._require_limit()
        step = self.linear_step
        if self.lookahead is not None and self.lr:
            kept = 1 - self.lr * self.decoupled_weight_decay
            edge = lookahead_edge(kept, step.as_filter, *self.lookahead)
            return edge / self.lr - step.weight_decay
        return self._before_ascent(step.max_sharpness)

    @property
    def min_sharpness(self) -> float:
        """The smallest stable sharpness: :func:`~stableopt.stability.rules.limits.min_sharpness`."""
        self._require_limit()
        return self._before_ascent(self.linear_step.min_sharpness)

    def _before_ascent(self, effective: float) -> float:
        """Return the curvature h that acts like ``effective`` after SAM's ascent, by h + ascent h^2.

        Where no h does, it is the h at which this turns, -1/(2 ascent).
        """
        if not self.ascent or math.isinf(effective):
            return effective
        # The root without cancellation.
        root = math.sqrt(max(0.0, 1 + 4 * self.ascent * effective))
        return 2 * effective / (1 + root) if root else -0.5 / self.ascent

    def max_non_uniformity(
        self,
        batch_size: int | None,
        dataset_size: float | None = None,
        *,
        sharpness: float | None = None,
    ) -> float:
        """Return the largest stable non-uniformity, infinity for the full batch.

        See :func:`~stableopt.stability.rules.limits.max_non_uniformity`. ``batch_size=None`` is the full
        batch. If the rule is :attr:`preconditioned`, it limits that of the preconditioned Hessians.
        """
        self._require_limit()
        if batch_size is None:
            return math.inf
        noise = noise_factor(batch_size, dataset_size)  # raises for a batch above n
        if self.full_batch:
            return math.inf
        if not self.noise_known:
            raise ValueError(
                "the limit of the non-uniformity is not known with lookahead or ascent: measure only"
                " the sharpness"
            )
        return self.linear_step.max_non_uniformity(noise, sharpness)

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer) -> UpdateRule:
        """Return the current rule of ``optimizer``.

        The preconditioner is a snapshot of the last step's; later steps do not change it. Wrappers of
        Accelerate and Lightning are removed. An optimizer without a registered reader, such as a
        subclass that overrides ``step``, has a rule without limits, and ``unknown`` is the reason.

        Raises:
            TypeError: for complex parameters, and for anything but an optimizer.
            ValueError: for groups that differ in more than learning rate, weight decay and settings
                of the preconditioner.
        """
        optimizer = base_optimizer(optimizer)
        kind, reader = cls.reader_of(type(optimizer))
        if reader is not None:
            return reader(optimizer)
        if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
            raise TypeError(f"optimizer={shown(optimizer)}: expected a torch.optim.Optimizer")
        name = type(optimizer).__name__
        reason = f"it overrides step of {kind.__name__}" if kind else "no reader is registered"
        return cls.unknown_step(
            optimizer,
            f"optimizer is {name}, whose update rule is not known ({reason}): register a reader with"
            f" UpdateRule.register({name}, lambda optimizer: UpdateRule(lr=...)), or pass"
            " update_rule=",
        )

    @classmethod
    def reader_of(cls, kind: type) -> tuple[type | None, Reader | None]:
        """Return the first base of an optimizer class with a reader for its ``step``, and the reader.

        If ``kind`` overrides ``step``, the reader is ``None``, and the base is the first with a reader.

        >>> class Own(torch.optim.SGD):
        ...     def step(self, closure=None): ...
        >>> UpdateRule.reader_of(Own)
        (<class 'torch.optim.sgd.SGD'>, None)
        """
        return REGISTRY.find(kind)

    @classmethod
    def unknown_step(cls, optimizer: torch.optim.Optimizer, reason: str) -> UpdateRule:
        """Return a rule without limits, whose ``unknown`` is ``reason``.

        ``lr`` is the largest among the groups, 0 if they have none.

        >>> rule = UpdateRule.unknown_step(torch.optim.Rprop([torch.zeros(1)], lr=0.5), "signs only")
        >>> rule.lr, rule.unknown
        (0.5, 'signs only')
        """
        rates = [float(group.get("lr") or 0.0) for group in optimizer.param_groups]
        valid = [rate for rate in rates if 0 <= rate < math.inf]
        return cls(
            lr=max(valid, default=0.0),
            maximize=any(maximizes(optimizer)),
            preconditioner=UnknownStep(reason),
        )

    @classmethod
    def of(cls, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> UpdateRule:
        r"""Return the joint rule of several optimizers that update different parameters.

        If their momenta agree, the result is one rule with the block-diagonal preconditioner
        :math:`P = \mathrm{diag}(\eta_b P_b)/\eta`. Otherwise no limit holds for all parameters
        together: ``unknown`` is the reason, and ``blocks`` has the rule of each optimizer. An optimizer
        without a reader has a rule without limits. For a single optimizer this is the former name of
        :meth:`from_optimizer`.

        Raises:
            TypeError: for anything but optimizers.
            ValueError: for a parameter that two of them hold; if only some of them maximize; and as
                ``from_optimizer`` does.

        >>> one, two = torch.zeros(1), torch.zeros(1)
        >>> slow, fast = (torch.optim.SGD([p], lr=lr) for p, lr in ((one, 0.1), (two, 0.4)))
        >>> rule = UpdateRule.of([slow, fast])
        >>> rule.lr, rule.preconditioner @ torch.ones(2)
        (0.4, tensor([0.2500, 1.0000]))
        """
        if isinstance(optimizers, torch.optim.Optimizer):
            warn_renamed("UpdateRule.of", "UpdateRule.from_optimizer")
            return cls.from_optimizer(optimizers)
        assert REGISTRY.joint is not None  # the package of the readers sets it
        return REGISTRY.joint(tuple(optimizers))

    @classmethod
    def register(cls, kind: type | str, reader: Reader) -> None:
        """Register ``reader`` for class ``kind``, and subclasses that keep its ``step``.

        A string of module and qualified name, such as ``"lion_pytorch.lion_pytorch.Lion"``, stands for
        a class without importing it.

        >>> class Mine(torch.optim.Adagrad): pass
        >>> UpdateRule.register(Mine, lambda optimizer: UpdateRule(lr=0.25))
        >>> UpdateRule.from_optimizer(Mine([torch.zeros(1)])).max_sharpness
        8.0
        """
        REGISTRY.register(kind, reader)
