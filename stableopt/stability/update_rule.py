"""What one step of an optimizer is, as far as linear stability is concerned.

Three examples::

    UpdateRule(lr=0.1, momentum=0.9).max_sharpness          # 38.0
    UpdateRule.of(optimizer)                                # read from any optimizer that is known
    UpdateRule.register(MyOptimizer, lambda opt: UpdateRule(lr=opt.param_groups[0]["lr"]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stableopt.stability import limits

__all__ = ["UpdateRule"]

Reader = Callable[[Any], "UpdateRule"]

_readers: dict[type, Reader] = {}


@dataclass(frozen=True)
class UpdateRule:
    r"""The linearised step of ``torch.optim.SGD``, with every option that moves its stability.

    Groups with different learning rates :math:`\eta_g` are plain SGD at the largest of them with the
    diagonal preconditioner :math:`P = \mathrm{diag}(\eta_g)/\eta`; the sharpness that the limit
    belongs to is then :math:`\lambda_{\max}(P^{1/2}HP^{1/2})`. Weight decay that differs between
    groups becomes a part of that matrix, and leaves the limit.

    Attributes:
        lr: learning rate; the largest of all groups'.
        momentum: beta.
        dampening: tau.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: coupled weight decay lambda, where all groups share it, else 0.
        maximize: whether steps ascend, so that -f is what is minimised.
        full_batch: whether each step takes the gradient of all samples (gradient descent).
        group_lrs: learning rate of each group, empty where all are ``lr``.
        group_weight_decays: weight decay of each group, empty where all are ``weight_decay``.

    Raises:
        ValueError: for values out of range.

    >>> UpdateRule(lr=0.5).max_sharpness
    4.0
    >>> UpdateRule.of(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)).momentum
    0.9
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

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite number")
        limits.max_sharpness(**self._coefficients)  # raises for values out of range

    @property
    def _coefficients(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "dampening": self.dampening,
            "nesterov": self.nesterov,
            "weight_decay": self.weight_decay,
        }

    @property
    def plain(self) -> bool:
        """Whether it is SGD without momentum, which the paper's conditions speak of."""
        return self.momentum == 0

    @property
    def max_sharpness(self) -> float:
        """The largest stable sharpness: :func:`~stableopt.stability.limits.max_sharpness`."""
        return limits.max_sharpness(**self._coefficients)

    def max_non_uniformity(
        self,
        batch_size: int | None,
        dataset_size: int | None = None,
        *,
        sharpness: float | None = None,
    ) -> float:
        """Return the largest stable non-uniformity, infinity for the full batch.

        See :func:`~stableopt.stability.limits.max_non_uniformity`. ``batch_size=None`` is the full
        batch.
        """
        if batch_size is not None:
            limits.noise_factor(batch_size, dataset_size)  # raises for a batch above n
        if batch_size is None or self.full_batch:
            return math.inf
        return limits.max_non_uniformity(
            batch_size=batch_size,
            dataset_size=dataset_size,
            sharpness=sharpness,
            **self._coefficients,
        )

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> UpdateRule:
        """Read the rule of ``optimizer`` as it stands now.

        Raises:
            TypeError: for an optimizer that nobody registered.
            ValueError: for SGD whose groups differ in more than learning rate and weight decay.
        """
        for kind in type(optimizer).__mro__:
            if kind in _readers:
                return _readers[kind](optimizer)
        name = type(optimizer).__name__
        raise TypeError(
            f"optimizer is {name}, whose update rule is not known: register a reader with"
            f" UpdateRule.register({name}, lambda optimizer: UpdateRule(lr=...)), or pass"
            " update_rule="
        )

    @classmethod
    def register(cls, kind: type, reader: Reader) -> None:
        """Let :meth:`of` read optimizers of class ``kind``, and its subclasses, by ``reader``.

        >>> class Mine(torch.optim.Adagrad): pass
        >>> UpdateRule.register(Mine, lambda optimizer: UpdateRule(lr=0.25))
        >>> UpdateRule.of(Mine([torch.zeros(1)])).max_sharpness
        8.0
        """
        _readers[kind] = reader


def read_sgd(optimizer: torch.optim.SGD, *, full_batch: bool = False) -> UpdateRule:
    """Read ``torch.optim.SGD`` and its subclasses."""
    groups = optimizer.param_groups
    for key in ("momentum", "dampening", "nesterov", "maximize"):
        values = [group[key] for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"param_groups have {key} {values}: expected one value; groups may differ in lr and"
                " weight_decay only, or pass update_rule="
            )
    lrs = tuple(float(group["lr"]) for group in groups)
    decays = tuple(float(group["weight_decay"]) for group in groups)
    one_lr, one_decay = len(set(lrs)) == 1, len(set(decays)) == 1
    # A shared decay moves the limit; with unequal rates the matrix is scaled, so it goes there.
    in_limit = one_decay and one_lr
    return UpdateRule(
        lr=max(lrs),
        momentum=float(groups[0]["momentum"]),
        dampening=float(groups[0]["dampening"]),
        nesterov=bool(groups[0]["nesterov"]),
        weight_decay=decays[0] if in_limit else 0.0,
        maximize=bool(groups[0]["maximize"]),
        full_batch=full_batch,
        group_lrs=() if one_lr else lrs,
        group_weight_decays=() if in_limit else decays,
    )


UpdateRule.register(torch.optim.SGD, read_sgd)
